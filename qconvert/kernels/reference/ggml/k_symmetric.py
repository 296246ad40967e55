"""The search for d and a of the K-quants whose values are d a u: Q3_K, Q6_K."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qconvert.kernels.reference.ggml.k_columns import (
    F16,
    F32,
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


@dataclass(frozen=True, slots=True)
class Symmetric:
    """A type whose values are d a u."""

    length: int
    half: int  # codes u are -half .. half - 1
    most: int  # integer scales a are -most - 1 .. most
    headroom: float  # of d over the least that holds the first guesses
    trials: tuple[float, ...]  # scales over the first guess
    nearby: tuple[int, ...]  # steps from the best a that are tried after d is fitted


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
        fitted = sxu / divisor(suu, suu > 0)
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
        new_half, new = halves(np.maximum(d + e / divisor(p, p > 0), np.float32(0)), power, False)
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
    half, d = halves(
        largest * (np.float32(kind.headroom) / np.float32(kind.most)), power, upwards=True
    )
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
