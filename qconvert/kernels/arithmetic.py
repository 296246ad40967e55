"""Arithmetic of scales, zero points and sums that either set of kernels does in NumPy.

Section numbers are those of formats/schemes/SPEC.md.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import AffineEncoding
from qconvert.geometry import PACK_GROUP
from qconvert.kernels.records import (
    F32,
    F64,
    I32,
    LEVEL_SPAN,
    U8,
    Bools,
    Bytes,
    Extent,
    IntegerRows,
    LevelCode,
    LevelSteps,
    Parameters,
)

LANES = 16  # partial sums, section 6
PIECE = 256  # values whose binary32 sums are added before binary64 takes over, section 6
HISTOGRAM_BINS = 1 << 16
SWEPT_ROWS = 128  # that make up for each other's errors at once, section 12
WORD = 32  # bits of the words of other tools' formats
SIGN = np.uint8(0x80)  # flips a byte between offset 128 and two's complement

SCALE_NUMPY: dict[str, np.dtype[np.generic]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
}
# Smallest positive number of each dtype, a subnormal one.
SMALLEST_SCALE = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}


# --- sums -----------------------------------------------------------------------------------------


def fold(lanes: NDArray[Any]) -> Any:
    """Add 16 partial sums (16, ...) in pairs: i with i+8, i+4, i+2, i+1."""
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    return lanes[0]


def lane_sum(values: F64) -> float:
    """Sum of a 1-d float64 array in the order of section 6: 16 partial sums, then added in
    pairs.
    """
    whole = len(values) // LANES * LANES
    lanes = np.add.reduce(values[:whole].reshape(-1, LANES), axis=0)
    lanes[: len(values) - whole] += values[whole:]
    return float(fold(lanes))


def weighted_error_sums(x: F32, decoded: F32, weights: F32) -> tuple[float, float]:
    """Σwx² and Σw(x - x')² of rows (R, c), in the order of `lane_sum`; row r has the weights
    r mod P of (P, c).
    """
    wide = x.astype(np.float64)
    error = (x - decoded).astype(np.float64)
    w = weights[np.arange(len(x)) % len(weights)].astype(np.float64)
    return lane_sum((w * (wide * wide)).ravel()), lane_sum((w * (error * error)).ravel())


# --- groups ---------------------------------------------------------------------------------------


def to_groups(x: F32, block: int) -> tuple[F32, I32 | None]:
    """Rows (R, c) as groups (G, L), the last block of each row padded with zeros.

    Args:
        block: values of a group, or 0 when a row is one.

    Returns:
        The groups, and the number of real values of each, or None when all are full.
    """
    rows, columns = x.shape
    if not block:
        return x, None
    per_row = -(-columns // block)
    if columns % block == 0:
        return x.reshape(-1, block), None
    padded = np.zeros((rows, per_row * block), np.float32)
    padded[:, :columns] = x
    counts = np.full((rows, per_row), block, np.int32)
    counts[:, -1] = columns - (per_row - 1) * block
    return padded.reshape(-1, block), counts.ravel()


# --- scales and zero points -----------------------------------------------------------------------


def zero_steps(bits: int) -> int:
    """Zero steps to a code, section 3."""
    return 1 if bits == 8 else 4


def real_zero(zero: I32, bits: int) -> F32:
    """Zero points in codes, of zero steps."""
    return (zero / zero_steps(bits)).astype(np.float32)


def nearest_zero_point(
    real: NDArray[np.floating], has_zero: Bools, encoding: AffineEncoding
) -> I32:
    """Zero steps nearest to a real zero point; whole codes where a zero must stay zero."""
    steps = zero_steps(encoding.bits)
    fine = np.rint(real * steps)
    whole = np.rint(real) * steps
    top = encoding.levels * steps
    found: I32 = np.clip(np.where(has_zero, whole, fine), 0, top).astype(np.int32)
    return found


def stored_zero_points(zero: I32, encoding: AffineEncoding) -> U8:
    """Zero steps as stored, one byte each; none when symmetric."""
    if encoding.symmetric:
        return np.zeros(0, np.uint8)
    stored = zero.astype(np.uint8)
    return stored ^ SIGN if encoding.bits == 8 else stored


def round_scale(scale: F32, dtype: str, magnitude: F32) -> F32:
    """Scales as stored; that of a group whose ``magnitude`` is not 0 never becomes 0."""
    stored = scale.astype(SCALE_NUMPY[dtype]).astype(np.float32)
    smallest = np.float32(SMALLEST_SCALE[dtype])
    lost = (stored == 0) & (magnitude > 0)
    return np.where(lost, np.copysign(smallest, scale), stored)


def minmax(e: Extent, encoding: AffineEncoding) -> Parameters:
    """Parameters that cover the extent, section 5."""
    if encoding.symmetric:
        scale = e.magnitude / np.float32((1 << (encoding.bits - 1)) - 1)
        stored = round_scale(scale, encoding.scale_dtype, e.magnitude)
        return Parameters(stored, np.zeros(len(stored), np.int32))
    n = np.float32(encoding.levels)
    stored = round_scale(e.high / n - e.low / n, encoding.scale_dtype, e.magnitude)
    divisor = np.where(stored == 0, np.float32(1), stored)
    return Parameters(stored, nearest_zero_point(-e.low / divisor, e.has_zero, encoding))


# --- streams of bits ------------------------------------------------------------------------------


def stream_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of so many codes as a stream of bits, padded to whole words."""
    return -(-columns * bits // WORD) * (WORD // 8)


def stored_biases(scale: F32, zero: I32, encoding: AffineEncoding) -> NDArray[np.generic]:
    """What is added to the multiples of scales (G,) instead of zero steps, as it is stored; 0 where
    a scale is beyond its dtype.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        bias = -real_zero(zero, encoding.bits) * scale
        bias = np.where(np.isinf(scale), np.float32(0), bias)
        return bias.astype(SCALE_NUMPY[encoding.scale_dtype])


# --- bounds of outliers ---------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float32).max)


def narrow_bounds(bounds: tuple[float, float]) -> tuple[float, float, float]:
    """Bounds in binary32, and their middle, about which moments are taken."""
    low, high = (float(b) for b in np.clip(bounds, -LARGEST, LARGEST).astype(np.float32))
    return low, high, float(np.float32(low / 2 + high / 2))


# --- codes in integer units -----------------------------------------------------------------------


def integer_rows(
    codes: NDArray[np.uint8], scale: F32, zero: NDArray[np.int32], encoding: AffineEncoding
) -> IntegerRows:
    """Unsigned codes (R, c) with parameters (R, G) in integer units: k of section 7."""
    symmetric = encoding.symmetric
    steps = 1 if symmetric else zero_steps(encoding.bits)
    centre = 1 << (encoding.bits - 1) if symmetric else 0
    return IntegerRows(
        codes=codes.astype(np.int16) * np.int16(steps) - np.int16(centre),
        zero=zero,
        scale=scale / np.float32(steps),
        offset=None,
        group=encoding.block or codes.shape[1],
    )


def padded_codes(codes: U8, columns: int, encoding: AffineEncoding) -> U8:
    """Rows of unsigned codes, flat and padded to whole blocks and groups of 32, as they are packed;
    8-bit ones as they are stored.

    Args:
        codes: (R, c) with c at least ``columns``; what lies behind these is padding.
    """
    unit = max(encoding.block, 1 if encoding.bits == 8 else PACK_GROUP)
    padded = np.zeros((len(codes), -(-columns // unit) * unit), np.uint8)
    padded[:, :columns] = codes[:, :columns]
    if encoding.bits == 8:
        padded[:, :columns] ^= SIGN
    return padded.ravel()


# --- levels with signed steps: section 11 ---------------------------------------------------------

# By the bits of a code: where steps are searched, in steps that bring the furthest value to an end
# of the table. tests/test_levels.py holds the search to all steps that there are.
LEVEL_WINDOWS = {
    2: (0.5625, 1.125),
    3: (0.8125, 1.125),
    4: (0.875, 1.4375),
    5: (0.9375, 1.75),
    6: (0.96875, 1.75),
}
LEVEL_PARTS = {2: 1, 3: 1, 4: 1, 5: 4, 6: 4}  # of a level's unit that the search tells apart
LEAST_WEIGHT = np.float32(2.0**-16)  # of the largest of a block, as in the weighted search
_SMALLEST_HALF = np.float32(SMALLEST_SCALE["F16"])


def row_factor(code: LevelCode) -> float:
    """The scale of a row by its largest magnitude.

    Steps without a sign leave their upper half to few blocks at 1.0625; of 0.65, 0.75 and 0.85,
    0.75 is best on heavy tails and not worse on a Gaussian.
    """
    return 1.0625 if code.steps[0] < 0 else 0.75


def row_units(magnitude: F32, code: LevelCode) -> tuple[NDArray[np.float16], F32]:
    """The scale of rows of these largest magnitudes (R,) as stored, infinite where it is beyond
    binary16, and the unit of their steps, which is 0 then.
    """
    with np.errstate(over="ignore"):
        stored = (magnitude * np.float32(row_factor(code))).astype("<f2")
    wide = stored.astype(np.float32)
    wide = np.where((wide == 0) & (magnitude > 0), _SMALLEST_HALF, wide)
    return wide.astype("<f2"), level_unit(np.where(np.isinf(wide), np.float32(0), wide), code)


def level_unit(row_scales: F32, code: LevelCode) -> F32:
    """What a step and a level of 1 count for in each row, (R,)."""
    unit: F32 = row_scales * np.float32(2.0 ** -(code.step_bits + 6))
    return unit


def level_steps(step: U8, row_scales: Bytes, code: LevelCode) -> LevelSteps:
    """Steps from what is stored: a byte for each block, (R, G), and the scales of the rows."""
    return LevelSteps(
        level_unit(np.frombuffer(row_scales, "<f2").astype(np.float32), code),
        ((step & ((1 << code.step_bits) - 1)).astype(np.int16) + code.steps[0]).astype(np.int8),
        ((step >> code.step_bits) * np.uint8(code.shift)).astype(np.int8),
    )


def level_weights(mean_square: F32 | None, columns: int, block: int) -> F32 | None:
    """Weights of the values of a row's blocks, (G, L), 0 for padding; None where all count 1."""
    if mean_square is None:
        if columns % block == 0:
            return None
        mean_square = np.ones(columns, np.float32)
    groups, counts = to_groups(np.ascontiguousarray(mean_square[None, :], np.float32), block)
    largest = groups.max(axis=1, keepdims=True)
    one = np.float32(1)
    share = np.where(largest > 0, groups / np.where(largest > 0, largest, one), one)
    weight = np.maximum(share, LEAST_WEIGHT)
    if counts is not None:
        weight = np.where(np.arange(block) < counts[:, None], weight, np.float32(0))
    return weight


def shifted_levels(
    codes: NDArray[np.uint8], steps: LevelSteps, code: LevelCode
) -> NDArray[np.int16]:
    """Levels of codes (R, c) with the shifts of their blocks, int16 (R, c)."""
    shifts = np.repeat(steps.shifts, code.block, axis=1)[:, : codes.shape[1]]
    found: NDArray[np.int16] = code.table.astype(np.int16)[codes] + shifts
    return found


def level_rows(codes: NDArray[np.uint8], steps: LevelSteps, code: LevelCode) -> IntegerRows:
    """Codes (R, c) in integer units: steps times levels, in spans that share the unit of a row."""
    rows, columns = codes.shape
    each = np.repeat(steps.steps.astype(np.int16), code.block, axis=1)[:, :columns]
    spans = -(-columns // LEVEL_SPAN)
    return IntegerRows(
        codes=shifted_levels(codes, steps, code) * each,
        zero=np.zeros((rows, spans), np.int32),
        scale=np.repeat(steps.unit[:, None], spans, axis=1),
        offset=None,
        group=LEVEL_SPAN,
    )


# --- casts ----------------------------------------------------------------------------------------

CAST_NUMPY = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def cast_values(x: F32, dtype: str) -> tuple[bytes, F32]:
    """Values in ``dtype`` as bytes, and what they read back as; too large values become Inf."""
    with np.errstate(over="ignore"):
        stored = x.astype(CAST_NUMPY[dtype])
    return stored.tobytes(), stored.astype(np.float32)


def nearest_entries(table: F32) -> tuple[F32, U8]:
    """How to find the nearest number of a table: midpoints between neighbours, ascending, and the
    index of the entry where so many of them lie below; of equal numbers the first.
    """
    values, entries = np.unique(table, return_index=True)
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return midpoints, entries.astype(np.uint8)


def table_codes(x: F32, scale: F32, table: F32) -> U8:
    """The index of the entry nearest to each x / scale, (n,) each; of 0 where the scale is 0."""
    with np.errstate(over="ignore", under="ignore"):
        ratio = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)
    midpoints, entries = nearest_entries(table)
    codes: U8 = entries[np.searchsorted(midpoints, ratio)]
    return codes
