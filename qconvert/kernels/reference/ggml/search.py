"""Scales of ggml blocks by search: the definition, in NumPy, of formats/schemes/SPEC.md section 8.

Groups are columns: values and weights are float32 of shape (n, G), what belongs to a group (G,).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def ordered_sum(columns: F32) -> F32:
    """Sums over the first axis, one row after the other."""
    total = np.zeros(columns.shape[1], np.float32)
    for row in columns:
        total += row
    return total


def power_of(magnitude: F32) -> F32:
    """The power of two at or below each magnitude, kept in [2^-126, 2^126]; 2^-126 for 0."""
    return (_exponent(magnitude) << 23).view(np.float32)


def inverse_power_of(magnitude: F32) -> F32:
    """1 / `power_of`, exact."""
    return ((254 - _exponent(magnitude)) << 23).view(np.float32)


def _exponent(magnitude: F32) -> NDArray[np.int32]:
    exponent: NDArray[np.int32] = np.clip(magnitude.view(np.int32) >> 23, 1, 253)
    return exponent


def columns_of(blocks: F32, group: int) -> F32:
    """Groups of blocks, (k, block), as columns, block by block."""
    return np.ascontiguousarray(blocks.reshape(-1, group).T)


def weights_of(importance: F32 | None, blocks: int, group: int) -> F32 | None:
    """Weights of the squared errors as columns: largest in [1, 4), all 1 where they were all 0."""
    if importance is None:
        return None
    rows = importance[np.arange(blocks) % len(importance)]
    weights = columns_of(rows, group)
    largest = weights.max(axis=0)
    return np.where(largest == 0, np.float32(1), weights * inverse_power_of(largest))


def furthest(values: F32, weights: F32 | None) -> F32:
    """The value furthest from 0 among those of positive weight, of equals the negative one.

    1 where there is none of 2^-100 or above, so that the quotient of a place and it is finite.
    """
    if weights is not None:
        values = np.where(weights > 0, values, np.float32(0))
    low, high = values.min(axis=0), values.max(axis=0)
    peak = np.where(-low >= high, low, high)
    return np.where(np.abs(peak) < np.float32(2.0**-100), np.float32(1), peak)


def fitted_scale(
    values: F32,
    weights: F32 | None,
    ends: Sequence[float],
    nearest: Callable[[F32], F32],
) -> F32:
    """Scales of either sign, 0 where no code helps, before they are rounded to their stored type.

    Args:
        values: with magnitudes below 4.
        ends: places in units of a code; the value furthest from 0 is put at each of them in turn.
        nearest: values in units of a code to codes.
    """
    weighted = values if weights is None else weights * values
    gain = np.zeros(values.shape[1], np.float32)
    scale = np.zeros_like(gain)

    def offer(inverse: F32) -> None:
        nonlocal gain, scale
        codes = nearest(values * inverse)
        squares = codes * codes if weights is None else codes * codes * weights
        xq, qq = ordered_sum(weighted * codes), ordered_sum(squares)
        fitted = xq / np.where(qq > 0, qq, np.float32(1))
        better = xq * fitted > gain
        gain = np.where(better, xq * fitted, gain)
        scale = np.where(better, fitted, scale)

    peak = furthest(values, weights)
    for end in ends:
        offer(np.float32(end) / peak)
    offer(inverse_of(scale))  # the codes of a fitted scale may be others
    return scale


def inverse_of(scale: F32) -> F32:
    """1 / scale, and 0 for 0."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def squared_error(values: F32, restored: F32, weights: F32 | None) -> F32:
    """Weighted sums of squared differences."""
    error = values - restored
    return ordered_sum(error * error if weights is None else error * error * weights)
