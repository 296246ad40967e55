"""Codes of rows that make up for the errors of other rows, and tables by what their rows are for.

Held against the cost of the whole matrix, every code of which is tried; calibrations are forged
from inputs and gradients, so that their second moments are known.
"""

from __future__ import annotations

import threading
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from conftest import Qblk, read_independently, save
from numpy.typing import NDArray

import qconvert
from qconvert import kernels
from qconvert.architectures import open_gguf_source
from qconvert.calibration.document import CalibrationDocument, FisherRun, LayerCalibration
from qconvert.calibration.file import calibration_parts
from qconvert.calibration.fisher import LOOKUP, PRODUCT, FisherStatistics
from qconvert.calibration.gram import GramMatrix
from qconvert.calibration.grid import StaticRange
from qconvert.codecs.compensation import COMPENSATED, Rounder, prepared, shares_of
from qconvert.files import open_model
from qconvert.kernels.records import CodeGrid
from qconvert.kernels.reference import compensation
from qconvert.stages import rounding
from qconvert.stages.made_from import made_from
from qconvert.stages.rounding import Rounding, Roundings

F64 = NDArray[np.float64]
TOKENS = 300


def correlated(seed: int, count: int, width: int) -> F64:
    """Rows whose channels have something to do with each other."""
    rng = np.random.default_rng(seed)
    mixed = np.eye(width) + rng.standard_normal((width, width)) / np.sqrt(width)
    found: F64 = rng.standard_normal((count, width)) @ mixed
    return found


def moments(seed: int, width: int) -> F64:
    """A matrix of second moments with a mean diagonal of 1, damped."""
    x = correlated(seed, 2 * width + 8, width)
    gram: F64 = x.T @ x
    return gram / np.trace(gram) * width + 0.1 * np.eye(width)


