"""calibrate --text: a model run over text, its linear layers observed as it runs.

The state lies beside the output after every few seconds; whatever ends the run, the same command
with ``--resume`` goes on from there, and gives the bytes of a run that was never interrupted.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qconvert import kernels
from qconvert.architectures import layer_places
from qconvert.errors import InputError, OutputExistsError, UnsupportedError, WeightError
from qconvert.files.atomic import AtomicOutput, machine_errors
from qconvert.files.calibration import TextRun, model_digest
from qconvert.files.safetensors import open_safetensors
from qconvert.files.scratch import Scratch
from qconvert.model import Model
from qconvert.observers.layer import LayerStatistics
from qconvert.observers.ranges import ObserverSettings
from qconvert.progress import Progress, Silent
from qconvert.report import CalibrateReport
from qconvert.running.hugging_face import Checkpoint, open_checkpoint
from qconvert.running.layers import embeddings, linear_layers, run_tokens, tables, watching
from qconvert.running.text import sentences, token_chunks
from qconvert.stages.calibrate import unreached_warnings, weight_norms
from qconvert.stages.collected import (
    STATISTICS_BYTES,
    Collected,
    file_sha256,
    model_warnings,
    observe,
    passes,
    read_collected,
    restored,
)
from qconvert.stages.importance import importance_bytes
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import no_matrix
from qconvert.stages.sources import examined

DEFAULT_SEQLEN = 256
SAVE_SECONDS = 10.0
SAVE_SHARE = 0.05  # of the time goes into saving, at most
RECORDED_ROWS = 64  # a layer
RECORD_FILE = "activations.safetensors"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Options of ``qconvert calibrate --text``; the command line's help describes each.

    Attributes:
        statistics_bytes: what the statistics of one pass over the text may take; layers beyond wait
            for another pass.
        save_seconds: at least so long between two saves of the state.
    """

    model: Path
    texts: tuple[Path, ...]
    output: Path
    settings: ObserverSettings = field(default_factory=ObserverSettings)
    seqlen: int = DEFAULT_SEQLEN
    nsamples: int | None = None
    seed: int = 0
    outputs: bool = False
    gram: bool = False
    resume: bool = False
    imatrix: Path | None = None
    record: Path | None = None
    threads: int | None = None
    force: bool = False
    statistics_bytes: int = STATISTICS_BYTES
    save_seconds: float = SAVE_SECONDS

    @property
    def state(self) -> Path:
        """Where an interrupted run leaves its state."""
        return self.output.with_name(self.output.name + ".partial")


