"""What a command says in colour, and which of its reports it may write again."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, Call, environment

from qconvert.cli import completion
from qconvert.cli.colour import painted, painted_text
from qconvert.ranges import RANGE_METHODS
from qconvert.running.quality import SCORINGS
from qconvert.stages.grouping import SORTS
from qconvert.stages.quantize_options import PRESETS
from qconvert.words import WORDS

ESCAPE = "\x1b["


def on_terminal(*arguments: Any, **more: str) -> str:
    """What a command writes where stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    command = [*COMMAND, *map(str, arguments)]
    env = environment(**{"TERM": "xterm", **more})
    subprocess.run(command, env=env, stdout=theirs, stderr=theirs, timeout=120, check=False)
    os.close(theirs)
    found = b""
    with open(ours, "rb", buffering=0) as terminal:
        try:
            while part := terminal.read(1 << 16):
                found += part
        except OSError:  # Linux's way of saying that the other end is closed
            pass
    return found.decode()


def test_a_terminal_gets_colours_unless_it_wants_none(small_qblk: Path) -> None:
    verify = "verify", small_qblk, "--quiet"
    assert f"{ESCAPE}32mPASS{ESCAPE}0m  intact" in on_terminal(*verify)
    for plain in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert ESCAPE not in on_terminal(*verify, **plain)
    assert ESCAPE not in on_terminal(*verify, "--color", "never")
    assert f"{ESCAPE}1;31merror:{ESCAPE}0m" in on_terminal("verify", "nothing.qblk")


def test_a_pipe_gets_colours_only_where_they_are_asked_for(call: Call, small_qblk: Path) -> None:
    assert ESCAPE not in call("verify", small_qblk).out
    assert f"{ESCAPE}32mPASS" in call("verify", small_qblk, "--color=always").out
    assert ESCAPE not in call("verify", small_qblk, "--color", "always", "--json").out
    assert ESCAPE not in call("inspect", small_qblk, "--color", "always", "--csv").out
    assert ESCAPE not in call("verify", small_qblk).out  # it is of one command line


@pytest.mark.parametrize("value", ["red", "ALWAYS", ""])
def test_another_colour_is_a_usage_error(call: Call, small_qblk: Path, value: str) -> None:
    done = call("verify", small_qblk, f"--color={value}")
    assert (done.code, done.out) == (2, "")
    assert "auto, always or never" in done.err


def test_a_line_is_painted_as_it_begins_however_it_is_cut() -> None:
    text = "PASS  a\nFAILURES are a word\n  FAIL b\nFAIL  c"
    wanted = f"{ESCAPE}32mPASS{ESCAPE}0m  a\nFAILURES are a word\n  FAIL b\n"
    wanted += f"{ESCAPE}1;31mFAIL{ESCAPE}0m  c"
    assert "".join(painted_text([text])) == "".join(painted_text(text)) == wanted
    assert painted("warning: x") == f"{ESCAPE}33mwarning:{ESCAPE}0m x"


REPORTS = ("--report", "r.json"), ("--html", "r.html"), ("--junit", "r.xml")


@pytest.mark.parametrize(("option", "name"), REPORTS)
def test_a_report_of_the_same_run_is_replaced_and_no_other_file(
    call: Call, small_qblk: Path, small_gguf: Path, tmp_path: Path, option: str, name: str
) -> None:
    target = tmp_path / name
    assert call("verify", small_qblk, option, target).code == 0
    first = target.read_bytes()
    assert call("verify", small_qblk, option, target, "--rows", "4").code == 0
    other = call("verify", small_gguf, option, target)
    assert other.code == 4
    assert "the output exists" in other.err
    if option != "--junit":
        assert call("inspect", small_qblk, option, target).code == 4
    assert target.read_bytes()[:200] == first[:200]
    for content in (b"", b"{}", b"<!doctype html>", b"<?xml", first[1:]):
        target.write_bytes(content)
        assert call("verify", small_qblk, option, target).code == 4
        assert target.read_bytes() == content
    assert call("verify", small_qblk, option, target, "--force").code == 0


def test_what_is_no_report_is_not_replaced(call: Call, small_qblk: Path, tmp_path: Path) -> None:
    listed = tmp_path / "SHA256SUMS"
    verify = "verify", small_qblk, "--manifest", listed
    assert call(*verify).code == 0
    assert call(*verify).code == 4


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (completion.SORTS, SORTS),
        (("small", "balanced", "near-lossless"), PRESETS),
        (("minmax", "percentile", "mse"), RANGE_METHODS),
        (("all", "second-half"), SCORINGS),
    ],
)
def test_what_a_shell_is_offered_is_what_there_is(offered: Any, known: Any) -> None:
    assert sorted(offered) == sorted(known)


def test_words_are_explained_below_the_commands_and_on_pages(
    call: Call, small_qblk: Path, tmp_path: Path
) -> None:
    told = " ".join(call("--help").out.split())
    page = tmp_path / "page.html"
    call("inspect", small_qblk, "--headers-only", "--html", page)
    on_page = page.read_text()
    for word, meaning in WORDS.items():
        assert f"{word}: {meaning}" in told
        assert f"<dt>{word}</dt>" in on_page
    # Each sentence about numbers is right.
    code = round(0.3 / 0.1 + 5)
    assert (code, (code - 5) * 0.1) == (8, pytest.approx(0.3))
    assert re.search(r"10\^\(-SQNR / 10\)", WORDS["NMSE"])


def test_a_report_says_what_it_is_about_at_its_beginning(
    call: Call, small_qblk: Path, tmp_path: Path
) -> None:
    """Before its warnings, of which there may be thousands."""
    target = tmp_path / "r.json"
    call("verify", small_qblk, "--report", target)
    keys = list(json.loads(target.read_text()))
    assert keys[:4] == ["schema", "qconvert", "status", "kernels"]
    assert keys.index("path") < 8
