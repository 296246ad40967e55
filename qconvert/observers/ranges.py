"""Observers of activations: batches in, bounded state, a range and its static scale and zero point
out.

A new observer is one class and one row of `OBSERVERS`. Two observers of one kind merge; only the
moving average depends on the order of its batches, and refuses to merge. The state of each is a few
arrays, exact integers or extremes, so that a run can be stopped, resumed and merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import UsageError
from qconvert.observers.exact import ExactSum
from qconvert.observers.statistics import bin_centres, bin_edges
from qconvert.ranges import DEFAULT_PERCENTILE

F32 = NDArray[np.float32]
Arrays = dict[str, NDArray[Any]]
CODES = 255  # steps of signed 8 bits
EMA_MOMENTUM = 0.9
SHRINKS = 1.0 - np.arange(40) / 50  # candidate ends of the mse observer: 1.00, 0.98, ... 0.22

LINEAR_BINS = 2048  # of the entropy observer, between the extremes
COARSE = 4  # of the entropy observer's candidates, every so many are tried first
FLOOR = 1e-6  # share of the mass of the codes' histogram that is spread evenly: no log of 0


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

    def state(self) -> Arrays:
        """All that `restore` needs, as arrays."""
        ...

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over a state.

        Raises:
            KeyError, ValueError: it is not one of this kind of observer.
        """
        ...


def _check_kind(a: object, b: object) -> None:
    if type(a) is not type(b):
        raise TypeError("only observers of one kind merge")


def _extremes(state: Mapping[str, NDArray[Any]]) -> tuple[float, float]:
    low, high = state["extremes"].tolist()
    if not (np.isfinite([low, high]).all() and low <= high):
        raise ValueError(f"extremes {low}, {high}")
    return float(low), float(high)


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

    def state(self) -> Arrays:
        return {"extremes": np.array([self.low, self.high])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.low, self.high = _extremes(state)


class EmaObserver:
    """Exponential moving average of each batch's extremes (Jacob et al. 2018, section 3.1); order
    matters.

    Args:
        momentum: share of the old average that a batch leaves, at least 0 and below 1.
    """

    def __init__(self, momentum: float = EMA_MOMENTUM) -> None:
        self.momentum = momentum
        self.low, self.high = np.nan, np.nan

    def update(self, batch: F32) -> None:
        low, high = float(batch.min()), float(batch.max())
        if np.isnan(self.low):
            self.low, self.high = low, high
            return
        self.low += (1 - self.momentum) * (low - self.low)
        self.high += (1 - self.momentum) * (high - self.high)

    def merge(self, other: Observer) -> None:
        raise UsageError(
            "moving averages of two runs cannot be merged",
            hint="use another --observer, or calibrate in one run",
        )

    def range(self) -> tuple[float, float]:
        return self.low, self.high

    def state(self) -> Arrays:
        return {"extremes": np.array([self.low, self.high])}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        self.low, self.high = _extremes(state)


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

    def range(self) -> tuple[float, float]:
        raise NotImplementedError

    def state(self) -> Arrays:
        used = np.flatnonzero(self.counts)
        found: Arrays = {"keys": used.astype(np.uint16), "counts": self.counts[used]}
        return self.extremes.state() | found

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        keys, counts = state["keys"], state["counts"]
        if keys.shape != counts.shape or keys.ndim != 1 or not (counts > 0).all():
            raise ValueError("counts of a histogram")
        if np.isnan(bin_centres()[keys]).any() or not (np.diff(keys.astype(np.int64)) > 0).all():
            raise ValueError("keys of a histogram")
        self.extremes.restore(state)
        self.counts[:] = 0
        self.counts[keys] = counts

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


class EntropyObserver(HistogramObserver):
    """Range that loses the least information: the Kullback-Leibler divergence of what the 8-bit
    codes can tell from the values' histogram, over shrinks of both ends, coarse to fine.

    As TensorRT does it (Migacz, GTC 2017), for asymmetric codes: P is the histogram in 2,048 equal
    bins, with all that a range cuts off added to its end bins; Q has the mass that lies inside the
    range, evened out over the used bins of each code. KL(P || Q) = Σ P ln(P / Q).
    """

    def range(self) -> tuple[float, float]:
        low, high = min(self.extremes.low, 0.0), max(self.extremes.high, 0.0)
        if low == high:
            return low, high
        mass = self._linear(low, high)
        centres = low + (np.arange(LINEAR_BINS) + 0.5) * ((high - low) / LINEAR_BINS)
        ends = SHRINKS.tolist()

        def lost(pair: tuple[int, int]) -> float:
            return divergence(mass, centres, low * ends[pair[0]], high * ends[pair[1]])

        # A fourth of the candidates each way, then all around the best of them.
        lows = range(0, len(ends), COARSE) if low < 0 else range(1)
        highs = range(0, len(ends), COARSE) if high > 0 else range(1)
        a, b = min(itertools.product(lows, highs), key=lost)
        near = itertools.product(
            range(max(a - COARSE + 1, 0), min(a + COARSE, len(ends))) if low < 0 else (0,),
            range(max(b - COARSE + 1, 0), min(b + COARSE, len(ends))) if high > 0 else (0,),
        )
        a, b = min(near, key=lost)
        return low * ends[a], high * ends[b]

    def _linear(self, low: float, high: float) -> NDArray[np.float64]:
        """The counts in equal bins of low..high: values spread evenly over each bin of the
        histogram.
        """
        used = np.flatnonzero(self.counts)
        below, above = bin_edges()
        order = np.argsort(below[used])
        starts = np.clip(below[used][order], low, high)
        stops = np.clip(above[used][order], low, high)
        sums = np.cumsum(self.counts[used][order])
        edges = np.stack([starts, stops], axis=1).ravel()
        totals = np.stack([np.r_[0, sums[:-1]], sums], axis=1).ravel()
        at = np.linspace(low, high, LINEAR_BINS + 1)
        reached = np.interp(at, edges, totals)
        reached[0] = 0  # several edges may lie on an end
        reached[-1] = sums[-1]
        return np.diff(reached)


def divergence(
    mass: NDArray[np.float64], centres: NDArray[np.floating[Any]], low: float, high: float
) -> float:
    """KL(P || Q) of a range low..high for counts ``mass`` in equal bins; see `EntropyObserver`."""
    r = static_range(low, high)
    codes = np.clip(np.rint(centres / r.scale + r.zero_point), -128, 127).astype(np.int64) + 128
    inside = (centres >= low) & (centres <= high)
    if not inside.any():
        return np.inf
    kept = np.where(inside, mass, 0)
    used = kept > 0
    first, last = np.flatnonzero(inside)[[0, -1]]
    p = kept.copy()
    p[first] += mass[:first].sum()
    p[last] += mass[last + 1 :].sum()
    per_code = np.bincount(codes, weights=kept, minlength=256)
    members = np.bincount(codes, weights=used, minlength=256)
    q = np.where(used, per_code[codes] / np.maximum(members[codes], 1), 0)
    if not q.any():
        return np.inf
    p = p / p.sum()
    q = (1 - FLOOR) * q / q.sum() + FLOOR * inside / inside.sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())


