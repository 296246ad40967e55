"""tune: train a model with the grid of its scheme in place, and judge what came of it on text that
was not trained on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.codecs.codec import Stored
from qconvert.codecs.rescaled import TRAINED
from qconvert.containers import CONTAINERS
from qconvert.errors import InputError, UsageError, about
from qconvert.files import open_model
from qconvert.files.atomic import check_directory, check_target, draft_directory
from qconvert.files.dequantized import dequantized
from qconvert.files.equalised import Exponents, equalised, read_exponents
from qconvert.files.qblk import QblkModel
from qconvert.files.regular import file_sha256
from qconvert.files.safetensors import open_safetensors
from qconvert.files.saved_state import SavedState
from qconvert.progress import Progress, Silent
from qconvert.quantities import counted, size
from qconvert.report import QuantizeReport, TuneReport
from qconvert.running.hugging_face import checked_config, model_class, open_checkpoint
from qconvert.running.quality import BATCH_TOKENS
from qconvert.running.quantized_model import open_quantized
from qconvert.schemes import TENSOR_SCHEMES
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlanOptions, check_schemes, make_plan
from qconvert.stages.quantize import quantize
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions, RepairText
from qconvert.training.fixed import can_stay, held
from qconvert.training.judging import (
    COMPENSATED,
    FLOAT,
    NEAREST,
    TUNED,
    WRITTEN,
    check_disk,
)
from qconvert.training.judging import noted as noted_figures
from qconvert.training.loop import Student, passes, rates_of, rounding_errors
from qconvert.training.memory import VALUE, check_memory, needed_bytes, trained_values
from qconvert.training.options import TuneOptions
from qconvert.training.preparation import Training, prepare_model
from qconvert.training.run import (
    Begun,
    Found,
    Run,
    asked_of,
    begun,
    check_numbers,
    check_resumed,
    report_of,
    train_and_judge,
)
from qconvert.training.saving import check_directory_name, container_of, save_model
from qconvert.training.state import COPIES

AIMED = 64  # windows that codes are aimed by
OBSERVED = 8  # batches that static ranges of the untrained model are taken from


def tune(source: Path, options: TuneOptions, progress: Progress | None = None) -> TuneReport:
    """Train a model and write it, or what quantization without training gives where that is better.

    Raises:
        UsageError: options contradict the model or each other.
        InputError: the model, the teacher, the text or the calibration cannot be used.
        MachineError: the output cannot be written, or memory does not suffice.
        Stopped: a signal arrived; what was done so far is kept.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    container = CONTAINERS["qblk"] if options.floats else container_of(options.output)
    check_schemes((options.grid, *(s for _, s in options.tensor_schemes)), container)
    if container.name == "gguf" and options.activations == "static":
        raise UsageError(
            "a GGUF file has no place for static ranges", wanted="-o with a name that ends in .qblk"
        )
    if options.floats and options.activations != "none":
        raise UsageError("--float writes weights alone, without what --activations would need")
    if options.floats:
        check_directory_name(options.output, "--float writes a model directory")
    given = (source, options.text, options.teacher, options.calibration)
    inputs = [path for path in given if path]
    check = check_directory if options.floats else check_target
    check(options.output, options.force, inputs)
    state = SavedState(options.output, inputs, "steps", options.save_seconds, "TUNE")
    state.check(resume=options.resume, force=options.force)
    needed, kept = _needed(source, options)
    check_memory(needed)
    # Beside the output from now on, so that a place that cannot be written to costs no time.
    with about(source), draft_directory(options.output) as directory:
        check_disk(state, kept)
        progress.begin(
            f"load the model; tuning takes about {size(needed)} of memory, and up to "
            f"{size(WRITTEN * kept)} beside the output for what is done so far",
            *(1, "model"),
        )
        run = _Run(source, options, progress)
        progress.end()
        report = report_of(source, container, run, needed)
        report.state_bytes = kept
        at = _begin(run, report, directory, state)
        with state.kept():
            train_and_judge(run, report, at, state, (NEAREST, COMPENSATED))
            _write(run, report, at.student, directory)
            state.remove()
    report.seconds = time.perf_counter() - started
    return report


