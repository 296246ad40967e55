"""The Gram matrix of a layer's inputs, for error-compensated rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration import fixed_point
from qconvert.calibration.fixed_point import LARGEST

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
STRIPE = 64  # rows of the matrix at a time


class GramMatrix:
    """Xᵀ X of all rows x, (features, features): the upper triangle in `fixed_point`.

    The product of each batch is taken in float64 and rounded to multiples of 2^-64; the sum over
    batches is exact. The same batches give the same bits in any order and split over runs, where
    float64 sums would not. Memory is that of one float64 matrix.

    Attributes:
        features: n, of a row.
    """

    def __init__(self, features: int) -> None:
        self.features = features
        starts = range(0, features, STRIPE)
        shapes = [(min(STRIPE, features - k), features - k) for k in starts]
        self._high: list[I64] = [np.zeros(s, np.int64) for s in shapes]
        self._low: list[I64] = [np.zeros(s, np.int64) for s in shapes]

    @staticmethod
    def size(features: int) -> int:
        """Bytes of memory."""
        return 8 * features * (features + STRIPE)

    def update(self, batch: F32) -> None:
        """Add the rows of a finite (samples, features) batch.

        Raises:
            OverflowError: a sum of squares beyond 2^59.
        """
        x = batch.astype(np.float64)
        if not (np.einsum("ij,ij->j", x, x) < LARGEST).all():
            raise OverflowError("a sum of squares beyond 2^59")
        for k, (high, low) in enumerate(zip(self._high, self._low, strict=True)):
            start = k * STRIPE
            product = x[:, start : start + len(high)].T @ x[:, start:]
            fixed_point.add(high, low, *fixed_point.split(product))

    def merge(self, other: GramMatrix) -> None:
        """Add what another one has seen.

        Raises:
            ValueError: another number of features.
            OverflowError: a sum of squares beyond 2^59; what was seen is lost.
        """
        if self.features != other.features:
            raise ValueError("Gram matrices of different layers")
        for high, low, more, rest in zip(
            self._high, self._low, other._high, other._low, strict=True
        ):
            fixed_point.add(high, low, more, rest)

    def packed(self) -> tuple[I64, I64]:
        """High and low parts of the upper triangle, row after row, (n (n + 1) / 2,) each."""
        return _flat(self._high), _flat(self._low)

    @classmethod
    def unpacked(cls, high: I64, low: I64, features: int) -> GramMatrix:
        """The inverse of `packed`.

        Raises:
            ValueError: arrays that are no such matrix.
        """
        wanted = (features * (features + 1) // 2,)
        if any(a.shape != wanted or a.dtype != np.int64 for a in (high, low)):
            raise ValueError("Gram matrix")
        fixed_point.check(high, low)
        found = cls(features)
        at = 0
        for k in range(features):
            if high[at] < 0:
                raise ValueError("negative sum of squares")
            stripe, row = divmod(k, STRIPE)
            found._high[stripe][row, row:] = high[at : at + features - k]
            found._low[stripe][row, row:] = low[at : at + features - k]
            at += features - k
        return found


def _flat(stripes: list[I64]) -> I64:
    return np.concatenate([row[k:] for stripe in stripes for k, row in enumerate(stripe)])
