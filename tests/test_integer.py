"""The integer matrix product against exact arithmetic: formats/schemes/SPEC.md section 7."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import BITS, AffineEncoding
from qconvert.kernels import composed
from qconvert.kernels.activations import dynamic_activations, static_activations
from qconvert.kernels.arithmetic import integer_rows
from qconvert.kernels.records import Activations, IntegerRows

F32 = NDArray[np.float32]
WIDTHS = pytest.mark.parametrize("bits", BITS)
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
SEGMENT = 16_384


def random_layer(
    encoding: AffineEncoding, rows: int, columns: int
) -> tuple[NDArray[np.uint8], F32, NDArray[np.int32]]:
    """Unsigned codes, scales and zero steps of any values that the encoding can hold."""
    rng = np.random.default_rng([encoding.bits, columns])
    low = 1 if encoding.bits == 8 and encoding.symmetric else 0
    codes = rng.integers(low, encoding.levels + 1, (rows, columns)).astype(np.uint8)
    groups = -(-columns // encoding.block) if encoding.block else 1
    scale = rng.uniform(0.01, 2, (rows, groups)).astype(np.float32)
    zero = np.zeros((rows, groups), np.int32)
    if encoding.symmetric:
        if encoding.bits < 8:
            scale *= np.where(rng.random(scale.shape) < 0.5, -1, 1).astype(np.float32)
    else:
        top = encoding.levels * (1 if encoding.bits == 8 else 4)
        zero = rng.integers(0, top + 1, zero.shape).astype(np.int32)
    if encoding.granularity == "tensor":
        scale[:], zero[:] = scale[0], zero[0]
    return codes, scale, zero


def weight(code: int, scale: float, zero: int, bits: int, symmetric: bool) -> Fraction:
    """The exact value of a code, before it is rounded to binary32."""
    if symmetric:
        k = Fraction(code - 2 ** (bits - 1))
    else:
        k = code - (Fraction(zero) if bits == 8 else Fraction(zero, 4))
    return k * Fraction(scale)


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize(
    ("granularity", "block"), [("tensor", 0), ("channel", 0), ("block", 16), ("block", 64)]
)
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_product_equals_fractions(
    static: bool, granularity: str, block: int, bits: int, symmetric: bool
) -> None:
    columns = 72
    encoding = AffineEncoding(bits, granularity, block, symmetric, "F32", columns)
    codes, scale, zero = random_layer(encoding, 5, columns)
    x = oracle.draw("gaussian", bits, 3, columns)
    a = static_activations(x, 0.03, -17) if static else dynamic_activations(x)
    product = kernels.integer_product(integer_rows(codes, scale, zero, encoding), a, check=True)
    assert product.exact is True
    length = block or columns
    for m in range(3):
        inputs = [
            (int(v) - a.zero_point) * Fraction(float(a.scale[m])) for v in a.codes[m].tolist()
        ]
        for r in range(5):
            weights = [
                weight(
                    int(codes[r, c]),
                    float(scale[r, c // length]),
                    int(zero[r, c // length]),
                    bits,
                    symmetric,
                )
                for c in range(columns)
            ]
            terms = [w * v for w, v in zip(weights, inputs, strict=True)]
            # One rounding for each of acc, product, sum and the last product of a few groups.
            slack = 2.0**-21 * float(sum(abs(t) for t in terms))
            assert abs(float(product.y[m, r]) - float(sum(terms))) <= slack


@WIDTHS
@SYMMETRIES
def test_outputs_are_rounded_in_the_stated_order(bits: int, symmetric: bool) -> None:
    """y = s_a · Σ S' · acc, binary32, groups in order from 0; acc is exact."""
    encoding = AffineEncoding(bits, "block", 16, symmetric, "F32", 90)
    codes, scale, zero = random_layer(encoding, 4, 90)
    a = static_activations(oracle.draw("laplace", bits, 3, 90), 0.021, 33)
    units = 1 if symmetric or bits == 8 else 4
    y = kernels.integer_product(integer_rows(codes, scale, zero, encoding), a).y
    for m in range(3):
        for r in range(4):
            total = 0.0
            for g in range(6):
                acc = 0
                for c in range(16 * g, min(16 * g + 16, 90)):
                    u, z = int(codes[r, c]), int(zero[r, g])
                    k = u - 2 ** (bits - 1) if symmetric else units * u - z
                    acc += k * (int(a.codes[m, c]) - 33)
                s = oracle.f32(float(scale[r, g]) / units)
                total = oracle.f32(total + oracle.f32(oracle.f32(acc) * s))
            assert float(y[m, r]) == oracle.f32(total * float(a.scale[m]))


# --- bounds ---------------------------------------------------------------------------------------


