"""The 8-bit grid of static activations, and the search for the range that it should cover."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
CODES = 255  # steps of signed 8 bits
SYMMETRIC_CODES = 127  # steps from 0 to either end
STEPS = ((1 / 2, 14), (1 / 8, 3), (1 / 32, 3), (1 / 128, 3))  # octaves, times to either side
LEAST = 2.0**-7  # share of either end that is left


@dataclass(frozen=True, slots=True)
class StaticRange:
    """Static activation parameters: a = clamp(rint(x / scale + zero_point), -128, 127).

    The one record of them from an observer to the calibration file and back. A quantized file and
    the integer product know scale and zero point alone: `qconvert.kernels.activations.StaticInput`.

    Attributes:
        low, high: the range that the codes cover, 0 included.
        scale: the shortest decimal of a binary32 number, above 0.
        zero_point: -128..127.
    """

    low: float
    high: float
    scale: float
    zero_point: int


def static_range(low: float, high: float, *, symmetric: bool = False) -> StaticRange:
    """Signed 8-bit parameters of a range; formats/schemes/SPEC.md section 7.

    Symmetric ones have zero point 0 and the scale max(\\|low\\|, \\|high\\|) / 127.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    scale = np.float32(high / SYMMETRIC_CODES if symmetric else (high - low) / CODES)
    if scale == 0:
        return StaticRange(low, high, 1.0, 0)
    zero_point = 0 if symmetric else int(np.clip(np.rint(-128 - low / float(scale)), -128, 127))
    return StaticRange(low, high, float(str(scale)), zero_point)


def best_ends(
    low: float, high: float, cost: Callable[[float, float], float], *, symmetric: bool
) -> tuple[float, float]:
    """The range of least cost among shrinks of both ends, coarse to fine; it has 0 inside.

    Args:
        low, high: the widest candidate.
        cost: of a range; the widest of equals wins.
        symmetric: both ends as far from 0, and shrunk alike.
    """
    ends = (min(low, 0.0), max(high, 0.0))
    if symmetric:
        ends = (-max(-ends[0], ends[1]), max(-ends[0], ends[1]))
    best = (1.0, 1.0)
    for step, reach in STEPS:
        factors = [2.0 ** (k * step) for k in range(reach, -reach - 1, -1)]
        shrinks = [
            [s * f for f in factors if LEAST <= s * f <= 1] if end else [1.0]
            for s, end in zip(best, ends, strict=True)
        ]
        pairs = zip(*shrinks, strict=True) if symmetric else itertools.product(*shrinks)
        best = min(pairs, key=lambda pair: cost(ends[0] * pair[0], ends[1] * pair[1]))
    return ends[0] * best[0], ends[1] * best[1]


def noise(values: F64, weights: F64, r: StaticRange) -> float:
    """Σ w (x - x')² of values on the grid of a range."""
    error = np.rint(values / r.scale + r.zero_point)
    np.clip(error, -128, 127, out=error)
    error -= r.zero_point
    error *= r.scale
    error -= values
    error *= error
    return float(error @ weights)
