"""tune: train a model with the grid of its scheme in place, and judge what came of it on text that
was not trained on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.codecs.rescaled import TRAINED
from qconvert.containers import CONTAINERS
from qconvert.errors import UsageError, about
from qconvert.files.atomic import check_directory, check_target, draft_directory
from qconvert.files.regular import file_sha256
from qconvert.files.safetensors import open_safetensors
from qconvert.files.saved_state import SavedState
from qconvert.progress import Progress, Silent
from qconvert.quantities import counted, size
from qconvert.report import QuantizeReport, TuneReport
from qconvert.running.hugging_face import checked_config, language_fields, model_class
from qconvert.running.quality import BATCH_TOKENS
from qconvert.schemes import TENSOR_SCHEMES
from qconvert.stages.plan import PlanOptions, check_schemes, make_plan
from qconvert.stages.quantize import quantize
from qconvert.stages.quantize_options import QuantizeOptions
from qconvert.training.beginning import (
    Base,
    Start,
    compensated,
    placed,
    through_blocks,
    untrained,
    validated,
)
from qconvert.training.float_run import FloatRun
from qconvert.training.judging import COMPENSATED, FLOAT, NEAREST, TUNED, WRITTEN, check_disk
from qconvert.training.judging import noted as noted_figures
from qconvert.training.loop import BLOCKS, UNTRAINED, Student, rates_of, rounding_errors
from qconvert.training.memory import VALUE, block_bytes, check_memory, needed_bytes, trained_values
from qconvert.training.options import TuneOptions
from qconvert.training.run import (
    Begun,
    asked_of,
    begun,
    check_numbers,
    check_resumed,
    report_of,
    train_and_judge,
)
from qconvert.training.saving import check_directory_name, container_of, save_model
from qconvert.training.state import COPIES, began


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
    needed = _needed(source, options)
    check_memory(needed.total)
    # Beside the output from now on, so that a place that cannot be written to costs no time.
    with about(source), draft_directory(options.output) as directory:
        check_disk(state, needed.state)
        progress.begin(
            f"load the model; tuning takes about {size(needed.total)} of memory, and up to "
            f"{size(WRITTEN * needed.state)} beside the output for what is done so far",
            *(1, "model"),
        )
        run = FloatRun(source, options, progress)
        progress.end()
        report = report_of(source, container, run, needed.total)
        report.state_bytes, report.block_bytes = needed.state, needed.of_block
        at, start = _begin(run, report, directory, state)
        with state.kept():
            if options.blocks and not at.halfway.course.began:
                at = through_blocks(run, at, start, state, directory)
            train_and_judge(run, report, at, state, (NEAREST, COMPENSATED))
            _write(run, report, at.student, directory)
            state.remove()
    report.seconds = time.perf_counter() - started
    return report


def _check_encoder(o: TuneOptions, source: Path) -> None:
    """Refuse what has no meaning, or no place yet, where embeddings of sentences are learned.

    Raises:
        UsageError: there is such an option.
    """
    for given, what in (
        (o.loss == "lm", "--loss lm is for models that predict next tokens"),
        (o.activations == "static", "--activations static: an encoder's ranges are calibrated"),
        (o.teacher is not None, "--teacher: an encoder learns from itself as floats"),
        (o.blocks, "--blocks: blocks are those of a causal model"),
    ):
        if given:
            raise UsageError(what, path=source, found="an encoder", hint="leave it out")


@dataclass(frozen=True, slots=True)
class _Needed:
    """Bytes, about.

    Attributes:
        total: memory that all of it takes.
        of_block: what the largest block adds to that of the models while it is trained.
        state: of what is kept of a run that is not finished.
    """

    total: int
    of_block: int
    state: int


def _needed(source: Path, options: TuneOptions) -> _Needed:
    """What it takes, from what the headers of the files say.

    Raises:
        InputError: the model cannot be run, or predicts no next tokens.
    """
    checked = checked_config(source)
    _, kind = model_class(checked, source)
    config = language_fields(checked)
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
    of_block = 0
    if options.blocks:
        windows = options.blocks * options.batch
        of_block = block_bytes(plan, config, tokens, windows * options.seqlen)
        kept += VALUE * trained_values(plan, "all")  # what the steps end to end begin with
    total = needed_bytes(plan, options.trained, config, tokens, of_teacher, of_block)
    return _Needed(total, of_block, kept)


def _begin(
    run: FloatRun, report: TuneReport, directory: Path, state: SavedState
) -> tuple[Begun, Start]:
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
    base = Base()
    if o.calibration:
        base, found[COMPENSATED] = compensated(run, report, directory)
    student = run.prepare()
    found[NEAREST] = run.scores(student.checkpoint, judging, "judge nearest rounding")
    check_numbers(run, found[NEAREST])
    if base.exponents:
        student = run.prepare(base.exponents)
    start = Start(base, rounding_errors(student), None)
    phase = began(state) if o.resume and state.path.exists() else ""
    if o.blocks and not phase:
        start = replace(start, loss=validated(run, placed(run, student, base, UNTRAINED)))
        student = run.prepare(base.exponents)
    placed(run, student, base, phase)
    report.trained_tensors = len(
        {name.rpartition("/")[0] or name for name in student.earlier | student.parameters}
    )
    at = begun(run, report, found, {}, student, asked, state)
    return replace(at, rates=rates_of(student, o.rate, start.errors)), start


def _write(run: FloatRun, report: TuneReport, student: Student, directory: Path) -> None:
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
        made = quantize(run.source, untrained(run, report.chosen, output), run.progress)
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
    run: FloatRun, student: Student, report: TuneReport, trained: str, output: Path
) -> QuantizeReport:
    """Write the student as it is."""
    o = run.options
    noted: dict[str, Any] = {
        TRAINED: trained,
        "source": run.source.name,
        "loss": o.loss,
        "teacher": o.teacher.name if o.teacher else None,
        "steps": o.steps,
        "block_steps": o.blocks if report.began == BLOCKS else None,
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
