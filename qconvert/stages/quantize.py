"""quantize: decide what is made of which tensor, refuse what cannot be, then convert."""

from __future__ import annotations

import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qconvert import kernels
from qconvert.calibration.equalised import EqualisedCalibration
from qconvert.calibration.file import Calibration
from qconvert.containers import CONTAINERS, WRITTEN, Container, container_for
from qconvert.errors import UnsupportedError, UsageError, WeightError, about
from qconvert.files import OpenModel, open_model
from qconvert.files.adapters import AdaptedModel, open_adapter
from qconvert.files.dequantized import dequantized
from qconvert.kernels.records import ErrorSums
from qconvert.model import Model
from qconvert.progress import Progress, Silent
from qconvert.report import QuantizeReport
from qconvert.schemes import CastScheme, KeepScheme, MixScheme, TensorScheme, adapted
from qconvert.stages.budget import unknown_sensitivities, within_budget
from qconvert.stages.checkpoints import as_directory
from qconvert.stages.compensated_losses import CompensatedLosses
from qconvert.stages.conversion import Job, fill_totals, planned_row, write_together
from qconvert.stages.equalisation import rescaled
from qconvert.stages.moving import moved_notes
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlannedTensor, check_schemes
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions, RepairText
from qconvert.stages.rounding import Roundings, plan_roundings
from qconvert.stages.sources import Remarks, examined
from qconvert.stages.target import Prepared, model_name, target_of

__all__ = ["GgufOptions", "QuantizeOptions", "quantize", "quantize_together"]

_FILES = tuple(c for c in WRITTEN if not c.directory)


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
    with ExitStack() as files:
        begun = _begun(source, options, files, progress)
        job, report, options = begun.job, begun.job.report, begun.job.options
        files.enter_context(about(source))
        files.enter_context(_hints(options))
        if options.dry_run:
            if options.repair:
                report.warnings.append("--text has no effect on a dry run: the model is not run")
            report.tensors = [
                planned_row(p, job.roundings, begun.sizes.get(p.tensor.name))
                for p in job.prepared.plan
            ]
            report.output_bytes = sum(t.nbytes for t in report.tensors)
            report.output_bytes += job.prepared.companion_bytes
            fill_totals(report, ErrorSums())
            if options.finetune:
                report.notes.append("scales of rows are not tuned in a dry run")
        elif options.finetune:
            from qconvert.stages.finetune import convert_tuned  # what runs models

            convert_tuned(
                *(source, begun.output, job.prepared, job.plain, options),
                *(job.calibration, job.roundings, report, progress),
            )
        else:
            job.write(begun.output)
    report.seconds = time.perf_counter() - started
    return report


def quantize_together(
    source: Path, several: Sequence[QuantizeOptions], progress: Progress | None = None
) -> list[QuantizeReport]:
    """Convert a model several times, a tensor at a time: what is read from the disk for one of them
    is in memory for the others. No output gets its name before all are complete.

    Raises:
        UsageError: two have one output, or options of one alone; and as of `quantize`.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    for name, given in (
        ("--finetune", any(o.finetune for o in several)),
        ("--text", any(o.repair for o in several)),
        ("--dry-run", any(o.dry_run for o in several)),
    ):
        if given:
            raise UsageError(f"{name} goes with one scheme", found=f"{len(several)} schemes")
    with ExitStack() as files:
        begun = [_begun(source, options, files, progress) for options in several]
        files.enter_context(about(source))
        for i, one in enumerate(begun):
            if any(one.output == other.output for other in begun[:i]):
                raise UsageError("two schemes would have one output", found=str(one.output))
        write_together([(one.job, one.output) for one in begun])
    for one in begun:
        one.job.report.seconds = time.perf_counter() - started
    return [one.job.report for one in begun]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A conversion that everything is known of but the codes.

    Attributes:
        output: its name, whole or in several files.
        sizes: of tensors that a budget chose for.
    """

    job: Job
    output: Path
    sizes: Mapping[str, int]


