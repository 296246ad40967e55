"""The definition of every kernel, in NumPy: what the bits must be. Native code may only be faster.

``KERNELS`` is the table: `qconvert.kernels` offers these, `qconvert.kernels.compiled` has a twin of
the same signature for each, and a test compares them bit for bit.

Conventions: *groups* are rows of an array ``x`` of shape (G, L), float32, L <= 256; ``counts``
(G,) says how many values of each group are real (the rest are zeros behind them), None when all
are. Codes are unsigned throughout (0 .. 2^bits - 1); zero points are unsigned too, in *zero
steps*: 4 to a code below 8 bits, 1 at 8 bits. Section numbers are those of formats/schemes/SPEC.md.
"""

from __future__ import annotations

import qconvert.kernels.reference as _reference
from qconvert.encoding import AffineEncoding
from qconvert.kernels import composed
from qconvert.kernels.records import (
    F32,
    I32,
    U8,
    Activations,
    Bytes,
    Encoded,
    IntegerRows,
    LevelCode,
    LevelSteps,
    Parameters,
    Product,
    SourceRows,
    Weighting,
)
from qconvert.kernels.reference.casts import cast, values
from qconvert.kernels.reference.codebook import codebook_decode, codebook_encode
from qconvert.kernels.reference.codes import decode, encode, pack, unpack
from qconvert.kernels.reference.compensation import compensate, sweep_rows
from qconvert.kernels.reference.ggml import ggml_decode, ggml_encode, ggml_quantize
from qconvert.kernels.reference.levels import levels_decode, levels_encode
from qconvert.kernels.reference.product import integer_dots
from qconvert.kernels.reference.rows import encode_rows
from qconvert.kernels.reference.statistics import (
    all_finite,
    error_sums,
    extent,
    extrema,
    histogram,
    moments,
    observe,
    observe_groups,
    power_sums,
    worst_step,
)
from qconvert.kernels.reference.streams import pack_stream, unpack_stream
from qconvert.kernels.reference.sums import long_sums, search
from qconvert.kernels.reference.widening import widen
from qconvert.ranges import RangeMethod


def fit(
    x: F32,
    encoding: AffineEncoding,
    method: RangeMethod,
    counts: I32 | None = None,
    weights: Weighting | None = None,
    whole: bool = False,
) -> Parameters:
    """`composed.fit`."""
    return composed.fit(_reference, x, encoding, method, counts, weights, whole)


def quantize_rows(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: tuple[float, float],
    weights: Weighting | None = None,
) -> Encoded:
    """`composed.quantize_rows`."""
    return composed.quantize_rows(_reference, rows, encoding, method, bounds, weights)


def quantize_stream(
    rows: SourceRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    biased: bool,
    weights: Weighting | None = None,
) -> Encoded:
    """`composed.quantize_stream`."""
    return composed.quantize_stream(_reference, rows, encoding, method, biased, weights)


def load_codes(packed: bytes, encoding: AffineEncoding) -> U8:
    """`composed.load_codes`."""
    return composed.load_codes(_reference, packed, encoding)


def integer_product(rows: IntegerRows, a: Activations, *, check: bool = False) -> Product:
    """`composed.integer_product`."""
    return composed.integer_product(_reference, rows, a, check=check)


def product(packed: Bytes, scale: F32, zero: I32, encoding: AffineEncoding, a: Activations) -> F32:
    """`composed.product`."""
    return composed.product(_reference, packed, scale, zero, encoding, a)


def levels_product(
    packed: U8, columns: int, steps: LevelSteps, code: LevelCode, a: Activations
) -> F32:
    """`composed.levels_product`."""
    return composed.levels_product(_reference, packed, columns, steps, code, a)


__all__ = [
    "all_finite",
    "cast",
    "codebook_decode",
    "codebook_encode",
    "compensate",
    "decode",
    "encode",
    "encode_rows",
    "error_sums",
    "extent",
    "extrema",
    "fit",
    "ggml_decode",
    "ggml_encode",
    "ggml_quantize",
    "histogram",
    "integer_dots",
    "integer_product",
    "levels_decode",
    "levels_encode",
    "levels_product",
    "load_codes",
    "long_sums",
    "moments",
    "observe",
    "observe_groups",
    "pack",
    "pack_stream",
    "power_sums",
    "product",
    "quantize_rows",
    "quantize_stream",
    "search",
    "sweep_rows",
    "unpack",
    "unpack_stream",
    "values",
    "widen",
    "worst_step",
]
KERNELS = tuple(__all__)
