"""The command line as a release script sees it: exit codes, streams, JSON, words.

The table of exit codes is checked with the installed command; variations run in this process.
Not checked here: the bar on a terminal, and the wording of reports for people.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import subprocess
import unicodedata
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import (
    COMMAND,
    Call,
    Finished,
    Run,
    container,
    environment,
    every_kind,
    gaussian,
    listing,
    save,
)
from safetensors.numpy import load_file
from stored import named

from qconvert import kernels
from qconvert.cli.main import main
from qconvert.files.qblk import open_qblk
from qconvert.stages import inspect as inspect_stage

COMMANDS = ("inspect", "calibrate", "quantize", "verify", "bench")
ALL = (*COMMANDS, "tune")  # which needs a whole model, and torch


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, activations and their calibration, and a qblk file."""
    path = tmp_path_factory.mktemp("prepared")
    tensors = {
        "up.weight": gaussian(1, 40, 64, dtype=ml_dtypes.bfloat16),
        "down.weight": gaussian(2, 64, 40),
        "up.bias": gaussian(3, 40),
    }
    model, samples = path / "m.safetensors", path / "acts.safetensors"
    save(model, tensors)
    save(samples, {"up": gaussian(4, 50, 64), "down": gaussian(5, 50, 40)})
    quantize = ["quantize", str(model), "--scheme", "q4_block32", "-o", str(path / "m.qblk")]
    calibrate = ["calibrate", str(model), "--activations", str(samples)]
    assert main([*quantize, "-q"]) == main([*calibrate, "-q", "-o", str(path / "c.safetensors")])
    return path


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of what is prepared."""
    shutil.copytree(prepared, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def lines(*arguments: str) -> dict[str, list[str]]:
    """A working line of every command, for use in ``place``."""
    return {
        "inspect": ["inspect", "m.safetensors", *arguments],
        "calibrate": [
            *("calibrate", "m.safetensors", "--activations", "acts.safetensors"),
            *("-o", "new.safetensors", *arguments),
        ],
        "quantize": [
            *("quantize", "m.safetensors", "--scheme", "q4_block32", "-o", "new.qblk"),
            *arguments,
        ],
        "verify": ["verify", "m.qblk", "--against", "m.safetensors", *arguments],
        "bench": ["bench", "--shape", "64x64", "--runs", "1", *arguments],
    }


every_command = pytest.mark.parametrize("command", COMMANDS)


def is_refusal(done: Finished, code: int) -> None:
    """The code, nothing on stdout, one line of error and at most one of hint; no traceback."""
    assert done.code == code, done
    assert not done.out
    told = [line for line in done.err.splitlines() if not re.match(r"[a-z ]+: [\d.]+ k?B$", line)]
    assert told, done.err
    assert told[0].startswith("error: "), done.err
    assert len(told) == 1 or (len(told) == 2 and told[1].startswith("  hint: ")), done.err
    assert "Traceback" not in done.err


# --- 0 and 1 --------------------------------------------------------------------------------------


def test_0_and_1_are_the_answers_of_verify(place: Path, run: Run) -> None:
    verify = ["verify", "m.qblk", "--against", "m.safetensors"]
    assert run(*verify, "--min-sqnr", "10", cwd=place).code == 0
    low = run(*verify, "--min-sqnr", "60", cwd=place)
    assert low.code == 1
    assert "FAIL" in low.out
    data = bytearray((place / "m.qblk").read_bytes())
    data[-1] ^= 1
    (place / "m.qblk").write_bytes(data)
    damaged = run("verify", "m.qblk", cwd=place)
    assert damaged.code == 1
    assert "QBLK-024" in damaged.out


@pytest.mark.parametrize("command", ["inspect", "quantize", "calibrate"])
def test_1_is_a_warning_under_strict(command: str, place: Path, call: Call) -> None:
    bad = gaussian(9, 8)
    bad[3] = np.nan
    save(place / "m.safetensors", {"up.weight": gaussian(1, 40, 64), "up.bias": bad})
    lax = call(*lines()[command], "--force") if command != "inspect" else call(*lines()[command])
    assert lax.code == 0
    assert "warning: " in lax.err
    outputs = {"quantize": "new.qblk", "calibrate": "new.safetensors"}
    if (output := outputs.get(command)) is not None:
        assert (place / output).exists()
        (place / output).unlink()
    strict = lines("--strict", "--force", "--json")[command]
    told = call(*strict)
    assert told.code == 1
    assert output is None or not (place / output).exists(), "and there is no output"
    assert told.json.get("written") in (False, None)
    assert told.json["status"] == "fail"
    assert told.json["warnings"]


# --- 2 --------------------------------------------------------------------------------------------


def test_2_without_arguments_is_help_on_stderr(run: Run) -> None:
    done = run()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: ")
    assert (
        done.err.replace("python -m qconvert", "qconvert").split("\n", 1)[1]
        == (run("--help").out.split("\n", 1)[1])
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frobnicate m", ["frobnicate"]),
        ("inspect", ["MODEL"]),
        ("inspect m.safetensors --frobnicate", ["--frobnicate"]),
        ("inspect m.safetensors --bins 1", ["--bins"]),
        ("inspect m.safetensors --tensor nothing*", ["nothing*"]),
        ("quantize m.safetensors", ["--scheme"]),
        ("quantize m.safetensors --scheme q4_blok64", ["did you mean q4_block64"]),
        ("quantize m.safetensors --scheme Q8_chanel", ["did you mean q8_channel"]),
        ("quantize m.safetensors --scheme xyzzy", ["--list-schemes"]),
        ("quantize m.safetensors --scheme q4_0 -o n.qblk", ["q4_0", "gguf"]),
        ("quantize m.safetensors --scheme q4_block32 -o n.gguf", ["q4_block32", "qblk"]),
        ("quantize m.safetensors --scheme q4_block32 -o n.bin", ["in .qblk", "--format mlx"]),
        ("quantize m.safetensors --scheme q4_block32 --format zip", ["qblk or gguf"]),
        ("quantize m.safetensors --scheme q4_block32 --range median", ["minmax"]),
        ("quantize m.safetensors --scheme q4_block32 --percentile 99", ["--range percentile"]),
        (
            "quantize m.safetensors --scheme q4_block32 --range percentile --percentile 50",
            ["above 50"],
        ),
        (
            "quantize m.safetensors --scheme q4_block32 --range percentile --percentile nan",
            ["above 50"],
        ),
        ("quantize m.safetensors --scheme q4_block32 --keep nothing*", ["nothing*"]),
        ("quantize m.safetensors --scheme q4_block32 --tensor-scheme q4_block32", ["GLOB=NAME"]),
        (
            "quantize m.safetensors --scheme q4_block32 --tensor-scheme up*=q4_blok32",
            ["did you mean"],
        ),
        ("quantize m.safetensors --scheme q4_block32 --threads 0", ["--threads"]),
        ("quantize m.safetensors --scheme q4_block32 --min-values -1", ["--min-values"]),
        ("verify m.qblk --min-sqnr 10", ["--against"]),
        ("verify m.qblk --max-nmse 0.1", ["--against"]),
        ("verify m.qblk --activations sometimes", ["auto, static, dynamic"]),
        ("verify m.qblk --activations static", ["calibration"]),
        ("verify m.qblk --rows 0", ["--rows"]),
        ("verify m.safetensors", ["quantized file", "--against"]),
        ("verify m.safetensors --against m.qblk", ["before it what was made"]),
        (
            "quantize m.safetensors --scheme q8_0 --range mse --range minmax",
            ["--range is given 2 times", "once"],
        ),
        ("quantize m.safetensors --scheme q8_0 -o n.gguf --output o.gguf", ["--output", "2 times"]),
        ("bench --shape 64", ["ROWSxCOLS"]),
        ("bench --shape 64x0", ["ROWSxCOLS"]),
        ("bench --shape 64xx64", ["ROWSxCOLS"]),
        ("bench --shape 64x\u00b2", ["ROWSxCOLS"]),
        ("bench m.safetensors --shape 64x64", ["exclude"]),
        ("calibrate m.safetensors -o n", ["--activations"]),
        ("calibrate --activations acts.safetensors -o n", ["MODEL"]),
        (
            "calibrate m.safetensors --activations acts.safetensors -o n --observer mean",
            ["minmax"],
        ),
        (
            "calibrate m.safetensors --activations acts.safetensors -o n --percentile 99",
            ["--observer percentile"],
        ),
    ],
)
def test_2_is_a_wrong_command_line(line: str, words: list[str], place: Path, call: Call) -> None:
    before = listing(place)
    for more in ([], ["--json"]):
        done = call(*line.split(), *more)
        assert (done.code, done.out) == (2, "")
        assert "Traceback" not in done.err
        for word in words:
            assert word.lower() in done.err.lower()
    assert listing(place) == before


def test_2_by_the_installed_command(place: Path, run: Run) -> None:
    is_refusal(run("quantize", "m.safetensors", "--scheme", "q4_blok64", cwd=place), 2)
    unknown = run("quantize", "m.safetensors", "--no-such-option", cwd=place)
    assert (unknown.code, unknown.out) == (2, "")
    env = environment(QCONVERT_KERNELS="imaginary")
    is_refusal(run("inspect", "m.safetensors", cwd=place, env=env), 2)


# --- 3 --------------------------------------------------------------------------------------------


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12345\n" % ("0" * 64)


def broken_inputs(directory: Path) -> dict[str, tuple[Path, list[str]]]:
    """Files that cannot be used, with what the refusal has to say."""
    good = save(directory / "good.safetensors", {"w": gaussian(1, 40, 64)}).read_bytes()
    files = {name: directory / f"{name}.safetensors" for name in ("cut", "lfs", "html", "pickle")}
    files["cut"].write_bytes(good[:-9])
    files["lfs"].write_text(POINTER)
    files["html"].write_text("<!DOCTYPE html><html><body>404</body></html>")
    files["pickle"].write_bytes(b"\x80\x04\x95" + bytes(64))
    twice = '{"w":%s,"w":%s}' % ((json.dumps(entry([4], 0, 16)),) * 2)
    overlap = {"a": entry([4], 0, 16), "b": entry([4], 8, 24)}
    return {
        "missing": (directory / "nowhere.safetensors", ["no such file"]),
        "truncated": (files["cut"], ["cut.safetensors"]),
        "lfs": (files["lfs"], ["lfs"]),
        "html": (files["html"], ["html"]),
        "pickle": (files["pickle"], ["pickle"]),
        "overlap": (container(directory / "o.safetensors", overlap, bytes(24)), ["'b'"]),
        "twice": (container(directory / "t.safetensors", twice, bytes(16)), ["twice"]),
        "empty": (container(directory / "e.safetensors", ""), []),
    }


@pytest.mark.parametrize("command", ["inspect", "quantize", "verify"])
def test_3_is_an_input_that_cannot_be_used(command: str, tmp_path: Path, call: Call) -> None:
    for kind, (path, words) in broken_inputs(tmp_path).items():
        before = listing(tmp_path)
        line = [command, path, *(["--scheme", "q8_0"] if command == "quantize" else [])]
        if command == "verify" and kind != "missing":
            assert call(*line).code == 1, kind  # that it is malformed is the answer
            continue
        done = call(*line)
        is_refusal(done, 3)
        for word in words:
            assert word in done.err.lower(), (kind, done.err)
        assert listing(tmp_path) == before


def test_3_by_the_installed_command(tmp_path: Path, run: Run) -> None:
    files = broken_inputs(tmp_path)
    is_refusal(run("inspect", files["truncated"][0]), 3)
    is_refusal(run("quantize", files["lfs"][0], "--scheme", "q4_block32"), 3)
    is_refusal(run("verify", files["missing"][0]), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", ["q4_block32", "q8_tensor", "q4_0", "f16"])
def test_3_is_a_weight_that_is_not_finite_with_tensor_index_and_count(
    bad: float, scheme: str, tmp_path: Path, call: Call
) -> None:
    weights = gaussian(1, 50, 32)
    weights[31, 7] = weights[40, 1] = weights[49, 31] = bad
    path = save(tmp_path / "m.safetensors", {"fine": gaussian(2, 32, 32), "layer.7": weights})
    raw = ["--raw"] if scheme == "q4_0" else []
    done = call("quantize", path, "--scheme", scheme, *raw)
    is_refusal(done, 3)
    assert "tensor 'layer.7': 3 of 1,600 weights" in done.err
    assert "index 999" in done.err
    assert "--keep 'layer.7'" in done.err
    assert os.listdir(tmp_path) == ["m.safetensors"]
    kept = call("quantize", path, "--scheme", scheme, *raw, "--keep", "layer.7")
    assert kept.code == 0
    assert "3 NaN or Inf" in kept.err


def test_3_is_a_float64_weight_beyond_binary32(tmp_path: Path, call: Call) -> None:
    weights = gaussian(1, 40, 32, dtype=np.float64)
    weights[1, 1] = 1e39
    path = save(tmp_path / "m.safetensors", {"w": weights})
    done = call("quantize", path, "--scheme", "q4_block32")
    is_refusal(done, 3)
    assert "1e+39" in done.err


def test_3_is_a_calibration_that_does_not_fit(place: Path, call: Call) -> None:
    save(place / "other.safetensors", {"up": gaussian(1, 9, 63)})
    calibrate = ["calibrate", "m.safetensors", "--activations", "other.safetensors"]
    before = listing(place)
    is_refusal(call(*calibrate, "-o", "n.safetensors"), 3)
    assert listing(place) == before
    is_refusal(call(*lines("--calibration", "m.safetensors")["quantize"]), 3)


def test_3_is_an_activation_that_is_not_finite(place: Path, call: Call) -> None:
    bad = gaussian(1, 70, 64)
    bad[66, 3] = np.nan
    save(place / "bad.safetensors", {"up": bad})
    line = ["calibrate", "m.safetensors", "--activations", "bad.safetensors", "-o", "n.safetensors"]
    done = call(*line)
    is_refusal(done, 3)
    assert "sample 66" in done.err
    is_refusal(call("verify", "m.qblk", "--samples", "bad.safetensors", "--rows", "99"), 3)


def test_3_is_a_sample_file_without_samples(place: Path, call: Call) -> None:
    save(place / "none.safetensors", {"up": np.zeros((0, 64), np.float32)})
    is_refusal(call("verify", "m.qblk", "--samples", "none.safetensors"), 3)


# --- 4 and the rest -------------------------------------------------------------------------------


def test_4_is_a_machine_that_refuses(place: Path, run: Run) -> None:
    (place / "new.qblk").write_bytes(b"old")
    done = run(*lines()["quantize"], cwd=place)
    is_refusal(done, 4)
    assert "--force" in done.err
    is_refusal(run("inspect", "m.safetensors", "--report", "no/r.json", cwd=place), 4)
    assert (place / "new.qblk").read_bytes() == b"old"


def test_4_is_memory_that_is_not_there(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(inspect_stage, "open_model", exhausted)
    is_refusal(call("inspect", "m.safetensors"), 4)


@every_command
def test_4_is_a_stdout_that_is_full(command: str, place: Path) -> None:
    more = ["--json"] if command in ("inspect", "verify") else []
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *lines(*more)[command]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=place,
            env=environment(),
            check=False,
        )
    assert done.returncode == 4, done.stderr
    assert "error: no space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_70_is_a_bug_in_one_line(place: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(inspect_stage, "open_model", bug)
    done = call("inspect", "m.safetensors")
    is_refusal(done, 70)
    assert "QCONVERT_DEBUG=1" in done.err
    assert "Traceback" in call("inspect", "m.safetensors", "--debug").err
    told = call("inspect", "m.safetensors", "--json")
    assert told.json["error"]["exit"] == 70


@pytest.mark.parametrize(
    "line",
    [
        "inspect m.safetensors --json",
        "inspect m.safetensors",
        "inspect nowhere --json",
        "--help",
        "--version",
    ],
)
def test_141_is_a_reader_that_has_gone(line: str, place: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, *line.split()],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        env=environment(),
        check=False,
    )
    os.close(write)
    assert done.returncode == 141, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_work_is_done_before_its_reader_is_found_gone(place: Path) -> None:
    line = " ".join([*COMMAND, *lines()["quantize"]])
    shell = f"set -o pipefail; {line} | head -c 0"
    done = subprocess.run(["bash", "-c", shell], cwd=place, capture_output=True, check=False)
    assert done.returncode in (0, 141), done.stderr  # 0: it was faster than head
    assert main(["verify", "new.qblk", "-q"]) == 0


# --- JSON -----------------------------------------------------------------------------------------


@every_command
def test_json_is_one_document_with_schema_status_and_kernels(
    command: str, place: Path, run: Run, call: Call
) -> None:
    told = run(*lines("--json")[command], cwd=place)
    assert told.code == 0, told
    assert told.json["schema"] == f"qconvert.{command}/1"
    assert told.json["status"] == "pass"
    assert told.json["kernels"] == kernels.describe()
    assert told.json["warnings"] == []
    assert told.out.endswith("}\n")
    assert list(told.json)[:3] == ["schema", "qconvert", "status"]
    if command != "bench":  # another process, another time: the same bytes
        assert call(*lines("--json", "--force")[command]).out == told.out


@every_command
def test_json_and_files_have_no_place_or_clock(command: str, place: Path, call: Call) -> None:
    """Seconds are for people; two machines compare equal."""
    if command == "bench":
        return
    told = call(*lines("--json")[command])
    assert str(place) not in told.out
    assert "second" not in told.out


@every_command
def test_the_report_file_is_the_json(command: str, place: Path, call: Call) -> None:
    told = call(*lines("--json", "--report", "r.json")[command])
    assert told.code == 0
    assert (place / "r.json").read_text() == told.out
    foreign = place / "foreign.json"
    foreign.write_text("{}")
    assert call(*lines("--report", "foreign.json")[command]).code == 4
    assert foreign.read_text() == "{}"


def test_json_has_no_nan(tmp_path: Path, call: Call) -> None:
    tensors = {
        "nan": np.full((4, 4), np.nan, np.float32),
        "mixed": np.asarray([[1, np.inf, -2, np.nan]], np.float32),
        "zero": np.zeros((40, 64), np.float32),
        "constant": np.full((40, 64), 2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = save(tmp_path / "m.safetensors", tensors)
    told = call("inspect", path, "--tensor", "*", "--json")
    assert told.code == 0
    assert {t["name"] for t in told.json["tensors"]} == set(tensors)
    good = save(tmp_path / "g.safetensors", {k: tensors[k] for k in ("zero", "constant", "empty")})
    out = tmp_path / "g.qblk"
    assert call("quantize", good, "--scheme", "q4_block64", "-o", out, "--json").json
    assert call("verify", out, "--against", good, "--json").json["status"] == "pass"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("inspect nowhere.safetensors", 3),
        ("verify nowhere.qblk", 3),
        ("quantize m.safetensors --scheme q4_block32 -o m.qblk", 4),
        ("calibrate m.safetensors --activations nowhere -o n.safetensors", 3),
        ("bench nowhere.safetensors", 3),
        ("inspect m.safetensors --report m.qblk", 4),
    ],
)
def test_an_error_speaks_json_too(line: str, code: int, place: Path, call: Call) -> None:
    told = call(*line.split(), "--json")
    assert told.code == code
    assert told.json["schema"] == "qconvert.error/1"
    assert told.json["status"] == "error"
    facts = told.json["error"]
    assert facts["exit"] == code
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {facts['message']}"]
    is_refusal(call(*line.split()), code)


# --- streams --------------------------------------------------------------------------------------


@every_command
def test_quiet_silences_stderr_and_not_the_report(command: str, place: Path, call: Call) -> None:
    loud = call(*lines()[command])
    assert loud.code == 0
    if command == "calibrate":
        os.unlink("new.safetensors")
    for option in ("--quiet", "-q"):
        quiet = call(*lines(option)[command], "--force")
        assert (quiet.code, quiet.err) == (0, "")
        assert len(quiet.out.splitlines()) == len(loud.out.splitlines())


def test_quiet_drops_warnings_and_not_errors(tmp_path: Path, call: Call) -> None:
    path = save(tmp_path / "m.safetensors", {"b": np.full(8, np.nan, np.float32)})
    done = call("inspect", path, "-q")
    assert (done.code, done.err) == (0, "")
    is_refusal(call("inspect", tmp_path / "nowhere", "-q"), 3)


@every_command
def test_a_pipe_gets_no_colours_bars_or_carriage_returns(
    command: str, place: Path, call: Call
) -> None:
    done = call(*lines()[command])
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.out + done.err


def test_a_traceback_needs_debug(place: Path, run: Run) -> None:
    assert "Traceback" not in run("inspect", "nowhere", cwd=place).err
    assert "Traceback" in run("inspect", "nowhere", "--debug", cwd=place).err
    env = environment(QCONVERT_DEBUG="1")
    assert "Traceback" in run("inspect", "nowhere", cwd=place, env=env).err


EVIL = "evil\x1b]0;title\x07\x1b[31m\r\n\x7f\x9b31m\u202e\u2028\u200f"


def controls(text: str) -> set[str]:
    """Characters that a terminal may act on, line feeds apart."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}