def _begun(source: Path, options: QuantizeOptions, files: ExitStack, progress: Progress) -> _Begun:
    """Decide, and refuse what cannot be; see `quantize`."""
    names = kernels.describe()
    output, container = _output(source, options)
    if options.calibration is None and not options.weighting:
        raise UsageError(
            "--no-weighting without a calibration", hint="weights come with --calibration FILE"
        )
    if options.finetune:
        from qconvert.stages.finetune import check_source  # what runs models

        check_source(source, progress)
    options = _with_projector(_with_adapter(_kept(options), container), container)
    options = _adapted(options, container)
    check_schemes((options.scheme, *(s for _, s in options.tensor_schemes)), container)
    with about(source), _hints(options):
        opened = open_model(source)
        files.callback(opened.close)
        said = examined(opened)
        if container.directory or options.config is not None:
            _check_config(options, container)
            seen = as_directory(opened, options.config)
            opened = seen.model
            said = Remarks(said.notes + seen.said.notes, said.warnings + seen.said.warnings)
        plain = _plain(opened, options)
        if options.adapter:
            adapter = open_adapter(options.adapter)
            files.callback(adapter.close)
            plain = AdaptedModel(plain, adapter)
            said.notes.append(adapter.described())
        calibration = None
        if options.calibration:
            calibration = files.enter_context(Calibration(options.calibration))
            calibration.check_model(plain)
        target = target_of(container)
        prepare = partial(target.prepare, opened, options=options, output=output)
        plain, prepared, calibration, equalisation = rescaled(
            plain, prepare, calibration, options, files, progress
        )
        decided, prediction, sizes = None, None, {}
        if options.budget:
            decided = within_budget(
                *(target, opened, plain, options, output, container.name, calibration, progress)
            )
            options, prepared = decided.options, decided.prepared
            prediction, sizes = decided.prediction, decided.sizes
        report = _report(source, opened, container, names, options, prepared)
        report.prediction = prediction
        report.equalisation = equalisation
        report.warnings = said.warnings + report.warnings
        moved = moved_notes(prepared.plan) if isinstance(options.scheme, KeepScheme) else []
        # Few are shown of many.
        report.notes = [*moved, *prepared.readers, *said.notes, *report.notes]
        layers: dict[str, str] = {}
        tables: dict[str, str] = {}
        if calibration:
            layers = prepared.layers_of(calibration.layers.keys())
            _check_calibration(calibration, prepared, layers)
            report.warnings += _unused(calibration, prepared.plan, layers)
            tables = prepared.layers_of(calibration.tables.keys())
        if prediction:
            report.warnings += unknown_sensitivities(prediction.without)
        roundings = plan_roundings(
            *(prepared.plan, calibration, tables | layers),
            *(options.rounding, options.weighting, prepared.model),
        )
        if options.repair and options.finetune and not roundings.compensated:
            options = replace(options, repair=None)  # the text is for tuning alone
        if options.repair:
            _check_repair(options.repair, roundings)
        report.warnings += roundings.warnings()
        report.notes += roundings.notes()
        if isinstance(calibration, EqualisedCalibration):
            report.notes.append(
                f"the static ranges of {len(calibration.rescaled)} layers with rescaled inputs are "
                "those of the extremes of their channels"
            )
        if decided and calibration and decided.losses and roundings.compensated:
            left = CompensatedLosses(prepared, options, calibration, roundings)
            threads = options.threads or available_threads()
            decided.expect(left.of(decided.losses, progress, threads))
            if options.repair:
                report.notes.append(
                    "losses are predicted for compensated codes: what aiming at the outputs of the "
                    "float model makes up for is not"
                )
        if options.range and not prepared.ranged:
            report.warnings.append("--range has no effect: no tensor takes a scheme with ranges")
        job = Job(prepared, plain, options, calibration, roundings, report, progress)
        return _Begun(job, output, sizes)


def _check_config(options: QuantizeOptions, container: Container) -> None:
    """Refuse a directory of small files where the output has no place for them.

    Raises:
        UsageError: it is none that another tool loads.
    """
    if options.config is not None and not container.directory:
        raise UsageError(
            "--config goes with a GGUF file that becomes a directory",
            found=f"--format {container.name}",
            hint="leave it out",
        )


@contextmanager
def _hints(options: QuantizeOptions) -> Iterator[None]:
    """What can be done about weights where ``--keep`` cannot be given."""
    try:
        yield
    except WeightError as e:
        if isinstance(options.scheme, KeepScheme):
            e.hint = "the source is damaged or was written wrongly: download or save it again"
        raise


def _report(
    source: Path,
    opened: OpenModel,
    container: Container,
    names: str,
    options: QuantizeOptions,
    prepared: Prepared,
) -> QuantizeReport:
    """What is known before anything is converted."""
    default = options.scheme.default_range
    alone = options.adapter_only or options.gguf.mmproj  # some tensors of the source
    return QuantizeReport(
        kernels=names,
        source=str(source),
        output=str(prepared.outputs[0]),
        container=container.name,
        scheme=options.name,
        range=(options.range or default).describe() if default else "none",
        dry_run=options.dry_run,
        tensors=[],
        source_bytes=sum(t.nbytes for t in (prepared.model if alone else opened).tensors),
        output_bytes=0,
        quantized_bits_per_weight=None,
        model_bits_per_weight=None,
        sqnr_db=None,
        calibration=options.calibration.name if options.calibration else None,
        companions=prepared.companions,
        files=len(prepared.outputs),
        warnings=[*prepared.warnings],
        notes=[*prepared.notes],
    )


