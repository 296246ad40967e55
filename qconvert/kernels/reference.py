"""The definition of every kernel, in NumPy: what the bits must be. Native code may only be faster.

Conventions: *groups* are rows of an array ``x`` of shape (G, L), float32, L <= 256; ``counts``
(G,) says how many values of each group are real (the rest are zeros behind them), None when all
are. Codes are unsigned throughout (0 .. 2^bits - 1); zero points are unsigned too, in *zero
steps*: 4 to a code below 8 bits, 1 at 8 bits. Section numbers are those of formats/schemes/SPEC.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

PowerSums = tuple[float, float, float, float]

LANES = 16  # partial sums, section 6
QUOTIENT = 2.0**-22  # error of a code's place, relative to the weight: quotients are in binary32
HISTOGRAM_BINS = 1 << 16


# --- statistics -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, extremes and central moments of a run of numbers; m2..m4 are sums, not means."""

    count: int
    minimum: float
    maximum: float
    mean: float
    m2: float
    m3: float
    m4: float

    def __post_init__(self) -> None:
        # Which zero is the smaller one depends on the processor: no extreme is -0.
        object.__setattr__(self, "minimum", self.minimum + 0.0)
        object.__setattr__(self, "maximum", self.maximum + 0.0)

    @classmethod
    def about(
        cls, count: int, extremes: tuple[float, float], pivot: float, sums: PowerSums
    ) -> Moments:
        """Of ``count`` numbers from their extremes and `power_sums`: the binomial expansion of the
        powers of x - mean = (x - pivot) - (mean - pivot).
        """
        first, second, third, fourth = sums
        d = first / count
        return cls(
            count,
            *extremes,
            mean=pivot + d,
            m2=max(second - d * first, 0.0),
            m3=third - 3 * d * second + 2 * d * d * first,
            m4=max(fourth - 4 * d * third + 6 * d * d * second - 3 * d * d * d * first, 0.0),
        )

    @property
    def square_sum(self) -> float:
        """Σx²."""
        return self.m2 + self.count * self.mean * self.mean

    @property
    def std(self) -> float | None:
        """Population standard deviation."""
        return _finite(math.sqrt(self.m2 / self.count))

    @property
    def skewness(self) -> float | None:
        """Third standardised moment; None when all values are equal."""
        if self.m2 <= 0:
            return None
        return _finite(math.sqrt(self.count / self.m2) * (self.m3 / self.m2))

    @property
    def kurtosis(self) -> float | None:
        """Fourth standardised moment, 3 for a Gaussian; None when all values are equal."""
        return _finite(self.count * (self.m4 / self.m2) / self.m2) if self.m2 > 0 else None

    @property
    def asymmetry(self) -> float:
        """(max + min) / (max - min): 0 for a symmetric range, ±1 when zero is an end of it."""
        low, high = min(self.minimum, 0.0), max(self.maximum, 0.0)
        return (high + low) / (high - low) if high > low else 0.0


def _finite(value: float) -> float | None:
    """None for what overflowed on the way: float64 weights may be as far from 1 as they like."""
    return value if math.isfinite(value) else None


def lane_sum(values: F64) -> float:
    """Sum of a 1-d float64 array in the order of section 6: 16 partial sums, then added in
    pairs.
    """
    whole = len(values) // LANES * LANES
    lanes = np.add.reduce(values[:whole].reshape(-1, LANES), axis=0)
    lanes[: len(values) - whole] += values[whole:]
    return float(_fold(lanes))


@np.errstate(over="ignore", invalid="ignore")  # powers of large float64 values
def moments(x: NDArray[np.floating[Any]]) -> Moments:
    """Moments of a non-empty 1-d array of finite numbers, in float64."""
    values = x.astype(np.float64)
    count = len(values)
    mean = lane_sum(values) / count
    d = values - mean
    d2 = d * d
    return Moments(
        count=count,
        minimum=float(values.min()),
        maximum=float(values.max()),
        mean=mean,
        m2=lane_sum(d2),
        m3=lane_sum(d2 * d),
        m4=lane_sum(d2 * d2),
    )


