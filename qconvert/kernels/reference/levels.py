"""Codes of integer levels with signed steps: formats/schemes/SPEC.md section 11."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qconvert.geometry import PACK_GROUP
from qconvert.kernels.arithmetic import (
    LEVEL_PARTS,
    LEVEL_WINDOWS,
    level_weights,
    row_units,
    shifted_levels,
    to_groups,
    weighted_error_sums,
)
from qconvert.kernels.records import (
    F32,
    I8,
    U8,
    Bytes,
    Encoded,
    ErrorSums,
    LevelCode,
    LevelSteps,
)
from qconvert.kernels.reference.codes import pack, unpack
from qconvert.kernels.reference.statistics import error_sums

BATCH = 1 << 16  # values searched at once: the temporaries stay in the second-level cache


def levels_encode(x: F32, code: LevelCode, mean_square: F32 | None = None) -> Encoded:
    """Rows (R, c) of finite values as codes, with steps that are searched.

    Args:
        mean_square: of the columns, (c,): weights of the search and of an error.

    Returns:
        Codes as packed, ``scales`` a byte each, ``row_scales`` binary16, which are infinite where a
        row is beyond them (and its codes mean nothing).
    """
    rows, columns = x.shape
    scales, unit = row_units(np.abs(x).max(axis=1), code)
    groups, _ = to_groups(x, code.block)
    weights = level_weights(mean_square, columns, code.block)
    steps = np.zeros((rows, code.blocks(columns)), np.int8)
    shifts = np.zeros_like(steps)
    u = np.zeros((rows, groups.size // rows), np.uint8)
    per_row = code.blocks(columns)
    count = max(1, BATCH // groups.shape[1] // per_row)  # rows
    for r in range(0, rows, count):
        part = slice(r, min(r + count, rows))
        blocks = groups[r * per_row : part.stop * per_row]
        units = np.repeat(unit[part], per_row)
        found = _search(blocks, units, code, weights)
        steps[part] = found.step.reshape(-1, per_row)
        shifts[part] = found.shift.reshape(-1, per_row)
        u[part] = _codes(blocks, units, found, code).reshape(len(units) // per_row, -1)
    u[:, columns:] = 0
    chosen = LevelSteps(unit, steps, shifts)
    packed = pack(np.ascontiguousarray(_to_whole_groups(u, columns)).ravel(), code.bits)
    decoded = _decoded(u[:, :columns], chosen, code)
    weighted = 0.0, 0.0
    if mean_square is not None:
        weighted = weighted_error_sums(x, decoded, mean_square[None, :])
    error = ErrorSums(x.size, *error_sums(x, decoded), 0, *weighted)
    times = shifts.astype(np.int16) // (code.shift or 1)
    stored = (steps.astype(np.int16) - code.steps[0] + (times << code.step_bits)).astype(np.uint8)
    segments: dict[str, Bytes] = {
        "codes": packed.data,
        "scales": stored.ravel().data,
        "row_scales": scales.tobytes(),
    }
    return Encoded(segments, error)


@dataclass(frozen=True, slots=True)
class _Found:
    """The best of each block so far: int8 (G,) each, and its gain, float32 (G,)."""

    step: I8
    shift: I8
    gain: F32


@np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
def _search(x: F32, unit: F32, code: LevelCode, weights: F32 | None) -> _Found:
    """The step and shift of each block (G, L) of rows with these units (G,)."""
    columns = np.ascontiguousarray(x.T)
    w = wx = None
    if weights is not None:  # of the blocks of a row, which are those of every row
        w = np.ascontiguousarray(np.tile(weights, (len(x) // len(weights), 1)).T)
        wx = w * columns
    low, high = columns.min(axis=0), columns.max(axis=0)
    peak = np.where(high > -low, high, low)
    table, fine = code.table.astype(np.float32), np.float32(LEVEL_PARTS[code.bits])
    best = _Found(
        np.zeros(len(x), np.int8), np.zeros(len(x), np.int8), np.zeros(len(x), np.float32)
    )
    for step, shift in _candidates(peak, unit, code):
        levels = table + np.float32(shift)
        scale = unit * step
        parts = np.clip(np.rint(columns * (fine / scale)), -128 * fine, 128 * fine - 1)
        place = parts / fine
        q = levels[np.searchsorted((levels[:-1] + levels[1:]) / np.float32(2), place)]
        a, b = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
        for i in range(len(columns)):
            a += (columns if wx is None else wx)[i] * q[i]
            b += q[i] * q[i] if w is None else q[i] * q[i] * w[i]
        gain = scale * ((a + a) - scale * b)
        better = gain > best.gain
        best = _Found(
            np.where(better, step, best.step).astype(np.int8),
            np.where(better, np.int8(shift), best.shift),
            np.where(better, gain, best.gain),
        )
    return best


def _candidates(peak: F32, unit: F32, code: LevelCode) -> Iterator[tuple[F32, int]]:
    """Steps (G,), of which some may come more than once, and a shift."""
    nearest, furthest = LEVEL_WINDOWS[code.bits]
    lowest, highest = code.steps
    for shift in code.shifts:
        for sign, top in ((1, highest), (-1, -lowest)):
            if not top:
                continue
            below = -(code.levels[0] + shift)
            end = np.where((peak < 0) == (sign > 0), below, code.levels[-1] + shift)
            place = np.abs(peak) / (unit * end.astype(np.float32))
            place = np.where((unit > 0) & (end > 0), place, np.float32(0)).astype(np.float32)
            first = np.clip(np.rint(place * np.float32(nearest)), 1, top)
            last = np.clip(np.rint(place * np.float32(furthest)), 1, top)
            for i in range(int((last - first).max(initial=0)) + 1):
                yield np.float32(sign) * np.minimum(first + np.float32(i), last), shift


@np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore")
def _codes(x: F32, unit: F32, found: _Found, code: LevelCode) -> U8:
    """Codes of blocks (G, L)."""
    scale = unit * found.step.astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    table = code.table.astype(np.float32)
    middles = (table[:-1] + table[1:]) / np.float32(2)
    place = x * inverse[:, None]
    codes = np.zeros(x.shape, np.uint8)
    for middle in middles:
        codes += place > (middle + found.shift.astype(np.float32))[:, None]
    return codes


def _to_whole_groups(codes: U8, columns: int) -> U8:
    """Rows of codes, padded with 0 to whole groups of 32."""
    width = -(-columns // PACK_GROUP) * PACK_GROUP
    wide = np.zeros((len(codes), width), np.uint8)
    kept = min(width, codes.shape[1])
    wide[:, :kept] = codes[:, :kept]
    return wide


def levels_decode(packed: U8, columns: int, steps: LevelSteps, code: LevelCode) -> F32:
    """Values of rows, float32 (R, columns).

    Args:
        packed: codes of rows of ``columns`` values, each padded to a group of 32.
    """
    codes = unpack(packed, code.bits).reshape(len(steps.unit), -1)[:, :columns]
    return _decoded(codes, steps, code)


def _decoded(codes: U8, steps: LevelSteps, code: LevelCode) -> F32:
    values: F32 = (
        shifted_levels(codes, steps, code).astype(np.float32)
        * np.repeat(steps.scale, code.block, axis=1)[:, : codes.shape[1]]
    )
    return values
