"""One conversion: tiles encoded on all threads, hashed and written in order, tensors reported."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from qconvert import __version__
from qconvert.calibration.file import Calibration
from qconvert.codecs import codec_of
from qconvert.codecs.codec import Encoder, Facts
from qconvert.codecs.compensation import COMPENSATED, DAMPING, ROW_DAMPING
from qconvert.codecs.raw import KeptEncoder
from qconvert.errors import WeightError
from qconvert.files.adapters import adapter_sha256
from qconvert.files.atomic import AtomicDirectory, AtomicOutput, AtomicSet, check_space
from qconvert.files.regular import file_sha256, utf8_name
from qconvert.files.scratch import Scratch
from qconvert.floors import Measured, judge
from qconvert.geometry import TILE_VALUES, Tile, row_length
from qconvert.kernels.records import Encoded, ErrorSums
from qconvert.mapper import Mapper
from qconvert.model import Model, SourceFile
from qconvert.progress import Progress
from qconvert.quantities import counted
from qconvert.remedies import ADVISED, FINE_DB, keeping, remedy
from qconvert.report import QuantizedTensor, QuantizeReport
from qconvert.stages.ahead import Ahead
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import MIN_VALUES, PlannedTensor
from qconvert.stages.quantize_options import QuantizeOptions, RepairText
from qconvert.stages.rounding import Roundings
from qconvert.stages.target import Atomic, Prepared, Sink, TensorTarget

SMALL_TILES = 4  # tensors of at most so many tiles are analysed by one thread
NOTHING = Encoded()

FEW = 3  # tensors that are worth an option each


def planned_row(
    p: PlannedTensor, roundings: Roundings, nbytes: int | None = None
) -> QuantizedTensor:
    """What the report says of a tensor before it is converted; ``nbytes`` where they are known."""
    tensor = p.tensor
    nbytes = p.encoding.size(tensor.shape) if nbytes is None else nbytes
    rounding = roundings.of.get(tensor.name)
    return QuantizedTensor(
        name=tensor.name,
        shape=tensor.shape,
        source_dtype=tensor.dtype,
        stored=p.scheme.name if p.scheme else tensor.dtype,
        quantized=p.scheme is not None,
        reason=p.reason,
        source_nbytes=tensor.nbytes,
        nbytes=nbytes,
        bits_per_weight=8 * nbytes / tensor.size if tensor.size else None,
        rounding=rounding.method if rounding else None,
        rounding_reason=rounding.reason if rounding else None,
    )


def fill_totals(report: QuantizeReport, error: ErrorSums) -> None:
    report.quantized_bits_per_weight = _bits_per_weight([t for t in report.tensors if t.quantized])
    report.model_bits_per_weight = _bits_per_weight(report.tensors)
    report.sqnr_db = error.sqnr_db


def _bits_per_weight(tensors: list[QuantizedTensor]) -> float | None:
    weights = sum(math.prod(t.shape) for t in tensors)
    return 8 * sum(t.nbytes for t in tensors) / weights if weights else None


@dataclass(frozen=True, slots=True)
class _Task:
    """A tile to be encoded: the first and the last of a tensor open and close it."""

    planned: PlannedTensor
    encoder: Encoder
    tile: Tile
    first: bool
    last: bool


class Job:
    """One conversion under way.

    Workers encode tiles, ahead of each other and across tensors; their results arrive in order on
    the main thread, which hashes and writes.

    Args:
        plain: the source under its own names, to be run where that is asked for.

    Attributes:
        ahead: tensors that were encoded before the output was begun.
        sink: what the output is written by.
        target: where the tensor under way is written.
        seen: what its pieces have told so far.
    """

    sink: Sink
    target: TensorTarget
    seen: Encoded

    def __init__(
        self,
        prepared: Prepared,
        plain: Model,
        options: QuantizeOptions,
        calibration: Calibration | None,
        roundings: Roundings,
        report: QuantizeReport,
        progress: Progress,
    ) -> None:
        self.prepared = prepared
        self.model = prepared.model
        self.plain = plain
        self.options = options
        self.calibration = calibration
        self.roundings = roundings
        self.report = report
        self.progress = progress
        self.total = ErrorSums()
        self.measured: list[Measured] = []
        self.ahead = Ahead()

    def write(self, name: Path, *, interim: bool = False) -> None:
        """Convert; see `write_together`."""
        write_together([(self, name)], interim=interim)

    def output(self, name: Path, interim: bool) -> Atomic:
        """What is written to, before it has its name.

        Args:
            name: of the output, whole or in several files.
            interim: as of `AtomicOutput`.
        """
        inputs = [self.model.path, *_source_paths(self.model)]
        o = self.options
        inputs += [p for p in (o.calibration, o.gguf.imatrix, o.config) if p]
        texts = self.options.repair, self.options.finetune
        inputs += [given.text for given in texts if given]
        paths, force = self.prepared.outputs, self.options.force
        if self.prepared.directory:
            return AtomicDirectory(paths[0], overwrite=force, inputs=inputs)
        if len(paths) == 1:
            return AtomicOutput(paths[0], overwrite=force, inputs=inputs, interim=interim)
        return AtomicSet(name, paths, overwrite=force, inputs=inputs, interim=interim)

    @property
    def nbytes(self) -> int:
        """Of all tensors of the output."""
        return sum(p.encoding.size(p.tensor.shape) for p in self.prepared.plan)

    @property
    def source_nbytes(self) -> int:
        return sum(p.tensor.nbytes for p in self.prepared.plan)

    def begin(self, out: Atomic, threads: int, stack: ExitStack) -> None:
        """Do what comes before the first tensor."""
        if self.options.repair:
            scratch = stack.enter_context(Scratch(self.prepared.outputs[0]))
            self.ahead = self._repaired(self.options.repair, threads, scratch)
        self.report.notes += self.ahead.notes
        self.report.warnings += self.ahead.warnings
        provenance = self._provenance(_source_paths(self.model))
        self.sink = stack.enter_context(closing(self.prepared.sink(out, provenance)))

    def finish(self) -> bool:
        """Do what comes after the last tensor; whether the output is good enough for its name."""
        self.report.output_bytes = self.sink.finish()
        self.model.check_unchanged()
        if self.calibration:
            self.calibration.check_unchanged()
        self._judge()
        if self.options.strict and self.report.warnings:
            self.report.status = "fail"
            return False
        fill_totals(self.report, self.total)
        return True

    def run(self, task: _Task) -> Encoded:
        return self._encoded(task.encoder, task.tile)

    def _encoded(self, encoder: Encoder, tile: Tile) -> Encoded:
        with self.roundings.room(encoder.tensor.name):
            return encoder.encode(tile)

    def _repaired(self, text: RepairText, threads: int, scratch: Scratch) -> Ahead:
        """Encode tensors on the inputs that those before them give."""
        from qconvert.stages.repair import repaired  # 0.1 s

        return repaired(
            *(text, self.plain, self.prepared, self.roundings, self.progress),
            *(threads, scratch, self._facts),
        )

    def _judge(self) -> None:
        """Warn of weights that are lost, of a model that is broken, and of what is poorer than it
        should be.
        """
        kept = [p.tensor for p in self.prepared.plan if not p.scheme and p.tensor.floating]
        whole = [Measured(t.name, t.dtype, 16, None, t.size) for t in kept if len(t.shape) > 1]
        judged = judge([*self.measured, *whole], self._remedy)
        if judged.lost:
            worst, name = next(f for f in judged.figures if f[1] == judged.lost[0])
            few = len(judged.lost) <= FEW
            advice = f"{self._remedy(name, FINE_DB)}, or keep it with {keeping(name)}"
            self.report.warnings.append(
                f"the weights of {counted(len(judged.lost), 'tensor')} are lost: '{name}' is left "
                f"with {worst:.1f} dB; quantize again with "
                + (advice if few else f"--scheme {self._advised}, which has more bits for all")
            )
        if judged.broken:
            others = "".join(f"; {b.name} {b.sqnr_db:.1f} dB" for b in judged.broken[1:])
            self.report.warnings.append(
                f"the model is broken: {judged.broken[0]}{others}; take a scheme of more bits, "
                f"such as --scheme {self._advised}"
            )
        if judged.warning:
            self.report.warnings.append(judged.warning)

    @property
    def _advised(self) -> str:
        """A scheme of few bits that models are known to bear."""
        return ADVISED.get(self.report.container, "bf16")

    def _remedy(self, name: str, needed_db: float) -> str:
        """The option that gives a tensor so many dB."""
        row = next(t for t in self.report.tensors if t.name == name)
        columns = row_length(row.shape)
        return remedy(self.report.container, name, columns, row.bits_per_weight or 0.0, needed_db)

    def _provenance(self, sources: list[Path]) -> dict[str, Any]:
        o = self.options
        used: dict[str, Any] = {"budget": o.budget.name} if o.budget else {"scheme": o.scheme.name}
        if o.range and self.prepared.ranged:
            used["range"] = o.range.describe()
        if not o.weighting:
            used["no_weighting"] = True
        if o.rounding:
            used["rounding"] = o.rounding
        if not o.equalise:
            used["equalise"] = "off"
        if o.keep:
            used["keep"] = list(o.keep)
        if o.tensor_schemes:
            used["tensor_scheme"] = [f"{glob}={s.name}" for glob, s in o.tensor_schemes]
        if o.min_values != MIN_VALUES:
            used["min_values"] = o.min_values
        if o.allow_requantize:
            used["allow_requantize"] = True
        if o.exact:
            used["exact"] = True
        if o.adapter_only:
            used["adapter_only"] = True
        used |= self.prepared.options
        found: dict[str, Any] = {
            "options": used,
            "sources": [_source_note(s) for s in self.model.sources],
            "tool": f"qconvert {__version__}",
        }
        if o.hash_source:
            for note, path in zip(found["sources"], sources, strict=True):
                note["sha256"] = file_sha256(path)
        if o.adapter:
            found["adapter"] = {"name": utf8_name(o.adapter), "sha256": adapter_sha256(o.adapter)}
        found |= self.prepared.provenance
        if self.calibration:
            found["calibration"] = {
                "observer": self.calibration.observer,
                "sha256": self.calibration.sha256(),
            }
        if names := self.roundings.compensated:
            found["rounding"] = {"compensated": names, "damping": DAMPING}
            if swept := set(self.roundings.swept):
                by_row = [name for name in names if name not in swept]
                found["rounding"] |= {"by_row": by_row, "row_damping": ROW_DAMPING}
        return found | self.ahead.provenance

    # --- on the main thread, ahead of the work: encoders, and the tiles of all tensors in order ---

    def tasks(self, workers: Workers) -> Iterator[_Task]:
        for p, encoder in self._encoders(workers):
            tiles = list(encoder.tiles())
            for i, tile in enumerate(tiles):
                yield _Task(p, encoder, tile, first=i == 0, last=i == len(tiles) - 1)

    def _encoders(self, workers: Workers) -> Iterator[tuple[PlannedTensor, Encoder]]:
        """Encoders of all tensors; those of the next few are prepared by the workers."""
        waiting: deque[tuple[PlannedTensor, Callable[[], Encoder]]] = deque()
        for p in self.prepared.plan:
            waiting.append((p, self._prepared(p, workers)))
            if len(waiting) > workers.threads:
                first, encoder = waiting.popleft()
                yield first, encoder()
        for p, encoder in waiting:
            yield p, encoder()

    def _prepared(self, p: PlannedTensor, workers: Workers) -> Callable[[], Encoder]:
        large = p.tensor.size > SMALL_TILES * TILE_VALUES
        if p.scheme and large and codec_of(p.scheme).passes(p.scheme, p.tensor):
            return partial(self._encoder, p, workers, workers.map)  # for all threads together
        return workers.submit(partial(self._encoder, workers=workers), p).result

    def _encoder(self, p: PlannedTensor, workers: Workers, mapper: Mapper = map) -> Encoder:
        if p.scheme is None:
            return KeptEncoder(self.model, p.tensor, p.encoding)
        if p.tensor.name in self.ahead.encoders:
            return self.ahead.encoders[p.tensor.name]
        facts = self._facts(p, workers, mapper)
        return codec_of(p.scheme).encoder(self.model, p.tensor, p.scheme, facts)

    def _facts(self, p: PlannedTensor, workers: Workers, mapper: Mapper) -> Facts:
        calibration = self.calibration if self.options.weighting else None
        layer = self.roundings.layers.get(p.tensor.name)
        return Facts(
            self.options.range,
            partial(calibration.mean_squares, layer) if calibration and layer else lambda _: None,
            self.prepared.importance(p.tensor),
            self.roundings.rounder(p.tensor.name, workers.map),
            mapper,
            tables=True,
        )

    # --- on the main thread, behind the work: writing, in order ---

    def take(self, task: _Task, piece: Encoded, workers: Workers) -> None:
        if task.first:
            self.target = self.sink.begin(task.planned.tensor, task.encoder.encoding)
            self.seen = NOTHING
        self.target.append(piece.segments)
        self.seen += piece
        if not task.last:
            return
        encoder = task.encoder.settled(self.seen)
        if encoder.encoding != task.encoder.encoding:
            self._again(encoder, workers)
        self._finish(task.planned, encoder)

    def _again(self, encoder: Encoder, workers: Workers) -> None:
        """Encode a tensor once more whose sample had suggested another encoding."""
        self.target = self.sink.begin(encoder.tensor, encoder.encoding)
        self.seen = NOTHING
        for piece in workers.map(partial(self._encoded, encoder), encoder.tiles()):
            self.target.append(piece.segments)
            self.seen += piece

    def _finish(self, p: PlannedTensor, encoder: Encoder) -> None:
        row = planned_row(p, self.roundings)
        self.report.tensors.append(row)
        self.progress.advance(p.tensor.nbytes, p.tensor.name)
        self.target.append(encoder.shared())
        outcome, encoding = encoder.outcome(self.seen), encoder.encoding
        if outcome.warning:
            self.report.warnings.append(outcome.warning)
        error = outcome.error
        if error is None:
            said = outcome.decision or {}
            self.target.finish({"decision": {"rule": "kept", "reason": p.reason} | said})
            return
        if not np.isfinite(error.noise):
            raise WeightError(
                "weights near the end of the range of binary32 would decode to infinity",
                path=self.model.path,
                tensor=p.tensor.name,
                hint=f"keep the tensor with --keep '{p.tensor.name}'",
            )
        self.total += error
        row.stored, row.nbytes = encoding.name.lower(), encoding.size(p.tensor.shape)
        row.bits_per_weight = 8 * row.nbytes / p.tensor.size
        row.sqnr_db, row.nmse, row.max_error = error.sqnr_db, error.nmse, error.worst
        row.decision, row.clipped, row.weighted = (
            outcome.decision,
            outcome.clipped,
            outcome.weighted,
        )
        if outcome.weighted:
            row.weighted_sqnr_db = error.weighted_sqnr_db
        self.measured.append(
            Measured(
                *(row.name, row.stored, encoding.bits, row.sqnr_db, p.tensor.size),
                compensated=row.rounding == COMPENSATED,
                repaired=row.name in self.ahead.repaired,
            )
        )
        self.target.finish(self._notes(row))

    def _notes(self, row: QuantizedTensor) -> dict[str, Any]:
        """What the file says of a tensor, where it has a place for it."""
        found = {
            "max": row.max_error,
            "nmse": row.nmse,
            "sqnr_db": row.sqnr_db,
            "weighted_sqnr_db": row.weighted_sqnr_db,
            "clipped": row.clipped,
        }
        notes: dict[str, Any] = {
            "error": {k: v for k, v in found.items() if v is not None and math.isfinite(v)}
        }
        if row.decision is not None:
            notes["decision"] = row.decision
        if self.calibration and (layer := self.calibration.find(row.name)):
            notes["activation"] = layer.note(self.calibration.observer)
        return notes


def write_together(jobs: Sequence[tuple[Job, Path]], *, interim: bool = False) -> None:
    """Convert one source, or several times the same: tensor by tensor in turn, so that what the
    first reads from the disk the system still has in memory for the others.

    Outputs get their names when all are complete; those that ``--strict`` refuses get none.

    Args:
        jobs: and the names of their outputs, whole or in several files.
        interim: as of `AtomicOutput`.
    """
    first = jobs[0][0]
    with ExitStack() as stack:
        outs: list[Atomic] = []
        for job, name in jobs:
            outs.append(job.output(name, interim))
            stack.push(outs[-1])
        check_space(first.prepared.outputs[0], sum(job.nbytes for job, _ in jobs))
        threads = first.options.threads or available_threads()
        for (job, _), out in zip(jobs, outs, strict=True):
            job.begin(out, threads, stack)
        size = sum(job.source_nbytes for job, _ in jobs)
        first.progress.begin(_title([job.report for job, _ in jobs]), size, "bytes")
        if any(job.roundings.compensated for job, _ in jobs):
            # Or the bits of factors would depend on the number of BLAS's threads.
            stack.enter_context(threadpool_limits(1, "blas"))
        workers = stack.enter_context(Workers(threads))
        for job, task, piece in workers.map(_run, _in_turn([job for job, _ in jobs], workers)):
            job.take(task, piece, workers)
        good = [job.finish() for job, _ in jobs]
        for (job, _), out, named in zip(jobs, outs, good, strict=True):
            if named:
                job.report.written = True
                out.commit()
        first.progress.end()


def _run(item: tuple[Job, _Task]) -> tuple[Job, _Task, Encoded]:
    job, task = item
    return job, task, job.run(task)


def _in_turn(jobs: Sequence[Job], workers: Workers) -> Iterator[tuple[Job, _Task]]:
    """Tasks of all jobs, a tensor at a time of the job that is least far."""
    streams = {i: job.tasks(workers) for i, job in enumerate(jobs)}
    done = dict.fromkeys(streams, 0)
    while streams:
        i = min(streams, key=done.__getitem__)
        for task in streams[i]:
            yield jobs[i], task
            if task.last:
                done[i] += task.planned.tensor.nbytes
                break
        else:
            del streams[i]


def _title(reports: Sequence[QuantizeReport]) -> str:
    """Of the work, with what is expected of it where that is known."""
    if len(reports) > 1:
        return f"quantize, {len(reports)} schemes"
    kl = reports[0].prediction.kl if reports[0].prediction else None
    return "quantize" if kl is None else f"quantize, predicted divergence {kl:.3g} nats"


def _source_note(s: SourceFile) -> dict[str, Any]:
    return {"header_sha256": s.header_sha256, "name": utf8_name(Path(s.name)), "size": s.size}


def _source_paths(model: Model) -> list[Path]:
    if len(model.sources) == 1 and not model.path.is_dir():
        return [model.path]
    home = model.path if model.path.is_dir() else model.path.parent
    return [home / s.name for s in model.sources]
