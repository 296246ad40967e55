"""The native kernels: `reference`, `widening` and the arithmetic of `quantizers.ggml`, bit for bit.

Importing this module fails with ImportError where the extension was not built. What it adds to the
reference are fused functions, which equal the compositions that their docstrings name. Arrays may
have any strides; results are new arrays. Values are finite unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import SCALE_SIZES
from qconvert.geometry import PACK_GROUP
from qconvert.kernels import _native
from qconvert.kernels import widening as _widening
from qconvert.kernels.reference import HISTOGRAM_BINS, Moments, PowerSums
from qconvert.ranges import SearchGrid

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

# Errors, values outside, `QuantizedGroups.groups`, extremes and powers.
Figures = tuple[
    tuple[float, float, float, int, float, float],
    int,
    tuple[float, float, float, float],
    tuple[float, float, float, float, float, float],
]
# In the order of the native enumerations: dtypes that loops read as they lie in a file, of scales.
SOURCE_DTYPES = ("F32", "BF16", "F16")
_SCALE_DTYPES = ("F16", "BF16", "F32")
# Number in the native table, values and bytes of a block, by name.
_GGML = {name: (i, *sizes) for i, (name, *sizes) in enumerate(_native.ggml_types())}


def variants() -> tuple[str, ...]:
    """Instruction sets that this processor can run, the fastest last."""
    return _native.variants()


def variant() -> str:
    """The one that runs."""
    return _native.variant()


def select(name: str) -> None:
    """Run ``name``, one of `variants`, from now on and in all threads."""
    _native.select(name)


def _f32(x: NDArray[Any]) -> F32:
    return np.ascontiguousarray(x, np.float32)


def _i32(x: NDArray[Any]) -> I32:
    return np.ascontiguousarray(x, np.int32)


def _u8(x: NDArray[Any]) -> U8:
    return np.ascontiguousarray(x, np.uint8)


# --- statistics -----------------------------------------------------------------------------------


def widen(raw: bytes, dtype: str) -> NDArray[Any]:
    """`widening.widen`."""
    if dtype in ("BF16", "F16"):
        wide = np.empty(len(raw) // 2, np.float32)
        (_native.widen_bf16 if dtype == "BF16" else _native.widen_f16)(raw, wide, len(wide))
        return wide
    if dtype in ("F8_E4M3", "F8_E5M2"):
        wide = np.empty(len(raw), np.float32)
        _native.widen_table(raw, _widening.table(dtype), wide, len(wide))
        return wide
    return _widening.widen(raw, dtype)


@dataclass(frozen=True, slots=True)
class Observed:
    """What two passes over a run of values tell.

    Attributes:
        size: all values.
        nonfinite: NaN and Inf values.
        first_nonfinite: index of the first of them, or None.
        zeros: values equal to 0.
        moments: of the finite values; None when there are none.
    """

    size: int
    nonfinite: int
    first_nonfinite: int | None
    zeros: int
    moments: Moments | None


def observe(x: NDArray[np.floating[Any]]) -> Observed:
    """Everything but the histogram that `observers.statistics.observe` finds in a 1-d run, float32
    or float64, with ``start`` 0. Values need not be finite.
    """
    wide = x.dtype == np.float64
    values = np.ascontiguousarray(x, np.float64 if wide else np.float32)
    nonfinite, first, zeros, count, *rest = _native.observe(values, len(values), wide)
    return Observed(
        size=len(values),
        nonfinite=nonfinite,
        first_nonfinite=first if nonfinite else None,
        zeros=zeros,
        moments=Moments(count, *rest) if count else None,
    )


def moments(x: NDArray[np.floating[Any]]) -> Moments:
    """`reference.moments`."""
    found = observe(x).moments
    if found is None:
        raise ValueError("moments of no values")
    return found


def all_finite(x: F32) -> bool:
    """`reference.all_finite`."""
    return _native.all_finite(_f32(x), x.size)


def histogram(x: F32) -> NDArray[np.int64]:
    """`reference.histogram`; values need not be finite."""
    bins = np.zeros(HISTOGRAM_BINS, np.int64)
    _native.histogram(_f32(x), len(x), bins)
    return bins


def extrema(x: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
    """`reference.extrema`; where 0 and -0 tie, either sign, as there."""
    low, high, zeros = _extrema(x)
    return low, high, zeros > 0


def extent(x: F32, counts: I32 | None) -> tuple[F32, F32, NDArray[np.bool_]]:
    """low, high and has_zero of `quantizers.fitting.extent`."""
    low, high, zeros = _extrema(x)
    padding = 0 if counts is None else x.shape[1] - counts
    zero = np.float32(0)
    return np.minimum(low, zero), np.maximum(high, zero), zeros > padding


def _extrema(x: F32) -> tuple[F32, F32, NDArray[np.int64]]:
    groups, length = x.shape
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    zeros = np.empty(groups, np.int64)
    _native.extrema(_f32(x), groups, length, low, high, zeros)
    return low, high, zeros


def worst_step(
    weights: F32,
    values: F32,
    group: int,
    scale: F32,
    offset: F32 | None,
    zero: I32,
    code_step: int,
    low: int,
    high: int,
    scale_rounding: F32 | None,
    offset_rounding: F32 | None,
) -> tuple[float, bool]:
    """`reference.worst_step`."""
    rows, columns = weights.shape
    return _native.worst_step(
        _f32(weights),
        _f32(values),
        rows,
        columns,
        group,
        _f32(scale),
        _f32_or_none(offset),
        _i32(zero),
        code_step,
        low,
        high,
        _f32_or_none(scale_rounding),
        _f32_or_none(offset_rounding),
    )


def error_sums(x: F32, decoded: F32) -> tuple[float, float, float]:
    """`reference.error_sums`."""
    return _native.error_sums(_f32(x), _f32(decoded), x.size)


def power_sums(x: F32, pivot: float) -> PowerSums:
    """`reference.power_sums`."""
    return _native.power_sums(_f32(x), x.size, pivot)


# --- searching a scale ----------------------------------------------------------------------------


def column_sums(columns: F32) -> F32:
    """`reference.column_sums`."""
    length, groups = columns.shape
    sums = np.empty(groups, np.float32)
    _native.column_sums(_f32(columns), length, groups, sums)
    return sums


def code_sums(
    columns: F32, inverse: F32, offset: F32, low: int, top: int, mask: F32 | None
) -> tuple[F32, F32, F32]:
    """`reference.code_sums`."""
    length, groups = columns.shape
    su, suu, sxu = (np.empty(groups, np.float32) for _ in range(3))
    masks = None if mask is None else _f32(np.broadcast_to(mask, columns.shape))
    inverse, offset = (_f32(np.broadcast_to(v, groups)) for v in (inverse, offset))
    _native.code_sums(_f32(columns), length, groups, inverse, offset, low, top, masks, su, suu, sxu)
    return su, suu, sxu


def long_sums(
    x: F32, inverse: F32, offset: F32, low: int, top: int, weights: F32 | None = None
) -> F64:
    """Σu, Σu² and Σxu, or with weights Σwu, Σwu² and Σwxu, of rows of any length for several
    candidates, in one pass over the rows.

    Equal to `reference.code_sums` (`reference.weighted_code_sums`) of pieces of 256 values, the
    last one shorter, added in float64 in order: what `search_sums.group_sums` yields for rows
    (R, c) and, for rows of 65,536 values, what `search_sums.stream_sums` adds batch by batch.

    Args:
        x: rows, (R, c).
        inverse, offset: (K, R).
        weights: of the values, (R, c).

    Returns:
        float64 (K, R, 3).
    """
    rows, length = x.shape
    sums = np.empty((len(inverse), rows, 3))
    _native.long_sums(
        _f32(x),
        _f32_or_none(weights),
        rows,
        length,
        len(inverse),
        _f32(inverse),
        _f32(offset),
        low,
        top,
        sums,
    )
    return sums


def search(
    x: F32,
    counts: I32 | None,
    low: F32,
    high: F32,
    has_zero: NDArray[np.bool_],
    bits: int,
    symmetric: bool,
    grid: SearchGrid,
    weights: tuple[F32, F32] | None = None,
) -> tuple[F64, I32, NDArray[np.bool_]]:
    """The mse search of groups (G, L), L <= 256, zeros behind ``counts`` values.

    Equal to what `fitting._search` gives to ``_settle``: every candidate of ``grid`` in order, then
    the winner once more.

    Args:
        low, high, has_zero: the extent of each group as `fitting.extent` gives it.
        weights: weight and reach of `weighting.Weighting`.

    Returns:
        Scales before rounding, zero steps (all 0 when symmetric) and whether a candidate was found:
        never for magnitudes below 2^-100 or above 2^110, where scale and zero are 0.
    """
    groups, length = x.shape
    weight, reach = weights or (None, None)
    factors, moves = _grid(grid)
    scale, zero = np.empty(groups), np.empty(groups, np.int32)
    found = np.empty(groups, np.bool_)
    count = None if counts is None else _i32(counts)
    zeros = np.ascontiguousarray(has_zero, np.bool_)
    _native.search(
        *(_f32(x), groups, length, count, _f32(low), _f32(high), zeros),
        _f32_or_none(weight),
        _f32_or_none(reach),
        *(_period(groups, weight, reach), bits, symmetric, factors, len(factors)),
        *(moves, len(moves), scale, zero, found),
    )
    return scale, zero, found


def _count(data: bytes | F32, dtype: str) -> int:
    """How many values of one of `SOURCE_DTYPES` there are."""
    nbytes = len(data) if isinstance(data, bytes) else data.nbytes
    return nbytes // (4 if dtype == "F32" else 2)


def _grid(grid: SearchGrid | None) -> tuple[F32, F32]:
    """Factors and moves; none without a grid."""
    grid = grid or SearchGrid((), ())
    return np.array(grid.factors, np.float32), np.array(grid.moves, np.float32)


def _period(users: int, *rows: F32 | None) -> int:
    """How many rows (P, L) of each array, all those that there are, ``users`` take in turn.

    Raises:
        ValueError: P does not divide the number of users.
    """
    periods = {len(r) for r in rows if r is not None} or {1}
    period = max(periods)
    if len(periods) > 1 or period == 0 or users % period:
        raise ValueError("weights that do not fit the groups")
    return period


def _f32_or_none(x: F32 | None) -> F32 | None:
    return None if x is None else _f32(x)


# --- codes ----------------------------------------------------------------------------------------


def encode(x: F32, scale: F32, zero: I32, bits: int, symmetric: bool) -> tuple[U8, int]:
    """`reference.encode`."""
    groups, length = x.shape
    codes = np.empty(x.shape, np.uint8)
    scales, zeros = _f32(np.broadcast_to(scale, groups)), _i32(np.broadcast_to(zero, groups))
    clipped = _native.encode(_f32(x), groups, length, scales, zeros, bits, symmetric, codes)
    return codes, clipped


def decode(codes: U8, scale: F32, zero: I32, bits: int, symmetric: bool) -> F32:
    """`reference.decode`."""
    groups, length = codes.shape
    x = np.empty(codes.shape, np.float32)
    scales, zeros = _f32(np.broadcast_to(scale, groups)), _i32(np.broadcast_to(zero, groups))
    _native.decode(_u8(codes), groups, length, scales, zeros, bits, symmetric, x)
    return x


def encode_rows(
    x: F32,
    scale: F32,
    zero: I32,
    bits: int,
    symmetric: bool,
    block: int,
    mean_square: F32 | None = None,
) -> tuple[bytes, float, float, float, int, float, float]:
    """Codes as in the file and the error of rows (R, c), as `quantizers.affine.encode_rows`.

    Args:
        scale, zero: one for each group, or a single one for all; stored scales, zero steps.
        block: values of a group, or 0 when a row is one.
        mean_square: weights of the error, (P, c), or None.

    Returns:
        ``EncodedRows.codes`` and the fields of ``EncodedRows.error`` but the count.
    """
    rows, columns = x.shape
    unit = max(block, 1 if bits == 8 else PACK_GROUP)
    packed = np.empty(rows * (-(-columns // unit) * unit * bits // 8), np.uint8)
    error = _native.encode_rows(
        *(_f32(x), rows, columns, _f32(scale), _i32(zero), len(scale)),
        *(bits, symmetric, block, _f32_or_none(mean_square), _period(rows, mean_square), packed),
    )
    return packed.tobytes(), *error


@dataclass(frozen=True, slots=True)
class QuantizedGroups:
    """What `quantize_blocks` and `quantize_channels` find.

    Attributes:
        codes, scales, zeros: as stored; a byte for each zero point.
        errors: the fields of ``ErrorSums`` but the count, with 0 for the signal.
        groups: the fields of ``GroupStatistics``.
        outside: values outside the bounds.
        extremes: the smallest and the largest value.
        powers: `reference.power_sums`.
    """

    codes: memoryview
    scales: memoryview
    zeros: U8
    errors: tuple[float, float, float, int, float, float]
    groups: tuple[float, float, float, float]
    outside: int
    extremes: tuple[float, float]
    powers: PowerSums


def quantize_blocks(
    data: bytes | F32,
    dtype: str,
    block: int,
    bits: int,
    symmetric: bool,
    scale_dtype: str,
    grid: SearchGrid | None,
    bounds: tuple[float, float],
    pivot: float,
    weights: tuple[F32, F32, F32] | None = None,
) -> QuantizedGroups:
    """`quantizers.blocks.quantize_rows` of full blocks (G, L) by mse, or by minmax without a grid.

    Args:
        data: the blocks, a whole number of times 32 values below 8 bits.
        dtype: of ``data``, one of `SOURCE_DTYPES`; F32 for an array.
        block: L.
        weights: weight, reach and mean square of the values of groups, (Q, L) each; Q divides G.

    Raises:
        FloatingPointError: NaN or Inf.
    """
    groups = _count(data, dtype) // block
    weight, reach, mean_square = weights or (None, None, None)
    factors, moves = _grid(grid)
    codes = np.empty(groups * block // 8 * bits, np.uint8)
    scales = np.empty(groups * SCALE_SIZES[scale_dtype], np.uint8)
    zeros = np.empty(0 if symmetric else groups, np.uint8)
    low, high = bounds
    found = _native.quantize_blocks(
        data,
        SOURCE_DTYPES.index(dtype),
        groups,
        block,
        bits,
        symmetric,
        _SCALE_DTYPES.index(scale_dtype),
        factors,
        len(factors),
        moves,
        len(moves),
        low,
        high,
        pivot,
        *(_f32_or_none(weight), _f32_or_none(reach), _f32_or_none(mean_square)),
        _period(groups, weight, reach, mean_square),
        codes,
        scales,
        zeros,
    )
    return _groups(found, codes, scales, zeros)


def quantize_channels(
    data: bytes | F32,
    dtype: str,
    shape: tuple[int, int],
    bits: int,
    symmetric: bool,
    either_side: bool,
    bounds: tuple[float, float],
    pivot: float,
    parameters: tuple[F32, I32] | None = None,
    mean_square: F32 | None = None,
) -> QuantizedGroups:
    """`quantizers.blocks.quantize_rows` of rows (R, c) with a float32 scale each.

    Args:
        data, dtype: as in `quantize_blocks`.
        either_side: whether the symmetric range may lie to either side, which its step counts on.
        parameters: scales as stored and zero steps, (R,) each; None for the minmax range.
        mean_square: weights of the error, (P, c), or None.

    Raises:
        FloatingPointError: NaN or Inf.
    """
    rows, columns = shape
    unit = 1 if bits == 8 else PACK_GROUP
    codes = np.empty(rows * (-(-columns // unit) * unit * bits // 8), np.uint8)
    scales = np.empty(4 * rows, np.uint8)
    zeros = np.empty(0 if symmetric else rows, np.uint8)
    scale, zero = (None, None) if parameters is None else parameters
    found = _native.quantize_channels(
        *(data, SOURCE_DTYPES.index(dtype), rows, columns, bits, symmetric, either_side),
        *(bounds[0], bounds[1], pivot),
        _f32_or_none(scale),
        None if zero is None else _i32(zero),
        _f32_or_none(mean_square),
        _period(rows, mean_square),
        codes,
        scales,
        zeros,
    )
    return _groups(found, codes, scales, zeros)


def _groups(found: Figures | None, codes: U8, scales: U8, zeros: U8) -> QuantizedGroups:
    if found is None:
        raise FloatingPointError("values that are not finite")
    errors, outside, ranges, (minimum, maximum, *powers) = found
    return QuantizedGroups(
        codes=codes.data,
        scales=scales.data,
        zeros=zeros,
        errors=errors,
        groups=ranges,
        outside=outside,
        extremes=(minimum, maximum),
        powers=(powers[0], powers[1], powers[2], powers[3]),
    )


def pack(values: U8, width: int) -> U8:
    """`reference.pack`."""
    groups = values.size // PACK_GROUP
    packed = np.empty(groups * 4 * width, np.uint8)
    _native.pack(_u8(values), groups, width, packed)
    return packed


def unpack(packed: U8, width: int) -> U8:
    """`reference.unpack`."""
    groups = packed.size // (4 * width)
    values = np.empty(groups * PACK_GROUP, np.uint8)
    _native.unpack(_u8(packed), groups, width, values)
    return values


# --- integer matrix product -----------------------------------------------------------------------


def integer_product(codes: NDArray[np.int16], activations: NDArray[np.int8]) -> I32:
    """`reference.integer_product`, as long as the sums fit 32 bits."""
    rows, length = codes.shape
    samples = len(activations)
    sums = np.empty((samples, rows), np.int32)
    _native.integer_product(
        np.ascontiguousarray(codes, np.int16),
        np.ascontiguousarray(activations, np.int8),
        *(rows, samples, length, sums),
    )
    return sums


def product(
    packed: bytes,
    row_codes: int,
    columns: int,
    scale: F32,
    zero: I32 | None,
    bits: int,
    symmetric: bool,
    block: int,
    activations: NDArray[np.int8],
    zero_point: int,
) -> F32:
    """y (M, R) of `quantizers.integer.integer_product` before ``a.scale`` multiplies it, straight
    from the stored codes of R rows.

    Args:
        packed: R rows of ``row_codes`` stored codes; their padding is not looked at.
        scale, zero: (R, G) stored scales and zero steps; ``zero`` may be None when symmetric. A
            scale per tensor is to be repeated.
        activations: int8 (M, columns).
    """
    rows, groups = scale.shape
    samples = len(activations)
    y = np.empty((samples, rows), np.float32)
    zeros = np.zeros(scale.shape, np.int32) if zero is None else _i32(zero)
    _native.product(
        *(packed, rows, row_codes, columns, _f32(scale), zeros, groups, bits, symmetric, block),
        *(np.ascontiguousarray(activations, np.int8), samples, zero_point, y),
    )
    return y


# --- ggml -----------------------------------------------------------------------------------------


def ggml_encode(ggml_type: str, blocks: F32, importance: F32 | None = None) -> U8:
    """``GGML_BLOCKS[ggml_type].encode``."""
    kind, values, nbytes = _GGML[ggml_type]
    data = np.empty((len(blocks), nbytes), np.uint8)
    _native.ggml_encode(kind, _f32(blocks), *_weights(importance, values), len(blocks), data)
    return data


def ggml_quantize(
    ggml_type: str, data: bytes | F32, dtype: str, importance: F32 | None
) -> tuple[U8, tuple[float, float, float]]:
    """`ggml_encode` of whole blocks, and `reference.error_sums` of what the bytes decode to.

    Args:
        data, dtype: as in `quantize_blocks`.

    Raises:
        FloatingPointError: NaN or Inf.
    """
    kind, values, nbytes = _GGML[ggml_type]
    blocks = _count(data, dtype) // values
    out = np.empty((blocks, nbytes), np.uint8)
    weights = _weights(importance, values)
    source = SOURCE_DTYPES.index(dtype)
    error = _native.ggml_quantize(kind, data, source, *weights, blocks, out)
    if error is None:
        raise FloatingPointError("values that are not finite")
    return out, error


def cast(data: bytes | F32, dtype: str, to: str) -> tuple[U8, tuple[float, float, float]]:
    """Values as bytes of another dtype, and `reference.error_sums` of what they read back as.

    Args:
        data, dtype: as in `quantize_blocks`.
        to: one of `SOURCE_DTYPES`; too large values become Inf.

    Raises:
        FloatingPointError: NaN or Inf.
    """
    count = _count(data, dtype)
    out = np.empty(count * (4 if to == "F32" else 2), np.uint8)
    source, target = SOURCE_DTYPES.index(dtype), SOURCE_DTYPES.index(to)
    error = _native.cast(data, source, count, target, out)
    if error is None:
        raise FloatingPointError("values that are not finite")
    return out, error


def _weights(importance: F32 | None, values: int) -> tuple[F32 | None, int]:
    """Importance and the number of blocks that it is for."""
    return (None, 0) if importance is None else (_f32(importance), importance.size // values)


def ggml_decode(ggml_type: str, data: U8) -> F32:
    """``GGML_BLOCKS[ggml_type].decode``; scales may be Inf or NaN."""
    kind, values, _ = _GGML[ggml_type]
    blocks = np.empty((len(data), values), np.float32)
    _native.ggml_decode(kind, _u8(data), len(data), blocks)
    return blocks
