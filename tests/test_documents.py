"""What the documents say is run and resolved: the guides' commands and Python, and every link.

In a guide, blocks run in order in one directory that has the samples in it; Python blocks share
their names. A ``text`` block is what the block before it prints, ``...`` standing for anything.
``<!-- needs: NAME -->`` before a block names a Python package or a program without which it is not
run; ``<!-- not run here: WHY -->`` speaks for itself. Commands that need transformers, which takes
ten seconds to import, run in this process.
"""

from __future__ import annotations

import doctest
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conftest import ROOT

from qconvert.cli.main import main

GUIDES = sorted((ROOT / "samples").glob("*.md"))
# Documents of the repository itself; models and vectors have cards and notes that are not ours.
DOCUMENTS = [
    ROOT / "README.md",
    *GUIDES,
    *sorted((ROOT / ".github").glob("*.md")),
    *sorted(p for p in (ROOT / "formats").rglob("*.md")),
    *sorted((ROOT / "qconvert").rglob("*.md")),
]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<kind>\w+)\n(?P<body>.*?)^```$"
    r"(?:\n\n```text\n(?P<told>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A piece of a document that is run."""

    page: Path
    line: int
    kind: str
    body: str
    mark: str
    told: str | None

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, if so."""
        what, _, name = self.mark.partition(": ")
        if what == "needs" and not (importlib.util.find_spec(name) or shutil.which(name)):
            return f"{name} is not installed"
        return self.mark if what == "not run here" else None

    def run(self, names: dict[str, Any]) -> str:
        """Run it in the working directory; what it prints."""
        if self.kind == "python":
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(self.body, f"{self.page.name}:{self.line}", "exec"), names)
            return out.getvalue()
        if self.mark == "needs: transformers":
            with redirect_stdout(io.StringIO()) as out:
                for line in self.body.replace("\\\n", " ").splitlines():
                    program, *words = shlex.split(line)
                    assert program == "qconvert"
                    assert main(words) == 0, line
            return out.getvalue()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            ["sh", "-euc", self.body], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def blocks(page: Path) -> list[Block]:
    found = []
    text = page.read_text()
    for m in BLOCK.finditer(text):
        line = text[: m.start("body")].count("\n")
        found.append(Block(page, line, m["kind"], m["body"], m["mark"] or "", m["told"]))
    return found


RUN = [b for page in GUIDES for b in blocks(page)]


class Runner:
    """Runs the blocks of a page, those before one that is asked for first, and each only once."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: dict[Path, dict[str, Any]] = {}
        self.printed: dict[Block, str] = {}

    def run(self, wanted: Block) -> str:
        place = self.directory / wanted.page.stem
        if not place.exists():
            shutil.copytree(ROOT / "samples", place / "samples")
        before = Path.cwd()
        os.chdir(place)
        try:
            for block in (b for b in RUN if b.page == wanted.page and b.line <= wanted.line):
                if block not in self.printed and not block.missing:
                    self.printed[block] = block.run(self.names.setdefault(block.page, {}))
        finally:
            os.chdir(before)
        return self.printed[wanted]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("guides"))


@pytest.mark.parametrize("block", RUN, ids=lambda b: f"{b.page.name}:{b.line}")
def test_a_guide_runs_as_printed(block: Block, runner: Runner) -> None:
    if os.environ.get("QCONVERT_KERNELS") == "reference":
        pytest.skip("native kernels give the same bits: once is enough")
    if block.missing:
        pytest.skip(block.missing)
    printed = runner.run(block)
    if block.told is not None:
        assert doctest.OutputChecker().check_output(block.told, printed, LOOSE), printed


def test_all_that_could_be_run_is() -> None:
    """No block is of a kind that the test above would pass over, and no mark is misspelt."""
    for page in (ROOT / "README.md", *GUIDES):
        found = blocks(page)
        fences = re.findall(r"^```(\w*)$", page.read_text(), re.MULTILINE)
        told = sum(b.told is not None for b in found)
        assert len(fences) == 2 * (len(found) + told), page
        assert {b.kind for b in found} <= {"sh", "python"}, page
        for b in found:
            marks = r"(?:needs: [\w-]+|not run here: .+|pipeline|tests)?"
            assert re.fullmatch(marks, b.mark), (page, b.mark)


def test_every_guide_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [p.name for p in GUIDES if f"](samples/{p.name})" not in text] == []


# --- links ----------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """Without blocks of code, in which brackets mean other things."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        n = 0
        while (unique := name if n == 0 else f"{name}-{n}") in found:
            n += 1
        found.add(unique)
    return found


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = unquote(target).partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert place.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(place), target


def test_broken_links_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# A b\n## A b\n[x](#a-b-1) [two\nlines](gone.md) `[no](link)`\n```sh\n# No\n```\n"
    )
    assert list(links(page)) == ["#a-b-1", "gone.md"]
    assert anchors(page) == {"a-b", "a-b-1"}
