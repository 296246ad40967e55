"""Rows in integer units: what they are worth, and the same numbers in other units."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.arithmetic import SCALE_NUMPY
from qconvert.kernels.records import F32, U8, IntegerRows
from qconvert.kernels.reference import widening

_BYTES = {"F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu"}  # names of ml_dtypes


def values_of(rows: IntegerRows) -> F32:
    """(codes - zero) · scale, with the offset added where there is one, float32 (R, C)."""
    count, columns = rows.codes.shape
    length = min(rows.group, columns)
    padded = -(-columns // length) * length
    codes = rows.codes
    if padded != columns:
        codes = np.pad(codes, ((0, 0), (0, padded - columns)))
    values = codes.astype(np.float32).reshape(count, -1, length)
    if rows.zero.any():
        values -= rows.zero.astype(np.float32)[:, :, None]  # whole numbers below 2^24: exact
    values *= rows.scale[:, :, None]
    if rows.offset is not None:
        values += rows.offset[:, :, None]
    return np.ascontiguousarray(values.reshape(count, padded)[:, :columns])


def regrouped(rows: IntegerRows, group: int) -> IntegerRows | None:
    """The same rows in groups of ``group`` columns, 0 for whole rows; None where they are not in
    groups that consist of such.
    """
    columns = rows.codes.shape[1]
    wanted, found = group or columns, min(rows.group, columns)
    if wanted == found:
        return rows
    if found % wanted:
        return None
    each = found // wanted
    count = -(-columns // wanted)

    def repeated(of_groups: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(of_groups, each, axis=1)[:, :count]

    offset = None if rows.offset is None else repeated(rows.offset)
    return IntegerRows(rows.codes, repeated(rows.zero), repeated(rows.scale), offset, wanted)


def centred(rows: IntegerRows, bits: int) -> IntegerRows | None:
    """The same rows with the middle of ``bits`` bits for a zero point; None where codes do not fit
    then, zero points differ, or something is added to values.
    """
    middle = 1 << (bits - 1)
    if rows.offset is not None or not rows.zero.size or (rows.zero != rows.zero.flat[0]).any():
        return None
    shift = middle - int(rows.zero.flat[0])
    codes = rows.codes + np.int16(shift)
    if codes.min() < 0 or codes.max() >= 2 * middle:
        return None
    return replace(rows, codes=codes, zero=np.full_like(rows.zero, middle))


def exact_scales(rows: IntegerRows, dtype: str) -> bool:
    """Whether scales are numbers of a dtype already."""
    with np.errstate(over="ignore"):
        narrow = rows.scale.astype(SCALE_NUMPY[dtype]).astype(np.float32)
    return bool((narrow == rows.scale).all())


def byte_scales(scale: F32, dtype: str) -> U8 | None:
    """Bytes of a type of eight bits that mean these scales; None where one is negative, or no
    number of the type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = nearest_bytes(scale, dtype)
        same = widening.widen(found.tobytes(), dtype).reshape(scale.shape) == scale
    return found if same.all() and not np.signbit(scale).any() else None


def nearest_bytes(scale: F32, dtype: str) -> U8:
    """Bytes of the nearest numbers of a type of eight bits."""
    import ml_dtypes

    with np.errstate(over="ignore", invalid="ignore"):
        return scale.astype(getattr(ml_dtypes, _BYTES[dtype])).view(np.uint8)


def with_offset(rows: IntegerRows, bits: int, dtype: str) -> IntegerRows | None:
    """The same rows with zero points of 0, and what they subtract added to values instead, a number
    of a dtype; None where it is none, or codes do not fit into so many bits.
    """
    if rows.codes.min(initial=0) < 0 or rows.codes.max(initial=0) >= 1 << bits:
        return None
    taken = -(rows.zero.astype(np.float32) * rows.scale)
    offset = taken if rows.offset is None else rows.offset + taken
    with np.errstate(over="ignore"):
        narrow = offset.astype(SCALE_NUMPY[dtype]).astype(np.float32)
    found = replace(rows, zero=np.zeros_like(rows.zero), offset=offset)
    same = (narrow == offset).all() and (values_of(found) == values_of(rows)).all()
    return found if same else None


def without_offset(rows: IntegerRows, bits: int) -> IntegerRows:
    """The same rows with zero points in place of what is added to values, where all of that is a
    multiple of the scale from 0 to the largest code; else these rows.
    """
    if rows.offset is None:
        return rows
    steps = np.divide(
        -rows.offset, rows.scale, out=np.zeros_like(rows.scale), where=rows.scale != 0
    )
    zero = np.rint(steps)
    if (zero < 0).any() or (zero >= 1 << bits).any() or (zero * rows.scale != -rows.offset).any():
        return rows
    found = replace(rows, zero=rows.zero + zero.astype(np.int32), offset=None)
    return found if (values_of(found) == values_of(rows)).all() else rows


def reciprocal(factor: np.float32) -> np.float32:
    """A divisor that does to every number of E4M3 what a factor does, where there is one near; or
    else the nearest to its reciprocal.
    """
    with np.errstate(all="ignore"):
        nearest = np.float32(1) / factor
        if not 0 < nearest < np.inf:
            return nearest
        mantissas = np.arange(8, 16, dtype=np.float32)  # the others are these times powers of two
        for step in (0, 1, -1, 2, -2):
            near = (nearest.view(np.int32) + np.int32(step)).view(np.float32)
            if (mantissas / near == mantissas * factor).all():
                return np.float32(near)
    return nearest
