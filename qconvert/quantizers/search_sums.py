"""The sums that the search judges its candidates by, over groups at hand or a stream of values.

formats/schemes/SPEC.md sections 5 and 6; with weights every sum has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.mapper import Mapper

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

PIECE = 256  # values whose binary32 sums are added before binary64 takes over, section 6
BATCH = 1 << 16  # values searched at once: the temporaries stay in the second-level cache

# Per candidate: inverse step and offset in, sums Σu, Σu², Σxu out (float64, (G,)).
Candidate = tuple[F32, F32]
Sums = tuple[F64, F64, F64]
Load = Callable[[], F32]  # the values of a run, or their weights, (n,)

# Where every code is 1, sums are the count (or Σw) and Σx (or Σwx).
_ALL_ONES: Candidate = (np.zeros(1, np.float32), np.ones(1, np.float32))


@dataclass(frozen=True, slots=True)
class SumSource:
    """Where a search gets its sums from: values at hand, or a stream read once per call.

    With weights every sum has them: Σw, Σwx, Σwu, Σwu², Σwxu.

    Attributes:
        count: real values per group, (G,) float64.
        total: Σx per group, (G,) float64.
        sums: candidates to their sums, in order.
    """

    count: F64
    total: F64
    sums: Callable[[list[Candidate]], Iterator[Sums]]


def _clamp(encoding: AffineEncoding) -> tuple[int, int]:
    low = 1 if encoding.symmetric and encoding.bits == 8 else 0
    return low, encoding.levels


def group_sums(x: F32, encoding: AffineEncoding, counts: I32 | None) -> SumSource:
    """Sums over groups (G, L) held in memory; L > 256 is cut into pieces of 256."""
    if kernels.fused is not None and counts is None:
        return _native_sums(x, encoding, None)
    groups, length = x.shape
    low, top = _clamp(encoding)
    pieces = []  # (columns, mask) of each piece
    for start in range(0, length, PIECE):
        part = x[:, start : start + PIECE]
        mask = None
        if counts is not None:
            real = np.arange(start, start + part.shape[1]) < counts[:, None]
            mask = np.ascontiguousarray(real.T).astype(np.float32)
        pieces.append((np.ascontiguousarray(part.T), mask))

    def sums(candidates: list[Candidate]) -> Iterator[Sums]:
        for inverse, offset in candidates:
            su, suu, sxu = (np.zeros(groups) for _ in range(3))
            for columns, mask in pieces:
                u, uu, xu = kernels.code_sums(columns, inverse, offset, low, top, mask)
                su += u
                suu += uu
                sxu += xu
            yield su, suu, sxu

    total = np.zeros(groups)
    for columns, _ in pieces:
        total += kernels.column_sums(columns)
    count = np.full(groups, float(length)) if counts is None else counts.astype(np.float64)
    return SumSource(count, total, sums)


def weighted_group_sums(x: F32, encoding: AffineEncoding, weight: F32) -> SumSource:
    """`group_sums` with weights (G, L), 0 for padding."""
    if kernels.fused is not None:
        return _native_sums(x, encoding, weight)
    groups, length = x.shape
    low, top = _clamp(encoding)
    pieces = [
        tuple(np.ascontiguousarray(a[:, start : start + PIECE].T) for a in (x, weight))
        for start in range(0, length, PIECE)
    ]

    def sums(candidates: list[Candidate]) -> Iterator[Sums]:
        for inverse, offset in candidates:
            found = [np.zeros(groups) for _ in range(3)]
            for columns, w in pieces:
                parts = kernels.weighted_code_sums(columns, w, inverse, offset, low, top)
                for total, part in zip(found, parts, strict=True):
                    total += part
            yield found[0], found[1], found[2]

    count, total = np.zeros(groups), np.zeros(groups)
    for columns, w in pieces:
        count += kernels.column_sums(w)
        total += kernels.column_sums(w * columns)
    return SumSource(count, total, sums)


def _native_sums(x: F32, encoding: AffineEncoding, weight: F32 | None) -> SumSource:
    """Sums over whole groups (G, L) by native code."""
    low, top = _clamp(encoding)
    nothing, one = (np.repeat(v, len(x)) for v in _ALL_ONES)
    count, _, total = next(_long_sums(x, [(nothing, one)], 1, 1, weight))
    return SumSource(count, total, lambda c: _long_sums(x, c, low, top, weight))


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
        for su, suu, sxu in over(candidates, *_clamp(encoding)):
            yield np.array([su]), np.array([suu]), np.array([sxu])

    count, _, total = over([_ALL_ONES], 1, 1)[0]
    return SumSource(np.array([count]), np.array([total]), sums)


@np.errstate(over="ignore", invalid="ignore")  # here, since each thread has its own
def _piece_sums(
    piece: F32, candidates: list[Candidate], low: int, top: int, weight: F32 | None
) -> list[F64]:
    """The sums of each batch of a piece in order, (candidates, 3) each."""
    if kernels.fused is not None:
        inverse, offset = (np.stack(part) for part in zip(*candidates, strict=True))  # (K, 1)
        found: list[F64] = []
        for span, length in _batches(len(piece)):
            rows = piece[span].reshape(-1, length)
            shape = (len(candidates), len(rows))
            parameters = (np.broadcast_to(v, shape) for v in (inverse, offset))
            w = None if weight is None else weight[span].reshape(-1, length)
            found += list(kernels.fused.long_sums(rows, *parameters, low, top, w).swapaxes(0, 1))
        return found
    weights = repeat((None, None)) if weight is None else _columns(weight)
    return [
        np.array(
            [[_sequential(s) for s in _sums(columns, w, c, low, top, mask)] for c in candidates]
        )
        for (columns, mask), (w, _) in zip(_columns(piece), weights, strict=False)  # no end of None
    ]


def _sums(
    columns: F32, weight: F32 | None, candidate: Candidate, low: int, top: int, mask: F32 | None
) -> tuple[F32, F32, F32]:
    if weight is None:
        return kernels.code_sums(columns, *candidate, low, top, mask)
    return kernels.weighted_code_sums(columns, weight, *candidate, low, top)


def _long_sums(
    x: F32, candidates: list[Candidate], low: int, top: int, weight: F32 | None = None
) -> Iterator[Sums]:
    """The sums of rows of any length for each candidate, by native code in one pass."""
    assert kernels.fused is not None
    inverse, offset = (np.stack(part) for part in zip(*candidates, strict=True))
    for found in kernels.fused.long_sums(x, inverse, offset, low, top, weight):
        yield found[:, 0], found[:, 1], found[:, 2]


def _batches(size: int) -> Iterator[tuple[slice, int]]:
    """The batches of `_columns` as slices, those of one length together, and that length."""
    whole = size // PIECE * PIECE
    full = whole // BATCH * BATCH
    for start, stop, length in (
        (0, full, BATCH),
        (full, whole, whole - full),
        (whole, size, size - whole),
    ):
        if start < stop:
            yield slice(start, stop), length


def _sequential(sums: F32) -> float:
    """Binary64 sum in order (np.sum would add in pairs)."""
    return float(np.add.accumulate(sums, dtype=np.float64)[-1])


def _columns(piece: F32) -> Iterator[tuple[F32, F32 | None]]:
    """A 1-d run as columns of 256 values, at most `BATCH` values at once; the tail padded and
    masked.
    """
    whole = len(piece) // PIECE * PIECE
    for start in range(0, whole, BATCH):
        part = piece[start : min(start + BATCH, whole)]
        yield np.ascontiguousarray(part.reshape(-1, PIECE).T), None
    if tail := len(piece) - whole:
        columns = np.zeros((PIECE, 1), np.float32)
        columns[:tail, 0] = piece[whole:]
        yield columns, (np.arange(PIECE) < tail).astype(np.float32)[:, None]
