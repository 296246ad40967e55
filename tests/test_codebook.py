"""nf4 and fp4: formats/schemes/SPEC.md section 10, held to what bitsandbytes makes and reads."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FORMATS, ROOT, Call, gaussian, read_independently, save
from numpy.typing import NDArray
from stored import in_memory

import qconvert
from qconvert import kernels
from qconvert.codecs.codebook import CodebookEncoding, scale_table, table_of
from qconvert.schemes import CODEBOOK_BLOCKS, CODEBOOKS

LLAMA = ROOT / "samples/tiny-llama"
GOLDEN: Any = np.load(Path(__file__).parent / "codebook_golden" / "bitsandbytes.npz")
TABLES = pytest.mark.parametrize("table", CODEBOOKS)
DOUBLE = pytest.mark.parametrize("double", [False, True], ids=["F32", "dq"])


def bits(x: NDArray[np.float32]) -> list[int]:
    return x.view(np.uint32).ravel().tolist()


# --- as bitsandbytes ------------------------------------------------------------------------------


def test_8_bit_scales_have_the_table_of_bitsandbytes_and_of_the_specification() -> None:
    listed = json.loads((FORMATS / "schemes/dynamic8.json").read_text())["binary32"]
    assert bits(scale_table()) == bits(GOLDEN["dynamic"]) == [int(v, 16) for v in listed]


@TABLES
@DOUBLE
def test_its_codes_decode_to_its_values(table: str, double: bool) -> None:
    encoding = CodebookEncoding(table, 64, double)
    segments = {
        key.partition(".")[2]: GOLDEN[key].tobytes()
        for key in GOLDEN
        if key.startswith(f"{encoding.name}.")
    }
    stored = in_memory(encoding, (4, 64), segments)
    wanted = GOLDEN[f"{encoding.name}.values"]
    assert bits(stored.values(0, 256)) == bits(wanted)
    assert bits(stored.values(3, 200)) == bits(wanted[3:200]), "a part of it"
    assert bits(encoding.codes(stored).dequantize()) == bits(wanted)


@TABLES
@DOUBLE
def test_codes_and_scales_are_those_that_it_makes(
    table: str, double: bool, tmp_path: Path, done: Call
) -> None:
    x = np.random.default_rng(11).standard_normal(64 * 300).astype(np.float32)
    scheme = f"{table}_block64{'_dq' if double else ''}"
    source = save(tmp_path / "m.safetensors", {"w": x.reshape(300, 64)})
    done("quantize", source, "--scheme", scheme, "-o", tmp_path / "m.qblk")
    with qconvert.load(tmp_path / "m.qblk") as tensors:
        found = tensors["w"].quantized()
    if double:  # codes are chosen for the scale that is stored, there for the one before
        wide = np.repeat(GOLDEN[f"{scheme}.scale_scales"], 256)[:300]
        scale = scale_table()[GOLDEN[f"{scheme}.scales"]] * wide + GOLDEN[f"{scheme}.scale_offset"]
        assert bits(found.scales) == bits(scale)
        return
    assert bits(found.scales) == bits(GOLDEN[f"{scheme}.scales"])
    pairs = GOLDEN[f"{scheme}.codes"]
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
    if table == "fp4":  # which has two zeros, and keeps the sign of what becomes one of them
        codes[codes == 8] = 0
    assert found.codes.ravel()[: len(codes)].tolist() == codes.tolist()


# --- by brute force -------------------------------------------------------------------------------


@TABLES
@DOUBLE
def test_no_other_code_is_nearer(table: str, double: bool, tmp_path: Path, done: Call) -> None:
    x = gaussian(4, 7, 90) * np.exp(gaussian(5, 7, 1))
    source = save(tmp_path / "m.safetensors", {"w": x})
    scheme = f"{table}_block32{'_dq' if double else ''}"
    done("quantize", source, "--scheme", scheme, "--min-values", 1, "-o", tmp_path / "m.qblk")
    with qconvert.load(tmp_path / "m.qblk") as tensors:
        found = tensors["w"].quantized()
        values = tensors["w"].dequantize()
    assert found.codes.shape == (1, 630), "blocks go on over the ends of rows of 90"
    numbers = [Fraction(float(v)) for v in table_of(table)]
    for value, code, scale in zip(x.ravel(), found.codes[0], found.scale[0], strict=True):
        s = Fraction(float(scale))
        error = [abs(Fraction(float(value)) - number * s) for number in numbers]
        # The quotient and the midpoints are rounded to binary32.
        assert error[code] <= min(error) + abs(s) * Fraction(1, 2**22)
    assert bits(values.ravel()) == bits(found.dequantize().ravel())
    if not double:
        ends = [np.abs(x.ravel()[i : i + 32]).max() for i in range(0, 630, 32)]
        assert found.scales[0].tolist() == ends


def test_a_scale_of_0_gives_the_code_of_0() -> None:
    x = np.array([0, 0, 1, -1], np.float32)
    for table, zero in (("nf4", 0x77), ("fp4", 0x00)):
        codes = kernels.codebook_encode(x, np.zeros(2, np.float32), table_of(table), 2)
        assert codes.tolist() == [zero, zero]


# --- files ----------------------------------------------------------------------------------------


@TABLES
@DOUBLE
@pytest.mark.parametrize("block", CODEBOOK_BLOCKS)
def test_a_file_is_what_the_independent_reader_finds(
    block: int, double: bool, table: str, tmp_path: Path, done: Call
) -> None:
    scheme = f"{table}_block{block}{'_dq' if double else ''}"
    tensors = {"odd": gaussian(1, 3, 5, 77), "even": gaussian(2, 300, 256), "norm": gaussian(3, 64)}
    source = save(tmp_path / "m.safetensors", tensors)
    path, other = tmp_path / "m.qblk", tmp_path / "n.qblk"
    line = ("quantize", source, "--scheme", scheme, "-o")
    done(*line, path, "--threads", 1)
    done(*line, other, "--threads", 3)
    assert path.read_bytes() == other.read_bytes()
    told = read_independently(path)
    assert told.code == 0, told.out
    assert told.json["version"] == [1, 2]
    hashes = {t["name"]: t["values_sha256"] for t in told.json["tensors"]}
    with qconvert.load(path) as found:
        for name in ("odd", "even"):
            assert found[name].dtype == scheme
            values = found[name].dequantize().astype("<f4")
            assert hashlib.sha256(values.tobytes()).hexdigest() == hashes[name]
    report = json.loads(done("verify", path, "--against", source, "--json").out)
    rows = {t["name"]: t for t in report["tensors"]}
    assert report["status"] == "pass"
    assert {t["activations"] for t in rows.values()} == {"float"}
    least = {"nf4": 18, "fp4": 15}[table]  # dB of a Gaussian in blocks of 256
    assert all(t["sqnr_db"] > least and t["output_sqnr_db"] > least for t in rows.values())
    assert all(t["worst_step"] is t["integer_exact"] is None for t in rows.values())


def test_bits_are_counted_with_all_scales(tmp_path: Path, done: Call) -> None:
    source = save(tmp_path / "m.safetensors", {"w": gaussian(1, 512, 512)})
    for scheme, wanted in (
        ("nf4_block64", 4 + 32 / 64),
        ("nf4_block64_dq", 4 + 8 / 64 + 32 / 64 / 256 + 32 / 512**2),
    ):
        done("quantize", source, "--scheme", scheme, "-o", tmp_path / f"{scheme}.qblk")
        report = json.loads(done("quantize", source, "--scheme", scheme, "--dry-run", "--json").out)
        (row,) = report["tensors"]
        assert 8 * row["nbytes"] / 512**2 == wanted


def test_a_product_in_float_is_said_to_be_one(tmp_path: Path, done: Call) -> None:
    done("quantize", LLAMA, "--scheme", "nf4_block64", "-o", tmp_path / "m.qblk")
    told = done("verify", tmp_path / "m.qblk", "--against", LLAMA, "--min-output-sqnr", 15)
    assert "in float: their codes have no integer product" in " ".join(told.out.split())


def test_limits_on_products_hold_for_those_in_float(tmp_path: Path, call: Call) -> None:
    call("quantize", LLAMA, "--scheme", "fp4_block256", "-o", tmp_path / "m.qblk")
    line = ("verify", tmp_path / "m.qblk", "--against", LLAMA, "--json", "--min-output-sqnr", 30)
    told = call(*line)
    assert told.code == 1
    (check,) = [c for c in json.loads(told.out)["checks"] if c["id"] == "min-output-sqnr"]
    assert check["status"] == "fail"


def test_a_gguf_file_has_none(tmp_path: Path, call: Call) -> None:
    told = call("quantize", LLAMA, "--scheme", "nf4_block64", "-o", tmp_path / "m.gguf")
    assert told.code == 2
    assert "nf4_block64 does not go into a .gguf file" in told.err


@DOUBLE
def test_weights_that_are_not_finite_are_refused(double: bool, tmp_path: Path, call: Call) -> None:
    x = gaussian(1, 64, 64)
    x[3, 5] = np.nan
    source = save(tmp_path / "m.safetensors", {"w": x})
    scheme = f"nf4_block64{'_dq' if double else ''}"
    told = call("quantize", source, "--scheme", scheme, "-o", tmp_path / "m.qblk")
    assert told.code == 3
    assert "1 of 4,096 weights are NaN or Inf" in told.err
    assert not (tmp_path / "m.qblk").exists()
