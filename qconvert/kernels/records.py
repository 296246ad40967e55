"""What kernels take and find besides arrays: plain records, the same for either set of kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I8 = NDArray[np.int8]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Bytes = bytes | memoryview

PowerSums = tuple[float, float, float, float]


# --- what is seen of values -----------------------------------------------------------------------


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


def merge_moments(a: Moments | None, b: Moments | None) -> Moments | None:
    """Pairwise update of central moments: Pébay, SAND2008-6212, equations 2.1 and 3.1."""
    if a is None or b is None:
        return b if a is None else a
    n = a.count + b.count
    d = b.mean - a.mean
    dn = d / n
    ab = a.count * b.count
    return Moments(
        count=n,
        minimum=min(a.minimum, b.minimum),
        maximum=max(a.maximum, b.maximum),
        mean=a.mean + b.count * dn,
        m2=a.m2 + b.m2 + d * dn * ab,
        m3=a.m3
        + b.m3
        + d * dn * dn * ab * (a.count - b.count)
        + 3 * dn * (a.count * b.m2 - b.count * a.m2),
        m4=a.m4
        + b.m4
        + d * dn * dn * dn * ab * (a.count * a.count - ab + b.count * b.count)
        + 6 * dn * dn * (a.count * a.count * b.m2 + b.count * b.count * a.m2)
        + 4 * dn * (a.count * b.m3 - b.count * a.m3),
    )


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


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Ranges of the groups (blocks or rows) that would share a scale.

    Attributes:
        symmetric_power: Σ over groups of the squared step that a symmetric grid needs, in units of
            the value.
        asymmetric_power: the same for an asymmetric grid.
        smallest, largest: smallest and largest magnitude of a group that is not all zeros; inf and
            0 if none.
    """

    symmetric_power: float
    asymmetric_power: float
    smallest: float
    largest: float

    def __add__(self, other: GroupStatistics) -> GroupStatistics:
        return GroupStatistics(
            self.symmetric_power + other.symmetric_power,
            self.asymmetric_power + other.asymmetric_power,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )

    @property
    def step_ratio_db(self) -> float:
        """How much finer the asymmetric grid is, in dB of noise: 10 log10 of the ratio of
        powers.
        """
        if self.asymmetric_power <= 0:
            return 0.0
        return 10 * math.log10(self.symmetric_power / self.asymmetric_power)


EMPTY_GROUPS = GroupStatistics(0.0, 0.0, math.inf, 0.0)


