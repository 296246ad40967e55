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
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.calibration.exact import HEAVIEST, LIGHTEST, ExactSum, WeightedCounts
from qconvert.calibration.grid import StaticRange, best_ends, noise, static_range
from qconvert.errors import UsageError
from qconvert.kernels.arithmetic import HISTOGRAM_BINS
from qconvert.kernels.bins import bin_centres, bin_edges
from qconvert.ranges import DEFAULT_PERCENTILE

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]
DEFAULT_OBSERVER = "nmse"
EMA_MOMENTUM = 0.9

SHRINKS = [1 - k / 50 for k in range(40)]  # ends that the entropy observer tries
COARSE = 4  # of them, every so many are tried first
LINEAR_BINS = 2048  # of the entropy observer, between the extremes
BLOCK_VALUES = 1 << 18  # of the nmse observer, at a time
COLUMN_OCTAVES = 24  # no column counts less than 2^-24 of the heaviest
ROW_OCTAVES = 8  # of the weights of rows that are added together
MOST_VALUE = float(np.finfo(np.float32).max)  # of what an observer sees
MOST_VALUES = 2.0**62  # in a histogram from a file: two fit together
SILENT = 1 << 20  # no group: rows of zeros
FLOOR = 1e-6  # share of the mass of the codes' histogram that is spread evenly: no log of 0


class Observer(Protocol):
    """A stream of batches (samples, features), float32, to a range."""

    def update(self, batch: F32) -> None:
        """Take in a batch, finite and not empty."""
        ...

    def merge(self, other: Observer) -> None:
        """Take in all that another one of the same kind and settings has seen.

        Raises:
            TypeError: it is of another kind.
            UsageError: the order of batches matters to this kind.
        """
        ...

    def range(self) -> tuple[float, float]:
        """Both ends of what the codes should cover, after at least one batch."""
        ...

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
    if not -MOST_VALUE <= low <= high <= MOST_VALUE:
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
        self.counts = np.zeros(HISTOGRAM_BINS, np.int64)
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
        if counts.sum(dtype=np.float64) > MOST_VALUES:
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
    """Range whose 8-bit grid has the least squared error on the histogram.

    Args:
        symmetric: whether the grid is.
    """

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        centres, counts = self._ascending()
        weights = counts.astype(np.float64)

        def cost(low: float, high: float) -> float:
            return noise(centres, weights, static_range(low, high, symmetric=self.symmetric))

        return best_ends(*self.extremes.range(), cost, symmetric=self.symmetric)


class EntropyObserver(HistogramObserver):
    """Range that loses the least information: the Kullback-Leibler divergence of what the 8-bit
    codes can tell from the values' histogram, over shrinks of both ends.

    As TensorRT does it (Migacz, GTC 2017), for asymmetric codes too: P is the histogram in 2,048
    equal bins, with all that a range cuts off added to its end bins; Q has the mass that lies
    inside the range, evened out over the used bins of each code. KL(P || Q) = Σ P ln(P / Q).

    Args:
        symmetric: whether the grid is.
    """

    def __init__(self, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric

    def range(self) -> tuple[float, float]:
        low, high = min(self.extremes.low, 0.0), max(self.extremes.high, 0.0)
        if low == high:
            return low, high
        mass = self._linear(low, high)
        centres = low + (np.arange(LINEAR_BINS) + 0.5) * ((high - low) / LINEAR_BINS)

        bottom, top = (-max(-low, high), max(-low, high)) if self.symmetric else (low, high)
        join = partial(zip, strict=True) if self.symmetric else itertools.product

        def lost(pair: tuple[float, float]) -> float:
            r = static_range(bottom * pair[0], top * pair[1], symmetric=self.symmetric)
            return divergence(mass, centres, r)

        # A fourth of the candidates each way, then all around the best of them.
        whole = [1.0]
        coarse = SHRINKS[::COARSE]
        best = min(join(coarse if bottom else whole, coarse if top else whole), key=lost)
        near = [SHRINKS[max(k - COARSE + 1, 0) : k + COARSE] for k in map(SHRINKS.index, best)]
        best = min(join(near[0] if bottom else whole, near[1] if top else whole), key=lost)
        return bottom * best[0], top * best[1]

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
    mass: NDArray[np.float64], centres: NDArray[np.floating[Any]], r: StaticRange
) -> float:
    """KL(P || Q) of a range for counts ``mass`` in equal bins; see `EntropyObserver`."""
    codes = np.clip(np.rint(centres / r.scale + r.zero_point), -128, 127).astype(np.int64) + 128
    inside = (centres >= r.low) & (centres <= r.high)
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


