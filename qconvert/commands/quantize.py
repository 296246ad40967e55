"""`qconvert.quantize`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qconvert.commands.arguments import (
    as_assignments,
    as_path,
    as_texts,
    budget_of,
    check_bounds,
    container_name,
    equalise_asked,
    finetune_of,
    parse_override,
    parse_tensor_scheme,
    range_method,
    repair_of,
    rounding_method,
    size_in_bytes,
)
from qconvert.errors import UsageError
from qconvert.mixes import parse_ggml_type, parse_tensor_type
from qconvert.progress import Progress
from qconvert.report import QuantizeReport, QuantizeSetReport
from qconvert.schemes import parse_scheme
from qconvert.stages.plan import MIN_VALUES
from qconvert.stages.quantize import GgufOptions, QuantizeOptions
from qconvert.stages.quantize import quantize as stage
from qconvert.stages.quantize import quantize_together as together
from qconvert.stages.quantize_options import UNDER_BUDGET


def quantize(
    model: Path | str,
    scheme: str | None = None,
    *,
    output: Path | str | None = None,
    format: str | None = None,
    range: str | None = None,
    percentile: float | None = None,
    calibration: Path | str | None = None,
    no_weighting: bool = False,
    rounding: str | None = None,
    equalise: str | None = None,
    text: Path | str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    keep: str | Iterable[str] | None = None,
    tensor_scheme: Mapping[str, str] | str | Iterable[str] | None = None,
    min_values: int = MIN_VALUES,
    hash_source: bool = False,
    allow_requantize: bool = False,
    exact: bool = False,
    adapter: Path | str | None = None,
    adapter_only: bool = False,
    config: Path | str | None = None,
    tensor_type: Mapping[str, str] | str | Iterable[str] | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    imatrix: Path | str | None = None,
    pure: bool = False,
    no_fallback: bool = False,
    raw: bool = False,
    mmproj: bool = False,
    pre_tokenizer: str | None = None,
    no_mtp: bool = False,
    shard_size: str | int | None = None,
    override_kv: Mapping[str, str] | str | Iterable[str] | None = None,
    target_bpw: float | None = None,
    target_size: str | int | None = None,
    max_kl: float | None = None,
    preset: str | None = None,
    finetune: int = 0,
    seed: int = 0,
    sensitivities: Path | str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Convert a model to .qblk, GGUF or a directory for other tools.

    >>> report = qconvert.quantize(
    ...     "samples/tiny-llama",
    ...     "q4_block64",
    ...     output="model.qblk",
    ...     tensor_scheme={"*down_proj*": "q6_block32"},
    ...     keep="lm_head.*",
    ... )
    >>> report
    <QuantizeReport pass: 'model.qblk', q4_block64, 29 of 39 tensors quantized, ...>
    >>> [t.stored for t in report.tensors if t.name == "lm_head.weight"]
    ['BF16']

    Args:
        model: a safetensors file, a model directory, or a GGUF or .qblk file.
        scheme: such as ``q4_block64`` or ``q4_k_m``; `qconvert.schemes.SCHEMES` has them all.
        output: a name that ends in .qblk or .gguf, or a directory; beside the model by default.
        format: ``qblk``, ``gguf``, ``mlx`` ... where name and scheme do not say.
        range: ``minmax``, ``percentile`` or ``mse``; mse up to 6 bits, else minmax.
        percentile: of ``range="percentile"``, 99.99 by default.
        calibration: weigh errors by the inputs' mean squares, store static activation parameters.
        no_weighting: of a calibration take the static parameters alone.
        rounding: ``nearest``, or ``compensated`` for codes that make up for each other's errors, by
            the Gram matrices of a calibration; by default compensated where there is one.
        equalise: ``auto``, the default, to rescale channels between tensors by powers of two where
            that leaves clearly less error and the architecture is known, or ``off``. The model's
            function stays the same.
        text: run the model over it, and aim each tensor that is rounded so at the outputs that it
            had before, on the inputs that the tensors before it now give it: they make up for what
            those have lost. The calibration's text will do; measure the result on another one.
        nsamples, seqlen: windows of ``text``, and tokens of each, 256 by default. Of a long text 64
            windows aim tensors by default, and all of them ``finetune``.
        keep: keep tensors that match this glob, or one of these, bit for bit.
        tensor_scheme: another scheme for tensors that match a glob: ``{glob: scheme}``, or texts
            ``"GLOB=SCHEME"``; the first match wins.
        min_values: keep tensors of fewer values.
        hash_source: record the SHA-256 of the source files, which reads them again.
        allow_requantize: take a source that is quantized already.
        exact: of ``scheme="keep"``, which moves codes as they are: refuse a source that has some
            which the output cannot hold; otherwise they are decoded.
        adapter: a LoRA adapter, a directory that peft's ``save_pretrained`` made, which is merged
            into the model before anything else.
        adapter_only: GGUF: write the adapter by itself, for llama.cpp to load beside any file of
            the model (``--lora``); the scheme is f32, f16 or bf16.
        config: of a GGUF file that becomes a directory: that of the model that it was made from,
            whose configuration, tokenizer and names are taken; made of the file by default.
        tensor_type: GGUF: another ggml type where a regular expression is found in the name:
            ``{regex: type}``, or texts ``"REGEX=TYPE"``; the first match wins.
        output_tensor_type, token_embedding_type: GGUF: ggml types of these two.
        imatrix: GGUF: an importance matrix of llama.cpp, to weight the search.
        pure: GGUF: one type for all matrices.
        no_fallback: GGUF: refuse matrices whose rows do not divide into blocks.
        raw: GGUF: only tensors, under their own names, of any architecture.
        mmproj: GGUF: of a model that sees write the part that turns images into tokens, for
            llama.cpp to load beside a file of its language model (``--mmproj``); the scheme is f16
            by default.
        pre_tokenizer: GGUF: llama.cpp's name for it, where it is not recognised.
        no_mtp: GGUF: leave out a layer that predicts a further token (multi-token prediction),
            which llama.cpp uses for drafts.
        override_kv: GGUF: other values of metadata: ``{key: "TYPE:VALUE"}``, or texts
            ``"KEY=TYPE:VALUE"``, of type ``int``, ``float``, ``bool`` or ``str``.
        shard_size: GGUF, directories: files of at most so many bytes, or ``"2G"``.
        target_bpw, target_size, max_kl: in place of a scheme a budget, of which each tensor gets a
            scheme so that the least is lost: bits per weight over the whole file, bytes of the
            file, or the predicted divergence of next tokens in nats. By the ``calibration`` where
            it was made with ``fisher``, else by what tensors of each role usually need.
        preset: a budget by name: ``small``, ``balanced`` or ``near-lossless``.
        finetune: tune the scales of rows and the gains of norms for so many steps of gradient
            descent, usually 20, so that the model predicts next tokens as its source does; codes
            and size stay. The model is a directory that transformers runs, twice in memory as
            float32. By ``text``, a part of which judges. Needs qconvert[hf].
        seed: of ``finetune``: of the windows that are drawn, and of their order.
        sensitivities: of a budget: a file of what each tensor loses under each scheme, read where
            it is there and written where not.
        threads: all available processors by default.
        dry_run: plan, and write nothing.
        force: replace an existing output.
        strict: a warning makes the report's status ``fail``, and nothing is written.
        progress: is told of the steps of long work.

    Raises:
        InputError: the model or the calibration cannot be used.
        UsageError: options contradict each other or the model, or name what does not exist.
        MachineError: the output cannot be written; OutputExistsError: it exists.
    """
    given = {k: v for k, v in locals().items() if k not in ("model", "progress")}
    return stage(Path(model), _options(**given), progress).judged(strict)


