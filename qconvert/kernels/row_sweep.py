"""Rows that make up for each other's errors, with the products of matrices on several threads.

Of the columns of a product each thread has its own, so that sums are the same on any number.
"""

from __future__ import annotations

import numpy as np

from qconvert.kernels import _native
from qconvert.kernels.arithmetic import SWEPT_ROWS
from qconvert.kernels.records import F32, I32, U8, CodeGrid
from qconvert.kernels.reference.compensation import values_of
from qconvert.mapper import Mapper

SWEPT_COLUMNS = 64  # whose codes are changed before other columns hear of it
AT_ONCE = 1024  # columns of a product by one thread at a time


def sweep_rows(
    x: F32,
    codes: U8,
    grid: CodeGrid,
    gram: F32,
    shares: F32,
    passes: int,
    mapper: Mapper = map,
) -> U8:
    """`reference.sweep_rows` of binary32."""
    found = np.array(codes, np.uint8, order="C")
    x, gram, shares, levels, scale, zero, offset = (
        np.ascontiguousarray(a, np.float32)
        for a in (x, gram, shares, grid.levels, grid.scale, grid.zero, grid.offset)
    )
    runs = [slice(first, first + SWEPT_ROWS) for first in range(0, len(x), SWEPT_ROWS)]
    parts = [CodeGrid(levels, scale[r], zero[r], offset[r], grid.length) for r in runs]
    errors = np.empty_like(x)
    for run, part in zip(runs, parts, strict=True):
        errors[run] = values_of(found[run], part) - x[run]
    for run, part in zip(runs, parts, strict=True):
        slope = _product(_product(shares[run], errors, mapper), gram, mapper)
        values = values_of(found[run], part)
        together = np.ascontiguousarray(shares[run, run])
        for done in range(passes):
            if not _swept(found[run], values, slope, part, gram, together, done, passes, mapper):
                break
        errors[run] = values - x[run]
    return found


def _swept(
    codes: U8,
    values: F32,
    slope: F32,
    grid: CodeGrid,
    gram: F32,
    shares: F32,
    done: int,
    passes: int,
    mapper: Mapper,
) -> bool:
    """One pass over the columns of rows that are changed together; whether any code changed. Slopes
    of columns that are done with are not wanted behind the last pass.
    """
    rows, columns = codes.shape
    any_changed = False
    for first in range(0, columns, SWEPT_COLUMNS):
        width = min(SWEPT_COLUMNS, columns - first)
        moves, places = np.empty(rows * width, np.float32), np.empty(width, np.int32)
        moved, changed = _native.sweep_columns(
            rows=rows,
            columns=columns,
            first=first,
            width=width,
            levels=grid.levels,
            scale=grid.scale,
            zero=grid.zero,
            offset=grid.offset,
            length=grid.length,
            gram=gram,
            shares=shares,
            slope=slope,
            values=values,
            codes=codes,
            moves=moves,
            places=places,
        )
        any_changed |= changed
        left, order = moves[: rows * moved].reshape(rows, moved), places[:moved]
        others = [(first + width, columns)] + ([(0, first)] if done + 1 < passes else [])
        if moved:
            _add_product(slope, left, gram, order, others, mapper)
    return any_changed


def _product(left: F32, right: F32, mapper: Mapper) -> F32:
    """left (R, N) times right (N, C), every sum in the order of N."""
    found = np.zeros((len(left), right.shape[1]), np.float32)
    _add_product(found, left, right, None, [(0, right.shape[1])], mapper)
    return found


def _add_product(
    sums: F32,
    left: F32,
    right: F32,
    order: I32 | None,
    columns: list[tuple[int, int]],
    mapper: Mapper,
) -> None:
    """Add left times rows of ``right``, those of ``order`` or all, to some columns of ``sums``."""

    def add(part: tuple[int, int]) -> None:
        _native.multiply_ordered(
            sums=sums,
            left=left,
            right=right,
            order=order,
            rows=len(sums),
            depth=left.shape[1],
            right_rows=len(right),
            columns=sums.shape[1],
            begin=part[0],
            end=part[1],
        )

    parts = [
        (begin, min(begin + AT_ONCE, end))
        for first, end in columns
        for begin in range(first, end, AT_ONCE)
    ]
    for _ in mapper(add, parts):
        pass  # the sums are where they are wanted
