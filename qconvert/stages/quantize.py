"""quantize: read a model tensor by tensor, choose, encode, write; the report says what became of
each.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import __version__, kernels
from qconvert.encoding import Encoding, RawEncoding, stored_size
from qconvert.errors import InputError, UnsupportedError, UsageError, WeightError
from qconvert.files import open_model
from qconvert.files.atomic import AtomicOutput, check_space
from qconvert.files.calibration import Calibration, read_calibration
from qconvert.files.gguf_writer import check_gguf
from qconvert.files.qblk_writer import check_qblk
from qconvert.geometry import TILE_VALUES, row_length, tiles
from qconvert.model import Model, SourceFile
from qconvert.progress import Progress, Silent
from qconvert.quantizers.affine import ErrorSums
from qconvert.ranges import RangeMethod, default_method
from qconvert.report import QuantizedTensor, QuantizeReport
from qconvert.schemes import AffineScheme, CastScheme, GgmlScheme, Scheme
from qconvert.stages.analyse import Analysis, Mapper, analyse, observe_tensor
from qconvert.stages.decide import decision_notes
from qconvert.stages.encoders import affine_encoder, cast_encoder, ggml_encoder
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import MIN_VALUES, PlannedTensor, PlanOptions, encoding_of, make_plan
from qconvert.stages.sinks import GgufSink, QblkSink, Sink, gguf_tensors, model_name

KEEP_CHUNK = 1 << 22  # bytes of a kept tensor that are copied at once
SMALL_TILES = 4  # tensors of at most so many tiles are analysed ahead as one piece of work
SUFFIXES = {".qblk": "qblk", ".gguf": "gguf"}


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``qconvert quantize``; the command line's help describes each."""

    scheme: Scheme
    output: Path | None = None
    container: str | None = None
    range: RangeMethod | None = None
    calibration: Path | None = None
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, Scheme], ...] = ()
    min_values: int = MIN_VALUES
    threads: int | None = None
    dry_run: bool = False
    force: bool = False
    hash_source: bool = False


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
    model = open_model(source)
    try:
        if model.kind != "safetensors":
            raise InputError(
                f"a {model.kind} file as source is not supported yet",
                path=source,
                wanted="a safetensors file or directory",
            )
        calibration = read_calibration(options.calibration) if options.calibration else None
        plan = make_plan(
            model.tensors,
            PlanOptions(options.scheme, options.keep, options.tensor_schemes, options.min_values),
            container,
        )
        report = QuantizeReport(
            kernels=names,
            source=str(source),
            output=str(output),
            container=container,
            scheme=options.scheme.name,
            range=_range_text(options),
            dry_run=options.dry_run,
            tensors=[],
            source_bytes=sum(t.nbytes for t in model.tensors),
            output_bytes=0,
            quantized_bits_per_weight=None,
            model_bits_per_weight=None,
            sqnr_db=None,
            calibration=options.calibration.name if options.calibration else None,
            companions=0,
        )
        if calibration and container == "gguf":
            raise UsageError("--calibration has no place in a GGUF file", hint="write a .qblk file")
        _check_plan(model, plan, calibration, container)
        if options.range and not any(isinstance(p.scheme, AffineScheme) for p in plan):
            report.warnings.append("--range has no effect: no tensor takes a scheme with ranges")
        report.companions = len(model.companions) if container == "qblk" else 0
        if options.dry_run:
            report.tensors = [_planned_row(p) for p in plan]
            report.output_bytes = sum(t.nbytes for t in report.tensors)
            if container == "qblk":
                report.output_bytes += sum(path.stat().st_size for path in model.companions)
            _totals(report, ErrorSums())
        else:
            job = _Job(model, plan, options, calibration, report, progress)
            job.write(output, container)
    finally:
        model.close()
    if calibration:
        unused = calibration.unused([p.tensor.name for p in plan if p.scheme])
        if unused:
            report.warnings.append(
                f"calibration has {len(unused)} layers that no quantized tensor uses, "
                f"such as '{unused[0]}'"
            )
    report.seconds = time.perf_counter() - started
    return report


