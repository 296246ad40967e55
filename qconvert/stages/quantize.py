"""quantize: read a model tensor by tensor, choose, encode, write; the report says what became of
each.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import __version__, kernels
from qconvert.encoding import RawEncoding, stored_size
from qconvert.errors import UnsupportedError, UsageError, WeightError
from qconvert.files import open_model
from qconvert.files.atomic import AtomicOutput, check_space
from qconvert.files.calibration import Calibration, read_calibration
from qconvert.files.dequantized import dequantized
from qconvert.files.gguf_split import plan_shards, shard_path
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import MetadataValue, check_gguf
from qconvert.files.imatrix import Imatrix, read_imatrix
from qconvert.files.mean_squares import MeanSquares
from qconvert.files.qblk_writer import check_qblk
from qconvert.geometry import TILE_VALUES, Tile, row_length
from qconvert.mixes import MixOptions, TensorTypeRule, parse_mix
from qconvert.model import DTYPES, Model, SourceFile
from qconvert.progress import Progress, Silent
from qconvert.quantizers.affine import EncodedRows, ErrorSums
from qconvert.ranges import RangeMethod, default_method
from qconvert.report import QuantizedTensor, QuantizeReport
from qconvert.schemes import AffineScheme, CastScheme, GgmlScheme, MixScheme, Scheme
from qconvert.stages.analyse import Mapper, shares_parameters
from qconvert.stages.encoders import (
    NO_ZEROS,
    AffineEncoder,
    CastEncoder,
    Encoder,
    GgmlEncoder,
    KeptEncoder,
    Piece,
    SharedEncoder,
    add,
    affine_encoder,
)
from qconvert.stages.gguf_sources import as_gguf
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import (
    MIN_VALUES,
    PlannedTensor,
    PlanOptions,
    TensorScheme,
    check_container,
    encoding_of,
    make_plan,
    plan_mix,
)
from qconvert.stages.sinks import (
    GgufSink,
    QblkSink,
    Sink,
    TensorTarget,
    gguf_tensors,
    model_name,
)

SMALL_TILES = 4  # tensors of at most so many tiles are analysed by one thread
NOTHING = Piece(EncodedRows(b"", b"", NO_ZEROS, ErrorSums()))
SUFFIXES = {".qblk": "qblk", ".gguf": "gguf"}


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Options that only a GGUF file has; the command line's help describes each."""

    raw: bool = False
    pre_tokenizer: str | None = None
    pure: bool = False
    fallback: bool = True
    output_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[TensorTypeRule, ...] = ()
    imatrix: Path | None = None
    shard_size: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``qconvert quantize``; the command line's help describes each."""

    scheme: Scheme
    output: Path | None = None
    container: str | None = None
    range: RangeMethod | None = None
    calibration: Path | None = None
    weighting: bool = True
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    min_values: int = MIN_VALUES
    threads: int | None = None
    dry_run: bool = False
    force: bool = False
    hash_source: bool = False
    allow_requantize: bool = False
    gguf: GgufOptions = GgufOptions()