def problem(
    seed: int, rows: int, columns: int, levels: F64, length: int
) -> tuple[F64, NDArray[np.uint8], CodeGrid]:
    """Weights, the codes nearest to them, and their grid."""
    rng = np.random.default_rng(seed)
    shape = (rows, -(-columns // length))
    numbers = (
        rng.uniform(0.15, 0.4, shape) * rng.choice([-1.0, 1.0], shape),
        *(rng.uniform(-limit, limit, shape) for limit in (1, 0.2)),
    )
    grid = CodeGrid(levels, *numbers, length)
    x = rng.standard_normal((rows, columns))
    group = np.arange(columns) // length
    scale, zero, offset = (n[:, group, None] for n in numbers)
    codes = np.abs((levels - zero) * scale + offset - x[..., None]).argmin(axis=2)
    return x, codes.astype(np.uint8), grid


def whole(codes: Any, x: Any, grid: CodeGrid, gram: Any, output: Any) -> float:
    """Σ O_ik e_i H e_kᵀ, in binary64."""
    e = compensation.values_of(codes, grid).astype(np.float64) - x
    return float(np.einsum("ik,ij,jl,kl->", output, e, gram, e, optimize=True))


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [np.arange(-2.0, 2.0), np.array([-3.0, -1.1, 0.2, 2.5])])
@pytest.mark.parametrize("rows", [7, 131])
def test_each_code_becomes_the_best_of_all_while_others_stay(levels: F64, rows: int) -> None:
    """By trying all codes of each weight, 128 rows at a time and down the columns."""
    x, codes, grid = problem(rows, rows, 3, levels, length=2)
    gram, output = moments(1, 3), moments(2, rows)
    found = compensation.sweep_rows(x, codes, grid, gram, shares_of(output, 0, np.float64), 1)
    wanted = codes.copy()
    for first in range(0, rows, 128):
        for j in range(3):
            for i in range(first, min(first + 128, rows)):
                e = compensation.values_of(wanted, grid) - x
                scale, zero, offset = (n[i, j // 2] for n in (grid.scale, grid.zero, grid.offset))
                moved = (levels - zero) * scale + offset - x[i, j] - e[i, j]
                slope = output[i] @ e @ gram[j]
                cost = moved * (2 * slope + moved * output[i, i] * gram[j, j])
                wanted[i, j] = cost.argmin()
    assert np.array_equal(found, wanted)
    assert (found != codes).any()


def test_sweeps_lower_the_cost_of_the_whole_until_no_code_can() -> None:
    x, codes, grid = problem(13, 12, 40, np.arange(-8.0, 8.0), length=16)
    gram, output = moments(14, 40), moments(15, 12)
    factors = prepared(gram, 0, np.float64)
    first, *_ = compensation.compensate(x, codes, grid, factors, 50)
    costs, codes = [whole(first, x, grid, gram, output)], first
    shares = shares_of(output, 0, np.float64)
    while len(costs) < 3 or costs[-1] < costs[-2]:
        codes = compensation.sweep_rows(x, codes, grid, factors.gram, shares, 1)
        costs.append(whole(codes, x, grid, gram, output))
    assert costs[1] < 0.9 * costs[0]
    assert all(b <= a + 1e-9 for a, b in pairwise(costs))
    for place in np.ndindex(*codes.shape):
        for other in {max(int(codes[place]) - 1, 0), min(int(codes[place]) + 1, 15)}:
            changed = codes.copy()
            changed[place] = other
            assert whole(changed, x, grid, gram, output) >= costs[-1] - 1e-9
    at_once = compensation.sweep_rows(x, first, grid, factors.gram, shares, 50)
    assert np.array_equal(at_once, codes)


def test_rows_that_have_nothing_to_do_with_each_other_stay() -> None:
    x, codes, grid = problem(3, 10, 30, np.arange(-8.0, 8.0), length=16)
    factors = prepared(moments(4, 30), dtype=np.float64)
    first, *_ = compensation.compensate(x, codes, grid, factors, 50)
    for output in (np.diag(np.arange(1.0, 11.0)), np.zeros((10, 10))):
        shares = shares_of(output, dtype=np.float64)
        assert np.array_equal(
            compensation.sweep_rows(x, first, grid, factors.gram, shares, 50), first
        )


def test_shares_are_of_the_damped_matrix() -> None:
    output = np.array([[3.0, 1.0], [1.0, 1.0]])
    wanted = np.array([[1.0, 1 / 3.2], [1 / 1.2, 1.0]])
    assert np.allclose(shares_of(output.copy(), dtype=np.float64), wanted, rtol=1e-12)
    for wrong in (np.diag([1.0, np.nan]), np.diag([1.0, -1.0])):
        with pytest.raises(ValueError, match="NaN or Inf"):
            shares_of(wrong)


def test_binary32_is_enough() -> None:
    x, codes, grid = problem(5, 200, 90, np.arange(-8.0, 8.0), length=32)
    gram, output = moments(6, 90), moments(7, 200)
    narrow = CodeGrid(
        *(a.astype(np.float32) for a in (grid.levels, grid.scale, grid.zero, grid.offset)), 32
    )
    args = gram.astype(np.float32), shares_of(output, 0), 1
    found = kernels.sweep_rows(x.astype(np.float32), codes, narrow, *args)
    wide = compensation.sweep_rows(x, codes, grid, gram, shares_of(output, 0, np.float64), 1)
    cost = whole(wide, x, grid, gram, output)
    assert cost < 0.5 * whole(codes, x, grid, gram, output)
    assert whole(found, x, grid, gram, output) == pytest.approx(cost, rel=0.01)


def test_rows_near_the_end_of_the_range_keep_their_codes_and_move_no_others() -> None:
    x, codes, grid = problem(8, 20, 32, np.arange(-8.0, 8.0), length=32)
    numbers = (grid.levels, grid.scale, grid.zero, grid.offset)
    grid = CodeGrid(*(a.astype(np.float32) for a in numbers), 32)
    narrow, gram, shares = x.astype(np.float32), moments(9, 32), shares_of(moments(10, 20))
    narrow[2, 3], grid.scale[2] = 2.0**80, 2.0**76
    rounder = Rounder(lambda: prepared(gram), shares=lambda: shares)
    found, _ = rounder.codes(narrow, codes, grid)
    alone, _ = Rounder(lambda: prepared(gram)).codes(narrow, codes, grid)
    assert np.array_equal(found[2], alone[2])
    others = np.delete(np.arange(20), 2)
    shares = shares[np.ix_(others, others)]
    of_others = (n[others] for n in (grid.scale, grid.zero, grid.offset))
    without, _ = rounder.codes(narrow[others], codes[others], CodeGrid(grid.levels, *of_others, 32))
    assert np.array_equal(found[others], without)


# --- files ----------------------------------------------------------------------------------------

Use = tuple[str, F64, F64]  # of a matrix, with inputs or rows that are looked up, and gradients
SCHEMES = ("q4_block64", "q3_block32_sym", "q8_channel_sym", "q5_tensor_asym", "nf4_block64")
SCHEMES += ("fp4_block128_dq", "c4_block16")


def forged(path: Path, rows: dict[str, int], uses: dict[str, list[Use]]) -> Path:
    """A calibration of matrices in their uses, Gram matrices and Fisher information included."""
    arrays: dict[str, Any] = {}
    layers, shapes = {}, {}
    for name, of_matrix in uses.items():
        columns = of_matrix[0][2 if of_matrix[0][0] == LOOKUP else 1].shape[1]
        shapes[name] = (rows[name], columns)
        statistics = FisherStatistics(rows[name], columns, grams=True)
        for use, x, g in of_matrix:
            gradients = g.astype(np.float32)
            if use == LOOKUP:
                statistics.of(use).update_lookup(x.astype(np.int64), gradients)
                continue
            inputs = x.astype(np.float32)
            statistics.of(use).update(inputs, gradients)
            gram = GramMatrix(columns)
            gram.update(inputs)
            arrays[f"{name}/gram.high"], arrays[f"{name}/gram.low"] = gram.packed()
            squares = np.mean(inputs**2, axis=0)
            arrays |= {f"{name}/{kind}": squares for kind in ("minimum", "maximum", "mean_square")}
            layers[name] = LayerCalibration(TOKENS, columns, StaticRange(-1.0, 1.0, 0.01, 0))
        arrays |= {f"{name}/{k}": a for k, a in statistics.finished().arrays.items()}
    document = CalibrationDocument(
        *("minmax", {"symmetric": False}, [], layers), fisher=FisherRun(TOKENS, shapes)
    )
    path.write_bytes(b"".join(calibration_parts(document, arrays)))
    return path


def product(seed: int, rows: int, columns: int) -> Use:
    return PRODUCT, correlated(seed, TOKENS, columns), correlated(seed + 1, TOKENS, rows)


def model_of(where: Path, *shapes: tuple[int, int]) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """A model of matrices a, b, ... and their rows."""
    rng = np.random.default_rng(len(shapes))
    names = "abcdef"[: len(shapes)]
    tensors = {
        f"{n}.weight": (rng.standard_normal(s) * 0.05).astype(np.float32)
        for n, s in zip(names, shapes, strict=True)
    }
    rows = {n: s[0] for n, s in zip(names, shapes, strict=True)}
    return save(where / "m.safetensors", tensors), tensors, rows


def converted(
    model: Path, calibration: Path, scheme: str, **options: Any
) -> tuple[qconvert.QuantizeReport, Path]:
    output = model.with_suffix(".gguf" if options.get("raw") else ".qblk")
    given: dict[str, Any] = {"calibration": calibration, "force": True, **options}
    return qconvert.quantize(model, scheme, output=output, **given), output


def decoded(path: Path) -> dict[str, Any]:
    with closing(open_model(path)) as model:
        return {t.name: model.values(t, 0, t.size).reshape(t.shape) for t in model.tensors}


def lost(path: Path, tensors: dict[str, Any], name: str, use: Use) -> float:
    """Σ O_ik e_i H e_kᵀ of a matrix with the factors of its use."""
    _, x, g = use
    weighed = x * np.sqrt((g**2).sum(axis=1))[:, None]
    e = decoded(path)[name].astype(np.float64) - tensors[name]
    return float(np.einsum("ik,ij,jl,kl->", g.T @ g, e, weighed.T @ weighed, e, optimize=True))


def without_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "no_output_factor", lambda calibration, layer: "a test")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_swept_by_default(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that no block and no group of 32 divides; the file verifies, and says what was done."""
    model, tensors, rows = model_of(tmp_path, (150, 130), (40, 64))
    uses = {"a": [product(1, 150, 130)], "b": [product(3, 40, 64)]}
    calibration = forged(tmp_path / "c.safetensors", rows, uses)
    with monkeypatch.context() as m:
        without_sweep(m)
        plain, path = converted(model, calibration, scheme)
        assert "row_damping" not in plain.tensors[0].decision
        assert b"row_damping" not in path.read_bytes()
        before = [lost(path, tensors, f"{n}.weight", uses[n][0]) for n in "ab"]
    report, path = converted(model, calibration, scheme)
    after = [lost(path, tensors, f"{n}.weight", uses[n][0]) for n in "ab"]
    assert all(a < 0.9 * b for a, b in zip(after, before, strict=True))
    for t in report.tensors:
        assert t.decision["rounding"] == COMPENSATED
        assert (t.decision["damping"], t.decision["row_damping"]) == (0.01, 0.1)
    assert any("in 2 of them rows make up for the errors of other rows" in n for n in report.notes)
    assert qconvert.verify(path, against=model).status == "pass"
    assert read_independently(path).code == 0
    described = Qblk(path).header["provenance"]["rounding"]
    names = [*tensors]
    wanted = {"compensated": names, "damping": 0.01, "by_row": [], "row_damping": 0.1}
    assert described == wanted


@pytest.mark.parametrize("scheme", ["q4_0", "iq4_xs", "q2_k", "q5_k"])
def test_gguf_is_swept(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors, rows = model_of(tmp_path, (140, 256))
    uses = {"a": [product(5, 140, 256)]}
    calibration = forged(tmp_path / "c.safetensors", rows, uses)
    with monkeypatch.context() as m:
        without_sweep(m)
        _, path = converted(model, calibration, scheme, raw=True)
        before = lost(path, tensors, "a.weight", uses["a"][0])
    report, path = converted(model, calibration, scheme, raw=True)
    assert lost(path, tensors, "a.weight", uses["a"][0]) < 0.95 * before
    assert report.tensors[0].decision["row_damping"] == 0.1
    theirs = gguf.GGUFReader(path).tensors[0]
    values = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
    assert np.allclose(values, decoded(path)["a.weight"], rtol=1e-5, atol=1e-7)
    assert qconvert.verify(path, against=model).status == "pass"


def test_a_table_is_rounded_by_what_is_looked_up(tmp_path: Path) -> None:
    """E[g gᵀ] of its output is what an error of a row costs."""
    model, tensors, rows = model_of(tmp_path, (60, 96), (60, 96))
    ids, gradients = np.arange(TOKENS) % 60, correlated(7, TOKENS, 96)
    tied = [product(8, 60, 96), (LOOKUP, ids, gradients)]
    uses: dict[str, list[Use]] = {"a": [(LOOKUP, ids, gradients)], "b": tied}
    calibration = forged(tmp_path / "c.safetensors", rows, uses)

    def cost(path: Path, name: str, gram: F64) -> float:
        e = decoded(path)[name].astype(np.float64) - tensors[name]
        return float(np.einsum("ij,jk,ik->", e, gram, e))

    _, x, g = tied[0]
    weighed = x * np.sqrt((g**2).sum(axis=1))[:, None]
    grams = {"a.weight": gradients.T @ gradients}
    grams["b.weight"] = grams["a.weight"] + weighed.T @ weighed
    _, path = converted(model, calibration, "q4_block32", rounding="nearest")
    before = {name: cost(path, name, gram) for name, gram in grams.items()}
    report, path = converted(model, calibration, "q4_block32")
    for name, gram in grams.items():
        assert cost(path, name, gram) < 0.7 * before[name]
    rows_of = {t.name: t.rounding_reason for t in report.tensors}
    assert "looked up" in rows_of["a.weight"]
    assert "Gram matrix" in rows_of["b.weight"]
    notes = "\n".join(report.notes)
    assert "its rows are looked up, each by itself\n" in notes + "\n"
    assert "its rows are looked up, each by itself, too" in notes
    assert "row_damping" not in report.tensors[0].decision
    assert report.warnings == []


def test_without_gradients_the_report_says_what_is_missing(tmp_path: Path) -> None:
    model, _, _ = model_of(tmp_path, (40, 64))
    inputs = {"a": correlated(1, TOKENS, 64).astype(np.float32)}
    acts, calibration = save(tmp_path / "a.safetensors", inputs), tmp_path / "c.safetensors"
    qconvert.calibrate(model, output=calibration, activations=acts, gram=True)
    report, _ = converted(model, calibration, "q4_block64")
    assert any("no gradients: calibrate --gram --fisher" in note for note in report.notes)


def test_the_bytes_depend_neither_on_kernels_nor_on_threads(tmp_path: Path) -> None:
    model, _, rows = model_of(tmp_path, (150, 40), (33, 64), (70, 36))
    uses = {"a": [product(1, 150, 40)], "b": [product(3, 33, 64)], "c": [product(5, 70, 36)]}
    calibration = forged(tmp_path / "c.safetensors", rows, uses)
    found = {converted(model, calibration, "q4_block32", threads=n)[1].read_bytes() for n in (1, 3)}
    with kernels.running("reference"):
        found.add(converted(model, calibration, "q4_block32")[1].read_bytes())
    assert len(found) == 1


def test_a_matrix_too_large_to_be_whole_is_rounded_by_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, rows = model_of(tmp_path, (150, 130), (40, 64))
    uses = {"a": [product(1, 150, 130)], "b": [product(3, 40, 64)]}
    calibration = forged(tmp_path / "c.safetensors", rows, uses)
    monkeypatch.setattr(rounding, "WHOLE_BYTES", 1 << 19)
    report, path = converted(model, calibration, "q4_block64")
    assert ["row_damping" in t.decision for t in report.tensors] == [False, True]
    assert any("'a.weight': it would take more than" in note for note in report.notes)
    assert Qblk(path).header["provenance"]["rounding"]["by_row"] == ["a.weight"]


def test_gradients_of_another_shape_are_none_of_the_tensor(tmp_path: Path) -> None:
    model, _, rows = model_of(tmp_path, (60, 96), (40, 64))
    table = (LOOKUP, np.arange(TOKENS) % 60, correlated(7, TOKENS, 95))
    uses: dict[str, list[Use]] = {"a": [table], "b": [product(8, 41, 64)]}
    calibration = forged(tmp_path / "c.safetensors", {"a": 60, "b": 41}, uses)
    report, _ = converted(model, calibration, "q4_block32")
    assert rows == {"a": 60, "b": 40}
    notes = "\n".join(report.notes)
    assert "'a.weight': it has 96 columns, and the calibration gradients of 95" in notes
    assert "'b.weight': it has 40 rows, and the calibration gradients of 41" in notes


def test_whole_matrices_wait_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Roundings({name: Rounding(COMPENSATED, "", None, None, 100) for name in "ab"})
    monkeypatch.setattr(rounding, "WHOLE_BYTES", 199)
    entered = threading.Event()

    def second() -> None:
        with found.room("b"):
            entered.set()

    thread = threading.Thread(target=second)
    with found.room("a"):
        thread.start()
        assert not entered.wait(0.2)
        with found.room("c"):
            pass  # what is not whole takes no room
    assert entered.wait(10)
    thread.join()


def test_rows_of_a_gguf_are_found_among_those_of_their_layer(tmp_path: Path) -> None:
    """llama.cpp wants the rows of queries and keys in another order."""
    directory = tiny_models.write_directory(tmp_path / "m", "llama")
    with closing(open_model(directory)) as source:
        stored = {t.name: t for t in source.tensors}
        mapped = open_gguf_source(source).model
        moved = 0
        for tensor in mapped.tensors:
            origin = mapped.origin(tensor.name)
            if origin is None or len(tensor.shape) != 2:
                continue
            located = made_from(mapped, tensor).rows
            t = stored[origin]
            wanted = source.values(t, 0, t.size).reshape(t.shape)
            given = mapped.values(tensor, 0, tensor.size).reshape(tensor.shape)
            assert np.array_equal(given, wanted if located is None else wanted[located])
            moved += located is not None
    assert moved