def quantize_set(
    model: Path | str,
    schemes: Iterable[str],
    *,
    output: Path | str | None = None,
    strict: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizeSetReport:
    """Convert a model to several files, whose names are those that each has by default.

    The conversion goes through the source once, tensor by tensor, and no file gets its name before
    all of them are complete. What equalisation looks at before is read for each scheme, unless
    ``equalise="off"``.

    Args:
        schemes: at least one.
        output: a directory that exists, for the files; that of the model by default.
        options: of `quantize`, for all of them.

    Raises:
        As of `quantize`.
    """
    names = list(schemes)
    if not names:
        raise UsageError("no scheme is named", wanted="at least one")
    given = {"output": None, "strict": strict, **_DEFAULTS, **options}
    several = [_options(**{**given, "scheme": name}) for name in names]
    if output is not None and not Path(output).is_dir():
        raise UsageError(
            "-o with several schemes",
            found=str(output),
            wanted="a directory that exists, in which each file has a name of its own",
        )
    home = as_path(output)
    reports = together(Path(model), [replace(o, home=home) for o in several], progress)
    found = QuantizeSetReport(reports[0].kernels, str(model), [r.judged(strict) for r in reports])
    found.status = "fail" if any(r.status == "fail" for r in reports) else "pass"
    found.warnings = [f"{r.scheme}: {w}" for r in reports for w in r.warnings]
    return found


_DEFAULTS = {
    name: p.default
    for name, p in inspect.signature(quantize).parameters.items()
    if name not in ("model", "output", "strict", "progress")
}


def _options(
    scheme: str | None,
    *,
    output: Path | str | None,
    format: str | None,
    range: str | None,
    percentile: float | None,
    calibration: Path | str | None,
    no_weighting: bool,
    rounding: str | None,
    equalise: str | None,
    text: Path | str | None,
    nsamples: int | None,
    seqlen: int | None,
    keep: str | Iterable[str] | None,
    tensor_scheme: Mapping[str, str] | str | Iterable[str] | None,
    min_values: int,
    hash_source: bool,
    allow_requantize: bool,
    exact: bool,
    adapter: Path | str | None,
    adapter_only: bool,
    config: Path | str | None,
    tensor_type: Mapping[str, str] | str | Iterable[str] | None,
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    imatrix: Path | str | None,
    pure: bool,
    no_fallback: bool,
    raw: bool,
    mmproj: bool,
    pre_tokenizer: str | None,
    no_mtp: bool,
    shard_size: str | int | None,
    override_kv: Mapping[str, str] | str | Iterable[str] | None,
    target_bpw: float | None,
    target_size: str | int | None,
    max_kl: float | None,
    preset: str | None,
    finetune: int,
    seed: int,
    sensitivities: Path | str | None,
    threads: int | None,
    dry_run: bool,
    force: bool,
    strict: bool,
) -> QuantizeOptions:
    """Options of one conversion, as `quantize` describes them.

    Raises:
        UsageError: they contradict each other.
    """
    check_bounds("--min-values", min_values, 0)
    check_bounds("--threads", threads, 1)
    check_bounds("--nsamples", nsamples, 1)
    check_bounds("--seqlen", seqlen, 2)
    repair = repair_of(text, seqlen, nsamples)
    container = container_name(format)
    gguf = container == "gguf" or (container is None and str(output).lower().endswith(".gguf"))
    written = "gguf" if gguf else "qblk"
    budget = budget_of(target_bpw, target_size, max_kl, sensitivities, preset, written)
    if mmproj and scheme is None and budget is None:
        scheme = "f16"  # as such files are published
    if (scheme is None) == (budget is None):
        raise UsageError(
            "what the weights become",
            found="--scheme and a budget" if scheme else "neither --scheme nor a budget",
            wanted="one of them, such as --scheme q4_block64 or --preset balanced",
        )
    if budget and (pure or no_fallback):
        raise UsageError("--pure and --no-fallback go with --scheme, not with a budget")
    if scheme is None:  # which tensors are quantized at all; what they take is chosen
        scheme = UNDER_BUDGET[written]
    return QuantizeOptions(
        scheme=parse_scheme(scheme),
        output=as_path(output),
        container=container,
        range=range_method(range, percentile),
        calibration=as_path(calibration),
        weighting=not no_weighting,
        rounding=rounding_method(rounding),
        equalise=equalise_asked(equalise),
        repair=repair,
        keep=as_texts(keep),
        tensor_schemes=tuple(map(parse_tensor_scheme, as_assignments(tensor_scheme))),
        min_values=min_values,
        threads=threads,
        dry_run=dry_run,
        force=force,
        strict=strict,
        hash_source=hash_source,
        allow_requantize=allow_requantize,
        exact=exact,
        adapter=as_path(adapter),
        adapter_only=adapter_only,
        config=as_path(config),
        budget=budget,
        finetune=finetune_of(finetune, text, seqlen, nsamples, seed),
        gguf=GgufOptions(
            raw=raw,
            mmproj=mmproj,
            pre_tokenizer=pre_tokenizer,
            mtp=not no_mtp,
            pure=pure,
            fallback=not no_fallback,
            output_type=output_tensor_type and parse_ggml_type(output_tensor_type),
            token_embedding_type=token_embedding_type and parse_ggml_type(token_embedding_type),
            tensor_types=tuple(map(parse_tensor_type, as_assignments(tensor_type))),
            imatrix=as_path(imatrix),
            shard_size=size_in_bytes("--shard-size", shard_size),
            overrides=tuple(map(parse_override, as_assignments(override_kv))),
        ),
    )