@pytest.mark.parametrize("json_too", [False, True])
def test_control_characters_of_names_do_not_reach_a_terminal(
    json_too: bool, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "m.safetensors", {EVIL: gaussian(1, 40, 64), EVIL + "b": gaussian(2, 9)})
    bad = gaussian(3, 40, 64)
    bad[0, 0] = np.nan
    save(tmp_path / "bad.safetensors", {EVIL: bad, "b": np.full(4, np.nan, np.float32)})
    save(tmp_path / "kept.safetensors", {EVIL: np.full(4, np.nan, np.float32)})
    save(tmp_path / "acts.safetensors", {EVIL: gaussian(4, 9, 64)})
    more = ["--json"] if json_too else []
    for line in (
        ["inspect", "m.safetensors", "--tensor", "*"],
        ["inspect", "m.safetensors", "--headers-only"],
        ["inspect", "bad.safetensors"],
        ["inspect", "kept.safetensors"],
        ["quantize", "m.safetensors", "--scheme", "q4_block32", "--dry-run"],
        ["quantize", "m.safetensors", "--scheme", "q4_block32", "-o", "m.qblk"],
        ["quantize", "bad.safetensors", "--scheme", "q4_block32"],
        ["quantize", "m.safetensors", "--scheme", "q4_block32", "--keep", EVIL + "c"],
        ["verify", "m.qblk", "--against", "m.safetensors"],
        ["verify", "m.qblk", "--activations", "static"],
        ["calibrate", "m.safetensors", "--activations", "acts.safetensors", "-o", "c.safetensors"],
        ["inspect", EVIL],
    ):
        done = call(*line, *more)
        assert done.code != 70, done.err
        assert not controls(done.out), line
        assert not controls(done.err), line
    if json_too:
        names = [t["name"] for t in call("inspect", "m.safetensors", "--json").json["tensors"]]
        assert EVIL in names  # and yet nothing is lost


