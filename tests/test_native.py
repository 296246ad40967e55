"""The native kernels give the bits of the NumPy definition, in every variant that this processor
runs; their C is clean under warnings and sanitizers, and means the same on aarch64.

Not checked: the sign of a zero that `extrema` finds (NumPy's depends on the processor; reports have
no -0), NaN payloads out of arithmetic, and speed: ``python tests/test_native.py`` prints that.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.codebook import table_of
from qconvert.codecs.compensation import prepared, shares_of
from qconvert.encoding import BITS, BLOCKS, AffineEncoding
from qconvert.kernels import arithmetic, records, reference, scale_search
from qconvert.kernels.records import (
    Activations,
    CodeGrid,
    Encoded,
    Factors,
    LevelCode,
    LevelSteps,
    Multiples,
    Parameters,
    SourceRows,
)
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.ranges import RANGE_METHODS, RangeMethod
from qconvert.schemes import (
    CODEBOOKS,
    LEVEL_BLOCKS,
    LEVELS,
    PLACED,
    PLACED_LEVELS,
    PLAIN_STEPS,
    VARIANTS,
    steps_of,
)
from qconvert.stages.parallel import Workers

if os.environ.get("QCONVERT_KERNELS") == "reference":
    pytest.skip("compares native kernels whatever runs: once is enough", allow_module_level=True)

compiled = pytest.importorskip(
    "qconvert.kernels.compiled",
    reason="the extension is not built here: pip found no C compiler",
    exc_type=ImportError,
)

SOURCES = Path(__file__).resolve().parent.parent / "qconvert" / "kernels" / "native"
DRIVER = Path(__file__).resolve().parent / "native_driver.c"
FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
F32 = NDArray[np.float32]


@pytest.fixture(params=compiled.variants(), autouse=True)
def _each_variant(request: pytest.FixtureRequest) -> Iterator[None]:
    before = compiled.variant()
    compiled.select(request.param)
    yield
    compiled.select(before)


def same(a: Any, b: Any) -> None:
    """Equal in type, shape and every bit; floats of Python too, except for the sign of 0."""
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), (a[a != b][:5], b[a != b][:5])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, Encoded):
        assert {k: bytes(v) for k, v in a.segments.items()} == {
            k: bytes(v) for k, v in b.segments.items()
        }
        for part in ("error", "moments", "groups", "outside", "nonfinite"):
            assert repr(getattr(a, part)) == repr(getattr(b, part)), part
    elif is_dataclass(a):
        for field in fields(a):
            same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert a == b


def twins(name: str, *arguments: Any, **options: Any) -> Any:
    """What the definition of a kernel gives, once its native twin has given the same bits."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        wanted = getattr(reference, name)(*arguments, **options)
        same(getattr(compiled, name)(*arguments, **options), wanted)
    return wanted


def test_every_kernel_is_compared_here() -> None:
    """`twins` is called for each row of the table, and both sides take the same arguments."""
    text = Path(__file__).read_text()
    for name in reference.KERNELS:
        assert f'twins("{name}"' in text, name
        one, other = (inspect.signature(getattr(m, name)) for m in (reference, compiled))
        assert list(one.parameters) == list(other.parameters), name


# --- values ---------------------------------------------------------------------------------------

KINDS = (
    *("gaussian", "uniform", "skewed", "ties", "zeros", "minus zeros", "constant", "sparse"),
    *("denormal", "tiny", "huge", "one sided", "bf16", "mixed"),
)


def values(kind: str, seed: int, *shape: int) -> F32:
    """Finite float32 values of a kind."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    match kind:
        case "uniform":
            x = rng.uniform(-1, 1, shape)
        case "skewed":
            x = rng.exponential(1, shape) - 0.1
        case "ties":
            x = rng.integers(-31, 32, shape) / 2
        case "zeros":
            x = np.zeros(shape)
        case "minus zeros":
            x = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
        case "constant":
            x = np.full(shape, rng.standard_normal())
        case "sparse":
            x = np.where(rng.random(shape) < 0.9, rng.choice([0.0, -0.0], shape), x)
        case "denormal":
            x = x * 2.0**-140
        case "tiny":
            x = x * 2.0**-99
        case "huge":
            x = np.clip(x * 2.0 ** rng.choice([106, 110, 122]), -3.4e38, 3.4e38)
        case "one sided":
            x = -np.abs(x)
        case "bf16":
            return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        case "mixed":
            x = x * 2.0 ** rng.integers(-30, 30, shape)
    return x.astype(np.float32)


kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 256)
widths = st.sampled_from(BITS)
blocks = st.sampled_from((0, *BLOCKS))
often = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def scheme(bits: int, block: int, symmetric: bool, columns: int) -> AffineEncoding:
    return AffineEncoding(bits, "block" if block else "channel", block, symmetric, "F32", columns)


def random_parameters(x: F32, bits: int, symmetric: bool, seed: int) -> tuple[F32, Any]:
    """Scales near those of the groups' ranges, zero ones where all is zero, and zero points."""
    rng = np.random.default_rng(seed)
    magnitude = np.abs(x).max(axis=1)
    factor = rng.uniform(0.3, 1.2, len(x)) * (rng.choice([-1, 1], len(x)) if symmetric else 1)
    scale = (magnitude * factor / (1 << (bits - 1))).astype(np.float32)
    scale = np.where((scale == 0) & (magnitude > 0), np.float32(2.0**-149), scale)
    zero = rng.integers(0, ((1 << bits) - 1) * arithmetic.zero_steps(bits) + 1, len(x))
    return scale, np.where(symmetric | (scale == 0), 0, zero).astype(np.int32)


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_every_stored_pattern_widens_to_the_same_bits(dtype: str) -> None:
    raw = np.arange(256, dtype=np.uint8) if "F8" in dtype else np.arange(65536, dtype="<u2")
    for shift in (0, 1):  # the bytes of a file need not be aligned
        data = memoryview(b"\0" * shift + raw.tobytes())[shift:]
        same(
            compiled.widen(data, dtype).view(np.uint32),
            reference.widen(data, dtype).view(np.uint32),
        )


@pytest.mark.parametrize("dtype", ["F64", "F32", "I8", "U32", "BOOL"])
def test_other_dtypes_widen_as_before(dtype: str) -> None:
    twins("widen", bytes(range(64)), dtype)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I8", "U32", "BOOL"])
