"""quantize: decide what is made of which tensor, refuse what cannot be, then convert."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qconvert import kernels
from qconvert.errors import FormatError, UnsupportedError, UsageError, about
from qconvert.files import open_model
from qconvert.files.calibration import Calibration
from qconvert.files.dequantized import dequantized
from qconvert.files.gguf_split import plan_shards, shard_path
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import MetadataValue, check_gguf
from qconvert.files.imatrix import read_imatrix
from qconvert.files.qblk_writer import check_qblk
from qconvert.files.shards import MAX_COMPANION_BYTES, MODULES, companion_too_large
from qconvert.kernels.records import ErrorSums
from qconvert.mixes import MixOptions, parse_mix
from qconvert.model import DTYPES, Model
from qconvert.progress import Progress, Silent
from qconvert.ranges import default_method
from qconvert.report import QuantizeReport
from qconvert.schemes import AffineScheme, GgmlScheme, MixScheme
from qconvert.stages.conversion import GgufTarget, Job, fill_totals, planned_row
from qconvert.stages.gguf_sources import as_gguf
from qconvert.stages.plan import (
    MIN_VALUES,
    PlannedTensor,
    PlanOptions,
    check_container,
    make_plan,
    plan_mix,
)
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.sinks import (
    gguf_tensors,
    model_name,
)
from qconvert.stages.sources import examined

__all__ = ["GgufOptions", "QuantizeOptions", "quantize"]

SUFFIXES = {".qblk": "qblk", ".gguf": "gguf"}


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
    with ExitStack() as files, about(source):
        opened = open_model(source)
        files.callback(opened.close)
        said = examined(opened)
        model = _plain(opened, options)
        calibration = None
        if options.calibration:
            calibration = files.enter_context(Calibration(options.calibration))
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
        report.warnings += said.warnings
        report.notes += said.notes
        if container == "qblk":
            report.warnings += _module_warnings(opened)
        if target:
            report.warnings += target.warnings
            report.notes += target.notes
        if calibration and container == "gguf":
            raise UsageError("--calibration has no place in a GGUF file", hint="write a .qblk file")
        _check_plan(model, plan, calibration, container)
        if calibration:
            report.warnings += _unused(calibration, plan)
        if options.range and not any(isinstance(p.scheme, AffineScheme) for p in plan):
            report.warnings.append("--range has no effect: no tensor takes a scheme with ranges")
        report.companions = len(model.companions) if container == "qblk" else 0
        outputs = _outputs(output, plan, options.gguf.shard_size)
        report.output = str(outputs[0][0])
        report.files = len(outputs)
        if options.dry_run:
            report.tensors = [planned_row(p) for p in plan]
            report.output_bytes = sum(t.nbytes for t in report.tensors)
            if container == "qblk":
                report.output_bytes += sum(c.size for c in model.companions)
            fill_totals(report, ErrorSums())
        else:
            job = Job(model, plan, options, calibration, target, report, progress)
            job.write(output, outputs)
    report.seconds = time.perf_counter() - started
    return report


def _plain(opened: Model, options: QuantizeOptions) -> Model:
    """The model with every tensor in a plain dtype.

    Raises:
        UsageError: it is quantized, and nobody said that it may be quantized again.
    """
    quantized = next((t for t in opened.tensors if t.dtype not in DTYPES), None)
    if quantized and not options.allow_requantize:
        raise UsageError(
            "the source is quantized already",
            path=opened.path,
            tensor=quantized.name,
            found=quantized.dtype,
            hint="convert the original, or accept the loss with --allow-requantize",
        )
    return dequantized(opened)


def _plan(
    opened: Model, model: Model, options: QuantizeOptions, container: str
) -> tuple[tuple[PlannedTensor, ...], GgufTarget | None]:
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
    return plan, GgufTarget(source.model, metadata, imatrix, tuple(warnings), tuple(notes))


def _module_warnings(model: Model) -> list[str]:
    """Modules of sentence-transformers that follow the transformer and are files of their own."""
    if all(c.name != MODULES for c in model.companions):
        return []
    from qconvert.architectures import SmallFiles, modules_beyond  # 0.1 s to load

    try:
        modules = modules_beyond(SmallFiles(model))
    except FormatError as error:  # which is carried along as it is
        return [f"{MODULES} does not say what follows the transformer: {error.message}"]
    return [
        f"the file holds the transformer, not the module '{name}' of sentence-transformers that "
        "follows it: embeddings from the file alone are other ones"
        for name in modules
    ]


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
        for companion in model.companions:
            if companion.size > MAX_COMPANION_BYTES:
                raise companion_too_large(model.path, companion.name, companion.size)
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
        calibration.check(tensor)


def _unused(calibration: Calibration, plan: tuple[PlannedTensor, ...]) -> list[str]:
    """A warning where layers of the calibration have no tensor in the plan."""
    unused = calibration.unused([p.tensor.name for p in plan if p.scheme])
    if not unused:
        return []
    return [
        f"calibration has {len(unused)} layers that no quantized tensor uses, such as '{unused[0]}'"
    ]


def _range_text(options: QuantizeOptions) -> str:
    """The range method of the main scheme; other schemes name theirs in their decisions."""
    if not isinstance(options.scheme, AffineScheme):
        return "none"
    return (options.range or default_method(options.scheme.bits)).describe()
