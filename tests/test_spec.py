"""The specification and its vectors belong together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = Path(__file__).parents[1] / "formats"


def test_every_rule_has_a_vector_that_breaks_it_and_no_vector_an_unknown_rule() -> None:
    rules = set(re.findall(r"^\| (QBLK-\d{3}) \|", (FORMATS / "qblk/SPEC.md").read_text(), re.M))
    invalid = json.loads((FORMATS / "qblk/vectors/invalid.json").read_text())
    assert rules == {entry["rule"] for entry in invalid.values()}


@pytest.mark.parametrize("folder", ["qblk/vectors", "schemes/vectors"])
def test_the_committed_vectors_are_those_that_the_literals_give(folder: str) -> None:
    script = FORMATS / folder / "regenerate.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (*FORMATS.rglob("*.md"), *FORMATS.parent.glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), (document, link)
