"""Casting to another floating dtype: round to nearest, ties to even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.quantizers.affine import ErrorSums
from qconvert.quantizers.rows import StoredRows

CAST_NUMPY = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def cast(x: NDArray[np.float32], dtype: str) -> tuple[bytes, NDArray[np.float32]]:
    """Values in ``dtype`` as bytes, and what they read back as; too large values become Inf."""
    with np.errstate(over="ignore"):
        stored = x.astype(CAST_NUMPY[dtype])
    return stored.tobytes(), stored.astype(np.float32)


def cast_rows(rows: StoredRows, dtype: str) -> tuple[bytes | memoryview, ErrorSums]:
    """Rows as bytes of another dtype and the error of that, infinite where a value became Inf.

    Raises:
        FloatingPointError: NaN or Inf among the values, or a float64 beyond float32.
    """
    if kernels.fused is not None:
        data, sums = kernels.fused.cast(*rows.readable(), dtype)
        return data.data, ErrorSums(rows.size, *sums)
    x = rows.values().ravel()
    stored, back = cast(x, dtype)
    return stored, ErrorSums(x.size, *kernels.error_sums(x, back))
