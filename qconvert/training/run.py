"""A run of tune, whatever it trains: its models, its state, its training and who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.calibration.digest import model_digest
from qconvert.containers import Container
from qconvert.errors import UnsupportedError
from qconvert.files import open_model
from qconvert.files.regular import file_sha256
from qconvert.files.saved_state import SavedState
from qconvert.progress import Progress, Silent
from qconvert.report import TuneReport
from qconvert.running.device import chosen_device
from qconvert.running.hugging_face import Checkpoint, open_checkpoint
from qconvert.running.quality import F64, BlindGuess, Scores, Windows, compare_models
from qconvert.stages.parallel import available_threads
from qconvert.training.generated import written
from qconvert.training.judging import (
    FLOAT,
    TUNED,
    Split,
    check_teacher,
    decide,
    joined,
    judged,
    mixed,
    part,
    split,
)
from qconvert.training.loop import COSINE, Course, Plan, Student, adam, train
from qconvert.training.options import ADAPTERS, TuneOptions
from qconvert.training.sentences import compare_embeddings
from qconvert.training.state import TuningState, check_state

Found = Scores | F64  # of tokens, or the distances of the embeddings of sentences


class Run:
    """The models, and the windows of the text.

    Attributes:
        reference: whose predictions are learned and all others are held against.
        loaded: the model that is to be trained.
        text_windows, generated: how many windows to train on there are, of the text, and that the
            reference wrote itself.
    """

    def __init__(
        self, source: Path, options: TuneOptions, progress: Progress, loaded: Checkpoint
    ) -> None:
        self.source, self.options, self.progress = source, options, progress
        self.reference = self.loaded = loaded
        if options.teacher:
            threads = options.threads or available_threads()
            device = chosen_device(options.device)
            self.reference = open_checkpoint(options.teacher, threads=threads, device=device)
            check_teacher(self.loaded, self.reference, options.text)
        self.split = split(self.loaded, options)
        self.text_windows = len(self.split.training.inputs)
        self.generated = self._wanted()
        if self.generated:
            self._write_windows()

    def _wanted(self) -> int:
        """How many windows the reference writes to train on.

        Left to us, as many as the text is short of for no window to be seen twice, and at most half
        of all that steps take. Codes of a file stay, whose scales are learned from few windows.
        """
        o = self.options
        if self.encoder or o.loss != "distill":
            return 0
        taken = o.taken
        if o.generated is not None:
            return min(o.generated, taken)
        lacking = max(0, taken - len(self.split.training.inputs))
        return min(lacking, taken // 2) if o.scheme else 0

    def _write_windows(self) -> None:
        """Have the reference write windows. Where there is a calibration, which may have been made
        with the same text, they choose the state and judge it, too.
        """
        text, apart = self.split, bool(self.options.calibration)
        taken = self.options.taken
        aside = len(text.judging.inputs)
        count = self.generated + (2 * aside if apart else 0)
        told = self.progress
        told.begin("write windows to train on", count * text.training.inputs.shape[1], "tokens")
        found = written(self.reference, text.training, count, self.options.seed, told.advance)
        told.end()
        if not apart:
            self.split = replace(text, training=mixed(text.training, found, taken))
            return
        every = joined(text.training, text.validation, text.judging)
        self.text_windows = len(every.inputs)
        self.split = Split(
            mixed(every, part(found, slice(2 * aside, None)), taken),
            part(found, slice(aside)),
            part(found, slice(aside, 2 * aside)),
        )

    @property
    def encoder(self) -> bool:
        """Whether embeddings of sentences are learned, not next tokens."""
        return self.loaded.kind == "encoder"

    def scores(self, checkpoint: Checkpoint, chunks: Windows, title: str = "") -> Found:
        """A model against the reference; tells of it under a title, if it has one."""
        told = Silent() if not title else self.progress
        told.begin(title, chunks.inputs.size, "tokens")
        found: Found
        if self.encoder:
            found = compare_embeddings(self.reference, checkpoint, chunks, told.advance)
        else:
            blind = BlindGuess()
            found = compare_models(self.reference, checkpoint, chunks, blind, told.advance)
        told.end()
        return found

    def losses(self, scores: Found) -> F64:
        """What training makes smaller, token by token or sentence by sentence."""
        if not isinstance(scores, Scores):
            return scores
        return scores.divergence if self.options.loss == "distill" else scores.nll


def report_of(source: Path, container: Container, run: Run, needed: int) -> TuneReport:
    """What is known before the first step."""
    o = run.options
    return TuneReport(
        kernels=kernels.describe(),
        source=str(source),
        output=str(o.output),
        container=container.name,
        scheme=o.scheme.name if o.scheme else "",
        text=str(o.text),
        loss=COSINE if run.encoder else o.loss,
        teacher=str(o.teacher) if o.teacher else None,
        calibration=str(o.calibration) if o.calibration else None,
        trained=o.trained,
        activations=o.activations,
        device=chosen_device(o.device),
        steps=o.steps,
        block_steps=o.blocks,
        rate=o.rate,
        seqlen=o.seqlen,
        batch=o.batch,
        seed=o.seed,
        training_windows=run.text_windows,
        generated_windows=run.generated,
        validation_windows=len(run.split.validation.inputs),
        judging_windows=len(run.split.judging.inputs),
        memory_bytes=needed,
    )


def asked_of(run: Run) -> dict[str, Any]:
    """All that decides what comes of a run."""
    o = run.options

    def digest(path: Path | None) -> str | None:
        if path is None:
            return None
        with closing(open_model(path)) as model:
            return model_digest(model)

    return {
        "the model": digest(run.source),
        "--teacher": digest(o.teacher),
        "--text": file_sha256(o.text),
        "--calibration": file_sha256(o.calibration) if o.calibration else None,
        "--scheme": o.scheme.name if o.scheme else None,
        "--tensor-scheme": [[glob, scheme.name] for glob, scheme in o.tensor_schemes],
        "--keep": o.keep,
        "--train": o.trained,
        "--rank": o.rank,
        "--activations": o.activations,
        "--loss": o.loss,
        "--steps": o.steps,
        "--blocks": o.blocks,
        "--lr": o.rate,
        "--seqlen": o.seqlen,
        "--batch": o.batch,
        "--nsamples": o.nsamples,
        "--generate": o.generated,
        "--seed": o.seed,
        "--threads": o.threads or available_threads(),
        "--device": chosen_device(o.device),
    }


@dataclass(frozen=True, slots=True)
class Begun:
    """A training that can begin, or go on.

    Attributes:
        found: models that were not trained, on the judging windows.
        rates: see `Plan`.
        halfway: what is done so far.
    """

    found: dict[str, Found]
    rates: Mapping[str, float]
    halfway: TuningState

    @property
    def student(self) -> Student:
        return self.halfway.student


def check_resumed(state: SavedState, o: TuneOptions, asked: Mapping[str, Any]) -> None:
    """Refuse a state of another run, if one is to be gone on with.

    Raises:
        InputError: see `check_state`.
    """
    if o.resume and state.path.exists():
        check_state(state, asked)


def check_numbers(run: Run, scores: Found) -> None:
    """Refuse a quantized model that predicts none.

    Raises:
        UnsupportedError: it does.
    """
    if not np.isfinite(run.losses(scores)).all():
        raise UnsupportedError(
            "the quantized model predicts no numbers that could be tuned",
            path=run.source,
            hint="take a scheme of more bits, and look at the model with verify --text",
        )


def begun(
    run: Run,
    report: TuneReport,
    found: dict[str, Found],
    rates: Mapping[str, float],
    student: Student,
    asked: Mapping[str, Any],
    state: SavedState,
) -> Begun:
    """A training from its beginning, or from what an interrupted run has left.

    Args:
        asked: of `asked_of`.
        state: which `check_resumed` has nothing against.
    """
    halfway = TuningState(student, Course(), adam(student.parameters), asked, run.options.steps)
    if run.options.resume:
        if state.path.exists():
            halfway.take_over(state)
        report.resumed_at = halfway.course.steps_run
    return Begun(found, rates, halfway)


def train_and_judge(
    run: Run, report: TuneReport, at: Begun, state: SavedState, untrained: Sequence[str]
) -> None:
    """Train, judge and decide; the student has the best state then.

    Args:
        untrained: the models of which one is written where training was no gain.
    """
    o, found, student, course = run.options, at.found, at.student, at.halfway.course

    def validate() -> float:
        scores = run.scores(student.checkpoint, run.split.validation)
        return float(run.losses(scores).mean())

    def between() -> None:
        state.between(at.halfway)

    loss = COSINE if run.encoder else o.loss
    plan = Plan(run.split.training, loss, o.steps, o.batch, at.rates, validate)
    train(student, course, at.halfway.optimiser, run.reference, plan, run.progress, between)
    between()
    report.steps_run, report.step = course.steps_run, course.step
    report.stopped, report.course = course.stopped, course.validations
    report.blocks, report.began = course.blocks, course.began
    for k, block in enumerate(course.blocks):
        if block.warning:
            report.warnings.append(f"block {k + 1} stays as it was before: {block.warning}")
    report.warnings += [said for said in (course.left, course.warning) if said]
    if course.best:
        student.restore(course.best)
        found[TUNED] = run.scores(student.checkpoint, run.split.judging, "judge the tuned model")
    report.models = [
        judged(name, found[name]) for name in (FLOAT, *untrained, TUNED) if name in found
    ]
    losses = {name: run.losses(scores) for name, scores in found.items()}
    judges = [n for n in untrained if n in losses]
    decide(losses, judges, report, anyway=o.anyway, adapters=o.trained == ADAPTERS)
    between()
