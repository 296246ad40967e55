"""`qconvert.inspect`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qconvert.commands.arguments import as_path, as_texts, check_bounds, container_name
from qconvert.commands.calibrate import calibrate
from qconvert.errors import UsageError
from qconvert.progress import Progress
from qconvert.report import InspectReport
from qconvert.schemes import parse_scheme
from qconvert.stages.curve import CurveOptions
from qconvert.stages.grouping import BY, check_sort
from qconvert.stages.inspect import InspectOptions
from qconvert.stages.inspect import inspect as stage


def inspect(
    model: Path | str,
    *,
    tensor: str | Iterable[str] | None = None,
    scheme: str = "q4_block64",
    headers_only: bool = False,
    bins: int = 32,
    histograms: bool = False,
    sort: str | None = None,
    top: int | None = None,
    by: str | None = None,
    compare: Path | str | None = None,
    calibration: Path | str | None = None,
    text: Path | str | None = None,
    nsamples: int | None = None,
    curve: bool = False,
    format: str | None = None,
    sensitivities: Path | str | None = None,
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
        tensor: only tensors with this text in their names, or that match it where it has
            wildcards; or one of several such; with histograms.
        scheme: say symmetric or asymmetric for this one.
        headers_only: names, shapes and sizes alone; reads no weights.
        bins: of a histogram, 2 to 200.
        histograms: of all tensors, not of those alone that ``tensor`` asks for.
        sort: by this column, the largest or worst first: name, dtype, size, values, min, max, mean,
            std, absmax, crest, channel, kurtosis, outliers, near-zero, zeros, bad, sqnr.
        top: so many tensors alone.
        compare: in place of statistics, what is different in this file, of any kind.
        by: also tensors of a ``layer`` or ``role`` together.
        curve: in place of statistics, the predicted loss of files of all sizes.
        calibration: of the curve: of this model, made with ``fisher``; without one it shows the
            SQNR of the weights alone.
        text: of the curve, in place of a calibration: run the model over it, for nothing but this;
            needs torch and transformers.
        nsamples: windows of ``text``, drawn; all by default.
        format: ``qblk`` (by default) or ``gguf``, of the files of the curve.
        sensitivities: of the curve: a file of what each tensor loses under each scheme, read where
            it is there and written where not; `quantize` takes it too.
        threads: all available processors by default.
        strict: a warning makes the report's status ``fail``.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model cannot be read.
        UsageError: a name matches no tensor, or an option is out of range.
    """
    check_bounds("--bins", bins, 2, 200)
    check_bounds("--threads", threads, 1)
    check_bounds("--top", top, 1)
    check_sort(sort, headers_only)
    if by not in (None, *BY):
        raise UsageError(f"--by '{by}'", wanted=" or ".join(BY))
    if by and (sort or top):
        raise UsageError("--by shows groups in their own order: it goes without --sort and --top")
    if compare is not None and (headers_only or sort or top or by or curve):
        raise UsageError(
            "--compare shows what differs: it goes without --headers-only, --sort, --top, --by, "
            "--curve"
        )
    wanted = None
    if curve:
        if tensor is not None or headers_only or sort or top or by:
            raise UsageError(
                "--curve shows no tensors: it goes without --tensor, --headers-only, --sort, "
                "--top, --by"
            )
        if text is not None and calibration is not None:
            raise UsageError("--text takes the place of --calibration: one of them")
        wanted = CurveOptions(
            calibration=as_path(calibration),
            container=container_name(format) or "qblk",
            sensitivities=as_path(sensitivities),
            threads=threads,
        )
    elif calibration or format or sensitivities or text or nsamples:
        raise UsageError(
            "--calibration, --text, --nsamples, --format and --sensitivities go with --curve"
        )
    if nsamples is not None and text is None:
        raise UsageError("--nsamples goes with --text")
    options = InspectOptions(
        scheme=parse_scheme(scheme),
        tensors=as_texts(tensor),
        headers_only=headers_only or curve or compare is not None,
        curve=wanted,
        bins=bins,
        histograms=histograms,
        threads=threads,
        sort=sort,
        top=top,
        by=by,
        compare=as_path(compare),
    )
    if wanted is None or text is None:
        return stage(Path(model), options, progress).judged(strict)
    with tempfile.TemporaryDirectory(prefix="qconvert-") as place:
        made = Path(place) / "calibration.safetensors"
        calibrate(
            *(model,), output=made, text=text, nsamples=nsamples, fisher=True, threads=threads,
            progress=progress,
        )  # fmt: skip
        options = replace(options, curve=replace(wanted, calibration=made))
        return stage(Path(model), options, progress).judged(strict)
