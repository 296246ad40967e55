"""calibrate --text: a model run over text, its linear layers observed as it runs.

What was done so far lies beside the output, see `qconvert.files.saved_state`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qconvert.architectures import layer_places
from qconvert.calibration.collected import (
    STATISTICS_BYTES,
    Collected,
    features_of,
    file_note,
    gram_limits,
    model_warnings,
    observe,
    passes,
    read_collected,
    restored,
    unreached_warnings,
)
from qconvert.calibration.column_norms import weight_norms
from qconvert.calibration.digest import model_digest
from qconvert.calibration.document import TextRun
from qconvert.calibration.fisher import (
    LOOKUP,
    MOST_OUTPUTS,
    PRODUCT,
    FisherStatistics,
    UseStatistics,
)
from qconvert.calibration.importance import importance_bytes
from qconvert.calibration.layer import LayerStatistics
from qconvert.calibration.observers import ObserverSettings
from qconvert.calibration.same_run import check_same_run
from qconvert.errors import UnsupportedError, WeightError
from qconvert.files.atomic import AtomicOutput, machine_errors
from qconvert.files.dequantized import dequantized
from qconvert.files.exchange import open_weights
from qconvert.files.saved_state import SAVE_SECONDS, SavedState, state_path
from qconvert.files.scratch import Scratch
from qconvert.model import Model, layer_name
from qconvert.progress import Progress, Silent
from qconvert.report import CalibratedFisher, CalibrateReport
from qconvert.running.device import CPU, chosen_device
from qconvert.running.gradients import (
    recomputed_blocks,
    run_sampled,
    token_tables,
    watching_gradients,
)
from qconvert.running.hugging_face import Checkpoint, require
from qconvert.running.layers import embeddings, linear_layers, run_tokens, tables, watching
from qconvert.running.quantized_model import open_source
from qconvert.running.text import DEFAULT_SEQLEN, sentences, token_chunks
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import no_matrix
from qconvert.stages.sources import examined

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
    fisher: bool = False
    resume: bool = False
    imatrix: Path | None = None
    record: Path | None = None
    threads: int | None = None
    device: str = CPU
    force: bool = False
    strict: bool = False
    statistics_bytes: int = STATISTICS_BYTES
    save_seconds: float = SAVE_SECONDS

    @property
    def state(self) -> Path:
        """Where an interrupted run leaves its state."""
        return state_path(self.output)


def calibrate_text(options: TextOptions, progress: Progress | None = None) -> CalibrateReport:
    """Run the model over the text and write a calibration of its linear layers.

    Raises:
        InputError: model, tokenizer, text or state cannot be used.
        WeightError: an activation is NaN or Inf; the layer and the piece of text are named.
        MachineError: torch or transformers is not installed, or the output cannot be written.
        UsageError: an option out of range.
        Stopped: a signal arrived; what was done so far is kept.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    options.settings.make()  # a wrong name costs no time
    inputs = (options.model, *options.texts)
    state = SavedState(options.output, inputs, "pieces of text", options.save_seconds)
    state.check(resume=options.resume, force=options.force)
    with ExitStack() as stack:

        def opened(path: Path) -> AtomicOutput:
            out = AtomicOutput(path, overwrite=options.force, inputs=inputs)
            return stack.enter_context(out)

        out = opened(options.output)
        imatrix = opened(options.imatrix) if options.imatrix else None
        record = opened(_record_file(options.record)) if options.record else None
        require("torch", "transformers", progress=progress)
        device = chosen_device(options.device)
        threads = options.threads or available_threads()
        checkpoint = open_source(options.model, threads=threads, streamed=True, device=device)
        if options.imatrix:
            layer_places(checkpoint.config, options.model / "config.json")
        opened_model = stack.enter_context(open_weights(options.model))
        model = dequantized(opened_model)
        if options.fisher and checkpoint.kind != "causal":
            raise UnsupportedError(
                "the Fisher information is that of next tokens, of which an encoder has none",
                path=options.model,
                hint="calibrate without --fisher",
                code="FISHER-ENCODER",
            )
        scratch = stack.enter_context(Scratch(options.output)) if options.gram else None
        run = _Run(options, checkpoint, model, scratch, state, progress)
        with state.kept():
            run.go()
            model.check_unchanged()
            found = run.found
            features = features_of(found.finished)
            if not features:
                raise UnsupportedError("no linear layer was run", path=options.model)
            warnings = [*examined(opened_model).warnings]
            warnings += model_warnings(model, features, found.transposed)
            warnings += unreached_warnings(found.unreached)
            watched = set(features) | set(found.unreached)
            warnings += _unwatched_warnings(model, watched, tables(checkpoint))
            warnings += _fisher_warnings(found.lacking)
            state.between(found)
            found.write(out)
            if imatrix:
                imatrix.write_at(0, importance_bytes(found, options.model))
            if record:
                record.write_at(0, save(dict(sorted(found.recorded.items()))))
            written = not (options.strict and warnings)
            if written:
                for other in filter(None, (imatrix, record, out)):
                    other.commit()
            state.remove()
    report = found.report(
        options.texts,
        options.output,
        imatrix=options.imatrix,
        record=record.target if record else None,
        resumed_at=run.resumed_at,
        warnings=warnings,
        written=written,
        seconds=time.perf_counter() - started,
    )
    report.device = device
    report.fisher = run.fisher_report()
    return report