def extreme_rows(bits: int, symmetric: bool, code: int, zero: int, columns: int) -> IntegerRows:
    encoding = AffineEncoding(bits, "channel", 0, symmetric, "F32", columns)
    codes = np.full((1, columns), code, np.uint8)
    one = np.ones((1, 1), np.float32)
    return integer_rows(codes, one, np.full((1, 1), zero, np.int32), encoding)


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize("columns", [SEGMENT, SEGMENT + 1, 3 * SEGMENT + 5])
def test_extreme_codes_do_not_overflow_int32(columns: int, bits: int, symmetric: bool) -> None:
    n = 2**bits - 1
    low = 1 if bits == 8 and symmetric else 0
    zeros = (0,) if symmetric else (0, n if bits == 8 else 4 * n)
    for code in (low, n):
        for zero in zeros:
            rows = extreme_rows(bits, symmetric, code, zero, columns)
            for value, zero_point in ((-128, 127), (127, -128), (-128, -128), (127, 127)):
                inputs = np.full((1, columns), value, np.int8)
                a = Activations(inputs, np.ones(1, np.float32), zero_point)
                product = kernels.integer_product(rows, a, check=True)
                assert product.exact is True
                units = 1 if symmetric or bits == 8 else 4
                k = code - 2 ** (bits - 1) if symmetric else units * code - zero
                wanted = k * (value - zero_point) * columns
                assert float(product.y[0, 0]) * units == pytest.approx(wanted, rel=1e-6)


def test_the_bound_of_the_specification_is_needed() -> None:
    """Four terms of 255 · 128 · 16,384 stay below 2^31, twice as many columns would not."""
    assert 4 * 255 * 128 * SEGMENT < 2**31 <= 4 * 255 * 128 * 2 * SEGMENT
    rows = extreme_rows(8, False, 255, 0, 3 * SEGMENT)
    assert [s.stop - s.start for _, s in rows.spans()] == [SEGMENT] * 3
    assert {g for g, _ in rows.spans()} == {0}


@WIDTHS
@SYMMETRIES
def test_integer_rows_stay_within_a_signed_nine_bit_number(bits: int, symmetric: bool) -> None:
    encoding = AffineEncoding(bits, "channel", 0, symmetric, "F32", 2**bits)
    codes = np.arange(2**bits, dtype=np.uint8)[None, :]
    rows = integer_rows(codes, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int32), encoding)
    assert rows.codes.dtype == np.int16
    assert np.abs(rows.codes).max() <= 255
    step = 1 if symmetric or bits == 8 else 4
    assert set(np.diff(rows.codes[0].astype(int)).tolist()) == {step}


# --- the check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, -1, 1 << 20])
def test_the_check_notices_a_wrong_accumulator(wrong: int) -> None:
    class Off:
        @staticmethod
        def integer_dots(codes: Any, activations: Any) -> Any:
            acc = kernels.integer_dots(codes, activations)
            acc[-1, -1, -1] += wrong
            return acc

    encoding = AffineEncoding(4, "block", 32, False, "F32", 96)
    rows = integer_rows(*random_layer(encoding, 4, 96), encoding)
    a = dynamic_activations(oracle.draw("gaussian", 1, 3, 96))
    assert kernels.integer_product(rows, a, check=True).exact is True
    off: Any = Off
    assert composed.integer_product(off, rows, a, check=True).exact is False
    assert composed.integer_product(off, rows, a).exact is None


def test_the_check_notices_an_overflow() -> None:
    """Codes beyond the bound of section 7, as a damaged file could not hold them."""
    rows = IntegerRows(
        codes=np.full((1, SEGMENT), 32_767, np.int16),
        zero=np.zeros((1, 1), np.int32),
        scale=np.ones((1, 1), np.float32),
        offset=None,
        group=SEGMENT,
    )
    a = Activations(np.full((1, SEGMENT), 127, np.int8), np.ones(1, np.float32), 0)
    assert kernels.integer_product(rows, a, check=True).exact is False


# --- activations ----------------------------------------------------------------------------------


def test_dynamic_activations_equal_the_formula() -> None:
    x = oracle.draw("student", 2, 20, 33)
    x[3] = 0
    x[4] = -x[4]
    x[5, :3] = 127, 0.5, 1.5  # ties to even
    x[5, 3:] = -2.5
    a = dynamic_activations(x)
    for m, row in enumerate(x.tolist()):
        amax = max(abs(v) for v in row)
        s = oracle.f32(amax / 127) if amax else 1.0
        assert float(a.scale[m]) == s
        codes = [oracle.clamp_rint(oracle.f32(v / s), -127, 127) for v in row]
        assert a.codes[m].tolist() == codes
    assert a.zero_point == 0
    assert a.codes[5, :4].tolist() == [127, 0, 2, -2]


@pytest.mark.parametrize(("scale", "zero_point"), [(0.03, 5), (1.0, -128), (0.5, 127)])
def test_static_activations_equal_the_formula(scale: float, zero_point: int) -> None:
    x = oracle.draw("student", 3, 20, 33) * np.float32(10)
    x[0, :4] = 0.25, 0.75, -0.25, 0.0
    a = static_activations(x, scale, zero_point)
    s = oracle.f32(scale)
    for m, row in enumerate(x.tolist()):
        places = [oracle.f32(oracle.f32(v / s) + zero_point) for v in row]
        assert a.codes[m].tolist() == [oracle.clamp_rint(p, -128, 127) for p in places]
    assert a.codes[0, 3] == zero_point, "zero is exact"
    assert a.values[0, 3] == 0.0
    assert set(a.scale.tolist()) == {s}


def test_denormal_activations_do_not_divide_by_zero() -> None:
    a = dynamic_activations(np.array([[1e-45, 0.0], [1e-38, -1e-38]], np.float32))
    assert (a.scale > 0).all()
    assert a.codes[1].tolist() == [127, -127]
