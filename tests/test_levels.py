"""c2 to c6 and c4s: formats/schemes/SPEC.md section 11, held to the independent reader, to
arithmetic in fractions and to a search of every step.
"""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from conftest import FORMATS, ROOT, Call, Qblk, gaussian, read_independently, save
from numpy.typing import NDArray
from stored import in_file, in_memory

import qconvert
from qconvert import kernels
from qconvert.codecs.level_tables import fitted_code, fitted_levels
from qconvert.codecs.levels import CODEC, LevelEncoding, planned
from qconvert.files import open_model
from qconvert.kernels.activations import DynamicInput, StaticInput
from qconvert.kernels.arithmetic import level_steps
from qconvert.kernels.records import Encoded, LevelCode
from qconvert.model import TensorInfo
from qconvert.running.integer_path import read_matrix
from qconvert.schemes import SCHEMES, LevelScheme
from qconvert.training.weights import as_in_file, settled_scheme

LLAMA = ROOT / "samples/tiny-llama"
NAMES = [name for name, scheme in SCHEMES.items() if isinstance(scheme, LevelScheme)]
EACH = pytest.mark.parametrize("name", NAMES)
F32 = NDArray[np.float32]
# As the specification lists them.
TABLES = {
    4: (-127, -102, -79, -61, -46, -32, -20, -9, 2, 13, 24, 36, 49, 65, 83, 109),
    3: (-127, -77, -45, -19, 6, 33, 64, 109),
    2: (-127, -43, 17, 85),
    5: (
        *(-127, -117, -105, -94, -80, -72, -64, -56, -48, -41, -35, -29, -23, -17, -12, -7),
        *(-1, 4, 9, 15, 21, 26, 32, 38, 45, 51, 58, 66, 74, 82, 94, 113),
    ),
    6: (
        *(-127, -120, -111, -106, -100, -95, -90, -83, -78, -74, -70, -65, -61, -58, -54, -50),
        *(-47, -44, -40, -37, -34, -31, -28, -26, -23, -20, -17, -15, -12, -10, -7, -4),
        *(-2, 1, 3, 6, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 37),
        *(40, 43, 46, 50, 53, 57, 61, 64, 68, 72, 76, 81, 88, 93, 99, 109),
    ),
}


def table_of(name: str) -> tuple[int, ...]:
    return (-125, -79, -41, 5) if name == "c2z_block16" else TABLES[int(name[1])]


def scheme(name: str) -> LevelScheme:
    found = SCHEMES[name]
    assert isinstance(found, LevelScheme)
    return found


def encoding_of(name: str, *shape: int) -> LevelEncoding:
    return planned(scheme(name), TensorInfo("w", shape, "F32", 4 * math.prod(shape)))


def encoded(name: str, x: F32, squares: F32 | None = None) -> tuple[LevelEncoding, Encoded]:
    encoding = encoding_of(name, *x.shape)
    return encoding, kernels.levels_encode(x, encoding.code, squares)


def decoded(name: str, x: F32) -> F32:
    encoding, done = encoded(name, x)
    stored = in_memory(encoding, x.shape, in_file(encoding, x.shape, done.segments))
    found: F32 = stored.values(0, x.size).reshape(x.shape)
    return found


def sqnr(x: F32, y: F32) -> float:
    wide = x.astype(np.float64)
    return float(10 * np.log10((wide**2).sum() / ((wide - y) ** 2).sum()))


# --- what is stored -------------------------------------------------------------------------------


def test_the_worked_example_of_the_specification() -> None:
    code = LevelCode(4, 16, 5, 0, TABLES[4])
    packed = kernels.pack(np.full(32, 15, np.uint8), 4).tobytes()
    scales = kernels.pack(np.array([13, 13] + [0] * 30, np.uint8), 5).tobytes()  # -3 + 16
    segments = {"codes": packed, "scales": scales, "row_scales": bytes.fromhex("003c")}
    stored = in_memory(LevelEncoding(code, 32), (1, 32), segments)
    assert stored.values(0, 32).tolist() == [-0.15966796875] * 32
    assert stored.values(7, 9).tolist() == [-0.15966796875] * 2


