"""inspect: what is in a model, how its values are distributed, and what would suit them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs import codec_of
from qconvert.codecs.affine.suggestion import grid_ends
from qconvert.codecs.channels import MAX_CHANNELS, ChannelStatistics
from qconvert.codecs.source import observe_tensor
from qconvert.codecs.statistics import TensorStatistics
from qconvert.errors import FormatError, UsageError, WeightError
from qconvert.files import open_model
from qconvert.geometry import TILE_VALUES, row_length, tiles
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.progress import Progress, Silent
from qconvert.report import (
    GridEnds,
    Histogram,
    InputsView,
    InspectReport,
    TensorSummary,
)
from qconvert.schemes import TENSOR_SCHEMES, AffineScheme, KeepScheme, MixScheme, Scheme
from qconvert.stages.budget import unknown_sensitivities
from qconvert.stages.compare import comparison
from qconvert.stages.curve import CurveOptions, size_curve
from qconvert.stages.facts import facts_of, tally
from qconvert.stages.findings import findings_of
from qconvert.stages.grouping import chosen, grouped, sorted_rows
from qconvert.stages.inputs import imatrix_view, inputs_view, older_imatrix
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.plan import PlannedTensor, PlanOptions, make_plan
from qconvert.stages.sources import described

SMALL_VALUES = 4 * TILE_VALUES  # of a tensor that one thread describes
LEAST_VALUES = 1024  # of a matrix whose channels are compared
BATCH_TENSORS = 64  # that a thread takes at once

_Item = tuple[TensorInfo, TensorSummary, PlannedTensor]


@dataclass(frozen=True, slots=True)
class InspectOptions:
    """Options of ``qconvert inspect``; the command line's help describes each."""

    scheme: Scheme
    tensors: tuple[str, ...] = ()
    headers_only: bool = False
    bins: int = 32
    histograms: bool = False
    threads: int | None = None
    curve: CurveOptions | None = None
    sort: str | None = None
    top: int | None = None
    by: str | None = None
    compare: Path | None = None


def inspect(path: Path, options: InspectOptions, progress: Progress | None = None) -> InspectReport:
    """Look at a model.

    Raises:
        InputError: it cannot be read.
        UsageError: a name matches no tensor.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    scheme = options.scheme
    if isinstance(scheme, MixScheme | KeepScheme) or codec_of(scheme).look is None:
        raise UsageError(
            f"inspect cannot suggest {scheme.name}",
            wanted="a scheme with scales, such as q4_block64",
            hint="what GGUF's types lose is shown by --curve --format gguf",
        )
    other = None
    curve = size_curve(path, options.curve, progress) if options.curve else None
    plain = not (options.headers_only or options.curve or options.compare)
    try:
        model = open_model(path)
    except FormatError as refused:
        if not plain:
            raise
        imatrix = older_imatrix(path, refused)
        return _inputs_report(path, imatrix_view(imatrix, options.tensors), options, started)
    try:
        if plain and (view := inputs_view(path, model, options.tensors)):
            return _inputs_report(path, view, options, started)
        said, quantized = described(model)
        threads = options.threads or available_threads()
        if options.compare:
            other = comparison(model, options.compare, options.tensors, threads, progress)
        found = chosen(model.tensors, () if options.compare else options.tensors)
        rows = [TensorSummary(t.name, t.shape, t.dtype, t.nbytes) for t in found]
        if not options.headers_only:
            progress.begin("inspect", sum(t.nbytes for t in found), "bytes")
            plan = make_plan(found, scheme, PlanOptions())
            _describe_all(model, plan, rows, options, progress)
            progress.end()
        coded = quantized or any(t.coded for t in model.tensors)
        if quantized:
            for row in rows:
                row.suggestion, row.suggestion_reason = "none", f"part of {quantized.method}"
                row.sqnr_db = row.gain_db = row.cost_db = row.rule = None
        return InspectReport(
            kernels=kernels.describe(),
            path=str(path),
            kind=model.kind,
            metadata=model.metadata,
            tensors=sorted_rows(rows, options.sort)[: options.top],
            total_tensors=len(model.tensors),
            total_values=sum(t.size for t in model.tensors),
            total_bytes=sum(t.nbytes for t in model.tensors),
            statistics=not options.headers_only,
            notes=said.notes,
            curve=curve,
            scheme=None if options.headers_only else scheme.name,
            findings=None if coded else findings_of(rows, scheme),
            facts=facts_of(model),
            types=tally(model),
            comparison=other,
            by=options.by,
            groups=grouped(rows, options.by) if options.by else [],
            warnings=[
                *said.warnings,
                *unknown_sensitivities(curve.without if curve else []),
                *(
                    f"tensor '{r.name}' has {r.nonfinite:,} NaN or Inf values"
                    for r in rows
                    if r.nonfinite
                ),
            ],
            seconds=time.perf_counter() - started,
        )
    finally:
        model.close()


def _inputs_report(
    path: Path, view: InputsView, options: InspectOptions, started: float
) -> InspectReport:
    """Of a file that holds no weights.

    Raises:
        UsageError: an option is of weights.
    """
    if options.sort or options.top or options.by:
        raise UsageError(f"--sort, --top and --by are of tensors: {path} is a {view.kind}")
    return InspectReport(
        kernels=kernels.describe(),
        path=str(path),
        kind=view.kind,
        metadata={},
        tensors=[],
        total_tensors=0,
        total_values=0,
        total_bytes=0,
        statistics=False,
        inputs=view,
        seconds=time.perf_counter() - started,
    )


def _describe_all(
    model: Model,
    plan: Sequence[PlannedTensor],
    rows: Sequence[TensorSummary],
    options: InspectOptions,
    progress: Progress,
) -> None:
    """Fill in the rows: each small tensor by one thread, a large one by all of them together."""
    items = [(p.tensor, row, p) for p, row in zip(plan, rows, strict=True)]

    def small(batch: Sequence[_Item]) -> Sequence[_Item]:
        for tensor, row, planned in batch:
            if 0 < tensor.size <= SMALL_VALUES and tensor.real:
                _describe(model, tensor, row, planned, map)
        return batch

    with Workers(options.threads or available_threads()) as workers:
        for batch in workers.map(small, _batches(items)):
            for tensor, row, planned in batch:
                if tensor.size > SMALL_VALUES and tensor.real:
                    _describe(model, tensor, row, planned, workers.map)
                if (options.tensors or options.histograms) and tensor.size:
                    row.histogram = _histogram(model, tensor, row, options.bins, workers)
                progress.advance(tensor.nbytes, tensor.name)


def _batches(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Runs of tensors that are worth handing to a thread."""
    start = values = 0
    for i, (tensor, _, _) in enumerate(items):
        values += tensor.size
        if values >= TILE_VALUES or i + 1 - start == BATCH_TENSORS:
            yield items[start : i + 1]
            start, values = i + 1, 0
    yield items[start:]


