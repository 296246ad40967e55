"""The README is run: its commands, its Python, what it says of set-up and exit codes; and the
release script. The guides: test_documents.py.

Not run here: the two set-up commands themselves, which make environments and install; .ci/run is
the second of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import qconvert
from qconvert.cli.exits import ExitCode
from qconvert.exchange_schemes import EXCHANGE_SCHEMES
from qconvert.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCHEMES_GUIDE = (ROOT / "samples" / "choosing-a-scheme.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the commands need."""
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    return tmp_path


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", "-euc", script],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_exactly_two_setup_commands() -> None:
    setup = README.split("## Set up")[1].split("\n## ")[0]
    commands = re.findall(r"```sh\n(.*?)```", setup, re.DOTALL)
    assert len(commands) == 2
    assert all(len(c.strip().splitlines()) == 1 for c in commands)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """What stands between finding the command and running it installs things, and is left out."""
    lines = (ROOT / ".ci/run").read_text().splitlines()
    (found,) = [line for line in lines if line.startswith("command=")]
    assert lines[-1] == 'sh -euc "$command"'
    told = shell(f'{found}\necho "$command"', ROOT).stdout.strip()
    assert told == BLOCKS[1].strip()
    assert "pytest" in told


def test_the_commands_of_the_readme_run(checkout: Path) -> None:
    (block,) = re.findall(r"<!-- pipeline -->\n```sh\n(.*?)```", README, re.DOTALL)
    commands = re.findall(r"^qconvert (\w+)", block, re.MULTILINE)
    assert commands == ["inspect", "calibrate", "quantize", "verify", "bench"]
    done = shell(block, checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nPASS  intact, quality as expected of ") == 1


def test_the_python_of_the_readme_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its formula for codes gives the values, bit for bit."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(checkout)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    with qconvert.load("model.qblk") as tensors:
        values = tensors["lm_head.weight"].dequantize()
    assert values.shape == (2048, 256)
    assert names["values"].dtype == values.dtype
    assert names["values"].tobytes() == values.tobytes()


def test_the_release_script_releases_and_checks_its_sum(checkout: Path) -> None:
    done = shell("sh samples/release.sh samples/tiny-llama out", checkout)
    assert done.returncode == 0, done.stderr
    assert "released: out/tiny-llama.q4_block64.qblk" in done.stdout
    assert (checkout / "out/SHA256SUMS").read_text().endswith("tiny-llama.q4_block64.qblk\n")
    assert "rebuilt byte for byte" in done.stdout
    assert ET.parse(checkout / "out/junit.xml").getroot().get("failures") == "0"


def test_the_release_script_stops_at_a_broken_promise(checkout: Path) -> None:
    limits = checkout / "samples/release.toml"
    limits.write_text(limits.read_text().replace("min_sqnr_db = 18 ", "min_sqnr_db = 40 "))
    done = shell("sh samples/release.sh samples/tiny-llama out", checkout)
    assert done.returncode == 1
    assert not (checkout / "out/SHA256SUMS").exists()


def test_every_exit_code_is_in_the_table() -> None:
    table = README.split("## Exit codes")[1].split("\n## ")[0]
    assert {
        int(n) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for n in row.split(",")
    } == {int(code) for code in ExitCode}


def test_every_scheme_is_of_a_family_that_the_guide_names() -> None:
    text = SCHEMES_GUIDE.split("\n## ")[0]
    affine = re.search(r"q\{([\d,]+)\}_\{([a-z0-9|]+)\}\[_sym\|_asym\]", text)
    assert affine
    named = {
        f"q{bits}_{unit}{suffix}"
        for bits in affine[1].split(",")
        for unit in affine[2].split("|")
        for suffix in ("", "_sym", "_asym")
    }
    assert "](directories.md)" in text
    named |= {scheme.name for scheme in EXCHANGE_SCHEMES}  # test_schemes has them one by one
    tables = re.search(r"\{(nf4\|fp4)\}_block\{([\d|]+)\}\[_dq\]", text)
    assert tables
    named |= {
        f"{table}_block{block}{suffix}"
        for table in tables[1].split("|")
        for block in tables[2].split("|")
        for suffix in ("", "_dq")
    }
    levels = re.search(r"\{(c[\dc|]+)\}_block\{([\d|]+)\} (c4s_block16) (c2z_block16)", text)
    assert levels
    named |= {
        f"{width}_block{block}" for width in levels[1].split("|") for block in levels[2].split("|")
    }
    named |= {levels[3], levels[4], "keep"}
    ggml = r"\b(?:b?f\d\d|t?q\d_[01k](?:_[sml])?|iq4_nl|iq4_xs|mxfp4(?:_moe)?|nvfp4)\b"
    assert set(SCHEMES) == named | set(re.findall(ggml, text))
