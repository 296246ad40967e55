"""The search for the scales of ggml's K-quants, in NumPy: formats/schemes/SPEC.md section 8.

A super-block of 256 values has 8 or 16 sub-blocks, each with an integer scale (and minimum) in
units that are common to the super-block. Sub-blocks lie side by side as the columns of (length, n)
arrays; sums go down the columns, value by value. All arithmetic is binary32, in the order written.

The error of codes u under value = s u + o is Sxx - gain, and the gain needs three sums over the
values alone: of one set of codes, the gain of any number of scales and offsets is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]

SUPER = 256
TINY = np.float32(2.0**-100)  # smaller numbers count as 0: their inverses overflow
FLOOR = np.float32(2.0**-30)  # the least weight, relative to the largest of a super-block
SINGULAR = np.float32(2.0**-20)  # relative determinant below which a fit means nothing


@dataclass(frozen=True, slots=True)
class Affine:
    """A type whose values are d a u - m b: what its codes and integers are, what is tried."""

    length: int  # values of a sub-block
    top: int  # codes u are 0 .. top
    most: int  # integer scales a and minima b are 0 .. most
    factors: tuple[float, ...]  # trial grids: extent of the values over their width,
    shift: float  # and how many steps off the middle, or none, or as many the other way

    def trials(self) -> list[tuple[float, float]]:
        """Trial grids as the factor and the offset that take the values' extent to codes."""
        middle, shifts = self.top / 2, (-self.shift, 0, self.shift)
        return [(k, middle - (middle + shift) * k) for k in self.factors for shift in shifts]


@dataclass(frozen=True, slots=True)
class Symmetric:
    """A type whose values are d a u."""

    length: int
    half: int  # codes u are -half .. half - 1
    most: int  # integer scales a are -most - 1 .. most
    headroom: float  # of d over the least that holds the first guesses
    trials: tuple[float, ...]  # scales over the first guess
    nearby: tuple[int, ...]  # steps from the best a that are tried after d is fitted


@dataclass(frozen=True, slots=True)
class Found:
    """What a search leaves: units as stored, (k,), integers, (k, sub-blocks), codes, (k, 256)."""

    d: F16
    a: F32
    codes: F32
    m: F16 | None = None
    b: F32 | None = None


def columns(blocks: F32, length: int) -> F32:
    """Super-blocks (k, 256) as (length, k · 256 / length) columns."""
    return np.ascontiguousarray(blocks.reshape(-1, length).T)


def normalised(blocks: F32) -> tuple[F32, F32]:
    """Blocks times a power of two, (k, 256), and that power, (k,), so that the largest magnitude
    is in [1, 2), or in [1, 4) near the end of binary32; 0 for a block below `TINY`.
    """
    largest = np.abs(blocks).max(axis=1)
    exponent = largest.view(np.int32) >> 23
    power = (np.maximum(254 - exponent, 1) << 23).view(np.float32)
    power = np.where(largest < TINY, np.float32(0), power)
    return blocks * power[:, None] + np.float32(0), power  # + 0: no -0


def weights(importance: F32 | None, count: int) -> F32:
    """Importance of ``count`` super-blocks, (count, 256), at most 1, at least `FLOOR`."""
    if importance is None:
        return np.ones((count, SUPER), np.float32)
    rows = importance * inverse(importance.max(axis=1))[:, None]
    return np.maximum(rows, FLOOR)[np.arange(count) % len(rows)]


def inverse(x: F32) -> F32:
    """1 / x, and 0 for magnitudes below `TINY`."""
    usable = np.abs(x) >= TINY
    return np.where(usable, np.float32(1) / np.where(usable, x, np.float32(1)), np.float32(0))


def down(x: F32) -> F32:
    """Sums of the columns of (length, n), from the first row to the last."""
    total = x[0].copy()
    for row in x[1:]:
        total += row
    return total


def over_blocks(x: F32, sub_blocks: int) -> F32:
    """Sums over the sub-blocks of each super-block, from first to last: (n,) to (k,)."""
    return down(np.ascontiguousarray(x.reshape(-1, sub_blocks).T))


def clipped(x: F32, low: int, high: int) -> F32:
    """rint, then into [low, high]."""
    return np.clip(np.rint(x), np.float32(low), np.float32(high))


