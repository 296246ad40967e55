"""Statistics of a tensor in one pass: moments, histogram, zeros, non-finite values, and ranges per
group.

Both classes take tiles in any number and merge; merging in tile order gives the same bits for any
number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.kernels import Moments
from qconvert.quantizers.affine import to_groups

OUTLIER_SIGMAS = 4.0  # a Gaussian has 6.3e-5 of its values beyond


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Statistics of numbers, finite ones unless said otherwise.

    Attributes:
        size: all values.
        nonfinite: NaN and Inf values.
        first_nonfinite: index of the first of them in the flattened tensor, or None.
        zeros: values equal to 0.
        moments: None when no value is finite.
        histogram: counts by the upper 16 bits of the float32 pattern, (65536,) int64.
    """

    size: int
    nonfinite: int
    first_nonfinite: int | None
    zeros: int
    moments: Moments | None
    histogram: NDArray[np.int64]

    @property
    def minimum(self) -> float | None:
        return self.moments.minimum if self.moments else None

    @property
    def maximum(self) -> float | None:
        return self.moments.maximum if self.moments else None

    @property
    def absmax(self) -> float | None:
        return max(-self.moments.minimum, self.moments.maximum) if self.moments else None

    @property
    def mean(self) -> float | None:
        return self.moments.mean if self.moments else None

    @property
    def std(self) -> float | None:
        """Population standard deviation."""
        return _finite(math.sqrt(self.moments.m2 / self.moments.count)) if self.moments else None

    @property
    def skewness(self) -> float | None:
        """Third standardised moment; None when all values are equal."""
        m = self.moments
        if m is None or m.m2 <= 0:
            return None
        return _finite(math.sqrt(m.count / m.m2) * (m.m3 / m.m2))

    @property
    def kurtosis(self) -> float | None:
        """Fourth standardised moment, 3 for a Gaussian; None when all values are equal."""
        m = self.moments
        if m is None or m.m2 <= 0:
            return None
        return _finite(m.count * (m.m4 / m.m2) / m.m2)

    @property
    def asymmetry(self) -> float | None:
        """(max + min) / (max - min): 0 for a symmetric range, ±1 when zero is an end of it."""
        m = self.moments
        if m is None:
            return None
        low, high = min(m.minimum, 0.0), max(m.maximum, 0.0)
        return (high + low) / (high - low) if high > low else 0.0

    @property
    def outlier_share(self) -> float | None:
        """Share of values more than 4 standard deviations from the mean, by whole histogram
        bins.
        """
        m, std = self.moments, self.std
        if m is None or not std:
            return None
        centres = bin_centres()
        beyond = np.abs(centres - m.mean) > OUTLIER_SIGMAS * std
        return int(self.histogram[beyond].sum()) / m.count


def _finite(value: float) -> float | None:
    """None for what overflowed on the way: float64 weights may be as far from 1 as they like."""
    return value if math.isfinite(value) else None


def bin_centres() -> NDArray[np.float64]:
    """The middle of each histogram bin; NaN for the patterns of Inf and NaN."""
    keys = np.arange(kernels.HISTOGRAM_BINS, dtype=np.uint32)
    finite = keys & 0x7F80 != 0x7F80
    centres = np.full(len(keys), np.nan)
    centres[finite] = ((keys[finite] << 16) | 0x8000).view(np.float32)
    return centres


def observe(x: NDArray[np.floating[Any]], start: int = 0) -> TensorStatistics:
    """Statistics of a 1-d run of values that begins at index ``start`` of its tensor."""
    if kernels.fused is not None:
        return _observe_fused(x, start)
    finite = np.isfinite(x)
    first = None
    bad = int(len(x) - np.count_nonzero(finite))
    if bad:
        first = start + int(np.argmin(finite))
        x = x[finite]
    with np.errstate(over="ignore"):  # float64 beyond float32 lands in the bin of Inf
        narrow = x.astype(np.float32)
    return TensorStatistics(
        size=len(finite),
        nonfinite=bad,
        first_nonfinite=first,
        zeros=int(len(x) - np.count_nonzero(x)),
        moments=kernels.moments(x) if len(x) else None,
        histogram=kernels.histogram(narrow),
    )


