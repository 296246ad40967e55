"""Casting to another floating dtype: round to nearest, ties to even."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

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
