"""Statistics of a tensor in one pass: moments, histogram, zeros, non-finite values.

They take tiles in any number and merge; merging in tile order gives the same bits for any number of
threads.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.kernels.arithmetic import HISTOGRAM_BINS
from qconvert.kernels.bins import bin_centres, bin_starts
from qconvert.kernels.records import Moments, merge_moments
from qconvert.report.inspect import PERCENTILES

OUTLIER_SIGMAS = 4.0  # a Gaussian has 6.3e-5 of its values beyond
PERCENTILE_ERROR = 2.0**-8  # of a percentile at most, relative to it: half a bin of the histogram
EXACT_DTYPES = ("BF16", "F8_E4M3", "F8_E5M2")  # whose values each have a bin of their own
NEAR_ZERO = 1 / 254  # of the largest magnitude: what 8 bits with one scale for all round to 0
_THOUSANDTHS = tuple(round(10 * float(p)) for p in PERCENTILES)
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

    @property
    def crest(self) -> float | None:
        """Largest magnitude by the root mean square."""
        m = self.moments
        if m is None or not self.absmax:
            return None
        rms = math.sqrt(m.square_sum / m.count)
        return self.absmax / rms if 0 < rms < math.inf else None

    @property
    def near_zero_share(self) -> float | None:
        """Share of values below `NEAR_ZERO` of the largest magnitude, by whole histogram bins."""
        if self.moments is None or not self.absmax:
            return None
        most = NEAR_ZERO * self.absmax
        if self.patterns is not None:
            small = np.abs(bin_centres()[self.patterns]) < most
            return int(np.count_nonzero(small)) / self.moments.count
        return int(self.histogram[np.abs(bin_centres()) < most].sum()) / self.moments.count

    def percentiles(self, dtype: str) -> dict[str, float] | None:
        """The least value that is not below so many percent of the values, for `PERCENTILES`.

        Exact for `EXACT_DTYPES`, else within `PERCENTILE_ERROR`.
        """
        m = self.moments
        if m is None:
            return None
        ranks = [-(-part * m.count // 1000) for part in _THOUSANDTHS]
        order = _ascending()
        if self.patterns is not None:
            bins = np.sort(_places()[self.patterns])
            places = bins[np.array(ranks) - 1]
        else:
            places = np.searchsorted(np.cumsum(self.histogram[order]), ranks)
        values = bin_starts() if dtype in EXACT_DTYPES else bin_centres()
        found = np.clip(values[order[places]], m.minimum, m.maximum)
        # Beyond binary32 bins have no centre.
        ends = np.where(order[places] >> 15, m.minimum, m.maximum)
        found = np.where(np.isfinite(found), found, ends)
        return {p: float(v) for p, v in zip(PERCENTILES, found, strict=True)}


@functools.cache
def _ascending() -> NDArray[np.int64]:
    """Histogram bins from the lowest value to the highest."""
    half = HISTOGRAM_BINS // 2
    return np.concatenate([np.arange(HISTOGRAM_BINS - 1, half - 1, -1), np.arange(half)])


@functools.cache
def _places() -> NDArray[np.int64]:
    """Where in `_ascending` each bin is."""
    return np.argsort(_ascending())


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
