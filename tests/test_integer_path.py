"""A linear layer from float input to float output in integers, against arithmetic written out.

formats/schemes/SPEC.md section 7; the packed bytes are made by tests/oracle.py.
"""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray
from stored import in_memory

from qconvert.codecs.affine.encoding import Affine
from qconvert.encoding import BITS
from qconvert.kernels.activations import DynamicInput, StaticInput
from qconvert.running.integer_path import read_matrix

F32 = NDArray[np.float32]
How = StaticInput | DynamicInput
SYMMETRIC, ASYMMETRIC = DynamicInput(), DynamicInput(symmetric=False)
WIDTHS = pytest.mark.parametrize("bits", BITS)
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


class Layer:
    """A stored matrix of random codes, and the integers it was made of.

    Attributes:
        k: int64 (R, c), codes less zero points in integer units.
        unit: float32 (R, G), the scale of such a unit.
    """

    def __init__(self, bits: int, symmetric: bool, granularity: str, block: int, shape: object):
        rows, columns = self.shape = shape  # type: ignore[misc]
        rng = np.random.default_rng([bits, symmetric, block, rows])
        groups = -(-columns // block) if block else 1
        low = -127 if bits == 8 and symmetric else 0
        stored = rng.integers(low, 128 if low else 1 << bits, (rows, columns))
        scale = rng.uniform(0.01, 2, (rows, groups)).astype(np.float32)
        steps = rng.integers(0, (1 << bits) if bits == 8 else 4 * (1 << bits) - 3, (rows, groups))
        if granularity == "tensor":
            scale[:], steps[:] = scale[0, 0], steps[0, 0]
        wide = np.repeat(steps, block or columns, axis=1)[:, :columns]
        if symmetric:
            self.k = stored if bits == 8 else stored - (1 << (bits - 1))
            zero = b""
        else:
            self.k = stored - wide if bits == 8 else 4 * stored - wide
            one = steps.ravel()[:1] if granularity == "tensor" else steps.ravel()
            shifted = [int(z) - 128 for z in one] if bits == 8 else [int(z) for z in one]
            zero = oracle.zero_point_bytes(shifted, bits)
        if bits == 8 and not symmetric:
            stored = stored - 128
        self.unit = scale if symmetric or bits == 8 else scale / np.float32(4)
        self.group = block or columns
        encoding = Affine(bits, granularity, block, symmetric, "F32", columns)
        segments = {
            "codes": b"".join(oracle.row_bytes(row, bits, block) for row in stored.tolist()),
            "scales": (scale[:1, :1] if granularity == "tensor" else scale).tobytes(),
            "zero_points": zero,
        }
        self.matrix = read_matrix(in_memory(encoding, (rows, columns), segments))

    def wanted(self, x: F32, bias: F32 | None, how: How) -> F32:
        """Sums in int64, everything else one binary32 operation after the other."""
        f32 = np.float32
        out = np.zeros((len(x), self.shape[0]), f32)
        for m, row in enumerate(x):
            if how == SYMMETRIC:
                s, z, low = f32(np.abs(row).max() / f32(127)), 0, -127
            elif how == ASYMMETRIC:
                bottom = min(row.min(), f32(0))
                s = max(row.max(), f32(0)) / f32(255) - bottom / f32(255)
                z, low = max(-128, min(127, round(float(f32(-128) - bottom / s)))), -128
            else:
                assert isinstance(how, StaticInput)
                s, z, low = f32(how.scale), how.zero_point, -128
            a = np.clip(np.rint(row / s + f32(z)), low, 127).astype(np.int64) - z
            total = np.zeros(self.shape[0], f32)
            for g in range(self.unit.shape[1]):
                span = slice(g * self.group, (g + 1) * self.group)
                acc = self.k[:, span] @ a[span]
                total += acc.astype(f32) * self.unit[:, g]
            out[m] = total * s
        return out if bias is None else out + bias


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize(
    ("granularity", "block"), [("tensor", 0), ("channel", 0), ("block", 16), ("block", 64)]
)
@pytest.mark.parametrize(
    "how",
    [SYMMETRIC, ASYMMETRIC, StaticInput(0.03, 0), StaticInput(0.03, -17)],
    ids=["dynamic-sym", "dynamic-asym", "static-sym", "static-asym"],
)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_a_layer_equals_the_arithmetic_written_out(
    biased: bool,
    how: How,
    granularity: str,
    block: int,
    bits: int,
    symmetric: bool,
) -> None:
    layer = Layer(bits, symmetric, granularity, block, (5, 72))
    x = oracle.draw("gaussian", bits, 4, 72)
    bias = oracle.draw("gaussian", 99, 1, 5)[0] if biased else None
    x[1] += 1  # another zero point than the other rows
    out = layer.matrix.linear(x, bias, how)
    assert out.dtype == np.float32
    assert out.tobytes() == layer.wanted(x, bias, how).tobytes()


@SYMMETRIES
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("block", [0, 64])
def test_a_matrix_of_several_tiles_equals_the_arithmetic_written_out(
    block: int, bits: int, symmetric: bool
) -> None:
    """Rows are cut where zero points, packed 32 at a time, are not."""
    granularity = "block" if block else "channel"
    layer = Layer(bits, symmetric, granularity, block, (61, 16_000))
    x = oracle.draw("gaussian", bits, 2, 16_000)
    wanted = layer.wanted(x, None, SYMMETRIC)
    assert layer.matrix.linear(x, None, SYMMETRIC).tobytes() == wanted.tobytes()


@WIDTHS
@SYMMETRIES
@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_values_are_integers_times_their_scale(
    granularity: str, bits: int, symmetric: bool
) -> None:
    layer = Layer(bits, symmetric, granularity, 16 if granularity == "block" else 0, (7, 72))
    unit = np.repeat(layer.unit, layer.group, axis=1)[:, :72]
    # A quarter of a scale is exact, so the order of the two multiplications does not matter.
    wanted = layer.k.astype(np.float32) * unit
    assert (layer.matrix.values(2, 6) == wanted[2:6]).all()


@pytest.mark.parametrize("how", [SYMMETRIC, ASYMMETRIC, StaticInput(0.03, 5)])
def test_a_row_of_zeros_gives_the_bias(how: How) -> None:
    layer = Layer(4, False, "block", 16, (5, 32))
    bias = oracle.draw("gaussian", 1, 1, 5)[0]
    out = layer.matrix.linear(np.zeros((2, 32), np.float32), bias, how)
    assert (out == bias).all()


@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", [SYMMETRIC, ASYMMETRIC, StaticInput(0.03, 5)])
def test_a_wild_input_spoils_its_own_row_only(wild: float, how: How) -> None:
    layer = Layer(8, True, "channel", 0, (5, 32))
    x = oracle.draw("gaussian", 3, 3, 32)
    clean = layer.matrix.linear(x, None, how)
    x[1, 7] = wild
    out = layer.matrix.linear(x, None, how)
    assert np.isnan(out[1]).all()
    assert (out[[0, 2]] == clean[[0, 2]]).all()


@SYMMETRIES
def test_nothing_is_larger_in_memory_than_in_the_file(symmetric: bool) -> None:
    layer = Layer(4, symmetric, "block", 64, (64, 256))
    groups = 64 * 4
    assert layer.matrix.nbytes == 64 * 128 + groups * 4 + (0 if symmetric else groups * 6 // 8)
