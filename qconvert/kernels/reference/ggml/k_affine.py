"""The search for d, m, a and b of the K-quants whose values are d a u - m b: Q2_K, Q4_K, Q5_K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.reference.ggml.k_columns import (
    F32,
    SINGULAR,
    SUPER,
    Found,
    clipped,
    columns,
    divisor,
    down,
    down_max,
    halves,
    inverse,
    normalised,
    over_blocks,
    weights,
)

Sums = tuple[F32, F32, F32]  # Σu, Σu² and Σxu of each column, weighted


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
        self.inverse_n = 1 / self.n
        zeros = np.zeros_like(self.low)
        self.gain = np.full_like(self.low, -np.inf)
        self.a, self.b, self.su, self.suu, self.syu = (zeros.copy() for _ in range(5))

    def sums(self, steps: F32, shift: F32) -> Sums:
        u = clipped(self.y * steps + shift, 0, self.kind.top)
        wu = self.w * u
        return down(wu), down(wu * u), down(wu * self.y)

    def fit(self, su: F32, suu: F32, syu: F32) -> tuple[F32, F32, NDArray[np.bool_]]:
        """Least squares for given codes: scale, offset from ``low``, and whether they serve."""
        det = self.n * suu - su * su
        singular = ~(det > SINGULAR * (self.n * suu))  # as when all codes are the same
        beyond = self.sign * (self.low * det + (suu * self.sy - su * syu)) > 0
        through = singular | beyond  # 0: an offset of 0, which is on either side
        along: F32 = np.where(through, syu + self.low * su, self.n * syu - su * self.sy)
        s = along / divisor(np.where(through, suu, det), ~through | (suu > 0))
        o: F32 = np.where(through, -self.low, (self.sy - s * su) * self.inverse_n)
        return s, o, s > 0

    def gain_of(self, s: F32, o: F32, su: F32, suu: F32, syu: F32) -> F32:
        """How much less than Syy the squared error is."""
        gain: F32 = s * (2 * (syu - o * su) - s * suu) + o * (2 * self.sy - o * self.n)
        return gain

    def guess(self) -> tuple[F32, F32]:
        """The best scale and offset, of any size, of the codes of all trial grids."""
        per = inverse(self.span) * np.float32(self.kind.top)
        scale, offset, best = (np.zeros_like(self.low) for _ in range(3))
        for factor, shift in self.kind.trials():
            su, suu, syu = self.sums(per * np.float32(factor), np.full_like(per, shift))
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
        self._keep(np.ones_like(a, np.bool_), a, b, s, o, sums)
        s, o, usable = self.fit(*sums)
        a = clipped(s * inverse(d), 0, most)
        s = a * d
        o = (self.sy - s * sums[0]) * self.inverse_n
        b = clipped(-(self.sign * (self.low + o)) * inverse(m), 0, most)
        self._keep(usable, a, b, s, -(self.sign * (b * m)) - self.low, sums)

    def _keep(self, usable: NDArray[np.bool_], a: F32, b: F32, s: F32, o: F32, sums: Sums) -> None:
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
        safe = divisor(det, both)
        alone = e / divisor(p, p > 0)
        return (
            np.where(both, (e * r - q * f) / safe, alone),
            np.where(both, (p * f - q * e) / safe, np.float32(0)),
        )

    def loss(self, d: F32, m: F32, dd: F32, dm: F32) -> F32:
        """How much the squared error of a super-block grows by changes of d and m."""
        p, q, r, e, f = self._normal(d, m)
        loss: F32 = dd * (dd * p - 2 * e) + dm * (dm * r - 2 * f) + 2 * (dd * dm * q)
        return loss

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
    minimum = np.maximum(-(found.sign * (found.low + offset)), np.float32(0)) + 0  # no -0
    most = np.float32(kind.most)
    d_half, d = halves(down_max(scale, sub_blocks) / most, power, upwards=True)
    m_half, m = halves(down_max(minimum, sub_blocks) / most, power, upwards=True)
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
