"""Observers of activations: batches in, bounded state, a range and its static scale and zero point
out.

A new observer is one class and one row of `OBSERVERS`. Two observers of one kind merge; only the
moving average depends on the order of its batches, and refuses to merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import UsageError
from qconvert.observers.statistics import bin_centres

F32 = NDArray[np.float32]
CODES = 255  # steps of signed 8 bits
EMA_MOMENTUM = 0.9
SHRINKS = 1.0 - np.arange(40) / 50  # candidate ends of the mse observer: 1.00, 0.98, ... 0.22


@dataclass(frozen=True, slots=True)
class StaticRange:
    """Static activation parameters: a = clamp(rint(x / scale + zero_point), -128, 127).

    Attributes:
        low, high: the range that the codes cover, 0 included.
        scale: the shortest decimal of a binary32 number, above 0.
        zero_point: -128..127.
    """

    low: float
    high: float
    scale: float
    zero_point: int


def static_range(low: float, high: float) -> StaticRange:
    """Signed 8-bit asymmetric parameters of a range; formats/schemes/SPEC.md section 7."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / CODES)
    if scale == 0:
        return StaticRange(low, high, 1.0, 0)
    zero_point = int(np.clip(np.rint(-128 - low / float(scale)), -128, 127))
    return StaticRange(low, high, float(str(scale)), zero_point)


class Observer(Protocol):
    """A stream of batches (samples, features), float32, to a range."""

    def update(self, batch: F32) -> None: ...

    def merge(self, other: Observer) -> None: ...

    def range(self) -> tuple[float, float]: ...


def _check_kind(a: object, b: object) -> None:
    if type(a) is not type(b):
        raise TypeError("only observers of one kind merge")


class MinMaxObserver:
    """The smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def update(self, batch: F32) -> None:
        self.low = min(self.low, float(batch.min()))
        self.high = max(self.high, float(batch.max()))

    def merge(self, other: Observer) -> None:
        _check_kind(self, other)
        low, high = other.range()
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class EmaObserver:
    """Exponential moving average of each batch's extremes (Jacob et al. 2018, section 3.1); order
    matters.
    """

    def __init__(self) -> None:
        self.low, self.high = np.nan, np.nan

    def update(self, batch: F32) -> None:
        low, high = float(batch.min()), float(batch.max())
        if np.isnan(self.low):
            self.low, self.high = low, high
            return
        self.low += (1 - EMA_MOMENTUM) * (low - self.low)
        self.high += (1 - EMA_MOMENTUM) * (high - self.high)

    def merge(self, other: Observer) -> None:
        raise UsageError(
            "moving averages of two runs cannot be merged",
            hint="use --observer minmax, percentile or mse, or calibrate in one run",
        )

    def range(self) -> tuple[float, float]:
        return self.low, self.high


class HistogramObserver:
    """Base of observers that keep counts by the upper 16 bits of the float32 pattern.

    65,536 exact counts whatever the range, each bin at most 1/128 of its value wide: no
    re-binning, 512 KiB.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(kernels.HISTOGRAM_BINS, np.int64)
        self.extremes = MinMaxObserver()

    def update(self, batch: F32) -> None:
        self.counts += kernels.histogram(np.ascontiguousarray(batch).ravel())
        self.extremes.update(batch)

    def merge(self, other: Observer) -> None:
        _check_kind(self, other)
        assert isinstance(other, HistogramObserver)
        self.counts += other.counts
        self.extremes.merge(other.extremes)

    def _ascending(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Bin centres, clipped to the extremes, and counts of the bins in use, by value."""
        used = np.flatnonzero(self.counts)
        centres = bin_centres()[used]
        order = np.argsort(centres)
        low, high = self.extremes.range()
        return np.clip(centres[order], low, high), self.counts[used][order]


class PercentileObserver(HistogramObserver):
    """Range between the percentiles 100 - p and p of all values; exact to the width of a bin
    (1/128).
    """

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def range(self) -> tuple[float, float]:
        centres, counts = self._ascending()
        edges = np.cumsum(counts)
        rank = max(int(np.ceil(self.percentile / 100 * edges[-1])), 1)
        high = centres[np.searchsorted(edges, rank)]
        low = centres[np.searchsorted(edges, edges[-1] - rank + 1)]
        return float(low), float(high)


class MseObserver(HistogramObserver):
    """Range whose 8-bit grid has the least squared error on the histogram, over shrinks of both
    ends.
    """

    def range(self) -> tuple[float, float]:
        centres, counts = self._ascending()
        low, high = min(self.extremes.low, 0.0), max(self.extremes.high, 0.0)
        best, found = np.inf, (low, high)
        for a in SHRINKS if low < 0 else (1.0,):
            for b in SHRINKS if high > 0 else (1.0,):
                r = static_range(low * a, high * b)
                codes = np.clip(np.rint(centres / r.scale + r.zero_point), -128, 127)
                error = (codes - r.zero_point) * r.scale - centres
                noise = float((counts * error * error).sum())
                if noise < best:
                    best, found = noise, (low * a, high * b)
        return found


OBSERVERS: dict[str, Callable[[float], Observer]] = {
    "minmax": lambda _: MinMaxObserver(),
    "ema": lambda _: EmaObserver(),
    "percentile": PercentileObserver,
    "mse": lambda _: MseObserver(),
}


def make_observer(name: str, percentile: float) -> Observer:
    """A fresh observer by name.

    Raises:
        UsageError: no observer of that name.
    """
    if name not in OBSERVERS:
        raise UsageError(f"unknown observer '{name}'", wanted=", ".join(OBSERVERS))
    return OBSERVERS[name](percentile)


class ChannelStatistics:
    """Minimum, maximum and mean square of each feature of (samples, features) batches."""

    def __init__(self, features: int) -> None:
        self.samples = 0
        self.low = np.full(features, np.inf, np.float32)
        self.high = np.full(features, -np.inf, np.float32)
        self.square = np.zeros(features)

    def update(self, batch: F32) -> None:
        self.samples += len(batch)
        np.minimum(self.low, batch.min(axis=0), out=self.low)
        np.maximum(self.high, batch.max(axis=0), out=self.high)
        wide = batch.astype(np.float64)
        self.square += (wide * wide).sum(axis=0)

    @property
    def mean_square(self) -> F32:
        return (self.square / max(self.samples, 1)).astype(np.float32)
