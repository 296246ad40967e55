"""formats/schemes/SPEC.md in plain Python, one number at a time: slow and obvious.

One binary32 operation is one binary64 operation, rounded: for +, -, · and / of two binary32
numbers that is the correctly rounded result (53 >= 2 · 24 + 2). Codes and zero points are as
stored: unsigned and quarter steps below 8 bits, signed bytes at 8.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

SMALLEST = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}


def f32(value: float) -> float:
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def bits32(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def from_bits32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def scale_bytes(value: float, dtype: str) -> bytes:
    """A binary32 number in the scale dtype, little-endian; the rounding is written out for BF16."""
    if dtype == "F16":
        return struct.pack("<e", value)
    if dtype == "F32":
        return struct.pack("<f", value)
    wide = bits32(value)
    high, low = wide >> 16, wide & 0xFFFF
    return struct.pack("<H", high + (low > 0x8000 or (low == 0x8000 and high % 2 == 1)))


def scale_value(stored: bytes, dtype: str) -> float:
    if dtype == "BF16":
        return from_bits32(struct.unpack("<H", stored)[0] << 16)
    return float(struct.unpack({"F16": "<e", "F32": "<f"}[dtype], stored)[0])


def round_scale(value: float, dtype: str) -> float:
    """f() of the specification."""
    return scale_value(scale_bytes(value, dtype), dtype)


def clamp_rint(value: float, low: int, high: int) -> int:
    return int(max(low, min(high, round(value) if math.isfinite(value) else value)))


# --- sections 2 and 5 -----------------------------------------------------------------------------


def encode(x: Sequence[float], s: float, z: int, bits: int, symmetric: bool) -> list[int]:
    n, half = 2**bits - 1, 2 ** (bits - 1)
    codes = []
    for v in x:
        if s == 0:
            code = (0 if bits == 8 else half) if symmetric else (-128 if bits == 8 else 0)
        elif symmetric:
            q = f32(v / s)
            code = clamp_rint(q, -127, 127) if bits == 8 else clamp_rint(q, -half, half - 1) + half
        elif bits == 8:
            code = clamp_rint(f32(f32(v / s) + (z + 128)), 0, 255) - 128
        else:
            code = clamp_rint(f32(f32(v / s) + z / 4), 0, n)
        codes.append(code)
    return codes


def decode(codes: Sequence[int], s: float, z: int, bits: int, symmetric: bool) -> list[float]:
    if symmetric:
        return [f32((u if bits == 8 else u - 2 ** (bits - 1)) * s) for u in codes]
    return [f32((u - z if bits == 8 else (4 * u - z) / 4) * s) for u in codes]


def parameters(
    low: float, high: float, has_zero: bool, bits: int, symmetric: bool, dtype: str
) -> tuple[float, int]:
    """Scale and stored zero point that cover low <= 0 <= high."""
    n = 2**bits - 1
    amax = max(high, -low)  # in this order: +0 for a group of zeros
    s = f32(amax / (2 ** (bits - 1) - 1)) if symmetric else f32(f32(high / n) - f32(low / n))
    s = round_scale(s, dtype)
    if s == 0 and amax > 0:
        s = SMALLEST[dtype]
    if symmetric:
        return s, 0
    real = f32(-low / s) if s else 0.0
    if bits == 8:
        return s, clamp_rint(real, 0, 255) - 128
    return s, 4 * clamp_rint(real, 0, n) if has_zero else clamp_rint(f32(real * 4), 0, 4 * n)


def minmax(x: Sequence[float], bits: int, symmetric: bool, dtype: str) -> tuple[float, int]:
    return parameters(min(0.0, *x), max(0.0, *x), 0.0 in x, bits, symmetric, dtype)


def percentile(
    x: Sequence[float], percent: str, bits: int, symmetric: bool, dtype: str
) -> tuple[float, int]:
    """``percent`` is a decimal, taken exactly."""
    rank = max(1, math.ceil(Fraction(percent) / 100 * len(x)))
    ordered = sorted(x)
    high, low = max(0.0, ordered[rank - 1]), min(0.0, ordered[-rank])
    if low == high == 0:
        return minmax(x, bits, symmetric, dtype)
    return parameters(low, high, 0.0 in x, bits, symmetric, dtype)


# --- sections 4 and 6 -----------------------------------------------------------------------------


def pack(values: Sequence[int], width: int) -> bytes:
    """Value j lies in byte j mod 4p, at bit p · floor(j / 4p) of its plane; padded to 32 values."""
    out = b""
    padded = [*values, *[0] * (-len(values) % 32)]
    for first in range(0, len(padded), 32):
        shift = 0
        for p in (p for p in (8, 4, 2, 1) if width & p):
            plane = bytearray(4 * p)
            for j in range(32):
                part = padded[first + j] >> shift & (2**p - 1)
                plane[j % (4 * p)] |= part << p * (j // (4 * p))
            out += plane
            shift += p
    return out


def row_bytes(codes: Sequence[int], bits: int, block: int) -> bytes:
    """A row of stored codes with its padding."""
    if bits == 8:
        return struct.pack(f"{len(codes)}b", *codes) + bytes(-len(codes) % (block or 1))
    return pack([*codes, *[0] * (-len(codes) % max(block, 32))], bits)


def zero_point_bytes(z: Sequence[int], bits: int) -> bytes:
    return struct.pack(f"{len(z)}b", *z) if bits == 8 else pack(z, bits + 2)


def lane_sum(values: Sequence[float], rounded: Callable[[float], float] = float) -> float:
    """Sixteen partial sums, added in pairs; ``rounded`` is `f32` for binary32."""
    lanes = [0.0] * 16
    for i, v in enumerate(values):
        lanes[i % 16] = rounded(lanes[i % 16] + v)
    for half in (8, 4, 2, 1):
        lanes = [rounded(lanes[i] + lanes[i + half]) for i in range(half)]
    return lanes[0]


# --- weights to try -------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]

DISTRIBUTIONS: dict[str, Draw] = {
    "gaussian": lambda r, s: r.standard_normal(s),
    "laplace": lambda r, s: r.laplace(size=s),
    "student": lambda r, s: r.standard_t(3, s),
    "uniform": lambda r, s: r.uniform(-1, 1, s),
    "shifted": lambda r, s: r.uniform(-0.3, 1, s),
    "one-sided": lambda r, s: np.abs(r.standard_normal(s)),
    "exponential": lambda r, s: -r.exponential(size=s),
    "outlier": lambda r, s: r.standard_normal(s) + 20.0 * (np.arange(s[1]) % 64 == 3),
    "far": lambda r, s: 0.1 * r.standard_normal(s) + 3,
}


def draw(name: str, seed: int, rows: int, columns: int) -> NDArray[np.float32]:
    return DISTRIBUTIONS[name](np.random.default_rng(seed), (rows, columns)).astype(np.float32)
