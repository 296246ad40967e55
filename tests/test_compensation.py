"""Codes that make up for each other's errors: the definition, the families, files and refusals.

Held against GPTQ as its paper has it, against all codes of problems small enough to try them, and
against what gguf-py and `formats/qblk/reader.py` decode.
"""

from __future__ import annotations

import itertools
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import Call, Qblk, gaussian, read_independently, save
from numpy.typing import NDArray

import qconvert
from qconvert import kernels
from qconvert.calibration.document import CalibrationDocument, LayerCalibration
from qconvert.calibration.file import Calibration, calibration_parts
from qconvert.calibration.grid import StaticRange
from qconvert.codecs.compensation import COMPENSATED, PASSES, Rounder, prepared
from qconvert.errors import InputError, UsageError
from qconvert.files import open_model
from qconvert.kernels import arithmetic
from qconvert.kernels.records import CodeGrid, Factors
from qconvert.kernels.reference import compensation
from qconvert.kernels.reference.ggml import GGML_BLOCKS, ggml_encode
from qconvert.kernels.reference.ggml.codes import CODE_LAYOUTS
from qconvert.stages import rounding

F64 = NDArray[np.float64]
Problem = tuple[F64, CodeGrid, F64]  # weights, grid, Gram matrix; columns as in the tensor

LEVELS = {
    "integers": np.arange(-8.0, 8.0),
    "table": np.array([-1.0, -0.6, -0.3, -0.1, 0.0, 0.2, 0.5, 1.0]) * 8,
}


