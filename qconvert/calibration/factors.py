"""What a calibration says of the cost of errors in a tensor's weights."""

from __future__ import annotations

from qconvert.calibration.file import Calibration
from qconvert.kernels.records import F64


def input_factor(calibration: Calibration, layer: str) -> F64 | None:
    """H of a layer, (features, features): an error e of a row of its weight costs e H eᵀ. The Gram
    matrix of its inputs, where gradients are known each input weighed by that of its output; None
    where the calibration has neither.

    Raises:
        FormatError: arrays that are no such matrix.
    """
    weighed = calibration.input_fisher(layer)
    return calibration.gram(layer) if weighed is None else weighed
