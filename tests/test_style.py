"""Linter, formatter and type checker agree with the tree, and a release has all of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache"],
        ["ruff", "format", "--check", "--no-cache"],
        ["mypy", "--no-incremental"],
    ],
    ids=["lint", "format", "types"],
)
def test_the_tree_is_clean(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_sdist_has_every_file_that_is_compiled() -> None:
    """A header that is not named does not get in, and what is built from it lacks the kernels."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    native = ROOT / "qconvert" / "kernels" / "native"
    for key, pattern in (("sources", "*.c"), ("depends", "*.h")):
        there = {p.relative_to(ROOT).as_posix() for p in native.glob(pattern)}
        assert set(extension[key]) == there