class _Run:
    """One run: groups of layers, each over all pieces of text."""

    def __init__(
        self,
        options: TextOptions,
        checkpoint: Checkpoint,
        model: Model,
        scratch: Scratch | None,
        state: SavedState,
        progress: Progress,
    ) -> None:
        self.options = options
        self.checkpoint = checkpoint
        self.model = model
        self.state = state
        self.progress = progress
        self.pieces = text_pieces(
            *(checkpoint, options.texts, options.seqlen, options.nsamples, options.seed)
        )
        self.layers = linear_layers(
            checkpoint, model, {t.name for t in model.tensors if no_matrix(t)}
        )
        self.used: set[str] = set()  # multiplied in a way that shows no input
        self.backward = False  # whether the backward pass is under way, and runs blocks once more
        self.blocks = 0  # that keep nothing but their input until then
        self.shapes = {
            layer_name(t.name): (t.shape[0], t.shape[1]) for t in model.tensors if len(t.shape) == 2
        }
        self.tables = token_tables(checkpoint, model) if options.fisher else {}
        sizes = {
            name: LayerStatistics.size(layer.features, outputs=options.outputs, gram=options.gram)
            for name, layer in self.layers.items()
        }
        if options.fisher:
            for name in (*self.layers, *self.tables.values()):
                more = UseStatistics.size(*self._matrix(name), grams=options.gram)
                sizes[name] = sizes.get(name, 0) + more
        self.groups = passes(sizes, options.statistics_bytes)
        self.chunk = 0
        tokens = sum(map(len, self.pieces))
        self.found = Collected(
            options.settings,
            inputs=[file_note(path) for path in options.texts],
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
            labels=tokens if options.fisher else None,
        )
        self.resumed_at: int | None = None
        if options.resume:
            self.resumed_at = 0
            if state.path.exists():
                self._resume(read_collected(state.path, self.found.scratch))

    def go(self) -> None:
        """Run whatever has not been run yet."""
        run = self._text_run
        total = len(self.groups) * run.chunks
        self.progress.begin("calibrate", total, "pieces of text")
        self.progress.advance(run.groups * run.chunks + run.done)
        for k in range(run.groups, len(self.groups)):
            group = self.groups[k]
            self._begin(group)
            layers = [name for name in group if name in self.layers]
            with self._watching(group):
                for chunk in range(self._text_run.done, run.chunks):
                    self.chunk = chunk
                    self._run_piece(self.pieces[chunk])
                    self.found.run = replace(self._text_run, done=chunk + 1)
                    self.progress.advance(1, f"piece {chunk + 1}")
                    self.state.between(self.found)
            silent = [n for n in layers if not self.found.layers[n].channels.samples]
            unreached = [n for n in silent if n not in self.used]
            self.found.unreached = sorted({*self.found.unreached, *unreached})
            self._note_lacking(group)
            self.found.finish(self.state.between)
            last = k + 1 == len(self.groups)
            self.found.run = replace(self._text_run, groups=k + 1, done=run.chunks if last else 0)
        self.progress.end()

    def _begin(self, group: list[str]) -> None:
        """Statistics of the layers and tables of a group, where none were taken over."""
        found = self.found
        for name in group:
            if name in self.layers and name not in found.layers and name not in found.finished:
                found.layers[name] = LayerStatistics(
                    self.layers[name].features,
                    self.options.settings,
                    self._norms(name),
                    gram=self.options.gram,
                )
            if self.options.fisher and name not in found.informing and name not in found.informed:
                found.informing[name] = FisherStatistics(
                    *self._matrix(name), grams=self.options.gram
                )

    @contextmanager
    def _watching(self, group: list[str]) -> Iterator[None]:
        """See what enters the layers of a group, and gradients where they are wanted."""
        watched = {name: self.layers[name] for name in group if name in self.layers}
        outputs = self._output if self.options.outputs else None
        with ExitStack() as stack:
            stack.enter_context(watching(watched, self._input, outputs, self.used.add))
            if self.options.fisher:
                heights = {name: self._matrix(name)[0] for name in watched}
                tables = {at: name for at, name in self.tables.items() if name in group}
                mode = stack.enter_context(
                    watching_gradients(watched, heights, tables, self._gradient, self._lookup)
                )
                self.blocks = stack.enter_context(recomputed_blocks(self.checkpoint, mode))
            yield

    def _run_piece(self, tokens: NDArray[np.int64]) -> None:
        if not self.options.fisher:
            run_tokens(self.checkpoint, tokens)
            return
        try:
            run_sampled(self.checkpoint, tokens, self.options.seed, self._turn)
        finally:
            self.backward = False

    def _turn(self) -> None:
        self.backward = True

    def _note_lacking(self, group: list[str]) -> None:
        """Layers that tokens came through, but no gradient."""
        if self.options.fisher:
            reached = [n for n in group if n not in self.found.unreached]
            lacking = [n for n in reached if not self.found.informing[n].uses]
            self.found.lacking = sorted({*self.found.lacking, *lacking})

    def _matrix(self, name: str) -> tuple[int, int]:
        """Outputs and inputs of a layer, or rows and width of a table."""
        rows, columns = self.shapes[name]
        transposed = name in self.layers and self.layers[name].transposed
        return (columns, rows) if transposed else (rows, columns)

    def fisher_report(self) -> CalibratedFisher | None:
        """How the Fisher information was taken."""
        found = self.found
        if found.labels is None:
            return None
        high = [n for n, m in found.informed.items() if m.shape[0] > MOST_OUTPUTS]
        return CalibratedFisher(
            labels=found.labels,
            seed=self.options.seed,
            matrices=len(found.informed),
            lacking=found.lacking,
            gram=self.options.gram,
            without_output=high if self.options.gram else [],
            passes=len(self.groups),
            blocks=self.blocks,
        )

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
        if self.backward:
            return
        self._check_finite(name, rows, "input")
        if not len(rows):
            return
        observe(self.found.layers[name], rows, name, self.options.model)
        if self.options.record:
            self._record(name, rows)

    def _output(self, name: str, rows: NDArray[np.float32]) -> None:
        if self.backward:
            return
        self._check_finite(name, rows, "output")
        if len(rows):
            self.found.layers[name].update_output(rows)

    def _gradient(self, name: str, x: NDArray[np.float32], g: NDArray[np.float32]) -> None:
        """Input and gradient of a layer of the group."""
        self._check_finite(name, g, "gradient by the output")
        if len(x):
            with gram_limits(name, self.options.model):
                self.found.informing[name].of(PRODUCT).update(x, g)

    def _lookup(self, name: str, ids: NDArray[np.int64], g: NDArray[np.float32]) -> None:
        """Rows looked up in a table of the group, and the gradients by them."""
        self._check_finite(name, g, "gradient by the output")
        with gram_limits(name, self.options.model):
            self.found.informing[name].of(LOOKUP).update_lookup(ids, g)

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

    def _resume(self, state: Collected) -> None:
        """Take over a state that this very run has left."""
        outputs = any(layer.calibration.output for layer in state.finished.values())
        gram = any(layer.has_gram for layer in state.finished.values())
        theirs = check_same_run(
            self.state,
            state,
            self.found,
            {
                "--outputs": (outputs, self.options.outputs),
                "--gram": (gram, self.options.gram),
                "--fisher": (state.labels is not None, self.options.fisher),
                "--record": (bool(state.recorded), self.options.record is not None),
            },
        )
        done = {name for group in self.groups[: theirs.groups] for name in group}
        for name, layer in state.finished.items():
            if name in done:
                self.found.finished[name] = layer
            else:
                self.found.layers[name] = restored(layer, self.options.settings, self._norms(name))
        for name, matrix in state.informed.items():
            if name in done:
                self.found.informed[name] = matrix
            else:
                self.found.informing[name] = matrix.restored()
        self.found.lacking = state.lacking
        self.found.run = replace(self._text_run, done=theirs.done, groups=theirs.groups)
        self.found.unreached = state.unreached
        self.found.recorded = state.recorded
        self.resumed_at = theirs.groups * theirs.chunks + theirs.done