def test_values(dtype: str) -> None:
    stored = bytes(range(64)) * 2
    twins("values", SourceRows(stored, dtype, (2, len(reference.widen(stored, dtype)) // 2)))


@often
@given(kinds, seeds, st.integers(1, 700), st.booleans())
def test_moments(kind: str, seed: int, length: int, wide: bool) -> None:
    x = values(kind, seed, length)
    x = x.astype(np.float64) * 1e-3 if wide else x
    twins("moments", x)


@often
@given(kinds, seeds, st.integers(0, 700), st.booleans(), st.floats(0, 1))
def test_observe_skips_what_is_not_finite(
    kind: str, seed: int, length: int, wide: bool, share: float
) -> None:
    rng = np.random.default_rng(seed)
    x = values(kind, seed, length).astype(np.float64 if wide else np.float32)
    bad = rng.random(length) < share
    x[bad] = rng.choice([np.nan, np.inf, -np.inf], length)[bad]
    twins("observe", x)
    twins("histogram", x.astype(np.float32))


@often
@given(kinds, seeds, st.integers(1, 40), st.integers(1, 300))
def test_extrema_and_extent(kind: str, seed: int, groups: int, length: int) -> None:
    x = values(kind, seed, groups, length) + np.float32(0)  # no -0: see above
    twins("extrema", x)
    counts = np.random.default_rng(seed).integers(1, length + 1, groups).astype(np.int32)
    x[np.arange(length) >= counts[:, None]] = 0
    for c in (None, counts):
        twins("extent", x, c)


@often
@given(kinds, seeds, st.integers(1, 9), st.integers(1, 300), widths, blocks, st.booleans())
def test_observe_groups(
    kind: str, seed: int, rows: int, columns: int, bits: int, block: int, search: bool
) -> None:
    encoding = scheme(bits, block, True, columns)
    twins("observe_groups", values(kind, seed, rows, columns), encoding, search)


@often
@given(kinds, seeds, st.integers(0, 700), st.floats(-2, 2, width=32))
def test_power_sums(kind: str, seed: int, length: int, pivot: float) -> None:
    twins("power_sums", values(kind, seed, length), pivot)


@often
@given(kinds, seeds, st.integers(0, 700))
def test_error_sums(kind: str, seed: int, length: int) -> None:
    twins("error_sums", values(kind, seed, length), values(kind, seed + 1, length))


def test_an_infinite_or_undefined_error_is_reported() -> None:
    x = np.ones(40, np.float32)
    for bad in (np.inf, np.nan):
        y = np.ones(40, np.float32)
        y[7] = bad
        assert not math.isfinite(twins("error_sums", x, y)[1])


# --- searching a scale ----------------------------------------------------------------------------


def searchable(x: F32) -> F32:
    """As large as values that are searched may be: no sum overflows."""
    return np.clip(x, -scale_search.HUGE, scale_search.HUGE)


@often
@given(kinds, seeds, st.integers(1, 3), st.integers(1, 1500), widths, st.booleans())
def test_long_sums(kind: str, seed: int, rows: int, length: int, bits: int, weighted: bool) -> None:
    x = searchable(values(kind, seed, rows, length))
    magnitude = np.maximum(np.abs(x).max(axis=1), np.float32(2.0**-100))
    inverse = np.stack([np.float32(f) / magnitude for f in (1.0, 2.5, 7.0)])
    offset = np.full(inverse.shape, 3.25, np.float32)
    weights = np.random.default_rng(seed).random(x.shape, np.float32) if weighted else None
    twins("long_sums", x, inverse, offset, 0, (1 << bits) - 1, weights)


@often
@given(
    *(kinds, seeds, st.integers(1, 40), lengths | st.sampled_from((300, 777)), widths),
    *(st.booleans(), st.booleans()),
)
def test_search(
    kind: str, seed: int, groups: int, length: int, bits: int, symmetric: bool, padded: bool
) -> None:
    x = values(kind, seed, groups, length)
    counts = None
    if padded and length <= 256:
        counts = np.random.default_rng(seed).integers(1, length + 1, groups).astype(np.int32)
        x[np.arange(length) >= counts[:, None]] = 0
    encoding = AffineEncoding(bits, "block", length, symmetric, "F32", length)
    e = reference.extent(x, counts)
    # What is found in groups that cannot be searched means nothing.
    found = [k.search(x, counts, e, encoding) for k in (compiled, searched_by_definition)]
    usable = scale_search.searchable(e)
    same(*(tuple(part[usable] for part in f) for f in found))
    p, wanted = (scale_search.settled(e, encoding, f) for f in found)
    same(p, wanted)
    same(twins("fit", x, encoding, RangeMethod("mse"), counts), p)


class searched_by_definition:
    """`reference.search`, whose sums overflow where groups are too large."""

    @staticmethod
    def search(*arguments: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            return reference.search(*arguments)


def test_search_is_a_kernel_like_any_other() -> None:
    x = values("gaussian", 1, 20, 64)
    twins("search", x, None, reference.extent(x), scheme(4, 64, False, 64))


@often
@given(kinds, seeds, st.integers(1, 9), st.integers(1, 300), widths, st.booleans())
def test_fit(kind: str, seed: int, groups: int, length: int, bits: int, symmetric: bool) -> None:
    x = values(kind, seed, groups, length)
    for method in RANGE_METHODS:
        twins("fit", x, scheme(bits, 0, symmetric, length), RangeMethod(method, 97.0))


def mean_squares(seed: int, rows: int, columns: int) -> F32:
    """Of every size, some of them 0; at times the same for all, or all 0."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(5)
    squares = np.exp2(rng.uniform(-20, 20, (rows, columns)))
    if kind == 1:
        squares *= rng.random((rows, columns)) < 0.3
    elif kind == 2:
        squares = np.full((rows, columns), rng.choice([0.0, 1.0, 2.0**-149, 3e38]))
    elif kind == 3:
        squares = np.exp2(rng.uniform(-149, 127, (rows, columns)))
    return squares.astype(np.float32)


@often
@given(
    *(kinds, seeds, st.integers(1, 20), st.integers(1, 3), st.integers(1, 700), widths),
    *(st.booleans(), blocks),
)
def test_weighted_rows(
    kind: str,
    seed: int,
    rows: int,
    period: int,
    columns: int,
    bits: int,
    symmetric: bool,
    block: int,
) -> None:
    """Search, codes and both errors; rows and blocks of odd lengths too."""
    x = values(kind, seed, rows * period, columns)
    encoding = scheme(bits, block, symmetric, columns)
    weights = weighting(mean_squares(seed, period, columns), encoding)
    twins("quantize_rows", SourceRows.of(x), encoding, RangeMethod("mse"), (-1.0, 1.0), weights)


def test_weights_must_fit_the_groups() -> None:
    x, w = np.ones((6, 32), np.float32), np.ones((4, 32), np.float32)
    encoding, minmax = scheme(4, 32, True, 32), RangeMethod("minmax")
    with pytest.raises(ValueError, match="fit"):
        compiled.quantize_rows(
            SourceRows.of(x), encoding, minmax, (-1.0, 1.0), records.Weighting(w, w, w)
        )
    one = Parameters(x[:1, 0], np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="fit"):
        compiled.encode_rows(x, scheme(4, 0, True, 32), one, w)
    with pytest.raises(ValueError, match="belong"):
        compiled.encode_rows(x, scheme(4, 0, True, 32), one, w[:3, :31])


# --- codes ----------------------------------------------------------------------------------------


@often
@given(kinds, seeds, st.integers(1, 20), st.integers(1, 600), widths, st.booleans())
def test_encode_and_decode(
    kind: str, seed: int, groups: int, length: int, bits: int, symmetric: bool
) -> None:
    x = values(kind, seed, groups, length)
    scale, zero = random_parameters(x, bits, symmetric, seed)
    codes, _ = twins("encode", x, scale, zero, bits, symmetric)
    twins("decode", codes, scale, zero, bits, symmetric)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_tie_rounds_to_even(bits: int, symmetric: bool) -> None:
    steps = (np.arange(-1100, 1100, dtype=np.float32) / 4)[None, :]
    for sign in (1, -1):
        for factor in (1.0, 2.0**-140, 2.0**110):
            x = steps * np.float32(sign * factor)
            for z in range(0, (1 << bits) * 4, 3):
                scale, zero = np.array([factor], np.float32), np.array([z], np.int32)
                twins("encode", x, scale, zero, bits, symmetric)


@settings(parent=often, max_examples=400)
@given(
    *(kinds, seeds, st.integers(1, 6), st.integers(1, 700) | st.sampled_from((256, 512, 1024))),
    *(widths, st.booleans(), blocks, st.booleans()),
)
def test_encode_rows(
    kind: str, seed: int, rows: int, columns: int, bits: int, symmetric: bool, block: int, one: bool
) -> None:
    x = values(kind, seed, rows, columns)
    groups, _ = arithmetic.to_groups(x, block)
    if one:
        groups = x.reshape(1, -1)
    parameters = Parameters(*random_parameters(groups, bits, symmetric, seed))
    encoding = scheme(bits, block, symmetric, columns)
    done = twins("encode_rows", x, encoding, parameters)
    twins("load_codes", bytes(done.segments["codes"]), encoding)


@often
@given(
    *(kinds, seeds, st.integers(1, 40), st.integers(1, 9), st.sampled_from(BITS), st.booleans()),
    *(blocks, st.sampled_from(["F16", "BF16", "F32"]), st.sampled_from(RANGE_METHODS)),
    *(st.sampled_from(["F32", "BF16", "F16", "F64"]), st.sampled_from([0, 1, 40]), st.booleans()),
)
def test_quantize_rows(
    kind: str,
    seed: int,
    rows: int,
    units: int,
    bits: int,
    symmetric: bool,
    block: int,
    scale_dtype: str,
    method: str,
    dtype: str,
    odd: int,
    weighted: bool,
) -> None:
    """Whole blocks, blocks with padding and channels, from every dtype, weighted or not."""
    rows = -(-rows // units)
    columns = max(block, 32) * units + odd
    if block == 0 and odd == 40:
        columns = 5000 + units  # a row of several runs
    encoding = scheme(bits, block, symmetric, columns)
    if block:
        encoding = replace(encoding, scale_dtype=scale_dtype)
    stored = stored_as(dtype, values(kind, seed, rows, columns))
    weights = None
    if weighted and method == "mse":
        weights = weighting(mean_squares(seed, 1, columns), encoding)
    twins("quantize_rows", stored, encoding, RangeMethod(method, 99), (-0.5, 0.75), weights)


@often
@given(
    *(kinds, seeds, st.integers(1, 40), st.integers(1, 9), st.sampled_from(BITS)),
    *(st.sampled_from(("symmetric", "whole", "biased")), st.sampled_from(BLOCKS)),
    *(st.sampled_from(["F16", "BF16", "F32"]), st.sampled_from(RANGE_METHODS)),
    *(st.sampled_from(["F32", "BF16", "F16", "F64"]), st.booleans()),
)
def test_quantize_stream(
    kind: str,
    seed: int,
    rows: int,
    units: int,
    bits: int,
    zeros: str,
    block: int,
    scale_dtype: str,
    method: str,
    dtype: str,
    weighted: bool,
) -> None:
    """Whole blocks, in rows of whole words and others; they decode to what was measured."""
    rows, columns = -(-rows // units), block * units
    encoding = replace(scheme(bits, block, zeros == "symmetric", columns), scale_dtype=scale_dtype)
    x = stored_as(dtype, values(kind, seed, rows, columns))
    weights = None
    if weighted and method == "mse":
        weights = weighting(mean_squares(seed, 1, columns), encoding)
    how = RangeMethod(method, 99), zeros == "biased", weights
    done = twins("quantize_stream", x, encoding, *how)
    stored = np.frombuffer(done.segments["codes"], np.uint8).reshape(rows, -1)
    codes = twins("unpack_stream", stored, bits, columns).astype(np.float64).reshape(-1, block)
    number = arithmetic.SCALE_NUMPY[scale_dtype]
    scale = np.frombuffer(done.segments["scales"], number).astype(np.float64)[:, None]
    bias, zero = np.zeros((1, 1)), np.zeros((1, 1))
    if zeros == "biased":
        bias = np.frombuffer(done.segments["biases"], number).astype(np.float64)[:, None]
    elif zeros == "whole":
        zero = np.frombuffer(done.segments["zero_points"], np.uint8)[:, None]
    else:
        zero[:] = 1 << (bits - 1)
    with np.errstate(invalid="ignore"):
        wanted = (codes - zero) * scale + bias
    given = reference.values(x).astype(np.float64).reshape(wanted.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        noise = float(np.square(given - wanted).sum())
    if np.isfinite(noise) and np.abs(given).max(initial=0) < 1e18:
        assert done.error.noise == pytest.approx(noise, rel=1e-4, abs=1e-9 * done.error.signal)


def stored_as(dtype: str, x: F32) -> SourceRows:
    """As close to ``x`` as the dtype allows and finite, at an odd address."""
    narrow = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": ml_dtypes.bfloat16}[dtype]
    largest = float(ml_dtypes.finfo(narrow).max)
    data = np.clip(x.astype(np.float64), -largest, largest).astype(narrow).tobytes()
    return SourceRows(memoryview(b"\0" + data)[1:], dtype, (x.shape[0], x.shape[1]))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_quantize_rows_takes_finite_values_only(bad: float, dtype: str) -> None:
    x = np.ones((1, 640), np.float32)
    for place in (0, 100, 639):
        stored = stored_as(dtype, x)
        width = len(bytes(stored.data)) // 640
        data = bytearray(stored.data)
        one = {"BF16": ml_dtypes.bfloat16, "F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
        data[place * width : (place + 1) * width] = np.array(bad).astype(one).tobytes()
        broken = replace(stored, data=bytes(data))
        for kernel, block in itertools.product((reference, compiled), (64, 0)):
            how = (broken, scheme(4, block, True, 640), RangeMethod("minmax"), (-1.0, 1.0))
            with pytest.raises(FloatingPointError):
                kernel.quantize_rows(*how)
            with pytest.raises(FloatingPointError):
                kernel.quantize_stream(*how[:3], False) if block else kernel.quantize_rows(*how)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(bad: float) -> None:
    x = np.full((3, 77), 3.4e38, np.float32)
    x[1] = -x[0]
    assert twins("all_finite", x)
    assert twins("all_finite", x[:0])
    for i in (0, 100, x.size - 1):
        y = x.copy()
        y.ravel()[i] = bad
        assert not twins("all_finite", y)


@pytest.mark.parametrize("width", range(1, 9))
def test_pack_and_unpack(width: int) -> None:
    rng = np.random.default_rng(width)
    for groups in (0, 1, 2, 3, 17, 64):
        whole = rng.integers(0, 1 << width, 32 * groups).astype(np.uint8)
        packed = twins("pack", whole, width)
        same(twins("unpack", packed, width), whole)
        twins("unpack", rng.integers(0, 256, 4 * width * groups).astype(np.uint8), width)


@pytest.mark.parametrize("bits", range(2, 9))
def test_streams_of_bits(bits: int) -> None:
    """Rows of any length, against one long number; what lies behind them is not looked at."""
    rng = np.random.default_rng(bits)
    for rows, columns in ((0, 5), (3, 1), (2, 7), (5, 32), (4, 255), (2, 256), (3, 300), (1, 1024)):
        codes = rng.integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
        packed = twins("pack_stream", codes, bits)
        assert packed.shape == (rows, -(-columns * bits // 32) * 4)
        for row, stored in zip(codes.tolist(), packed, strict=True):
            number = sum(code << (bits * i) for i, code in enumerate(row))
            assert int.from_bytes(stored.tobytes(), "little") == number
        wide = np.pad(packed, ((0, 0), (0, 3)), constant_values=255)
        for data in (packed, wide, wide[:, : -(-columns * bits // 8)]):
            same(twins("unpack_stream", data, bits, columns), codes)


# --- levels with signed steps ---------------------------------------------------------------------


def level_code(seed: int, bits: int, block: int, variant: str) -> LevelCode:
    """Of the usual table, or of any other."""
    rng = np.random.default_rng(seed)
    levels = LEVELS[bits] if variant != PLACED or bits > 2 else PLACED_LEVELS
    code = LevelCode(bits, block, *steps_of(bits, variant), levels)
    if rng.random() < 0.5 or code.levels[-1] + code.shifts[-1] > 127:
        top = 127 - code.shifts[-1]
        below = int(rng.integers(max(1, (1 << bits) - top), 1 << bits))
        low = rng.choice(127, below, replace=False) - 127
        high = rng.choice(top, (1 << bits) - below, replace=False) + 1
        levels = tuple(int(v) for v in np.sort(np.concatenate([low, high])))
    return replace(code, levels=levels)


@often
@given(
    *(kinds, seeds, st.integers(1, 40), st.integers(1, 300) | st.sampled_from((256, 2080))),
    *(st.sampled_from(list(LEVELS)), st.sampled_from(LEVEL_BLOCKS)),
    *(st.sampled_from(list(VARIANTS.values())), st.booleans()),
)
def test_levels(
    kind: str,
    seed: int,
    rows: int,
    columns: int,
    bits: int,
    block: int,
    variant: str,
    weighted: bool,
) -> None:
    """Search, codes, values and errors; tables whose levels are close, and huge rows too."""
    x = values(kind, seed, rows, columns)
    code = level_code(seed, bits, block, variant)
    squares = mean_squares(seed, 1, columns)[0] if weighted else None
    done = twins("levels_encode", x, code, squares)
    rng = np.random.default_rng(seed)
    packed = np.frombuffer(done.segments["codes"], np.uint8)
    steps = random_steps(rng, rows, code, columns)
    twins("levels_decode", packed, columns, steps, code)


def random_steps(rng: np.random.Generator, rows: int, code: LevelCode, columns: int) -> LevelSteps:
    (low, high), shape = code.steps, (rows, code.blocks(columns))
    return LevelSteps(
        rng.random(rows, np.float32),
        rng.integers(low, high + 1, shape).astype(np.int8),
        rng.choice(code.shifts, shape).astype(np.int8),
    )


@settings(parent=often, max_examples=100)
@given(
    *(seeds, st.integers(1, 40), st.integers(1, 400) | st.sampled_from((2048, 2049, 4100))),
    *(st.integers(0, 9), st.sampled_from(list(LEVELS)), st.sampled_from(LEVEL_BLOCKS)),
    *(st.sampled_from(list(VARIANTS.values())), st.sampled_from((0, 0, -128, 127, 5))),
    st.booleans(),
)
def test_product_of_levels(
    seed: int,
    rows: int,
    columns: int,
    samples: int,
    bits: int,
    block: int,
    variant: str,
    zero_point: int,
    extreme: bool,
) -> None:
    """The packed product equals that of unpacked codes, whose accumulators equal int64 ones."""
    rng = np.random.default_rng(seed)
    code = level_code(seed, bits, block, variant)
    steps = random_steps(rng, rows, code, columns)
    codes = rng.integers(0, 1 << bits, (rows, -(-columns // 32) * 32)).astype(np.uint8)
    a = rng.integers(-128, 128, (samples, columns)).astype(np.int8)
    if extreme:  # the largest sums there can be, of either sign
        top = 127 - code.shifts[-1]
        code = replace(code, levels=(*range(-127, -127 + (1 << bits) - 1), top))
        furthest = max(code.steps, key=abs)
        steps = replace(steps, steps=np.full_like(steps.steps, furthest))
        codes[:] = np.where(rng.random((rows, 1)) < 0.5, 0, (1 << bits) - 1)
        a[:] = rng.choice([-128, 127], (samples, 1))
    packed = reference.pack(codes.ravel(), bits)
    inputs = Activations(a, rng.uniform(0.5, 2, samples).astype(np.float32), zero_point)
    parts = arithmetic.level_rows(codes[:, :columns], steps, code)
    wanted = twins("integer_product", parts, inputs, check=True)
    assert wanted.exact
    same(twins("levels_product", packed, columns, steps, code, inputs), wanted.y)


# --- integer matrix product -----------------------------------------------------------------------


@often
@given(seeds, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 300))
def test_integer_dots(seed: int, spans: int, rows: int, samples: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-255, 256, (spans, rows, length)).astype(np.int16)
    inputs = rng.integers(-128, 128, (spans, samples, length)).astype(np.int8)
    twins("integer_dots", codes, inputs)


def check_product(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    samples: int,
    bits: int,
    symmetric: bool,
    block: int,
    zero_point: int,
    extreme: bool = False,
) -> None:
    """The packed product equals that of unpacked codes, whose accumulators equal int64 ones."""
    encoding = scheme(bits, block, symmetric, columns)
    top, levels = zero_top(bits), encoding.levels
    shape, groups = (rows, encoding.row_codes), (rows, encoding.row_groups)
    codes = rng.integers(0, levels + 1, shape).astype(np.uint8)
    zero = rng.integers(0, top + 1, groups).astype(np.int32)
    a = rng.integers(-128, 128, (samples, columns)).astype(np.int8)
    if extreme:  # the largest sums there can be, of either sign
        codes = (
            np.where(rng.random((rows, 1)) < 0.5, levels, 0)
            .astype(np.uint8)
            .repeat(encoding.row_codes, axis=1)
        )
        zero = np.where(codes[:, :1] == 0, top, 0).astype(np.int32).repeat(groups[1], axis=1)
        a = rng.choice([-128, 127], (samples, 1)).astype(np.int8).repeat(columns, axis=1)
    scale = rng.uniform(-1, 1, groups).astype(np.float32)
    zeros = np.zeros_like(zero) if symmetric else zero
    if bits == 8:
        packed = (codes ^ arithmetic.SIGN).tobytes()
    else:
        packed = reference.pack(codes.ravel(), bits).tobytes()
    inputs = Activations(a, rng.uniform(0.5, 2, samples).astype(np.float32), zero_point)
    parts = arithmetic.integer_rows(codes[:, :columns], scale, zeros, encoding)
    wanted = twins("integer_product", parts, inputs, check=True)
    assert wanted.exact
    same(twins("product", packed, scale, zeros, encoding, inputs), wanted.y)


def zero_top(bits: int) -> int:
    """What a stored zero point can be; beyond 4n too, since a file may hold it."""
    return 255 if bits == 8 else (4 << bits) - 1


@settings(parent=often, max_examples=400)
@given(
    *(seeds, st.integers(1, 40), st.integers(1, 400) | st.sampled_from((256, 512, 768))),
    *(st.integers(0, 20), widths, st.booleans(), blocks),
    *(st.sampled_from((0, 0, -128, 127, 5)), st.booleans()),
)
def test_product(
    seed: int,
    rows: int,
    columns: int,
    samples: int,
    bits: int,
    symmetric: bool,
    block: int,
    zero_point: int,
    extreme: bool,
) -> None:
    rng = np.random.default_rng(seed)
    check_product(rng, rows, columns, samples, bits, symmetric, block, zero_point, extreme)


@pytest.mark.parametrize("block", [0, 32])
def test_product_of_no_activations(block: int) -> None:
    check_product(np.random.default_rng(0), 3, 70, 0, 4, False, block, 0)


def test_product_of_rows_with_zero_points_of_their_own() -> None:
    rng = np.random.default_rng(1)
    encoding = scheme(4, 32, False, 96)
    packed = rng.integers(0, 256, 5 * 48).astype(np.uint8).tobytes()
    zero = rng.integers(0, 61, (5, 3)).astype(np.int32)
    a = rng.integers(-128, 128, (7, 96)).astype(np.int8)
    scale = rng.random((5, 3), np.float32)
    points = np.array([0, 3, -128, 3, 0, 127, 3], np.int32)
    inputs = Activations(a, np.ones(7, np.float32), points)
    twins("product", packed, scale, zero, encoding, inputs)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("samples", [1, 9])
def test_product_of_long_rows_in_segments(bits: int, symmetric: bool, samples: int) -> None:
    rng = np.random.default_rng(bits)
    for columns in (16_384, 16_385, 40_001):
        check_product(rng, 3, columns, samples, bits, symmetric, 0, -128, extreme=True)


def test_product_refuses_zero_points_beyond_their_bits() -> None:
    one = np.ones((1, 1), np.float32)
    inputs = Activations(np.zeros((1, 32), np.int8), one[0], 0)
    with pytest.raises(ValueError, match="zero point"):
        compiled.product(
            bytes(16), one, np.full((1, 1), 64, np.int32), scheme(4, 32, False, 32), inputs
        )


@pytest.mark.parametrize("zeros", [[0.0, -0.0], [-0.0, 0.0], [-0.0]])
def test_no_extreme_is_minus_zero(zeros: list[float]) -> None:
    for kernel in (compiled, reference):
        found = kernel.moments(np.array(zeros, np.float32))
        assert (repr(found.minimum), repr(found.maximum)) == ("0.0", "0.0")


@often
@given(
    kinds, seeds, st.integers(1, 9), st.integers(1, 200), st.sampled_from((16, 32, 500)), st.data()
)
def test_worst_step(
    kind: str, seed: int, rows: int, columns: int, group: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    weights = values(kind, seed, rows, columns)
    shape = (rows, -(-columns // group))
    wild = data.draw(st.booleans(), "values and scales of any size")
    scale = (rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 60)).astype(np.float32)
    scale[rng.random(shape) < 0.2] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = weights + (rng.standard_normal(weights.shape) * 0.01).astype(np.float32)
        if wild:
            scale.ravel()[0] = data.draw(st.sampled_from((np.inf, np.nan, 1e-45, -3e38)))
            decoded.ravel()[-1] = data.draw(st.sampled_from((np.inf, np.nan, -np.inf, 3e38)))
    offset = scale[:, ::-1].copy() if data.draw(st.booleans()) else None
    zero = rng.integers(-20, 300, shape).astype(np.int32)
    step = data.draw(st.sampled_from((1, 4)))
    roundings = [
        rng.random(shape, np.float32) / 64 if data.draw(st.booleans()) else None for _ in range(2)
    ]
    arguments = weights, decoded, group, scale, offset, zero, step, -8, 15 * step, *roundings
    twins("worst_step", *arguments)


def test_worst_step_by_hand() -> None:
    """Codes 0..3, zero point 1: what is within half a step of them counts, by its own step, less
    what rounding may have added: 2^-22 of the weight.
    """
    weights = np.array([[-1.5, 0.3, 2.4, 2.6, 7.0, 0.0, 1.0, -9.0]], np.float32)
    decoded = np.array([[-1.0, 0.0, 2.0, 2.0, 4.0, 0.0, 2.0, -2.0]], np.float32)
    scale, zero = np.array([[1.0, 2.0]], np.float32), np.array([[1, 1]], np.int32)
    # In steps of 1: 0.5 (at the very edge), 0.3, 0.4, then 2.6 is clipped; of 2: 7 and -9 are.
    for kernel in (compiled, reference):
        worst, unscaled = kernel.worst_step(
            weights, decoded, 4, scale, None, zero, 1, 0, 3, None, None
        )
        assert (worst, unscaled) == ((1 - 2.0**-22) / 2, False)
        flat = np.array([[1.0, 0.0]], np.float32)
        worst, unscaled = kernel.worst_step(
            weights, decoded, 4, flat, None, zero, 1, 0, 3, None, None
        )
        assert (worst, unscaled) == (0.5 - 1.5 * 2.0**-22, True)
        # Code 4 of a step of 1 above 2. Half a step and 4 steps, rounded by 1/16, and an offset of
        # 2, rounded by 1/8, may make 0.28125 + 0.25 of the error of 1.25.
        one = np.ones((1, 1), np.float32)
        worst, _ = kernel.worst_step(
            *(7.25 * one, 6 * one, 4, one, 2 * one, np.zeros((1, 1), np.int32), 1, 0, 7),
            *(one / 16, one / 8),
        )
        assert worst == 1.25 - 0.53125 - 9.25 * 2.0**-22


# --- ggml and casts -------------------------------------------------------------------------------


@often
@given(kinds, seeds, st.integers(1, 40), st.sampled_from(sorted(GGML_BLOCKS)))
def test_ggml_encode(kind: str, seed: int, count: int, name: str) -> None:
    block = GGML_BLOCKS[name]
    x = values(kind, seed, count, block.block)
    weights = np.random.default_rng(seed).random((count % 3 + 1, block.block), np.float32)
    for importance in (None, weights):
        wanted = twins("ggml_encode", name, x, importance)
        done = twins("ggml_quantize", name, SourceRows.of(x), importance)
        assert bytes(done.segments["data"]) == wanted.tobytes()


@often
@given(kinds, seeds, st.integers(0, 10_000), *2 * [st.sampled_from(compiled.SOURCE_DTYPES)])
def test_cast(kind: str, seed: int, count: int, source: str, target: str) -> None:
    with np.errstate(over="ignore"):
        x = values(kind, seed, 1, count).astype(arithmetic.CAST_NUMPY[source])
    rows = SourceRows(x.tobytes(), source, (1, count))
    if not np.isfinite(x.astype(np.float32)).all():
        for kernel in (compiled, reference):
            with pytest.raises(FloatingPointError):
                kernel.cast(rows, target)
        return
    twins("cast", rows, target)


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_cast_of_every_narrow_number_and_all_beside_it(target: str) -> None:
    """Every finite number of 16 bits, what lies halfway to the next, and its two neighbours."""
    with np.errstate(invalid="ignore"):  # NaN among them
        narrow = np.arange(1 << 16).astype(np.uint16).view(arithmetic.CAST_NUMPY[target])
        wide = narrow.astype(np.float32)
    exact = np.unique(wide[np.isfinite(wide)])
    halfway = exact[:-1] / 2 + exact[1:] / 2
    either = [np.nextafter(halfway, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([exact, halfway, *either, -np.zeros(1, np.float32)])
    twins("cast", SourceRows.of(x[None, :]), target)


@pytest.mark.parametrize("name", sorted(GGML_BLOCKS))
def test_ggml_scales_of_every_size(name: str) -> None:
    rng = np.random.default_rng(7)
    block = GGML_BLOCKS[name]
    x = rng.standard_normal((4000, block.block)) * 2.0 ** rng.uniform(-149, 127, (4000, 1))
    x = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    twins("ggml_encode", name, x)
    importance = rng.random(x.shape) * 2.0 ** rng.uniform(-149, 127, (4000, 1))
    importance = (importance * (rng.random(x.shape) < 0.5)).astype(np.float32)
    twins("ggml_encode", name, x, importance)


@pytest.mark.parametrize("name", sorted(GGML_BLOCKS))
def test_ggml_decode_of_any_bytes(name: str) -> None:
    kind = GGML_BLOCKS[name]
    data = np.random.default_rng(3).integers(0, 256, (65536, kind.nbytes)).astype(np.uint8)
    data[:, :2] = np.arange(65536, dtype="<u2").view(np.uint8).reshape(-1, 2)
    found, wanted = (k.ggml_decode(name, data) for k in (compiled, reference))
    assert np.array_equal(np.isnan(found), np.isnan(wanted))  # which NaN is nobody's promise
    same(np.nan_to_num(found), np.nan_to_num(wanted))
    finite = np.isfinite(wanted).all(axis=1)
    twins("ggml_decode", name, data[finite])


@pytest.mark.parametrize("table", CODEBOOKS)
@pytest.mark.parametrize("block", [2, 32, 64, 256])
def test_codebooks(block: int, table: str) -> None:
    rng = np.random.default_rng(block)
    numbers = table_of(table)
    for count in (0, 1, block - 1, block, block + 1, 5 * block + 3):
        x = (rng.standard_normal(count) * 2.0 ** rng.uniform(-149, 120, count)).astype(np.float32)
        scale = np.exp2(rng.uniform(-149, 127, -(-count // block))).astype(np.float32)
        scale[::3] *= -1  # a scale that was quantized may be below 0
        scale[1::3] = 0
        data = twins("codebook_encode", x, scale, numbers, block)
        twins("codebook_decode", data, count, scale, numbers, block)
    # Quotients on the midpoints and beside them.
    midpoints, _ = arithmetic.nearest_entries(numbers)
    beside = [np.nextafter(midpoints, np.float32(end)) for end in (-9, 9)]
    x = np.concatenate([midpoints, *beside])
    twins("codebook_encode", x, np.ones(-(-len(x) // block), np.float32), numbers, block)


SHAPES = [(1, 1, 1), (16, 64, 16), (17, 65, 32), (5, 63, 35), (130, 200, 64), (257, 140, 128)]


@pytest.mark.parametrize("evenly", [True, False])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 300, 256)])
def test_compensated_rounding(shape: tuple[int, int, int], evenly: bool) -> None:
    """Also with factors of no matrix, which no descent comes to an end with."""
    rng = np.random.default_rng(shape[0])
    rows, columns, length = shape
    groups = -(-columns // length)
    levels = np.arange(-3, 13) if evenly else np.sort(rng.standard_normal(11) * 8)
    scale, zero, offset = (rng.uniform(-0.3, 0.3, (rows, groups)) for _ in range(3))
    scale[::5, -1] = 0
    grid = CodeGrid(*(a.astype(np.float32) for a in (levels, scale, zero, offset)), length)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    before = rng.integers(0, len(levels), x.shape).astype(np.uint8)
    inputs = rng.standard_normal((300, columns)) @ rng.uniform(-1, 1, (columns, columns))
    sound = prepared(inputs.T @ inputs)
    wild = rng.standard_normal((columns, columns)).astype(np.float32)
    wild[np.diag_indices(columns)] = 1
    last = slice((groups - 1) * length, None)
    for factors in (sound, Factors(sound.order, wild, sound.feedback)):
        for passes, dtype in ((0, None), (1, None), (4, None), (1, "F16"), (4, "BF16"), (3, "F32")):
            codes, *_ = twins("compensate", x, before, grid, factors, passes, dtype)
            assert (codes[::5, last] == before[::5, last]).all()
        units = np.round(rng.uniform(-0.3, 0.3, (2, rows, groups)), 3).astype(np.float32)
        units[:, ::4] = 0
        whole = replace(grid, scale=units[0] * 5, offset=units[1] * 3)
        multiples = Multiples(units[0], -8, 7), Multiples(units[1], 0, 15)
        for scales, offsets in ((multiples[0], None), (None, multiples[1]), multiples):
            given = replace(whole, scales=scales, offsets=offsets)
            for passes in (1, 3):
                twins("compensate", x, before, given, factors, passes)
    empty = CodeGrid(grid.levels, grid.scale[:0], grid.zero[:0], grid.offset[:0], length)
    twins("compensate", x[:0], before[:0], empty, sound, 4)


@pytest.mark.parametrize("evenly", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 65, 32), (16, 130, 16), (150, 9, 35), (9, 1200, 64), (266, 20, 16)]
)
def test_rows_swept(shape: tuple[int, int, int], evenly: bool) -> None:
    """Of fewer rows than a strip has and of more, with columns in blocks and beyond."""
    rng = np.random.default_rng(shape[0])
    rows, columns, length = shape
    groups = -(-columns // length)
    levels = np.arange(-3, 13) if evenly else np.sort(rng.standard_normal(11) * 8)
    scale, zero, offset = (rng.uniform(-0.3, 0.3, (rows, groups)) for _ in range(3))
    scale[::5, -1] = 0
    grid = CodeGrid(*(a.astype(np.float32) for a in (levels, scale, zero, offset)), length)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    before = rng.integers(0, len(levels), x.shape).astype(np.uint8)
    gram, output = (
        (m := rng.standard_normal((n, n + 9))) @ m.T / n + 0.1 * np.eye(n) for n in (columns, rows)
    )
    gram = gram.astype(np.float32)  # or the definition would be that of binary64
    last = slice((groups - 1) * length, None)
    for passes in (0, 1, 2):
        codes = twins("sweep_rows", x, before, grid, gram, shares_of(output), passes)
        with Workers(3) as workers, np.errstate(over="ignore", invalid="ignore"):
            shared = compiled.sweep_rows(
                x, before, grid, gram, shares_of(output), passes, workers.map
            )
        assert np.array_equal(shared, codes)
        assert (codes[::5, last] == before[::5, last]).all()
        assert rows == 1 or (codes != before).any() == (passes > 0)
    empty = CodeGrid(grid.levels, grid.scale[:0], grid.zero[:0], grid.offset[:0], length)
    twins("sweep_rows", x[:0], before[:0], empty, gram, output[:0, :0], 1)


# --- arguments ------------------------------------------------------------------------------------


def test_sizes_are_checked_before_memory_is_touched() -> None:
    from qconvert.kernels import _native

    short = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="12 bytes"):
        _native.histogram(x=short, bins=short)
    with pytest.raises(ValueError, match="belong"):
        _native.widen_bf16(raw=b"abc", out=short)
    with pytest.raises(ValueError, match="below 0"):
        _native.observe(x=short, n=-1, wide=False)
    with pytest.raises(ValueError, match="belong"):
        _native.observe(x=short, n=1 << 62, wide=True)
    with pytest.raises(ValueError, match="bits"):
        compiled.encode(np.zeros((1, 4), np.float32), short[:1], np.zeros(1, np.int32), 7, True)
    with pytest.raises((BufferError, ValueError)):
        _native.widen_bf16(raw=bytes(6), out=bytes(12))  # not writable
    with pytest.raises(ValueError, match="dtype"):
        _native.cast(data=bytes(8), dtype="F8", count=4, to="F32", out=bytearray(16))
    with pytest.raises(ValueError, match="block type"):
        _native.ggml_decode(ggml_type="Q9_9", data=b"", blocks=0, x=bytearray())
    with pytest.raises(ValueError, match="no variant"):
        compiled.select("mmx")
    one, nothing = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    grid = CodeGrid(short, one, nothing, nothing, 2)
    factors = Factors(np.arange(2), np.eye(2), np.zeros((2, 2)))
    x, codes = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.uint8)
    for wrong, order in ((codes + 3, [0, 1]), (codes, [0, 2]), (codes, [0, -1])):
        odd = Factors(np.array(order), factors.gram, factors.feedback)
        with pytest.raises(ValueError, match="that is none"):
            compiled.compensate(x, wrong, grid, odd, 4)
    with pytest.raises(ValueError, match="not be empty"):
        compiled.compensate(x, codes, replace(grid, length=0), factors, 4)
    with pytest.raises(ValueError, match="too long"):
        compiled.compensate(x, codes, replace(grid, length=257), factors, 4, "F16")
    nothing = replace(grid, levels=short[:0])
    with pytest.raises(ValueError, match="levels"):
        compiled.compensate(x, codes, nothing, factors, 4)
    sweep = _sweep(codes, grid)
    with pytest.raises(ValueError, match="levels"):
        _native.sweep_columns(**_sweep(codes, nothing))
    with pytest.raises(ValueError, match="not be empty"):
        _native.sweep_columns(**_sweep(codes, replace(grid, length=0)))
    for rows in (0, 129):
        with pytest.raises(ValueError, match="rows that are none"):
            _native.sweep_columns(**sweep | {"rows": rows})
    for place in ({"first": 1}, {"width": 0}, {"width": 65, "columns": 100}):
        with pytest.raises(ValueError, match="columns that are none"):
            _native.sweep_columns(**sweep | place)
    with pytest.raises(ValueError, match="bytes"):
        _native.sweep_columns(**sweep | {"rows": 2})
    stream = {"rows": 2, "columns": 9, "bits": 4, "stride": 5}
    room = {"codes": np.zeros(18, np.uint8), "packed": np.zeros(10, np.uint8)}
    for name in ("pack_stream", "unpack_stream"):
        with pytest.raises(ValueError, match="too short"):
            getattr(_native, name)(**stream | {"stride": 4}, **room)
        with pytest.raises(ValueError, match="range"):
            getattr(_native, name)(**stream | {"bits": 9}, **room)
        for wrong in ("codes", "packed"):
            with pytest.raises(ValueError, match="bytes"):
                getattr(_native, name)(**stream, **room | {wrong: np.zeros(4, np.uint8)})
    rows = SourceRows.of(np.zeros((1, 32), np.float32))
    for kernel in (reference, compiled):
        with pytest.raises(ValueError, match="biases"):
            kernel.quantize_stream(rows, scheme(4, 32, True, 32), RangeMethod("mse"), True)
    product = _ordered_product()
    with pytest.raises(ValueError, match="columns that are none"):
        _native.multiply_ordered(**product | {"end": 4})
    with pytest.raises(ValueError, match="columns that are none"):
        _native.multiply_ordered(**product | {"begin": 4})
    for order in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="rows that are none"):
            _native.multiply_ordered(**product | {"order": np.array(order, np.int32)})
    with pytest.raises(ValueError, match="rows that are none"):
        _native.multiply_ordered(**product | {"order": None})
    with pytest.raises(ValueError, match="bytes"):
        _native.multiply_ordered(**product | {"rows": 3})


def _sweep(codes: NDArray[Any], grid: CodeGrid) -> dict[str, Any]:
    """The arguments of `_native.sweep_columns` for one row of two columns."""
    return {
        "rows": 1,
        "columns": 2,
        "first": 0,
        "width": 2,
        "levels": grid.levels,
        "scale": grid.scale,
        "zero": grid.zero,
        "offset": grid.offset,
        "length": grid.length,
        "gram": np.eye(2, dtype=np.float32),
        "shares": np.ones((1, 1), np.float32),
        "slope": np.zeros((1, 2), np.float32),
        "values": np.zeros((1, 2), np.float32),
        "codes": codes,
        "moves": np.zeros((1, 2), np.float32),
        "places": np.zeros(2, np.int32),
    }


def _ordered_product() -> dict[str, Any]:
    """The arguments of `_native.multiply_ordered`: (2, 2) times two of three rows of three."""
    return {
        "sums": np.zeros((2, 3), np.float32),
        "left": np.ones((2, 2), np.float32),
        "right": np.ones((3, 3), np.float32),
        "order": np.array([2, 0], np.int32),
        "rows": 2,
        "depth": 2,
        "right_rows": 3,
        "columns": 3,
        "begin": 0,
        "end": 3,
    }


def test_arguments_go_by_the_names_that_the_stub_has() -> None:
    """Both sides of the binding: the C says what it takes, and the stub what callers may give."""
    from qconvert.kernels import _native

    stub = ast.parse((SOURCES.parent / "_native.pyi").read_text())
    written = {
        f.name: [a.arg for a in f.args.kwonlyargs]
        for f in stub.body
        if isinstance(f, ast.FunctionDef) and f.args.kwonlyargs
    }
    assert {name: sorted(names) for name, names in _native.signatures().items()} == {
        name: sorted(names) for name, names in written.items()
    }
    x = np.zeros(4, np.float32)
    for wrong in ({}, {"x": x, "y": x}, {"x": x, "decoded": x, "n": 4}):
        with pytest.raises(TypeError, match="argument"):
            _native.error_sums(**wrong)
    with pytest.raises(TypeError, match="by name"):
        _native.error_sums(x, x)
    with pytest.raises(TypeError):
        _native.power_sums(x=x, pivot="no number")
    with pytest.raises((TypeError, BufferError)):
        _native.all_finite(x=None)


# --- the C itself ---------------------------------------------------------------------------------


def loops() -> list[str]:
    return [str(p) for p in sorted(SOURCES.glob("*.c")) if p.name != "module.c"]


def compiler(name: str) -> str:
    found = shutil.which(name)
    if not found:
        pytest.skip(f"no {name} here")
    return found


def build(compiler: str, target: Path, *flags: str, idle: tuple[str, ...] = ()) -> None:
    """The driver; its files are compiled side by side, for they take a minute one by one.

    Those whose names begin with one of ``idle`` get none of the flags.
    """

    def run(*arguments: str) -> None:
        source = Path(arguments[1]).name if arguments[0] == "-c" else ""
        given = () if idle and source.startswith(idle) else flags
        command = [compiler, *FLAGS, *given, f"-I{SOURCES}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    sources = [str(DRIVER), *loops()]
    objects = [f"{target}.{Path(source).stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [
            pool.submit(run, "-c", source, "-o", made)
            for source, made in zip(sources, objects, strict=True)
        ]
        for each in pending:
            each.result()
    run(*objects, "-o", str(target))


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def once() -> None:
    if compiled.variant() != compiled.variants()[0]:
        pytest.skip("does not depend on the variant: runs with the first")


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The driver as a compiler makes it, without a warning; built once."""
    built: dict[str, Path] = {}

    def driver(name: str) -> Path:
        if name not in built:
            path = tmp_path_factory.mktemp("driver") / name
            # What GCC makes of -O3 is installed, and compared with the definition above.
            level = "-O2" if name == "gcc" else "-O3"
            build(compiler(name), path, level, "-Wall", "-Wextra", "-Werror")
            built[name] = path
        return built[name]

    return driver


@pytest.mark.usefixtures("once")
def test_loops_compile_without_a_warning(drivers: Callable[[str], Path]) -> None:
    assert len(set(digests(run(str(drivers("gcc")))).values())) == 1


@pytest.mark.usefixtures("once")
def test_clang_computes_the_same_bits(drivers: Callable[[str], Path]) -> None:
    theirs = digests(run(str(drivers("clang"))))
    assert theirs == digests(run(str(drivers("gcc"))))


@pytest.mark.usefixtures("once")
def test_loops_run_clean_under_sanitizers(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    checks = ("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
    # Checks by calls, and debug information of lines alone, compile in half the time.
    cheaper = ("-O1", "-g1", "--param", "asan-instrumentation-with-call-threshold=0")
    idle = tuple({"avx2", "avx512"} - set(compiled.variants()))  # is linked, and cannot run here
    build(compiler("gcc"), driver, *cheaper, *checks, idle=idle)
    assert len(set(digests(run(str(driver))).values())) == 1


@pytest.mark.usefixtures("once")
def test_aarch64_computes_the_same_bits(drivers: Callable[[str], Path], tmp_path: Path) -> None:
    cross, emulator = compiler("aarch64-linux-gnu-gcc"), compiler("qemu-aarch64")
    there = tmp_path / "there"
    build(cross, there, "-O3", "-static")
    neon = digests(run(emulator, str(there)))["neon"]
    assert neon == digests(run(str(drivers("gcc"))))["portable"]


def digests(text: str) -> dict[str, str]:
    """Variant to digest, as the driver prints them."""
    return dict(line.split() for line in text.splitlines())


# --- speed ----------------------------------------------------------------------------------------


def _fastest(call: Callable[[], object], seconds: float = 0.3) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _report() -> None:
    """Nanoseconds per value and thousand million operations per second, one core, by variant."""
    rng = np.random.default_rng(0)
    raw = (rng.standard_normal(1 << 18).astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    stored = raw.tobytes()
    x = compiled.widen(stored, "BF16")
    rows, groups, blocks = x.reshape(64, 4096), x.reshape(-1, 64), x.reshape(-1, 32)
    supers = x.reshape(-1, 256)
    e = compiled.extent(groups)
    four, eight = (scheme(bits, 64, False, 4096) for bits in (4, 8))
    parameters = Parameters(e.high / np.float32(7), np.full(len(groups), 30, np.int32))
    packed = rng.integers(0, 256, 4096 * 2048).astype(np.uint8).tobytes()
    ones, zeros = np.ones((4096, 64), np.float32), np.full((4096, 64), 30, np.int32)
    weights = records.Weighting(ones[:1], ones[:1], ones[:1])
    levels, bytes_of = LevelCode(4, 16, *PLAIN_STEPS, LEVELS[4]), np.frombuffer(packed, np.uint8)
    for name in compiled.variants():
        compiled.select(name)
        calls: dict[str, Callable[[], object]] = {
            "widen BF16": lambda: compiled.widen(stored, "BF16"),
            "observe": lambda: compiled.observe(x),
            "histogram": lambda: compiled.histogram(x),
            "extent": lambda: compiled.extent(groups),
            "encode_rows q4": lambda: compiled.encode_rows(rows, four, parameters),
            "encode_rows q8": lambda: compiled.encode_rows(rows, eight, parameters),
            "search q4": lambda: compiled.search(groups, None, e, four),
            "search q4 weighted": lambda: compiled.search(groups, None, e, four, weights),
            "levels c4": lambda: compiled.levels_encode(rows, levels),
            "levels c4 weighted": lambda: compiled.levels_encode(rows, levels, np.abs(rows[0])),
            "Q4_0": lambda: compiled.ggml_encode("Q4_0", blocks),
            "Q8_0": lambda: compiled.ggml_encode("Q8_0", blocks),
            "IQ4_NL": lambda: compiled.ggml_encode("IQ4_NL", blocks),
            "MXFP4": lambda: compiled.ggml_encode("MXFP4", blocks),
        }
        for k in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
            calls[k] = lambda k=k: compiled.ggml_encode(k, supers)
            calls[k + " weighted"] = lambda k=k: compiled.ggml_encode(k, supers, np.abs(supers[:1]))
        for what, call in calls.items():
            print(f"{name:9} {what:16} {_fastest(call) / x.size * 1e9:7.2f} ns")
        for samples in (1, 512):
            codes = rng.integers(-128, 128, (samples, 4096)).astype(np.int8)
            a = Activations(codes, np.ones(samples, np.float32), 0)
            spent = _fastest(lambda a=a: compiled.product(packed, ones, zeros, four, a))
            print(
                f"{name:9} product x {samples:<6} {2 * samples * 4096**2 / spent / 1e9:7.0f} Gop/s"
            )
            one = random_steps(rng, 4096, levels, 4096)
            spent = _fastest(
                lambda a=a, one=one: compiled.levels_product(bytes_of, 4096, one, levels, a)
            )
            print(
                f"{name:9} levels x {samples:<7} {2 * samples * 4096**2 / spent / 1e9:7.0f} Gop/s"
            )


if __name__ == "__main__":
    _report()
