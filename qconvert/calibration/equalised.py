"""A calibration of a model, as one of the same model equalised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.document import LayerCalibration
from qconvert.calibration.file import Calibration
from qconvert.calibration.fisher import Sensitivity
from qconvert.calibration.grid import static_range
from qconvert.files.equalised import EqualisedModel, Exponents
from qconvert.model import Model, layer_name

F64 = NDArray[np.float64]
EXTREMES = "minmax"  # the observer whose ranges these are


@dataclass(frozen=True, slots=True)
class _Rescaled(LayerCalibration):
    """Of a layer whose input is another now."""

    def note(self, observer: str) -> dict[str, Any]:
        return LayerCalibration.note(self, EXTREMES)


class EqualisedCalibration(Calibration):
    """A finished calibration file, its figures those of inputs divided by the factors of a weight's
    columns, and of outputs by those of its rows.

    All are as exact as those of the file but two: a static range is that of the channels' extremes,
    whatever the observer was, for it has seen no input by its channels; and `input_fisher` takes
    |g|² of rescaled outputs for a multiple of |g|², the one that it is in the mean.

    Attributes:
        model: that is equalised, of which the file has to be.
    """

    def __init__(self, path: Path, model: EqualisedModel) -> None:
        super().__init__(path)
        self.model = model
        self._exponents: dict[str, Exponents] = {
            layer_name(name): e for name, e in model.exponents.items()
        }

    @property
    def rescaled(self) -> list[str]:
        """Layers that have a static range of their channels' extremes."""
        return [name for name in super().layers if self._columns(name) is not None]

    @cached_property
    def _layers(self) -> dict[str, LayerCalibration]:
        layers = super().layers
        return layers | {name: self._ranged(name, layers[name]) for name in self.rescaled}

    @property
    def layers(self) -> dict[str, LayerCalibration]:
        return self._layers

    def _ranged(self, name: str, layer: LayerCalibration) -> LayerCalibration:
        """A layer with the range of its rescaled channels."""
        low, high = (self._ends(f"{name}/{kind}", layer) for kind in ("minimum", "maximum"))
        inputs = self._inputs(name)
        symmetric = self.document.settings.get("symmetric") is True
        found = static_range(
            float((low * inputs).min()), float((high * inputs).max()), symmetric=symmetric
        )
        return _Rescaled(layer.samples, layer.features, found, None, layer.transposed)

    def _ends(self, name: str, layer: LayerCalibration) -> F64:
        """Extremes of each channel."""
        return self._file.values(self._tensors[name], 0, layer.features).astype(np.float64)

    def mean_squares(self, tensor: str, columns: int) -> NDArray[np.float32] | None:
        found = super().mean_squares(tensor, columns)
        if found is None or self._columns(tensor) is None:
            return found
        scaled: NDArray[np.float32] = (found * self._inputs(tensor) ** 2).astype(np.float32)
        return scaled

    def gram(self, tensor: str) -> F64 | None:
        found = super().gram(tensor)
        return found if self._columns(tensor) is None else _outer(found, self._inputs(tensor))

    def sensitivity(self, tensor: str) -> Sensitivity | None:
        found = super().sensitivity(tensor)
        if found is None:
            return None
        if self._columns(tensor) is not None:
            found = replace(found, columns=found.columns * self._inputs(tensor) ** 2)
        return replace(found, rows=found.rows * self._outputs(tensor) ** 2)

    def input_fisher(self, tensor: str) -> F64 | None:
        found = super().input_fisher(tensor)
        if found is None:
            return None
        if self._columns(tensor) is not None:
            found = _outer(found, self._inputs(tensor))
        before = super().sensitivity(tensor)
        if before is not None and before.rows.any():
            found = found * (np.sum(before.rows * self._outputs(tensor) ** 2) / before.rows.sum())
        return found

    def output_fisher(self, tensor: str) -> F64 | None:
        found = super().output_fisher(tensor)
        outputs = self._outputs(tensor)
        return found if isinstance(outputs, float) else _outer(found, outputs)

    def check_model(self, model: Model) -> None:
        """Hold the file against the model before it was equalised."""
        super().check_model(self.model.source)

    def _columns(self, tensor: str) -> NDArray[np.int8] | None:
        """Exponents of the columns of a layer's weight; None where they are as they were."""
        found = self._exponents.get(layer_name(tensor))
        if found is None or found.columns is None or len(found.columns) != 1:
            return None
        return found.columns[0] if found.columns.any() else None

    def _inputs(self, tensor: str) -> F64:
        """What the inputs of a layer are multiplied by."""
        columns = self._columns(tensor)
        assert columns is not None
        return np.ldexp(1.0, -columns.astype(np.int32))

    def _outputs(self, tensor: str) -> F64 | float:
        """What gradients by the outputs of a layer are multiplied by."""
        found = self._exponents.get(layer_name(tensor))
        if found is None or found.rows is None:
            return 1.0
        return np.ldexp(1.0, found.rows.astype(np.int32))


def _outer(matrix: F64 | None, factors: F64) -> F64 | None:
    """A matrix of second moments, of what is multiplied by factors."""
    if matrix is None:
        return None
    scaled: F64 = matrix * factors[:, None] * factors[None]
    return scaled
