"""`qconvert.bench`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qconvert.commands.arguments import (
    Shape,
    as_path,
    as_texts,
    check_bounds,
    matrix_shapes,
    range_method,
    share,
    size_in_bytes,
)
from qconvert.errors import UsageError
from qconvert.progress import Progress
from qconvert.report import BenchReport
from qconvert.schemes import parse_scheme
from qconvert.stages.bench import BenchOptions
from qconvert.stages.bench import bench as stage


def bench(
    model: Path | str | None = None,
    *,
    shape: str | Shape | Iterable[str | Shape] | None = None,
    scheme: str | Iterable[str] | None = None,
    range: str | None = None,
    rows: int = 512,
    end_to_end: bool = False,
    work_dir: Path | str | None = None,
    compare: Path | str | None = None,
    threshold: str | float | None = None,
    memory: str | int | None = None,
    runs: int = 5,
    threads: int = 1,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure kernels, the integer matrix product, a quantized file, or whole conversions here.

    >>> report = qconvert.bench(shape=(64, 256), scheme="q8_block64", rows=4, runs=1)
    >>> report.measurements[0].section
    'kernels, 64x256 Gaussian'

    Args:
        model: a quantized file tells what a token costs; of another take its largest matrix, or
            with ``end_to_end`` all of it.
        shape: of Gaussian weights: ``(rows, columns)``, ``"4096x11008"``, or several of them;
            4096 x 4096 by default.
        scheme: one or several; q4_block64 and q8_block64 by default.
        range: ``minmax``, ``percentile`` or ``mse``.
        rows: of activations of the products, besides 1.
        end_to_end: whole conversions of the model instead, against copying it and other programs.
        work_dir: where ``end_to_end`` writes; beside the model by default.
        compare: an earlier report of the same lines: the status is ``fail`` where one is slower.
        threshold: by how much it may be, such as ``0.05`` or ``"5%"``; a tenth by default.
        memory: bytes, or ``"8G"``: which scheme of the model is the best choice within it.
        runs: the figures are medians of so many.
        threads: one by default, unlike the other functions.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model has no matrix to measure with, or cannot be converted.
        UsageError: options contradict each other, or are out of range.
        MachineError: the directory of a whole conversion cannot be used.
    """
    check_bounds("--rows", rows, 1)
    check_bounds("--runs", runs, 1)
    check_bounds("--threads", threads, 1)
    shapes = matrix_shapes(shape)
    if model is not None and shapes:
        raise UsageError("MODEL and --shape exclude each other")
    if end_to_end and model is None:
        raise UsageError("--end-to-end needs a MODEL")
    if work_dir is not None and not end_to_end:
        raise UsageError("--work-dir goes with --end-to-end")
    if threshold is not None and compare is None:
        raise UsageError("--threshold goes with --compare")
    if memory is not None and (model is None or end_to_end or scheme):
        raise UsageError("--memory needs a MODEL, and goes without --end-to-end and --scheme")
    default = BenchOptions()
    slower = share("--threshold", threshold)
    options = BenchOptions(
        schemes=tuple(dict.fromkeys(map(parse_scheme, as_texts(scheme)))) or default.schemes,
        file=as_path(model),
        shapes=shapes or default.shapes,
        rows=rows,
        runs=runs,
        threads=threads,
        range=range_method(range, None),
        end_to_end=end_to_end,
        work_dir=as_path(work_dir),
        compare=as_path(compare),
        memory=size_in_bytes("--memory", memory),
        threshold=default.threshold if slower is None else slower,
    )
    return stage(options, progress)
