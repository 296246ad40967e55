"""Scale and zero point of one group of values that is too long for a tile and comes in pieces,
several times over: formats/schemes/SPEC.md section 5. Groups at hand are `kernels.fit`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import HISTOGRAM_BINS, PIECE, minmax
from qconvert.kernels.composed import or_whole
from qconvert.kernels.records import F32, F64, Extent, Parameters, Weighting
from qconvert.kernels.scale_search import (
    Candidate,
    Sums,
    SumSource,
    best_scales,
    clamp,
    settled,
)
from qconvert.mapper import Mapper
from qconvert.ranges import RangeMethod

BATCH = 1 << 16  # values whose sums are added before the next batch, section 6
Load = Callable[[], F32]  # the values of a run, or their weights, (n,)


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
    e = _union(list(mapper(lambda load: kernels.extent(load()[None, :]), pieces)))
    if method.name == "percentile":
        found = _stream_percentile(pieces, method.percentile, e, mapper)
        return minmax(or_whole(found, e), encoding)
    if method.name == "minmax":
        return minmax(e, encoding)
    if weights is None:
        return _searched(e, None, stream_sums(pieces, encoding, None, mapper), encoding)

    def reached(loads: tuple[Load, Callable[[], Weighting]]) -> Extent:
        load, load_weights = loads
        return kernels.extent(load()[None, :] * load_weights().reach)

    near = _union(list(mapper(reached, zip(pieces, weights, strict=True))))
    weight = [partial(_weight, load) for load in weights]
    return _searched(e, near, stream_sums(pieces, encoding, weight, mapper), encoding)


def _searched(
    e: Extent, near: Extent | None, source: SumSource, encoding: AffineEncoding
) -> Parameters:
    return settled(e, encoding, best_scales(e, near, source, encoding))


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
    upper = np.zeros(HISTOGRAM_BINS, np.int64)
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
        lower = np.zeros(HISTOGRAM_BINS, np.int64)
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
    return np.bincount(inside.astype(np.intp), minlength=HISTOGRAM_BINS)


def _ascending_keys() -> NDArray[np.intp]:
    """Upper 16 bits of float32 patterns in the order of their values."""
    keys = np.arange(HISTOGRAM_BINS)
    return np.concatenate([keys[:0x7FFF:-1], keys[:0x8000]])


# --- sums -----------------------------------------------------------------------------------------


def stream_sums(
    pieces: Sequence[Load],
    encoding: AffineEncoding,
    weights: Sequence[Load] | None = None,
    mapper: Mapper = map,
) -> SumSource:
    """Sums over one group that comes in 1-d pieces; each call loads every piece once for all
    candidates.

    Args:
        weights: those of each piece, (n,).
    """

    each: list[tuple[Load, Load | None]] = [(load, None) for load in pieces]
    if weights is not None:
        each = list(zip(pieces, weights, strict=True))

    def over(candidates: list[Candidate], low: int, top: int) -> F64:
        """(candidates, 3), added batch by batch whoever made them."""

        def work(loads: tuple[Load, Load | None]) -> list[F64]:
            load, load_weights = loads
            weight = load_weights() if load_weights else None
            return _piece_sums(load(), candidates, low, top, weight)

        found = np.zeros((len(candidates), 3))
        for batches in mapper(work, each):
            for batch in batches:
                found += batch
        return found

    def sums(candidates: list[Candidate]) -> Iterator[Sums]:
        for su, suu, sxu in over(candidates, *clamp(encoding)):
            yield np.array([su]), np.array([suu]), np.array([sxu])

    count, _, total = over([(np.zeros(1, np.float32), np.ones(1, np.float32))], 1, 1)[0]
    return SumSource(np.array([count]), np.array([total]), sums)


@np.errstate(over="ignore", invalid="ignore")  # here, since each thread has its own
def _piece_sums(
    piece: F32, candidates: list[Candidate], low: int, top: int, weight: F32 | None
) -> list[F64]:
    """The sums of each batch of a piece in order, (candidates, 3) each."""
    inverse, offset = (np.stack(part) for part in zip(*candidates, strict=True))  # (K, 1)
    found: list[F64] = []
    for span, length in _batches(len(piece)):
        rows = piece[span].reshape(-1, length)
        shape = (len(candidates), len(rows))
        each = np.broadcast_to(inverse, shape), np.broadcast_to(offset, shape)
        w = None if weight is None else weight[span].reshape(-1, length)
        found += list(kernels.long_sums(rows, *each, low, top, w).swapaxes(0, 1))
    return found


def _batches(size: int) -> Iterator[tuple[slice, int]]:
    """A run of so many values as batches: slices, those of one length together, and that length."""
    whole = size // PIECE * PIECE
    full = whole // BATCH * BATCH
    for start, stop, length in (
        (0, full, BATCH),
        (full, whole, whole - full),
        (whole, size, size - whole),
    ):
        if start < stop:
            yield slice(start, stop), length