@EACH
def test_tables_and_bits_are_those_of_the_specification(name: str) -> None:
    encoding = encoding_of(name, 512, 256)
    bits, block = int(name[1]), int(name.partition("block")[2])
    assert encoding.code.levels == table_of(name)
    steps = {"c4s": (6, 4, 7), "c2z": (4, 8, 8), "c5_": (6, 0, 6), "c6_": (6, 0, 6)}
    step_bits, shift, width = steps.get(name[:3], (5, 0, 5))
    assert (encoding.code.step_bits, encoding.code.shift) == (step_bits, shift)
    wanted = bits + width / block + 16 / 256
    assert 8 * encoding.size((512, 256)) / (512 * 256) == wanted


@EACH
def test_a_file_is_what_the_independent_reader_finds(name: str, tmp_path: Path) -> None:
    tensors = {
        "odd": gaussian(1, 3, 5, 77),
        "even": gaussian(2, 300, 256),
        "long": gaussian(3, 2, 4500),
        "conv": gaussian(4, 24, 8, 3, 3),
        "norm": gaussian(5, 64),
        "zeros": np.zeros((40, 64), np.float32),
    }
    tensors["even"][7] = 0
    tensors["even"][8, 16:48] = 0
    source = save(tmp_path / "m.safetensors", tensors)
    path, other = tmp_path / "m.qblk", tmp_path / "n.qblk"
    qconvert.quantize(source, name, output=path, threads=1)
    qconvert.quantize(source, name, output=other, threads=3)
    assert path.read_bytes() == other.read_bytes()
    told = read_independently(path)
    assert told.code == 0, told.out
    assert told.json["version"] == [1, 3]
    hashes = {t["name"]: t["values_sha256"] for t in told.json["tensors"]}
    with qconvert.load(path) as found:
        for tensor in ("odd", "even", "long", "conv", "zeros"):
            assert found[tensor].dtype == name
            values = found[tensor].dequantize().astype("<f4")
            assert hashlib.sha256(values.tobytes()).hexdigest() == hashes[tensor]
            codes = found[tensor].quantized()
            assert codes.dequantize().tobytes() == values.tobytes()
            assert codes.codes.max() < 1 << codes.bits
        assert not found["zeros"].dequantize().any()
        assert not found["even"].dequantize()[7].any()
    report = qconvert.verify(path, against=source)
    rows = {t.name: t for t in report.tensors}
    assert report.status == "pass"
    assert all(rows[n].integer_exact for n in ("odd", "even", "long", "conv", "zeros"))
    steps = [rows[n].worst_step for n in ("odd", "even", "long", "conv")]
    assert all(step is not None and 0 < step <= 0.502 for step in steps)


@EACH
def test_codes_of_another_step_are_found(name: str, tmp_path: Path) -> None:
    """By the bound on the error of a weight, where the digests are right."""
    source = save(tmp_path / "m.safetensors", {"w": gaussian(1, 64, 64)})
    qconvert.quantize(source, name, output=tmp_path / "m.qblk")
    changed = Qblk(tmp_path / "m.qblk")
    for i in range(16):  # the highest of four bits of each of 32 steps
        changed.data["w", "scales"][i] ^= 0x88
    report = qconvert.verify(changed.write(tmp_path / "n.qblk"), against=source)
    failed = {c.id for c in report.checks if c.status == "fail"}
    assert "error-bound" in failed


# --- the search -----------------------------------------------------------------------------------


