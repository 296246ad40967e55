"""Sums without rounding, one a channel or a bin: the same bits for any split and order of the
values.

That is what makes a run, a resumed run and merged runs equal byte for byte. A float64 sum of
squares would depend on where a run was cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LIMB_BITS = 32
LOW = -320  # exponent of the lowest bit; the square of a binary32 number is a multiple of 2^-298
LIMBS = 20  # up to 2^320: 2^64 squares of at most 2^256
BLOCK_VALUES = 45_000  # of squares at a time: they stay in the cache over several passes
CARRY_EVERY = 1 << 28  # additions of below 2^33 to a limb of 63 bits
WEIGHT_LIMBS = 6
LIGHTEST, HEAVIEST = -96, 31  # exponents of weights
_MASK = (1 << LIMB_BITS) - 1


class ExactSum:
    """Σ of float64 columns, each a fixed-point number of 640 bits: 160 bytes a channel.

    Attributes:
        limbs: (20, channels) int64; limb k counts multiples of 2^(32k - 320).
    """

    def __init__(self, channels: int) -> None:
        self.limbs: I64 = np.zeros((LIMBS, channels), np.int64)
        self._pending = 0

    def add(self, values: F64) -> None:
        """Add one multiple of 2^-320 below 2^288 to each channel; ``values`` is (channels,)."""
        fraction, exponent = np.frexp(values)
        mantissa = np.ldexp(np.abs(fraction), 53).astype(np.int64)
        position = exponent.astype(np.int64) - 53 - LOW
        mantissa >>= np.clip(-position, 0, 53)  # zeros are shifted out
        position = np.maximum(position, 0)
        limb, shift = np.divmod(position, LIMB_BITS)
        sign = np.sign(values).astype(np.int64)
        low = (mantissa & _MASK).astype(np.uint64) << shift.astype(np.uint64)
        high = (mantissa >> LIMB_BITS) << shift
        column = np.arange(len(values))
        self.limbs[limb, column] += sign * (low & np.uint64(_MASK)).astype(np.int64)
        middle = (low >> np.uint64(LIMB_BITS)).astype(np.int64) + (high & _MASK)
        self.limbs[limb + 1, column] += sign * middle
        self.limbs[limb + 2, column] += sign * (high >> LIMB_BITS)
        self._pending += 1
        if self._pending >= CARRY_EVERY:
            self.carry()

    def add_squares(self, batch: NDArray[np.floating[Any]]) -> None:
        """Add Σ x² over the rows of a finite (rows, channels) float32 batch.

        Each square is exact in float64. Its leading bits, those above a power of two that is large
        enough for the whole column, sum without rounding; what is left is treated the same way
        (Rump, Ogita and Oishi 2008, ExtractVector).
        """
        step = max(16, BLOCK_VALUES // max(batch.shape[1], 1))
        for row in range(0, len(batch), step):
            self._add_block(batch[row : row + step].astype(np.float64))

    def _add_block(self, rest: F64) -> None:
        rest *= rest
        headroom = int(np.ceil(np.log2(max(len(rest), 1)))) + 1
        leading = np.empty_like(rest)
        top = rest.max(axis=0, initial=0)
        while top.any():
            sigma = np.ldexp(1.0, np.frexp(top)[1] + headroom)
            np.add(rest, sigma, out=leading)
            leading -= sigma
            self.add(leading.sum(axis=0))
            rest -= leading
            np.abs(rest, out=leading)
            top = leading.max(axis=0, initial=0)

    def merge(self, other: ExactSum) -> None:
        other.carry()
        self.limbs += other.limbs
        self.carry()

    def carry(self) -> None:
        """Bring every limb but the last into [0, 2^32): the one form of each number."""
        for k in range(LIMBS - 1):
            over = self.limbs[k] >> LIMB_BITS
            self.limbs[k] &= _MASK
            self.limbs[k + 1] += over
        self._pending = 0

    def values(self) -> F64:
        """The sums as float64, to a few units in the last place; (channels,)."""
        self.carry()
        weights = np.ldexp(1.0, LOW + LIMB_BITS * np.arange(LIMBS))
        total = np.zeros(self.limbs.shape[1])
        for limb, weight in zip(self.limbs, weights, strict=True):  # ascending, one fixed order
            total += limb * weight
        return total

    def packed(self) -> tuple[NDArray[np.uint32], int]:
        """The limbs in use, (limbs, channels), and the index of the lowest of them.

        Only for sums that are not negative.
        """
        self.carry()
        used = np.flatnonzero(self.limbs.any(axis=1))
        first, last = (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)
        return self.limbs[first:last].astype(np.uint32), first

    @classmethod
    def unpacked(cls, limbs: NDArray[np.uint32], first: int) -> ExactSum:
        """The inverse of `packed`.

        Raises:
            ValueError: more limbs than there are.
        """
        if limbs.ndim != 2 or not 0 <= first <= first + len(limbs) <= LIMBS:
            raise ValueError(f"{limbs.shape} limbs from {first}")
        found = cls(limbs.shape[1])
        found.limbs[first : first + len(limbs)] = limbs
        return found


class WeightedCounts:
    """How often each bin was met, times powers of two: fixed-point numbers of 192 bits.

    Args:
        bins: how many.
    """

    def __init__(self, bins: int) -> None:
        self.limbs: I64 = np.zeros((WEIGHT_LIMBS, bins), np.int64)
        self._pending = 0

    def add(self, keys: NDArray[np.integer[Any]], weights: F64, exponent: int) -> None:
        """Add weight · 2^exponent to the bin of each key.

        Args:
            keys, weights: of one shape; the weights are integers whose sum is below 2^53.
            exponent: -96..31.
        """
        sums = np.bincount(keys.ravel(), weights.ravel(), minlength=self.limbs.shape[1])
        used = np.flatnonzero(sums != 0)  # many times faster than of floats
        whole = sums[used].astype(np.int64)
        limb, shift = divmod(exponent - LIGHTEST, LIMB_BITS)
        low = (whole & _MASK) << shift
        high = (whole >> LIMB_BITS) << shift
        self.limbs[limb, used] += low & _MASK
        self.limbs[limb + 1, used] += (low >> LIMB_BITS) + (high & _MASK)
        self.limbs[limb + 2, used] += high >> LIMB_BITS
        self._pending += 1
        if self._pending >= CARRY_EVERY:
            self.carry()

    def merge(self, other: WeightedCounts) -> None:
        other.carry()
        self.carry()
        self.limbs += other.limbs
        self.carry()

    def carry(self) -> None:
        """Bring every limb but the last into [0, 2^32): the one form of each number."""
        for k in range(WEIGHT_LIMBS - 1):
            self.limbs[k + 1] += self.limbs[k] >> LIMB_BITS
            self.limbs[k] &= _MASK
        self._pending = 0

    def values(self) -> tuple[I64, F64]:
        """The bins in use, ascending, and their sums, to a few units in the last place."""
        self.carry()
        used = np.flatnonzero(self.limbs.any(axis=0))
        total = np.zeros(len(used))
        for k, limb in enumerate(self.limbs[:, used]):
            total += limb * np.ldexp(1.0, k * LIMB_BITS + LIGHTEST)
        return used, total

    def packed(self) -> tuple[NDArray[np.uint16], I64]:
        """The bins in use, and their limbs (6, bins in use)."""
        self.carry()
        used = np.flatnonzero(self.limbs.any(axis=0))
        return used.astype(np.uint16), self.limbs[:, used]

    def unpack(self, keys: NDArray[np.uint16], limbs: I64) -> None:
        """Take over what `packed` gave.

        Raises:
            ValueError, IndexError: it gave no such thing.
        """
        if limbs.shape != (WEIGHT_LIMBS, len(keys)) or limbs.dtype != np.int64 or keys.ndim != 1:
            raise ValueError("weights of a histogram")
        if (limbs < 0).any() or (limbs > _MASK).any() or not limbs.any(axis=0).all():
            raise ValueError("weights of a histogram")
        if not (np.diff(keys.astype(np.int64)) > 0).all():
            raise ValueError("keys of a histogram")
        self.limbs[:] = 0
        self.limbs[:, keys] = limbs
        self._pending = 0
