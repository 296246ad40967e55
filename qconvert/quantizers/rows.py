"""Rows of a tensor as they lie in a file, so that kernels can read them without a detour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """A run of whole rows, or of columns of one row.

    Attributes:
        data: values of ``dtype``, little-endian, row by row.
        dtype: a name of `qconvert.model.DTYPES`.
        shape: (R, c).
    """

    data: bytes
    dtype: str
    shape: tuple[int, int]

    @classmethod
    def of(cls, x: F32) -> StoredRows:
        """Rows (R, c) that are numbers already."""
        return cls(x.astype("<f4", copy=False).tobytes(), "F32", (x.shape[0], x.shape[1]))

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape[0] * self.shape[1]

    def values(self) -> F32:
        """The rows (R, c) as float32; float64 and wide integers are rounded.

        Raises:
            FloatingPointError: NaN or Inf, or a float64 beyond float32.
        """
        with np.errstate(over="ignore"):
            x = kernels.widen(self.data, self.dtype).astype(np.float32, copy=False)
        if not kernels.all_finite(x):
            raise FloatingPointError("values that are not finite")
        return x.reshape(self.shape)

    def readable(self) -> tuple[bytes | F32, str]:
        """The values as native loops can read them, and their dtype.

        Raises:
            FloatingPointError: see `values`, which this may come down to.
        """
        assert kernels.fused is not None
        if self.dtype in kernels.fused.SOURCE_DTYPES:
            return self.data, self.dtype
        return self.values(), "F32"