def quantize(
    source: Path, options: QuantizeOptions, progress: Progress | None = None
) -> QuantizeReport:
    """Convert a model.

    Raises:
        UsageError: options contradict each other or the model.
        InputError: the source or the calibration cannot be used.
        MachineError: the output cannot be written.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    names = kernels.describe()
    output, container = _output(source, options)
    if options.calibration is None and not options.weighting:
        raise UsageError(
            "--no-weighting without a calibration", hint="weights come with --calibration FILE"
        )
    opened = open_model(source)
    try:
        model = _plain(opened, options)
        calibration = read_calibration(options.calibration) if options.calibration else None
        plan, target = _plan(opened, model, options, container)
        model = target.model if target else model
        report = QuantizeReport(
            kernels=names,
            source=str(source),
            output=str(output),
            container=container,
            scheme=options.scheme.name,
            range=_range_text(options),
            dry_run=options.dry_run,
            tensors=[],
            source_bytes=sum(p.tensor.nbytes for p in plan),
            output_bytes=0,
            quantized_bits_per_weight=None,
            model_bits_per_weight=None,
            sqnr_db=None,
            calibration=options.calibration.name if options.calibration else None,
            companions=0,
        )
        if target:
            report.warnings += target.warnings
            report.notes += target.notes
        if calibration and container == "gguf":
            raise UsageError("--calibration has no place in a GGUF file", hint="write a .qblk file")
        _check_plan(model, plan, calibration, container)
        if options.range and not any(isinstance(p.scheme, AffineScheme) for p in plan):
            report.warnings.append("--range has no effect: no tensor takes a scheme with ranges")
        report.companions = len(model.companions) if container == "qblk" else 0
        outputs = _outputs(output, plan, options.gguf.shard_size)
        report.output = str(outputs[0][0])
        report.files = len(outputs)
        if options.dry_run:
            report.tensors = [_planned_row(p) for p in plan]
            report.output_bytes = sum(t.nbytes for t in report.tensors)
            if container == "qblk":
                report.output_bytes += sum(c.size for c in model.companions)
            _totals(report, ErrorSums())
        else:
            job = _Job(model, plan, options, calibration, target, report, progress)
            job.write(outputs)
    finally:
        opened.close()
    if calibration:
        unused = calibration.unused([p.tensor.name for p in plan if p.scheme])
        if unused:
            report.warnings.append(
                f"calibration has {len(unused)} layers that no quantized tensor uses, "
                f"such as '{unused[0]}'"
            )
    report.seconds = time.perf_counter() - started
    return report


@dataclass(frozen=True, slots=True)
class _GgufTarget:
    """What goes into a GGUF file besides the tensors of the plan."""

    model: Model
    metadata: dict[str, MetadataValue]
    imatrix: Imatrix | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def _plain(opened: Model, options: QuantizeOptions) -> Model:
    """The model with every tensor in a plain dtype.

    Raises:
        UsageError: it is quantized, and nobody said that it may be quantized again.
    """
    quantized = next((t for t in opened.tensors if t.dtype not in DTYPES), None)
    if quantized and not options.allow_requantize:
        raise UsageError(
            "the source is quantized already",
            tensor=quantized.name,
            found=quantized.dtype,
            hint="convert the original, or accept the loss with --allow-requantize",
        )
    return dequantized(opened)


def _plan(
    opened: Model, model: Model, options: QuantizeOptions, container: str
) -> tuple[tuple[PlannedTensor, ...], _GgufTarget | None]:
    """The plan, and what a GGUF file needs besides."""
    asked = PlanOptions(options.scheme, options.keep, options.tensor_schemes, options.min_values)
    o = options.gguf
    if container != "gguf":
        if o != GgufOptions():
            raise UsageError(
                "options of GGUF files have no place in a .qblk file", hint="write a .gguf file"
            )
        return make_plan(model.tensors, asked, container), None
    check_container(asked, container)
    source = as_gguf(
        opened, model, raw=o.raw, name=model_name(model.path), pre_tokenizer=o.pre_tokenizer
    )
    tensors = source.model.tensors
    imatrix = read_imatrix(o.imatrix) if o.imatrix else None
    keys: dict[str, MetadataValue] = {"general.quantization_version": 2}
    notes, warnings = [*source.notes], [*source.warnings]
    if source.facts is None:
        if replace(o, raw=False, shard_size=None, imatrix=None) != GgufOptions():
            raise UsageError(
                "a raw file has no architecture, to whose tensors the options of mixes apply",
                hint="choose types with --scheme, --tensor-scheme and --keep",
            )
        if isinstance(options.scheme, MixScheme):
            raise UsageError(
                f"{options.scheme.name} is a mix, which a raw file does not have",
                hint="choose a single type" + (", or leave out --raw" if o.raw else ""),
            )
        plan = make_plan(tensors, asked, container)
    else:
        mix = parse_mix(options.scheme.name)
        wanted = MixOptions(
            *(mix, o.pure, o.fallback, o.output_type, o.token_embedding_type, o.tensor_types),
            has_imatrix=imatrix is not None,
        )
        if isinstance(opened, AnyGgufModel):  # what has its type already stays bit for bit
            tensors = opened.tensors
        plan, fell_back = plan_mix(tensors, asked, wanted, source.facts)
        decoded = {t.name: t for t in source.model.tensors}
        plan = tuple(replace(p, tensor=decoded[p.tensor.name]) if p.scheme else p for p in plan)
        keys["general.file_type"] = mix.file_type
        if options.min_values != MIN_VALUES:
            warnings.append("--min-values has no effect: the mixes choose by name and shape")
        if fell_back:
            warnings.append(
                f"{fell_back} tensors take another type than {mix.name} gives them: their rows do "
                "not divide into its blocks"
            )
    weighted = [p.tensor for p in plan if isinstance(p.scheme, GgmlScheme)]
    if imatrix and not weighted:
        warnings.append("--imatrix has no effect: no tensor is quantized")
        imatrix = None
    if imatrix:
        fit = imatrix.check(weighted)
        keys |= imatrix.keys()
        notes += [f"no importance for '{name}': quantized unweighted" for name in fit.missing]
        names = {t.name for t in tensors}
        foreign = [name for name in fit.unused if name not in names]
        if foreign:
            warnings.append(
                f"the importance matrix has {len(foreign)} entries that no tensor has, "
                f"such as '{foreign[0]}': it may be of another model"
            )
    metadata = source.metadata | keys
    return plan, _GgufTarget(source.model, metadata, imatrix, tuple(warnings), tuple(notes))


def _output(source: Path, options: QuantizeOptions) -> tuple[Path, str]:
    """Where the result goes and in which container: by the suffix, unless said otherwise."""
    default = "gguf" if isinstance(options.scheme, GgmlScheme | MixScheme) else "qblk"
    output = options.output
    if output is None:
        container = options.container or default
        parent = source.parent if source.name not in ("", "..") else source.resolve().parent
        return parent / f"{model_name(source)}.{options.scheme.name}.{container}", container
    found = options.container or SUFFIXES.get(output.suffix.lower())
    if found is None:
        raise UsageError(
            f"cannot tell the container from the name '{output.name}'",
            wanted="a name that ends in .qblk or .gguf",
            hint="or say --format qblk or --format gguf",
        )
    return output, found


def _outputs(
    output: Path, plan: tuple[PlannedTensor, ...], shard_size: int | None
) -> list[tuple[Path, int]]:
    """The files to be written, and how many tensors go into each."""
    if shard_size is None:
        return [(output, len(plan))]
    counts = plan_shards(gguf_tensors(plan), shard_size)
    if len(counts) <= 1:
        return [(output, len(plan))]
    return [(shard_path(output, i, len(counts)), n) for i, n in enumerate(counts, 1)]


def _check_plan(
    model: Model, plan: tuple[PlannedTensor, ...], calibration: Calibration | None, container: str
) -> None:
    """Refuse before the long work what the container or the calibration does not fit."""
    if container == "gguf":
        check_gguf(gguf_tensors(plan))
    else:
        check_qblk(model.tensors, model.path)
    if calibration is None:
        return
    calibration.check_model(model)
    used = [p.tensor for p in plan if p.scheme and calibration.find(p.tensor.name)]
    if not used:
        raise UnsupportedError(
            "no layer of the calibration belongs to a tensor that is quantized",
            path=calibration.path,
            hint="calibrate with activations of this model",
        )
    for tensor in used:
        calibration.check(tensor.name, row_length(tensor.shape))


def _range_text(options: QuantizeOptions) -> str:
    """The range method of the main scheme; other schemes name theirs in their decisions."""
    if not isinstance(options.scheme, AffineScheme):
        return "none"
    return (options.range or default_method(options.scheme.bits)).describe()


def _planned_row(p: PlannedTensor) -> QuantizedTensor:
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


def _totals(report: QuantizeReport, error: ErrorSums) -> None:
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


def _run(task: _Task) -> tuple[_Task, Piece]:
    return task, task.encoder.encode(task.tile)


class _Job:
    """One conversion under way.

    Workers encode tiles, ahead of each other and across tensors; their results arrive in order on
    the main thread, which hashes and writes.

    Attributes:
        target: where the tensor under way is written.
        seen: what its pieces have told so far.
    """

    target: TensorTarget
    seen: Piece

    def __init__(
        self,
        model: Model,
        plan: tuple[PlannedTensor, ...],
        options: QuantizeOptions,
        calibration: Calibration | None,
        gguf: _GgufTarget | None,
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
        self.mean_squares: MeanSquares | None = None

    def write(self, outputs: list[tuple[Path, int]]) -> None:
        sources = _source_paths(self.model)
        inputs = [self.model.path, *sources]
        inputs += [p for p in (self.options.calibration, self.options.gguf.imatrix) if p]
        paths = [path for path, _ in outputs]
        counts = [count for _, count in outputs]
        with ExitStack() as stack:
            outs = [
                stack.enter_context(AtomicOutput(p, overwrite=self.options.force, inputs=inputs))
                for p in paths
            ]
            if self.options.calibration and self.options.weighting:
                self.mean_squares = stack.enter_context(
                    closing(MeanSquares(self.options.calibration))
                )
            check_space(paths[0], sum(_planned_row(p).nbytes for p in self.plan))
            provenance = self._provenance(sources)
            sink: Sink
            if self.gguf:
                sink = GgufSink(outs, counts, self.gguf.metadata, self.plan, provenance)
            else:
                sink = QblkSink(outs[0], self.model, self.plan, provenance)
            threads = self.options.threads or available_threads()
            self.progress.begin("quantize", self.report.source_bytes, "bytes")
            with closing(sink), Workers(threads) as workers:
                for task, piece in workers.map(_run, self._tasks(workers)):
                    self._take(task, piece, sink, workers)
                self.report.output_bytes = sink.finish()
            self.model.check_unchanged()
            if self.mean_squares:
                self.mean_squares.check_unchanged()
            for out in reversed(outs):  # the first, which names the others, comes last
                out.commit()
            self.progress.end()
        _totals(self.report, self.total)

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
                with path.open("rb") as f:
                    note["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
        if self.gguf and self.gguf.imatrix:
            found["imatrix"] = {"sha256": self.gguf.imatrix.sha256}
        if self.calibration:
            found["calibration"] = {
                "observer": self.calibration.observer,
                "sha256": self.calibration.sha256,
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
            if self.mean_squares:
                squares = self.mean_squares.find(p.tensor.name, encoding.row_length)
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

    def _take(self, task: _Task, piece: Piece, sink: Sink, workers: Workers) -> None:
        if task.first:
            self.target = sink.begin(task.planned.tensor, task.encoder.encoding)
            self.seen = NOTHING
        self.target.append(piece.rows)
        self.seen = add(self.seen, piece)
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
            self.target.append(piece.rows)
            self.seen = add(self.seen, piece)

    def _finish(self, p: PlannedTensor, encoder: Encoder) -> None:
        row = _planned_row(p)
        self.report.tensors.append(row)
        self.progress.advance(p.tensor.nbytes, p.tensor.name)
        if isinstance(encoder, KeptEncoder):
            self.target.finish({"decision": {"rule": "kept", "reason": p.reason}})
            if self.seen.nonfinite:
                self.report.warnings.append(
                    f"kept tensor '{p.tensor.name}' has {self.seen.nonfinite:,} NaN or Inf values"
                )
            return
        error = self.seen.rows.error
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
                self.target.append_shared(encoder.shared(), encoder.encoding)
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
    name = os.fsencode(s.name).decode("utf-8", "backslashreplace")  # a name need not be UTF-8
    return {"header_sha256": s.header_sha256, "name": name, "size": s.size}


def _source_paths(model: Model) -> list[Path]:
    if len(model.sources) == 1 and not model.path.is_dir():
        return [model.path]
    home = model.path if model.path.is_dir() else model.path.parent
    return [home / s.name for s in model.sources]
