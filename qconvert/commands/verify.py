"""`qconvert.verify`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from qconvert.commands.arguments import as_float, as_path, as_paths, check_bounds, share
from qconvert.commands.rebuild import arguments_of, run_recipe
from qconvert.errors import UsageError
from qconvert.progress import Progress
from qconvert.report import Check, VerifyReport
from qconvert.report.verify import REBUILD
from qconvert.running.device import CPU, check_device
from qconvert.stages.rebuild import Recipe, rebuilt, recorded_recipe
from qconvert.stages.verify import ACTIVATIONS, VerifyOptions
from qconvert.stages.verify import verify as stage
from qconvert.stages.verify_text import QualityOptions


def verify(
    file: Path | str,
    *,
    against: Path | str | None = None,
    min_sqnr: float | None = None,
    max_nmse: float | None = None,
    min_output_sqnr: float | None = None,
    exact: bool = False,
    histograms: bool = False,
    limits: Path | str | None = None,
    rebuild: bool = False,
    calibration: Path | str | None = None,
    imatrix: Path | str | None = None,
    adapter: Path | str | None = None,
    run: bool = False,
    rows: int = 8,
    activations: str | None = None,
    samples: Path | str | Iterable[Path | str] | None = None,
    text: Path | str | None = None,
    seqlen: int | None = None,
    nsamples: int | None = None,
    scoring: str = "all",
    max_kl: float | None = None,
    max_ppl_increase: str | float | None = None,
    min_cosine: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Find out whether a file is whole, close to its source, and right in integer arithmetic.

    A file that fails raises nothing: that it is not good enough is the answer to the question, and
    the figures of what failed are in the report. Ask its ``status``, as a script asks the exit
    code. A file that cannot be opened at all, or is damaged so that it cannot be read on, raises.

    >>> made = qconvert.quantize("samples/tiny-llama", "q4_block64", output="model.qblk")
    >>> report = qconvert.verify("model.qblk", against="samples/tiny-llama", min_sqnr=18)
    >>> report.status
    'pass'
    >>> too_much = qconvert.verify("model.qblk", against="samples/tiny-llama", min_sqnr=40)
    >>> too_much.status, [check.id for check in too_much.checks if check.status == "fail"]
    ('fail', ['min-sqnr'])

    Args:
        file: a qblk or GGUF file.
        against: the source it was made from.
        min_sqnr: fail when a tensor has less, in dB.
        max_nmse: fail when a tensor's relative squared error is above.
        min_output_sqnr: fail when an integer product has less, in dB.
        exact: fail when a decoded value is not that of ``against``.
        histograms: count the values of each tensor before and after, which pages show.
        limits: a TOML file of limits: tables ``[[tensors]]``, ``[file]`` and ``[require]``.
        rebuild: run the recipe that the file records again, beside it, and fail when that gives
            other bytes.
        calibration, imatrix: of ``rebuild``: what the file was made with.
        adapter: a directory of peft's whose corrections are merged into ``against`` first, as they
            were when the file was made.
        run: have llama.cpp run a GGUF file on a few tokens, and fail when it cuts a text into other
            tokens than transformers or computes something else on the same weights; needs torch,
            transformers and llama-cpp-python, and memory for the model as float32.
        rows: of activations of the integer product.
        activations: of integer products ``static``, ``dynamic``, ``dynamic_asym`` or ``auto``
            (static where the file has parameters, else dynamic), the default; with ``text`` also
            ``none`` (float), then the default for running the model.
        samples: recorded activations instead of Gaussian ones.
        text: run both models over this text; needs torch and transformers.
        seqlen: tokens of a window of ``text``, 256 by default; for encoders, the most of a line.
        nsamples: windows of ``text``, drawn; all by default.
        scoring: ``all`` tokens of a window, or ``second-half`` as llama-perplexity.
        max_kl: fail when the mean divergence is above, in nats.
        max_ppl_increase: fail when the perplexity grows by more, such as ``0.01`` or ``"1%"``.
        min_cosine: fail when the mean cosine of an encoder's embeddings is below.
        seed: of Gaussian activations and drawn windows.
        threads: all available processors by default.
        device: that torch runs both models of ``text`` on: ``cpu``, the default, ``cuda``,
            ``cuda:N``, ``mps`` or ``auto``; in float32. Figures differ in their last digits between
            devices.
        strict: a warning makes the report's status ``fail``.
        progress: is told of the steps of long work.

    Raises:
        InputError: the file or the source cannot be used.
        UsageError: options contradict each other or the file.
        MachineError: torch or transformers is not installed and ``text`` needs them.
    """
    given = {"calibration": as_path(calibration), "imatrix": as_path(imatrix)}
    if adapter is not None and (against is None or text is not None):
        raise UsageError(
            "--adapter goes with --against, and not with --text, which runs the source as it is",
            hint="merge it first, with: qconvert quantize MODEL --adapter DIR --scheme bf16 "
            "--format hf",
        )
    if rebuild and against is None:
        raise UsageError("--rebuild needs the source", hint="give it with --against")
    for name, path in given.items():
        if path and not rebuild:
            raise UsageError(f"--{name} goes with --rebuild")
    modes = (*ACTIVATIONS, *(("none",) if text is not None else ()))
    if activations is not None and activations not in modes:
        raise UsageError("--activations", found=activations, wanted=", ".join(modes))
    check_bounds("--rows", rows, 1)
    check_bounds("--seqlen", seqlen, 4)
    check_bounds("--nsamples", nsamples, 1)
    check_bounds("--threads", threads, 1)
    for name, limit in (
        ("--min-sqnr", min_sqnr),
        ("--max-nmse", max_nmse),
        ("--min-output-sqnr", min_output_sqnr),
        ("--max-kl", max_kl),
        ("--min-cosine", min_cosine),
    ):
        if limit is not None and math.isnan(float(limit)):
            raise UsageError(name, found="nan", wanted="a number")
    products = activations or "auto"
    if text is not None and products in ("none", "static"):
        products = "auto"  # a product is made of every tensor: embeddings have no static parameters
    of_text = {
        "--max-kl": max_kl,
        "--max-ppl-increase": max_ppl_increase,
        "--min-cosine": min_cosine,
        "--device": device,
    }
    quality = None
    if text is not None:
        quality = QualityOptions(
            text=Path(text),
            seqlen=seqlen,
            nsamples=nsamples,
            seed=seed,
            scoring=scoring,
            activations=activations or "none",
            max_kl=as_float(max_kl),
            max_ppl_increase=share("--max-ppl-increase", max_ppl_increase),
            min_cosine=as_float(min_cosine),
            threads=threads,
            device=_device(device, activations),
        )
    elif alone := next((name for name, limit in of_text.items() if limit is not None), None):
        raise UsageError(f"{alone} goes with --text")
    options = VerifyOptions(
        against=as_path(against),
        adapter=as_path(adapter),
        run=run,
        min_sqnr=as_float(min_sqnr),
        max_nmse=as_float(max_nmse),
        min_output_sqnr=as_float(min_output_sqnr),
        exact=exact,
        histograms=histograms,
        limits=as_path(limits),
        rows=rows,
        seed=seed,
        activations=products,
        samples=as_paths(samples),
        quality=quality,
        threads=threads,
    )
    given["adapter"] = as_path(adapter)
    recipe = recorded_recipe(Path(file), given) if rebuild else None
    if recipe:
        arguments_of(recipe)  # now, not after the weights
    report = stage(Path(file), options, progress)
    if rebuild:
        report.checks.append(_rebuilt(report, recipe, options, given))
        if report.failed:
            report.status = "fail"
    return report.judged(strict)


def _rebuilt(
    report: VerifyReport,
    recipe: Recipe | None,
    options: VerifyOptions,
    given: Mapping[str, Path | None],
) -> Check:
    """The check of ``rebuild``, skipped where nothing is known of the file but that it is not what
    it should be.
    """
    if recipe is None or not report.comparable:
        other = report.verdict and report.verdict.other_model
        why = "the source is of another model" if other else "the file is damaged"
        return Check(REBUILD, "skip", f"not rebuilt: {why}")
    assert options.against
    make = partial(
        run_recipe,
        source=options.against,
        calibration=given["calibration"],
        imatrix=given["imatrix"],
        adapter=given["adapter"],
        threads=options.threads,
    )
    return rebuilt(recipe, options.against, make)


def _device(device: str | None, activations: str | None) -> str:
    """The name of a device for both models.

    Raises:
        UsageError: it is none, or products of integers are wanted elsewhere than on the CPU.
    """
    found = check_device(device or CPU)
    if found != CPU and activations not in (None, "none"):
        raise UsageError(
            "--device: integer products run on the CPU",
            found=f"--device {found} --activations {activations}",
            hint="leave out one of them",
        )
    return found
