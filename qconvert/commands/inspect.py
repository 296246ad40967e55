"""`qconvert.inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qconvert.commands.arguments import as_texts, check_bounds
from qconvert.progress import Progress
from qconvert.report import InspectReport
from qconvert.schemes import parse_scheme
from qconvert.stages.inspect import InspectOptions
from qconvert.stages.inspect import inspect as stage


def inspect(
    model: Path | str,
    *,
    tensor: str | Iterable[str] | None = None,
    scheme: str = "q4_block64",
    headers_only: bool = False,
    bins: int = 32,
    threads: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> InspectReport:
    """Look at tensors, their statistics, and the scheme that would suit each.

    >>> report = qconvert.inspect("samples/tiny-llama", tensor="*layers.0.self_attn.q_proj*")
    >>> report
    <InspectReport pass: 'samples/tiny-llama' (safetensors), 1 of 39 tensors>
    >>> report.tensors[0].shape, report.tensors[0].suggestion
    ((256, 256), 'q4_block64_asym')

    Args:
        model: a safetensors, GGUF or qblk file, or a directory.
        tensor: only tensors that match this glob or one of these, with histograms.
        scheme: say symmetric or asymmetric for this one.
        headers_only: names, shapes and sizes alone; reads no weights.
        bins: of a histogram, 2 to 200.
        threads: all available processors by default.
        strict: a warning makes the report's status ``fail``.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model cannot be read.
        UsageError: a glob matches no tensor, or an option is out of range.
    """
    check_bounds("--bins", bins, 2, 200)
    check_bounds("--threads", threads, 1)
    options = InspectOptions(
        scheme=parse_scheme(scheme),
        tensors=as_texts(tensor),
        headers_only=headers_only,
        bins=bins,
        threads=threads,
    )
    return stage(Path(model), options, progress).judged(strict)
