"""bench: how fast qconvert is on this machine, held against references in the same run.

Three kinds of section, each a table of lines (`lines`): kernels (`kernel_lines`), the integer
matrix product (`products`) and a whole conversion (`end_to_end`). What others wrote and is not
installed here is named as skipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import ExitStack, closing

import numpy as np
from threadpoolctl import threadpool_limits

from qconvert import kernels
from qconvert.errors import UsageError
from qconvert.processor import model_name
from qconvert.progress import Progress, Silent
from qconvert.report import BenchReport
from qconvert.schemes import AffineScheme, LevelScheme
from qconvert.stages.bench.compare import compare, read_earlier
from qconvert.stages.bench.end_to_end import end_to_end_section
from qconvert.stages.bench.file_cost import file_section, is_quantized
from qconvert.stages.bench.kernel_lines import kernel_section
from qconvert.stages.bench.lines import Section, measure
from qconvert.stages.bench.memory import memory_section
from qconvert.stages.bench.options import BenchOptions
from qconvert.stages.bench.products import product_section
from qconvert.stages.bench.weights import from_file, gaussian
from qconvert.stages.parallel import Workers

__all__ = ["BenchOptions", "bench"]


def bench(options: BenchOptions, progress: Progress | None = None) -> BenchReport:
    """Measure.

    Raises:
        InputError: the file has no matrix to measure with, or cannot be converted.
        UsageError: a scheme has nothing to measure, or not with these weights.
        MachineError: the directory of a whole conversion cannot be used.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    report = BenchReport(
        kernels=kernels.describe(),
        machine=f"{model_name()}, {os.cpu_count()} processors, NumPy {np.__version__}",
        threads=options.threads,
        runs=options.runs,
        measurements=[],
        skipped=[],
    )
    earlier = read_earlier(options.compare) if options.compare else None
    sections = _whole(options) if options.end_to_end else _parts(options)
    with closing(sections), threadpool_limits(options.threads):
        for section in sections:
            progress.begin(f"bench {section.name}", options.runs * len(section.lines), "runs")
            found = measure(section, options.runs, progress)
            report.measurements += found
            if section.conclude:
                section.conclude(found, report)
            report.skipped += section.skipped
            progress.end()
    if options.compare and earlier:
        compare(report, earlier, options.compare, options.threshold)
    report.seconds = time.perf_counter() - started
    return report


def _whole(options: BenchOptions) -> Generator[Section]:
    if options.file is None:
        raise UsageError("an end-to-end measurement needs a model", hint="qconvert bench MODEL")
    with ExitStack() as stack:
        yield end_to_end_section(options.file, options, stack)


def _parts(options: BenchOptions) -> Generator[Section]:
    """Kernels and products; each section frees its memory and files before the next."""
    if options.file and options.memory:
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(options.threads))
            yield memory_section(options.file, options.memory, workers)
        return
    if options.file and is_quantized(options.file):
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(options.threads))
            yield file_section(options.file, workers, stack)
        return
    subjects = [from_file(options.file)] if options.file else map(gaussian, options.shapes)
    for weights in subjects:
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(options.threads))
            yield kernel_section(weights, options, workers, stack)
            schemes = [s for s in options.schemes if isinstance(s, AffineScheme | LevelScheme)]
            for rows in dict.fromkeys((1, options.rows)) if schemes else ():
                yield product_section(weights, schemes, rows, options.range, workers)
