"""Numbers of 125 bits as two int64, the form of Gram matrices: high · 2^-2 + low · 2^-64.

The low part lies in [0, 2^62), so that every number has one form and sums are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
HIGH_BITS, LOW_BITS = 2, 64
CARRY_BITS = LOW_BITS - HIGH_BITS
LARGEST = 2.0**59  # magnitudes are below: the sum of two fits


def split(values: F64) -> tuple[I64, I64]:
    """Values below `LARGEST` in magnitude, rounded to multiples of 2^-64; low parts may be
    negative until `add` carries them.
    """
    whole = np.rint(values * 2.0**HIGH_BITS)
    rest = values - whole * 2.0**-HIGH_BITS  # exact
    return whole.astype(np.int64), np.rint(rest * 2.0**LOW_BITS).astype(np.int64)


def add(high: I64, low: I64, more: I64, rest: I64) -> None:
    """Add numbers in place.

    Raises:
        OverflowError: a sum of `LARGEST` or more.
    """
    low += rest
    high += more
    high += low >> CARRY_BITS
    low &= (1 << CARRY_BITS) - 1
    if not _within(high):
        raise OverflowError("a sum of products beyond 2^59")


def check(high: NDArray[Any], low: NDArray[Any]) -> None:
    """Refuse what is no such number.

    Raises:
        ValueError: a part beyond its range.
    """
    if not _within(high) or (low < 0).any() or (low >> CARRY_BITS).any():
        raise ValueError("fixed-point numbers")


def wide(high: I64, low: I64) -> F64:
    """The numbers in float64, to a unit in the last place of the result."""
    # In three parts: a small negative number is -1/4 and a low part that float64 would round.
    upper = high * 2.0**-HIGH_BITS + (low >> 32) * 2.0 ** (32 - LOW_BITS)
    found: F64 = upper + (low & 0xFFFFFFFF) * 2.0**-LOW_BITS
    return found


def _within(high: NDArray[Any]) -> bool:
    limit = int(LARGEST) << HIGH_BITS
    return not high.size or (-limit < high.min() <= high.max() < limit)