def calibrate_text(options: TextOptions, progress: Progress | None = None) -> CalibrateReport:
    """Run the model over the text and write a calibration of its linear layers.

    Raises:
        InputError: model, tokenizer, text or state cannot be used.
        WeightError: an activation is NaN or Inf; the layer and the piece of text are named.
        MachineError: torch or transformers is not installed, or the output cannot be written.
        UsageError: an option out of range.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    options.settings.make()  # a wrong name costs no time
    _check_outputs(options)
    inputs = (options.model, *options.texts)
    with AtomicOutput(options.output, overwrite=options.force, inputs=inputs) as out:
        checkpoint = open_checkpoint(
            options.model, threads=options.threads or available_threads(), streamed=True
        )
        if options.imatrix:
            layer_places(checkpoint.config, options.model / "config.json")
        with ExitStack() as stack:
            model = stack.enter_context(open_safetensors(options.model))
            scratch = stack.enter_context(Scratch(options.output)) if options.gram else None
            run = _Run(options, checkpoint, model, scratch, progress)
            run.go()
            model.check_unchanged()
            found = run.found
            layers = {name: layer.calibration for name, layer in found.finished.items()}
            warnings = examined(model).warnings
            warnings += model_warnings(model, layers) if layers else []
            warnings += unreached_warnings(found.unreached)
            watched = set(layers) | set(found.unreached)
            warnings += _unwatched_warnings(model, watched, tables(checkpoint))
        if not layers:
            raise UnsupportedError("no linear layer was run", path=options.model)
        found.write(out)
        if options.imatrix:
            _write(options.imatrix, importance_bytes(found, options.model), options)
        record = _write_record(options, found) if options.record else None
        out.commit()
    options.state.unlink(missing_ok=True)
    assert found.run
    return CalibrateReport(
        kernels=kernels.describe(),
        inputs=[str(p) for p in options.texts],
        output=str(options.output),
        observer=options.settings.name,
        layers=found.rows(),
        chunks=found.run.chunks,
        tokens=found.run.tokens,
        resumed_at=run.resumed_at,
        unreached=found.unreached,
        imatrix=str(options.imatrix) if options.imatrix else None,
        record=str(record) if record else None,
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


class _Run:
    """One run: groups of layers, each over all pieces of text."""

    def __init__(
        self,
        options: TextOptions,
        checkpoint: Checkpoint,
        model: Model,
        scratch: Scratch | None,
        progress: Progress,
    ) -> None:
        self.options = options
        self.checkpoint = checkpoint
        self.model = model
        self.progress = progress
        self.pieces = _pieces(options, checkpoint)
        self.layers = linear_layers(
            checkpoint, model, {t.name for t in model.tensors if no_matrix(t)}
        )
        self.used: set[str] = set()  # multiplied in a way that shows no input
        sizes = {
            name: LayerStatistics.size(layer.features, outputs=options.outputs, gram=options.gram)
            for name, layer in self.layers.items()
        }
        self.groups = passes(sizes, options.statistics_bytes)
        self.chunk = 0
        tokens = sum(map(len, self.pieces))
        self.found = Collected(
            options.settings,
            inputs=[{"name": p.name, "sha256": file_sha256(p)} for p in options.texts],
            model=model_digest(model),
            run=TextRun(
                options.seqlen,
                options.nsamples,
                options.seed,
                chunks=len(self.pieces),
                done=0,
                tokens=tokens,
                groups=0,
            ),
            scratch=scratch,
            transposed={name for name, layer in self.layers.items() if layer.transposed},
        )
        self.resumed_at: int | None = None
        if options.resume:
            self.resumed_at = 0
            if options.state.exists():
                self._resume(read_collected(options.state, self.found.scratch))

    def go(self) -> None:
        """Run whatever has not been run yet."""
        run = self._text_run
        total = len(self.groups) * run.chunks
        self.progress.begin("calibrate", total, "pieces of text")
        self.progress.advance(run.groups * run.chunks + run.done)
        clock = _SaveClock(self.options.save_seconds)
        for k in range(run.groups, len(self.groups)):
            group = self.groups[k]
            statistics = self.found.layers
            for name in group:
                if name not in statistics:
                    statistics[name] = LayerStatistics(
                        self.layers[name].features,
                        self.options.settings,
                        self._norms(name),
                        gram=self.options.gram,
                    )
            watched = {name: self.layers[name] for name in group}
            outputs = self._output if self.options.outputs else None
            with watching(watched, self._input, outputs, self.used.add):
                for chunk in range(self._text_run.done, run.chunks):
                    self.chunk = chunk
                    run_tokens(self.checkpoint, self.pieces[chunk])
                    self.found.run = replace(self._text_run, done=chunk + 1)
                    self.progress.advance(1, f"piece {chunk + 1}")
                    if clock.due() and chunk + 1 < run.chunks:
                        self._save(clock)
            silent = [n for n in group if not statistics[n].channels.samples]
            unreached = [n for n in silent if n not in self.used]
            self.found.unreached = sorted({*self.found.unreached, *unreached})
            self.found.finish()
            last = k + 1 == len(self.groups)
            self.found.run = replace(self._text_run, groups=k + 1, done=run.chunks if last else 0)
        self.progress.end()

    def _norms(self, name: str) -> NDArray[np.float64] | None:
        layer = self.layers[name]
        return weight_norms(
            self.options.settings, self.model, name, layer.features, layer.transposed
        )

    @property
    def _text_run(self) -> TextRun:
        assert self.found.run
        return self.found.run

    def _input(self, name: str, rows: NDArray[np.float32]) -> None:
        self._check_finite(name, rows, "input")
        if not len(rows):
            return
        observe(self.found.layers[name], rows, name, self.options.model)
        if self.options.record:
            self._record(name, rows)

    def _output(self, name: str, rows: NDArray[np.float32]) -> None:
        self._check_finite(name, rows, "output")
        if len(rows):
            self.found.layers[name].update_output(rows)

    def _check_finite(self, name: str, rows: NDArray[np.float32], what: str) -> None:
        if not np.isfinite(rows).all():
            raise WeightError(
                f"the {what} of the layer is NaN or Inf",
                path=self.options.model,
                tensor=name,
                found=f"such a value in piece {self.chunk + 1} of the text",
                hint="the model or this text overflows; one such value would spoil every range",
                code="ACTIVATION-NONFINITE",
            )

    def _record(self, name: str, rows: NDArray[np.float32]) -> None:
        """Keep this piece's share of the rows, evenly spread over the text and over the piece."""
        pieces = len(self.pieces)
        share = (self.chunk + 1) * RECORDED_ROWS // pieces - self.chunk * RECORDED_ROWS // pieces
        kept = rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(np.intp)]
        before = self.found.recorded.get(name)
        self.found.recorded[name] = (
            kept.copy() if before is None else np.concatenate((before, kept))
        )

    def _save(self, clock: _SaveClock) -> None:
        started = time.perf_counter()
        with AtomicOutput(self.options.state, overwrite=True) as out:
            self.found.write_state(out)
            out.commit()
        clock.saved(time.perf_counter() - started)

    def _resume(self, state: Collected) -> None:
        """Take over a state that this very run has left."""
        mine, theirs = self._text_run, state.run
        outputs = any(layer.calibration.output for layer in state.finished.values())
        recorded = bool(state.recorded)
        for what, found, wanted in (
            ("model", state.model, self.found.model),
            ("text", state.inputs, self.found.inputs),
            ("observer", asdict(state.settings), asdict(self.options.settings)),
            ("--seqlen", theirs and theirs.seqlen, mine.seqlen),
            ("--nsamples", theirs and theirs.nsamples, mine.nsamples),
            ("--seed", theirs and theirs.seed, mine.seed),
            ("pieces of text", theirs and theirs.chunks, mine.chunks),
            ("--outputs", outputs, self.options.outputs),
            ("--gram", any(f.has_gram for f in state.finished.values()), self.options.gram),
            ("--record", recorded, self.options.record is not None),
        ):
            if found != wanted:
                raise InputError(
                    f"the state is of another run: {what}",
                    path=self.options.state,
                    found=found,
                    wanted=wanted,
                    hint="run with the same options, or start again without --resume",
                    code="CALIBRATION-RESUME",
                )
        assert theirs
        done = {name for group in self.groups[: theirs.groups] for name in group}
        for name, layer in state.finished.items():
            if name in done:
                self.found.finished[name] = layer
            else:
                self.found.layers[name] = restored(layer, self.options.settings, self._norms(name))
        self.found.run = replace(mine, done=theirs.done, groups=theirs.groups)
        self.found.unreached = state.unreached
        self.found.recorded = state.recorded
        self.resumed_at = theirs.groups * theirs.chunks + theirs.done