def best_noise(x: F32, name: str) -> float:
    """Least squared error of rows by all steps and shifts that there are, codes nearest."""
    code = encoding_of(name, *x.shape).code
    unsigned = name.startswith("c2z")
    lowest = 0 if unsigned else -(1 << (code.step_bits - 1))
    largest = np.abs(x).max(axis=1).astype(np.float32)
    d = (largest * np.float32(0.75 if unsigned else 1.0625)).astype(np.float16).astype(np.float64)
    unit = np.repeat(d * 2.0 ** -(code.step_bits + 6), x.shape[1] // code.block)
    blocks = x.reshape(-1, code.block).astype(np.float64)
    least = (blocks**2).sum(axis=1)
    for shift in range(0, 121, 8) if unsigned else {0, code.shift}:
        levels = np.array(code.levels, np.float64) + shift
        middles = (levels[1:] + levels[:-1]) / 2
        for step in range(lowest, lowest + (1 << code.step_bits)):
            scale = np.where(unit * step == 0, 1, unit * step)[:, None]
            near = levels[np.searchsorted(middles, blocks / scale)] * scale
            least = np.minimum(least, ((blocks - near) ** 2).sum(axis=1))
    return float(least.sum())


@EACH
def test_the_search_is_near_the_best_of_all_steps_on_real_weights(name: str) -> None:
    model = open_model(LLAMA)
    for tensor in model.tensors:
        if "layers.1." in tensor.name and tensor.name.endswith(("q_proj.weight", "up_proj.weight")):
            x = model.values(tensor, 0, 64 * tensor.shape[1]).reshape(64, -1).astype(np.float32)
            best = 10 * math.log10((x.astype(np.float64) ** 2).sum() / best_noise(x, name))
            assert best - 0.02 <= sqnr(x, decoded(name, x)) <= best + 1e-6
    model.close()


# dB of a Gaussian that the formats were measured to reach by a search of all scales.
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("c4_block16", 23.4),
        ("c4_block32", 22.35),
        ("c3_block16", 17.25),
        ("c2_block16", 10.9),
        ("c2z_block16", 11.7),
        ("c4s_block16", 24.1),
        # Evenly spaced levels with scales of 6 bits have 28.95 and 34.9 in blocks of 16.
        ("c5_block16", 29.95),
        ("c5_block32", 28.65),
        ("c6_block16", 35.8),
        ("c6_block32", 34.5),
    ],
)
def test_a_gaussian_keeps_what_the_format_can_keep(name: str, least: float) -> None:
    x = np.random.default_rng(0).standard_normal((160, 512)).astype(np.float32)
    assert sqnr(x, decoded(name, x)) >= least


@EACH
def test_no_other_code_is_nearer(name: str) -> None:
    x = gaussian(4, 7, 90) * np.exp(gaussian(5, 7, 1))
    encoding, done = encoded(name, x)
    stored = in_memory(encoding, x.shape, in_file(encoding, x.shape, done.segments))
    found = encoding.codes(stored)
    for i in range(7):
        for j in range(90):
            scale = Fraction(float(found.scale[i, j]))
            shift = Fraction(float(found.zero_point[i, j]))
            error = [abs(Fraction(float(x[i, j])) - (n - shift) * scale) for n in table_of(name)]
            # The quotient is rounded to binary32.
            assert error[found.codes[i, j]] <= min(error) + abs(scale) * Fraction(1, 2**15)


@EACH
def test_weights_of_channels_lower_the_error_that_they_weigh(name: str) -> None:
    x = gaussian(6, 32, 160)
    squares = np.exp(3 * gaussian(7, 160) / 0.05).astype(np.float32)
    plain, weighted = (encoded(name, x, w)[1].error for w in (None, squares))
    assert weighted.weighted_sqnr_db is not None
    values = decoded(name, x)
    wide, w = x.astype(np.float64), squares.astype(np.float64)
    before = 10 * np.log10((w * wide**2).sum() / (w * (wide - values) ** 2).sum())
    assert weighted.weighted_sqnr_db > before + 0.3
    assert plain.noise < weighted.noise
    same = encoded(name, x, np.full(160, 3.5, np.float32))[1]
    assert dict(same.segments) == dict(encoded(name, x)[1].segments), "equal weights weigh nothing"