class NmseObserver:
    """Range with the least relative error of the layer's output, the mean over its rows.

    A row x that becomes x' spoils the output W x by W (x' - x). With errors that have nothing to do
    with each other, the square of that is Σ_c n_c (x'_c - x_c)², n_c = Σ_r W[r,c]², out of
    Σ_c n_c x_c²: a value counts by the column of the weight that it meets, and every row as much
    as any other. Plain squared error is that of the few rows and channels of large values, whose
    errors a normalisation further on, or small weights, make good again.

    Both factors are rounded to powers of two, so that the sums are exact. Memory: 3 MiB.

    Args:
        norms: n, (features,), finite and not negative; None for ones.
        symmetric: whether the grid is.
    """

    def __init__(self, norms: F64 | None = None, *, symmetric: bool = False) -> None:
        self.symmetric = symmetric
        self.extremes = MinMaxObserver()
        self.weighted = WeightedCounts(HISTOGRAM_BINS)
        self._used: NDArray[np.bool_] | None = None
        self._norms: F64 | None = None
        if norms is not None and norms.any():
            if not norms.all():
                self._used = norms > 0
                norms = norms[self._used]
            exponents = np.frexp(norms)[1]
            exponents = np.maximum(exponents - exponents.max(), -COLUMN_OCTAVES)
            self._norms = np.ldexp(1.0, exponents)

    def update(self, batch: F32) -> None:
        self.extremes.update(batch)
        step = max(1, BLOCK_VALUES // batch.shape[1])
        for row in range(0, len(batch), step):
            rows = batch[row : row + step]
            self._add(np.ascontiguousarray(rows if self._used is None else rows[:, self._used]))

    def _add(self, rows: F32) -> None:
        squares = rows.astype(np.float64)
        squares *= squares
        if self._norms is not None:
            squares *= self._norms
        energy = squares.sum(axis=1)
        exponents = np.clip(-np.frexp(energy)[1], LIGHTEST + COLUMN_OCTAVES, HEAVIEST)
        groups = np.where(energy > 0, exponents // ROW_OCTAVES, SILENT)
        keys = (rows.view(np.uint32) >> 16).astype(np.intp)
        for group in np.unique(groups[groups != SILENT]).tolist():
            here = groups == group
            base = group * ROW_OCTAVES - COLUMN_OCTAVES
            # Integers, the largest below 2^32: their sum is exact.
            weights = np.ldexp(1.0, exponents[here] - base)[:, None]
            norms = 1.0 if self._norms is None else self._norms
            chosen = keys if here.all() else keys[here]
            self.weighted.add(chosen, np.broadcast_to(weights * norms, chosen.shape), base)

    def merge(self, other: Observer) -> None:
        _check_kind(self, other)
        assert isinstance(other, NmseObserver)
        self.weighted.merge(other.weighted)
        self.extremes.merge(other.extremes)

    def range(self) -> tuple[float, float]:
        used, weights = self.weighted.values()
        if not len(used):
            return self.extremes.range()
        centres = np.clip(bin_centres()[used], *self.extremes.range())

        def cost(low: float, high: float) -> float:
            return noise(centres, weights, static_range(low, high, symmetric=self.symmetric))

        return best_ends(*self.extremes.range(), cost, symmetric=self.symmetric)

    def state(self) -> Arrays:
        keys, limbs = self.weighted.packed()
        return self.extremes.state() | {"keys": keys, "weights": limbs}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        keys = state["keys"]
        if np.isnan(bin_centres()[keys]).any():
            raise ValueError("keys of a histogram")
        self.extremes.restore(state)
        self.weighted.unpack(keys, state["weights"])


@dataclass(frozen=True, slots=True)
class ObserverSettings:
    """An observer by name, with its parameters.

    Attributes:
        name: of `OBSERVERS`.
        percentile: of the percentile observer, above 50, at most 100.
        momentum: of the moving average, at least 0 and below 1.
        symmetric: whether activations get zero point 0.
    """

    name: str = DEFAULT_OBSERVER
    percentile: float = DEFAULT_PERCENTILE
    momentum: float = EMA_MOMENTUM
    symmetric: bool = False

    def make(self, norms: F64 | None = None) -> Observer:
        """A fresh observer.

        Args:
            norms: squared, of the columns of the layer's weight, for those of
                `READ_WEIGHTS`; None takes all as equal.

        Raises:
            UsageError: no observer of that name, or a parameter out of range.
        """
        if self.name not in OBSERVERS:
            raise UsageError(f"unknown observer '{self.name}'", wanted=", ".join(OBSERVERS))
        if not 50 < self.percentile <= 100:
            raise UsageError("--percentile", found=self.percentile, wanted="above 50, at most 100")
        if not 0 <= self.momentum < 1:
            raise UsageError("--momentum", found=self.momentum, wanted="at least 0, below 1")
        return OBSERVERS[self.name](self, norms)

    def settle(self, observer: Observer) -> StaticRange:
        """The parameters of what an observer of these settings has seen."""
        return static_range(*observer.range(), symmetric=self.symmetric)


OBSERVERS: dict[str, Callable[[ObserverSettings, F64 | None], Observer]] = {
    "minmax": lambda s, _: MinMaxObserver(),
    "ema": lambda s, _: EmaObserver(s.momentum),
    "percentile": lambda s, _: PercentileObserver(s.percentile),
    "mse": lambda s, _: MseObserver(symmetric=s.symmetric),
    "entropy": lambda s, _: EntropyObserver(symmetric=s.symmetric),
    "nmse": lambda s, norms: NmseObserver(norms, symmetric=s.symmetric),
}
READ_WEIGHTS = frozenset({"nmse"})  # observers that want the norms of the weight's columns


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
        """Of each channel; the largest binary32 number where it is beyond that."""
        mean = self.squares.values() / max(self.samples, 1)
        return np.minimum(mean, np.finfo(np.float32).max).astype(np.float32)
