"""Scales and offsets of groups that are whole multiples of a unit, chosen for compensated codes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from qconvert.codecs.compensation import PASSES, prepared
from qconvert.kernels.records import CodeGrid, Factors, Multiples
from qconvert.kernels.reference import compensation
from qconvert.kernels.reference.ggml import GGML_BLOCKS, ggml_encode
from qconvert.kernels.reference.ggml.scales import HALF_SCALES, STEPS, with_half

F64 = NDArray[np.float64]


def problem(seed: int, columns: int, length: int) -> tuple[F64, Any, CodeGrid, Factors]:
    """Weights, codes, a grid whose scales and offsets are multiples, and factors."""
    rng = np.random.default_rng(seed)
    shape = (50, -(-columns // length))
    units = rng.uniform(0.02, 0.06, (2, *shape))
    units[:, 0, 0] = 0
    scales, offsets = Multiples(units[0], -8, 7), Multiples(-units[1], 0, 15)
    scale = units[0] * rng.integers(3, 8, shape) * rng.choice([-1, 1], shape)
    offset = -units[1] * rng.integers(0, 16, shape)
    grid = CodeGrid(
        *(np.arange(-2.0, 2.0), scale, np.zeros(shape), offset, length),
        scales=scales,
        offsets=offsets,
    )
    inputs = rng.standard_normal((400, columns)) @ rng.uniform(-1, 1, (columns, columns))
    x = rng.standard_normal((50, columns)) * 0.3
    codes = rng.integers(0, 4, x.shape).astype(np.uint8)
    return x, codes, grid, prepared(inputs.T @ inputs, dtype=np.float64)


def cost(codes: Any, x: Any, grid: CodeGrid, gram: Any) -> F64:
    """e H eᵀ of each row."""
    e = compensation.values_of(codes, grid) - x
    found: F64 = np.einsum("ij,jk,ik->i", e, gram, e)
    return found


def test_scales_and_offsets_are_multiples_and_lower_the_cost() -> None:
    x, codes, grid, factors = problem(1, 96, 16)
    assert grid.scales
    assert grid.offsets
    stay = replace(grid, scales=None, offsets=None)
    costs = []
    for given in (stay, replace(stay, scales=grid.scales), grid):
        found, scale, offset = compensation.compensate(x, codes, given, factors, PASSES)
        chosen = replace(grid, scale=scale, offset=offset)
        costs.append(cost(found, x, chosen, factors.gram).sum())
        for numbers, of in ((scale, grid.scales), (offset, grid.offsets)):
            steps = numbers / np.where(of.unit != 0, of.unit, 1)
            assert np.allclose(steps, np.rint(steps), atol=1e-9)
            assert (np.rint(steps) >= of.low).all()
            assert (np.rint(steps) <= of.high).all()
        assert (scale[0, 0], offset[0, 0]) == (0, 0)  # of no unit
        assert ((scale > 0) == (grid.scale > 0)).all()
    assert costs[1] < 0.95 * costs[0]
    assert costs[2] < 0.95 * costs[1]


def test_of_one_group_no_other_multiple_is_better() -> None:
    """All of them are tried: scales with the offset before, then offsets."""
    x, codes, grid, factors = problem(2, 20, 20)
    assert grid.scales
    assert grid.offsets
    found, scale, offset = compensation.compensate(x, codes, grid, factors, 1)
    rows = slice(1, None)  # the first has no unit
    rescaled = replace(grid, scale=scale)
    best = cost(found, x, rescaled, factors.gram)[rows]
    shifted = cost(found, x, replace(rescaled, offset=offset), factors.gram)[rows]
    for step in range(-8, 8):
        other = grid.scales.unit * step
        sound = (other[rows, 0] != 0) & ((other[rows, 0] > 0) == (grid.scale[rows, 0] > 0))
        tried = cost(found, x, replace(grid, scale=other), factors.gram)[rows]
        assert (tried >= best - 1e-9)[sound].all()
    for step in range(16):
        tried = cost(found, x, replace(rescaled, offset=grid.offsets.unit * step), factors.gram)
        assert (tried[rows] >= shifted - 1e-9).all()
    assert (scale != grid.scale).mean() > 0.5
    assert (offset != grid.offset).mean() > 0.5


@pytest.mark.parametrize("name", [*STEPS, *HALF_SCALES])
def test_numbers_are_written_where_gguf_py_reads_them(name: str) -> None:
    kind, steps = GGML_BLOCKS[name], STEPS.get(name)
    rng = np.random.default_rng(17)
    data = ggml_encode(name, rng.standard_normal((20, kind.block)).astype(np.float32))
    parts, units = kind.splitter(data), kind.scales(data)
    offset = parts.offset
    if steps is None:
        scale = rng.uniform(-2, 2, parts.scale.shape).astype(np.float16).astype(np.float32)
        other = with_half(data, scale)
    else:
        low, high = steps.scales
        chosen = rng.integers(low, high + 1, parts.scale.shape).astype(np.float32)
        scale, minima = units[:, :1] * chosen, None
        if steps.minima:
            minima = rng.integers(0, steps.minima + 1, parts.scale.shape).astype(np.float32)
            offset = -units[:, 1:] * minima
        other = steps.written(data, chosen, minima)
        same = steps.written(
            data,
            np.rint(parts.scale / units[:, :1]),
            None if parts.offset is None else np.rint(-parts.offset / units[:, 1:]),
        )
        assert np.array_equal(same, data)
    theirs = gguf.quants.dequantize(other.reshape(1, -1), gguf.GGMLQuantizationType[name])
    wide = [np.repeat(a, kind.group, axis=1) for a in (scale, offset) if a is not None]
    wanted = parts.codes * wide[0] + (wide[1] if len(wide) > 1 else 0)
    assert np.allclose(theirs.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-6)