def text_pieces(
    checkpoint: Checkpoint,
    texts: Iterable[Path],
    seqlen: int,
    nsamples: int | None = None,
    seed: int = 0,
) -> list[NDArray[np.int64]]:
    """Windows or lines of all texts, checked against the model.

    Args:
        seqlen, nsamples, seed: see `token_chunks`.

    Raises:
        UnsupportedError: windows longer than the model takes, or a tokenizer of another model.
        UsageError, InputError: see `token_chunks`.
    """
    longest = checkpoint.text.get("max_position_embeddings")
    if isinstance(longest, int) and seqlen > longest:
        raise UnsupportedError(
            "the model does not take windows that long",
            path=checkpoint.path,
            found=f"--seqlen {seqlen:,}",
            wanted=f"at most {longest:,}",
            code="TEXT-SEQLEN",
        )
    cut = token_chunks if checkpoint.kind == "causal" else sentences
    pieces = [
        piece for text in texts for piece in cut(checkpoint.tokenizer, text, seqlen, nsamples, seed)
    ]
    known = embeddings(checkpoint)
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= known:
        raise UnsupportedError(
            "the tokenizer is of another model",
            path=checkpoint.path,
            found=f"token {largest:,}",
            wanted=f"below {known:,}, the size of the embedding",
            code="HF-VOCABULARY",
        )
    return pieces


def _fisher_warnings(lacking: list[str]) -> list[str]:
    """Layers whose gradient was not to be had, as a warning."""
    if not lacking:
        return []
    return [
        f"no gradient came through {len(lacking)} matrices, such as '{lacking[0]}': how much "
        "their errors matter is not in the calibration"
    ]


def _unwatched_warnings(model: Model, watched: set[str], looked_up: set[str]) -> list[str]:
    """Matrices, embeddings aside, that no linear layer of the running model has as its weight."""
    others = [
        t.name
        for t in model.tensors
        if t.floating
        and len(t.shape) >= 2
        and not no_matrix(t)
        and t.name not in looked_up
        and layer_name(t.name) not in watched
    ]
    strange = [name for name in others if "embed" not in name]
    if not strange:
        return []
    return [
        f"{len(strange)} matrices are no linear layers of the running model and were not observed, "
        f"such as '{strange[0]}'"
    ]


def _record_file(directory: Path) -> Path:
    """The file in the directory of ``--record``, which is made."""
    with machine_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return directory / RECORD_FILE