@pytest.mark.parametrize("name", [b"caf\xe9.safetensors", "caf\u00e9.safetensors".encode()])
def test_file_names_need_not_be_utf8(name: bytes, tmp_path: Path, small: Path, run: Run) -> None:
    directory = os.fsencode(tmp_path)
    shutil.copy(small, os.path.join(directory, name))
    stem = name[: name.index(b".")]
    for line in (
        ["inspect", name, "--json"],
        ["quantize", name, "--scheme", "q8_block32", "--json"],
        ["verify", stem + b".q8_block32.qblk", "--against", name, "--json"],
    ):
        done = run(*map(os.fsdecode, line), cwd=tmp_path)
        assert done.code == 0, done
        json.loads(done.out.encode("utf-8"))  # which surrogates are not


def test_long_names_are_cut_in_a_log_and_still_differ(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    names = {"n" * 1020 + "1", "n" * 1020 + "2"}
    path = save(tmp_path / "m.safetensors", {n: gaussian(1, 40, 64) for n in names})
    told = call("inspect", path).out
    assert max(map(len, told.splitlines())) <= 100
    rows = [line.split()[0] for line in told.splitlines() if line.startswith("nnn")]
    assert [row[-1] for row in rows] == ["1", "2"]
    document = call("inspect", path, "--json").json
    assert {t["name"] for t in document["tensors"]} == names


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help_with_examples(option: str, call: Call) -> None:
    main_help = call(option)
    assert main_help.code == 0
    assert "Examples:" in main_help.out
    for code in (0, 1, 2, 3, 4, 70, 130, 143, 141):
        assert re.search(rf"\b{code}\b", main_help.out)
    for command in ALL:
        assert command in main_help.out
        done = call(command, option)
        assert done.code == 0
        assert "Examples:" in done.out
        assert f"qconvert {command}" in done.out
        assert not done.err
        assert max(map(len, done.out.splitlines())) <= 100


def test_the_options_of_all_commands_are_named_alike(call: Call) -> None:
    short = set()
    for command in ALL:
        text = call(command, "--help").out
        assert {"--json", "--report", "--quiet", "--debug"} <= set(re.findall(r"--[a-z-]+", text))
        options = text[text.index("Options:") :]
        short |= set(re.findall(r"(?<![\w-])-[a-zA-Z]\b", options))
    assert short == {"-o", "-q", "-h"}


def test_the_version_is_that_of_the_package(call: Call) -> None:
    from qconvert import __version__

    assert call("--version").out == f"qconvert {__version__}\n"


# --- every option works ---------------------------------------------------------------------------


def stored(path: Path) -> dict[str, str]:
    model = open_qblk(path)
    try:
        return {t.name: t.dtype for t in model.tensors}
    finally:
        model.close()


def test_a_dry_run_writes_nothing_and_tells_the_plan(place: Path, call: Call) -> None:
    before = listing(place)
    told = call(*lines("--dry-run", "--json")["quantize"])
    assert listing(place) == before
    assert told.json["dry_run"] is True
    real = call(*lines("--json")["quantize"]).json
    assert real["output_bytes"] == (place / "new.qblk").stat().st_size
    plan, wrote = ({t["name"]: t for t in r["tensors"]} for r in (told.json, real))
    assert {n: t["quantized"] for n, t in plan.items()} == {
        n: t["quantized"] for n, t in wrote.items()
    }
    assert all(wrote[n]["nbytes"] <= plan[n]["nbytes"] for n in plan)
    text = call(*lines("--dry-run")["quantize"]).out
    assert "nothing written" in text
    assert all(name in text for name in plan)


@pytest.mark.parametrize(
    "options",
    [
        ["--range", "minmax"],
        ["--range", "percentile"],
        ["--range", "percentile", "--percentile", "95"],
        ["--range", "percentile", "--percentile", "100"],
        ["--range", "mse"],
        ["--threads", "1"],
        ["--threads", "3"],
        ["--format", "qblk"],
        ["--format", "QBLK"],
        ["--hash-source"],
        ["--min-values", "0"],
        ["--keep", "up.*", "--keep", "down.weight"],
        ["--tensor-scheme", "up.*=q8_channel", "--tensor-scheme", "*=q5_block16_sym"],
        ["--calibration", "c.safetensors"],
    ],
)
def test_an_option_of_quantize_gives_a_file_that_verifies(
    options: list[str], place: Path, call: Call
) -> None:
    assert call(*lines(*options)["quantize"]).code == 0
    told = call("verify", "new.qblk", "--against", "m.safetensors", "--json")
    assert told.code == 0, told.out


def test_percentile_clips_and_minmax_does_not(place: Path, call: Call) -> None:
    def clipped(*options: str) -> int:
        report = call(*lines("--json", "--force", *options)["quantize"]).json
        return sum(t["clipped"] or 0 for t in report["tensors"])

    assert clipped("--range", "minmax") == 0
    assert clipped("--range", "percentile", "--percentile", "95") > 50


def test_keep_and_tensor_scheme_and_min_values_choose(place: Path, call: Call) -> None:
    options = ["--tensor-scheme", "up.weight=q8_channel_sym", "--tensor-scheme", "*=q3_block16_sym"]
    call(*lines(*options, "--keep", "down*")["quantize"])
    assert stored(place / "new.qblk") == {
        "up.weight": "q8_channel_sym",
        "down.weight": "F32",
        "up.bias": "q3_block16_sym",
    }
    call(*lines("--min-values", "2561", "--force")["quantize"])
    assert set(stored(place / "new.qblk").values()) == {"BF16", "F32"}


def test_the_name_or_the_format_says_the_container(place: Path, call: Call) -> None:
    for line, name in (
        (["--scheme", "q8_0", "--raw"], "m.q8_0.gguf"),
        (["--scheme", "q4_block32_sym"], "m.q4_block32_sym.qblk"),
        (["--scheme", "f16", "--format", "gguf", "--raw"], "m.f16.gguf"),
        (["--scheme", "f16", "-o", "x.QBLK"], "x.QBLK"),
        (["--scheme", "f16", "-o", "x.gguf", "--raw"], "x.gguf"),
        (["--scheme", "F16", "-o", "plain", "--format", "gguf", "--raw"], "plain"),
    ):
        assert call("quantize", "m.safetensors", *line).code == 0
        magic = (place / name).read_bytes()[:5]
        assert magic == b"\x89QBLK" or magic[:4] == b"GGUF"
        assert (magic[:4] == b"GGUF") == ("gguf" in "".join([*line, name]))
        assert call("verify", name, "--against", "m.safetensors").code == 0


def test_hash_source_records_the_digest_of_the_source(place: Path, call: Call) -> None:
    import hashlib

    digest = hashlib.sha256((place / "m.safetensors").read_bytes()).hexdigest()
    for options, there in (([], False), (["--hash-source"], True)):
        call(*lines("--force", *options)["quantize"])
        model = open_qblk(place / "new.qblk")
        (note,) = model.header.provenance["sources"]
        model.close()
        assert (note.get("sha256") == digest) is there
        assert note["size"] == (place / "m.safetensors").stat().st_size


def test_inspect_shows_histograms_of_the_tensors_asked_for(place: Path, call: Call) -> None:
    told = call("inspect", "m.safetensors", "--tensor", "up.*", "--bins", "10")
    assert "linear" in told.out
    assert "logarithmic" in told.out
    assert "down.weight" not in told.out
    tensors = call("inspect", "m.safetensors", "--tensor", "up.*", "--bins", "10", "--json").json
    found = {t["name"]: t for t in tensors["tensors"]}
    assert set(found) == {"up.weight", "up.bias"}
    values = load_file(place / "m.safetensors")["up.bias"].astype(np.float64)
    counts, edges = np.histogram(values, 10)
    histogram = found["up.bias"]["histogram"]
    assert histogram["counts"] == counts.tolist()
    assert (histogram["low"], histogram["high"]) == (edges[0], edges[-1])
    assert call("inspect", "m.safetensors", "--json").json["tensors"][0]["histogram"] is None


def test_inspect_gives_the_statistics_of_numpy(place: Path, call: Call) -> None:
    values = load_file(place / "m.safetensors")["down.weight"].astype(np.float64)
    told = call("inspect", "m.safetensors", "--json").json
    row = next(t for t in told["tensors"] if t["name"] == "down.weight")
    centred = values - values.mean()
    for key, wanted in {
        "minimum": values.min(),
        "maximum": values.max(),
        "absmax": np.abs(values).max(),
        "mean": values.mean(),
        "std": values.std(),
        "skewness": (centred**3).mean() / values.std() ** 3,
        "kurtosis": (centred**4).mean() / values.std() ** 4,
    }.items():
        assert row[key] == pytest.approx(wanted, rel=1e-6, abs=1e-9), key
    assert row["suggestion"].startswith("q4_block64")
    eight = call("inspect", "m.safetensors", "--scheme", "q8_channel", "--json").json["tensors"]
    assert {t["suggestion"] for t in eight} >= {"keep"}
    assert any((t["suggestion"] or "").startswith("q8_channel") for t in eight)


@pytest.mark.parametrize("name", ["m.safetensors", "m.qblk", "m.gguf"])
def test_headers_only_reads_no_weights(
    name: str, place: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "m.gguf":
        call("quantize", "m.safetensors", "--scheme", "q8_0", "--raw", "-o", "m.gguf")
    told = call("inspect", name, "--headers-only", "--json").json
    assert told["statistics"] is False
    assert told["total_values"] == 2 * 40 * 64 + 40
    assert {t["name"] for t in told["tensors"]} == {"up.weight", "down.weight", "up.bias"}
    assert call("inspect", name).code == call("inspect", name, "--headers-only").code == 0


HARD_TO_BIN = {
    "large constant": np.full((2, 8), 3e38, np.float32),
    "large integers": np.full((2, 8), 2**60, np.int64),
    "two neighbours": np.asarray([1.0, 1.0 + 2.0**-52]),
    "integers that are neighbours": np.asarray([2**60, 2**60 + 256]),
    "all of float64": np.asarray([-1.7e308, 1.7e308]),
    "smallest": np.asarray([0.0, 5e-324]),
    "bool": np.asarray([True, False]),
    "nothing finite": np.full((2, 2), np.inf, np.float16),
}


@pytest.mark.parametrize("kind", HARD_TO_BIN)
def test_a_histogram_counts_every_finite_value(kind: str, tmp_path: Path, call: Call) -> None:
    values = HARD_TO_BIN[kind]
    path = save(tmp_path / "m.safetensors", {"w": values})
    told = call("inspect", path, "--tensor", "w", "--json")
    assert told.code == 0, told.err
    histogram = told.json["tensors"][0]["histogram"]
    finite = int(np.isfinite(values.astype(np.float64)).sum())
    assert finite == 0 if histogram is None else sum(histogram["counts"]) == finite
    assert call("inspect", path, "--tensor", "w").code == 0


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "entropy", "nmse"])
def test_calibration_goes_into_the_file_and_verify_uses_it(
    observer: str, place: Path, call: Call
) -> None:
    calibrate = [*lines("--observer", observer, "--json")["calibrate"]]
    layers = {layer["name"]: layer for layer in call(*calibrate).json["layers"]}
    assert set(layers) == {"up", "down"}
    call(*lines("--calibration", "new.safetensors")["quantize"])
    model = open_qblk(place / "new.qblk")
    for name, layer in layers.items():
        noted = named(model, f"{name}.weight").activation
        assert noted
        assert (noted["scale"], noted["zero_point"]) == (layer["scale"], layer["zero_point"])
        assert (noted["observer"], noted["samples"]) == (observer, 50)
    model.close()
    verify = ["verify", "new.qblk", "--against", "m.safetensors", "--json", "--activations"]
    for mode, wanted in (("static", "static"), ("auto", "static"), ("dynamic", "dynamic")):
        told = call(*verify, mode)
        assert told.code == 0
        assert {t["activations"] for t in told.json["tensors"]} == {wanted}
        assert {t["inputs"] for t in told.json["tensors"]} == {"Gaussian"}
        known = [t["output_sqnr_db"] for t in told.json["tensors"]]
        # Nobody knows whether Gaussian inputs lie in the calibrated range.
        assert all(db > 15 for db in known) if wanted == "dynamic" else set(known) == {None}
        told = call(*verify, mode, "--samples", "acts.safetensors")
        assert {t["inputs"] for t in told.json["tensors"]} == {"recorded"}
        assert all(t["output_sqnr_db"] > 15 for t in told.json["tensors"])