def _observe_fused(x: NDArray[np.floating[Any]], start: int) -> TensorStatistics:
    """`observe` with native kernels."""
    assert kernels.fused is not None
    found = kernels.fused.observe(x)
    first = found.first_nonfinite
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32, copy=False)
    if found.nonfinite:
        narrow = narrow[np.isfinite(x)]
    return TensorStatistics(
        size=found.size,
        nonfinite=found.nonfinite,
        first_nonfinite=None if first is None else start + first,
        zeros=found.zeros,
        moments=found.moments,
        histogram=kernels.histogram(narrow),
    )


def merge(a: TensorStatistics, b: TensorStatistics) -> TensorStatistics:
    """Statistics of the values of ``a`` followed by those of ``b``."""
    return TensorStatistics(
        size=a.size + b.size,
        nonfinite=a.nonfinite + b.nonfinite,
        first_nonfinite=b.first_nonfinite if a.first_nonfinite is None else a.first_nonfinite,
        zeros=a.zeros + b.zeros,
        moments=_merge_moments(a.moments, b.moments),
        histogram=a.histogram + b.histogram,
    )


def _merge_moments(a: Moments | None, b: Moments | None) -> Moments | None:
    """Pairwise update of central moments: Pébay, SAND2008-6212, equations 2.1 and 3.1."""
    if a is None or b is None:
        return b if a is None else a
    n = a.count + b.count
    d = b.mean - a.mean
    dn = d / n
    ab = a.count * b.count
    return Moments(
        count=n,
        minimum=min(a.minimum, b.minimum),
        maximum=max(a.maximum, b.maximum),
        mean=a.mean + b.count * dn,
        m2=a.m2 + b.m2 + d * dn * ab,
        m3=a.m3
        + b.m3
        + d * dn * dn * ab * (a.count - b.count)
        + 3 * dn * (a.count * b.m2 - b.count * a.m2),
        m4=a.m4
        + b.m4
        + d * dn * dn * dn * ab * (a.count * a.count - ab + b.count * b.count)
        + 6 * dn * dn * (a.count * a.count * b.m2 + b.count * b.count * a.m2)
        + 4 * dn * (a.count * b.m3 - b.count * a.m3),
    )


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Ranges of the groups (blocks or rows) that would share a scale.

    Attributes:
        symmetric_power: Σ over groups of the squared step that a symmetric grid needs, in units of
            the value.
        asymmetric_power: the same for an asymmetric grid.
        smallest, largest: smallest and largest magnitude of a group that is not all zeros; inf and
            0 if none.
    """

    symmetric_power: float
    asymmetric_power: float
    smallest: float
    largest: float

    def __add__(self, other: GroupStatistics) -> GroupStatistics:
        return GroupStatistics(
            self.symmetric_power + other.symmetric_power,
            self.asymmetric_power + other.asymmetric_power,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )

    @property
    def step_ratio_db(self) -> float:
        """How much finer the asymmetric grid is, in dB of noise: 10 log10 of the ratio of
        powers.
        """
        if self.asymmetric_power <= 0:
            return 0.0
        return 10 * math.log10(self.symmetric_power / self.asymmetric_power)


EMPTY_GROUPS = GroupStatistics(0.0, 0.0, math.inf, 0.0)


def observe_groups(
    rows: NDArray[np.float32], encoding: AffineEncoding, search: bool
) -> GroupStatistics:
    """Group ranges of rows (R, c), for the granularity and width of ``encoding``.

    Args:
        search: whether the symmetric grid may use its extra code on either side (the mse method
            below 8 bits).
    """
    groups, _ = to_groups(rows, encoding)
    low, high, _ = kernels.extrema(groups)
    down = np.maximum(-low.astype(np.float64), 0)
    up = np.maximum(high.astype(np.float64), 0)
    magnitude = np.maximum(down, up)
    top = (1 << (encoding.bits - 1)) - 1
    if search and encoding.bits < 8:
        either = np.minimum(
            np.maximum(down / (top + 1), up / top), np.maximum(up / (top + 1), down / top)
        )
    else:
        either = magnitude / top
    asymmetric = (down + up) / encoding.levels
    present = magnitude[magnitude > 0]
    return GroupStatistics(
        symmetric_power=kernels.lane_sum(either * either),
        asymmetric_power=kernels.lane_sum(asymmetric * asymmetric),
        smallest=float(present.min()) if len(present) else math.inf,
        largest=float(present.max()) if len(present) else 0.0,
    )