def correlated(seed: int, columns: int, rows: int = 400) -> F64:
    """Inputs whose channels have something to do with each other, and other sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, columns)) @ (
        np.eye(columns) + rng.standard_normal((columns, columns)) / np.sqrt(columns)
    )
    found: F64 = mixed * rng.uniform(0.2, 3, columns)
    return found


def problem(seed: int, rows: int, columns: int, levels: F64, length: int = 16) -> Problem:
    """Weights with a grid that clips some of them, and a Gram matrix."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns))
    shape = (rows, -(-columns // length))
    scale = rng.uniform(0.15, 0.4, shape) * rng.choice([-1.0, 1.0], shape)
    numbers = scale, rng.uniform(-1, 1, shape), rng.uniform(-0.2, 0.2, shape)
    inputs = correlated(seed + 1, columns)
    return x, CodeGrid(levels, *numbers, length), inputs.T @ inputs


def taken(p: Problem, dtype: type = np.float64) -> tuple[Any, Any, CodeGrid, Factors]:
    """A problem as the kernel takes it: weights, nearest codes, grid and factors."""
    x, grid, gram = p
    numbers = grid.levels, grid.scale, grid.zero, grid.offset
    grid = CodeGrid(*(a.astype(dtype) for a in numbers), grid.length)
    x = x.astype(dtype)
    return x, nearest(x, grid), grid, prepared(gram, dtype=dtype)


def of_columns(grid: CodeGrid, columns: Any, rows: Any = slice(None)) -> tuple[Any, Any, Any]:
    """Scale, zero and offset of some columns of some rows."""
    groups = np.asarray(columns) // grid.length
    a, b, c = (n[rows][:, groups] for n in (grid.scale, grid.zero, grid.offset))
    return a, b, c


def nearest(x: Any, grid: CodeGrid, columns: Any = None) -> NDArray[np.uint8]:
    """The codes next to each weight, by trying all levels."""
    columns = np.arange(x.shape[1]) if columns is None else columns
    scale, zero, offset = (a[..., None] for a in of_columns(grid, columns))
    values = (grid.levels - zero) * scale + offset
    return np.abs(values - x[..., None]).argmin(axis=2).astype(np.uint8)


def cost(codes: Any, x: Any, grid: CodeGrid, gram: Any) -> F64:
    """e H eᵀ of each row, in binary64."""
    e = compensation.values_of(codes, grid).astype(np.float64) - x
    found: F64 = np.einsum("ij,jk,ik->i", e, np.asarray(gram, np.float64), e)
    return found


# --- the definition -------------------------------------------------------------------------------


def gptq(x: F64, grid: CodeGrid, gram: F64) -> NDArray[np.uint8]:
    """Algorithm 1 of GPTQ (Frantar et al., 2022) in act-order, scales found before: a column at a
    time, its error over the diagonal of the Cholesky factor of the inverse taken from what is left.
    """
    order = np.argsort(-gram.diagonal())
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    left, codes = x[:, order], np.zeros(x.shape, np.uint8)
    for at, j in enumerate(order):
        code = nearest(left[:, at : at + 1], grid, [j])
        scale, zero, offset = of_columns(grid, [j])
        value = (grid.levels[code] - zero) * scale + offset
        codes[:, j] = code[:, 0]
        error = (left[:, at] - value[:, 0]) / upper[at, at]
        left[:, at:] -= error[:, None] * upper[at, at:]
    return codes


@pytest.mark.parametrize("levels", LEVELS)
def test_the_sweep_is_gptq(levels: str) -> None:
    given = problem(3, 50, 70, LEVELS[levels])
    x, before, grid, factors = taken(given)
    assert np.array_equal(factors.order, np.argsort(-given[2].diagonal()))
    found, *_ = compensation.compensate(x, before, grid, factors, 0)
    wanted = gptq(x, grid, factors.gram)
    assert (found == wanted).mean() > 0.999  # the two lose other bits, which a tie may show
    assert (found != before).mean() > 0.2


def test_factors_are_those_of_the_damped_matrix() -> None:
    inputs = correlated(5, 40)
    factors = prepared(inputs.T @ inputs, dtype=np.float64)
    gram = inputs.T @ inputs
    wanted = gram / np.trace(gram) * 40 + 0.01 * np.eye(40)
    assert np.allclose(factors.gram, wanted, rtol=1e-12)
    wanted = wanted[np.ix_(factors.order, factors.order)]
    assert not np.tril(factors.feedback).any()
    upper = factors.feedback + np.eye(40)
    inverse = np.linalg.inv(upper)
    diagonal = inverse @ wanted @ inverse.T
    assert np.allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-9)


def every_code(row: F64, grid: CodeGrid, gram: F64) -> float:
    """The least cost of a row over all of its codes."""
    choices = itertools.product(range(len(grid.levels)), repeat=len(row))
    codes = np.array(list(choices), np.uint8)
    numbers = (np.repeat(n, len(codes), 0) for n in (grid.scale, grid.zero, grid.offset))
    wide = CodeGrid(grid.levels, *numbers, grid.length)
    return float(cost(codes, np.repeat(row[None], len(codes), 0), wide, gram).min())


def one_row(grid: CodeGrid, i: int) -> CodeGrid:
    row = slice(i, i + 1)
    return CodeGrid(grid.levels, grid.scale[row], grid.zero[row], grid.offset[row], grid.length)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [np.arange(-2.0, 2.0), np.array([-1.0, -0.25, 1.0])])
def test_tiny_problems_against_all_codes(seed: int, levels: F64) -> None:
    """Never below the optimum, in all well below the nearest, and no single code can be better."""
    x, before, grid, factors = taken(problem(seed, 24, 5, levels * 2, length=3))
    found, *_ = compensation.compensate(x, before, grid, factors, 50)
    mine, plain = cost(found, x, grid, factors.gram), cost(before, x, grid, factors.gram)
    best = [every_code(row, one_row(grid, i), factors.gram) for i, row in enumerate(x)]
    assert (mine >= np.array(best) - 1e-12).all()
    assert mine.sum() <= plain.sum()
    assert mine.sum() <= sum(best) + 0.35 * (plain.sum() - sum(best)) + 1e-12
    for j, k in itertools.product(range(5), range(len(levels))):
        other = found.copy()
        other[:, j] = k
        assert (cost(other, x, grid, factors.gram) >= mine - 1e-12).all()


def test_where_channels_have_nothing_to_do_with_each_other_the_nearest_is_the_optimum() -> None:
    """That is provable; descent from codes that are all wrong gets there in one pass."""
    x, grid, gram = problem(7, 20, 6, np.arange(-2.0, 2.0))
    x, before, grid, factors = taken((x, grid, np.diag(gram.diagonal())))
    found, *_ = compensation.compensate(x, before, grid, factors, 4)
    assert np.array_equal(found, before)
    codes = np.zeros_like(before)
    values = compensation.values_of(codes, grid)
    compensation.descend(x, codes, values, grid, factors.gram, 1)
    assert np.array_equal(codes, before)


