"""Kernels that are made of others, whichever set these come from: the definition is that of the
reference's pieces, and native code runs the same steps where it has no single pass for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import (
    SIGN,
    integer_rows,
    lane_sum,
    level_rows,
    minmax,
    narrow_bounds,
    stored_biases,
    to_groups,
    weighted_error_sums,
    zero_steps,
)
from qconvert.kernels.records import (
    F32,
    I32,
    U8,
    Activations,
    Bools,
    Bytes,
    Encoded,
    Extent,
    GroupStatistics,
    IntegerRows,
    LevelCode,
    LevelSteps,
    Moments,
    Parameters,
    PowerSums,
    Product,
    SourceRows,
    Weighting,
)
from qconvert.kernels.scale_search import Found, settled
from qconvert.ranges import RangeMethod


class Pieces(Protocol):
    """What of a set of kernels is called here."""

    def values(self, rows: SourceRows) -> F32: ...
    def power_sums(self, x: F32, pivot: float) -> PowerSums: ...
    def extent(self, x: F32, counts: I32 | None = None) -> Extent: ...
    def observe_groups(self, x: F32, encoding: AffineEncoding, search: bool) -> GroupStatistics: ...
    def search(
        self,
        x: F32,
        counts: I32 | None,
        e: Extent,
        encoding: AffineEncoding,
        weights: Weighting | None = None,
    ) -> Found: ...
    def encode_rows(
        self,
        x: F32,
        encoding: AffineEncoding,
        parameters: Parameters,
        mean_square: F32 | None = None,
    ) -> Encoded: ...
    def error_sums(self, x: F32, decoded: F32) -> tuple[float, float, float]: ...
    def unpack(self, packed: U8, width: int) -> U8: ...
    def pack_stream(self, codes: U8, bits: int) -> U8: ...
    def integer_dots(self, codes: NDArray[np.int16], activations: NDArray[np.int8]) -> I32: ...


def values(
    widen: Callable[[bytes, str], NDArray[np.floating]],
    all_finite: Callable[[F32], bool],
    rows: SourceRows,
) -> F32:
    """Rows (R, c) as float32; float64 and wide integers are rounded.

    Raises:
        FloatingPointError: NaN or Inf, or a float64 beyond float32.
    """
    if isinstance(rows.data, np.ndarray):
        x = rows.data
    else:
        with np.errstate(over="ignore"):
            x = widen(rows.data, rows.dtype).astype(np.float32, copy=False)
    if not all_finite(x):
        raise FloatingPointError("values that are not finite")
    return x.reshape(rows.shape)


@np.errstate(over="ignore", invalid="ignore")  # near the end of the range; such codes lose
def fit(
    k: Pieces,
    x: F32,
    encoding: AffineEncoding,
    method: RangeMethod,
    counts: I32 | None = None,
    weights: Weighting | None = None,
    whole: bool = False,
) -> Parameters:
    """Scale and zero point of each group of (G, L), formats/schemes/SPEC.md section 5.

    Args:
        counts: real values of each group, (G,), or None when all L are.
        weights: of the values, for the ``mse`` method; G is a multiple of their number.
        whole: whether zero points have to be whole codes, as those of groups with a 0 are.
    """
    e = k.extent(x, counts)
    if whole:
        e = Extent(e.low, e.high, np.ones_like(e.has_zero))
    if method.name == "percentile":
        return minmax(or_whole(_percentile_extent(x, method.percentile, e, counts), e), encoding)
    if method.name == "minmax":
        return minmax(e, encoding)
    return settled(e, encoding, k.search(x, counts, e, encoding, weights))


def or_whole(e: Extent, whole: Extent) -> Extent:
    """The percentile range, or all of it where so many values are 0 that nothing would be left."""
    empty = e.magnitude == 0
    return Extent(
        np.where(empty, whole.low, e.low), np.where(empty, whole.high, e.high), e.has_zero
    )


def _percentile_extent(x: F32, percent: float, whole: Extent, counts: I32 | None = None) -> Extent:
    """Extent between percentiles of each group, nearest rank; ``whole`` is that of all values."""
    length = np.full(len(x), x.shape[1]) if counts is None else counts
    rank = np.maximum(np.ceil(percent / 100 * length).astype(np.int64), 1)
    inside = np.arange(x.shape[1]) < length[:, None]
    ordered = np.sort(x if counts is None else np.where(inside, x, np.float32(np.inf)), axis=1)
    high = np.take_along_axis(ordered, (rank - 1)[:, None], axis=1)[:, 0]
    low = np.take_along_axis(ordered, (length - rank)[:, None], axis=1)[:, 0]
    zero = np.float32(0)
    return Extent(np.minimum(low, zero), np.maximum(high, zero), whole.has_zero)


def observe_groups(
    extrema: Callable[[F32], tuple[F32, F32, Bools]],
    x: F32,
    encoding: AffineEncoding,
    search: bool,
) -> GroupStatistics:
    """Group ranges of rows (R, c), for the granularity and width of ``encoding``.

    Args:
        search: whether the symmetric grid may use its extra code on either side (the mse method
            below 8 bits).
    """
    groups, _ = to_groups(x, encoding.block)
    low, high, _ = extrema(groups)
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
        symmetric_power=lane_sum(either * either),
        asymmetric_power=lane_sum(asymmetric * asymmetric),
        smallest=float(present.min()) if len(present) else math.inf,
        largest=float(present.max()) if len(present) else 0.0,
    )


def quantize_rows(
    k: Pieces,
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: tuple[float, float],
    weights: Weighting | None = None,
) -> Encoded:
    """Quantize rows (R, c) whose groups have scales of their own, and see what a decision has to
    know: moments, ranges of the groups, values outside the bounds.

    Args:
        bounds: values below the first or above the second number are counted; moments are taken
            about their middle.
        weights: of the values, for the search and for a weighted error.

    Raises:
        FloatingPointError: NaN or Inf, or a float64 beyond float32.
    """
    x = k.values(rows)
    low, high, pivot = narrow_bounds(bounds)
    extremes = float(x.min()), float(x.max())
    moments = Moments.about(x.size, extremes, pivot, k.power_sums(x.ravel(), pivot))
    groups, counts = to_groups(x, encoding.block)
    parameters = fit(k, groups, encoding, method, counts, weights)
    mean_square = None if weights is None else weights.mean_square
    done = k.encode_rows(x, encoding, parameters, mean_square)
    return seen(
        done,
        moments,
        k.observe_groups(x, encoding, method.name == "mse"),
        int(np.count_nonzero((x < low) | (x > high))),
    )


def seen(done: Encoded, moments: Moments, groups: GroupStatistics, outside: int) -> Encoded:
    """Encoded rows with what was seen of their values; Σx² is that of the moments."""
    error = replace(done.error, signal=moments.square_sum)
    return Encoded(done.segments, error, moments, groups, outside)


def quantize_stream(
    k: Pieces,
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    biased: bool,
    weights: Weighting | None = None,
) -> Encoded:
    """Quantize rows (R, c) of whole blocks for formats of other tools: `pack_stream` of codes,
    scales, and zero points that are whole codes, a byte each.

    Args:
        biased: whether there are biases instead, of the dtype of the scales, which codes are chosen
            with as they are stored: value = code · scale + bias. Not of symmetric codes.
        weights: of the values, for the search and for a weighted error.

    Returns:
        Segments ``codes``, ``scales`` and, unless symmetric, ``zero_points`` or ``biases``.

    Raises:
        FloatingPointError: NaN or Inf, or a float64 beyond float32.
        ValueError: biases of symmetric codes.
    """
    if biased and encoding.symmetric:
        raise ValueError("biases of symmetric codes")
    x = k.values(rows)
    squares = None if weights is None else weights.mean_square
    groups = x.reshape(-1, encoding.block)
    p = fit(k, groups, encoding, method, None, weights, whole=not biased)
    if not biased:
        done = k.encode_rows(x, encoding, p, squares)
        whole = p.zero // zero_steps(encoding.bits)
        zeros = b"" if encoding.symmetric else whole.astype(np.uint8).tobytes()
        error = done.error
    else:
        biases = stored_biases(p.scale, p.zero, encoding)
        zeros = biases.tobytes()
        above = (groups - biases.astype(np.float32)[:, None]).reshape(x.shape)
        done = k.encode_rows(above, encoding, Parameters(p.scale, np.zeros_like(p.zero)), squares)
        # What is lost above the biases is what is lost; what there was is more.
        error = replace(done.error, signal=k.error_sums(x, x)[0])
        if squares is not None:
            error = replace(error, weighted_signal=weighted_error_sums(x, x, squares)[0])
    codes = load_codes(k, done.segments["codes"], encoding).reshape(len(x), -1)
    stream = k.pack_stream(codes[:, : x.shape[1]], encoding.bits)
    scales = done.segments["scales"]
    return Encoded(stream_segments(stream.data, scales, zeros, biased), error)


def stream_segments(codes: Bytes, scales: Bytes, zeros: Bytes, biased: bool) -> dict[str, Bytes]:
    """Segments of `quantize_stream`; no zeros are those of symmetric codes."""
    found = {"codes": codes, "scales": scales}
    return {**found, "biases" if biased else "zero_points": zeros} if len(zeros) else found


# --- integer matrix product -----------------------------------------------------------------------


def load_codes(k: Pieces, packed: Bytes, encoding: AffineEncoding) -> U8:
    """Stored codes as unsigned codes, padding included, flat."""
    raw = np.frombuffer(packed, np.uint8)
    return raw ^ SIGN if encoding.bits == 8 else k.unpack(raw, encoding.bits)


def product(
    k: Pieces, packed: Bytes, scale: F32, zero: I32, encoding: AffineEncoding, a: Activations
) -> F32:
    """`integer_product` straight from stored codes: y, float32 (M, R).

    Args:
        packed: whole rows as in the file; what pads them is not looked at.
        scale, zero: parameters of each group, (R, G); a scale per tensor is to be repeated.
    """
    codes = load_codes(k, packed, encoding).reshape(-1, encoding.row_codes)
    codes = codes[:, : encoding.row_length]
    return integer_product(k, integer_rows(codes, scale, zero, encoding), a).y


def levels_product(
    k: Pieces, packed: U8, columns: int, steps: LevelSteps, code: LevelCode, a: Activations
) -> F32:
    """`integer_product` straight from stored codes of levels: y, float32 (M, R).

    Args:
        packed: codes of rows of ``columns`` values, each padded to a group of 32.
    """
    codes = k.unpack(packed, code.bits).reshape(len(steps.unit), -1)[:, :columns]
    return integer_product(k, level_rows(codes, steps, code), a).y


def integer_product(
    k: Pieces, rows: IntegerRows, a: Activations, *, check: bool = False
) -> Product:
    """y = a · rowsᵀ in integers.

    Args:
        check: whether to hold each accumulator against exact arithmetic without correction terms.
    """
    y = np.zeros((len(a.codes), len(rows.codes)), np.float32)
    exact = True if check else None
    spans = rows.spans()
    whole = [s for s in spans if s[1].stop - s[1].start == spans[0][1].stop]
    for run in (whole, spans[len(whole) :]):  # a shorter span can only be the last
        if run:
            y, same = _equal_spans(k, rows, a, run, y, check)
            exact = exact and same
    return Product(y * a.scale[:, None], exact)


def _equal_spans(
    k: Pieces,
    rows: IntegerRows,
    a: Activations,
    spans: list[tuple[int, slice]],
    y: F32,
    check: bool,
) -> tuple[F32, bool]:
    """``y`` (M, R) with what spans of one length add to it in their order, and whether every int32
    accumulator is the exact one.
    """
    groups = [group for group, _ in spans]
    columns = slice(spans[0][1].start, spans[-1][1].stop)
    shape = (len(spans), spans[0][1].stop - spans[0][1].start)
    codes = rows.codes[:, columns].reshape(-1, *shape).swapaxes(0, 1)  # (S, R, L)
    inputs = a.codes[:, columns].reshape(-1, *shape).swapaxes(0, 1)  # (S, M, L)
    zero = rows.zero[:, groups].T[:, None, :]  # (S, 1, R)
    input_sum = inputs.sum(axis=2, dtype=np.int32)[:, :, None]  # (S, M, 1)
    code_sum = codes.sum(axis=2, dtype=np.int32)[:, None, :]  # (S, 1, R)
    count, za = np.int32(shape[1]), a.zero_points
    acc = k.integer_dots(codes, inputs)
    acc -= input_sum * zero
    acc -= za * code_sum
    acc += count * zero * za
    same = not check or bool((acc == _exact(codes, zero, inputs, za)).all())
    terms = [acc.astype(np.float32) * rows.scale[:, groups].T[:, None, :]]
    if rows.offset is not None:
        shares = (input_sum - count * za).astype(np.float32)
        terms.append(shares * rows.offset[:, groups].T[:, None, :])
    ordered = np.stack(terms, axis=1)  # of each group one after the other
    ordered = ordered.reshape(len(spans) * len(terms), *y.shape)  # -1 fails where there are no rows
    return np.add.accumulate(np.concatenate([y[None], ordered]))[-1], same


def _exact(
    codes: NDArray[np.int16], zero: I32, inputs: NDArray[np.int8], zero_points: I32
) -> NDArray[np.float64]:
    """Σ (code - zero) (a - zero point) without any correction terms, (S, M, R).

    In binary64, which is exact: the sums stay below 255 · 256 · 16,384 < 2^31, far from 2^53, in
    whatever order they are added.
    """
    k = codes.astype(np.float64) - zero.swapaxes(1, 2)
    exact: NDArray[np.float64] = (inputs.astype(np.float64) - zero_points) @ k.swapaxes(1, 2)
    return exact