def test_a_calibration_weighs_the_search(tmp_path: Path, call: Call) -> None:
    x = gaussian(8, 64, 64)
    rng = np.random.default_rng(9)
    inputs = (rng.standard_normal((50, 64)) * np.exp(rng.standard_normal(64))).astype(np.float32)
    source = save(tmp_path / "m.safetensors", {"a.weight": x})
    samples = save(tmp_path / "s.safetensors", {"a": inputs})
    call("calibrate", source, "--activations", samples, "-o", tmp_path / "c.safetensors")
    line = ("quantize", source, "--scheme", "c4_block16", "--min-values", 1, "--json", "-o")
    plain = json.loads(call(*line, tmp_path / "p.qblk").out)
    told = json.loads(
        call(*line, tmp_path / "w.qblk", "--calibration", tmp_path / "c.safetensors").out
    )
    assert told["tensors"][0]["weighted_sqnr_db"] > 23.5
    assert told["tensors"][0]["sqnr_db"] < plain["tensors"][0]["sqnr_db"]


# --- odd weights ----------------------------------------------------------------------------------


def test_large_and_small_rows() -> None:
    x = gaussian(10, 6, 64) / 0.05
    x *= np.array([2.0**-149, 2.0**-24, 2.0**-16, 1, 2.0**10, 2.0**13], np.float32)[:, None]
    y = decoded("c4_block16", x)
    assert not y[0].any(), "beyond what a row scale of binary16 reaches"
    for row in range(2, 6):
        assert sqnr(x[row], y[row]) > 20
    assert sqnr(x[1], y[1]) > 3, "the unit is the smallest that there is"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float, tmp_path: Path, call: Call) -> None:
    x = gaussian(1, 64, 64)
    x[3, 5] = bad
    source = save(tmp_path / "m.safetensors", {"w": x})
    told = call("quantize", source, "--scheme", "c4_block16", "-o", tmp_path / "m.qblk")
    assert told.code == 3
    assert "1 of 4,096 weights are NaN or Inf" in told.err
    assert not (tmp_path / "m.qblk").exists()


def test_a_row_beyond_binary16_is_refused(tmp_path: Path, call: Call) -> None:
    x = gaussian(1, 64, 64)
    x[3, 5] = -62000
    source = save(tmp_path / "m.safetensors", {"w": x})
    told = call("quantize", source, "--scheme", "c4_block16", "-o", tmp_path / "m.qblk")
    assert told.code == 3
    assert "the scale of a row does not fit binary16" in told.err
    assert "62000" in told.err
    x[3, 5] = -61000
    save(source, {"w": x})
    assert call("quantize", source, "--scheme", "c4_block16", "-o", tmp_path / "m.qblk").code == 0


def test_rows_that_are_too_long_are_kept() -> None:
    tensor = TensorInfo("w", (2, (1 << 20) + 1), "F32", 8 * ((1 << 20) + 1))
    refused = CODEC.refuses(scheme("c4_block16"), tensor)
    assert refused == "rows of 1,048,577 values are longer than the 1,048,576 of c4_block16"


# --- products and plans ---------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("columns", [64, 77, 4100])
def test_a_linear_layer_is_that_of_the_specification(name: str, columns: int) -> None:
    x = gaussian(11, 24, columns)
    encoding, done = encoded(name, x)
    matrix = read_matrix(in_memory(encoding, x.shape, in_file(encoding, x.shape, done.segments)))
    inputs = np.random.default_rng(12).standard_normal((5, columns)).astype(np.float32)
    codes = encoding.codes(matrix.stored)
    levels = np.array(table_of(name))[codes.codes] - codes.zero_point
    rows = np.frombuffer(done.segments["row_scales"], "<f2").astype(np.float32)
    unit = rows * np.float32(2.0 ** -(encoding.code.step_bits + 6))
    k = np.rint(codes.scale / unit[:, None] * levels).astype(np.int64)
    for how in (DynamicInput(symmetric=True), StaticInput(0.03, -5)):
        if isinstance(how, StaticInput):
            scale, zero = np.full(5, 0.03, np.float32), -5
            a = np.clip(np.rint(inputs / scale[:, None] + np.float32(-5)), -128, 127)
        else:
            scale, zero = np.abs(inputs).max(axis=1) / np.float32(127), 0
            a = np.clip(np.rint(inputs / scale[:, None]), -127, 127)
        wanted = np.zeros((5, 24), np.float32)
        for first in range(0, columns, 2048):
            span = slice(first, min(first + 2048, columns))
            acc = (a[:, span].astype(np.int64) - zero) @ k[:, span].T
            assert np.abs(acc).max() < 2**31
            wanted += acc.astype(np.float32) * unit
        wanted *= scale[:, None]
        found = matrix.linear(inputs, None, how)
        assert found.tobytes() == wanted.tobytes()


