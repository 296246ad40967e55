"""Scales, minima and codes of ggml's blocks of 32 under an importance, formats/schemes/SPEC.md
section 8. Without one these types take no search: `small`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.reference.ggml import search

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Where the value furthest from 0 is put, by bits.
ENDS: dict[int, tuple[float, ...]] = {
    4: (-8, 7, -8.6, -7.3, 7.8, 9.2, 6.2, -9.6, 10.6, -6.2),
    5: (-16, 15, -16.5, -15.5, 15.5, 16.3, 14.5, -17, -15, -17.8, 17.2, 14, -14.4, 18.5),
}
# Codes that the range is stretched by, and where its lower end comes to lie.
STRETCHES: tuple[tuple[float, float], ...] = (
    *((0, 0), (-0.9, 0), (-0.7, 0), (-0.5, 0), (-0.3, 0), (-0.1, 0), (0.1, 0), (0.3, 0)),
    *((0.5, 0), (0.7, 0), (0.9, 0), (-1, 0.5), (-0.5, 0.25), (0.5, -0.25), (1, -0.5)),
    *((1.5, -0.75), (2, -1), (3, -1.5), (0.5, -0.5), (1, 0), (1, -1), (2, 0), (2, -2)),
    *((3, 0), (3, -3), (4.5, 0), (4.5, -4.5), (-0.5, -0.5), (-0.5, 0.5), (-0.5, 1)),
    *((0, 0.4), (0, -0.4)),
)
_FITS = 2  # of the best line to its own codes


def centred(blocks: F32, importance: F32, bits: int) -> tuple[NDArray[np.float16], U8]:
    """Scales (k, 1) and codes (k, 32) of the types that count from the middle."""
    values, shrink, power, weights = _columns(blocks, importance)
    half = 1 << (bits - 1)

    def nearest(steps: F32) -> F32:
        return np.clip(np.rint(steps), -half, half - 1)

    scale = search.fitted_scale(values, weights, ENDS[bits], nearest) * power
    stored = scale.astype(np.float16)
    inverse = search.inverse_of(stored.astype(np.float32) * shrink)
    codes = nearest(values * inverse) + np.float32(half)
    return stored[:, None], codes.T.astype(np.uint8)


def from_minimum(blocks: F32, importance: F32, bits: int) -> tuple[NDArray[np.float16], U8]:
    """Scales with minima (k, 2) and codes (k, 32) of the types that count from a minimum."""
    values, shrink, power, weights = _columns(blocks, importance)
    top = (1 << bits) - 1
    low, high = values.min(axis=0) + np.float32(0), values.max(axis=0)  # -0 becomes 0
    above = values - low
    width: F32 = np.where(high > low, high - low, np.float32(1))
    total = search.ordered_sum(weights)
    moment = search.ordered_sum(weights * above)
    scale = np.zeros_like(low)
    least = moment / total  # the least value, from `low` on
    gain = least * moment

    def offer(inverse: F32, shift: F32 | np.float32) -> None:
        nonlocal scale, least, gain
        codes = np.clip(np.rint(above * inverse + shift), 0, top)
        weighted = weights * codes
        u, uu = search.ordered_sum(weighted), search.ordered_sum(weighted * codes)
        xu = search.ordered_sum(weighted * above)
        spread = total * uu - u * u
        slope = (total * xu - moment * u) / np.where(spread > 0, spread, np.float32(1))
        slope = np.where(spread > 0, slope, np.float32(0))
        start = (moment - slope * u) / total
        found = start * moment + slope * xu
        better = found > gain
        gain = np.where(better, found, gain)
        scale, least = np.where(better, slope, scale), np.where(better, start, least)

    for stretch, shift in STRETCHES:
        place: F32 = np.float32(top + stretch) / width
        offer(place, np.float32(shift))
    for _ in range(_FITS):
        usable = np.abs(scale) >= np.float32(2.0**-40)
        inverse = np.where(usable, np.float32(1) / scale, np.float32(0))
        offer(inverse, -least * inverse)

    stored = np.stack([scale * power, (least + low) * power], axis=1).astype(np.float16)
    real = stored.astype(np.float32).T * shrink
    steps = (values - real[1]) * search.inverse_of(real[0])
    steps = np.where(np.isfinite(steps), steps, np.float32(0))
    return stored, np.clip(np.rint(steps), 0, top).T.astype(np.uint8)


def _columns(blocks: F32, importance: F32) -> tuple[F32, F32, F32, F32]:
    """Values below 4, what they were multiplied by, its inverse, and weights."""
    values = search.columns_of(blocks, 32)
    magnitude = np.abs(values).max(axis=0)
    shrink = search.inverse_power_of(magnitude)
    weights = search.weights_of(importance, len(blocks), 32)
    assert weights is not None
    return values * shrink, shrink, search.power_of(magnitude), weights
