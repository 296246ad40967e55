"""Reports hold to their schemas; schemas, the reference of commands and man pages are current."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import make_commands
import make_schemas
import pytest
from conftest import COMMAND, ROOT, Call, environment

from qconvert.calibration.observers import OBSERVERS
from qconvert.cli import completion

SAMPLE = ROOT / "samples/tiny-llama"
SCHEMAS = ROOT / "formats/reports"


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


@pytest.mark.parametrize("maker", [make_schemas, make_commands], ids=["schemas", "commands"])
def test_what_is_made_of_the_code_is_current(maker: Any) -> None:
    for path, text in maker.documents().items():
        assert path.read_text("utf-8") == text, f"python tests/{maker.__name__}.py"
    folders = {path.parent for path in maker.documents()}
    assert {path for folder in folders for path in folder.iterdir()} <= set(maker.documents())


def test_the_report_of_each_command_holds_to_its_schema(tmp_path: Path, call: Call) -> None:
    made = tmp_path / "m.qblk"
    calibration = tmp_path / "c.safetensors"
    activations = ROOT / "samples/activations.safetensors"
    lines: list[tuple[str, list[object]]] = [
        ("quantize", [SAMPLE, "--scheme", "q4_block64", "-o", made]),
        ("quantize", [SAMPLE, "--scheme", "q4_k_m", "--format", "gguf", "--dry-run"]),
        ("quantize", [SAMPLE, "--preset", "small", "-o", tmp_path / "s.qblk"]),
        ("inspect", [SAMPLE]),
        ("inspect", [made, "--headers-only"]),
        ("inspect", [SAMPLE, "--tensor", "*q_proj*"]),
        ("calibrate", [SAMPLE, "--activations", activations, "-o", calibration]),
        ("verify", [made]),
        ("verify", [made, "--against", SAMPLE, "--min-sqnr", "99"]),
        ("verify", [made, "--against", SAMPLE, "--samples", activations]),
        ("bench", ["--shape", "64x64", "--runs", "1", "--rows", "2"]),
        ("bench", [made, "--runs", "1"]),
        ("error", ["nowhere", "--scheme", "q8_0"]),
    ]
    for name, arguments in lines:
        command = "quantize" if name == "error" else name
        done = call(command, *map(str, arguments), "--json")
        assert done.out, done.err
        jsonschema.validate(done.json, schema(name))


def test_a_schema_refuses_what_a_report_has_not(tmp_path: Path, call: Call) -> None:
    report = call("inspect", SAMPLE, "--headers-only", "--json").json
    jsonschema.validate(report, schema("inspect"))
    for change in ({"path": 3}, {"more": 1}, {"schema": "qconvert.verify/1"}, {"status": "good"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**report, **change}, schema("inspect"))
    wrong = copy.deepcopy(report)
    wrong["tensors"][0]["shape"] = "2048x256"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema("inspect"))


def test_the_reference_has_every_option(call: Call) -> None:
    text = (ROOT / "samples/man/README.md").read_text("utf-8")
    for command in ("inspect", "calibrate", "quantize", "tune", "verify", "bench"):
        _, _, section = text.partition(f"\n## qconvert {command}\n")
        section = section.partition("\n## ")[0]
        listed = call(command, "--help").out.partition("\nOptions:")[2]
        options = [word.strip(",.;:)]") for word in listed.split() if word.startswith("--")]
        assert len(options) > 10
        for option in options:
            if option != "--help":
                assert option in section, f"{command} {option}"


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here")
@pytest.mark.parametrize("page", sorted((ROOT / "samples/man").glob("*.1")), ids=lambda p: p.name)
def test_man_pages_are_set_without_a_complaint(page: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou", str(page)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    for heading in ("NAME", "SYNOPSIS", "EXAMPLES", "OPTIONS"):
        assert heading in done.stdout


def complete(line: str) -> list[str]:
    """What bash is offered for the last word of a line."""
    words = line.split(" ")
    asked = {
        "_QCONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        COMMAND, env={**environment(), **asked}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qconvert insp", ["inspect"]),
        ("qconvert quantize m --scheme q4_k_", ["q4_k_m", "q4_k_s"]),
        ("qconvert quantize m --tensor-scheme *up*=iq4_x", ["*up*=iq4_xs"]),
        ("qconvert calibrate m --observer m", ["minmax", "mse"]),
        ("qconvert verify m --min-o", ["--min-output-sqnr"]),
    ],
)
def test_a_shell_is_offered_what_fits(line: str, offered: list[str]) -> None:
    assert sorted(complete(line)) == sorted(offered)


def test_observers_are_completed_by_their_names() -> None:
    assert set(completion.OBSERVERS) == set(OBSERVERS)
