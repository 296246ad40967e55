"""The native twins of `reference`: the same signatures and the same bits.

Importing this module fails with ImportError where the extension was not built. Arrays may have any
strides; results are new arrays. Values are finite unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import qconvert.kernels.compiled as _compiled
from qconvert.encoding import SCALE_SIZES, AffineEncoding
from qconvert.geometry import PACK_GROUP
from qconvert.kernels import _native, composed
from qconvert.kernels.arithmetic import (
    HISTOGRAM_BINS,
    PIECE,
    SCALE_NUMPY,
    level_weights,
    narrow_bounds,
    nearest_entries,
    row_units,
    stored_zero_points,
    stream_bytes,
)
from qconvert.kernels.records import (
    F32,
    F64,
    I32,
    U8,
    Activations,
    Bytes,
    CodeGrid,
    Encoded,
    ErrorSums,
    Extent,
    Factors,
    GroupStatistics,
    IntegerRows,
    LevelCode,
    LevelSteps,
    Moments,
    Multiples,
    Observed,
    Parameters,
    PowerSums,
    Product,
    SourceRows,
    Weighting,
)
from qconvert.kernels.reference import widening
from qconvert.kernels.row_sweep import sweep_rows as sweep_rows
from qconvert.kernels.scale_search import Found, best_scales, long_source
from qconvert.ranges import RangeMethod, SearchGrid, search_grid

# Dtypes that loops read as they lie in a file.
SOURCE_DTYPES = ("F32", "BF16", "F16")
# Values and bytes of a block, by the name of the ggml type.
_GGML = {name: sizes for name, *sizes in _native.ggml_types()}


def variants() -> tuple[str, ...]:
    """Instruction sets that this processor can run, the fastest last."""
    return _native.variants()


def variant() -> str:
    """The one that runs."""
    return _native.variant()


def select(name: str) -> None:
    """Run ``name``, one of `variants`, from now on and in all threads."""
    _native.select(name)


# --- arguments ------------------------------------------------------------------------------------


def _f32(x: NDArray[Any]) -> F32:
    return np.ascontiguousarray(x, np.float32)


def _f32_or_none(x: F32 | None) -> F32 | None:
    return None if x is None else _f32(x)


def _i32(x: NDArray[Any]) -> I32:
    return np.ascontiguousarray(x, np.int32)


def _u8(x: NDArray[Any]) -> U8:
    return np.ascontiguousarray(x, np.uint8)


def _readable(rows: SourceRows) -> tuple[bytes | F32, str]:
    """Values as native loops can read them, and their dtype.

    Raises:
        FloatingPointError: see `values`, which this may come down to.
    """
    if rows.dtype in SOURCE_DTYPES:
        return rows.data, rows.dtype
    return values(rows), "F32"


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


# --- statistics -----------------------------------------------------------------------------------


def widen(raw: bytes, dtype: str) -> NDArray[Any]:
    """`reference.widen`."""
    if dtype in ("BF16", "F16"):
        wide = np.empty(len(raw) // 2, np.float32)
        (_native.widen_bf16 if dtype == "BF16" else _native.widen_f16)(raw=raw, out=wide)
        return wide
    if dtype in widening.BYTES:
        wide = np.empty(len(raw), np.float32)
        _native.widen_table(raw=raw, table=widening.table(dtype), out=wide)
        return wide
    return widening.widen(raw, dtype)


def observe(x: NDArray[np.floating[Any]]) -> Observed:
    """`reference.observe`."""
    wide = x.dtype == np.float64
    run = np.ascontiguousarray(x, np.float64 if wide else np.float32)
    nonfinite, first, zeros, count, *rest = _native.observe(x=run, n=len(run), wide=wide)
    return Observed(
        size=len(run),
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
    return _native.all_finite(x=_f32(x))


values = partial(composed.values, widen, all_finite)


def histogram(x: F32) -> NDArray[np.int64]:
    """`reference.histogram`; values need not be finite."""
    bins = np.zeros(HISTOGRAM_BINS, np.int64)
    _native.histogram(x=_f32(x), bins=bins)
    return bins


def extrema(x: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
    """`reference.extrema`; where 0 and -0 tie, either sign, as there."""
    low, high, zeros = _extrema(x)
    return low, high, zeros > 0


def extent(x: F32, counts: I32 | None = None) -> Extent:
    """`reference.extent`."""
    low, high, zeros = _extrema(x)
    padding = 0 if counts is None else x.shape[1] - counts
    zero = np.float32(0)
    return Extent(np.minimum(low, zero), np.maximum(high, zero), zeros > padding)


def _extrema(x: F32) -> tuple[F32, F32, NDArray[np.int64]]:
    groups, length = x.shape
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    zeros = np.empty(groups, np.int64)
    _native.extrema(x=_f32(x), groups=groups, length=length, low=low, high=high, zeros=zeros)
    return low, high, zeros


observe_groups = partial(composed.observe_groups, extrema)


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
        weights=_f32(weights),
        values=_f32(values),
        rows=rows,
        columns=columns,
        group=group,
        scale=_f32(scale),
        offset=_f32_or_none(offset),
        zero=_i32(zero),
        code_step=code_step,
        low=low,
        high=high,
        scale_rounding=_f32_or_none(scale_rounding),
        offset_rounding=_f32_or_none(offset_rounding),
    )


def error_sums(x: F32, decoded: F32) -> tuple[float, float, float]:
    """`reference.error_sums`."""
    return _native.error_sums(x=_f32(x), decoded=_f32(decoded))


def power_sums(x: F32, pivot: float) -> PowerSums:
    """`reference.power_sums`."""
    return _native.power_sums(x=_f32(x), pivot=pivot)


# --- searching a scale ----------------------------------------------------------------------------


def long_sums(
    x: F32, inverse: F32, offset: F32, low: int, top: int, weights: F32 | None = None
) -> F64:
    """`reference.long_sums`."""
    rows, length = x.shape
    sums = np.empty((len(inverse), rows, 3))
    _native.long_sums(
        x=_f32(x),
        weights=_f32_or_none(weights),
        rows=rows,
        length=length,
        candidates=len(inverse),
        inverse=_f32(inverse),
        offset=_f32(offset),
        low=low,
        top=top,
        sums=sums,
    )
    return sums


def search(
    x: F32,
    counts: I32 | None,
    e: Extent,
    encoding: AffineEncoding,
    weights: Weighting | None = None,
) -> Found:
    """`reference.search`; groups of more than 256 values are searched by their `long_sums`."""
    groups, length = x.shape
    if length > PIECE:
        if weights is None:
            return best_scales(e, None, long_source(long_sums, x, encoding, None), encoding)
        each, reaches = weights.groups(0, groups)
        source = long_source(long_sums, x, encoding, each)
        return best_scales(e, extent(x * reaches), source, encoding)
    weight, reach = (None, None) if weights is None else (weights.weight, weights.reach)
    factors, moves = _grid(search_grid(encoding.bits, encoding.symmetric))
    scale, zero = np.empty(groups), np.empty(groups, np.int32)
    found = np.empty(groups, np.bool_)
    _native.search(
        x=_f32(x),
        groups=groups,
        length=length,
        counts=None if counts is None else _i32(counts),
        low=_f32(e.low),
        high=_f32(e.high),
        has_zero=np.ascontiguousarray(e.has_zero, np.bool_),
        weight=_f32_or_none(weight),
        reach=_f32_or_none(reach),
        period=_period(groups, weight, reach),
        bits=encoding.bits,
        symmetric=encoding.symmetric,
        factors=factors,
        moves=moves,
        scale=scale,
        zero=zero,
        found=found,
    )
    return scale, zero, found


def fit(
    x: F32,
    encoding: AffineEncoding,
    method: RangeMethod,
    counts: I32 | None = None,
    weights: Weighting | None = None,
    whole: bool = False,
) -> Parameters:
    """`reference.fit`."""
    return composed.fit(_compiled, x, encoding, method, counts, weights, whole)


# --- codes ----------------------------------------------------------------------------------------


def encode(x: F32, scale: F32, zero: I32, bits: int, symmetric: bool) -> tuple[U8, int]:
    """`reference.encode`."""
    groups, length = x.shape
    codes = np.empty(x.shape, np.uint8)
    clipped = _native.encode(
        x=_f32(x),
        groups=groups,
        length=length,
        scale=_f32(np.broadcast_to(scale, groups)),
        zero=_i32(np.broadcast_to(zero, groups)),
        bits=bits,
        symmetric=symmetric,
        codes=codes,
    )
    return codes, clipped


def decode(codes: U8, scale: F32, zero: I32, bits: int, symmetric: bool) -> F32:
    """`reference.decode`."""
    groups, length = codes.shape
    x = np.empty(codes.shape, np.float32)
    _native.decode(
        codes=_u8(codes),
        groups=groups,
        length=length,
        scale=_f32(np.broadcast_to(scale, groups)),
        zero=_i32(np.broadcast_to(zero, groups)),
        bits=bits,
        symmetric=symmetric,
        x=x,
    )
    return x


def encode_rows(
    x: F32, encoding: AffineEncoding, parameters: Parameters, mean_square: F32 | None = None
) -> Encoded:
    """`reference.encode_rows`."""
    rows, columns = x.shape
    packed = _codes_of(encoding, rows, columns)
    error = _native.encode_rows(
        x=_f32(x),
        rows=rows,
        columns=columns,
        scale=_f32(parameters.scale),
        zero=_i32(parameters.zero),
        groups=len(parameters.scale),
        bits=encoding.bits,
        symmetric=encoding.symmetric,
        block=encoding.block,
        mean_square=_f32_or_none(mean_square),
        period=_period(rows, mean_square),
        packed=packed,
    )
    scales = parameters.scale.astype(SCALE_NUMPY[encoding.scale_dtype]).tobytes()
    zeros = stored_zero_points(parameters.zero, encoding)
    return Encoded(_segments(packed.data, scales, zeros.data), ErrorSums(x.size, *error))


def _codes_of(encoding: AffineEncoding, rows: int, columns: int) -> U8:
    """Room for the stored codes of rows, each padded to whole blocks and groups of 32."""
    unit = max(encoding.block, 1 if encoding.bits == 8 else PACK_GROUP)
    return np.empty(rows * (-(-columns // unit) * unit * encoding.bits // 8), np.uint8)


def _segments(codes: Bytes, scales: Bytes, zeros: Bytes) -> dict[str, Bytes]:
    found = {"codes": codes, "scales": scales}
    return {**found, "zero_points": zeros} if len(zeros) else found


def quantize_rows(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: tuple[float, float],
    weights: Weighting | None = None,
) -> Encoded:
    """`reference.quantize_rows`, in one pass over full blocks and over channels."""
    if not encoding.block:
        return _quantize_channels(rows, encoding, method, bounds, weights)
    full = rows.shape[1] % max(encoding.block, PACK_GROUP) == 0
    if full and method.name != "percentile":
        return _quantize_blocks(rows, encoding, method, bounds, weights)
    return composed.quantize_rows(_compiled, rows, encoding, method, bounds, weights)


def _quantize_blocks(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: tuple[float, float],
    weights: Weighting | None,
) -> Encoded:
    """Rows of full blocks, a whole number of times 32 values below 8 bits, by mse or minmax."""
    low, high, pivot = narrow_bounds(bounds)
    task = _blocks(rows, encoding, method, weights)
    zeros = np.empty(0 if encoding.symmetric else rows.size // encoding.block, np.uint8)
    found = _native.quantize_blocks(**task, zeros=zeros, low=low, high=high, pivot=pivot)
    segments = _segments(task["codes"].data, task["scales"].data, zeros.data)
    return _seen(found, rows.size, pivot, segments)


def _blocks(
    rows: SourceRows, encoding: AffineEncoding, method: RangeMethod, weights: Weighting | None
) -> dict[str, Any]:
    """Arguments of a pass over full blocks, by mse or minmax, but for zero points."""
    bits, symmetric, block = encoding.bits, encoding.symmetric, encoding.block
    data, dtype = _readable(rows)
    groups = rows.size // block
    weight = reach = mean_square = None
    if weights is not None:
        weight, reach = weights.weight, weights.reach
        mean_square = weights.mean_square.reshape(-1, block)
    factors, moves = _grid(search_grid(bits, symmetric) if method.name == "mse" else None)
    return {
        "data": data,
        "dtype": dtype,
        "groups": groups,
        "block": block,
        "bits": bits,
        "symmetric": symmetric,
        "scale_dtype": encoding.scale_dtype,
        "factors": factors,
        "moves": moves,
        "weight": _f32_or_none(weight),
        "reach": _f32_or_none(reach),
        "mean_square": _f32_or_none(mean_square),
        "period": _period(groups, weight, reach, mean_square),
        "codes": np.empty(rows.size // 8 * bits, np.uint8),
        "scales": np.empty(groups * SCALE_SIZES[encoding.scale_dtype], np.uint8),
    }


def quantize_stream(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    biased: bool,
    weights: Weighting | None = None,
) -> Encoded:
    """`reference.quantize_stream`, in one pass over rows that are a multiple of 32 values."""
    if rows.shape[1] % max(encoding.block, PACK_GROUP) or method.name == "percentile":
        return composed.quantize_stream(_compiled, rows, encoding, method, biased, weights)
    task = _blocks(rows, encoding, method, weights)
    each = SCALE_SIZES[encoding.scale_dtype] if biased else 1
    groups = rows.size // encoding.block
    zeros = np.empty(0 if encoding.symmetric else groups * each, np.uint8)
    found = _native.quantize_stream(**task, zeros=zeros, biased=biased)
    if found is None:
        raise FloatingPointError("values that are not finite")
    segments = composed.stream_segments(task["codes"].data, task["scales"].data, zeros.data, biased)
    return Encoded(segments, ErrorSums(rows.size, *found))


def _quantize_channels(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: tuple[float, float],
    weights: Weighting | None,
) -> Encoded:
    """Rows with a float32 scale each, which is fitted first unless it is the minmax one."""
    bits, symmetric = encoding.bits, encoding.symmetric
    count, columns = rows.shape
    scale = zero = mean_square = None
    if method.name != "minmax":
        parameters = fit(values(rows), encoding, method, None, weights)
        scale, zero = _f32(parameters.scale), _i32(parameters.zero)
    if weights is not None:
        mean_square = _f32(weights.mean_square)
    data, dtype = _readable(rows)
    low, high, pivot = narrow_bounds(bounds)
    codes = _codes_of(encoding, count, columns)
    scales = np.empty(4 * count, np.uint8)
    zeros = np.empty(0 if symmetric else count, np.uint8)
    found = _native.quantize_channels(
        data=data,
        dtype=dtype,
        rows=count,
        columns=columns,
        bits=bits,
        symmetric=symmetric,
        either_side=method.name == "mse" and bits < 8,
        low=low,
        high=high,
        pivot=pivot,
        scale=scale,
        zero=zero,
        mean_square=mean_square,
        period=_period(count, mean_square),
        codes=codes,
        scales=scales,
        zeros=zeros,
    )
    return _seen(found, rows.size, pivot, _segments(codes.data, scales.data, zeros.data))


def _seen(
    found: _native.Figures | None, count: int, pivot: float, segments: dict[str, Bytes]
) -> Encoded:
    if found is None:
        raise FloatingPointError("values that are not finite")
    errors, outside, ranges, (minimum, maximum, *powers) = found
    done = Encoded(segments, ErrorSums(count, *errors))
    moments = Moments.about(
        count, (minimum, maximum), pivot, (powers[0], powers[1], powers[2], powers[3])
    )
    return composed.seen(done, moments, GroupStatistics(*ranges), outside)


def pack(values: U8, width: int) -> U8:
    """`reference.pack`."""
    groups = values.size // PACK_GROUP
    packed = np.empty(groups * 4 * width, np.uint8)
    _native.pack(values=_u8(values), groups=groups, width=width, packed=packed)
    return packed


def unpack(packed: U8, width: int) -> U8:
    """`reference.unpack`."""
    groups = packed.size // (4 * width)
    values = np.empty(groups * PACK_GROUP, np.uint8)
    _native.unpack(values=values, groups=groups, width=width, packed=_u8(packed))
    return values


def pack_stream(codes: U8, bits: int) -> U8:
    """`reference.pack_stream`."""
    rows, columns = codes.shape
    packed = np.empty((rows, stream_bytes(columns, bits)), np.uint8)
    how = {"rows": rows, "columns": columns, "bits": bits, "stride": packed.shape[1]}
    _native.pack_stream(codes=_u8(codes), **how, packed=packed)
    return packed


def unpack_stream(data: U8, bits: int, columns: int) -> U8:
    """`reference.unpack_stream`."""
    rows, stride = data.shape
    codes = np.empty((rows, columns), np.uint8)
    how = {"rows": rows, "columns": columns, "bits": bits, "stride": stride}
    _native.unpack_stream(codes=codes, **how, packed=_u8(data))
    return codes


def load_codes(packed: bytes, encoding: AffineEncoding) -> U8:
    """`reference.load_codes`."""
    return composed.load_codes(_compiled, packed, encoding)


# --- integer matrix product -----------------------------------------------------------------------


def integer_dots(codes: NDArray[np.int16], activations: NDArray[np.int8]) -> I32:
    """`reference.integer_dots`, as long as the sums fit 32 bits."""
    spans, rows, length = codes.shape
    samples = activations.shape[1]
    sums = np.empty((spans, samples, rows), np.int32)
    _native.integer_dots(
        codes=np.ascontiguousarray(codes, np.int16),
        inputs=np.ascontiguousarray(activations, np.int8),
        spans=spans,
        rows=rows,
        samples=samples,
        length=length,
        sums=sums,
    )
    return sums


def integer_product(rows: IntegerRows, a: Activations, *, check: bool = False) -> Product:
    """`reference.integer_product`."""
    return composed.integer_product(_compiled, rows, a, check=check)


def product(packed: Bytes, scale: F32, zero: I32, encoding: AffineEncoding, a: Activations) -> F32:
    """`reference.product`."""
    rows, groups = scale.shape
    weights = {
        "packed": packed,
        "rows": rows,
        "row_codes": encoding.row_codes,
        "columns": encoding.row_length,
        "scale": _f32(scale),
        "zero": _i32(zero),
        "groups": groups,
        "bits": encoding.bits,
        "symmetric": encoding.symmetric,
        "block": encoding.block,
    }
    return _multiplied(_native.product, weights, rows, a)


def _multiplied(
    loop: Callable[..., None], weights: dict[str, Any], rows: int, a: Activations
) -> F32:
    """What a loop makes of weights, as it takes them, and of activations: y (M, R)."""
    y = np.empty((len(a.codes), rows), np.float32)
    zero_points = a.zero_points[:, 0]
    for zero_point in np.unique(zero_points):  # the loop takes one for all of its samples
        same = zero_points == zero_point
        part = np.empty((int(same.sum()), rows), np.float32)
        loop(
            **weights,
            inputs=np.ascontiguousarray(a.codes[same], np.int8),
            samples=len(part),
            zero_point=int(zero_point),
            y=part,
        )
        y[same] = part
    return y * a.scale[:, None]


# --- ggml and casts -------------------------------------------------------------------------------


def ggml_encode(ggml_type: str, blocks: F32, importance: F32 | None = None) -> U8:
    """`reference.ggml_encode`."""
    _, nbytes = _GGML[ggml_type]
    data = np.empty((len(blocks), nbytes), np.uint8)
    _native.ggml_encode(
        ggml_type=ggml_type,
        x=_f32(blocks),
        importance=_f32_or_none(importance),
        blocks=len(blocks),
        out=data,
    )
    return data


def ggml_quantize(ggml_type: str, rows: SourceRows, importance: F32 | None = None) -> Encoded:
    """`reference.ggml_quantize`."""
    block, nbytes = _GGML[ggml_type]
    data, dtype = _readable(rows)
    blocks = rows.size // block
    out = np.empty(blocks * nbytes, np.uint8)
    sums = _native.ggml_quantize(
        ggml_type=ggml_type,
        data=data,
        dtype=dtype,
        importance=_f32_or_none(importance),
        blocks=blocks,
        out=out,
    )
    return _measured(out, rows.size, sums)


def cast(rows: SourceRows, dtype: str) -> Encoded:
    """`reference.cast`."""
    data, source = _readable(rows)
    out = np.empty(rows.size * (4 if dtype == "F32" else 2), np.uint8)
    sums = _native.cast(data=data, dtype=source, count=rows.size, to=dtype, out=out)
    return _measured(out, rows.size, sums)


def _measured(out: U8, count: int, sums: tuple[float, float, float] | None) -> Encoded:
    if sums is None:
        raise FloatingPointError("values that are not finite")
    return Encoded({"data": out.data}, ErrorSums(count, *sums))


def ggml_decode(ggml_type: str, data: U8) -> F32:
    """`reference.ggml_decode`."""
    block, _ = _GGML[ggml_type]
    blocks = np.empty((len(data), block), np.float32)
    _native.ggml_decode(ggml_type=ggml_type, data=_u8(data), blocks=len(data), x=blocks)
    return blocks


# --- codebooks ------------------------------------------------------------------------------------


def codebook_encode(x: F32, scale: F32, table: F32, block: int) -> U8:
    """`reference.codebook_encode`."""
    midpoints, entries = nearest_entries(table)
    out = np.empty(-(-len(x) // 2), np.uint8)
    _native.codebook_encode(
        x=_f32(x),
        count=len(x),
        scale=_f32(scale),
        block=block,
        midpoints=midpoints,
        midpoint_count=len(midpoints),
        entries=entries,
        out=out,
    )
    return out


def codebook_decode(data: U8, count: int, scale: F32, table: F32, block: int) -> F32:
    """`reference.codebook_decode`."""
    x = np.empty(count, np.float32)
    _native.codebook_decode(
        data=_u8(data), count=count, scale=_f32(scale), block=block, table=_f32(table), x=x
    )
    return x


# --- levels with signed steps ---------------------------------------------------------------------


def levels_encode(x: F32, code: LevelCode, mean_square: F32 | None = None) -> Encoded:
    """`reference.levels_encode`."""
    rows, columns = x.shape
    scales, unit = row_units(extent(x).magnitude, code)
    codes = np.empty(rows * -(-columns // PACK_GROUP) * 4 * code.bits, np.uint8)
    steps = np.empty(rows * code.blocks(columns), np.uint8)
    error = _native.levels_encode(
        x=_f32(x),
        rows=rows,
        columns=columns,
        unit=unit,
        **_level_code(code),
        weights=_f32_or_none(level_weights(mean_square, columns, code.block)),
        mean_square=_f32_or_none(mean_square),
        codes=codes,
        steps=steps,
    )
    found: dict[str, Bytes] = {
        "codes": codes.data,
        "scales": steps.data,
        "row_scales": scales.tobytes(),
    }
    return Encoded(found, ErrorSums(x.size, *error))


def levels_decode(packed: U8, columns: int, steps: LevelSteps, code: LevelCode) -> F32:
    """`reference.levels_decode`."""
    x = np.empty((len(steps.unit), columns), np.float32)
    _native.levels_decode(**_stored_levels(packed, columns, steps, code), x=x)
    return x


def levels_product(
    packed: U8, columns: int, steps: LevelSteps, code: LevelCode, a: Activations
) -> F32:
    """`reference.levels_product`."""
    stored = _stored_levels(packed, columns, steps, code)
    return _multiplied(_native.levels_product, stored, len(steps.unit), a)


def _level_code(code: LevelCode) -> dict[str, Any]:
    return {
        "bits": code.bits,
        "block": code.block,
        "step_bits": code.step_bits,
        "shift": code.shift,
        "levels": code.table,
    }


def _stored_levels(packed: U8, columns: int, steps: LevelSteps, code: LevelCode) -> dict[str, Any]:
    return {
        "packed": _u8(packed),
        "rows": len(steps.unit),
        "columns": columns,
        "unit": _f32(steps.unit),
        "steps": np.ascontiguousarray(steps.steps, np.int8),
        "shifts": np.ascontiguousarray(steps.shifts, np.int8),
        **_level_code(code),
    }


# --- compensated rounding -------------------------------------------------------------------------


def compensate(
    x: F32,
    codes: U8,
    grid: CodeGrid,
    factors: Factors,
    passes: int,
    scale_dtype: str | None = None,
) -> tuple[U8, F32, F32]:
    """`reference.compensate` of binary32."""
    rows, columns = x.shape
    found = np.array(codes, np.uint8, order="C")
    scale, offset = (np.array(a, np.float32, order="C") for a in (grid.scale, grid.offset))
    _native.compensate(
        x=_f32(x),
        rows=rows,
        columns=columns,
        order=_i32(factors.order),
        levels=_f32(grid.levels),
        scale=scale,
        zero=_f32(grid.zero),
        offset=offset,
        length=grid.length,
        gram=_f32(factors.gram),
        feedback=_f32(factors.feedback),
        passes=passes,
        scale_dtype=scale_dtype,
        **_multiples("scale", grid.scales),
        **_multiples("offset", grid.offsets),
        codes=found,
    )
    return found, scale, offset


def _multiples(name: str, of: Multiples | None) -> dict[str, Any]:
    """Arguments of the numbers of groups that are multiples of a unit."""
    unit = None if of is None else _f32(of.unit)
    low, high = (0, 0) if of is None else (of.low, of.high)
    return {f"{name}_unit": unit, f"{name}_low": low, f"{name}_high": high}