@pytest.mark.parametrize("levels", LEVELS)
def test_descent_lowers_the_cost_and_binary32_is_enough(levels: str) -> None:
    p = problem(9, 60, 130, LEVELS[levels])
    x, before, grid, factors = taken(p)
    swept, done = (
        cost(compensation.compensate(x, before, grid, factors, n)[0], x, grid, factors.gram)
        for n in (0, PASSES)
    )
    assert (done <= swept + 1e-9).all()
    assert done.sum() < 0.95 * swept.sum()
    assert swept.sum() < 0.6 * cost(before, x, grid, factors.gram).sum()
    found, scale, _ = kernels.compensate(*taken(p, np.float32), PASSES)
    assert found.dtype == np.uint8
    assert np.array_equal(scale, grid.scale.astype(np.float32))
    assert cost(found, x, grid, factors.gram).sum() == pytest.approx(done.sum(), rel=0.01)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_scale_is_the_best_of_its_codes_or_stays(dtype: str) -> None:
    """Of one group, the only one: against scales close by."""
    x, before, grid, factors = taken(problem(21, 40, 24, LEVELS["integers"], length=24))
    grid.offset[:] = 0
    found, scale, _ = compensation.compensate(x, before, grid, factors, 1, dtype)
    swept, *_ = compensation.compensate(x, before, grid, factors, 1)
    assert np.array_equal(found, swept)  # scales are chosen behind the codes of the pass
    assert (scale != grid.scale).mean() > 0.5
    assert np.array_equal(scale[scale != grid.scale], stored(scale, dtype)[scale != grid.scale])
    changed = cost(found, x, replace(grid, scale=scale), factors.gram)
    for factor in (1, 0.99, 1.01, 0.999, 1.001):
        beside = grid.scale if factor == 1 else scale * factor
        assert (changed <= 1.01 * cost(found, x, replace(grid, scale=beside), factors.gram)).all()


def stored(scale: Any, dtype: str) -> Any:
    return scale.astype(arithmetic.SCALE_NUMPY[dtype]).astype(scale.dtype)


def test_other_scales_lower_the_cost_of_few_levels() -> None:
    p = problem(23, 60, 96, np.arange(-2.0, 2.0))
    x, before, grid, factors = taken(p)
    grid.offset[:] = 0
    costs = []
    for dtype in (None, "F16"):
        found, scale, _ = compensation.compensate(x, before, grid, factors, PASSES, dtype)
        costs.append(cost(found, x, replace(grid, scale=scale), factors.gram).sum())
    assert costs[1] < 0.95 * costs[0]


def test_groups_of_scale_0_keep_their_codes() -> None:
    x, before, grid, factors = taken(problem(11, 30, 48, LEVELS["table"]), np.float32)
    grid.scale[3:9, 1] = 0
    before[:] = 5
    found, scale, _ = kernels.compensate(x, before, grid, factors, PASSES, "F16")
    flat = np.zeros(x.shape, bool)
    flat[3:9, 16:32] = True
    assert (found[flat] == 5).all()
    assert (scale[3:9, 1] == 0).all()
    assert (found[~flat] != 5).any()


@pytest.mark.parametrize(
    ("gram", "why"),
    [
        (np.full((3, 3), np.nan), "NaN or Inf"),
        (np.diag([1.0, np.inf, 1.0]), "NaN or Inf"),
        (np.zeros((3, 3)), "no input"),
        (np.array([[1.0, 5.0], [5.0, 1.0]]), "not positive definite"),
    ],
)
def test_impossible_matrices(gram: F64, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        prepared(gram)


def test_a_singular_matrix_is_damped() -> None:
    """Two rows of input for six channels, one of which never sees anything."""
    inputs = correlated(15, 6, rows=2)
    inputs[:, 4] = 0
    factors = prepared(inputs.T @ inputs)
    assert factors.order[-1] == 4
    assert np.isfinite(factors.feedback).all()


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODE_LAYOUTS)
def test_codes_are_written_where_gguf_py_reads_them(name: str) -> None:
    kind, layout = GGML_BLOCKS[name], CODE_LAYOUTS[name]
    rng = np.random.default_rng(17)
    data = ggml_encode(name, rng.standard_normal((20, kind.block)).astype(np.float32))
    parts = kind.splitter(data)
    assert np.array_equal(layout.written(data, layout.places(parts.codes)), data)
    places = rng.integers(0, len(layout.levels), parts.codes.shape).astype(np.uint8)
    other = layout.written(data, places)
    theirs = gguf.quants.dequantize(other.reshape(1, -1), gguf.GGMLQuantizationType[name])
    scale, offset = (
        0 if a is None else np.repeat(a, kind.group, axis=1) for a in (parts.scale, parts.offset)
    )
    wanted = layout.levels[places] * scale + offset
    assert np.allclose(theirs.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)


