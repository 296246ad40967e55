"""What a calibration says of the cost of errors in a tensor's weights."""

from __future__ import annotations

from qconvert.calibration.file import Calibration
from qconvert.kernels.records import F64


def input_factor(calibration: Calibration, layer: str) -> F64 | None:
    """H of a layer, (features, features): an error e of a row of its weight costs e H eᵀ. None
    where the calibration has none.

    Raises:
        FormatError: arrays that are no such matrix.
    """
    return calibration.gram(layer)
