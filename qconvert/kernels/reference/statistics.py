"""What values are like, and how far others are from them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels import composed
from qconvert.kernels.arithmetic import HISTOGRAM_BINS, lane_sum
from qconvert.kernels.records import (
    F32,
    I32,
    Extent,
    Moments,
    Observed,
    PowerSums,
)

QUOTIENT = 2.0**-22  # error of a code's place, relative to the weight: quotients are in binary32


def observe(x: NDArray[np.floating[Any]]) -> Observed:
    """Counts and moments of a 1-d run of values, float32 or float64, finite or not."""
    finite = np.isfinite(x)
    bad = int(len(x) - np.count_nonzero(finite))
    first = int(np.argmin(finite)) if bad else None
    real = x[finite] if bad else x
    return Observed(
        size=len(x),
        nonfinite=bad,
        first_nonfinite=first,
        zeros=int(len(real) - np.count_nonzero(real)),
        moments=moments(real) if len(real) else None,
    )


@np.errstate(over="ignore", invalid="ignore")  # powers of large float64 values
def moments(x: NDArray[np.floating[Any]]) -> Moments:
    """Moments of a non-empty 1-d array of finite numbers, in float64."""
    values = x.astype(np.float64)
    count = len(values)
    mean = lane_sum(values) / count
    d = values - mean
    d2 = d * d
    return Moments(
        count=count,
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=mean,
        m2=lane_sum(d2),
        m3=lane_sum(d2 * d),
        m4=lane_sum(d2 * d2),
    )


def power_sums(x: F32, pivot: float) -> PowerSums:
    """Σd, Σd², Σd³ and Σd⁴ of the distances d = x - pivot of a 1-d array, in float64.

    One pass where `moments` takes two; exact enough for any pivot among the values.
    """
    d = x.astype(np.float64) - pivot
    d2 = d * d
    return lane_sum(d), lane_sum(d2), lane_sum(d2 * d), lane_sum(d2 * d2)


def all_finite(x: F32) -> bool:
    """Whether no value, of any shape, is NaN or Inf."""
    return bool(np.isfinite(x).all())


def histogram(x: F32) -> NDArray[np.int64]:
    """Counts of a 1-d float32 array by the upper 16 bits of each bit pattern (sign, exponent, 7
    bits).

    65,536 bins, exact for BF16 values and at most 1/128 wide, relative to the value, for others:
    no range to guess beforehand, so two histograms add.
    """
    keys = (x.view(np.uint32) >> 16).astype(np.intp)
    return np.bincount(keys, minlength=HISTOGRAM_BINS)


def extrema(x: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
    """Smallest and largest value of each row of (G, L), any L, and whether a zero is among them."""
    return x.min(axis=1), x.max(axis=1), (x == 0).any(axis=1)


def extent(x: F32, counts: I32 | None = None) -> Extent:
    """Extent of groups (G, L); padding zeros behind ``counts`` values do not count as zeros."""
    low, high, has_zero = extrema(x)
    if counts is not None:
        padding = np.count_nonzero(x == 0, axis=1) - (x.shape[1] - counts)
        has_zero = padding > 0
    zero = np.float32(0)
    return Extent(np.minimum(low, zero), np.maximum(high, zero), has_zero)


observe_groups = partial(composed.observe_groups, extrema)


@np.errstate(over="ignore", invalid="ignore")  # where a value was decoded to infinity
def error_sums(x: F32, decoded: F32) -> tuple[float, float, float]:
    """Σx², Σ(x - x')² and max |x - x'| of two arrays of one shape: differences in float32, sums in
    float64.
    """
    error = (x - decoded).astype(np.float64).ravel()
    worst = float(np.abs(error).max(initial=0.0))
    # In place, and one after the other: these are the largest arrays of a tile.
    noise = lane_sum(np.multiply(error, error, out=error))
    del error
    wide = x.astype(np.float64).ravel()
    return lane_sum(np.multiply(wide, wide, out=wide)), noise, worst


@np.errstate(over="ignore", invalid="ignore")  # where a value was decoded to infinity
@np.errstate(over="ignore", invalid="ignore")  # where a scale or a decoded value is not finite
def worst_step(
    weights: F32,
    values: F32,
    group: int,
    scale: F32,
    offset: F32 | None,
    zero: I32,
    code_step: int,
    low: int,
    high: int,
    scale_rounding: F32 | None,
    offset_rounding: F32 | None,
) -> tuple[float, bool]:
    """Largest |weight - value| in steps over the weights (R, C) that were not clipped, less what
    the rounding of scales and offsets and binary32 quotients may have added.

    Args:
        values: what they were decoded to, (R, C).
        group: columns of a group; the last of a row may be shorter.
        scale: of a step in each group, (R, G).
        offset: added to the values of each group, (R, G), or None.
        zero: zero point of each group, (R, G), in units that are ``code_step`` to a code.
        low, high: smallest and largest code, in those units.
        scale_rounding, offset_rounding: by how much scale and offset of each group may have been
            rounded, relative to them, after the codes were made, (R, G); None for not at all.

    Returns:
        The largest error, and whether a weight that is not 0 has a scale of 0; such groups have no
        step.
    """

    def by_column(of_groups: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(of_groups, min(group, columns), axis=1)[:, :columns]

    columns = weights.shape[1]
    # A quarter of a denormal scale is a number in binary64.
    unit = by_column(scale.astype(np.float64) / code_step)
    none = np.zeros_like(scale)
    start = by_column(none if offset is None else offset).astype(np.float64)
    of_scale = by_column(none if scale_rounding is None else scale_rounding).astype(np.float64)
    of_offset = by_column(none if offset_rounding is None else offset_rounding).astype(np.float64)
    w = weights.astype(np.float64)
    step = np.abs(unit) * code_step
    place = np.divide(w - start, unit, out=np.zeros_like(w), where=unit != 0) + by_column(zero)
    inside = (place >= low - code_step / 2) & (place <= high + code_step / 2) & (unit != 0)
    # The scale that made a code was s(1 ± r): half of its step, and the code times what is missing.
    rounding = (np.abs(values - start) + step / 2) * of_scale + np.abs(start) * of_offset
    error = np.abs(w - values) - ((np.abs(w) + np.abs(start)) * QUOTIENT + rounding + 2.0**-149)
    steps = np.divide(np.maximum(error, 0), step, out=np.zeros_like(w), where=inside)
    return float(steps.max(initial=0.0)), bool(((unit == 0) & (w != 0)).any())