@pytest.mark.parametrize("observer", ["minmax", "ema", "percentile", "mse", "entropy", "nmse"])
def test_symmetric_activations_have_no_zero_point_up_to_the_product(
    observer: str, place: Path, call: Call
) -> None:
    calibrate = lines("--observer", observer, "--symmetric", "--json")["calibrate"]
    layers = {layer["name"]: layer for layer in call(*calibrate).json["layers"]}
    call(*lines("--calibration", "new.safetensors")["quantize"])
    with closing(open_qblk(place / "new.qblk")) as model:
        for name, layer in layers.items():
            noted = named(model, f"{name}.weight").activation
            assert noted
            assert (noted["scale"], noted["zero_point"]) == (layer["scale"], 0)
            assert layer["scale"] == pytest.approx(layer["high"] / 127, rel=1e-6)
            assert layer["low"] == -layer["high"]
    verify = ["verify", "new.qblk", "--against", "m.safetensors", "--json", "--activations"]
    told = call(*verify, "static", "--samples", "acts.safetensors")
    assert told.code == 0
    assert all(t["output_sqnr_db"] > 15 for t in told.json["tensors"])
    again = ["calibrate", "m.safetensors", "--merge", "new.safetensors", "-o", "merged"]
    assert call(*again, "--symmetric").code == 2
    merged = {layer["name"]: layer for layer in call(*again, "--json").json["layers"]}
    assert merged == layers


