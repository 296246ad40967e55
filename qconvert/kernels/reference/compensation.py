"""Codes that make up for each other's errors: formats/schemes/SPEC.md section 12.

Columns are rounded one after the other, each to the level nearest to its weight and to what makes
up for the errors so far: GPTQ (Frantar et al., 2022) as QuIP (Chee et al., 2023, theorem 6) writes
it, without an inverse. Then single codes, and scales, are changed where that lowers the cost.

The arithmetic is that of the arrays given: binary32 is what files are written with, binary64 what
it is held against. Every sum runs over columns in their order, so its bits depend on no blocking.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.arithmetic import SCALE_NUMPY, SWEPT_ROWS
from qconvert.kernels.records import U8, CodeGrid, Factors, Multiples
from qconvert.mapper import Mapper

Floats = NDArray[Any]


def compensate(
    x: Floats,
    codes: U8,
    grid: CodeGrid,
    factors: Factors,
    passes: int,
    scale_dtype: str | None = None,
) -> tuple[U8, Floats, Floats]:
    """Codes (R, C), scales and offsets (R, G) of the least cost that is found.

    Args:
        x: weights, (R, C), of the dtype of grid and factors.
        codes: chosen before; they stay where a scale is 0, and decide about nothing else.
        passes: over all columns at most, in which single codes are changed.
        scale_dtype: of scales that may be changed, for groups of at most 256 columns; None where
            they stay, or are multiples that the grid has.
    """
    codes, grid = codes.copy(), replace(grid, scale=grid.scale.copy(), offset=grid.offset.copy())
    values = np.empty_like(x)
    target = x[:, factors.order]
    for at, j in enumerate(factors.order):
        codes[:, j], values[:, j] = _rounded(target[:, at], codes[:, j], grid, j // grid.length)
        error = x[:, j] - values[:, j]
        target[:, at + 1 :] += error[:, None] * factors.feedback[at, at + 1 :]
    descend(x, codes, values, grid, factors.gram, passes, scale_dtype)
    return codes, grid.scale, grid.offset


def descend(
    x: Floats,
    codes: U8,
    values: Floats,
    grid: CodeGrid,
    gram: Floats,
    passes: int,
    scale_dtype: str | None = None,
) -> None:
    """Change ``codes`` and their ``values`` one at a time, each to the best with all others as they
    are, until no code changes any more or ``passes`` are over; in the first pass scale and offset
    of each group behind its codes.
    """
    refits = scale_dtype is not None or grid.scales is not None or grid.offsets is not None
    slope = np.zeros_like(x)  # half the derivative of the cost
    for j in range(x.shape[1]):
        slope += (values[:, j] - x[:, j])[:, None] * gram[j]
    for done in range(passes):
        before = codes.copy()
        for group in range(grid.scale.shape[1]):
            first = group * grid.length
            columns = range(first, min(first + grid.length, x.shape[1]))
            for j in columns:
                best = values[:, j] - slope[:, j] / gram[j, j]
                codes[:, j], found = _rounded(best, codes[:, j], grid, group)
                slope += (found - values[:, j])[:, None] * gram[j]
                values[:, j] = found
            if done:
                continue
            if scale_dtype or grid.scales:
                _rescale(codes, values, slope, grid, gram, group, columns, scale_dtype)
            if grid.offsets:
                _offset(codes, values, slope, grid, gram, group, columns, grid.offsets)
        if np.array_equal(before, codes) and (done or not refits):
            return


def _rescale(
    codes: U8,
    values: Floats,
    slope: Floats,
    grid: CodeGrid,
    gram: Floats,
    group: int,
    columns: range,
    scale_dtype: str | None,
) -> None:
    """Give a group of each row the scale that is best for its codes, where that lowers the cost."""
    along, across = np.zeros_like(slope[:, 0]), np.zeros_like(slope[:, 0])
    parts = values - grid.offset[:, group][:, None]  # that scales scale
    for j in columns:
        row = np.zeros_like(along)
        for k in columns:
            row += parts[:, k] * gram[j, k]
        along += parts[:, j] * slope[:, j]
        across += parts[:, j] * row
    one, old = along.dtype.type(1), grid.scale[:, group]
    best = old * (one - along / np.where(across > 0, across, one))
    if grid.scales:
        new = _multiple(best, grid.scales, group)
    else:
        assert scale_dtype
        with np.errstate(over="ignore"):
            new = best.astype(SCALE_NUMPY[scale_dtype]).astype(best.dtype)
    change = new / np.where(old != 0, old, one) - one
    kept = (new != 0) & (old != 0) & ((new > 0) == (old > 0)) & np.isfinite(new) & (across > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        kept &= change * (along + along + change * across) < 0
    grid.scale[:, group] = np.where(kept, new, old)
    _revalue(codes, values, slope, grid, gram, group, columns)


def _offset(
    codes: U8,
    values: Floats,
    slope: Floats,
    grid: CodeGrid,
    gram: Floats,
    group: int,
    columns: range,
    offsets: Multiples,
) -> None:
    """The same for the offset of a group."""
    along, across = np.zeros_like(slope[:, 0]), slope.dtype.type(0)
    for j in columns:
        row = along.dtype.type(0)
        for k in columns:
            row += gram[j, k]
        along += slope[:, j]
        across += row
    old = grid.offset[:, group]
    new = _multiple(old - along / (across if across > 0 else along.dtype.type(1)), offsets, group)
    change = new - old
    kept = (change * (along + along + change * across) < 0) & (across > 0)
    grid.offset[:, group] = np.where(kept, new, old)
    _revalue(codes, values, slope, grid, gram, group, columns)


def _multiple(wanted: Floats, of: Multiples, group: int) -> Floats:
    """The multiples nearest to what is wanted; 0 of no unit."""
    unit, one = of.unit[:, group], wanted.dtype.type(1)
    steps = wanted / np.where(unit != 0, unit, one)
    low, high = wanted.dtype.type(of.low), wanted.dtype.type(of.high)
    found: Floats = np.rint(np.clip(steps, low, high)) * unit
    return found


def _revalue(
    codes: U8,
    values: Floats,
    slope: Floats,
    grid: CodeGrid,
    gram: Floats,
    group: int,
    columns: range,
) -> None:
    """The values of a group with its scale and offset as they are now, and the slopes."""
    scale, zero, offset = grid.scale[:, group], grid.zero[:, group], grid.offset[:, group]
    for j in columns:
        found = (grid.levels[codes[:, j]] - zero) * scale + offset
        slope += (found - values[:, j])[:, None] * gram[j]
        values[:, j] = found


def sweep_rows(
    x: Floats,
    codes: U8,
    grid: CodeGrid,
    gram: Floats,
    shares: Floats,
    passes: int,
    mapper: Mapper = map,
) -> U8:
    """Codes of rows that make up for the errors of other rows as well: the cost of errors e is
    Σ O_ik e_i H e_kᵀ over pairs of rows i, k, as in YAQA (Tseng et al., 2025). `SWEPT_ROWS` rows at
    a time, column by column, each code to the best with all others as they are.

    Args:
        codes: as `compensate` left them, and ``grid`` with its scales.
        shares: O_ik / O_ii, (R, R), of a symmetric, damped O.
        passes: over all columns at most, for each run of rows.
        mapper: for kernels that work on several threads.
    """
    codes = codes.copy()
    error = values_of(codes, grid) - x
    for first in range(0, len(x), SWEPT_ROWS):
        run = slice(first, first + SWEPT_ROWS)
        pulled, slope = np.zeros_like(x[run]), np.zeros_like(x[run])
        for k in range(len(x)):
            pulled += shares[run, k][:, None] * error[k]
        for j in range(x.shape[1]):
            slope += pulled[:, j][:, None] * gram[j]
        values = values_of(codes, grid)[run]
        _descend_together(
            codes[run], values, slope, _rows_of(grid, run), gram, shares[run, run], passes
        )
        error[run] = values - x[run]
    return codes


def _descend_together(
    codes: U8,
    values: Floats,
    slope: Floats,
    grid: CodeGrid,
    gram: Floats,
    shares: Floats,
    passes: int,
) -> None:
    """Change ``codes`` and their ``values`` one at a time, down a column and then down the next.

    Args:
        slope: half the derivative of the cost by O_ii, (R, C).
    """
    alone = [_rows_of(grid, slice(i, i + 1)) for i in range(len(codes))]
    for _ in range(passes):
        before = codes.copy()
        for j in range(codes.shape[1]):
            moved = np.zeros_like(slope[:, j])
            for i in range(len(codes)):
                own = slope[i : i + 1, j] + moved[i] * gram[j, j]
                best = values[i : i + 1, j] - own / gram[j, j]
                code, found = _rounded(best, codes[i : i + 1, j], alone[i], j // grid.length)
                moved += (found - values[i, j]) * shares[:, i]
                codes[i, j], values[i, j] = code[0], found[0]
            slope += moved[:, None] * gram[j]
        if np.array_equal(before, codes):
            return


def _rows_of(grid: CodeGrid, rows: slice) -> CodeGrid:
    """The grid of some rows."""
    numbers = grid.scale[rows], grid.zero[rows], grid.offset[rows]
    return CodeGrid(grid.levels, *numbers, grid.length)


def values_of(codes: U8, grid: CodeGrid) -> Floats:
    """What codes (R, C) stand for."""
    group = np.arange(codes.shape[1]) // grid.length
    numbers = grid.levels[codes] - grid.zero[:, group]
    values: Floats = numbers * grid.scale[:, group] + grid.offset[:, group]
    return values


def _rounded(wanted: Floats, codes: U8, grid: CodeGrid, group: int) -> tuple[U8, Floats]:
    """The codes nearest to what is ``wanted`` in a column, (R,), and their values."""
    scale, zero, offset = grid.scale[:, group], grid.zero[:, group], grid.offset[:, group]
    flat = scale == 0
    place = (wanted - offset) / np.where(flat, scale.dtype.type(1), scale) + zero
    found = np.where(flat, codes, nearest_level(place, grid.levels))
    return found, (grid.levels[found] - zero) * scale + offset


def nearest_level(place: Floats, levels: Floats) -> U8:
    """Indices of the nearest levels; between two integers that follow each other the even index,
    between others the lower.
    """
    found: U8
    if evenly(levels):
        top = levels.dtype.type(len(levels) - 1)
        found = np.rint(np.clip(place - levels[0], 0, top)).astype(np.uint8)
    else:
        middles = (levels[:-1] + levels[1:]) / levels.dtype.type(2)
        found = np.searchsorted(middles, place).astype(np.uint8)
    return found


def evenly(levels: Floats) -> bool:
    """Whether levels are integers that follow each other."""
    return bool((np.diff(levels) == 1).all() and levels[0] == np.rint(levels[0]))
