"""Codes, scales and zero points against a plain-Python reading of formats/schemes/SPEC.md.

Ranges are minmax here; how ranges are chosen is tested in test_fitting.py.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from stored import affine, in_file, in_memory

from qconvert import kernels
from qconvert.codecs.affine.decide import choose_scale_dtype
from qconvert.codecs.affine.encoding import Affine
from qconvert.encoding import BITS, BLOCKS, AffineEncoding
from qconvert.geometry import Tile, row_length
from qconvert.kernels.arithmetic import cast_values, round_scale, to_groups
from qconvert.kernels.records import Encoded, ErrorSums, Parameters
from qconvert.ranges import RangeMethod

F32 = NDArray[np.float32]
MINMAX = RangeMethod("minmax")
VECTORS = Path(__file__).parent.parent / "formats" / "schemes" / "vectors"
EXAMPLE = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
WIDTHS = pytest.mark.parametrize("bits", BITS)
SMALL = 2.0**-149


def encode_minmax(x: F32, encoding: AffineEncoding) -> Encoded:
    rows = x.reshape(1, -1) if encoding.granularity == "tensor" else x
    groups, counts = to_groups(rows, encoding.block)
    return kernels.encode_rows(x, encoding, kernels.fit(groups, encoding, MINMAX, counts))


def zeros(e: Encoded) -> NDArray[np.uint8]:
    """Zero points as stored, a byte each."""
    return np.frombuffer(e.segments.get("zero_points", b""), np.uint8)


def file_segments(e: Encoded, encoding: AffineEncoding, shape: tuple[int, ...]) -> dict[str, bytes]:
    return in_file(affine(encoding), shape, e.segments)


def decode_stored(e: Encoded, encoding: AffineEncoding, shape: tuple[int, int]) -> F32:
    """Values of the stored bytes, padding cut off."""
    stored = in_memory(affine(encoding), shape, file_segments(e, encoding, shape))
    return stored.encoding.coded(stored, Tile(*shape, 0, True)).values


def stored_scales(e: Encoded, encoding: AffineEncoding) -> F32:
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}[encoding.scale_dtype]
    return np.frombuffer(e.segments["scales"], dtype).astype(np.float32)


def oracle_tensor(x: F32, encoding: AffineEncoding) -> tuple[bytes, bytes, bytes, list[float]]:
    """Segments and values of rows under minmax, group by group."""
    rows = [[float(v) for v in row] for row in x]
    bits, symmetric, block = encoding.bits, encoding.symmetric, encoding.block
    width = block or encoding.row_length
    shared = None
    if encoding.granularity == "tensor":
        flat = [v for row in rows for v in row]
        shared = oracle.minmax(flat, bits, symmetric, encoding.scale_dtype)
    codes, scales, zeros, values = b"", b"", [], []
    for row in rows:
        row_codes = []
        for start in range(0, len(row), width):
            group = row[start : start + width]
            s, z = shared or oracle.minmax(group, bits, symmetric, encoding.scale_dtype)
            found = oracle.encode(group, s, z, bits, symmetric)
            values += oracle.decode(found, s, z, bits, symmetric)
            row_codes += found
            zeros.append(z)
            scales += oracle.scale_bytes(s, encoding.scale_dtype)
        codes += oracle.row_bytes(row_codes, bits, block)
    if shared:
        scales, zeros = oracle.scale_bytes(shared[0], "F32"), [shared[1]]
    packed = b"" if symmetric else oracle.zero_point_bytes(zeros, bits)
    return codes, scales, packed, values


def assert_like_oracle(x: F32, encoding: AffineEncoding) -> None:
    e = encode_minmax(x, encoding)
    codes, scales, packed, values = oracle_tensor(x, encoding)
    wanted = {"codes": codes, "scales": scales}
    if not encoding.symmetric:
        wanted["zero_points"] = packed
    assert file_segments(e, encoding, x.shape) == wanted
    decoded = decode_stored(e, encoding, (len(x), x.shape[1]))
    assert decoded.ravel().tobytes() == np.array(values, np.float32).tobytes()
    errors = [abs(oracle.f32(float(v) - d)) for v, d in zip(x.ravel(), values, strict=True)]
    assert e.error.worst == max(errors)
    assert math.isclose(e.error.noise, math.fsum(d * d for d in errors), rel_tol=1e-12)


def edge_groups(length: int, bits: int) -> list[list[float]]:
    """Groups of one length that have broken quantizers."""
    n, m = 2**bits - 1, 2 ** (bits - 1) - 1
    rng = np.random.default_rng(7)
    noise = rng.standard_normal(length).tolist()
    ties = [k + 0.5 for k in range(-min(m, 8), min(m, 8))]

    def cycle(values: Iterable[float]) -> list[float]:
        some = list(values)
        return [some[i % len(some)] for i in range(length)]

    return [
        [0.0] * length,
        [-0.0] * length,
        cycle([0.0, -0.0]),
        [0.37] * length,
        [-0.37] * length,
        [abs(v) for v in noise],
        [-abs(v) for v in noise],
        [max(v, 0.0) for v in noise],
        [min(v, -0.0) for v in noise],
        cycle([float(m), *ties]),
        cycle([-float(m), *ties]),
        cycle([float(n), *(k + 0.5 for k in range(n))]),  # asymmetric, S = 1, Z = 0
        cycle([-2.0, n - 2.0, 0.0, 0.5, -0.5, -1.5]),
        cycle([-0.125, n - 0.125, 0.625, 0.875]),  # -lo / S · 4 is a tie
        cycle([-0.5, n - 0.5, 0.0, 1.0]),  # -lo / S is a tie, and a zero must stay
        cycle([400 * SMALL * 2**k for k in range(14)]),
        cycle([-SMALL * 1000, SMALL * 3000, SMALL]),
        [v * 1e30 for v in noise],
        [v * 1e-30 for v in noise],
        [1e20 if i == length // 2 else v for i, v in enumerate(noise)],
        [v + 100 for v in noise],
        [0.0 if i % 3 else v for i, v in enumerate(noise)],
    ]


# --- codes and values -----------------------------------------------------------------------------


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize(
    ("granularity", "block", "columns"),
    [("tensor", 0, 40), ("channel", 0, 1), ("channel", 0, 67), ("channel", 0, 300)]
    + [("block", b, c) for b, c in ((16, 16), (16, 40), (16, 64), (32, 33), (64, 150), (256, 600))],
)
def test_stored_bytes_and_values_equal_the_oracle(
    granularity: str, block: int, columns: int, bits: int, symmetric: bool
) -> None:
    encoding = AffineEncoding(bits, granularity, block, symmetric, "F32", columns)
    rng = np.random.default_rng([bits, block, columns])
    x = rng.standard_normal((5, columns)) * np.array([[1], [1e-3], [1e6], [0], [0.1]])
    x[1] += 2e-3
    assert_like_oracle(x.astype(np.float32), encoding)


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize("columns", [1, 40])
def test_edge_groups_equal_the_oracle(columns: int, bits: int, symmetric: bool) -> None:
    x = np.array(edge_groups(columns, bits), np.float32)
    assert_like_oracle(x, AffineEncoding(bits, "channel", 0, symmetric, "F32", columns))


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_edge_blocks_with_narrow_scales_equal_the_oracle(
    dtype: str, bits: int, symmetric: bool
) -> None:
    x = np.array(edge_groups(40, bits), np.float32)
    if dtype == "F16":
        x = x[np.abs(x).max(axis=1) <= 32768]
    assert_like_oracle(x, AffineEncoding(bits, "block", 32, symmetric, dtype, 40))


@pytest.mark.parametrize("block", BLOCKS)
@WIDTHS
def test_padding_codes_are_zero_even_where_zero_has_another_code(bits: int, block: int) -> None:
    encoding = AffineEncoding(bits, "block", block, False, "F32", block + 3)
    x = np.full((2, block + 3), -1.0, np.float32)
    x[:, ::2] = 1.0
    codes = np.frombuffer(encode_minmax(x, encoding).segments["codes"], np.uint8)
    if bits < 8:
        codes = kernels.load_codes(codes.tobytes(), encoding)
    assert len(codes) == 2 * encoding.row_codes
    assert not codes.reshape(2, -1)[:, block + 3 :].any()
    assert codes.any()


@SYMMETRIES
def test_a_single_number_is_a_row_of_one(symmetric: bool) -> None:
    encoding = AffineEncoding(4, "channel", 0, symmetric, "F32", row_length(()))
    assert encoding.rows(()) == 1
    e = encode_minmax(np.array([[-0.75]], np.float32), encoding)
    assert decode_stored(e, encoding, (1, 1)).tolist() == [[-0.75]] or symmetric
    assert affine(encoding).size(()) == 16 + 4 + (0 if symmetric else 24)
    assert abs(decode_stored(e, encoding, (1, 1))[0, 0] + 0.75) < 1e-7


def test_smallest_denormals_round_to_a_scale_that_is_not_zero() -> None:
    x = np.array([[SMALL, 0, 0, 0], [SMALL, -SMALL, SMALL, SMALL]], np.float32)
    for bits in BITS:
        for symmetric in (True, False):
            encoding = AffineEncoding(bits, "channel", 0, symmetric, "F32", 4)
            assert_like_oracle(x, encoding)


def test_quotients_beyond_binary32_are_clipped_without_a_warning() -> None:
    x = np.full((1, 64), 1e-30, np.float32)
    x[0, 7] = 3e38
    for symmetric in (True, False):
        encoding = AffineEncoding(4, "channel", 0, symmetric, "F32", 64)
        parameters = Parameters(np.array([1e-31], np.float32), np.zeros(1, np.int32))
        assert kernels.encode_rows(x, encoding, parameters).error.clipped == (
            64 if symmetric else 1
        )


# --- worked examples ------------------------------------------------------------------------------


def test_eight_bit_absmax_example_of_the_specification() -> None:
    encoding = AffineEncoding(8, "tensor", 0, True, "F32", 8)
    e = encode_minmax(np.array([EXAMPLE], np.float32), encoding)
    assert np.frombuffer(e.segments["codes"], np.int8).tolist() == [
        33,
        -14,
        -70,
        35,
        -59,
        10,
        47,
        127,
    ]
    assert round(float(stored_scales(e, encoding)[0]), 8) == 0.04881890
    values = decode_stored(e, encoding, (1, 8))[0]
    wanted = [1.6110, -0.6835, -3.4173, 1.7087, -2.8803, 0.4882, 2.2945, 6.2]
    assert np.abs(values - wanted).max() < 5.1e-5
    assert round(e.error.worst, 4) == 0.0197


def test_four_bit_asymmetric_example_of_the_specification() -> None:
    encoding = AffineEncoding(4, "tensor", 0, False, "F32", 8)
    e = encode_minmax(np.array([EXAMPLE], np.float32), encoding)
    assert stored_scales(e, encoding).tolist() == [float(np.float32(0.64))]
    assert zeros(e).tolist() == [21]
    assert kernels.load_codes(e.segments["codes"], encoding)[:8].tolist() == [
        8,
        4,
        0,
        8,
        1,
        6,
        9,
        15,
    ]
    values = decode_stored(e, encoding, (1, 8))[0]
    assert np.abs(values - [1.76, -0.8, -3.36, 1.76, -2.72, 0.48, 2.4, 6.24]).max() < 1e-6


def vector_cases() -> list[Any]:
    files = sorted(VECTORS.glob("*.json"))
    return [
        pytest.param(f.stem, case, id=f"{f.stem}-{case['case']}")
        for f in files
        for case in json.loads(f.read_text())
    ]


def test_there_are_vectors_for_every_width_and_both_symmetries() -> None:
    stems = {f.stem.split("_")[0] + f.stem.split("_")[2] for f in VECTORS.glob("*.json")}
    assert stems == {f"q{b}{s}" for b in BITS for s in ("sym", "asym")}


@pytest.mark.parametrize(("scheme", "case"), vector_cases())
def test_vector_is_met_bit_for_bit(scheme: str, case: dict[str, Any]) -> None:
    name, unit, symmetry = scheme.split("_")
    bits, symmetric = int(name[1:]), symmetry == "sym"
    block = int(unit[5:]) if unit.startswith("block") else 0
    x = np.array([int(v, 16) for v in case["x"]], np.uint32).view(np.float32)[None, :]
    encoding = AffineEncoding(
        bits, "block" if block else unit, block, symmetric, case["scale_dtype"], x.shape[1]
    )
    e = encode_minmax(x, encoding)
    assert e.segments["scales"][::-1].hex() == case["scale"]
    assert e.segments["codes"].hex() == case["packed"]
    stored = kernels.load_codes(e.segments["codes"], encoding)[: x.shape[1]].astype(int) - (
        128 if bits == 8 else 0
    )
    assert stored.tolist() == case["codes"]
    if symmetric:
        assert case["zero_point"] is case["zero_points_packed"] is None
        assert len(zeros(e)) == 0
    else:
        zero = zeros(e).view(np.int8) if bits == 8 else zeros(e)
        assert zero.tolist() == [case["zero_point"]]
        packed = file_segments(e, encoding, x.shape)["zero_points"]
        assert packed.hex() == case["zero_points_packed"]
    values = decode_stored(e, encoding, (1, x.shape[1]))[0]
    assert [f"{v:08x}" for v in values.view(np.uint32)] == case["values"]


# --- promises -------------------------------------------------------------------------------------


@WIDTHS
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_zero_stays_exactly_zero_on_asymmetric_grids(bits: int, method: str) -> None:
    rng = np.random.default_rng(bits)
    x = (rng.standard_normal((200, 32)) + rng.uniform(-2, 2, (200, 1))).astype(np.float32)
    x[np.arange(200), rng.integers(0, 32, 200)] = 0
    x[:100, 3] = -0.0
    encoding = AffineEncoding(bits, "block", 32, False, "F16", 32)
    e = kernels.encode_rows(x, encoding, kernels.fit(x, encoding, RangeMethod(method, 95)))
    values = decode_stored(e, encoding, (200, 32))
    assert (values[x == 0] == 0).all()


def test_groups_without_a_zero_may_use_quarter_steps() -> None:
    x = np.array([[-1.3, 0.4, 2.0, 0.9], [-1.3, 0.4, 2.0, 0.0]], np.float32)
    for bits in BITS[:-1]:
        encoding = AffineEncoding(bits, "channel", 0, False, "F32", 4)
        free, bound = zeros(encode_minmax(x, encoding)).tolist()
        exact = 4 * 1.3 / (3.3 / (2**bits - 1))
        assert abs(free - exact) <= 0.5
        assert bound % 4 == 0
        assert abs(bound - exact) <= 2


@WIDTHS
@SYMMETRIES
def test_errors_of_values_in_range_are_at_most_half_a_step(bits: int, symmetric: bool) -> None:
    x = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32)
    encoding = AffineEncoding(bits, "channel", 0, symmetric, "F32", 64)
    e = encode_minmax(x, encoding)
    step = stored_scales(e, encoding).astype(np.float64)[:, None]
    error = np.abs(x.astype(np.float64) - decode_stored(e, encoding, (50, 64)))
    # Rounding the zero point may push an end of the range out by half of one of its steps.
    pushed = 0 if symmetric else (0.5 if bits == 8 else 0.125)
    assert (error <= step * (0.5 + pushed) * (1 + 1e-5)).all()
    middle = (x > x.min(axis=1, keepdims=True)) & (x < x.max(axis=1, keepdims=True))
    slack = 0 if bits == 8 else pushed
    assert (error <= step * (0.5 + slack) * (1 + 1e-5))[middle].all()


@WIDTHS
@SYMMETRIES
def test_codes_of_clipping_parameters_equal_the_oracle(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(bits)
    n, half = 2**bits - 1, 2 ** (bits - 1)
    x = (oracle.draw("student", bits, 30, 40) * n).astype(np.float32)
    x[:, :2] = -1e30, 1e30
    scale = rng.uniform(0.3, 1.5, 30).astype(np.float32)
    zero = np.zeros(30, np.int32)
    if symmetric and bits < 8:
        scale[::2] *= -1
    if not symmetric:
        zero = rng.integers(0, (1 if bits == 8 else 4) * n + 1, 30).astype(np.int32)
    encoding = AffineEncoding(bits, "channel", 0, symmetric, "F32", 40)
    e = kernels.encode_rows(x, encoding, Parameters(scale, zero))
    wanted, clipped = b"", 0
    values = []
    signed = 128 if bits == 8 and not symmetric else 0
    for row, s, z in zip(x.tolist(), scale.tolist(), zero.tolist(), strict=True):
        codes = oracle.encode(row, s, z - signed, bits, symmetric)
        wanted += oracle.row_bytes(codes, bits, 0)
        values += oracle.decode(codes, s, z - signed, bits, symmetric)
        place = 0 if symmetric else z / (1 if bits == 8 else 4)
        low, high = (-half + (bits == 8), half - 1) if symmetric else (0, n)
        quotients = [round(oracle.f32(oracle.f32(v / s) + place)) for v in row]
        clipped += sum(not low <= q <= high for q in quotients)
    assert e.segments["codes"] == wanted
    assert e.error.clipped == clipped > 60
    assert decode_stored(e, encoding, (30, 40)).ravel().tolist() == values


def test_clipped_values_are_counted() -> None:
    x = np.array([[-9.0, -2.5, -2.4, 0, 1.4, 1.6, 7]], np.float32)
    encoding = AffineEncoding(2, "channel", 0, True, "F32", 7)
    e = kernels.encode_rows(x, encoding, Parameters(np.ones(1, np.float32), np.zeros(1, np.int32)))
    # Codes reach from -2 to 1; -2.5 rounds to the even -2.
    assert e.error.clipped == 3
    assert kernels.load_codes(e.segments["codes"], encoding)[:7].tolist() == [0, 0, 0, 2, 3, 3, 3]


def test_error_sums_add_up_and_give_decibels() -> None:
    a, b = ErrorSums(3, 100.0, 1.0, 0.5, 1), ErrorSums(4, 900.0, 9.0, 2.0, 0)
    assert a + b == ErrorSums(7, 1000.0, 10.0, 2.0, 1)
    assert math.isclose((a + b).sqnr_db or 0, 20.0)
    assert (a + b).nmse == 0.01
    assert ErrorSums(3, 100.0, 0.0).sqnr_db is None
    assert ErrorSums(3, 0.0, 1.0).sqnr_db == -math.inf


# --- sizes ----------------------------------------------------------------------------------------


@WIDTHS
@SYMMETRIES
def test_sizes_follow_the_tables_of_the_container(bits: int, symmetric: bool) -> None:
    units = [("tensor", 0), ("channel", 0), *(("block", b) for b in BLOCKS)]
    for granularity, block in units:
        for rows, columns in ((1, 1), (3, 31), (2, 48), (5, 257)):
            unit = (block or 1) if bits == 8 else max(block, 32)
            stored = math.ceil(columns / unit) * unit
            scales = {"tensor": 1, "channel": rows}.get(
                granularity, rows * math.ceil(columns / (block or 1))
            )
            dtype, width = ("BF16", 2) if block else ("F32", 4)
            wanted = [("codes", rows * stored * bits // 8), ("scales", scales * width)]
            if not symmetric:
                group = 4 * (bits + 2) * math.ceil(scales / 32)
                wanted.append(("zero_points", scales if bits == 8 else group))
            encoding = Affine(bits, granularity, block, symmetric, dtype, columns)
            found = [(s.kind, s.size) for s in encoding.segments((rows, columns))]
            assert found == wanted


# --- scales ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_scales_round_to_nearest_even_and_never_to_zero(dtype: str) -> None:
    rng = np.random.default_rng(5)
    patterns = rng.integers(0, 0x7F7F0000, 3000).astype(np.uint32)
    patterns[:1000] &= 0xFFFF8000  # ties of BF16
    patterns[1000:2000] &= 0xFFFFF000  # ties of F16
    values = patterns.view(np.float32)
    if dtype == "F16":
        values = values[values < 65504]
    values = np.concatenate([values, np.array([SMALL, 1e-40, 1e-38, 2.0**-25, 2.0**-24])])
    values = np.concatenate([values, -values, [0.0]]).astype(np.float32)
    found = round_scale(values, dtype, np.abs(values))
    for v, s in zip(values.tolist(), found.tolist(), strict=True):
        wanted = oracle.round_scale(v, dtype)
        if wanted == 0 != v:
            wanted = math.copysign(oracle.SMALLEST[dtype], v)
        assert s == wanted, (v, dtype)


def test_a_scale_that_underflowed_is_the_smallest_number_and_that_of_zeros_is_zero() -> None:
    scale, magnitude = np.zeros(2, np.float32), np.array([SMALL, 0], np.float32)
    for dtype, smallest in oracle.SMALLEST.items():
        assert round_scale(scale, dtype, magnitude).tolist() == [smallest, 0]


def scale_dtype_of(rows: list[list[float]], bits: int, block: int = 16) -> str:
    x = np.array(rows, np.float32)
    encoding = AffineEncoding(bits, "block" if block else "channel", block, True, "F32", 16)
    return choose_scale_dtype(kernels.observe_groups(x, encoding, False), encoding)


def block_of(amax: float) -> list[float]:
    return [amax, *[0.0] * 15]


@WIDTHS
def test_scale_dtype_changes_at_the_stated_thresholds(bits: int) -> None:
    n = 2**bits - 1
    edge = n * 2.0 ** (bits - 22)
    below = float(np.nextafter(np.float32(edge), np.float32(0)))
    other = "BF16" if bits <= 6 else "F32"
    zeros = block_of(0.0)
    assert scale_dtype_of([block_of(edge), block_of(1.0), zeros], bits) == "F16"
    assert scale_dtype_of([block_of(-edge), block_of(1.0)], bits) == "F16"
    assert scale_dtype_of([block_of(below), block_of(1.0)], bits) == other
    assert scale_dtype_of([block_of(-32768.0), zeros], bits) == "F16"
    assert scale_dtype_of([block_of(32770.0), zeros], bits) == other
    least = n * 2.0**-100
    assert scale_dtype_of([block_of(least)], bits) == other
    assert scale_dtype_of([block_of(least * 0.999)], bits) == "F32"


def test_scales_of_channels_are_binary32_whatever_the_weights() -> None:
    assert scale_dtype_of([block_of(1.0)], 4, block=0) == "F32"


@WIDTHS
@SYMMETRIES
def test_rounding_a_chosen_scale_moves_values_by_a_small_part_of_a_step(
    bits: int, symmetric: bool
) -> None:
    """An eighth for F16 (section 5), a quarter for BF16, at the smallest and largest blocks that
    each dtype takes.
    """
    rng = np.random.default_rng(bits)
    n = 2**bits - 1
    for magnitude in (n * 2.0 ** (bits - 22), 32768.0 / 1.1, n * 2.0**-99):
        amax = (magnitude * rng.uniform(1, 1.1, 2000)).astype(np.float32)
        x = np.zeros((len(amax), 16), np.float32)
        x[:, 0] = amax  # one-sided: the last code is the farthest from zero
        exact = AffineEncoding(bits, "block", 16, symmetric, "F32", 16)
        dtype = choose_scale_dtype(kernels.observe_groups(x, exact, False), exact)
        before = kernels.fit(x, exact, MINMAX).scale.astype(np.float64)
        after = kernels.fit(x, replace(exact, scale_dtype=dtype), MINMAX).scale.astype(np.float64)
        reach = 2 ** (bits - 1) - (bits == 8) if symmetric else n
        bound = {"F16": 0.1251, "BF16": 0.2501, "F32": 0.0}[dtype]
        assert (reach * np.abs(after - before) / before).max() <= bound, (magnitude, dtype)


# --- casts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_casts_round_to_nearest_even(dtype: str) -> None:
    rng = np.random.default_rng(1)
    patterns = rng.integers(0, 0x7F7F0000, 3000).astype(np.uint32)
    patterns[:1000] &= 0xFFFF8000
    patterns[1000:2000] &= 0xFFFFF000
    x = patterns.view(np.float32)
    if dtype == "F16":
        x = x[x < 65504]
    x = np.concatenate([x, -x, np.array([0.0, -0.0], np.float32)])
    stored, back = cast_values(x, dtype)
    wanted = b"".join(
        struct.pack("<f", v) if dtype == "F32" else oracle.scale_bytes(v, dtype) for v in x.tolist()
    )
    assert stored == wanted
    assert back.tolist() == [oracle.round_scale(v, dtype) for v in x.tolist()]


def test_casts_of_too_large_values_become_infinite_without_a_warning() -> None:
    x = np.array([65519.9, 65520.0, -1e38], np.float32)
    assert cast_values(x, "F16")[1].tolist() == [65504.0, math.inf, -math.inf]
    top = np.array([3.4e38], np.float32)
    assert (
        cast_values(top, "BF16")[1].tolist()
        == top.astype(ml_dtypes.bfloat16).tolist()
        == [math.inf]
    )