@dataclass(frozen=True, slots=True)
class ObserverSettings:
    """An observer by name, with its parameters.

    Attributes:
        name: of `OBSERVERS`.
        percentile: of the percentile observer, above 50, at most 100.
        momentum: of the moving average, at least 0 and below 1.
    """

    name: str = "minmax"
    percentile: float = DEFAULT_PERCENTILE
    momentum: float = EMA_MOMENTUM

    def make(self) -> Observer:
        """A fresh observer.

        Raises:
            UsageError: no observer of that name, or a parameter out of range.
        """
        if self.name not in OBSERVERS:
            raise UsageError(f"unknown observer '{self.name}'", wanted=", ".join(OBSERVERS))
        if not 50 < self.percentile <= 100:
            raise UsageError("--percentile", found=self.percentile, wanted="above 50, at most 100")
        if not 0 <= self.momentum < 1:
            raise UsageError("--momentum", found=self.momentum, wanted="at least 0, below 1")
        return OBSERVERS[self.name](self)


OBSERVERS: dict[str, Callable[[ObserverSettings], Observer]] = {
    "minmax": lambda _: MinMaxObserver(),
    "ema": lambda s: EmaObserver(s.momentum),
    "percentile": lambda s: PercentileObserver(s.percentile),
    "mse": lambda _: MseObserver(),
    "entropy": lambda _: EntropyObserver(),
}


class ChannelStatistics:
    """Minimum, maximum and exact sum of squares of each feature of (samples, features) batches."""

    def __init__(self, features: int) -> None:
        self.samples = 0
        self.low = np.full(features, np.inf, np.float32)
        self.high = np.full(features, -np.inf, np.float32)
        self.squares = ExactSum(features)

    def update(self, batch: F32) -> None:
        self.samples += len(batch)
        np.minimum(self.low, batch.min(axis=0), out=self.low)
        np.maximum(self.high, batch.max(axis=0), out=self.high)
        self.squares.add_squares(batch)

    def merge(self, other: ChannelStatistics) -> None:
        self.samples += other.samples
        np.minimum(self.low, other.low, out=self.low)
        np.maximum(self.high, other.high, out=self.high)
        self.squares.merge(other.squares)

    @property
    def mean_square(self) -> F32:
        return (self.squares.values() / max(self.samples, 1)).astype(np.float32)
