"""What a calibration says of the cost of errors in a tensor's weights."""

from __future__ import annotations

from qconvert.calibration.file import Calibration
from qconvert.calibration.fisher import MOST_OUTPUTS
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


def no_output_factor(calibration: Calibration, layer: str) -> str | None:
    """Why `output_factor` has nothing for the rows of a layer; None where it has."""
    if not calibration.has_fisher:
        return "the calibration has no gradients: calibrate --gram --fisher"
    product, lookup = calibration.uses(layer)
    if lookup:
        return "its rows are looked up, each by itself" + (", too" if product else "")
    if not calibration.has_output_fisher(layer):
        return (
            f"the calibration keeps no gradients of it, or it has more than {MOST_OUTPUTS:,} rows"
        )
    return None


def output_factor(calibration: Calibration, layer: str) -> F64:
    """O of a layer, (outputs, outputs), where `no_output_factor` has nothing to say: errors e_i of
    the rows of its weight cost Σ O_ik e_i H e_kᵀ.

    Raises:
        FormatError: arrays that are no such matrix.
    """
    found = calibration.output_fisher(layer)
    assert found is not None
    return found
