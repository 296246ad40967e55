"""Statistics of a tensor in one pass: moments, histogram, zeros, non-finite values.

They take tiles in any number and merge; merging in tile order gives the same bits for any number of
threads.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.kernels.arithmetic import HISTOGRAM_BINS
from qconvert.kernels.records import Moments, merge_moments

OUTLIER_SIGMAS = 4.0  # a Gaussian has 6.3e-5 of its values beyond
FEW_VALUES = 1 << 14  # up to so many, their patterns are kept instead of 65,536 counts


def outlier_bounds(moments: Moments) -> tuple[float, float]:
    """4 standard deviations below and above the mean."""
    reach = OUTLIER_SIGMAS * (moments.std or 0.0)
    return moments.mean - reach, moments.mean + reach


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Statistics of numbers, finite ones unless said otherwise.

    Attributes:
        size: all values.
        nonfinite: NaN and Inf values.
        first_nonfinite: index of the first of them in the flattened tensor, or None.
        zeros: values equal to 0.
        moments: None when no value is finite.
        patterns: the upper 16 bits of the float32 pattern of each finite value, uint16, where they
            are few; else None.
        counts: of these patterns, (65536,) int64, where the values are many; else None.
    """

    size: int
    nonfinite: int
    first_nonfinite: int | None
    zeros: int
    moments: Moments | None
    patterns: NDArray[np.uint16] | None
    counts: NDArray[np.int64] | None

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Counts by the upper 16 bits of the float32 pattern, (65536,)."""
        if self.counts is not None:
            return self.counts
        assert self.patterns is not None
        return np.bincount(self.patterns, minlength=HISTOGRAM_BINS)

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
        return self.moments.std if self.moments else None

    @property
    def skewness(self) -> float | None:
        return self.moments.skewness if self.moments else None

    @property
    def kurtosis(self) -> float | None:
        return self.moments.kurtosis if self.moments else None

    @property
    def outlier_share(self) -> float | None:
        """Share of values more than 4 standard deviations from the mean, by whole histogram
        bins.
        """
        m, std = self.moments, self.std
        if m is None or not std:
            return None
        if self.patterns is not None:
            beyond = np.abs(bin_centres()[self.patterns] - m.mean) > OUTLIER_SIGMAS * std
            return int(np.count_nonzero(beyond)) / m.count
        beyond = np.abs(bin_centres() - m.mean) > OUTLIER_SIGMAS * std
        return int(self.histogram[beyond].sum()) / m.count


@functools.cache
def bin_centres() -> NDArray[np.float64]:
    """The middle of each histogram bin, read-only; NaN for the patterns of Inf and NaN."""
    keys = np.arange(HISTOGRAM_BINS, dtype=np.uint32)
    finite = keys & 0x7F80 != 0x7F80
    centres = np.full(len(keys), np.nan)
    centres[finite] = ((keys[finite] << 16) | 0x8000).view(np.float32)
    centres.flags.writeable = False
    return centres


def bin_edges() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smallest and largest end of each histogram bin; NaN for the patterns of Inf and NaN."""
    keys = np.arange(HISTOGRAM_BINS, dtype=np.uint32)
    finite = keys & 0x7F80 != 0x7F80
    near = np.full(len(keys), np.nan)
    near[finite] = (keys[finite] << 16).view(np.float32)
    width = np.abs(bin_centres() - near) * 2
    negative = keys >= len(keys) // 2
    return np.where(negative, near - width, near), np.where(negative, near, near + width)


def observe(x: NDArray[np.floating[Any]], start: int = 0) -> TensorStatistics:
    """Statistics of a 1-d run of values that begins at index ``start`` of its tensor."""
    found = kernels.observe(x)
    first = found.first_nonfinite
    with np.errstate(over="ignore"):  # float64 beyond float32 lands in the bin of Inf
        narrow = x.astype(np.float32, copy=False)
    if found.nonfinite:
        narrow = narrow[np.isfinite(x)]
    return TensorStatistics(
        size=found.size,
        nonfinite=found.nonfinite,
        first_nonfinite=None if first is None else start + first,
        zeros=found.zeros,
        moments=found.moments,
        **_patterns_or_counts(narrow),
    )


def _patterns_or_counts(x: NDArray[np.float32]) -> dict[str, Any]:
    """These fields of `TensorStatistics` for finite values."""
    if len(x) > FEW_VALUES:
        return {"patterns": None, "counts": kernels.histogram(x)}
    return {"patterns": (x.view(np.uint32) >> 16).astype(np.uint16), "counts": None}


def merge(a: TensorStatistics, b: TensorStatistics) -> TensorStatistics:
    """Statistics of the values of ``a`` followed by those of ``b``."""
    return TensorStatistics(
        size=a.size + b.size,
        nonfinite=a.nonfinite + b.nonfinite,
        first_nonfinite=b.first_nonfinite if a.first_nonfinite is None else a.first_nonfinite,
        zeros=a.zeros + b.zeros,
        moments=merge_moments(a.moments, b.moments),
        patterns=None,
        counts=a.histogram + b.histogram,
    )