def test_embeddings_and_heads_take_4_bits(tmp_path: Path, call: Call) -> None:
    line = ("quantize", LLAMA, "--scheme", "c2_block16", "--dry-run", "--json")
    rows = {t["name"]: t for t in json.loads(call(*line).out)["tensors"]}
    assert rows["model.embed_tokens.weight"]["stored"] == "c4_block16"
    assert rows["lm_head.weight"]["stored"] == "c4_block16"
    assert rows["model.layers.0.mlp.up_proj.weight"]["stored"] == "c2_block16"


def test_a_gguf_file_has_none(tmp_path: Path, call: Call) -> None:
    told = call("quantize", LLAMA, "--scheme", "c4_block16", "-o", tmp_path / "m.gguf")
    assert told.code == 2
    assert "c4_block16 does not go into a .gguf file" in told.err


def test_the_schema_takes_their_headers(tmp_path: Path) -> None:
    schema: Any = json.loads((FORMATS / "qblk/schema.json").read_text())
    source = save(tmp_path / "m.safetensors", {"w": gaussian(1, 64, 64)})
    for name in NAMES:
        qconvert.quantize(source, name, output=tmp_path / "m.qblk", force=True)
        jsonschema.validate(Qblk(tmp_path / "m.qblk").header, schema)


# --- fitted tables --------------------------------------------------------------------------------


def tails(seed: int, rows: int, columns: int) -> F32:
    """Student's t of three degrees of freedom."""
    drawn = np.random.default_rng(seed).standard_t(3, (rows, columns))
    return (0.02 * drawn).astype(np.float32)


def nearest_noise(x: F32, code: LevelCode, levels: NDArray[np.float64], done: Encoded) -> float:
    """Error of rows on levels that need not be integers, with the steps that were found."""
    step = np.frombuffer(done.segments["scales"], np.uint8).reshape(len(x), -1)
    steps = level_steps(step, done.segments["row_scales"], code)
    scale = np.repeat(steps.scale.astype(np.float64), code.block, axis=1)
    grid = levels * scale[:, :, None]
    return float(np.square(np.abs(x[:, :, None] - grid).min(axis=2)).sum())


@pytest.mark.parametrize("name", ["c2_block16", "c3_block16", "c4_block32"])
def test_a_fitted_table_is_one_that_no_single_step_betters(name: str) -> None:
    """Lloyd's method has come to rest: with steps as found, another place of one level is worse."""
    x, code = tails(1, 64, 256), encoding_of(name, 64, 256).code
    found = fitted_levels(x, code)
    done = kernels.levels_encode(x, found)
    assert done.error.noise < 0.97 * kernels.levels_encode(x, code).error.noise
    levels = np.array(found.levels, np.float64)
    rest = nearest_noise(x, found, levels, done)
    assert rest == pytest.approx(done.error.noise, rel=1e-4)
    for k in range(len(levels)):
        for change in (-2, 2):
            moved = levels + change * (np.arange(len(levels)) == k)
            if np.abs(moved).max() > 127:
                continue
            assert nearest_noise(x, found, np.sort(moved), done) > 0.999 * rest