def test_calibrate_takes_several_files_and_a_percentile(place: Path, call: Call) -> None:
    save(place / "more.safetensors", {"up": 3 * gaussian(8, 20, 64)})
    both = [*lines("--activations", "more.safetensors", "--json")["calibrate"]]
    layers = {layer["name"]: layer for layer in call(*both).json["layers"]}
    assert (layers["up"]["samples"], layers["down"]["samples"]) == (70, 50)
    narrow = ["--observer", "percentile", "--percentile", "90", "--force", "--json"]
    clipped = call(*lines(*narrow)["calibrate"]).json["layers"]
    whole = call(*lines("--force", "--json")["calibrate"]).json["layers"]
    for a, b in zip(clipped, whole, strict=True):
        assert a["high"] - a["low"] < 0.7 * (b["high"] - b["low"])


def test_calibration_of_other_layers_is_a_warning(place: Path, call: Call) -> None:
    save(place / "acts.safetensors", {"other": gaussian(1, 9, 64), "up": gaussian(2, 9, 64)})
    told = call(*lines("--json")["calibrate"])
    assert ["other" in w for w in told.json["warnings"]] == [True]
    told = call(*lines("--json", "--calibration", "new.safetensors")["quantize"])
    assert ["other" in w for w in told.json["warnings"]] == [True]


