"""calibrate: recorded activations through observers, or several calibrations merged, to static
parameters and channel statistics. Running a model over text: `qconvert.stages.calibrate_text`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import InputError, UnsupportedError, WeightError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.calibration import WEIGHT, check_digest, layer_name, model_digest
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.scratch import Scratch
from qconvert.files.transposed import input_first
from qconvert.geometry import TILE_VALUES
from qconvert.model import Model, TensorInfo
from qconvert.observers.layer import LayerStatistics
from qconvert.observers.ranges import READ_WEIGHTS, ObserverSettings
from qconvert.progress import Progress, Silent
from qconvert.report import CalibrateReport
from qconvert.stages.collected import (
    STATISTICS_BYTES,
    Collected,
    merged,
    model_warnings,
    observe,
    passes,
    read_collected,
)
from qconvert.stages.column_norms import column_norms
from qconvert.stages.importance import importance_bytes
from qconvert.stages.sources import examined

BATCH_ROWS = 32  # rows of one step of the moving average


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of ``qconvert calibrate --activations``; the command line's help describes each.

    Attributes:
        statistics_bytes: what the statistics of one pass over the files may take; layers beyond
            wait for another pass.
    """

    activations: tuple[Path, ...]
    output: Path
    model: Path | None = None
    settings: ObserverSettings = field(default_factory=ObserverSettings)
    gram: bool = False
    force: bool = False
    statistics_bytes: int = STATISTICS_BYTES


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of ``qconvert calibrate --merge``."""

    model: Path
    calibrations: tuple[Path, ...]
    output: Path
    imatrix: Path | None = None
    force: bool = False


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateReport:
    """Observe recorded activations, file after file in the order given.

    Raises:
        InputError: an array is not (samples, features) of finite floats, or files disagree on a
        layer's features.
        UsageError: no such observer.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    options.settings.make()  # a wrong name costs no time
    read = (*options.activations, *((options.model,) if options.model else ()))
    with AtomicOutput(options.output, overwrite=options.force, inputs=read) as out:
        with ExitStack() as stack:
            model = stack.enter_context(open_safetensors(options.model)) if options.model else None
            warnings = examined(model).warnings if model else []
            files = [stack.enter_context(open_safetensors(p)) for p in options.activations]
            transposed = input_first(model) if model else lambda name: False
            scratch = stack.enter_context(Scratch(options.output)) if options.gram else None
            found = Collected(options.settings, scratch=scratch)
            widths = _widths(files)
            sizes = {n: LayerStatistics.size(w, gram=options.gram) for n, w in widths.items()}
            progress.begin("calibrate", sum(t.nbytes for f in files for t in f.tensors), "bytes")
            for group in passes(sizes, options.statistics_bytes):
                for name in group:
                    if transposed(name + WEIGHT):
                        found.transposed.add(name)
                    norms = weight_norms(
                        *(options.settings, model, name, widths[name], name in found.transposed)
                    )
                    found.layers[name] = LayerStatistics(
                        widths[name], options.settings, norms, gram=options.gram
                    )
                for file in files:
                    _observe_file(file, found, progress)
                found.finish()
            progress.end()
            for file in files:
                found.inputs.append({"name": file.path.name, "sha256": file.sha256()})
                file.check_unchanged()
            if model:
                layers = {name: layer.calibration for name, layer in found.finished.items()}
                warnings += model_warnings(model, layers)
                found.model = model_digest(model)
                model.check_unchanged()
        found.write(out)
        out.commit()
    return CalibrateReport(
        kernels=kernels.describe(),
        inputs=[str(p) for p in options.activations],
        output=str(options.output),
        observer=options.settings.name,
        layers=found.rows(),
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def merge_calibrations(options: MergeOptions) -> CalibrateReport:
    """One calibration of several, as if one run had seen all of their input.

    Raises:
        InputError: a file is not a finished calibration of this model, or they do not fit together.
        UsageError: moving averages.
    """
    started = time.perf_counter()
    with (
        open_safetensors(options.model) as model,
        AtomicOutput(
            options.output,
            overwrite=options.force,
            inputs=(options.model, *options.calibrations),
        ) as out,
        Scratch(options.output) as scratch,
    ):
        parts = []
        for path in options.calibrations:
            part = read_collected(path, scratch)
            check_digest(part.model, model, path)
            if part.run and part.run.done < part.run.chunks:
                raise InputError(
                    "the state of an interrupted run, not a calibration",
                    path=path,
                    hint="finish it first: its command with --resume",
                    code="CALIBRATION-PARTIAL",
                )
            parts.append((path, part))
        whole = merged(parts)
        layers = {name: layer.calibration for name, layer in whole.finished.items()}
        warnings = model_warnings(model, layers) + unreached_warnings(whole.unreached)
        whole.write(out)
        if options.imatrix:
            with AtomicOutput(
                options.imatrix, overwrite=options.force, inputs=(options.model,)
            ) as other:
                other.write_at(0, importance_bytes(whole, options.model))
                other.commit()
        out.commit()
    return CalibrateReport(
        kernels=kernels.describe(),
        inputs=[str(p) for p in options.calibrations],
        output=str(options.output),
        observer=whole.settings.name,
        layers=whole.rows(),
        chunks=whole.run.chunks if whole.run else None,
        tokens=whole.run.tokens if whole.run else None,
        unreached=whole.unreached,
        imatrix=str(options.imatrix) if options.imatrix else None,
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def unreached_warnings(unreached: list[str]) -> list[str]:
    if not unreached:
        return []
    return [
        f"no token came through {len(unreached)} layers, such as '{unreached[0]}': "
        "they are not in the calibration"
    ]


def _widths(files: Sequence[SafetensorsModel]) -> dict[str, int]:
    """Features of each layer, in the order of the files.

    Raises:
        InputError: an array that is no activations, two widths of a layer, or no array at all.
    """
    widths: dict[str, int] = {}
    for file in files:
        for tensor in file.tensors:
            check_activations(tensor, file.path)
            features = tensor.shape[1]
            wanted = widths.setdefault(layer_name(tensor.name), features)
            if features != wanted:
                raise UnsupportedError(
                    "activations of one layer differ in width",
                    path=file.path,
                    tensor=tensor.name,
                    found=f"{features:,} features",
                    wanted=f"{wanted:,}, as in the files before",
                )
    if not widths:
        raise InputError("no activations in the input", path=files[0].path)
    return widths


def _observe_file(file: SafetensorsModel, found: Collected, progress: Progress) -> None:
    """Feed what a file has of the layers of this pass to their statistics."""
    for tensor in file.tensors:
        name = layer_name(tensor.name)
        if name in found.layers:
            for batch in read_batches(file, tensor, file.path):
                observe(found.layers[name], batch, tensor.name, file.path)
            progress.advance(tensor.nbytes, tensor.name)


def weight_norms(
    settings: ObserverSettings,
    model: Model | None,
    layer: str,
    features: int,
    transposed: bool,
) -> NDArray[np.float64] | None:
    """What the observer of a layer wants of its weight; None where that is nothing, or unknown.

    Args:
        transposed: whether the weight is stored (in, out).
    """
    if model is None or settings.name not in READ_WEIGHTS:
        return None
    norms = column_norms(model, layer, transposed=transposed)
    return None if norms is None or len(norms) != features else norms  # refused later, by name


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