def test_heavy_tails_get_tables_and_files_say_so(tmp_path: Path, call: Call) -> None:
    source = save(tmp_path / "m.safetensors", {"g": gaussian(1, 96, 256), "t": tails(2, 96, 256)})
    line = ("quantize", source, "--scheme", "c3_block16", "-o")
    told = call(*line, tmp_path / "m.qblk", "--threads", 1)
    call(*line, tmp_path / "n.qblk", "--threads", 3)
    assert (tmp_path / "m.qblk").read_bytes() == (tmp_path / "n.qblk").read_bytes()
    assert "1 of 2 fitted to their tensors" in told.out
    by_name = {t["name"]: t for t in Qblk(tmp_path / "m.qblk").header["tensors"]}
    assert tuple(by_name["g"]["encoding"]["levels"]) == TABLES[3]
    assert tuple(by_name["t"]["encoding"]["levels"]) != TABLES[3]
    assert "table" not in by_name["g"].get("decision", {})
    assert by_name["t"]["decision"]["table"] == "fitted"
    assert by_name["t"]["decision"]["table_gain_db"] > 0.3
    with qconvert.load(tmp_path / "m.qblk") as found:
        gained = sqnr(tails(2, 96, 256), found["t"].dequantize()) - sqnr(
            tails(2, 96, 256), decoded("c3_block16", tails(2, 96, 256))
        )
        values = found["t"].dequantize().astype("<f4").tobytes()
    assert gained > 0.3
    read = read_independently(tmp_path / "m.qblk")
    hashes = {t["name"]: t["values_sha256"] for t in read.json["tensors"]}
    assert hashes["t"] == hashlib.sha256(values).hexdigest()
    report = qconvert.verify(tmp_path / "m.qblk", against=source)
    assert report.status == "pass"
    assert all(row.integer_exact for row in report.tensors)


def test_a_gain_that_other_rows_do_not_share_is_none(tmp_path: Path) -> None:
    """Rows that are fitted to have heavy tails, those that judge have none."""
    x = gaussian(3, 96, 256)
    x[::2] = tails(4, 48, 256)
    source = save(tmp_path / "m.safetensors", {"w": x})
    model = open_model(source)
    tensor, code = model.tensors[0], encoding_of("c3_block16", 96, 256).code
    assert fitted_levels(x[::2], code) != code
    assert fitted_code(model, tensor, code, None) == (code, 0.0)
    model.close()


def test_weights_of_channels_weigh_a_fitted_table() -> None:
    """Where only the Gaussian channels count, the usual table stays nearly the best."""
    x, code = gaussian(5, 64, 256), encoding_of("c3_block16", 64, 256).code
    x[:, ::2] = tails(6, 64, 128)
    squares = np.where(np.arange(256) % 2, 1, 1e-4).astype(np.float32)
    plain, weighted = (fitted_levels(x, code, w) for w in (None, squares))
    errors = [
        kernels.levels_encode(x, c, squares).error.weighted_noise for c in (code, plain, weighted)
    ]
    assert plain.levels != weighted.levels
    assert errors[2] <= min(errors[0], errors[1])


def test_one_row_and_zeros_keep_the_usual_table(tmp_path: Path) -> None:
    tensors = {"row": tails(7, 1, 4096), "zeros": np.zeros((64, 64), np.float32)}
    model = open_model(save(tmp_path / "m.safetensors", tensors))
    for tensor in model.tensors:
        code = encoding_of("c2_block16", *tensor.shape).code
        assert fitted_code(model, tensor, code, None) == (code, 0.0)
    model.close()


def test_training_stays_with_the_table_that_it_began_with(tmp_path: Path) -> None:
    tensors = {"a": tails(8, 96, 256), "b": gaussian(9, 96, 256)}
    model = open_model(save(tmp_path / "m.safetensors", tensors))
    first, later = model.tensors
    begun = as_in_file(model, first, scheme("c3_block16"))
    settled = settled_scheme(scheme("c3_block16"), begun)
    assert isinstance(begun.encoding, LevelEncoding)
    assert begun.encoding.code.levels != TABLES[3]
    assert settled.name == "c3_block16"
    assert as_in_file(model, later, settled).encoding == begun.encoding
    assert as_in_file(model, later, scheme("c3_block16")).encoding != begun.encoding
    model.close()