def test_verify_takes_samples_rows_seed_and_threads(place: Path, call: Call) -> None:
    def output(*options: str) -> list[float]:
        told = call("verify", "m.qblk", "--against", "m.safetensors", "--json", *options)
        assert told.code == 0
        return [t["output_sqnr_db"] for t in told.json["tensors"]]

    assert output() == output("--seed", "0") == output("--threads", "3") == output("--rows", "8")
    samples = ["--samples", "acts.safetensors"]
    different = [output(), output("--seed", "1"), output("--rows", "3"), output(*samples)]
    assert len({str(d) for d in different}) == 4
    assert output(*samples, "--rows", "99") == output(*samples, "--rows", "50")


def test_bench_measures_shapes_and_files(place: Path, call: Call) -> None:
    several = ["--shape", "64x64", "--shape", "32X96", "--rows", "4", "--threads", "2"]
    told = call("bench", *several, "--runs", "2", "--json").json
    assert told["threads"] == 2
    assert told["runs"] == 2
    assert all(m["seconds"] > 0 and len(m["times"]) == 2 for m in told["measurements"])
    done = call("bench", "m.safetensors", "--scheme", "q8_channel", "--range", "minmax")
    assert done.code == 0, done.err
    assert "up.weight" in done.out or "down.weight" in done.out
    assert call("bench", "--shape", "64x64", "--scheme", "q4_0", "--runs", "1").code == 0


