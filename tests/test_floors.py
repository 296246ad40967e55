"""Weights that are lost or poorer than their bits: judged by ``verify`` and ``quantize`` alike."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Call, gaussian, save
from numpy.typing import NDArray

from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.ggml_blocks import encoding_of
from qconvert.floors import LOST_DB, Measured, expected_db, judge

LLAMA = ROOT / "samples/tiny-llama"
# Max, "Quantizing for Minimum Distortion" (1960), table I: mean squared error of the best quantizer
# of a Gaussian with 2^bits levels.
MAX_1960 = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", MAX_1960)
def test_floors_leave_room_below_the_best_quantizer(bits: int) -> None:
    best = -10 * math.log10(MAX_1960[bits])
    assert best - 7 < expected_db(bits) < best - 3


def test_floors_of_what_is_stored() -> None:
    """Bits of ggml's types are those of a block with its scales: 8.5, 16, 4.25, 3.4375 ..."""
    bits = {
        t: encoding_of(t).bits
        for t in ("Q8_0", "F16", "BF16", "MXFP4", "Q4_K", "Q3_K", "TQ2_0", "I64")
    }
    assert (bits["Q8_0"], bits["MXFP4"], bits["Q3_K"]) == (8.5, 4.25, 3.4375)
    assert [expected_db(bits[s]) for s in ("Q8_0", "F16", "BF16")] == [30, 45, 45]
    assert [expected_db(bits[s]) for s in ("MXFP4", "Q4_K", "Q3_K", "TQ2_0")] == [15, 15, 10, 6]
    assert expected_db(Affine(8, "channel", 0, True, "F32", 64).bits) == 30


def test_judged_by_hand() -> None:
    found = judge(
        [
            Measured("fine", "Q4_0", 4.5, 20.0),
            Measured("poor", "Q4_0", 4.5, 14.9),
            Measured("lost", "Q4_0", 4.5, 5.9),
            Measured("same", "F16", 16, None),
        ]
    )
    assert found.figures == [(5.9, "lost"), (14.9, "poor"), (20.0, "fine")]
    assert found.lost == ["lost"]
    assert found.warning is not None
    assert "'poor' has 14.9 dB as Q4_0, where 15 dB are expected" in found.warning