class _Run(Run):
    """See `Run`; the model is loaded as floats.

    Attributes:
        exponents: by which the tensors of the last student were rescaled.
    """

    exponents: Mapping[str, Exponents]

    def __init__(self, source: Path, options: TuneOptions, progress: Progress) -> None:
        loaded = open_checkpoint(source, threads=options.threads or available_threads())
        super().__init__(source, options, progress, loaded)

    def prepare(self, exponents: Mapping[str, Exponents] | None = None) -> Student:
        """A student from the model as it is, or with channels rescaled."""
        o = self.options
        model = copy.deepcopy(self.loaded.model)
        self.exponents = dict(exponents or {})
        with torch.no_grad():
            for name, found in self.exponents.items():
                weight = model.get_parameter(name)
                shape = tuple(weight.shape)
                values = found.applied(weight.numpy().ravel(), shape, 0).reshape(shape)
                weight.copy_(torch.from_numpy(values))
        training = prepare_model(
            model,
            o.grid,
            activations=None if o.activations == "none" else o.activations,
            keep=o.keep,
            tensor_scheme={glob: scheme.name for glob, scheme in o.tensor_schemes},
        )
        parameters = _trained(model, training, o)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        student = Student(replace(self.loaded, model=model.eval()), training, parameters)
        self._observe(student)
        return student

    def _observe(self, student: Student) -> None:
        """Give static activations their first ranges."""
        if self.options.activations != "static":
            return
        inputs = self.split.training.inputs[: OBSERVED * self.options.batch]
        with torch.no_grad(), student.observing():
            for part in passes(*inputs.shape):
                ids = torch.from_numpy(np.ascontiguousarray(inputs[part]))
                student.checkpoint.model(input_ids=ids, use_cache=False)