def _plain(opened: OpenModel, options: QuantizeOptions) -> Model:
    """The model with every tensor in a plain dtype.

    Raises:
        UsageError: it is quantized, and nobody said that it may be quantized again.
    """
    quantized = next((t for t in opened.tensors if t.coded), None)
    schemes = (options.scheme, *(s for _, s in options.tensor_schemes))
    cast = all(isinstance(s, CastScheme | KeepScheme) for s in schemes)
    if quantized and not (cast or options.allow_requantize):
        raise UsageError(
            "the source is quantized already",
            path=opened.path,
            tensor=quantized.name,
            found=quantized.dtype,
            hint="convert the original; move its codes with --scheme keep, decode it with --scheme "
            "bf16, or accept that more is lost with --allow-requantize",
        )
    return dequantized(opened)


def _kept(options: QuantizeOptions) -> QuantizeOptions:
    """Options of a conversion that keeps the codes of its source: nothing is rescaled then.

    Raises:
        UsageError: ``--exact`` without it, or schemes for single tensors with it.
    """
    if not isinstance(options.scheme, KeepScheme):
        if options.exact:
            raise UsageError("--exact goes with --scheme keep")
        return options
    if options.tensor_schemes or options.keep:
        raise UsageError("--scheme keep moves all tensors: no --tensor-scheme or --keep with it")
    return replace(options, equalise=False)


def _with_adapter(options: QuantizeOptions, container: Container) -> QuantizeOptions:
    """Options of a conversion that may take an adapter: by itself, nothing is rescaled.

    Raises:
        UsageError: they keep codes of the model, or run it, which would be without the adapter; or
            an adapter by itself is asked for in a form that it has not.
    """
    if options.adapter is None:
        if options.adapter_only:
            raise UsageError("--adapter-only without an adapter", hint="give it with --adapter DIR")
        return options
    merged = "merge it first, with --scheme bf16 --format hf, and convert what that gives"
    for name, given, hint in (
        ("--scheme keep", isinstance(options.scheme, KeepScheme), "choose another scheme"),
        ("--text", options.repair, merged),
        ("--finetune", options.finetune, merged),
    ):
        if given:
            raise UsageError(f"{name} does not go with --adapter", hint=hint)
    if not options.adapter_only:
        return options
    if container.name != "gguf" or not isinstance(options.scheme, CastScheme):
        raise UsageError(
            "--adapter-only writes numbers into a GGUF file",
            found=f"--scheme {options.name} into {container.name}",
            wanted="--scheme f32, f16 or bf16, and --format gguf",
        )
    without = {
        "--calibration": options.calibration,
        "--imatrix": options.gguf.imatrix,
        "--tensor-scheme": options.tensor_schemes,
        "--raw": options.gguf.raw,
    }
    if names := [name for name, value in without.items() if value]:
        raise UsageError(f"{names[0]} does not go with --adapter-only")
    return replace(options, equalise=False)


def _with_projector(options: QuantizeOptions, container: Container) -> QuantizeOptions:
    """Options of a conversion that may write what sees images alone: nothing is rescaled then.

    Raises:
        UsageError: it is asked for in a form that it has not, or with what is the language model's.
    """
    if not options.gguf.mmproj:
        return options
    if container.name != "gguf":
        raise UsageError(
            "--mmproj writes a GGUF file, which llama.cpp loads beside one of the language model",
            found=f"--format {container.name}",
            hint="leave --format out, and let the output's name end in .gguf",
        )
    g = options.gguf
    of_text = {
        "--scheme keep": isinstance(options.scheme, KeepScheme),
        "a budget": options.budget,
        "--adapter": options.adapter,
        "--calibration": options.calibration,
        "--text": options.repair,
        "--finetune": options.finetune,
        "--imatrix": g.imatrix,
        "--raw": g.raw,
        "--pre-tokenizer": g.pre_tokenizer,
        "--output-tensor-type": g.output_type,
        "--token-embedding-type": g.token_embedding_type,
        "--no-mtp": not g.mtp,
        "--shard-size": g.shard_size,
    }
    if names := [name for name, given in of_text.items() if given]:
        why = "llama.cpp reads it whole" if names[0] == "--shard-size" else "for a language model"
        raise UsageError(f"{names[0]} does not go with --mmproj: {why}", hint="leave it out")
    return replace(options, equalise=False)


