"""What tune of a float model begins with: nearest codes, those that quantization with a
calibration gives, or blocks that were trained one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qconvert.codecs.codec import Stored
from qconvert.errors import InputError, UsageError
from qconvert.files import open_model
from qconvert.files.dequantized import dequantized
from qconvert.files.equalised import Exponents, equalised, read_exponents
from qconvert.files.qblk import QblkModel
from qconvert.files.saved_state import SavedState
from qconvert.files.scratch import Scratch
from qconvert.report import QuantizeReport, TuneReport
from qconvert.running.quantized_model import open_quantized
from qconvert.stages.quantize import quantize
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions, RepairText
from qconvert.training.block_stage import BlockPlan, BlockStage, refusing
from qconvert.training.fixed import can_stay, held
from qconvert.training.float_run import FloatRun
from qconvert.training.judging import COMPENSATED, NEAREST
from qconvert.training.loop import UNTRAINED, Errors, Student, adam, rates_of
from qconvert.training.options import TuneOptions
from qconvert.training.run import Begun, Found

AIMED = 64  # windows that codes are aimed by


@dataclass(frozen=True, slots=True)
class Base:
    """What training can begin with.

    Attributes:
        tensors: that have codes, in memory.
        exponents: by which channels are rescaled.
        ranges: what the file says of the static ranges of layers, by the names of their weights.
    """

    tensors: Mapping[str, Stored] = field(default_factory=dict)
    exponents: Mapping[str, Exponents] = field(default_factory=dict)
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """What a student is made of.

    Attributes:
        base: what training can begin with.
        errors: of rounding to nearest.
        loss: mean of a token of the validation windows without training; None where no blocks will
            have to be better than that.
    """

    base: Base
    errors: Errors
    loss: float | None


def validated(run: FloatRun, student: Student) -> float:
    """Mean loss of a token of the windows that choose a state."""
    return float(run.losses(run.scores(student.checkpoint, run.split.validation)).mean())


def placed(run: FloatRun, student: Student, base: Base, began: str) -> Student:
    """A student of `prepare` with what it begins with.

    Args:
        began: see `Course`. Blocks begin with nearest codes, since scales are found anew as their
            weights move; what is outside of them begins where it is best in any case.
    """
    o = run.options
    tensors = base.tensors
    if o.blocks and began != UNTRAINED:
        tensors = {name: t for name, t in tensors.items() if name not in run.in_blocks}
    student.begin_at(tensors, base.ranges)
    if student.only_scales and (not o.blocks or began == UNTRAINED):
        student.settle()
    return student


def through_blocks(
    run: FloatRun, at: Begun, start: Start, state: SavedState, directory: Path
) -> Begun:
    """Train the blocks, and begin with them, or without any training where that is better."""
    o, halfway = run.options, at.halfway
    plan = BlockPlan(run.split.training.inputs[: o.blocks * o.batch], o.blocks, o.batch, at.rates)
    with refusing(run.source), Scratch(directory / o.output.name) as scratch:
        stage = BlockStage(halfway.student, run.loaded, plan, scratch, run.progress)
        halfway.blocks = len(stage.inside)
        stage.train(halfway.course, lambda: state.asked, lambda: state.between(halfway))
    loss = validated(run, halfway.student)
    assert start.loss is not None
    if loss < start.loss:
        halfway.begin_with_blocks()
    else:
        halfway.course.left = (
            f"with trained blocks the held-out loss is {loss:.4g} nats a token, and without any "
            f"training {start.loss:.4g}: the steps begin with that"
        )
        halfway.student = placed(run, run.prepare(start.base.exponents), start.base, UNTRAINED)
        halfway.optimiser, halfway.course.began = adam(halfway.student.parameters), UNTRAINED
    return replace(at, rates=rates_of(halfway.student, o.rate, start.errors))


def compensated(run: FloatRun, report: TuneReport, directory: Path) -> tuple[Base, Found]:
    """What quantization with the calibration gives, and how good it is.

    Raises:
        InputError: the calibration has no Gram matrices of the model.
    """
    o = run.options
    draft = directory / o.output.name
    asked = replace(untrained(run, COMPENSATED, draft), strict=False)
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


def _base(run: FloatRun, draft: Path, made: QuantizeReport, report: TuneReport) -> Base:
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
            return Base()
        compensated = {t.name for t in made.tensors if t.rounding == COMPENSATED}
        coded = {t.name for t in made.tensors if t.quantized} if exponents else compensated
        stored = {t.name: model.stored(t) for t in model.tensors if t.name in coded}
        found = {name: held(s) for name, s in stored.items() if can_stay(s)}
        ranges = {name: s.activation for name, s in stored.items() if s.activation}
    report.began_compensated = len(compensated & found.keys())
    return Base(found, exponents, ranges if run.options.activations == "static" else {})


def untrained(run: FloatRun, rounding: str, output: Path) -> QuantizeOptions:
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
