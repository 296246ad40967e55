"""calibrate: activation samples through an observer, to static parameters and channel
statistics.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import InputError, UnsupportedError, UsageError, WeightError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.calibration import LayerCalibration, calibration_bytes, layer_name
from qconvert.files.safetensors import open_safetensors
from qconvert.geometry import TILE_VALUES
from qconvert.model import Model, TensorInfo
from qconvert.observers.ranges import ChannelStatistics, Observer, make_observer, static_range
from qconvert.progress import Progress, Silent
from qconvert.ranges import DEFAULT_PERCENTILE
from qconvert.report import CalibratedLayer, CalibrateReport

BATCH_ROWS = 32  # rows of one step of the moving average


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of ``qconvert calibrate``; the command line's help describes each."""

    activations: tuple[Path, ...]
    output: Path
    model: Path | None = None
    observer: str = "minmax"
    percentile: float | None = None
    force: bool = False


class _Layer:
    def __init__(self, features: int, options: CalibrateOptions) -> None:
        self.features = features
        self.observer = _observer(options)
        self.channels = ChannelStatistics(features)


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateReport:
    """Observe recorded activations, file after file in the order given.

    Raises:
        InputError: an array is not (samples, features) of finite floats, or files disagree on a
        layer's features.
        UsageError: no such observer.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    _observer(options)  # a wrong name costs no time
    layers: dict[str, _Layer] = {}
    inputs = []
    read = (*options.activations, *((options.model,) if options.model else ()))
    with AtomicOutput(options.output, overwrite=options.force, inputs=read) as out:
        progress.begin("calibrate", sum(_size(p) for p in options.activations), "bytes")
        for path in options.activations:
            inputs.append(
                {"name": path.name, "sha256": _observe_file(path, layers, options, progress)}
            )
        progress.end()
        if not layers:
            raise InputError("no activations in the input", path=options.activations[0])
        found = {name: _settle(layers[name]) for name in sorted(layers)}
        channels = {
            name: {
                "minimum": layers[name].channels.low,
                "maximum": layers[name].channels.high,
                "mean_square": layers[name].channels.mean_square,
            }
            for name in found
        }
        warnings = _model_warnings(options.model, found) if options.model else []
        out.write_at(0, calibration_bytes(options.observer, inputs, found, channels))
        out.commit()
    return CalibrateReport(
        kernels=kernels.describe(),
        inputs=[str(p) for p in options.activations],
        output=str(options.output),
        observer=options.observer,
        layers=[_row(name, layer, layers[name]) for name, layer in found.items()],
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def _observer(options: CalibrateOptions) -> Observer:
    percentile = options.percentile
    if percentile is not None and options.observer != "percentile":
        raise UsageError("--percentile goes with --observer percentile")
    if percentile is not None and not 50 < percentile <= 100:
        raise UsageError("--percentile", found=percentile, wanted="above 50, at most 100")
    return make_observer(options.observer, percentile or DEFAULT_PERCENTILE)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _observe_file(
    path: Path, layers: dict[str, _Layer], options: CalibrateOptions, progress: Progress
) -> str:
    """Feed one file to the observers; returns its SHA-256."""
    model = open_safetensors(path)
    try:
        for tensor in model.tensors:
            check_activations(tensor, path)
            name = layer_name(tensor.name)
            features = tensor.shape[1]
            layer = layers.setdefault(name, _Layer(features, options))
            if layer.features != features:
                raise UnsupportedError(
                    "activations of one layer differ in width",
                    path=path,
                    tensor=tensor.name,
                    found=f"{features:,} features",
                    wanted=f"{layer.features:,}, as in the files before",
                )
            for batch in read_batches(model, tensor, path):
                layer.observer.update(batch)
                layer.channels.update(batch)
            progress.advance(tensor.nbytes, tensor.name)
        model.check_unchanged()
    finally:
        model.close()
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_activations(tensor: TensorInfo, path: Path) -> None:
    """Refuse an array that is not (samples, features) of floats, or has no sample."""
    if len(tensor.shape) != 2 or not tensor.size or not tensor.floating:
        raise UnsupportedError(
            "activations",
            path=path,
            tensor=tensor.name,
            found=f"{tensor.dtype} of shape {list(tensor.shape)}",
            wanted="a floating array (samples, features)",
        )


def read_batches(model: Model, tensor: TensorInfo, path: Path) -> Iterator[NDArray[np.float32]]:
    """The rows of an activation array, 32 at a time or fewer when they are long.

    Raises:
        WeightError: a value is NaN or Inf, named by its sample.
    """
    samples, features = tensor.shape
    step = max(1, min(BATCH_ROWS, TILE_VALUES // features))
    for row in range(0, samples, step):
        stop = min(row + step, samples)
        with np.errstate(over="ignore"):
            batch = model.values(tensor, row * features, stop * features).astype(np.float32)
        batch = batch.reshape(-1, features)
        finite = np.isfinite(batch).all(axis=1)
        if not finite.all():
            raise WeightError(
                f"activations of sample {row + int(np.argmin(finite)):,} are NaN or Inf",
                path=path,
                tensor=tensor.name,
                hint="record them again; one such value would spoil every range",
            )
        yield batch


def _settle(layer: _Layer) -> LayerCalibration:
    found = static_range(*layer.observer.range())
    return LayerCalibration(
        samples=layer.channels.samples,
        features=layer.features,
        low=found.low,
        high=found.high,
        scale=found.scale,
        zero_point=found.zero_point,
    )


def _row(name: str, settled: LayerCalibration, layer: _Layer) -> CalibratedLayer:
    widest = np.maximum(-layer.channels.low, layer.channels.high)
    middle = float(np.median(widest))
    return CalibratedLayer(
        name=name,
        samples=settled.samples,
        features=settled.features,
        low=settled.low,
        high=settled.high,
        scale=settled.scale,
        zero_point=settled.zero_point,
        channel_absmax_ratio=float(widest.max()) / middle if middle > 0 else float("inf"),
    )


def _model_warnings(path: Path, found: dict[str, LayerCalibration]) -> list[str]:
    """Hold the layers against the weights of the model they are for."""
    model = open_safetensors(path)
    try:
        weights = {layer_name(t.name): t for t in model.tensors if len(t.shape) >= 2}
    finally:
        model.close()
    strange = [name for name in found if name not in weights]
    if len(strange) == len(found):
        raise UnsupportedError(
            "no layer of the activations has a weight in the model",
            path=path,
            found=f"'{strange[0]}' and {len(strange) - 1} more",
            wanted=f"names such as '{next(iter(weights), 'none')}'",
            hint="name the arrays like the layers or weights of the model",
        )
    warnings = []
    if strange:
        warnings.append(
            f"{len(strange)} of {len(found)} layers have no weight in {path.name}, "
            f"such as '{strange[0]}'"
        )
    for name, layer in found.items():
        if name in strange:
            continue
        if weights[name].shape[-1] != layer.features:
            raise UnsupportedError(
                "activations do not fit the model",
                path=path,
                tensor=weights[name].name,
                found=f"{layer.features:,} features",
                wanted=f"{weights[name].shape[-1]:,}",
            )
    return warnings
