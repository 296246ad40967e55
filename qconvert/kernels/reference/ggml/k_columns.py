"""What the searches for the scales of ggml's K-quants share: formats/schemes/SPEC.md section 8.

Sub-blocks lie side by side as the columns of (length, n) arrays, n over all super-blocks; sums go
down the columns, value by value. All arithmetic is binary32, in the order written.

The squared error of codes u under value = s u + o is Sxx - gain, and the gain follows from Su,
Suu and Sxu: of one set of codes, the gain of any scale and offset is known without the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

SUPER = 256
TINY = np.float32(2.0**-100)  # smaller numbers count as 0: their inverses overflow
FLOOR = np.float32(2.0**-30)  # the least weight, relative to the largest of a super-block
SINGULAR = np.float32(2.0**-20)  # relative determinant below which a fit means nothing


@dataclass(frozen=True, slots=True)
class Found:
    """What a search leaves: units as stored, (k,), integers, (k, sub-blocks), codes, (k, 256)."""

    d: F16
    a: F32
    codes: F32
    m: F16 | None = None
    b: F32 | None = None


def columns(blocks: F32, length: int) -> F32:
    """Super-blocks (k, 256) as (length, k · 256 / length) columns."""
    return np.ascontiguousarray(blocks.reshape(-1, length).T)


def normalised(blocks: F32) -> tuple[F32, F32]:
    """Blocks times a power of two, (k, 256), and that power, (k,), so that the largest magnitude
    is in [1, 2), or in [1, 4) near the end of binary32; 0 for a block below `TINY`.
    """
    largest = np.abs(blocks).max(axis=1)
    exponent = largest.view(np.int32) >> 23
    power = (np.maximum(254 - exponent, 1) << 23).view(np.float32)
    power = np.where(largest < TINY, np.float32(0), power)
    return blocks * power[:, None] + np.float32(0), power  # + 0: no -0


def weights(importance: F32 | None, count: int) -> F32:
    """Importance of ``count`` super-blocks, (count, 256), at most 1, at least `FLOOR`."""
    if importance is None:
        return np.ones((count, SUPER), np.float32)
    rows = importance * inverse(importance.max(axis=1))[:, None]
    floored: F32 = np.maximum(rows, FLOOR)
    return floored[np.arange(count) % len(rows)]


def inverse(x: F32) -> F32:
    """1 / x, and 0 for magnitudes below `TINY`."""
    usable = np.abs(x) >= TINY
    return np.where(usable, np.float32(1) / divisor(x, usable), np.float32(0))


def divisor(x: F32, usable: NDArray[np.bool_]) -> F32:
    """x, and 1 where it is not usable as a divisor."""
    safe: F32 = np.where(usable, x, np.float32(1))
    return safe


def down(x: F32) -> F32:
    """Sums of the columns of (length, n), from the first row to the last."""
    total: F32 = x[0].copy()
    for row in x[1:]:
        total += row
    return total


def over_blocks(x: F32, sub_blocks: int) -> F32:
    """Sums over each super-block, (n,) to (k,), in pairs: i with i + half."""
    x = x.reshape(-1, sub_blocks)
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def clipped(x: F32, low: int, high: int) -> F32:
    """rint, then into [low, high]."""
    return np.clip(np.rint(x), np.float32(low), np.float32(high))


def halves(unit: F32, power: F32, upwards: bool) -> tuple[F16, F32]:
    """A positive unit of normalised super-blocks as float16 of the true size, and what that
    float16 is in normalised terms; the unit itself where float16 cannot hold it.

    Upwards: never smaller than the unit, so that no integer scale leaves its range.
    """
    true = np.where(power == 0, np.float32(0), unit / divisor(power, power != 0))
    half = true.astype("<f2")
    if upwards:
        half = (half.view("<u2") + (half.astype(np.float32) < true)).astype("<u2").view("<f2")
    back = half.astype(np.float32) * power
    return half, np.where(np.isfinite(back), back, unit)


def down_max(x: F32, sub_blocks: int) -> F32:
    """Largest number of each super-block, (k,), of one for each sub-block, (n,)."""
    largest: F32 = x.reshape(-1, sub_blocks).max(axis=1)
    return largest
