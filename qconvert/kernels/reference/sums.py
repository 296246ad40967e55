"""The sums that the mse search judges its candidates by, and the search over values at hand.

formats/schemes/SPEC.md sections 5 and 6; with weights every sum has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import LANES, PIECE, fold
from qconvert.kernels.records import F32, F64, I32, Extent, Weighting
from qconvert.kernels.reference.statistics import extent
from qconvert.kernels.scale_search import (
    Candidate,
    Found,
    Sums,
    SumSource,
    best_scales,
    clamp,
    long_source,
)

BATCH = 1 << 16  # values searched at once: the temporaries stay in the second-level cache


def column_sums(columns: F32) -> F32:
    """Sums over the first axis of (L, G), in the order of section 6."""
    length = len(columns)
    lanes = np.zeros((LANES, columns.shape[1]), np.float32)
    for start in range(0, length, LANES):
        part = columns[start : start + LANES]
        lanes[: len(part)] += part
    return np.asarray(fold(lanes))


def code_sums(
    columns: F32, inverse: F32, offset: F32, low: int, top: int, mask: F32 | None
) -> tuple[F32, F32, F32]:
    """Sums over codes u = clamp(rint(x * inverse + offset), low, top) of each group.

    Args:
        columns: values with groups as columns, (L, G).
        inverse, offset: per group, (G,).
        mask: 1 for real values and 0 for padding, (L, G), or None.

    Returns:
        Σu, Σu² (both exact: at most 256 · 255² < 2^24) and Σxu, each (G,).
    """
    u = columns * inverse
    u += offset
    np.rint(u, out=u)
    np.clip(u, low, top, out=u)
    if mask is not None:
        u *= mask
    return column_sums(u), column_sums(u * u), column_sums(columns * u)


def weighted_code_sums(
    columns: F32, weights: F32, inverse: F32, offset: F32, low: int, top: int
) -> tuple[F32, F32, F32]:
    """`code_sums` with weights (L, G), 0 for padding.

    Returns:
        Σwu, Σ(wu)u and Σ(wx)u, each (G,); with weights of 1 those of `code_sums`, bit for bit.
    """
    u = columns * inverse
    u += offset
    np.rint(u, out=u)
    np.clip(u, low, top, out=u)
    wu = weights * u
    return column_sums(wu), column_sums(wu * u), column_sums(weights * columns * u)


def long_sums(
    x: F32, inverse: F32, offset: F32, low: int, top: int, weights: F32 | None = None
) -> F64:
    """Σu, Σu² and Σxu, or with weights Σwu, Σwu² and Σwxu, of rows of any length for several
    candidates: `code_sums` of pieces of 256 values, the last one shorter, added in float64 in
    order.

    Args:
        x: rows, (R, c).
        inverse, offset: (K, R).
        weights: of the values, (R, c).

    Returns:
        float64 (K, R, 3).
    """
    rows, length = x.shape
    whole = length // PIECE * PIECE
    sums = np.zeros((len(inverse), rows, 3))
    for span, size in ((slice(0, whole), PIECE), (slice(whole, length), length - whole)):
        count = (span.stop - span.start) // size if size else 0
        if not count:
            continue
        columns = _columns(x[:, span], size)
        w = None if weights is None else _columns(weights[:, span], size)
        for k in range(len(inverse)):
            each = np.repeat(inverse[k], count), np.repeat(offset[k], count)
            if w is None:
                found = code_sums(columns, *each, low, top, None)
            else:
                found = weighted_code_sums(columns, w, *each, low, top)
            for i, parts in enumerate(found):
                ordered = parts.reshape(rows, count).astype(np.float64)
                # Accumulated, since np.sum would add in pairs.
                sums[k, :, i] += np.add.accumulate(ordered, axis=1)[:, -1]
    return sums


def _columns(x: F32, length: int) -> F32:
    return np.ascontiguousarray(x.reshape(-1, length).T)


@np.errstate(over="ignore", invalid="ignore")  # near the end of the range; such codes lose
def search(
    x: F32,
    counts: I32 | None,
    e: Extent,
    encoding: AffineEncoding,
    weights: Weighting | None = None,
) -> Found:
    """The mse search of groups (G, L), zeros behind ``counts`` values: every candidate of the
    width's grid in order, then the winner once more.

    Args:
        e: the extent of each group as `extent` gives it.
        weights: of the values; their number divides G.

    Returns:
        Scales before rounding, zero steps, and whether a candidate was found, (G,) each; what was
        found for groups that cannot be searched means nothing.
    """
    step = max(1, BATCH // x.shape[1])
    parts = [
        _search(
            x[i : i + step],
            e.part(slice(i, i + step)),
            encoding,
            None if counts is None else counts[i : i + step],
            None if weights is None else weights.groups(i, len(x[i : i + step])),
        )
        for i in range(0, len(x), step)
    ]
    scale, zero, found = (np.concatenate(p) for p in zip(*parts, strict=True))
    return scale, zero, found


def _search(
    x: F32,
    e: Extent,
    encoding: AffineEncoding,
    counts: I32 | None,
    weights: tuple[F32, F32] | None,
) -> Found:
    """The search of a few groups; ``weights`` are weight and reach of each value."""
    if weights is not None:
        weight, reach = weights
        return best_scales(
            e, extent(x * reach), long_source(long_sums, x, encoding, weight), encoding
        )
    if counts is None:
        return best_scales(e, None, long_source(long_sums, x, encoding, None), encoding)
    return best_scales(e, None, _masked_source(x, encoding, counts), encoding)


def _masked_source(x: F32, encoding: AffineEncoding, counts: I32) -> SumSource:
    """Of groups of at most 256 values, zeros behind ``counts``."""
    low, top = clamp(encoding)
    columns = np.ascontiguousarray(x.T)
    mask = np.ascontiguousarray((np.arange(x.shape[1]) < counts[:, None]).T).astype(np.float32)

    def sums(candidates: list[Candidate]) -> Iterator[Sums]:
        for inverse, offset in candidates:
            u, uu, xu = code_sums(columns, inverse, offset, low, top, mask)
            yield u.astype(np.float64), uu.astype(np.float64), xu.astype(np.float64)

    total = column_sums(columns).astype(np.float64)
    return SumSource(counts.astype(np.float64), total, sums)