def power_sums(x: F32, pivot: float) -> PowerSums:
    """Σd, Σd², Σd³ and Σd⁴ of the distances d = x - pivot of a 1-d array, in float64.

    One pass where `moments` takes two; exact enough for any pivot among the values.
    """
    d = x.astype(np.float64) - pivot
    d2 = d * d
    return lane_sum(d), lane_sum(d2), lane_sum(d2 * d), lane_sum(d2 * d2)


def all_finite(x: F32) -> bool:
    """Whether no value, of any shape, is NaN or Inf."""
    return bool(np.isfinite(x).all())


def histogram(x: F32) -> NDArray[np.int64]:
    """Counts of a 1-d float32 array by the upper 16 bits of each bit pattern (sign, exponent, 7
    bits).

    65,536 bins, exact for BF16 values and at most 1/128 wide, relative to the value, for others:
    no range to guess beforehand, so two histograms add.
    """
    keys = (x.view(np.uint32) >> 16).astype(np.intp)
    return np.bincount(keys, minlength=HISTOGRAM_BINS)


def extrema(x: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
    """Smallest and largest value of each row of (G, L), any L, and whether a zero is among them."""
    return x.min(axis=1), x.max(axis=1), (x == 0).any(axis=1)


# --- searching a scale ----------------------------------------------------------------------------


def _fold(lanes: NDArray[Any]) -> Any:
    """Add 16 partial sums (16, ...) in pairs: i with i+8, i+4, i+2, i+1."""
    for half in (8, 4, 2, 1):
        lanes = lanes[:half] + lanes[half : 2 * half]
    return lanes[0]


def column_sums(columns: F32) -> F32:
    """Sums over the first axis of (L, G), in the order of section 6."""
    length = len(columns)
    lanes = np.zeros((LANES, columns.shape[1]), np.float32)
    for start in range(0, length, LANES):
        part = columns[start : start + LANES]
        lanes[: len(part)] += part
    return np.asarray(_fold(lanes))


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


# --- codes ----------------------------------------------------------------------------------------


@np.errstate(over="ignore")  # a quotient beyond binary32 is clipped like any other
def encode(x: F32, scale: F32, zero: I32, bits: int, symmetric: bool) -> tuple[U8, int]:
    """Codes of (G, L) values and how many values were clipped, section 2.

    Args:
        scale: (G,) as stored; 0 only where the group is all zeros.
        zero: (G,) zero steps; ignored when symmetric.

    Returns:
        Unsigned codes (G, L), and the number of values whose rounded quotient lay outside the
        codes.
    """
    divisor = np.where(scale == 0, np.float32(1), scale)[:, None]
    u = x / divisor
    top = (1 << bits) - 1
    if symmetric:
        centre = 1 << (bits - 1)
        low = 1 if bits == 8 else 0
        np.rint(u, out=u)
        u += np.float32(centre)
    else:
        low = 0
        u += _real_zero(zero, bits)[:, None]
        np.rint(u, out=u)
    clipped = int(np.count_nonzero((u < low) | (u > top)))
    np.clip(u, low, top, out=u)
    return u.astype(np.uint8), clipped


@np.errstate(over="ignore", invalid="ignore")  # a scale near the end of the range may overflow
def decode(codes: U8, scale: F32, zero: I32, bits: int, symmetric: bool) -> F32:
    """Values of (G, L) codes, section 2."""
    if symmetric:
        k = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    else:
        k = codes.astype(np.float32) - _real_zero(zero, bits)[:, None]
    k *= scale[:, None]
    return k


def zero_steps(bits: int) -> int:
    """Zero steps to a code, section 3."""
    return 1 if bits == 8 else 4


def _real_zero(zero: I32, bits: int) -> F32:
    return (zero / zero_steps(bits)).astype(np.float32)


@np.errstate(over="ignore", invalid="ignore")  # where a value was decoded to infinity
def error_sums(x: F32, decoded: F32) -> tuple[float, float, float]:
    """Σx², Σ(x - x')² and max |x - x'| of two arrays of one shape: differences in float32, sums in
    float64.
    """
    wide = x.astype(np.float64).ravel()
    error = (x - decoded).astype(np.float64).ravel()
    worst = float(np.abs(error).max(initial=0.0))
    return lane_sum(wide * wide), lane_sum(error * error), worst


@np.errstate(over="ignore", invalid="ignore")  # where a value was decoded to infinity
def weighted_error_sums(x: F32, decoded: F32, weights: F32) -> tuple[float, float]:
    """Σwx² and Σw(x - x')² of rows (R, c), as in `error_sums`; row r has the weights r mod P of
    (P, c).
    """
    wide = x.astype(np.float64)
    error = (x - decoded).astype(np.float64)
    w = weights[np.arange(len(x)) % len(weights)].astype(np.float64)
    return lane_sum((w * (wide * wide)).ravel()), lane_sum((w * (error * error)).ravel())


@np.errstate(over="ignore", invalid="ignore")  # where a scale or a decoded value is not finite
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
    """Largest |weight - value| in steps over the weights (R, C) that were not clipped, less what
    the rounding of scales and offsets and binary32 quotients may have added.

    Args:
        values: what they were decoded to, (R, C).
        group: columns of a group; the last of a row may be shorter.
        scale: of a step in each group, (R, G).
        offset: added to the values of each group, (R, G), or None.
        zero: zero point of each group, (R, G), in units that are ``code_step`` to a code.
        low, high: smallest and largest code, in those units.
        scale_rounding, offset_rounding: by how much scale and offset of each group may have been
            rounded, relative to them, after the codes were made, (R, G); None for not at all.

    Returns:
        The largest error, and whether a weight that is not 0 has a scale of 0; such groups have no
        step.
    """

    def by_column(of_groups: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(of_groups, min(group, columns), axis=1)[:, :columns]

    columns = weights.shape[1]
    # A quarter of a denormal scale is a number in binary64.
    unit = by_column(scale.astype(np.float64) / code_step)
    none = np.zeros_like(scale)
    start = by_column(none if offset is None else offset).astype(np.float64)
    of_scale = by_column(none if scale_rounding is None else scale_rounding).astype(np.float64)
    of_offset = by_column(none if offset_rounding is None else offset_rounding).astype(np.float64)
    w = weights.astype(np.float64)
    step = np.abs(unit) * code_step
    place = np.divide(w - start, unit, out=np.zeros_like(w), where=unit != 0) + by_column(zero)
    inside = (place >= low - code_step / 2) & (place <= high + code_step / 2) & (unit != 0)
    # The scale that made a code was s(1 ± r): half of its step, and the code times what is missing.
    rounding = (np.abs(values - start) + step / 2) * of_scale + np.abs(start) * of_offset
    error = np.abs(w - values) - ((np.abs(w) + np.abs(start)) * QUOTIENT + rounding + 2.0**-149)
    steps = np.divide(np.maximum(error, 0), step, out=np.zeros_like(w), where=inside)
    return float(steps.max(initial=0.0)), bool(((unit == 0) & (w != 0)).any())


# --- packing --------------------------------------------------------------------------------------


def planes(width: int) -> tuple[int, ...]:
    """Bits of each plane of a packed group, section 4: powers of two, the largest first."""
    return tuple(p for p in (8, 4, 2, 1) if width & p)


def pack(values: U8, width: int) -> U8:
    """Pack values of ``width`` bits; their number must be a multiple of 32."""
    groups = values.reshape(-1, 32)
    out = []
    for p in planes(width):
        count = 4 * p  # bytes of this plane
        part = (groups & ((1 << p) - 1)).reshape(-1, 8 // p, count)
        plane = part[:, 0].copy()
        for k in range(1, 8 // p):
            plane |= part[:, k] << (p * k)
        out.append(plane)
        groups = np.right_shift(groups, p, dtype=np.uint8)
    return np.concatenate(out, axis=1).ravel()


def unpack(packed: U8, width: int) -> U8:
    """The inverse of `pack`."""
    groups = packed.reshape(-1, 4 * width)
    values = np.zeros((len(groups), 32), np.uint8)
    start = low = 0
    for p in planes(width):
        plane = groups[:, start : start + 4 * p]
        part = np.concatenate([plane >> (p * k) for k in range(8 // p)], axis=1)
        values |= (part & ((1 << p) - 1)) << low
        start += 4 * p
        low += p
    return values.ravel()


# --- integer matrix product -----------------------------------------------------------------------


def integer_product(codes: NDArray[np.int16], activations: NDArray[np.int8]) -> I32:
    """Σ code · a over the columns of one group: (R, L) and (M, L) to (M, R), int32, exact."""
    return activations.astype(np.int32) @ codes.astype(np.int32).T