@pytest.mark.parametrize(
    "scheme", ["q2_block32", "q3_block64", "q4_block64", "q5_channel", "q6_block256", "q8_tensor"]
)
def test_a_healthy_model_meets_them(scheme: str, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.qblk"
    done = json.loads(call("quantize", LLAMA, "--scheme", scheme, "-o", path, "--json").out)
    assert done["warnings"] == []
    told = json.loads(call("verify", path, "--against", LLAMA, "--json").out)
    (check,) = [c for c in told["checks"] if c["id"] == "quality"]
    assert (check["status"], told["warnings"]) == ("pass", [])
    lossy = [t["sqnr_db"] for t in told["tensors"] if t["sqnr_db"] is not None]
    assert check["worst"] == min(lossy) > LOST_DB


def underflow() -> dict[str, NDArray[np.float32]]:
    """A matrix that binary16 holds as zeros, and one that it holds."""
    return {"gone": gaussian(1, 64, 64) * np.float32(1e-9), "there": gaussian(2, 64, 64)}


@pytest.mark.parametrize(
    ("scheme", "suffix"), [("f16", "qblk"), ("f16", "gguf"), ("q8_0", "gguf"), ("iq4_nl", "gguf")]
)
def test_a_kept_promise_of_nothing_is_no_pass(
    scheme: str, suffix: str, tmp_path: Path, call: Call
) -> None:
    source, path = save(tmp_path / "m.safetensors", underflow()), tmp_path / f"m.{suffix}"
    options = ("--raw",) if suffix == "gguf" else ()
    line = ("quantize", source, "--scheme", scheme, "-o", path, *options, "--json")
    (warning,) = json.loads(call(*line).out)["warnings"]
    assert "the weights of 1 tensor are lost: 'gone'" in warning
    done = call("verify", path, "--against", source, "--json")
    told = json.loads(done.out)
    assert done.code == 1
    assert {c["id"] for c in told["checks"] if c["status"] == "fail"} == {"quality"}
    assert {t["name"]: t["fails"] for t in told["tensors"]} == {"gone": ["quality"], "there": []}


def test_ternary_types_destroy_weights_that_are_not_ternary(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "m.gguf"
    done = call("quantize", LLAMA, "--scheme", "tq2_0", "--raw", "-o", path)
    assert "warning: the weights of 26 tensors are lost" in done.err
    verified = call("verify", path, "--against", LLAMA)
    assert verified.code == 1
    assert "the weights of 26 of" in verified.out


def test_outliers_that_cost_a_tensor_its_bits_are_a_warning(tmp_path: Path, call: Call) -> None:
    x = gaussian(1, 64, 64)
    x[0, 0] = 6
    source = save(tmp_path / "m.safetensors", {"w": x})
    line = ("quantize", source, "--scheme", "q8_tensor_sym", "--range", "minmax", "--json")
    (warning,) = json.loads(call(*line, "-o", tmp_path / "m.qblk").out)["warnings"]
    assert "poorer than so many bits should be: 'w' has" in warning
    assert "--tensor-scheme 'w=q8_block32'" in warning  # as many bits, in blocks
    # A step is 12 / 254, and its error that of a uniform distribution.
    noise, signal = (6 / 127) ** 2 / 12, float((x.astype(np.float64) ** 2).mean())
    wanted = 10 * math.log10(signal / noise)
    assert float(warning.split("has ")[1].split()[0]) == pytest.approx(wanted, abs=0.2)


def test_another_model_is_told_in_one_line(tmp_path: Path, call: Call) -> None:
    names = ("a.weight", "b.weight")
    source = save(tmp_path / "m.safetensors", {n: gaussian(i, 40, 64) for i, n in enumerate(names)})
    other = save(tmp_path / "other.safetensors", {"c.weight": gaussian(5, 40, 64)})
    again = save(tmp_path / "again.safetensors", {n: gaussian(9, 40, 64) for n in names})
    path = tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block64", "-o", path)
    told = call("verify", path, "--against", other)
    assert told.code == 1
    (line,) = told.out.splitlines()
    assert line.startswith(f"FAIL  0 of 2 names match those of {other}")
    told = call("verify", path, "--against", again)  # names and shapes are the same
    assert "the weights of 2 of 2 tensors are lost" in told.out
    assert "is --against the model that the file was made from?" in " ".join(told.out.split())


def test_every_tensor_that_fails_is_shown_and_comes_first(tmp_path: Path, call: Call) -> None:
    tensors = {f"t{i}.weight": gaussian(i, 64, 64) for i in range(9)}
    for i in range(7):
        tensors[f"t{i}.weight"][:, 0] *= 30
    source, path = save(tmp_path / "m.safetensors", tensors), tmp_path / "m.qblk"
    call("quantize", source, "--scheme", "q4_block64", "--range", "minmax", "-o", path)
    limit = 0.0125
    told = call("verify", path, "--against", source, "--max-nmse", limit)
    assert told.code == 1
    rows = told.out.split("─\n")[1].split("\n\n")[0].splitlines()
    failing = [row.split()[0] for row in rows if "max-nmse" in row]
    assert len(failing) > 5  # more than are shown of good ones
    assert [row.split()[0] for row in rows[: len(failing)]] == failing
    good = json.loads(call("verify", path, "--against", source, "--json").out)["tensors"]
    assert set(failing) == {t["name"] for t in good if t["nmse"] > limit}


def test_strict_says_why_and_leaves_nothing(tmp_path: Path, call: Call) -> None:
    source = save(tmp_path / "m.safetensors", underflow())
    line = ("quantize", source, "--scheme", "f16", "--strict", "-o", tmp_path / "m.qblk")
    done = call(*line, "--quiet")
    assert done.code == 1
    assert done.err.startswith("failed: under --strict a warning is a failure: the weights of 1")
    assert "(nothing written)" in " ".join(done.out.split())
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    (tmp_path / "m.qblk").write_bytes(b"old")
    done = call(*line, "--force", "--json")
    told = json.loads(done.out)
    assert (done.code, told["status"], told["written"]) == (1, "fail", False)
    assert (tmp_path / "m.qblk").read_bytes() == b"old"


def test_a_gguf_file_of_another_architecture_is_of_another_model(
    tmp_path: Path, call: Call, minilm: Path
) -> None:
    """Whose tokenizer cannot be converted as the file's was: that is not what is wrong."""
    path = tmp_path / "m.gguf"
    assert call("quantize", ROOT / "samples/tiny-llama", "--scheme", "q8_0", "-o", path).code == 0
    done = call("verify", path, "--against", minilm)
    assert done.code == 1
    assert done.out.startswith(f"FAIL  0 of 39 names match those of {minilm}")