SCHEMES = ("q4_block64", "q3_block32_sym", "q8_channel_sym", "q5_tensor_asym", "nf4_block64")
SCHEMES += (
    "fp4_block128_dq",
    "q8_block32_asym",
    "q2_block16",
    "c4_block16",
    "c4s_block16",
    "c2z_block16",
    "c5_block16",
    "c6_block32",
    "c2_block32",
)


def written(
    where: Path, tensors: dict[str, Any], inputs: dict[str, Any], scheme: str, **options: Any
) -> tuple[qconvert.QuantizeReport, Path]:
    """A model converted with a calibration of these inputs, Gram matrices included."""
    model = save(where / "m.safetensors", tensors)
    calibration = where / "c.safetensors"
    if not calibration.exists():
        acts = save(where / "a.safetensors", inputs)
        qconvert.calibrate(model, output=calibration, activations=acts, gram=True)
    suffix = ".gguf" if options.get("raw") else ".qblk"
    output = where / f"m{suffix}"
    options = {"calibration": calibration, **options}
    return qconvert.quantize(model, scheme, output=output, force=True, **options), output


def decoded(path: Path) -> dict[str, Any]:
    with closing(open_model(path)) as model:
        return {t.name: model.values(t, 0, t.size).reshape(t.shape) for t in model.tensors}


