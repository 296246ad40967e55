"""One conversion: tiles encoded on all threads, hashed and written in order, tensors reported."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import __version__
from qconvert.encoding import RawEncoding, stored_size
from qconvert.errors import WeightError
from qconvert.files.atomic import AtomicOutput, AtomicSet, check_space
from qconvert.files.calibration import Calibration
from qconvert.files.gguf_writer import MetadataValue
from qconvert.files.imatrix import Imatrix
from qconvert.files.regular import file_sha256, utf8_name
from qconvert.floors import judge
from qconvert.geometry import TILE_VALUES, Tile
from qconvert.kernels.records import Encoded, ErrorSums
from qconvert.mapper import Mapper
from qconvert.model import Model, SourceFile
from qconvert.progress import Progress
from qconvert.ranges import default_method
from qconvert.report import QuantizedTensor, QuantizeReport
from qconvert.schemes import AffineScheme, CastScheme, GgmlScheme
from qconvert.stages.analyse import shares_parameters
from qconvert.stages.encoders import (
    AffineEncoder,
    CastEncoder,
    Encoder,
    GgmlEncoder,
    KeptEncoder,
    SharedEncoder,
    affine_encoder,
)
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import (
    MIN_VALUES,
    PlannedTensor,
    encoding_of,
)
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.sinks import (
    GgufSink,
    QblkSink,
    Sink,
    TensorTarget,
)

SMALL_TILES = 4  # tensors of at most so many tiles are analysed by one thread
NOTHING = Encoded()


@dataclass(frozen=True, slots=True)
class GgufTarget:
    """What goes into a GGUF file besides the tensors of the plan."""

    model: Model
    metadata: dict[str, MetadataValue]
    imatrix: Imatrix | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def planned_row(p: PlannedTensor) -> QuantizedTensor:
    tensor = p.tensor
    if isinstance(p.scheme, AffineScheme):
        nbytes = stored_size(encoding_of(p.scheme, tensor), tensor.shape)
    elif isinstance(p.scheme, GgmlScheme):
        nbytes = tensor.size // p.scheme.block * p.scheme.nbytes
    elif isinstance(p.scheme, CastScheme):
        nbytes = stored_size(RawEncoding(p.scheme.dtype), tensor.shape)
    else:
        nbytes = tensor.nbytes
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


def _run(task: _Task) -> tuple[_Task, Encoded]:
    return task, task.encoder.encode(task.tile)


class Job:
    """One conversion under way.

    Workers encode tiles, ahead of each other and across tensors; their results arrive in order on
    the main thread, which hashes and writes.

    Attributes:
        target: where the tensor under way is written.
        seen: what its pieces have told so far.
    """

    target: TensorTarget
    seen: Encoded

    def __init__(
        self,
        model: Model,
        plan: tuple[PlannedTensor, ...],
        options: QuantizeOptions,
        calibration: Calibration | None,
        gguf: GgufTarget | None,
        report: QuantizeReport,
        progress: Progress,
    ) -> None:
        self.model = model
        self.plan = plan
        self.options = options
        self.calibration = calibration
        self.gguf = gguf
        self.report = report
        self.progress = progress
        self.total = ErrorSums()

    def write(self, name: Path, outputs: list[tuple[Path, int]]) -> None:
        """Convert.

        Args:
            name: of the output, whole or in several files.
            outputs: these files, and how many tensors go into each.
        """
        sources = _source_paths(self.model)
        inputs = [self.model.path, *sources]
        inputs += [p for p in (self.options.calibration, self.options.gguf.imatrix) if p]
        paths = [path for path, _ in outputs]
        counts = [count for _, count in outputs]
        force = self.options.force
        with ExitStack() as stack:
            out: AtomicOutput | AtomicSet
            if len(paths) == 1:
                out = stack.enter_context(AtomicOutput(paths[0], overwrite=force, inputs=inputs))
            else:
                out = stack.enter_context(AtomicSet(name, paths, overwrite=force, inputs=inputs))
            check_space(paths[0], sum(planned_row(p).nbytes for p in self.plan))
            provenance = self._provenance(sources)
            sink: Sink
            if self.gguf:
                places = (out.path,) if isinstance(out, AtomicOutput) else out.paths
                sink = GgufSink(
                    *(paths[0], places, counts, self.gguf.metadata, self.plan, provenance)
                )
            else:
                assert isinstance(out, AtomicOutput)
                sink = QblkSink(out, self.model, self.plan, provenance)
            threads = self.options.threads or available_threads()
            self.progress.begin("quantize", self.report.source_bytes, "bytes")
            with closing(sink), Workers(threads) as workers:
                for task, piece in workers.map(_run, self._tasks(workers)):
                    self._take(task, piece, sink, workers)
                self.report.output_bytes = sink.finish()
            self.model.check_unchanged()
            if self.calibration:
                self.calibration.check_unchanged()
            self._judge()
            if self.options.strict and self.report.warnings:
                self.report.status = "fail"
                return  # and the outputs are gone
            self.report.written = True
            out.commit()
            self.progress.end()
        fill_totals(self.report, self.total)

    def _judge(self) -> None:
        """Warn of weights that are lost or poorer than they should be."""
        judged = judge([(t.name, t.stored, t.sqnr_db) for t in self.report.tensors if t.quantized])
        if judged.lost:
            worst, name = judged.figures[0]
            count = len(judged.lost)
            which = "1 tensor" if count == 1 else f"{count} tensors"
            self.report.warnings.append(
                f"the weights of {which} are lost: '{name}' is left with "
                f"{worst:.1f} dB; give them more bits with --tensor-scheme '{name}=NAME', or keep "
                f"them with --keep '{name}'"
            )
        if judged.warning:
            self.report.warnings.append(judged.warning)

    def _provenance(self, sources: list[Path]) -> dict[str, Any]:
        o = self.options
        used: dict[str, Any] = {"scheme": o.scheme.name}
        if self.options.range and any(isinstance(p.scheme, AffineScheme) for p in self.plan):
            used["range"] = self.options.range.describe()
        if not o.weighting:
            used["no_weighting"] = True
        if o.keep:
            used["keep"] = list(o.keep)
        if o.tensor_schemes:
            used["tensor_scheme"] = [f"{glob}={s.name}" for glob, s in o.tensor_schemes]
        if o.min_values != MIN_VALUES:
            used["min_values"] = o.min_values
        if o.allow_requantize:
            used["allow_requantize"] = True
        used |= _gguf_notes(o.gguf)
        found: dict[str, Any] = {
            "options": used,
            "sources": [_source_note(s) for s in self.model.sources],
            "tool": f"qconvert {__version__}",
        }
        if o.hash_source:
            for note, path in zip(found["sources"], sources, strict=True):
                note["sha256"] = file_sha256(path)
        if self.gguf and self.gguf.imatrix:
            found["imatrix"] = {"sha256": self.gguf.imatrix.sha256}
        if self.calibration:
            found["calibration"] = {
                "observer": self.calibration.observer,
                "sha256": self.calibration.sha256(),
            }
        return found

    # --- on the main thread, ahead of the work: encoders, and the tiles of all tensors in order ---

    def _tasks(self, workers: Workers) -> Iterator[_Task]:
        for p, encoder in self._encoders(workers):
            tiles = list(encoder.tiles())
            for i, tile in enumerate(tiles):
                yield _Task(p, encoder, tile, first=i == 0, last=i == len(tiles) - 1)

    def _encoders(self, workers: Workers) -> Iterator[tuple[PlannedTensor, Encoder]]:
        """Encoders of all tensors; those of the next few are prepared by the workers."""
        waiting: deque[tuple[PlannedTensor, Callable[[], Encoder]]] = deque()
        for p in self.plan:
            waiting.append((p, self._prepared(p, workers)))
            if len(waiting) > workers.threads:
                first, encoder = waiting.popleft()
                yield first, encoder()
        for p, encoder in waiting:
            yield p, encoder()

    def _prepared(self, p: PlannedTensor, workers: Workers) -> Callable[[], Encoder]:
        if isinstance(p.scheme, AffineScheme):
            encoding = encoding_of(p.scheme, p.tensor)
            large = p.tensor.size > SMALL_TILES * TILE_VALUES
            if shares_parameters(encoding) and large:  # several passes, for all threads together
                return partial(self._encoder, p, workers.map)
        return workers.submit(self._encoder, p).result

    def _encoder(self, p: PlannedTensor, mapper: Mapper = map) -> Encoder:
        if isinstance(p.scheme, AffineScheme):
            encoding = encoding_of(p.scheme, p.tensor)
            method = self.options.range or default_method(p.scheme.bits)
            squares = None
            if self.calibration and self.options.weighting:
                squares = self.calibration.mean_squares(p.tensor.name, encoding.row_length)
            return affine_encoder(
                *(self.model, p.tensor, encoding, p.scheme.symmetric, method, mapper, squares)
            )
        if isinstance(p.scheme, CastScheme):
            return CastEncoder(self.model, p.tensor, p.scheme)
        if isinstance(p.scheme, GgmlScheme):
            imatrix = self.gguf.imatrix if self.gguf else None
            importance = imatrix.find(p.tensor) if imatrix else None
            return GgmlEncoder(self.model, p.tensor, p.scheme, importance)
        return KeptEncoder(self.model, p.tensor)

    # --- on the main thread, behind the work: writing, in order ---

    def _take(self, task: _Task, piece: Encoded, sink: Sink, workers: Workers) -> None:
        if task.first:
            self.target = sink.begin(task.planned.tensor, task.encoder.encoding)
            self.seen = NOTHING
        self.target.append(piece.segments)
        self.seen += piece
        if not task.last:
            return
        encoder = task.encoder
        if isinstance(encoder, AffineEncoder):
            settled = encoder.settled(self.seen)
            if settled.encoding != encoder.encoding:
                self._again(settled, sink, workers)
            encoder = settled
        self._finish(task.planned, encoder)

    def _again(self, encoder: AffineEncoder, sink: Sink, workers: Workers) -> None:
        """Encode a tensor once more whose sample had suggested another encoding."""
        self.target.abandon()
        self.target = sink.begin(encoder.tensor, encoder.encoding)
        self.seen = NOTHING
        for piece in workers.map(encoder.encode, encoder.tiles()):
            self.target.append(piece.segments)
            self.seen += piece

    def _finish(self, p: PlannedTensor, encoder: Encoder) -> None:
        row = planned_row(p)
        self.report.tensors.append(row)
        self.progress.advance(p.tensor.nbytes, p.tensor.name)
        if isinstance(encoder, KeptEncoder):
            self.target.finish({"decision": {"rule": "kept", "reason": p.reason}})
            if self.seen.nonfinite:
                self.report.warnings.append(
                    f"kept tensor '{p.tensor.name}' has {self.seen.nonfinite:,} NaN or Inf values"
                )
            return
        error = self.seen.error
        if not np.isfinite(error.noise):
            raise WeightError(
                "weights near the end of the range of binary32 would decode to infinity",
                path=self.model.path,
                tensor=p.tensor.name,
                hint=f"keep the tensor with --keep '{p.tensor.name}'",
            )
        notes: dict[str, Any] = {"error": {"max": error.worst, "nmse": error.nmse}}
        if error.sqnr_db is not None:
            notes["error"]["sqnr_db"] = error.sqnr_db
        if isinstance(encoder, AffineEncoder | SharedEncoder):
            if isinstance(encoder, SharedEncoder):
                self.target.append(encoder.shared())
            row.stored = encoder.encoding.scheme
            row.nbytes = stored_size(encoder.encoding, p.tensor.shape)
            row.decision = notes["decision"] = encoder.notes(self.seen)
            row.clipped = notes["error"]["clipped"] = error.clipped
            row.weighted = encoder.weighted
            row.weighted_sqnr_db = error.weighted_sqnr_db
            if error.weighted_sqnr_db is not None and math.isfinite(error.weighted_sqnr_db):
                notes["error"]["weighted_sqnr_db"] = error.weighted_sqnr_db
        self.total += error
        row.sqnr_db, row.nmse, row.max_error = error.sqnr_db, error.nmse, error.worst
        row.bits_per_weight = 8 * row.nbytes / p.tensor.size
        if self.calibration and (found := self.calibration.find(p.tensor.name)):
            notes["activation"] = found.note(self.calibration.observer)
        self.target.finish(notes)


def _gguf_notes(o: GgufOptions) -> dict[str, Any]:
    """The options that decide about the bytes of a GGUF file, where they were given."""
    noted: dict[str, Any] = {
        "raw": o.raw,
        "pure": o.pure,
        "pre_tokenizer": o.pre_tokenizer,
        "output_tensor_type": o.output_type,
        "token_embedding_type": o.token_embedding_type,
        "tensor_type": [str(rule) for rule in o.tensor_types],
        "shard_size": o.shard_size,
    }
    return {k: v for k, v in noted.items() if v}


def _source_note(s: SourceFile) -> dict[str, Any]:
    return {"header_sha256": s.header_sha256, "name": utf8_name(Path(s.name)), "size": s.size}


def _source_paths(model: Model) -> list[Path]:
    if len(model.sources) == 1 and not model.path.is_dir():
        return [model.path]
    home = model.path if model.path.is_dir() else model.path.parent
    return [home / s.name for s in model.sources]