def _trained(model: Any, training: Training, o: TuneOptions) -> dict[str, Any]:
    """The parameters that are trained, by name.

    Raises:
        UsageError: there are none.
    """
    kept = PlanOptions(keep=o.keep)
    infos = {p.tensor.name: p.tensor for p in training.plan}
    norms = {
        f"{place}.{name}".lstrip(".")
        for place, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    norms = {
        n for n in norms & infos.keys() if not any(kept.matches(infos[n], glob) for glob in o.keep)
    }
    weights = set(training.weights)
    chosen = {"weights": weights, "norms": norms, "all": weights | norms}[o.trained]
    found = {name: p for name, p in model.named_parameters() if name in chosen}
    if not found:
        raise UsageError(
            f"--train {o.trained}: the model has nothing of that kind to train",
            hint="--keep may have taken it out",
        )
    return found


def _check_encoder(o: TuneOptions, source: Path) -> None:
    """Refuse what has no meaning, or no place yet, where embeddings of sentences are learned.

    Raises:
        UsageError: there is such an option.
    """
    for given, what in (
        (o.loss == "lm", "--loss lm is for models that predict next tokens"),
        (o.activations == "static", "--activations static: an encoder's ranges are calibrated"),
        (o.teacher is not None, "--teacher: an encoder learns from itself as floats"),
    ):
        if given:
            raise UsageError(what, path=source, found="an encoder", hint="leave it out")


def _needed(source: Path, options: TuneOptions) -> tuple[int, int]:
    """Memory that all of it takes, and bytes of its state, about, from what the headers of the
    files say.

    Raises:
        InputError: the model cannot be run, or predicts no next tokens.
    """
    config = checked_config(source)
    _, kind = model_class(config, source)
    if kind == "encoder":
        _check_encoder(options, source)
    with open_safetensors(source) as model:
        plan = make_plan(
            model.tensors, options.grid, PlanOptions(options.keep, options.tensor_schemes)
        )
    of_teacher = sum(p.tensor.size for p in plan)
    if options.teacher:
        checked_config(options.teacher)
        with open_safetensors(options.teacher) as model:
            # Besides the teacher there is the model as it was.
            of_teacher += sum(t.size for t in model.tensors)
    tokens = options.seqlen * max(1, min(options.batch, BATCH_TOKENS // options.seqlen))
    kept = VALUE * COPIES * trained_values(plan, options.trained)
    return needed_bytes(plan, options.trained, config, tokens, of_teacher), kept


def _begin(run: _Run, report: TuneReport, directory: Path, state: SavedState) -> Begun:
    """Judge all models that are not trained, and prepare the one that will be.

    Args:
        directory: for a file that is made on the way.
        state: of a run that was interrupted.

    Raises:
        UnsupportedError: the quantized model predicts no numbers.
        InputError: the state is of another run.
    """
    o, judging = run.options, run.split.judging
    asked = asked_of(run)
    check_resumed(state, o, asked)  # before the long work
    found = {FLOAT: run.scores(run.loaded, judging, "judge the float model")}
    base = _Base()
    if o.calibration:
        base, found[COMPENSATED] = _compensated(run, report, directory)
    student = run.prepare()
    found[NEAREST] = run.scores(student.checkpoint, judging, "judge nearest rounding")
    check_numbers(run, found[NEAREST])
    if base.exponents:
        student = run.prepare(base.exponents)
    errors = rounding_errors(student)
    student.begin_at(base.tensors, base.ranges, gains=o.trained == "all")
    rates = rates_of(student, o.rate, errors)
    report.trained_tensors = len(student.parameters)
    return begun(run, report, found, rates, student, asked, state)


@dataclass(frozen=True, slots=True)
class _Base:
    """What training can begin with.

    Attributes:
        tensors: that have codes, in memory.
        exponents: by which channels are rescaled.
        ranges: what the file says of the static ranges of layers, by the names of their weights.
    """

    tensors: Mapping[str, Stored] = field(default_factory=dict)
    exponents: Mapping[str, Exponents] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _compensated(run: _Run, report: TuneReport, directory: Path) -> tuple[_Base, Found]:
    """What quantization with the calibration gives, and how good it is.

    Raises:
        InputError: the calibration has no Gram matrices of the model.
    """
    o = run.options
    draft = directory / o.output.name
    asked = replace(_untrained(run, COMPENSATED, draft), strict=False)
    try:
        made = quantize(run.source, asked, run.progress)
    except UsageError as e:  # of a text to aim by without Gram matrices
        if "--text" not in e.message:
            raise
        raise _no_help(o, e.found) from e
    if not any(t.rounding == COMPENSATED for t in made.tensors):
        raise _no_help(o, next((t.rounding_reason for t in made.tensors if t.rounding_reason), ""))
    if not run.generated:
        report.notes.append(
            "a calibration with this very text has seen the windows that judge: compare files on "
            "another one, with verify --text"
        )
    base = _base(run, draft, made, report)
    quantized = open_quantized(
        draft, o.activations, directory=run.source, threads=None, check=False
    )
    return base, run.scores(quantized.checkpoint, run.split.judging, "judge compensated rounding")


def _no_help(o: TuneOptions, found: str | None) -> InputError:
    return InputError(
        "the calibration does not help rounding: no codes could make up for others",
        path=o.calibration,
        found=found or None,
        hint="make one with calibrate --text FILE --gram, or leave --calibration out",
    )


def _base(run: _Run, draft: Path, made: QuantizeReport, report: TuneReport) -> _Base:
    """The compensated tensors of a file, where they are those of the model itself."""
    running = {name: tuple(p.shape) for name, p in run.loaded.model.named_parameters()}
    why = None
    with closing(open_model(draft)) as model:
        provenance = model.header.provenance if isinstance(model, QblkModel) else {}
        exponents = read_exponents(provenance, draft)
        with closing(dequantized(open_model(run.source))) as source:
            exponents = getattr(equalised(source, exponents), "exponents", {})
        if made.container != "qblk":
            why = "tensors of a GGUF file have other names and rows"
        elif any(name not in running for name in exponents):
            why = "quantize has rescaled tensors that the running model has under other names"
        if why:
            report.notes.append(f"training began with nearest codes, not compensated ones: {why}")
            return _Base()
        compensated = {t.name for t in made.tensors if t.rounding == COMPENSATED}
        coded = {t.name for t in made.tensors if t.quantized} if exponents else compensated
        stored = {t.name: model.stored(t) for t in model.tensors if t.name in coded}
        found = {name: held(s) for name, s in stored.items() if can_stay(s)}
        ranges = {name: s.activation for name, s in stored.items() if s.activation}
    report.began_compensated = len(compensated & found.keys())
    return _Base(found, exponents, ranges if run.options.activations == "static" else {})


def _untrained(run: _Run, rounding: str, output: Path) -> QuantizeOptions:
    """What `quantize` is asked for to give the model without training.

    Codes that make up for each other are aimed at the float model's outputs on windows that are
    trained on; others have to judge.
    """
    o, compensated = run.options, rounding == COMPENSATED
    aim = None
    if compensated and not run.encoder:
        windows = run.split.training.inputs[:AIMED]
        aim = RepairText(o.text, windows.shape[1], None, windows)
    return QuantizeOptions(
        o.grid,
        output,
        calibration=o.calibration if compensated else None,
        rounding=None if compensated else NEAREST,
        equalise=compensated,
        repair=aim,
        keep=o.keep,
        tensor_schemes=o.tensor_schemes,
        threads=o.threads,
        force=o.force,
        strict=o.strict,
        gguf=GgufOptions(pure=output.suffix.lower() == ".gguf"),
    )


def _write(run: _Run, report: TuneReport, student: Student, directory: Path) -> None:
    """Write the model that was chosen; as floats by way of a file in a directory for drafts."""
    o = run.options
    output = directory / f"{o.output.name}.qblk" if o.floats else o.output
    if o.strict and report.warnings:
        report.status = "fail"
        return
    if report.chosen == TUNED:
        made = _saved(run, student, report, o.trained, output)
    elif report.chosen == NEAREST and o.activations == "static":
        # What nobody has trained; its ranges are found as they were before.
        student = run.prepare()
        made = _saved(run, student, report, "ranges", output)
    else:
        made = quantize(run.source, _untrained(run, report.chosen, output), run.progress)
    report.warnings += made.warnings
    report.notes += made.notes
    if o.floats and made.written:
        plain = QuantizeOptions(
            TENSOR_SCHEMES["f32"],
            o.output,
            container="hf",
            allow_requantize=True,
            threads=o.threads,
            force=o.force,
        )
        made = quantize(output, plain, run.progress)
        report.warnings += made.warnings
    report.status, report.written = made.status, made.written
    report.output_bytes = made.output_bytes
    report.model_bits_per_weight = made.model_bits_per_weight


def _saved(
    run: _Run, student: Student, report: TuneReport, trained: str, output: Path
) -> QuantizeReport:
    """Write the student as it is."""
    o = run.options
    noted: dict[str, Any] = {
        TRAINED: trained,
        "source": run.source.name,
        "loss": o.loss,
        "teacher": o.teacher.name if o.teacher else None,
        "steps": o.steps,
        "step": report.step,
        "began_compensated": report.began_compensated or None,
        "rate": o.rate,
        "seed": o.seed,
        "seqlen": o.seqlen,
        "batch": o.batch,
        "windows": run.text_windows,
        "generated": run.generated or None,
        "text_sha256": file_sha256(o.text),
        "calibration_sha256": file_sha256(o.calibration) if o.calibration else None,
        "judged": noted_figures(report.models),
    }
    with open_safetensors(run.source) as files:
        running = {p.tensor.name for p in student.training.plan}
        # What transformers computes by itself and older checkpoints store, such as positions.
        beside = {
            t.name: torch.from_numpy(np.array(files.values(t, 0, t.size)).reshape(t.shape))
            for t in files.tensors
            if t.name not in running and t.dtype == "I64"
        }
        others = {p.tensor.name for p in student.training.plan} - {t.name for t in files.tensors}
        if others:
            report.notes.append(
                f"{counted(len(others), 'tensor')} of the file, such as '{min(others)}', have the "
                "names and shapes that transformers gives them, not the model's: verify --against "
                "says that tensors differ"
            )
        return save_model(
            student.checkpoint.model,
            output,
            companions=files.companions,
            force=o.force,
            strict=o.strict,
            noted={k: v for k, v in noted.items() if v is not None},
            beside=beside,
            exponents=run.exponents,
        )