# --- parameters of groups -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """The range of each group, 0 included: float32 (G,) each.

    Attributes:
        low, high: low <= 0 <= high.
        has_zero: whether a value of the group is exactly 0, which must stay 0.
    """

    low: F32
    high: F32
    has_zero: Bools

    @property
    def magnitude(self) -> F32:
        return np.maximum(-self.low, self.high) + np.float32(0)  # never -0: a scale comes of it

    def part(self, span: slice) -> Extent:
        """Of some groups."""
        return Extent(self.low[span], self.high[span], self.has_zero[span])


@dataclass(frozen=True, slots=True)
class Parameters:
    """Scale and zero point of each group, as stored.

    Attributes:
        scale: float32 (G,), already rounded to the scale dtype.
        zero: int32 (G,), zero steps (quarters of a code below 8 bits); zeros when symmetric.
    """

    scale: F32
    zero: I32


# --- what becomes of values -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """What quantization did to a run of values: sums that add up over a tensor."""

    count: int = 0
    signal: float = 0.0  # Σx²
    noise: float = 0.0  # Σ(x - x')²
    worst: float = 0.0  # max |x - x'|
    clipped: int = 0
    weighted_signal: float = 0.0  # Σwx², 0 without weights
    weighted_noise: float = 0.0  # Σw(x - x')²

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.count + other.count,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.worst, other.worst),
            self.clipped + other.clipped,
            self.weighted_signal + other.weighted_signal,
            self.weighted_noise + other.weighted_noise,
        )

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(Σx² / Σ(x - x')²) in dB; None when nothing was lost."""
        return _decibels(self.signal, self.noise)

    @property
    def weighted_sqnr_db(self) -> float | None:
        """The same with weights: SQNR of the layer's output; None without weights too."""
        return _decibels(self.weighted_signal, self.weighted_noise)

    @property
    def nmse(self) -> float:
        """Σ(x - x')² / Σx²; infinite when zeros did not stay zeros."""
        if self.signal == 0:
            return float("inf") if self.noise else 0.0
        return self.noise / self.signal


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    if signal == 0:
        return float("-inf")
    return float(10 * (np.log10(signal) - np.log10(noise)))


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tile as it is stored, and what was seen on the way; the seen adds up in order.

    Attributes:
        segments: bytes by the kind of segment. Values of a segment that is packed over the whole
            tensor are a byte each, and not packed yet.
        error: against the values given.
        moments: of the values, where a decision rests on them.
        groups: ranges of the groups, likewise.
        outside: values outside the outlier bounds, likewise.
        nonfinite: NaN and Inf values, where such are kept.
    """

    segments: dict[str, Bytes] = field(default_factory=dict)
    error: ErrorSums = ErrorSums()
    moments: Moments | None = None
    groups: GroupStatistics = EMPTY_GROUPS
    outside: int = 0
    nonfinite: int = 0

    def __add__(self, other: Encoded) -> Encoded:
        """What was seen in this tile and then in ``other``; the bytes are dropped."""
        return Encoded(
            {},
            self.error + other.error,
            merge_moments(self.moments, other.moments),
            self.groups + other.groups,
            self.outside + other.outside,
            self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """ggml blocks as integers: value = scale · code + offset, up to the rounding of these two
    steps.

    Attributes:
        codes: int16 (k, block).
        scale: float32 (k, groups), one for each group of a block's values.
        offset: float32 (k, groups), or None where the type has none.
    """

    codes: NDArray[np.int16]
    scale: F32
    offset: F32 | None


# --- rows and their weights -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceRows:
    """A run of whole rows of a tensor as it lies in its file, or of columns of one row.

    Attributes:
        data: values of ``dtype``, little-endian, row by row.
        dtype: a name of `qconvert.model.DTYPES`.
        shape: (R, c).
    """

    data: bytes | F32
    dtype: str
    shape: tuple[int, int]

    @classmethod
    def of(cls, x: F32) -> SourceRows:
        """Rows (R, c) that are numbers already."""
        return cls(np.ascontiguousarray(x, "<f4"), "F32", (x.shape[0], x.shape[1]))

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class Weighting:
    """Weights of rows (R, c); row r has weights p = r mod P, group g has weights g mod Q.

    Attributes:
        mean_square: of the input channels, (P, c), finite and not negative: what errors are
            measured with.
        weight: of the values of each group, (Q, L), 2^-16 to 1, 0 for padding: what the search has.
        reach: what a value counts for in the range that is searched, (Q, L), at most 1.
    """

    mean_square: F32
    weight: F32
    reach: F32

    def columns(self, start: int, count: int) -> Weighting:
        """Of a run of columns, where a row is one group or part of one."""
        part = np.s_[:, start : start + count]
        return Weighting(self.mean_square[part], self.weight[part], self.reach[part])

    def blocks(self, start: int, count: int, block: int) -> Weighting:
        """Of a run of columns of one row, from the first of a block on."""
        groups = np.s_[start // block : -(-(start + count) // block)]
        mean_square = self.mean_square[:, start : start + count]
        return Weighting(mean_square, self.weight[groups], self.reach[groups])

    def repeated(self, rows: int) -> Weighting:
        """Of ``rows`` rows in one: for a scale that they share."""
        return Weighting(*(np.tile(a, rows) for a in (self.mean_square, self.weight, self.reach)))

    def groups(self, first: int, count: int) -> tuple[F32, F32]:
        """``weight`` and ``reach`` of groups one by one, (count, L) each."""
        rows = np.arange(first, first + count) % len(self.weight)
        return self.weight[rows], self.reach[rows]


# --- compensated rounding -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Multiples:
    """Numbers that are stored as whole multiples of a unit, of each group.

    Attributes:
        unit: (R, G).
        low, high: the smallest and the largest multiple that there are.
    """

    unit: NDArray[Any]
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class CodeGrid:
    """What the codes of some rows stand for: value = (levels[code] - zero) · scale + offset.

    Attributes:
        levels: (K,), ascending, K at most 256; codes are places in it.
        scale, zero, offset: of each group, (R, G); a scale may be negative, and 0.
        length: columns of a group; the last may be shorter.
        scales, offsets: what else they may be; None where they stay, or a scale has a dtype of its
            own.
    """

    levels: NDArray[Any]
    scale: NDArray[Any]
    zero: NDArray[Any]
    offset: NDArray[Any]
    length: int
    scales: Multiples | None = None
    offsets: Multiples | None = None


@dataclass(frozen=True, slots=True)
class Factors:
    """What errors of weights cost the output of their layer.

    Attributes:
        order: the columns in the order in which they are rounded, (C,).
        gram: H, (C, C), symmetric and damped: an error e of a row costs e H eᵀ.
        feedback: U - I of H = U D Uᵀ with U unit upper triangular, both in ``order``, (C, C): by
            how much the target of a column moves for the error of each column before it.
    """

    order: NDArray[np.intp]
    gram: NDArray[Any]
    feedback: NDArray[Any]


# --- integer matrix products ----------------------------------------------------------------------

SEGMENT = 16_384  # columns that int32 can take at any width: 255 · 255 · 16,384 < 2^30


@dataclass(frozen=True, slots=True)
class Activations:
    """Inputs as signed bytes: value = (codes - zero_point) · scale.

    Attributes:
        codes: int8 (M, c).
        scale: float32 (M,).
        zero_point: -128..127; one for all rows, or int32 (M,).
    """

    codes: NDArray[np.int8]
    scale: F32
    zero_point: int | I32

    @property
    def zero_points(self) -> I32:
        """The zero point of each row, int32 (M, 1)."""
        shape = (len(self.codes), 1)
        return np.broadcast_to(np.asarray(self.zero_point, np.int32).reshape(-1, 1), shape)

    @property
    def values(self) -> F64:
        """What the codes stand for, float64 (M, c)."""
        return (self.codes.astype(np.float64) - self.zero_points) * self.scale[:, None]


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """Weight rows in integer units: value = (code - zero) · scale + offset.

    Attributes:
        codes: int16 (R, c), within -255..255, or -4064..4064 in groups of `LEVEL_SPAN`.
        zero: int32 (R, G).
        scale: float32 (R, G).
        offset: float32 (R, G) or None; the float minimum that some ggml types have.
        group: columns of a group; the last may be shorter.
    """

    codes: NDArray[np.int16]
    zero: NDArray[np.int32]
    scale: F32
    offset: F32 | None
    group: int

    def spans(self) -> list[tuple[int, slice]]:
        """Index of the group and its columns; groups beyond 16,384 columns come in segments."""
        columns = self.codes.shape[1]
        step = min(self.group, SEGMENT)
        return [
            (start // self.group, slice(start, min(start + step, columns)))
            for start in range(0, columns, step)
        ]

    def offset_magnitude(self, a: Activations) -> F64 | float:
        """Σ|offset · input| per output (M, R): its rounding adds to that of the products."""
        if self.offset is None:
            return 0.0
        total = np.zeros((len(a.codes), len(self.codes)))
        for group, span in self.spans():
            inputs = np.abs(a.values[:, span]).sum(axis=1)[:, None]
            total += inputs * np.abs(self.offset[:, group])
        return total


SHIFT_BITS = {0: 0, 4: 1, 8: 4}  # of the blocks of levels, by their shift
LEVEL_SPAN = 2_048  # columns that int32 can take at 32 · 127 · 255 each: below 2^31


@dataclass(frozen=True, slots=True)
class LevelCode:
    """Codes of integer levels with signed steps, formats/schemes/SPEC.md section 11.

    Attributes:
        bits: of a code, 2 to 6.
        block: values of a row that share a step, 16 or 32.
        step_bits: of a step; those of 5 bits or more have a sign.
        shift: what may be added to the levels of a block, as often as `shift_bits` say; 0 for
            nothing.
        levels: of each code, ascending.
    """

    bits: int
    block: int
    step_bits: int
    shift: int
    levels: tuple[int, ...]

    @property
    def table(self) -> I8:
        """The levels, int8 (2^bits,)."""
        return np.array(self.levels, np.int8)

    @property
    def shift_bits(self) -> int:
        """Bits of a block that say how often the shift is added."""
        return SHIFT_BITS[self.shift]

    @property
    def shifts(self) -> range:
        """What may be added to the levels of a block."""
        return range(0, (self.shift << self.shift_bits) or 1, self.shift or 1)

    @property
    def steps(self) -> tuple[int, int]:
        """The lowest and the highest step."""
        low = -(1 << (self.step_bits - 1)) if self.step_bits >= 5 else 0
        return low, low + (1 << self.step_bits) - 1

    def blocks(self, columns: int) -> int:
        """Blocks of a row."""
        return -(-columns // self.block)


@dataclass(frozen=True, slots=True)
class LevelSteps:
    """What scales the levels of rows: value = unit · step · (level + shift).

    Attributes:
        unit: float32 (R,), d · 2^-(step_bits + 6).
        steps, shifts: of each block, int8 (R, G).
    """

    unit: F32
    steps: I8
    shifts: I8

    @property
    def scale(self) -> F32:
        """Of each block, float32 (R, G), exact."""
        found: F32 = self.unit[:, None] * self.steps.astype(np.float32)
        return found


@dataclass(frozen=True, slots=True)
class Product:
    """Result of the integer path.

    Attributes:
        y: float32 (M, R).
        exact: whether every int32 accumulator equals the int64 one; None when that was not asked
            for.
    """

    y: F32
    exact: bool | None