def _describe(
    model: Model, tensor: TensorInfo, row: TensorSummary, planned: PlannedTensor, mapper: Mapper
) -> None:
    scheme = planned.scheme
    columns = row_length(tensor.shape)
    look = codec_of(scheme).look if scheme else None
    channels = _channels(tensor, columns)
    if scheme is None or look is None:
        _fill(row, observe_tensor(model, tensor, columns, mapper, channels), channels)
        if row.nonfinite and tensor.floating:
            row.suggestion, row.suggestion_reason = "mend", "has NaN or Inf values"
        elif model.kind == "safetensors":
            row.suggestion, row.suggestion_reason = "keep", planned.reason
        return
    try:
        found = look(model, tensor, scheme, mapper, channels)
    except WeightError:
        channels = _channels(tensor, columns)
        _fill(row, observe_tensor(model, tensor, columns, mapper, channels), channels)
        row.suggestion, row.suggestion_reason = "mend", "has NaN, Inf or too large values"
        return
    _fill(row, found.statistics, channels)
    row.suggestion, row.suggestion_reason = found.scheme, found.reason
    row.sqnr_db, row.gain_db, row.cost_db = found.sqnr_db, found.gain_db, found.cost_db
    row.rule = found.rule


def _channels(tensor: TensorInfo, columns: int) -> ChannelStatistics | None:
    """For matrices of weights that are large enough for channels to be told apart."""
    rows = tensor.size // columns
    weights = tensor.floating or tensor.coded
    large = tensor.size >= LEAST_VALUES and len(tensor.shape) > 1 and min(rows, columns) > 1
    if not weights or not large or max(rows, columns) > MAX_CHANNELS:
        return None
    return ChannelStatistics(rows, columns)


def _fill(row: TensorSummary, s: TensorStatistics, channels: ChannelStatistics | None) -> None:
    row.minimum, row.maximum, row.absmax = s.minimum, s.maximum, s.absmax
    row.mean, row.std = s.mean, s.std
    row.skewness, row.kurtosis = s.skewness, s.kurtosis
    row.outlier_share = s.outlier_share
    row.zeros, row.nonfinite = s.zeros, s.nonfinite
    row.crest, row.near_zero_share = s.crest, s.near_zero_share
    row.percentiles = s.percentiles(row.dtype)
    if channels:
        row.rows, row.columns = channels.rows, channels.columns
        row.blocks, row.constant_blocks = channels.blocks, channels.constant


def _histogram(
    model: Model, tensor: TensorInfo, row: TensorSummary, bins: int, workers: Workers
) -> Histogram | None:
    """Equal bins between the extremes, in a second pass."""
    if row.minimum is None or row.maximum is None:
        return None
    low, high = row.minimum, row.maximum
    half = high / 2 - low / 2  # halves, since the width of a float64 range may overflow

    def count(start_stop: tuple[int, int]) -> NDArray[np.int64]:
        values = model.values(tensor, *start_stop)
        values = values[np.isfinite(values)].astype(np.float64)
        # Values that are all alike (as far as float64 can tell) share the middle bin.
        share = (values / 2 - low / 2) / half if half > 0 else np.full(len(values), 0.5)
        place = share * bins
        return np.bincount(np.clip(place.astype(np.int64), 0, bins - 1), minlength=bins)

    columns = row_length(tensor.shape)
    spans = ((t.start, t.stop) for t in tiles(tensor.size // columns, columns))
    total = sum(workers.map(count, spans), np.zeros(bins, np.int64))
    return Histogram(low, high, [int(c) for c in total], _grid(model, tensor, row.suggestion))


def _grid(model: Model, tensor: TensorInfo, suggestion: str | None) -> GridEnds | None:
    scheme = TENSOR_SCHEMES.get(suggestion or "")
    if not isinstance(scheme, AffineScheme):
        return None
    lows, highs = grid_ends(model, tensor, scheme)
    ends = float(np.median(lows)), float(np.median(highs)), float(lows.min()), float(highs.max())
    return GridEnds(scheme.name, *ends)