def model_of(seed: int, *shapes: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and inputs by layer."""
    rng = np.random.default_rng(seed)
    names = "abcdef"[: len(shapes)]
    tensors = {
        f"{n}.weight": rng.standard_normal(s).astype(np.float32) * 0.05
        for n, s in zip(names, shapes, strict=True)
    }
    inputs = {
        n: correlated(i, s[1]).astype(np.float32)
        for i, (n, s) in enumerate(zip(names, shapes, strict=True))
    }
    return tensors, inputs


def output_error(path: Path, tensors: dict[str, Any], inputs: dict[str, Any]) -> float:
    """Of all products with the inputs that were calibrated on, relative."""
    values = decoded(path)
    lost = total = 0.0
    for name, x in inputs.items():
        truth = x.astype(np.float64) @ tensors[f"{name}.weight"].T
        lost += ((truth - x.astype(np.float64) @ values[f"{name}.weight"].T) ** 2).sum()
        total += (truth**2).sum()
    return float(lost / total)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_calibration_with_gram_matrices_rounds_for_the_output(
    scheme: str, tmp_path: Path
) -> None:
    """By default; rows that no block and no group of 32 divides; the file verifies, and says so."""
    tensors, inputs = model_of(1, (90, 130), (40, 64))
    plain, path = written(tmp_path, tensors, inputs, scheme, rounding="nearest")
    before = output_error(path, tensors, inputs)
    assert {t.rounding for t in plain.tensors} == {"nearest"}
    report, path = written(tmp_path, tensors, inputs, scheme)
    assert output_error(path, tensors, inputs) < 0.75 * before
    for t in report.tensors:
        assert (t.rounding, t.decision["rounding"]) == (COMPENSATED, COMPENSATED)
        assert t.decision["damping"] == 0.01
        assert "Gram" in t.rounding_reason
    assert any("2 tensors are rounded so that codes" in note for note in report.notes)
    found = qconvert.verify(path, against=tmp_path / "m.safetensors")
    assert found.status == "pass"
    assert {c.id: c.status for c in found.checks}["error-bound"] == "skip"
    assert read_independently(path).code == 0
    described = Qblk(path).header["provenance"]
    assert described["rounding"] == {"compensated": [*tensors], "damping": 0.01}
    assert len(described["calibration"]["sha256"]) == 64


GGML = tuple(name.lower() for name in CODE_LAYOUTS)


@pytest.mark.parametrize("scheme", GGML)
def test_gguf_takes_a_calibration(scheme: str, tmp_path: Path) -> None:
    tensors, inputs = model_of(2, (40, 256))
    _, path = written(tmp_path, tensors, inputs, scheme, raw=True, rounding="nearest")
    before, stored = output_error(path, tensors, inputs), path.stat().st_size
    report, path = written(tmp_path, tensors, inputs, scheme, raw=True)
    after = output_error(path, tensors, inputs)
    assert after < (0.95 if scheme == "q8_0" else 0.8) * before
    assert report.tensors[0].rounding == COMPENSATED
    assert path.stat().st_size - stored < 200  # what provenance says more
    theirs = gguf.GGUFReader(path).tensors[0]
    values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    assert np.allclose(values, decoded(path)["a.weight"], rtol=1e-5, atol=1e-7)
    found = qconvert.verify(path, against=tmp_path / "m.safetensors")
    assert found.status == "pass"
    bound = next(c for c in found.checks if c.id == "error-bound")
    assert bound.status == "skip"
    assert "no tensor has codes that were rounded to the nearest" in bound.detail


def test_all_files_of_a_set_know_how_they_were_rounded(tmp_path: Path) -> None:
    tensors, inputs = model_of(4, (64, 256), (64, 256), (64, 256))
    written(tmp_path, tensors, inputs, "q4_k", raw=True, shard_size="12K")
    first = sorted(tmp_path.glob("m-*.gguf"))[0]
    assert len(list(tmp_path.glob("m-*.gguf"))) > 1
    found = qconvert.verify(first, against=tmp_path / "m.safetensors")
    assert {c.id: c.status for c in found.checks}["error-bound"] == "skip"


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 9000, '{"rounding": 3}', "nan", '{"rounding": {}}']
)
def test_provenance_of_others_says_nothing_of_rounding(text: str) -> None:
    from qconvert.files.provenance import compensated_tensors

    assert compensated_tensors(text) == frozenset()


@pytest.mark.parametrize("scheme", ["q4_channel_asym", "nf4_block32_dq", "q5_tensor_sym"])
def test_the_identity_gives_the_nearest(scheme: str, tmp_path: Path) -> None:
    """Where scales do not change with the codes."""
    tensors, _ = model_of(5, (70, 96))
    inputs = {"a": np.sqrt(np.float32(96)) * np.eye(96, dtype=np.float32)}
    options: dict[str, Any] = {"no_weighting": True}
    written(tmp_path, tensors, inputs, scheme, rounding="nearest", **options)
    plain = decoded(tmp_path / "m.qblk")
    report, path = written(tmp_path, tensors, inputs, scheme, rounding=COMPENSATED, **options)
    assert report.tensors[0].rounding == COMPENSATED
    assert np.array_equal(decoded(path)["a.weight"], plain["a.weight"])


def test_the_bytes_depend_neither_on_kernels_nor_on_threads(tmp_path: Path) -> None:
    tensors, inputs = model_of(6, (300, 200), (33, 256), (64, 70))
    for scheme in ("q4_block32", "nf4_block64_dq"):
        found = set()
        for threads in (1, 2, 3):
            _, path = written(tmp_path, tensors, inputs, scheme, threads=threads)
            found.add(path.read_bytes())
        with kernels.running("reference"):
            _, path = written(tmp_path, tensors, inputs, scheme, threads=2)
            found.add(path.read_bytes())
        assert len(found) == 1


def test_tiles_are_whole_rows_of_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconvert.codecs import codebook
    from qconvert.codecs.affine import encoder

    tensors, inputs = model_of(8, (61, 37), (50, 96))
    for scheme in ("nf4_block64", "q4_block32"):
        _, path = written(tmp_path, tensors, inputs, scheme)
        whole = path.read_bytes()
        for module in (codebook, encoder):
            monkeypatch.setattr(module, "RUN_VALUES", 256)
        _, path = written(tmp_path, tensors, inputs, scheme)
        monkeypatch.undo()
        assert path.read_bytes() == whole


def test_rows_near_the_end_of_the_range_keep_the_nearest_codes() -> None:
    x, before, grid, factors = taken(problem(19, 6, 32, LEVELS["integers"]), np.float32)
    x[2, 3], grid.scale[2] = 2.0**100, 2.0**98
    found, other = Rounder(lambda: factors).codes(x, before, grid, "F32")
    assert np.array_equal(found[2], before[2])
    assert (other.scale[2] == 2.0**98).all()
    assert not np.array_equal(found[0], before[0])


# --- reports and refusals -------------------------------------------------------------------------


def test_the_report_says_why_tensors_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    tensors, inputs = model_of(10, (40, 64), (40, 64), (40, 64))
    tensors["stack"] = np.stack([tensors["a.weight"]] * 2)
    tensors["other.weight"] = tensors["a.weight"]
    tensors["norm"] = np.ones(64, np.float32)
    inputs["b"] = np.zeros_like(inputs["b"])
    report, _ = written(tmp_path, tensors, inputs, "q4_block64", tensor_scheme="c.*=bf16")
    why = {t.name: (t.rounding, t.rounding_reason) for t in report.tensors}
    assert why["a.weight"][0] == COMPENSATED
    assert why["b.weight"] == ("nearest", "all of its inputs were 0")
    assert why["c.weight"] == why["norm"] == (None, None)
    assert why["other.weight"] == ("nearest", "the calibration has no layer of it")
    assert why["stack"] == ("nearest", "it is no matrix, but several of them")
    text = "\n".join(report.notes)
    for reason in ("all of its inputs were 0", "several of them", "no layer of it"):
        assert reason in text
    found = qconvert.verify(tmp_path / "m.qblk", against=tmp_path / "m.safetensors")
    bound = next(c for c in found.checks if c.id == "error-bound")
    assert bound.status == "pass"
    assert "without 1 tensor" in bound.detail


def test_without_gram_matrices_nothing_has_changed(tmp_path: Path) -> None:
    tensors, inputs = model_of(11, (40, 64))
    model = save(tmp_path / "m.safetensors", tensors)
    acts = save(tmp_path / "a.safetensors", inputs)
    qconvert.calibrate(model, output=tmp_path / "c.safetensors", activations=acts)
    report, path = written(tmp_path, tensors, inputs, "q4_block64")
    assert report.tensors[0].rounding == "nearest"
    assert "calibrate --gram" in report.tensors[0].rounding_reason
    assert b'"rounding"' not in path.read_bytes()
    with pytest.raises(UsageError, match="no tensor can be rounded so") as e:
        written(tmp_path, tensors, inputs, "q4_block64", rounding=COMPENSATED)
    assert "--gram" in str(e.value.hint)
    with pytest.raises(UsageError, match="--rounding"):
        written(tmp_path, tensors, inputs, "q4_block64", rounding="stochastic")
    with pytest.raises(UsageError, match="no tensor can be rounded so"):
        qconvert.quantize(model, "q4_block64", output=path, rounding=COMPENSATED, force=True)


def test_weights_stored_input_first_are_not_compensated(tmp_path: Path) -> None:
    weight = np.random.default_rng(12).standard_normal((64, 64)).astype(np.float32)
    squares = correlated(1, 64)
    layer = LayerCalibration(400, 64, StaticRange(-1.0, 1.0, 0.01, 0), transposed=True)
    forged(tmp_path / "c.safetensors", layer, squares.T @ squares)
    report, _ = written(tmp_path, {"a.weight": weight}, {}, "q4_block64")
    assert "stored (in, out)" in report.tensors[0].rounding_reason


def forged(path: Path, layer: LayerCalibration, gram: F64) -> None:
    """A calibration of one layer ``a`` with this Gram matrix, to a quarter."""
    n = layer.features
    high = np.rint(gram * 4).astype(np.int64)[np.triu_indices(n)]
    arrays = {f"a/{kind}": np.ones(n, np.float32) for kind in ("minimum", "maximum", "mean_square")}
    arrays |= {"a/gram.high": high, "a/gram.low": np.zeros_like(high)}
    document = CalibrationDocument("minmax", {"symmetric": False}, [], {"a": layer})
    path.write_bytes(b"".join(calibration_parts(document, arrays)))


def test_a_matrix_that_is_no_gram_matrix_is_refused_by_layer(tmp_path: Path) -> None:
    tensors, _ = model_of(13, (40, 64))
    layer = LayerCalibration(400, 64, StaticRange(-1.0, 1.0, 0.01, 0))
    forged(tmp_path / "c.safetensors", layer, np.full((64, 64), 9.0) - 8 * np.eye(64))
    with pytest.raises(InputError, match="Gram matrix of a layer") as e:
        written(tmp_path, tensors, {}, "q4_block64")
    assert (e.value.tensor, e.value.code) == ("a", "CALIBRATION-GRAM")
    assert "positive definite" in str(e.value.found)
    assert not list(tmp_path.glob("m.qblk*"))


def test_nan_is_refused_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of ours can hold one; other factors may."""
    tensors, inputs = model_of(14, (40, 64))
    monkeypatch.setattr(rounding, "input_factor", lambda c, layer: np.full((64, 64), np.nan))
    with pytest.raises(InputError, match="Gram matrix of a layer") as e:
        written(tmp_path, tensors, inputs, "q4_block64")
    assert (e.value.tensor, e.value.found) == ("a", "NaN or Inf")


def test_fewer_rows_than_channels_is_a_warning(tmp_path: Path) -> None:
    tensors, inputs = model_of(15, (40, 64))
    report, _ = written(tmp_path, tensors, {"a": inputs["a"][:50]}, "q4_block64")
    assert any("50 rows of input for 64 channels" in w for w in report.warnings)


@pytest.mark.parametrize("suffix", ["qblk", "gguf"])
def test_a_calibration_of_another_model_is_refused(suffix: str, tmp_path: Path) -> None:
    tensors, inputs = model_of(16, (40, 64))
    written(tmp_path, tensors, inputs, "q4_block64")
    tensors["a.weight"] = tensors["a.weight"] + 1
    raw = {"raw": True} if suffix == "gguf" else {}
    with pytest.raises(InputError, match="another model"):
        written(tmp_path, tensors, inputs, "q4_0" if raw else "q4_block64", **raw)


def test_factors_of_few_layers_are_kept_and_each_is_prepared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = rounding.input_factor

    def counted(calibration: Calibration, layer: str) -> Any:
        asked.append(layer)
        return real(calibration, layer)

    monkeypatch.setattr(rounding, "input_factor", counted)
    tensors, inputs = model_of(17, *[(300, 64)] * 5)
    written(tmp_path, tensors, inputs, "q4_block64", threads=1)
    assert asked == [*inputs]


def test_tensors_without_factors_are_named_where_they_were_asked_for(tmp_path: Path) -> None:
    tensors, inputs = model_of(19, (40, 64))
    tensors["other.weight"] = gaussian(20, 32, 64)
    report, _ = written(tmp_path, tensors, inputs, "q4_block64")
    assert not any("no factors" in w for w in report.warnings)
    report, _ = written(tmp_path, tensors, inputs, "q4_block64", rounding=COMPENSATED)
    assert [w for w in report.warnings if "1 tensors are rounded to the nearest" in w]
    assert any("'other.weight'" in w for w in report.warnings)


def test_the_command_line(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors, inputs = model_of(18, (40, 64))
    written(tmp_path, tensors, inputs, "q4_block64")
    line = ("quantize", "m.safetensors", "--scheme", "q4_block64", "--calibration", "c.safetensors")
    told = call(*line, "-o", "n.qblk", "--rounding", "nearest", "--json")
    assert json.loads(told.out)["tensors"][0]["rounding_reason"] == "--rounding nearest"
    told = call(*line, "-o", "o.qblk")
    assert "rounding   1 tensor compensated, 0 tensors to the nearest" in told.out
    assert (tmp_path / "o.qblk").read_bytes() == (tmp_path / "m.qblk").read_bytes()
    assert call(*line, "--rounding", "up").code == 2