def test_a_directory_is_a_model(tmp_path: Path, call: Call) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    save(directory / "model.safetensors", every_kind())
    (directory / "config.json").write_text("{}")
    told = call("quantize", directory, "--scheme", "q4_block64", "--json")
    assert told.code == 0, told.err
    assert (tmp_path / "model.q4_block64.qblk").exists()
    made = tmp_path / "model.q4_block64.qblk"
    assert call("verify", made, "--against", directory, "--json").json["status"] == "pass"
    assert call("inspect", directory).code == call("inspect", made).code == 0


def test_a_model_without_tensors_is_converted(tmp_path: Path, call: Call) -> None:
    path = container(tmp_path / "m.safetensors", {})
    for scheme, kind, more in (("q4_block32", "qblk", []), ("q4_0", "gguf", ["--raw"])):
        out = tmp_path / f"m.{kind}"
        assert call("quantize", path, "--scheme", scheme, "-o", out, *more).code == 0
        assert call("verify", out, "--against", path).code == 0
        assert call("inspect", out).code == call("inspect", path).code == 0


# --- a calibration file is untrusted --------------------------------------------------------------


def forged(place: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The calibration of ``place`` with its JSON changed."""
    data = (place / "c.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["qconvert.calibration"])
    change(described)
    header["__metadata__"]["qconvert.calibration"] = json.dumps(described)
    return container(place / "forged.safetensors", header, data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(observer="x" * 5000),
        lambda d: d.update(observer="\ud800"),
        lambda d: d["layers"]["up"].update(samples=2**60),
        lambda d: d["layers"]["up"].update(scale=True),
        lambda d: d["layers"]["up"].update(scale=10**400),
        lambda d: d["layers"]["up"].update(low="x"),
        lambda d: d["layers"]["up"].update(zero_point=128),
        lambda d: d["layers"]["up"].update(more=1),
        lambda d: d.update(layers=[]),
        lambda d: d.update(schema="qconvert.calibration/1"),
    ],
)
def test_a_forged_calibration_is_refused_or_gives_a_good_file(
    change: Callable[[dict[str, Any]], Any], place: Path, call: Call
) -> None:
    forged(place, change)
    done = call(*lines("--calibration", "forged.safetensors")["quantize"])
    if done.code == 0:
        assert call("verify", "new.qblk", "--against", "m.safetensors").code == 0
    else:
        is_refusal(done, 3)


def test_stdout_may_be_a_text_stream_of_any_kind(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller may have put a StringIO in its place."""
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    assert main(["inspect", "m.safetensors", "--json", "-q"]) == 0
    assert json.loads(out.getvalue())["schema"] == "qconvert.inspect/1"


def test_a_locale_that_is_not_utf8_prints_all_the_same(place: Path, run: Run) -> None:
    save(place / "\u00fc.safetensors", {"\u6a21\u578b": gaussian(1, 40, 64)})
    env = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    for line in (["--tensor", "*"], ["--json"]):
        done = run("inspect", "\u00fc.safetensors", *line, cwd=place, env=env)
        assert done.code == 0, done.err
