"""calibrate: recorded activations through observers, or several calibrations merged, to static
parameters and channel statistics. Running a model over text: `qconvert.stages.calibrate_text`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.collected import (
    STATISTICS_BYTES,
    Collected,
    features_of,
    file_note,
    merged,
    model_warnings,
    observe,
    passes,
    read_collected,
    restored,
    unreached_warnings,
)
from qconvert.calibration.column_norms import weight_norms
from qconvert.calibration.digest import check_digest, model_digest
from qconvert.calibration.document import TextRun
from qconvert.calibration.file import unfinished
from qconvert.calibration.importance import importance_bytes
from qconvert.calibration.layer import LayerStatistics
from qconvert.calibration.observers import ObserverSettings
from qconvert.calibration.recorded import batches, read_batches, widths
from qconvert.calibration.same_run import check_same_run
from qconvert.files.atomic import AtomicOutput
from qconvert.files.dequantized import dequantized
from qconvert.files.exchange import open_weights
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.saved_state import SAVE_SECONDS, SavedState
from qconvert.files.scratch import Scratch
from qconvert.files.transposed import input_first
from qconvert.model import WEIGHT, Model, layer_name
from qconvert.progress import Progress, Silent
from qconvert.report import CalibrateReport
from qconvert.stages.sources import examined


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of ``qconvert calibrate --activations``; the command line's help describes each.

    Attributes:
        statistics_bytes: what the statistics of one pass over the files may take; layers beyond
            wait for another pass.
        save_seconds: at least so long between two saves of the state.
    """

    activations: tuple[Path, ...]
    output: Path
    model: Path | None = None
    settings: ObserverSettings = field(default_factory=ObserverSettings)
    gram: bool = False
    resume: bool = False
    force: bool = False
    strict: bool = False
    statistics_bytes: int = STATISTICS_BYTES
    save_seconds: float = SAVE_SECONDS


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """Options of ``qconvert calibrate --merge``."""

    model: Path
    calibrations: tuple[Path, ...]
    output: Path
    imatrix: Path | None = None
    force: bool = False
    strict: bool = False


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateReport:
    """Observe recorded activations, file after file in the order given.

    Raises:
        InputError: an array is not (samples, features) of finite floats, files disagree on a
        layer's features, or a state to go on from is of another run.
        UsageError: no such observer.
        Stopped: a signal arrived; what was done so far is kept.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    options.settings.make()  # a wrong name costs no time
    read = (*options.activations, *((options.model,) if options.model else ()))
    state = SavedState(options.output, read, "batches", options.save_seconds)
    state.check(resume=options.resume, force=options.force)
    with ExitStack() as stack:
        out = stack.enter_context(
            AtomicOutput(options.output, overwrite=options.force, inputs=read)
        )
        model, warnings = None, []
        if options.model:
            opened = stack.enter_context(open_weights(options.model))
            model, warnings = dequantized(opened), examined(opened).warnings
        files = [stack.enter_context(open_safetensors(p)) for p in options.activations]
        scratch = stack.enter_context(Scratch(options.output)) if options.gram else None
        run = _Run(options, model, files, scratch, state, progress)
        if model:
            warnings += model_warnings(model, run.features, run.found.transposed)
        with state.kept():
            run.go()
            for file in (*files, *((model,) if model else ())):
                file.check_unchanged()
            state.between(run.found)
            run.found.run = None  # as of a file that says nothing of a text
            run.found.write(out)
            written = not (options.strict and warnings)
            if written:
                out.commit()
            state.remove()
    return run.found.report(
        options.activations,
        options.output,
        warnings=warnings,
        written=written,
        seconds=time.perf_counter() - started,
    )


class _Run:
    """Groups of layers, each over all batches of all files."""

    def __init__(
        self,
        options: CalibrateOptions,
        model: Model | None,
        files: Sequence[SafetensorsModel],
        scratch: Scratch | None,
        state: SavedState,
        progress: Progress,
    ) -> None:
        self.options = options
        self.model = model
        self.state = state
        self.progress = progress
        self.features = widths(files)
        self.arrays = [(file, tensor) for file in files for tensor in file.tensors]
        sizes = {n: LayerStatistics.size(w, gram=options.gram) for n, w in self.features.items()}
        self.groups = passes(sizes, options.statistics_bytes)
        self.found = Collected(
            options.settings,
            inputs=[file_note(file.path) for file in files],
            model=model_digest(model) if model else None,
            run=TextRun(0, None, 0, sum(batches(t) for _, t in self.arrays), 0, 0, groups=0),
            scratch=scratch,
        )
        if model:
            turned = input_first(model)
            self.found.transposed = {n for n in self.features if turned(n + WEIGHT)}
        if options.resume and state.path.exists():
            self._resume(read_collected(state.path, scratch))

    def go(self) -> None:
        """Observe whatever has not been observed yet."""
        total = sum(tensor.nbytes for _, tensor in self.arrays)
        self.progress.begin("calibrate", total, "bytes")
        for k in range(self._progress.groups, len(self.groups)):
            for name in self.groups[k]:
                if name not in self.found.layers and name not in self.found.finished:
                    self.found.layers[name] = LayerStatistics(
                        self.features[name],
                        self.options.settings,
                        self._norms(name),
                        gram=self.options.gram,
                    )
            self._pass()
            self.found.finish(self.state.between)
            last = k + 1 == len(self.groups)
            done = self._progress.chunks if last else 0
            self.found.run = replace(self._progress, groups=k + 1, done=done)
        self.progress.end()

    def _pass(self) -> None:
        """Feed what the files have of the layers of this pass to their statistics."""
        at = 0  # batches before the array
        for file, tensor in self.arrays:
            name = layer_name(tensor.name)
            size = batches(tensor)
            first = min(max(self._progress.done - at, 0), size)
            if name in self.found.layers:
                found = read_batches(file, tensor, file.path, first)
                for i, batch in enumerate(found, at + first + 1):
                    observe(self.found.layers[name], batch, tensor.name, file.path)
                    self.found.run = replace(self._progress, done=i)
                    self.state.between(self.found)
                self.progress.advance(tensor.nbytes, tensor.name)
            at += size
            self.found.run = replace(self._progress, done=max(self._progress.done, at))

    @property
    def _progress(self) -> TextRun:
        assert self.found.run
        return self.found.run

    def _norms(self, name: str) -> NDArray[np.float64] | None:
        transposed = name in self.found.transposed
        return weight_norms(
            *(self.options.settings, self.model, name, self.features[name], transposed)
        )

    def _resume(self, state: Collected) -> None:
        """Take over a state that this very run has left."""
        gram = any(f.has_gram for f in state.finished.values()), self.options.gram
        theirs = check_same_run(self.state, state, self.found, {"--gram": gram})
        done = {name for group in self.groups[: theirs.groups] for name in group}
        for name, layer in state.finished.items():
            if name in done:
                self.found.finished[name] = layer
            else:
                self.found.layers[name] = restored(layer, self.options.settings, self._norms(name))
        self.found.run = theirs


def merge_calibrations(options: MergeOptions) -> CalibrateReport:
    """One calibration of several, as if one run had seen all of their input.

    Raises:
        InputError: a file is not a finished calibration of this model, or they do not fit together.
        UsageError: moving averages.
    """
    started = time.perf_counter()
    read = (options.model, *options.calibrations)
    with ExitStack() as stack:
        model = dequantized(stack.enter_context(open_weights(options.model)))
        force, other = options.force, None
        out = stack.enter_context(AtomicOutput(options.output, overwrite=force, inputs=read))
        if options.imatrix:
            other = stack.enter_context(AtomicOutput(options.imatrix, overwrite=force, inputs=read))
        scratch = stack.enter_context(Scratch(options.output))
        parts = []
        for path in options.calibrations:
            part = read_collected(path, scratch)
            check_digest(part.model, model, path)
            if part.partial:
                raise unfinished(path)
            parts.append((path, part))
        whole = merged(parts)
        warnings = model_warnings(model, features_of(whole.finished), whole.transposed)
        warnings += unreached_warnings(whole.unreached)
        whole.write(out)
        if other:
            other.write_at(0, importance_bytes(whole, options.model))
        written = not (options.strict and warnings)
        if written:
            if other:
                other.commit()
            out.commit()
    return whole.report(
        options.calibrations,
        options.output,
        imatrix=options.imatrix,
        warnings=warnings,
        written=written,
        seconds=time.perf_counter() - started,
    )