def _output(source: Path, options: QuantizeOptions) -> tuple[Path, str]:
    """Where the result goes and in which container: by the suffix, unless said otherwise."""
    default = "gguf" if isinstance(options.scheme, GgmlScheme) else "qblk"
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


class _Job:
    """One conversion under way."""

    def __init__(
        self,
        model: Model,
        plan: tuple[PlannedTensor, ...],
        options: QuantizeOptions,
        calibration: Calibration | None,
        report: QuantizeReport,
        progress: Progress,
    ) -> None:
        self.model = model
        self.plan = plan
        self.options = options
        self.calibration = calibration
        self.report = report
        self.progress = progress
        self.total = ErrorSums()

    def write(self, output: Path, container: str) -> None:
        sources = _source_paths(self.model)
        inputs = [self.model.path, *sources]
        if self.options.calibration:
            inputs.append(self.options.calibration)
        with AtomicOutput(output, overwrite=self.options.force, inputs=inputs) as out:
            check_space(output, sum(_planned_row(p).nbytes for p in self.plan))
            provenance = self._provenance(sources)
            sink: Sink
            if container == "gguf":
                sink = GgufSink(out, self.model, self.plan, provenance)
            else:
                sink = QblkSink(out, self.model, self.plan, provenance)
            threads = self.options.threads or available_threads()
            self.progress.begin("quantize", self.report.source_bytes, "bytes")
            with closing(sink), Workers(threads) as workers:
                for planned, analysis in self._analysed(workers):
                    self._one(planned, analysis, sink, workers)
                    self.progress.advance(planned.tensor.nbytes, planned.tensor.name)
                self.report.output_bytes = sink.finish()
            self.model.check_unchanged()
            out.commit()
            self.progress.end()
        _totals(self.report, self.total)

    def _provenance(self, sources: list[Path]) -> dict[str, Any]:
        o = self.options
        used: dict[str, Any] = {"scheme": o.scheme.name}
        if self.options.range and any(isinstance(p.scheme, AffineScheme) for p in self.plan):
            used["range"] = self.options.range.describe()
        if o.keep:
            used["keep"] = list(o.keep)
        if o.tensor_schemes:
            used["tensor_scheme"] = [f"{glob}={s.name}" for glob, s in o.tensor_schemes]
        if o.min_values != MIN_VALUES:
            used["min_values"] = o.min_values
        found: dict[str, Any] = {
            "options": used,
            "sources": [_source_note(s) for s in self.model.sources],
            "tool": f"qconvert {__version__}",
        }
        if o.hash_source:
            for note, path in zip(found["sources"], sources, strict=True):
                with path.open("rb") as f:
                    note["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
        if self.calibration:
            found["calibration"] = {
                "observer": self.calibration.observer,
                "sha256": self.calibration.sha256,
            }
        return found

    # --- first pass: ahead of the second for small tensors, so that all threads stay busy ---

    def _analysed(self, workers: Workers) -> Iterator[tuple[PlannedTensor, Analysis | None]]:
        waiting: deque[tuple[PlannedTensor, Future[Analysis] | None]] = deque()

        def settled(p: PlannedTensor, future: Future[Analysis] | None) -> Analysis | None:
            if future is not None:
                return future.result()
            return self._analyse(p, workers.map) if isinstance(p.scheme, AffineScheme) else None

        for p in self.plan:
            small = p.tensor.size <= SMALL_TILES * TILE_VALUES
            ahead = isinstance(p.scheme, AffineScheme) and small
            waiting.append((p, workers.submit(self._analyse, p) if ahead else None))
            if len(waiting) > workers.threads:
                first = waiting.popleft()
                yield first[0], settled(*first)
        for p, future in waiting:
            yield p, settled(p, future)

    def _analyse(self, p: PlannedTensor, mapper: Mapper = map) -> Analysis:
        assert isinstance(p.scheme, AffineScheme)
        return analyse(
            self.model,
            p.tensor,
            encoding_of(p.scheme, p.tensor),
            p.scheme.symmetric,
            self._method_for(p.scheme),
            mapper,
        )

    def _method_for(self, scheme: AffineScheme) -> RangeMethod:
        return self.options.range or default_method(scheme.bits)

    # --- second pass ---

    def _one(
        self, p: PlannedTensor, analysis: Analysis | None, sink: Sink, workers: Workers
    ) -> None:
        row = _planned_row(p)
        if p.scheme is None:
            self._keep(p, row, sink, workers)
            return
        notes: dict[str, Any] = {}
        encoding: Encoding | None = None
        if isinstance(p.scheme, AffineScheme):
            assert analysis is not None
            encoding = analysis.encoding
            row.stored = analysis.encoding.scheme
            row.nbytes = stored_size(encoding, p.tensor.shape)
            row.decision = decision_notes(
                analysis.decision, analysis.statistics, self._method_for(p.scheme)
            )
            notes["decision"] = row.decision
            encode = affine_encoder(self.model, p.tensor, analysis, self._method_for(p.scheme))
        elif isinstance(p.scheme, CastScheme):
            encoding = RawEncoding(p.scheme.dtype)
            encode = cast_encoder(self.model, p.tensor, p.scheme, workers.map)
        else:
            encode = ggml_encoder(self.model, p.tensor, p.scheme, workers.map)
        error = ErrorSums()
        columns = row_length(p.tensor.shape)
        target = sink.begin(p.tensor, encoding)
        for part in workers.map(encode, tiles(p.tensor.size // columns, columns)):
            target.append(part)
            error += part.error
        # Parameters that tiles share are stored once, not with every tile.
        if analysis is not None and analysis.shared is not None:
            target.append_shared(analysis.shared, analysis.encoding)
        if not np.isfinite(error.noise):
            raise WeightError(
                "weights near the end of the range of binary32 would decode to infinity",
                path=self.model.path,
                tensor=p.tensor.name,
                hint=f"keep the tensor with --keep '{p.tensor.name}'",
            )
        self.total += error
        row.sqnr_db, row.nmse, row.max_error = error.sqnr_db, error.nmse, error.worst
        row.bits_per_weight = 8 * row.nbytes / p.tensor.size
        measured = {"max": error.worst, "nmse": error.nmse}
        if error.sqnr_db is not None:
            measured["sqnr_db"] = error.sqnr_db
        if analysis is not None:
            row.clipped = error.clipped
            measured["clipped"] = error.clipped
        notes["error"] = measured
        if self.calibration and (found := self.calibration.find(p.tensor.name)):
            notes["activation"] = found.note(self.calibration.observer)
        target.finish(notes)
        self.report.tensors.append(row)

    def _keep(self, p: PlannedTensor, row: QuantizedTensor, sink: Sink, workers: Workers) -> None:
        target = sink.begin(p.tensor, None)
        for start in range(0, p.tensor.nbytes, KEEP_CHUNK):
            size = min(KEEP_CHUNK, p.tensor.nbytes - start)
            target.append_raw(self.model.raw(p.tensor, start, size))
        target.finish({"decision": {"rule": "kept", "reason": p.reason}})
        if p.tensor.floating and p.tensor.size:
            found = observe_tensor(self.model, p.tensor, p.tensor.size, workers.map)
            if found.nonfinite:
                self.report.warnings.append(
                    f"kept tensor '{p.tensor.name}' has {found.nonfinite:,} NaN or Inf values"
                )
        self.report.tensors.append(row)


def _source_note(s: SourceFile) -> dict[str, Any]:
    name = os.fsencode(s.name).decode("utf-8", "backslashreplace")  # a name need not be UTF-8
    return {"header_sha256": s.header_sha256, "name": name, "size": s.size}


def _source_paths(model: Model) -> list[Path]:
    if model.path.is_dir():
        return [model.path / s.name for s in model.sources]
    return [model.path]
