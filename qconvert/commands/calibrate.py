"""`qconvert.calibrate`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qconvert.commands.arguments import (
    as_path,
    as_paths,
    check_bounds,
    check_goes_with,
    observer_settings,
)
from qconvert.errors import UsageError
from qconvert.progress import Progress
from qconvert.report import CalibrateReport
from qconvert.stages.calibrate import CalibrateOptions, MergeOptions, merge_calibrations
from qconvert.stages.calibrate import calibrate as stage


def calibrate(
    model: Path | str,
    *,
    output: Path | str,
    text: Path | str | Iterable[Path | str] | None = None,
    activations: Path | str | Iterable[Path | str] | None = None,
    merge: Path | str | Iterable[Path | str] | None = None,
    observer: str | None = None,
    percentile: float | None = None,
    momentum: float | None = None,
    symmetric: bool = False,
    seqlen: int | None = None,
    nsamples: int | None = None,
    seed: int | None = None,
    outputs: bool = False,
    gram: bool = False,
    fisher: bool = False,
    resume: bool = False,
    imatrix: Path | str | None = None,
    record: Path | str | None = None,
    threads: int | None = None,
    device: str | None = None,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> CalibrateReport:
    """Find static scales and zero points of what enters each layer.

    >>> qconvert.calibrate(
    ...     "samples/tiny-llama",
    ...     activations="samples/activations.safetensors",
    ...     output="calibration.safetensors",
    ... )
    <CalibrateReport pass: 'calibration.safetensors', 28 layers, observer nmse>

    Exactly one of ``text``, ``activations`` and ``merge`` says where the statistics come from.

    Args:
        model: a safetensors file or a model directory.
        output: the calibration file.
        text: files of text to run the model over; needs torch and transformers.
        activations: safetensors files of (samples, features) arrays that are named like layers.
        merge: calibrations of this model to join.
        observer: ``minmax``, ``ema``, ``percentile``, ``mse``, ``entropy`` or ``nmse``, the
            default: least relative error of a layer's output, row by row.
        percentile: of the percentile observer, 99.99 by default.
        momentum: of the moving average ``ema``, 0.9 by default.
        symmetric: zero point 0.
        seqlen: tokens of a window of ``text``, 256 by default; for encoders, the most of a line.
        nsamples: windows or lines of each text, drawn; all by default.
        seed: of the draw, and of the labels of ``fisher``, 0 by default.
        outputs: static ranges of the layers' outputs too.
        gram: also keep XᵀX of each input; large.
        fisher: also keep how much errors of each weight matter, by a backward pass, for budgets of
            ``quantize``; with ``gram`` also what compensated rounding makes of it.
        resume: go on where an interrupted run has stopped.
        imatrix: also write an importance matrix for llama-quantize here.
        record: also keep 64 rows of each input in this directory, for ``verify(samples=...)``.
        threads: for ``text``; all available processors by default.
        device: that torch runs the model on: ``cpu``, the default, ``cuda``, ``cuda:N``, ``mps`` or
            ``auto``. Statistics are summed exactly in any case; what is summed differs in its last
            bits between devices, and so may the bytes of the calibration.
        force: replace existing files.
        strict: a warning makes the report's status ``fail``, and nothing is written.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model, a text or an array cannot be used.
        UsageError: options contradict each other, or are out of range.
        MachineError: the output cannot be written, or torch is not installed.
        Stopped: an interrupt arrived; what was done is kept, and ``resume`` goes on from there.
    """
    sources = {
        "--text": as_paths(text),
        "--activations": as_paths(activations),
        "--merge": as_paths(merge),
    }
    given = [name for name, files in sources.items() if files]
    if len(given) != 1:
        raise UsageError(
            "where the statistics come from",
            found=" and ".join(given) or "none",
            wanted="one of --text, --activations, --merge",
        )
    check_goes_with(
        given[0],
        "--text",
        {
            "--seqlen": seqlen,
            "--nsamples": nsamples,
            "--seed": seed,
            "--outputs": outputs or None,
            "--fisher": fisher or None,
            "--record": record,
            "--threads": threads,
            "--device": device,
        },
    )
    check_bounds("--threads", threads, 1)
    place, files = Path(model), sources[given[0]]
    if imatrix and activations:
        raise UsageError("--imatrix goes with --text or --merge")
    if resume and merge:
        raise UsageError("--resume goes with --text or --activations")
    if merge:
        if (observer, percentile, momentum, symmetric) != (None, None, None, False):
            raise UsageError("--merge takes the observer of the files")
        if gram:
            raise UsageError("--merge takes Gram matrices where the files have them")
        done = merge_calibrations(
            MergeOptions(place, files, Path(output), as_path(imatrix), force, strict)
        )
        return done.judged(strict)
    settings = observer_settings(observer, percentile, momentum, symmetric)
    if activations:
        recorded = CalibrateOptions(
            activations=files,
            output=Path(output),
            model=place,
            settings=settings,
            gram=gram,
            resume=resume,
            force=force,
            strict=strict,
        )
        return stage(recorded, progress).judged(strict)
    from qconvert.running.device import CPU, check_device
    from qconvert.running.text import DEFAULT_SEQLEN
    from qconvert.stages.calibrate_text import TextOptions, calibrate_text

    options = TextOptions(
        model=place,
        texts=files,
        output=Path(output),
        settings=settings,
        seqlen=DEFAULT_SEQLEN if seqlen is None else seqlen,
        nsamples=nsamples,
        seed=seed or 0,
        outputs=outputs,
        gram=gram,
        fisher=fisher,
        resume=resume,
        imatrix=as_path(imatrix),
        record=as_path(record),
        threads=threads,
        device=check_device(device or CPU),
        force=force,
        strict=strict,
    )
    return calibrate_text(options, progress).judged(strict)