def _adapted(options: QuantizeOptions, container: Container) -> QuantizeOptions:
    """Options with the schemes that the container has in place of those on the same grid.

    Raises:
        UsageError: an option that a directory of another tool has no place for.
    """
    if not container.directory:
        return options
    for given, name in ((options.budget, "a budget"), (options.finetune, "--finetune")):
        if given:
            raise UsageError(
                f"{name} goes with .qblk and .gguf files",
                found=f"--format {container.name}",
                hint="choose schemes with --scheme and --tensor-scheme",
            )
    schemes = [(glob, adapted(s, container.takes)) for glob, s in options.tensor_schemes]
    assert not any(isinstance(s, MixScheme) for _, s in schemes)
    return replace(
        options,
        scheme=adapted(options.scheme, container.takes),
        tensor_schemes=tuple((glob, typing.cast(TensorScheme, s)) for glob, s in schemes),
    )


def _output(source: Path, options: QuantizeOptions) -> tuple[Path, Container]:
    """Where the result goes and in which container: by the suffix, unless said otherwise."""
    output = options.output
    asked = CONTAINERS[options.container] if options.container else None
    if asked is None and options.gguf.mmproj:
        asked = CONTAINERS["gguf"]
    formats = " or ".join(f"--format {c.name}" for c in WRITTEN)
    if output is None and asked is None and isinstance(options.scheme, KeepScheme):
        raise UsageError("--scheme keep into what?", wanted=formats)
    if output is None:
        container = asked or container_for(options.scheme.family)
        parent = source.parent if source.name not in ("", "..") else source.resolve().parent
        parent = options.home or parent
        dot = "-" if container.directory else "."  # a name with a suffix looks like a file's
        # llama.cpp knows such files by the beginning of their names
        kind = "mmproj-" if options.gguf.mmproj else ""
        name = f"{kind}{model_name(source)}{dot}{options.name}{container.suffix}"
        return parent / name, container
    found = asked or next((c for c in _FILES if c.suffix == output.suffix.lower()), None)
    if found is None and isinstance(options.scheme, KeepScheme):
        raise UsageError("--scheme keep into what?", wanted=formats)
    if found is None and container_for(options.scheme.family).directory:
        found = container_for(options.scheme.family)
    if found is None:
        takes = [c for c in WRITTEN if adapted(options.scheme, c.takes).family in c.takes]
        takes = [c for c in takes if c.suffix or not options.budget]
        suffixes = " or ".join(c.suffix for c in takes if c.suffix)
        raise UsageError(
            f"cannot tell the container from the name '{output.name}'",
            wanted=f"a name that ends in {suffixes}",
            hint=f"or say {' or '.join(f'--format {c.name}' for c in takes)}",
        )
    return output, found


def _check_calibration(
    calibration: Calibration, prepared: Prepared, layers: Mapping[str, str]
) -> None:
    """Refuse before the long work a calibration that does not fit the model.

    Args:
        layers: by the tensors that are their weights.

    Raises:
        UnsupportedError: none of its layers, or one of another width, is a quantized tensor.
    """
    used = [p.tensor for p in prepared.plan if p.scheme and p.tensor.name in layers]
    if not used:
        raise UnsupportedError(
            "no layer of the calibration belongs to a tensor that is quantized",
            path=calibration.path,
            hint="calibrate with activations of this model",
        )
    for tensor in used:
        calibration.check(tensor, layers[tensor.name])


def _check_repair(repair: RepairText, roundings: Roundings) -> None:
    """Refuse a text where no target could be other than its weight.

    Raises:
        UsageError: no tensor is rounded so that codes make up for each other's errors.
    """
    if roundings.compensated:
        return
    reasons = dict.fromkeys(r.reason for r in roundings.of.values())
    raise UsageError(
        "--text without a tensor whose codes make up for each other's errors",
        found="; ".join(reasons) or None,
        hint="give --calibration a file with Gram matrices, made with: qconvert calibrate "
        f"MODEL --text {repair.text.name} --gram",
    )


def _unused(
    calibration: Calibration, plan: tuple[PlannedTensor, ...], layers: Mapping[str, str]
) -> list[str]:
    """A warning where layers of the calibration have no tensor in the plan."""
    used = {layers[p.tensor.name] for p in plan if p.scheme and p.tensor.name in layers}
    unused = calibration.unused(sorted(used))
    if not unused:
        return []
    return [
        f"calibration has {len(unused)} layers that no quantized tensor uses, such as '{unused[0]}'"
    ]
