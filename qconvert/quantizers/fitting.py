"""Choosing scale and zero point of a group of values: minmax, percentile, least squared error.

formats/schemes/SPEC.md section 5. `fit` takes whole groups; `fit_stream` one group that is too
long for a tile and comes in pieces, several times over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.mapper import Mapper
from qconvert.quantizers.affine import Parameters, round_scale
from qconvert.quantizers.search_sums import (
    BATCH,
    PIECE,
    Candidate,
    Load,
    Sums,
    SumSource,
    group_sums,
    stream_sums,
    weighted_group_sums,
)
from qconvert.quantizers.weighting import Weighting
from qconvert.ranges import ZERO_MOVE, RangeMethod, SearchGrid, search_grid

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
Bools = NDArray[np.bool_]

HUGE = np.float32(2.0**110)  # above, sums overflow: likewise
TINY = np.float32(2.0**-100)  # below, reciprocals overflow: such groups take their minmax range


@dataclass(frozen=True, slots=True)
class Extent:
    """The range of each group, 0 included: float32 (G,) each.

    Attributes:
        low, high: low <= 0 <= high.
        has_zero: whether a value of the group is exactly 0, which must stay 0.
    """

    low: F32
    high: F32
    has_zero: Bools

    @property
    def magnitude(self) -> F32:
        return np.maximum(-self.low, self.high) + np.float32(0)  # never -0: a scale comes of it


def extent(x: F32, counts: I32 | None = None) -> Extent:
    """Extent of groups (G, L); padding zeros behind ``counts`` values do not count as zeros."""
    if kernels.fused is not None:
        return Extent(*kernels.fused.extent(x, counts))
    low, high, has_zero = kernels.extrema(x)
    if counts is not None:
        padding = np.count_nonzero(x == 0, axis=1) - (x.shape[1] - counts)
        has_zero = padding > 0
    zero = np.float32(0)
    return Extent(np.minimum(low, zero), np.maximum(high, zero), has_zero)


def minmax(e: Extent, encoding: AffineEncoding) -> Parameters:
    """Parameters that cover the extent."""
    if encoding.symmetric:
        scale = e.magnitude / np.float32((1 << (encoding.bits - 1)) - 1)
        stored = round_scale(scale, encoding.scale_dtype, e.magnitude)
        return Parameters(stored, np.zeros(len(stored), np.int32))
    n = np.float32(encoding.levels)
    stored = round_scale(e.high / n - e.low / n, encoding.scale_dtype, e.magnitude)
    divisor = np.where(stored == 0, np.float32(1), stored)
    return Parameters(stored, _zero_point(-e.low / divisor, e.has_zero, encoding))


def _zero_point(real: NDArray[np.floating], has_zero: Bools, encoding: AffineEncoding) -> I32:
    """Zero steps nearest to a real zero point; whole codes where a zero must stay zero."""
    steps = kernels.zero_steps(encoding.bits)
    fine = np.rint(real * steps)
    whole = np.rint(real) * steps
    top = encoding.levels * steps
    steps_found: I32 = np.clip(np.where(has_zero, whole, fine), 0, top).astype(np.int32)
    return steps_found


def percentile_extent(x: F32, percent: float, whole: Extent, counts: I32 | None = None) -> Extent:
    """Extent between percentiles of each group, nearest rank; ``whole`` is that of all values."""
    length = np.full(len(x), x.shape[1]) if counts is None else counts
    rank = np.maximum(np.ceil(percent / 100 * length).astype(np.int64), 1)
    ordered = np.sort(x if counts is None else _pad(x, counts, np.inf), axis=1)
    high = np.take_along_axis(ordered, (rank - 1)[:, None], axis=1)[:, 0]
    low = np.take_along_axis(ordered, (length - rank)[:, None], axis=1)[:, 0]
    zero = np.float32(0)
    return Extent(np.minimum(low, zero), np.maximum(high, zero), whole.has_zero)


def _or_whole(e: Extent, whole: Extent) -> Extent:
    """The percentile range, or all of it where so many values are 0 that nothing would be left."""
    empty = e.magnitude == 0
    return Extent(
        np.where(empty, whole.low, e.low), np.where(empty, whole.high, e.high), e.has_zero
    )


def _pad(x: F32, counts: I32, value: float) -> F32:
    return np.where(np.arange(x.shape[1]) < counts[:, None], x, np.float32(value))


@np.errstate(over="ignore", invalid="ignore")  # near the end of the range; such codes lose
def fit(
    x: F32,
    encoding: AffineEncoding,
    method: RangeMethod,
    counts: I32 | None = None,
    weights: Weighting | None = None,
) -> Parameters:
    """Scale and zero point of each group of (G, L).

    Args:
        counts: real values of each group, (G,), or None when all L are.
        weights: of the values, for the ``mse`` method; G is a multiple of their number.
    """
    e = extent(x, counts)
    if method.name == "percentile":
        return minmax(_or_whole(percentile_extent(x, method.percentile, e, counts), e), encoding)
    if method.name == "minmax":
        return minmax(e, encoding)
    if kernels.fused is not None and x.shape[1] <= PIECE:
        found = kernels.fused.search(
            *(x, counts, e.low, e.high, e.has_zero, encoding.bits, encoding.symmetric),
            search_grid(encoding.bits, encoding.symmetric),
            None if weights is None else (weights.weight, weights.reach),
        )
        return _settle(e, encoding, *found)
    step = len(x) if kernels.fused is not None else max(1, BATCH // x.shape[1])
    parts = [
        _fit_batch(
            x[i : i + step],
            Extent(e.low[i : i + step], e.high[i : i + step], e.has_zero[i : i + step]),
            encoding,
            None if counts is None else counts[i : i + step],
            None if weights is None else weights.groups(i, len(x[i : i + step])),
        )
        for i in range(0, len(x), step)
    ]
    return Parameters(
        np.concatenate([p.scale for p in parts]), np.concatenate([p.zero for p in parts])
    )


def _fit_batch(
    x: F32,
    e: Extent,
    encoding: AffineEncoding,
    counts: I32 | None,
    weights: tuple[F32, F32] | None,
) -> Parameters:
    """The search of a few groups; ``weights`` are weight and reach of each value."""
    if weights is None:
        return _search(e, None, group_sums(x, encoding, counts), encoding)
    weight, reach = weights
    return _search(e, extent(x * reach), weighted_group_sums(x, encoding, weight), encoding)


@np.errstate(over="ignore", invalid="ignore")
def fit_stream(
    pieces: Sequence[Load],
    encoding: AffineEncoding,
    method: RangeMethod,
    weights: Sequence[Callable[[], Weighting]] | None = None,
    mapper: Mapper = map,
) -> Parameters:
    """Scale and zero point (1,) of one group that is loaded in 1-d pieces.

    Each pass over the values loads every piece once: one for the range, at most nine more for
    ``mse`` (ten with weights). Sums run piece by piece.

    Args:
        weights: those of each piece, (1, n), for ``mse``.
    """
    e = _union(list(mapper(lambda load: extent(load()[None, :]), pieces)))
    if method.name == "percentile":
        found = _stream_percentile(pieces, method.percentile, e, mapper)
        return minmax(_or_whole(found, e), encoding)
    if method.name == "minmax":
        return minmax(e, encoding)
    if weights is None:
        return _search(e, None, stream_sums(pieces, encoding, None, mapper), encoding)

    def reached(loads: tuple[Load, Callable[[], Weighting]]) -> Extent:
        load, load_weights = loads
        return extent(load()[None, :] * load_weights().reach)

    near = _union(list(mapper(reached, zip(pieces, weights, strict=True))))
    weight = [partial(_weight, load) for load in weights]
    return _search(e, near, stream_sums(pieces, encoding, weight, mapper), encoding)


def _weight(load: Callable[[], Weighting]) -> F32:
    return load().weight.ravel()


def _union(parts: list[Extent]) -> Extent:
    return Extent(
        np.min([p.low for p in parts], axis=0),
        np.max([p.high for p in parts], axis=0),
        np.any([p.has_zero for p in parts], axis=0),
    )


def _stream_percentile(
    pieces: Sequence[Load], percent: float, whole: Extent, mapper: Mapper
) -> Extent:
    """Exact nearest-rank percentiles by two counting passes: upper, then lower 16 bits."""
    upper = np.zeros(kernels.HISTOGRAM_BINS, np.int64)
    for counts in mapper(lambda load: kernels.histogram(load()), pieces):
        upper += counts
    total = int(upper.sum())
    rank = max(int(np.ceil(percent / 100 * total)), 1)
    order = _ascending_keys()
    edges = np.cumsum(upper[order])
    found = []
    for wanted in (total - rank + 1, rank):  # counted from below
        place = int(np.searchsorted(edges, wanted))
        key = int(order[place])
        before = int(edges[place - 1]) if place else 0
        lower = np.zeros(kernels.HISTOGRAM_BINS, np.int64)
        for counts in mapper(partial(_lower_bits, key), pieces):
            lower += counts
        low_order = np.arange(len(lower)) if key < 0x8000 else np.arange(len(lower))[::-1]
        index = int(low_order[int(np.searchsorted(np.cumsum(lower[low_order]), wanted - before))])
        found.append(np.array([key << 16 | index], np.uint32).view(np.float32))
    zero = np.float32(0)
    return Extent(np.minimum(found[0], zero), np.maximum(found[1], zero), whole.has_zero)


def _lower_bits(key: int, load: Load) -> NDArray[np.intp]:
    """Counts of the lower 16 bits of the values whose upper ones are ``key``."""
    bits = load().view(np.uint32)
    inside = bits[(bits >> 16) == key] & 0xFFFF
    return np.bincount(inside.astype(np.intp), minlength=kernels.HISTOGRAM_BINS)


def _ascending_keys() -> NDArray[np.intp]:
    """Upper 16 bits of float32 patterns in the order of their values."""
    keys = np.arange(kernels.HISTOGRAM_BINS)
    return np.concatenate([keys[:0x7FFF:-1], keys[:0x8000]])


# --- least squared error --------------------------------------------------------------------------


class _Best:
    """The best candidate of each group so far."""

    def __init__(self, e: Extent, source: SumSource, encoding: AffineEncoding) -> None:
        groups = len(e.low)
        self.encoding = encoding
        self.has_zero = e.has_zero
        self.source = source
        self.gain = np.zeros(groups)
        self.scale = np.zeros(groups)
        self.zero = np.zeros(groups, np.int32)

    def offer(self, sums: Sums) -> None:
        """Judge the codes of one candidate by the least squared error that any scale leaves with
        them.

        With k = code - zero point, Σ(x - Sk)² is least at S = Σxk / Σk², where it is Σx² - Σxk · S.
        """
        su, suu, sxu = sums
        n, sx = self.source.count, self.source.total
        if self.encoding.symmetric:
            zero = np.full(len(su), 1 << (self.encoding.bits - 1), np.int32)
            real = zero.astype(np.float64)
        else:
            zero = self._fitted_zero(su, suu, sxu)
            real = zero / kernels.zero_steps(self.encoding.bits)
        xk = sxu - real * sx
        kk = suu - 2 * real * su + n * real * real
        scale = xk / np.where(kk > 0, kk, 1)
        gain = xk * scale
        signed = self.encoding.symmetric and self.encoding.bits < 8
        better = (kk > 0) & (gain > self.gain) & (signed | (scale > 0))
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def _fitted_zero(self, su: F64, suu: F64, sxu: F64) -> I32:
        """Zero point of the least-squares line through (code, x)."""
        n, sx = self.source.count, self.source.total
        spread = n * suu - su * su
        lean = n * sxu - su * sx  # over spread it is the slope
        usable = (spread > 0) & (lean > 0)
        real = np.where(usable, (su * lean - sx * spread) / np.where(usable, lean * n, 1), 0)
        return _zero_point(real, self.has_zero, self.encoding)

    def beside(self, change: float, move: float) -> Candidate:
        """The winner so far as a candidate, with its scale times ``1 + change`` and its zero point
        moved by so many codes. Without either its codes may still differ: the scale was fitted.
        """
        safe = np.where(np.abs(self.scale) < TINY, 1, self.scale)
        if self.encoding.symmetric:
            real = np.full(len(safe), float(1 << (self.encoding.bits - 1)))
        else:
            real = self.zero / kernels.zero_steps(self.encoding.bits)
        factor = 1 + float(np.float32(change))
        return (1 / (safe * factor)).astype(np.float32), (real + move).astype(np.float32)


def _search(
    e: Extent, near: Extent | None, source: SumSource, encoding: AffineEncoding
) -> Parameters:
    """The mse method of section 5; ``near`` is the range of the values that matter, with
    weights.
    """
    best = _Best(e, source, encoding)
    grid = search_grid(encoding.bits, encoding.symmetric)

    def offer(candidates: list[Candidate]) -> None:
        for sums in source.sums(candidates):
            best.offer(sums)

    candidates = _candidates(e if near is None else _or_all(near, e), encoding, grid)
    if near is not None:
        candidates += _candidates(e, encoding, grid.first)[:1]
    offer(candidates)
    for change in grid.moves:
        if not encoding.symmetric:
            offer([best.beside(0, ZERO_MOVE), best.beside(0, -ZERO_MOVE)])
        offer([best.beside(change, 0), best.beside(-change, 0)])
    offer([best.beside(0, 0)])
    return _settle(e, encoding, best.scale, best.zero, best.gain > 0)


def _settle(e: Extent, encoding: AffineEncoding, scale: F64, zero: I32, found: Bools) -> Parameters:
    """Round what the search found; the minmax range where it found nothing or could not search."""
    plain = minmax(e, encoding)
    found = found & _searchable(e)
    stored = round_scale(scale.astype(np.float32), encoding.scale_dtype, e.magnitude)
    zero = plain.zero if encoding.symmetric else np.where(found, zero, plain.zero)
    return Parameters(np.where(found, stored, plain.scale), zero)


def _or_all(near: Extent, e: Extent) -> Extent:
    """``near``, or all of the range where what matters is too small to be searched."""
    usable = _searchable(near)
    return Extent(
        np.where(usable, near.low, e.low), np.where(usable, near.high, e.high), e.has_zero
    )


def _candidates(e: Extent, encoding: AffineEncoding, grid: SearchGrid) -> list[Candidate]:
    # Groups that are all zeros or tiny take their minmax range; any finite candidate will do.
    usable = _searchable(e)
    if encoding.symmetric:
        magnitude = np.where(usable, e.magnitude, np.float32(1))
        return list(_symmetric_candidates(magnitude, encoding.bits, grid))
    low = np.where(usable, e.low, np.float32(-1))
    high = np.where(usable, e.high, np.float32(1))
    return list(_asymmetric_candidates(low, high, np.float32(encoding.levels), grid))


def _searchable(e: Extent) -> Bools:
    return (e.magnitude >= TINY) & (e.magnitude <= HUGE)


def _symmetric_candidates(magnitude: F32, bits: int, grid: SearchGrid) -> Iterator[Candidate]:
    centre = 1 << (bits - 1)
    unit = magnitude / np.float32(127 if bits == 8 else centre)
    offset = np.full(len(unit), centre, np.float32)
    for sign, t in product((1.0,) if bits == 8 else (1.0, -1.0), grid.factors):
        yield np.float32(sign) / (unit * np.float32(t)), offset


def _asymmetric_candidates(
    low: F32, high: F32, n: np.float32, grid: SearchGrid
) -> Iterator[Candidate]:
    unit = high / n - low / n
    middle = high / 2 + low / 2
    for t in grid.factors:
        inverse = np.float32(1) / (unit * np.float32(t))
        yield inverse, n / 2 - middle * inverse
