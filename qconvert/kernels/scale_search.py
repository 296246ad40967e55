"""The mse method: scale and zero point of least squared error, formats/schemes/SPEC.md section 5.

It judges candidates by sums over their codes; where these come from is the caller's: values at
hand (`reference`, `compiled`), or a stream of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import (
    minmax,
    nearest_zero_point,
    round_scale,
    zero_steps,
)
from qconvert.kernels.records import F32, F64, I32, Bools, Extent, Parameters
from qconvert.ranges import ZERO_MOVE, SearchGrid, search_grid

# Below, reciprocals overflow, and above, sums: such groups take their minmax range.
TINY = np.float32(2.0**-100)
HUGE = np.float32(2.0**110)

# Per candidate: inverse step and offset in, sums Σu, Σu², Σxu out (float64, (G,)).
Candidate = tuple[F32, F32]
Sums = tuple[F64, F64, F64]
Found = tuple[F64, I32, Bools]


@dataclass(frozen=True, slots=True)
class SumSource:
    """Where a search gets its sums from: values at hand, or a stream read once per call.

    With weights every sum has them: Σw, Σwx, Σwu, Σwu², Σwxu.

    Attributes:
        count: real values per group, (G,) float64.
        total: Σx per group, (G,) float64.
        sums: candidates to their sums, in order.
    """

    count: F64
    total: F64
    sums: Callable[[list[Candidate]], Iterator[Sums]]


def clamp(encoding: AffineEncoding) -> tuple[int, int]:
    """The smallest and the largest unsigned code that the search may choose."""
    low = 1 if encoding.symmetric and encoding.bits == 8 else 0
    return low, encoding.levels


class LongSums(Protocol):
    """`reference.long_sums`."""

    def __call__(
        self, x: F32, inverse: F32, offset: F32, low: int, top: int, weights: F32 | None = None
    ) -> F64: ...


def long_source(
    long_sums: LongSums, x: F32, encoding: AffineEncoding, weight: F32 | None
) -> SumSource:
    """Sums over groups (G, L) at hand, of any length; ``weight`` is that of each value."""
    low, top = clamp(encoding)

    def sums(candidates: list[Candidate], low: int = low, top: int = top) -> Iterator[Sums]:
        inverse, offset = (np.stack(part) for part in zip(*candidates, strict=True))
        for found in long_sums(x, inverse, offset, low, top, weight):
            yield found[:, 0], found[:, 1], found[:, 2]

    # Where every code is 1, the sums are the count (or Σw) and Σx (or Σwx).
    ones = np.zeros(len(x), np.float32), np.ones(len(x), np.float32)
    count, _, total = next(sums([ones], 1, 1))
    return SumSource(count, total, sums)


def best_scales(
    e: Extent, near: Extent | None, source: SumSource, encoding: AffineEncoding
) -> Found:
    """The search of groups.

    Args:
        e: their extent.
        near: the extent of the values that matter, with weights.

    Returns:
        Scales before rounding, zero steps (0 when symmetric), and whether a candidate was found,
        (G,) each.
    """
    best = _Best(e, source, encoding)
    grid = search_grid(encoding.bits, encoding.symmetric)

    def offer(candidates: list[Candidate]) -> None:
        for sums in source.sums(candidates):
            best.offer(sums)

    candidates = _candidates(e if near is None else _or_all(near, e), encoding, grid)
    if near is not None:
        candidates += _candidates(e, encoding, grid.first)[:1]
    offer(candidates)
    for change in grid.moves:
        if not encoding.symmetric:
            offer([best.beside(0, ZERO_MOVE), best.beside(0, -ZERO_MOVE)])
        offer([best.beside(change, 0), best.beside(-change, 0)])
    offer([best.beside(0, 0)])
    zero = np.zeros_like(best.zero) if encoding.symmetric else best.zero
    return best.scale, zero, best.gain > 0


def settled(e: Extent, encoding: AffineEncoding, found: Found) -> Parameters:
    """Round what the search found; the minmax range where it found nothing or could not search."""
    scale, zero, better = found
    plain = minmax(e, encoding)
    better = better & searchable(e)
    stored = round_scale(scale.astype(np.float32), encoding.scale_dtype, e.magnitude)
    zero = plain.zero if encoding.symmetric else np.where(better, zero, plain.zero)
    return Parameters(np.where(better, stored, plain.scale), zero)


def searchable(e: Extent) -> Bools:
    """Which groups are neither too small nor too large for the sums."""
    return (e.magnitude >= TINY) & (e.magnitude <= HUGE)


class _Best:
    """The best candidate of each group so far."""

    def __init__(self, e: Extent, source: SumSource, encoding: AffineEncoding) -> None:
        groups = len(e.low)
        self.encoding = encoding
        self.has_zero = e.has_zero
        self.source = source
        self.gain = np.zeros(groups)
        self.scale = np.zeros(groups)
        self.zero = np.zeros(groups, np.int32)

    def offer(self, sums: Sums) -> None:
        """Judge the codes of one candidate by the least squared error that any scale leaves with
        them.

        With k = code - zero point, Σ(x - Sk)² is least at S = Σxk / Σk², where it is Σx² - Σxk · S.
        """
        su, suu, sxu = sums
        n, sx = self.source.count, self.source.total
        if self.encoding.symmetric:
            zero = np.full(len(su), 1 << (self.encoding.bits - 1), np.int32)
            real = zero.astype(np.float64)
        else:
            zero = self._fitted_zero(su, suu, sxu)
            real = zero / zero_steps(self.encoding.bits)
        xk = sxu - real * sx
        kk = suu - 2 * real * su + n * real * real
        scale = xk / np.where(kk > 0, kk, 1)
        gain = xk * scale
        signed = self.encoding.symmetric and self.encoding.bits < 8
        better = (kk > 0) & (gain > self.gain) & (signed | (scale > 0))
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better, scale, self.scale)
        self.zero = np.where(better, zero, self.zero)

    def _fitted_zero(self, su: F64, suu: F64, sxu: F64) -> I32:
        """Zero point of the least-squares line through (code, x)."""
        n, sx = self.source.count, self.source.total
        spread = n * suu - su * su
        lean = n * sxu - su * sx  # over spread it is the slope
        usable = (spread > 0) & (lean > 0)
        real = np.where(usable, (su * lean - sx * spread) / np.where(usable, lean * n, 1), 0)
        return nearest_zero_point(real, self.has_zero, self.encoding)

    def beside(self, change: float, move: float) -> Candidate:
        """The winner so far as a candidate, with its scale times ``1 + change`` and its zero point
        moved by so many codes. Without either its codes may still differ: the scale was fitted.
        """
        safe = np.where(np.abs(self.scale) < TINY, 1, self.scale)
        if self.encoding.symmetric:
            real = np.full(len(safe), float(1 << (self.encoding.bits - 1)))
        else:
            real = self.zero / zero_steps(self.encoding.bits)
        factor = 1 + float(np.float32(change))
        return (1 / (safe * factor)).astype(np.float32), (real + move).astype(np.float32)


def _or_all(near: Extent, e: Extent) -> Extent:
    """``near``, or all of the range where what matters is too small to be searched."""
    usable = searchable(near)
    return Extent(
        np.where(usable, near.low, e.low), np.where(usable, near.high, e.high), e.has_zero
    )


def _candidates(e: Extent, encoding: AffineEncoding, grid: SearchGrid) -> list[Candidate]:
    # Groups that are all zeros or tiny take their minmax range; any finite candidate will do.
    usable = searchable(e)
    if encoding.symmetric:
        magnitude = np.where(usable, e.magnitude, np.float32(1))
        return list(_symmetric_candidates(magnitude, encoding.bits, grid))
    low = np.where(usable, e.low, np.float32(-1))
    high = np.where(usable, e.high, np.float32(1))
    return list(_asymmetric_candidates(low, high, np.float32(encoding.levels), grid))


def _symmetric_candidates(magnitude: F32, bits: int, grid: SearchGrid) -> Iterator[Candidate]:
    centre = 1 << (bits - 1)
    unit = magnitude / np.float32(127 if bits == 8 else centre)
    offset = np.full(len(unit), centre, np.float32)
    for sign, t in product((1.0,) if bits == 8 else (1.0, -1.0), grid.factors):
        yield np.float32(sign) / (unit * np.float32(t)), offset


def _asymmetric_candidates(
    low: F32, high: F32, n: np.float32, grid: SearchGrid
) -> Iterator[Candidate]:
    unit = high / n - low / n
    middle = high / 2 + low / 2
    for t in grid.factors:
        inverse = np.float32(1) / (unit * np.float32(t))
        yield inverse, n / 2 - middle * inverse