def halves(unit: F32, power: F32, upwards: bool) -> tuple[F16, F32]:
    """A positive unit of normalised super-blocks as float16 of the true size, and what that
    float16 is in normalised terms; the unit itself where float16 cannot hold it.

    Upwards: never smaller than the unit, so that no integer scale leaves its range.
    """
    true = np.where(power == 0, np.float32(0), unit / np.where(power == 0, np.float32(1), power))
    half = true.astype("<f2")
    if upwards:
        half = (half.view("<u2") + (half.astype(np.float32) < true)).astype("<u2").view("<f2")
    back = half.astype(np.float32) * power
    return half, np.where(np.isfinite(back), back, unit)


def down_max(x: F32, sub_blocks: int) -> F32:
    """Largest number of each super-block, (k,), of one for each sub-block, (n,)."""
    largest: F32 = x.reshape(-1, sub_blocks).max(axis=1)
    return largest


# --- affine ---------------------------------------------------------------------------------------


class _AffineColumns:
    """The values of all sub-blocks as columns, and the best codes found for each."""

    def __init__(self, kind: Affine, x: F32, w: F32) -> None:
        sub_blocks = SUPER // kind.length
        self.kind, self.w = kind, w
        lowest = x.min(axis=0)
        # All values of a super-block above 0: its offsets are positive, else none is.
        positive = lowest.reshape(-1, sub_blocks).min(axis=1) > 0
        self.sign = np.repeat(np.where(positive, np.float32(-1), np.float32(1)), sub_blocks)
        self.low = np.where(self.sign > 0, np.minimum(lowest, np.float32(0)), lowest)
        self.span = x.max(axis=0) - self.low
        self.y = x - self.low
        self.n, self.sy = down(w), down(w * self.y)
        zeros = np.zeros_like(self.low)
        self.gain = np.full_like(self.low, -np.inf)
        self.a, self.b, self.su, self.suu, self.syu = (zeros.copy() for _ in range(5))

    def sums(self, steps: F32, shift: F32) -> tuple[F32, F32, F32]:
        u = clipped(self.y * steps + shift, 0, self.kind.top)
        wu = self.w * u
        return down(wu), down(wu * u), down(wu * self.y)

    def fit(self, su: F32, suu: F32, syu: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
        """Least squares for given codes: scale, offset from ``low``, and whether they serve."""
        det = self.n * suu - su * su
        usable = det > SINGULAR * (self.n * suu)
        s = (self.n * syu - su * self.sy) / np.where(usable, det, np.float32(1))
        o = (self.sy - s * su) / self.n
        beyond = self.sign * (self.low + o) > 0
        through = (syu + self.low * su) / np.where(suu > 0, suu, np.float32(1))
        s, o = np.where(beyond, through, s), np.where(beyond, -self.low, o)
        return s, o, usable & (s > 0)

    def gain_of(self, s: F32, o: F32, su: F32, suu: F32, syu: F32) -> F32:
        """How much less than Syy the squared error is."""
        return s * (2 * (syu - o * su) - s * suu) + o * (2 * self.sy - o * self.n)

    def guess(self) -> tuple[F32, F32]:
        """The best scale and offset, of any size, of the codes of all trial grids."""
        per = inverse(self.span) * np.float32(self.kind.top)
        scale, offset, best = (np.zeros_like(self.low) for _ in range(3))
        for factor, shift in self.kind.trials():
            su, suu, syu = self.sums(per * np.float32(factor), np.float32(shift))
            s, o, usable = self.fit(su, suu, syu)
            gain = self.gain_of(s, o, su, suu, syu)
            better = usable & (gain > best)
            scale, offset = np.where(better, s, scale), np.where(better, o, offset)
            best = np.where(better, gain, best)
        return scale, offset

    def offer(self, a: F32, b: F32, d: F32, m: F32) -> None:
        """Tries the codes that integers a, b give, with these and with the best for the codes."""
        most = self.kind.most
        s, o = a * d, -(self.sign * (b * m)) - self.low
        steps = inverse(s)
        sums = self.sums(steps, -(o * steps))
        self._keep(np.bool_(True), a, b, s, o, sums)
        s, o, usable = self.fit(*sums)
        a = clipped(s * inverse(d), 0, most)
        s = a * d
        o = (self.sy - s * sums[0]) / self.n
        b = clipped(-(self.sign * (self.low + o)) * inverse(m), 0, most)
        self._keep(usable, a, b, s, -(self.sign * (b * m)) - self.low, sums)

    def _keep(
        self, usable: Any, a: F32, b: F32, s: F32, o: F32, sums: tuple[F32, F32, F32]
    ) -> None:
        gain = self.gain_of(s, o, *sums)
        better = usable & (gain > self.gain)
        self.gain = np.where(better, gain, self.gain)
        self.a, self.b = np.where(better, a, self.a), np.where(better, b, self.b)
        self.su, self.suu, self.syu = (
            np.where(better, new, old)
            for new, old in zip(sums, (self.su, self.suu, self.syu), strict=True)
        )

    def refitted(self, d: F32, m: F32) -> tuple[F32, F32]:
        """Changes of d and m, (k,), that suit the codes and integers best."""
        p, q, r, e, f = self._normal(d, m)
        det = p * r - q * q
        both = det > SINGULAR * (p * r)
        safe = np.where(both, det, np.float32(1))
        alone = e / np.where(p > 0, p, np.float32(1))
        return (
            np.where(both, (e * r - q * f) / safe, alone),
            np.where(both, (p * f - q * e) / safe, np.float32(0)),
        )

    def loss(self, d: F32, m: F32, dd: F32, dm: F32) -> F32:
        """Squared error that a super-block gains by changes of d and m."""
        p, q, r, e, f = self._normal(d, m)
        return dd * (dd * p - 2 * e) + dm * (dm * r - 2 * f) + 2 * (dd * dm * q)

    def _normal(self, d: F32, m: F32) -> tuple[F32, F32, F32, F32, F32]:
        """Normal equations of a super-block's changes of d and m."""
        sub_blocks = SUPER // self.kind.length
        d, m = np.repeat(d, sub_blocks), np.repeat(m, sub_blocks)
        b = -(self.sign * self.b)
        s, o = self.a * d, b * m - self.low
        along = self.syu - s * self.suu - o * self.su
        rest = self.sy - s * self.su - o * self.n
        terms = (
            *(self.a * (self.a * self.suu), self.a * (b * self.su), b * (b * self.n)),
            *(self.a * along, b * rest),
        )
        p, q, r, e, f = (over_blocks(term, sub_blocks) for term in terms)
        return p, q, r, e, f


def search_affine(kind: Affine, blocks: F32, importance: F32 | None) -> Found:
    """Units, integers and codes of super-blocks, (k, 256)."""
    sub_blocks = SUPER // kind.length
    x, power = normalised(blocks)
    w = weights(importance, len(blocks))
    found = _AffineColumns(kind, columns(x, kind.length), columns(w, kind.length))
    scale, offset = found.guess()
    minimum = -(found.sign * (found.low + offset))
    most = np.float32(kind.most)
    d_half, d = halves(down_max(scale, sub_blocks) / most, power, upwards=True)
    m_half, m = halves(
        np.maximum(down_max(minimum, sub_blocks), np.float32(0)) / most + 0, power, upwards=True
    )
    wide_d, wide_m = np.repeat(d, sub_blocks), np.repeat(m, sub_blocks)
    found.offer(
        clipped(scale * inverse(wide_d), 0, kind.most),
        clipped(minimum * inverse(wide_m), 0, kind.most),
        wide_d,
        wide_m,
    )
    a, b = found.a, found.b
    tilt = found.sign * (wide_d * np.float32(kind.top / 2) * inverse(wide_m))
    for step in (1, -1):  # the middle code's value stays
        found.offer(
            np.clip(a + step, np.float32(0), most),
            clipped(b + np.float32(step) * tilt, 0, kind.most),
            wide_d,
            wide_m,
        )
    for step in (1, -1):
        found.offer(a, np.clip(b + step, np.float32(0), most), wide_d, wide_m)
    dd, dm = found.refitted(d, m)
    new_d_half, new_d = halves(np.maximum(d + dd, np.float32(0)), power, upwards=False)
    new_m_half, new_m = halves(np.maximum(m + dm, np.float32(0)), power, upwards=False)
    better = found.loss(d, m, new_d - d, new_m - m) < 0
    d, m = np.where(better, new_d, d), np.where(better, new_m, m)
    a, b = found.a.reshape(-1, sub_blocks), found.b.reshape(-1, sub_blocks)
    s = np.repeat(a * d[:, None], kind.length, axis=1)
    offsets = found.sign.reshape(-1, sub_blocks) * (b * m[:, None])
    codes = clipped((x + np.repeat(offsets, kind.length, axis=1)) * inverse(s), 0, kind.top)
    sign = found.sign.reshape(-1, sub_blocks)[:, 0].astype(np.float16)
    return Found(
        d=np.where(better, new_d_half, d_half),
        a=a,
        codes=codes,
        m=np.where(better, new_m_half, m_half) * sign,
        b=b,
    )


# --- symmetric ------------------------------------------------------------------------------------


class _SymmetricColumns:
    """The values of all sub-blocks as columns, and the best codes found for each."""

    def __init__(self, kind: Symmetric, x: F32, w: F32) -> None:
        self.kind, self.x, self.w = kind, x, w
        lowest, highest = x.min(axis=0), x.max(axis=0)
        furthest = np.where(-lowest > highest, lowest, highest)
        self.unit = furthest * np.float32(-1 / kind.half)  # it gets the lowest code
        self.a, self.suu, self.sxu, self.gain = (np.zeros_like(lowest) for _ in range(4))

    def offer(self, a: F32, d: F32) -> None:
        """Tries the codes that an integer gives, with it and with the best for the codes."""
        kind = self.kind
        s = a * d
        u = clipped(self.x * inverse(s), -kind.half, kind.half - 1)
        wu = self.w * u
        suu, sxu = down(wu * u), down(wu * self.x)
        self._keep(a, s, suu, sxu)
        fitted = sxu / np.where(suu > 0, suu, np.float32(1))
        a = clipped(fitted * inverse(d), -kind.most - 1, kind.most)
        self._keep(a, a * d, suu, sxu)

    def _keep(self, a: F32, s: F32, suu: F32, sxu: F32) -> None:
        gain = s * (2 * sxu - s * suu)
        better = gain > self.gain
        self.gain, self.a = np.where(better, gain, self.gain), np.where(better, a, self.a)
        self.suu, self.sxu = np.where(better, suu, self.suu), np.where(better, sxu, self.sxu)

    def refitted(self, d: F32, half: F16, power: F32) -> tuple[F32, F16]:
        """d and its stored form, (k,), fitted to codes and integers, where that is better."""
        sub_blocks = SUPER // self.kind.length
        s = self.a * np.repeat(d, sub_blocks)
        p = over_blocks(self.a * (self.a * self.suu), sub_blocks)
        e = over_blocks(self.a * (self.sxu - s * self.suu), sub_blocks)
        new_half, new = halves(
            np.maximum(d + e / np.where(p > 0, p, np.float32(1)), np.float32(0)), power, False
        )
        change = new - d
        better = change * (change * p - 2 * e) < 0
        return np.where(better, new, d), np.where(better, new_half, half)


def search_symmetric(kind: Symmetric, blocks: F32, importance: F32 | None) -> Found:
    """Unit, integers and codes of super-blocks, (k, 256)."""
    sub_blocks = SUPER // kind.length
    x, power = normalised(blocks)
    w = weights(importance, len(blocks))
    found = _SymmetricColumns(kind, columns(x, kind.length), columns(w, kind.length))
    largest = down_max(np.abs(found.unit), sub_blocks)
    half, d = halves(largest * (np.float32(kind.headroom) / np.float32(kind.most)), power, upwards=True)
    wide = np.repeat(d, sub_blocks)
    for trial in kind.trials:
        a = clipped(found.unit * np.float32(trial) * inverse(wide), -kind.most - 1, kind.most)
        found.offer(a, wide)
    d, half = found.refitted(d, half, power)
    if kind.nearby:
        wide = np.repeat(d, sub_blocks)
        a, found.gain = found.a, np.zeros_like(found.gain)
        found.a = np.zeros_like(a)
        for step in kind.nearby:
            found.offer(np.clip(a + step, np.float32(-kind.most - 1), np.float32(kind.most)), wide)
        d, half = found.refitted(d, half, power)
    a = found.a.reshape(-1, sub_blocks)
    s = np.repeat(a * d[:, None], kind.length, axis=1)
    return Found(half, a, clipped(x * inverse(s), -kind.half, kind.half - 1))
