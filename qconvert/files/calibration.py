"""Calibration files: static activation parameters and channel statistics, as safetensors.

Per layer ``L`` the tensors ``L/minimum``, ``L/maximum`` and ``L/mean_square`` (float32, one value
a feature); the rest is JSON in the metadata entry ``qconvert.calibration``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.safetensors import open_safetensors

ENTRY = "qconvert.calibration"
SCHEMA = "qconvert.calibration/1"
CHANNELS = ("minimum", "maximum", "mean_square")
WEIGHT = ".weight"
MAX_OBSERVER = 32  # characters of an observer's name
MAX_SAMPLES = (1 << 53) - 1  # what a qblk header can say


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """Static parameters of one layer's input; see `qconvert.observers.ranges.StaticRange`."""

    samples: int
    features: int
    low: float
    high: float
    scale: float
    zero_point: int

    def note(self, observer: str) -> dict[str, Any]:
        """The ``activation`` object of a qblk tensor."""
        return {
            "observer": observer,
            "samples": self.samples,
            "scale": self.scale,
            "zero_point": self.zero_point,
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration file, read and checked."""

    path: Path
    sha256: str
    observer: str
    layers: dict[str, LayerCalibration]

    def find(self, tensor: str) -> LayerCalibration | None:
        """The calibration of the layer that a weight belongs to."""
        return self.layers.get(layer_name(tensor))

    def check(self, tensor: str, columns: int) -> None:
        """Refuse a layer whose number of features is not that of the weight's rows."""
        found = self.layers[layer_name(tensor)]
        if found.features != columns:
            raise UnsupportedError(
                "the calibration does not fit the weight",
                path=self.path,
                tensor=tensor,
                found=f"{found.features:,} features",
                wanted=f"{columns:,}",
                hint="calibrate with activations of this model",
            )

    def unused(self, tensors: list[str]) -> list[str]:
        """Layers that belong to none of these tensors."""
        used = {layer_name(t) for t in tensors}
        return sorted(set(self.layers) - used)


def layer_name(name: str) -> str:
    """The layer of a weight or of an activation array: the name without ``.weight``."""
    return name.removesuffix(WEIGHT)


def calibration_bytes(
    observer: str,
    inputs: list[dict[str, Any]],
    layers: dict[str, LayerCalibration],
    channels: dict[str, dict[str, NDArray[np.float32]]],
) -> bytes:
    """A calibration file; ``channels`` has the arrays of `CHANNELS` for each layer."""
    described = {
        "schema": SCHEMA,
        "observer": observer,
        "inputs": inputs,
        "layers": {name: asdict(layer) for name, layer in layers.items()},
    }
    arrays = {f"{n}/{kind}": a for n, kinds in channels.items() for kind, a in kinds.items()}
    return save(arrays, {ENTRY: json.dumps(described, sort_keys=True, ensure_ascii=False)})


def read_calibration(path: Path) -> Calibration:
    """Read and check a calibration file.

    Raises:
        InputError: it cannot be read, or is not a calibration file.
    """
    model = open_safetensors(path)
    try:
        text = model.metadata.get(ENTRY)
        if text is None:
            raise FormatError(
                "not a calibration file", path=path, hint="make one with: qconvert calibrate"
            )
        shapes = {t.name: t.shape for t in model.tensors}
        described = json.loads(text)
        if described["schema"] != SCHEMA:
            raise UnsupportedError(
                "calibration", path=path, found=described["schema"], wanted=SCHEMA
            )
        layers = {n: LayerCalibration(**fields) for n, fields in described["layers"].items()}
        observer = described["observer"]
        named = isinstance(observer, str) and len(observer) <= MAX_OBSERVER
        good = (
            named
            and observer.isidentifier()
            and all(
                _plausible(layer)
                and all(shapes.get(f"{name}/{kind}") == (layer.features,) for kind in CHANNELS)
                for name, layer in layers.items()
            )
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise FormatError("damaged calibration metadata", path=path) from e
    finally:
        model.close()
    if not good:
        raise FormatError("impossible values in the calibration", path=path)
    with path.open("rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    return Calibration(path, sha256, observer, layers)


def _plausible(layer: LayerCalibration) -> bool:
    integers = (layer.samples, layer.features, layer.zero_point)
    return (
        all(isinstance(i, int) and not isinstance(i, bool) for i in integers)
        and all(isinstance(f, float) for f in (layer.low, layer.high, layer.scale))
        and 0 < layer.samples <= MAX_SAMPLES
        and layer.features > 0
        and -128 <= layer.zero_point <= 127
        and math.isfinite(layer.low)
        and math.isfinite(layer.high)
        and 2.0**-149 <= layer.scale <= 3.0e38
    )
