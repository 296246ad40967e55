"""The integer matrix product of a quantized layer: formats/schemes/SPEC.md section 7."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import I32


def integer_dots(codes: NDArray[np.int16], activations: NDArray[np.int8]) -> I32:
    """Σ code · a over the columns of each span: (S, R, L) and (S, M, L) to (S, M, R), int32,
    exact.
    """
    return activations.astype(np.int32) @ codes.astype(np.int32).swapaxes(1, 2)
