"""tune: train a model with the grid of its scheme in place, and judge what came of it on text that
was not trained on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert import kernels
from qconvert.calibration.digest import model_digest
from qconvert.codecs.codec import Stored
from qconvert.codecs.rescaled import TRAINED
from qconvert.containers import Container
from qconvert.errors import InputError, UnsupportedError, UsageError, about
from qconvert.files import open_model
from qconvert.files.atomic import check_space, check_target, draft_directory, machine_errors
from qconvert.files.regular import file_sha256
from qconvert.files.safetensors import open_safetensors
from qconvert.files.saved_state import SavedState
from qconvert.progress import Progress, Silent
from qconvert.quantities import counted, size
from qconvert.report import JudgedModel, QuantizeReport, TuneReport
from qconvert.running.hugging_face import Checkpoint, checked_config, model_class, open_checkpoint
from qconvert.running.quality import (
    BATCH_TOKENS,
    F64,
    BlindGuess,
    Scores,
    Windows,
    compare_models,
    mean,
    perplexity,
    windows,
)
from qconvert.running.quantized_model import open_quantized
from qconvert.running.text import check_positions, read_text
from qconvert.stages.parallel import available_threads
from qconvert.stages.plan import PlanOptions, check_schemes, make_plan
from qconvert.stages.quantize import quantize
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.training.fixed import can_stay, held
from qconvert.training.loop import Course, Plan, Student, adam, passes, rates_of, train
from qconvert.training.memory import VALUE, check_memory, needed_bytes, trained_values
from qconvert.training.options import FEWEST_WINDOWS, TuneOptions
from qconvert.training.preparation import Training, prepare_model
from qconvert.training.saving import container_of, save_model
from qconvert.training.state import COPIES, TuningState, check_state

SET_ASIDE = 10  # one window of so many chooses the state, and another one judges
MOST_SET_ASIDE = 16  # windows of each
OBSERVED = 8  # batches that static ranges of the untrained model are taken from
COMPARED = 1 << 16  # characters of the text that both tokenizers have to agree on
WRITTEN = 2  # states at most beside the output: the last one, while the next is written
SURE = 2  # standard errors that a gain should have
FLOAT, NEAREST, COMPENSATED, TUNED = "float", "nearest", "compensated", "tuned"


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
    container = container_of(options.output)
    check_schemes((options.scheme, *(s for _, s in options.tensor_schemes)), container)
    if container.name == "gguf" and options.activations == "static":
        raise UsageError(
            "a GGUF file has no place for static ranges", wanted="-o with a name that ends in .qblk"
        )
    given = (source, options.text, options.teacher, options.calibration)
    inputs = [path for path in given if path]
    check_target(options.output, options.force, inputs)
    state = SavedState(options.output, inputs, "steps", options.save_seconds, "TUNE")
    state.check(resume=options.resume, force=options.force)
    needed, kept = _needed(source, options)
    check_memory(needed)
    # Beside the output from now on, so that a place that cannot be written to costs no time.
    with about(source), draft_directory(options.output) as directory:
        _check_space(state, kept)
        progress.begin(
            f"load the model; tuning takes about {size(needed)} of memory, and up to "
            f"{size(WRITTEN * kept)} beside the output for what is done so far",
            *(1, "model"),
        )
        run = _Run(source, options, progress)
        progress.end()
        report = _report(source, container, run, needed)
        report.state_bytes = kept
        begun = _begin(run, report, directory, state)
        with state.kept():
            _train(run, report, begun, state)
            _write(run, report, begun.student)
            state.remove()
    report.seconds = time.perf_counter() - started
    return report


def _check_space(state: SavedState, size_of_state: int) -> None:
    """Refuse early where the disk has no room for the state; one of two may be there already."""
    with machine_errors(state.path):
        there = state.path.stat().st_size if state.path.exists() else 0
    check_space(state.path, WRITTEN * size_of_state - there)


@dataclass(frozen=True, slots=True)
class _Split:
    """Windows of the text: to train on, to choose a state by, and to judge it."""

    training: Windows
    validation: Windows
    judging: Windows


class _Run:
    """The models, and the windows of the text.

    Attributes:
        reference: whose predictions are learned and all others are held against.
        loaded: the model as floats.
    """

    def __init__(self, source: Path, options: TuneOptions, progress: Progress) -> None:
        self.source, self.options, self.progress = source, options, progress
        threads = options.threads or available_threads()
        self.loaded = open_checkpoint(source, threads=threads)
        self.reference = self.loaded
        if options.teacher:
            self.reference = open_checkpoint(options.teacher, threads=threads)
            _check_teacher(self.loaded, self.reference, options.text)
        self.split = _split(self.loaded, options)

    def prepare(self) -> Student:
        """A student from the model as it is."""
        o = self.options
        model = self.loaded.model
        model = copy.deepcopy(model) if self.reference is self.loaded else model
        training = prepare_model(
            model,
            o.scheme,
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

    def scores(self, checkpoint: Checkpoint, chunks: Windows, title: str = "") -> Scores:
        """A model against the reference; tells of it under a title, if it has one."""
        told = Silent() if not title else self.progress
        told.begin(title, chunks.inputs.size, "tokens")
        found = compare_models(self.reference, checkpoint, chunks, BlindGuess(), told.advance)
        told.end()
        return found

    def losses(self, scores: Scores) -> F64:
        """What training makes smaller, token by token."""
        return scores.divergence if self.options.loss == "distill" else scores.nll


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


def _needed(source: Path, options: TuneOptions) -> tuple[int, int]:
    """Memory that all of it takes, and bytes of its state, about, from what the headers of the
    files say.

    Raises:
        InputError: the model cannot be run, or predicts no next tokens.
    """
    config = checked_config(source)
    _, kind = model_class(config, source)
    if kind != "causal":
        raise UnsupportedError(
            "tune is for models that predict next tokens", path=source, found="an encoder"
        )
    with open_safetensors(source) as model:
        plan = make_plan(
            model.tensors, options.scheme, PlanOptions(options.keep, options.tensor_schemes)
        )
    of_teacher = sum(p.tensor.size for p in plan)
    if options.teacher:
        checked_config(options.teacher)
        with open_safetensors(options.teacher) as model:
            of_teacher = sum(t.size for t in model.tensors)
    tokens = options.seqlen * max(1, min(options.batch, BATCH_TOKENS // options.seqlen))
    kept = VALUE * COPIES * trained_values(plan, options.trained)
    return needed_bytes(plan, options.trained, config, tokens, of_teacher), kept


def _check_teacher(loaded: Checkpoint, teacher: Checkpoint, text: Path) -> None:
    """Refuse a teacher whose predictions are of other tokens.

    Raises:
        UnsupportedError: they are.
    """
    sizes = [int(c.model.config.get_text_config().vocab_size) for c in (teacher, loaded)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            "the teacher has another vocabulary than the model",
            path=teacher.path,
            found=f"{sizes[0]:,} tokens",
            wanted=f"{sizes[1]:,}",
        )
    sample = read_text(text)[:COMPARED]
    one, other = (c.tokenizer(sample)["input_ids"] for c in (teacher, loaded))
    if one != other:
        raise UnsupportedError(
            "the teacher has another vocabulary than the model: it makes other tokens of the text",
            path=teacher.path,
            found=f"{len(one):,} tokens",
            wanted=f"the {len(other):,} of the model",
        )


def _split(loaded: Checkpoint, o: TuneOptions) -> _Split:
    """The windows of the text, in an order that the seed decides.

    Raises:
        UsageError: windows are longer than the model's positions.
        InputError: the text cannot be read or is too short.
    """
    check_positions(loaded.config, o.seqlen)
    found = windows(loaded.tokenizer, o.text, o.seqlen, "all", o.nsamples, o.seed)
    count = len(found.inputs)
    if count < FEWEST_WINDOWS:
        raise InputError(
            "the text is too short to tune by",
            path=o.text,
            found=f"{counted(count, 'window')} of {o.seqlen:,} tokens",
            wanted=f"at least {FEWEST_WINDOWS}: one to train on, one to choose by, one to judge by",
            hint="give more text, or a smaller --seqlen",
            code="TEXT-SHORT",
        )
    order = np.random.default_rng(o.seed).permutation(count)
    aside = max(1, min(count // SET_ASIDE, MOST_SET_ASIDE))

    def taken(part: slice) -> Windows:
        return Windows(found.inputs[order[part]], found.targets[order[part]], found.first)

    return _Split(
        taken(slice(2 * aside, None)), taken(slice(aside)), taken(slice(aside, 2 * aside))
    )


def _report(source: Path, container: Container, run: _Run, needed: int) -> TuneReport:
    """What is known before the first step."""
    o = run.options
    return TuneReport(
        kernels=kernels.describe(),
        source=str(source),
        output=str(o.output),
        container=container.name,
        scheme=o.scheme.name,
        text=str(o.text),
        loss=o.loss,
        teacher=str(o.teacher) if o.teacher else None,
        calibration=str(o.calibration) if o.calibration else None,
        trained=o.trained,
        activations=o.activations,
        steps=o.steps,
        rate=o.rate,
        seqlen=o.seqlen,
        batch=o.batch,
        seed=o.seed,
        training_windows=len(run.split.training.inputs),
        validation_windows=len(run.split.validation.inputs),
        judging_windows=len(run.split.judging.inputs),
        memory_bytes=needed,
    )


def _asked(run: _Run) -> dict[str, Any]:
    """All that decides what comes of a run."""
    o = run.options

    def digest(path: Path | None) -> str | None:
        if path is None:
            return None
        with open_safetensors(path) as model:
            return model_digest(model)

    return {
        "the model": digest(run.source),
        "--teacher": digest(o.teacher),
        "--text": file_sha256(o.text),
        "--calibration": file_sha256(o.calibration) if o.calibration else None,
        "--scheme": o.scheme.name,
        "--tensor-scheme": [[glob, scheme.name] for glob, scheme in o.tensor_schemes],
        "--keep": o.keep,
        "--train": o.trained,
        "--activations": o.activations,
        "--loss": o.loss,
        "--steps": o.steps,
        "--lr": o.rate,
        "--seqlen": o.seqlen,
        "--batch": o.batch,
        "--nsamples": o.nsamples,
        "--seed": o.seed,
        "--threads": o.threads or available_threads(),
    }


@dataclass(frozen=True, slots=True)
class _Begun:
    """A training that can begin, or go on.

    Attributes:
        found: models that were not trained, on the judging windows.
        rates: see `Plan`.
        halfway: what is done so far.
    """

    found: dict[str, Scores]
    rates: Mapping[str, float]
    halfway: TuningState

    @property
    def student(self) -> Student:
        return self.halfway.student


def _begin(run: _Run, report: TuneReport, directory: Path, state: SavedState) -> _Begun:
    """Judge all models that are not trained, and prepare the one that will be.

    Args:
        directory: for a file that is made on the way.
        state: of a run that was interrupted.

    Raises:
        UnsupportedError: the quantized model predicts no numbers.
        InputError: the state is of another run.
    """
    o, judging = run.options, run.split.judging
    asked = _asked(run)
    if resumed := o.resume and state.path.exists():
        check_state(state, asked)  # before the long work
    found = {FLOAT: run.scores(run.loaded, judging, "judge the float model")}
    bases: dict[str, Stored] = {}
    if o.calibration:
        found[COMPENSATED] = _compensated(run, report, directory, bases)
    student = run.prepare()
    found[NEAREST] = run.scores(student.checkpoint, judging, "judge nearest rounding")
    if not np.isfinite(run.losses(found[NEAREST])).all():
        raise UnsupportedError(
            "the quantized model predicts no numbers that could be tuned",
            path=run.source,
            hint="take a scheme of more bits, and look at the model with verify --text",
        )
    rates = rates_of(student, o.rate)
    student.begin_at(bases)
    halfway = TuningState(student, Course(), adam(student), asked, o.steps)
    if resumed:
        halfway.take_over(state)
    if o.resume:
        report.resumed_at = halfway.course.steps_run
    report.trained_tensors = len(student.parameters)
    return _Begun(found, rates, halfway)


def _train(run: _Run, report: TuneReport, begun: _Begun, state: SavedState) -> None:
    """Train, judge and decide; the student has the best state then."""
    o, found, student, course = run.options, begun.found, begun.student, begun.halfway.course

    def validate() -> float:
        scores = run.scores(student.checkpoint, run.split.validation)
        return float(run.losses(scores).mean())

    def between() -> None:
        state.between(begun.halfway)

    plan = Plan(run.split.training, o.loss, o.steps, o.batch, begun.rates, validate)
    train(student, course, begun.halfway.optimiser, run.reference, plan, run.progress, between)
    between()
    report.steps_run, report.step = course.steps_run, course.step
    report.stopped, report.course = course.stopped, course.validations
    if course.warning:
        report.warnings.append(course.warning)
    if course.best:
        student.restore(course.best)
        found[TUNED] = run.scores(student.checkpoint, run.split.judging, "judge the tuned model")
    report.models = [
        _judged(name, found[name]) for name in (FLOAT, NEAREST, COMPENSATED, TUNED) if name in found
    ]
    _decide(run, found, report)
    between()


def _judged(name: str, scores: Scores) -> JudgedModel:
    divergence, found = mean(scores.divergence), perplexity(scores.nll)
    return JudgedModel(name, divergence.value, divergence.error, found.value, found.error)


def _decide(run: _Run, found: Mapping[str, Scores], report: TuneReport) -> None:
    """Which model is written, and what is said of it."""
    losses = {name: run.losses(scores) for name, scores in found.items()}
    untrained = [name for name in (NEAREST, COMPENSATED) if name in losses]
    fallback = min(untrained, key=lambda name: float(losses[name].mean()))
    report.chosen = fallback
    if TUNED not in losses:
        report.warnings.append(
            "no step was better than none on the validation windows: "
            f"the file is that of {fallback} rounding, which was not trained"
        )
        return
    gain = mean(losses[fallback] - losses[TUNED])
    report.gain, report.gain_error = gain.value, gain.error
    better = gain.value > 0
    if better or run.options.anyway:
        report.chosen = TUNED
    if not better:
        written = "the tuned one is written all the same (--anyway)"
        if report.chosen != TUNED:
            written = f"the file is that of {fallback} rounding, which was not trained"
        report.warnings.append(
            f"the tuned model is not better than {fallback} rounding on the judging windows "
            f"({-gain.value:.2g} ± {gain.error:.1g} nats a token worse): {written}"
        )
    elif gain.value < SURE * gain.error:
        report.notes.append(
            f"the gain of {gain.value:.2g} nats a token is less than {SURE} standard errors of it "
            f"({gain.error:.1g} each): more text would tell whether it is one"
        )


def _compensated(
    run: _Run, report: TuneReport, directory: Path, bases: dict[str, Stored]
) -> Scores:
    """What quantization with the calibration gives; ``bases`` takes the tensors that training can
    begin with.

    Raises:
        InputError: the calibration has no Gram matrices of the model.
    """
    o = run.options
    draft = directory / o.output.name
    asked = replace(_untrained(o, COMPENSATED, draft), strict=False)
    made = quantize(run.source, asked, run.progress)
    if not any(t.rounding == COMPENSATED for t in made.tensors):
        raise InputError(
            "the calibration does not help rounding: no codes could make up for others",
            path=o.calibration,
            found=next((t.rounding_reason for t in made.tensors if t.rounding_reason), None),
            hint="make one with calibrate --text FILE --gram, or leave --calibration out",
        )
    report.notes.append(
        "a calibration with this very text has seen the windows that judge: compare files on "
        "another one, with verify --text"
    )
    bases.update(_bases(draft, made, report))
    quantized = open_quantized(
        draft, o.activations, directory=run.source, threads=None, check=False
    )
    return run.scores(quantized.checkpoint, run.split.judging, "judge compensated rounding")


def _bases(draft: Path, made: QuantizeReport, report: TuneReport) -> dict[str, Stored]:
    """The compensated tensors of a file, in memory, where they are those of the model itself."""
    why = None
    if made.container != "qblk":
        why = "tensors of a GGUF file have other names and rows"
    elif made.equalisation and made.equalisation.equalised:
        why = "quantize has rescaled channels, which the float model has as they were"
    if why:
        report.notes.append(f"training began with nearest codes, not compensated ones: {why}")
        return {}
    compensated = {t.name for t in made.tensors if t.rounding == COMPENSATED}
    with closing(open_model(draft)) as model:
        stored = {t.name: model.stored(t) for t in model.tensors if t.name in compensated}
        found = {name: held(s) for name, s in stored.items() if can_stay(s)}
    report.began_compensated = len(found)
    return found


def _untrained(o: TuneOptions, rounding: str, output: Path) -> QuantizeOptions:
    """What `quantize` is asked for to give the model without training."""
    compensated = rounding == COMPENSATED
    return QuantizeOptions(
        o.scheme,
        output,
        calibration=o.calibration if compensated else None,
        rounding=None if compensated else NEAREST,
        equalise=compensated,
        keep=o.keep,
        tensor_schemes=o.tensor_schemes,
        threads=o.threads,
        force=o.force,
        strict=o.strict,
        gguf=GgufOptions(pure=output.suffix.lower() == ".gguf"),
    )


def _write(run: _Run, report: TuneReport, student: Student) -> None:
    """Write the model that was chosen."""
    o = run.options
    if o.strict and report.warnings:
        report.status = "fail"
        return
    if report.chosen == TUNED:
        made = _saved(run, student, report, o.trained)
    elif report.chosen == NEAREST and o.activations == "static":
        # What nobody has trained; its ranges are found as they were before.
        if run.reference is not run.loaded:
            run.loaded = open_checkpoint(run.source)
        student = run.prepare()
        made = _saved(run, student, report, "ranges")
    else:
        made = quantize(run.source, _untrained(o, report.chosen, o.output), run.progress)
    report.warnings += made.warnings
    report.notes += made.notes
    report.status, report.written = made.status, made.written
    report.output_bytes = made.output_bytes
    report.model_bits_per_weight = made.model_bits_per_weight


def _saved(run: _Run, student: Student, report: TuneReport, trained: str) -> QuantizeReport:
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
        "nsamples": sum(
            len(w.inputs) for w in (run.split.training, run.split.validation, run.split.judging)
        ),
        "text_sha256": file_sha256(o.text),
        "calibration_sha256": file_sha256(o.calibration) if o.calibration else None,
        "judged": {
            j.model: {"kl": float(f"{j.kl_mean:.6g}"), "perplexity": float(f"{j.perplexity:.6g}")}
            for j in report.models
        },
    }
    with open_safetensors(run.source) as files:
        others = {p.tensor.name for p in student.training.plan} - {t.name for t in files.tensors}
        if others:
            report.notes.append(
                f"{counted(len(others), 'tensor')} of the file, such as '{min(others)}', have the "
                "names and shapes that transformers gives them, not the model's: verify --against "
                "says that tensors differ"
            )
        return save_model(
            student.checkpoint.model,
            o.output,
            companions=files.companions,
            force=o.force,
            strict=o.strict,
            noted={k: v for k, v in noted.items() if v is not None},
        )