class _SaveClock:
    """When to save: not too often, and never more than a small share of the time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.next = time.perf_counter() + seconds

    def due(self) -> bool:
        return time.perf_counter() >= self.next

    def saved(self, cost: float) -> None:
        wait = max(self.seconds, cost / SAVE_SHARE) if self.seconds else 0.0
        self.next = time.perf_counter() + wait


def _pieces(options: TextOptions, checkpoint: Checkpoint) -> list[NDArray[np.int64]]:
    """Windows or lines of all texts, checked against the model."""
    longest = checkpoint.config.get("max_position_embeddings")
    if isinstance(longest, int) and options.seqlen > longest:
        raise UnsupportedError(
            "the model does not take windows that long",
            path=options.model,
            found=f"--seqlen {options.seqlen:,}",
            wanted=f"at most {longest:,}",
            code="TEXT-SEQLEN",
        )
    cut = token_chunks if checkpoint.kind == "causal" else sentences
    pieces = [
        piece
        for text in options.texts
        for piece in cut(checkpoint.tokenizer, text, options.seqlen, options.nsamples, options.seed)
    ]
    known = embeddings(checkpoint)
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= known:
        raise UnsupportedError(
            "the tokenizer is of another model",
            path=options.model,
            found=f"token {largest:,}",
            wanted=f"below {known:,}, the size of the embedding",
            code="HF-VOCABULARY",
        )
    return pieces


def _check_outputs(options: TextOptions) -> None:
    """Refuse before the long work what would be refused after it."""
    record = options.record / RECORD_FILE if options.record else None
    for path in (options.imatrix, record):
        if path is not None and path.exists() and not options.force:
            raise OutputExistsError("the output exists", path=path, hint="replace it with --force")
    if options.state.exists() and not (options.resume or options.force):
        raise OutputExistsError(
            "an interrupted run has left its state",
            path=options.state,
            hint="go on with --resume, or start again with --force",
            code="CALIBRATION-STATE",
        )


def _unwatched_warnings(model: Model, watched: set[str], looked_up: set[str]) -> list[str]:
    """Matrices, embeddings aside, that no linear layer of the running model has as its weight."""
    others = [
        t.name
        for t in model.tensors
        if t.floating
        and len(t.shape) >= 2
        and not no_matrix(t)
        and t.name not in looked_up
        and t.name.removesuffix(".weight") not in watched
    ]
    strange = [name for name in others if "embed" not in name]
    if not strange:
        return []
    return [
        f"{len(strange)} matrices are no linear layers of the running model and were not observed, "
        f"such as '{strange[0]}'"
    ]


def _write(path: Path, data: bytes, options: TextOptions) -> None:
    with AtomicOutput(path, overwrite=options.force, inputs=(options.model,)) as out:
        out.write_at(0, data)
        out.commit()


def _write_record(options: TextOptions, found: Collected) -> Path:
    assert options.record
    with machine_errors(options.record):
        options.record.mkdir(parents=True, exist_ok=True)
    path = options.record / RECORD_FILE
    _write(path, save(dict(sorted(found.recorded.items()))), options)
    return path
