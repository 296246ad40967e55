"""The loop of `tune`: steps of Adam, validations that keep the best state, and an early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qconvert.codecs.codec import Stored
from qconvert.errors import WeightError
from qconvert.progress import Progress
from qconvert.quantities import counted, duration
from qconvert.report import TunedBlock, TuningStep
from qconvert.running.device import on_device
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.quality import BATCH_TOKENS, I64, Windows
from qconvert.running.tuning import deterministic, divergence, schedule
from qconvert.training.activations import FakeInput
from qconvert.training.fixed import can_stay, held
from qconvert.training.modules import FakeWeight
from qconvert.training.preparation import Training
from qconvert.training.scales import TunedScales
from qconvert.training.sentences import distances

VALIDATIONS = 10  # of all steps, besides the one before the first
# Validations without a better one after which training stops. They are counted from the middle of
# the schedule on: before, rates are so high that most of the gain is still to come.
PATIENCE = 3
RATE = 0.06  # of a weight: see `rates_of`
CLIP_RATE = 0.005  # of logarithms of factors of the scales of static inputs
GAIN_RATE = 0.015  # of factors of scales and gains, as a share of that error's ratio to the weights
NORM_FACTOR = 10  # theirs over that of weights, where that is given

CLIP = "input"  # the kind of what is learned of a static input
BLOCKS, UNTRAINED = "blocks", "untrained"  # what steps end to end begin with
COSINE = "cosine"  # 1 - that of the embeddings of sentences

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Student:
    """A prepared model that is trained.

    Attributes:
        checkpoint: the model with its tokenizer.
        training: what it was prepared for.
        parameters: those that are trained end to end, by name.
        earlier: those that are trained block by block before that, and stay then.
        only_scales: whether all codes stay end to end.
        gains: whether factors of scales are trained beside codes.
    """

    checkpoint: Checkpoint
    training: Training
    parameters: dict[str, Any]
    earlier: dict[str, Any] = field(default_factory=dict)
    only_scales: bool = False
    gains: bool = False

    def of_blocks(self) -> dict[str, Any]:
        """What is trained block by block, by name: weights and gains of norms."""
        every = self.earlier | self.parameters
        return {name: p for name, p in every.items() if isinstance(p, torch.nn.Parameter)}

    def state(self, names: Collection[str] | None = None) -> State:
        """A copy of `changing`."""
        changing = self.changing(names)
        return {name: tensor.detach().clone() for name, tensor in changing.items()}

    def restore(self, state: State) -> None:
        """Take back a copy."""
        every = self.changing() | self.earlier
        with torch.no_grad():
            for name, tensor in state.items():
                every[name].copy_(tensor)

    def begin_at(
        self,
        bases: Mapping[str, Stored],
        ranges: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Give weights the codes and scales of tensors that were quantized before, by name, and
        layers their static ranges.

        A weight stays where it is if it rounds to that code, and goes to the value of the code if
        it does not. Scales stay, or are trained by factors of theirs.
        """
        for name, noted in (ranges or {}).items():
            self.training.inputs[name].begin_at(noted)
        with torch.no_grad():
            for name, fake in self.training.weights.items():
                if name not in bases:
                    continue
                weight = self.checkpoint.model.get_parameter(name)
                wanted = bases[name].values(0, weight.numel()).reshape(tuple(weight.shape))
                fake.keep_scales(bases[name])
                values = torch.from_numpy(wanted).to(weight.device)
                weight.copy_(torch.where(fake(weight) == values, weight, values))
                if self.gains:
                    self._train_scales(name, fake, bases[name])
        self.training.plan = tuple(
            replace(p, scheme=self.training.weights[p.tensor.name].scheme)
            if p.tensor.name in bases
            else p
            for p in self.training.plan
        )

    def settle(self) -> None:
        """Let all codes stay as they are, and train factors of their scales and zero points."""
        with torch.no_grad():
            for name, fake in self.training.weights.items():
                stored = held(fake.stored(self.checkpoint.model.get_parameter(name)))
                fake.settle(stored)
                self._train_scales(name, fake, stored)

    def keep_scales(self) -> None:
        """Let scales that were found anew for each weight stay, where their encoding allows, and
        put weights in the middle of what rounds to their codes: those that a training has left near
        an edge would go over it at the first steps of another one.
        """
        with torch.no_grad():
            for name, fake in self.training.weights.items():
                weight = self.checkpoint.model.get_parameter(name)
                stored = fake.stored(weight)
                if fake.base is not None or not can_stay(stored):
                    continue
                stored = held(stored)
                fake.keep_scales(stored)
                weight.copy_(fake(weight))
                if self.gains:
                    self._train_scales(name, fake, stored)

    def _train_scales(self, name: str, fake: FakeWeight, base: Stored) -> None:
        device = self.checkpoint.model.get_parameter(name).device
        fake.gains = TunedScales(base, device)
        for kind, parameter in fake.gains.parameters().items():
            self.parameters[f"{name}/{kind}"] = parameter

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Have the observers of static activations look at what comes."""
        for module in self.training.inputs.values():
            module.train()
        try:
            yield
        finally:
            for module in self.training.inputs.values():
                module.eval()

    def freeze(self) -> None:
        for module in self.training.inputs.values():
            if module.kind == "static":
                module.frozen.fill_(True)

    def changing(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """What is trained end to end, or some parameters, and what the observers of static
        activations know.
        """
        every = self.earlier | self.parameters
        found = {name: every[name] for name in (self.parameters if names is None else names)}
        for name, module in self.training.inputs.items():
            found |= {f"{name}: {part}": buffer for part, buffer in module.named_buffers()}
        return found


@dataclass
class Course:
    """What became of a training.

    Attributes:
        blocks: those that were trained, in the order in which the model runs them.
        began: what the steps end to end began with, of `BLOCKS` and `UNTRAINED`; "" before that.
        left: why they did not begin with the blocks, if there were any.
        validations: in order, the one before the first step included.
        best: the state of ``step``; None where no step was better than none.
        stopped: why no more steps were run.
        warning: what went wrong, if anything did.
    """

    blocks: list[TunedBlock] = field(default_factory=list)
    began: str = ""
    left: str | None = None
    validations: list[TuningStep] = field(default_factory=list)
    steps_run: int = 0
    step: int = 0
    best: State | None = None
    stopped: str = ""
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained on, and how.

    Attributes:
        windows: to train on, taken in turn, ``batch`` a step.
        loss: ``distill`` or ``lm``, or `COSINE` of sentences.
        rates: of the parameters, by name, reached after a few steps and lowered along a cosine.
        validate: mean loss of a token of the validation windows.
    """

    windows: Windows
    loss: str
    steps: int
    batch: int
    rates: Mapping[str, float]
    validate: Callable[[], float]


class Diverged(Exception):
    """A loss or a gradient that is no number any more; says where it was first so."""


def adam(parameters: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimiser of named parameters, whose rates `set_rates` sets."""
    groups = [{"params": [p], "lr": 0.0} for p in parameters.values()]
    return torch.optim.Adam(groups or [{"params": []}])


def set_rates(optimiser: torch.optim.Optimizer, rates: Sequence[float], share: float) -> None:
    """Give each parameter a share of its rate."""
    for group, rate in zip(optimiser.param_groups, rates, strict=True):
        group["lr"] = rate * share


def check_gradients(parameters: Mapping[str, Any], where: str = "") -> None:
    """Refuse gradients that are no numbers.

    Raises:
        Diverged: names the first.
    """
    for name, parameter in parameters.items():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise Diverged(f"the gradient of '{name}' is not finite{where}")


def train(
    student: Student,
    course: Course,
    optimiser: torch.optim.Optimizer,
    reference: Checkpoint,
    plan: Plan,
    progress: Progress,
    between: Callable[[], None],
) -> None:
    """Train the student in place; its state afterwards is that of the last step.

    Args:
        course: so far; goes on from there, and is filled.
        optimiser: of `adam`.
        reference: whose next-token distributions are learned.
        between: is called where the training can be left and gone on with.
    """
    if course.stopped:
        return
    rates = [plan.rates[name] for name in student.parameters]
    half = plan.steps // 2
    every = max(1, round(plan.steps / VALIDATIONS))
    clock = _Clock(plan, progress, every)
    with deterministic(student.checkpoint.model):
        if course.validations:
            clock.goes_on(course)
        else:
            clock.validated(course, 0, None)
            if course.began == BLOCKS:
                course.best = student.state()  # better than no training already
        best = next(v.validation for v in course.validations if v.step == course.step)
        for step in range(course.steps_run + 1, plan.steps + 1):
            if step == half + 1:
                student.freeze()  # so that weights settle on ranges that stay
            set_rates(optimiser, rates, schedule(step, plan.steps))
            optimiser.zero_grad(set_to_none=True)
            begun = time.perf_counter()
            try:
                loss = _step(student, reference, plan, clock, step)
                optimiser.step()
                course.steps_run = step
                clock.stepped(step, loss, time.perf_counter() - begun)
                found = None
                if step % every == 0 or step == plan.steps:
                    found = clock.validated(course, step, loss)
            except (Diverged, WeightError) as e:
                where = e if isinstance(e, Diverged) else f"{e.message}, in '{e.tensor}'"
                course.stopped = f"numbers that are not finite at step {step}"
                course.warning = (
                    f"training stopped at step {step} of {plan.steps}: {where}; the state of step "
                    f"{course.step} was kept; take a smaller --lr"
                )
                break
            if found is not None and found < best:
                best, course.step, course.best = found, step, student.state()
            elif found is not None and step - max(course.step, half) >= PATIENCE * every:
                course.stopped = f"no better for {counted(step - course.step, 'step')}"
                break
            between()
    progress.end()
    course.stopped = course.stopped or "all steps were run"


Errors = Mapping[str, tuple[float, float]]


def rounding_errors(student: Student) -> Errors:
    """Root mean squares of what rounding does to the weights of each tensor, and of themselves."""
    found = {}
    with torch.no_grad():
        for name, fake in student.training.weights.items():
            weight = student.checkpoint.model.get_parameter(name)
            change = fake(weight) - weight
            error, size = (float(x.square().mean().sqrt()) for x in (change, weight))
            found[name] = error, size
    return found


def rates_of(student: Student, given: float | None, errors: Errors) -> dict[str, float]:
    """The rate of each trained parameter.

    Adam moves a parameter by about its rate in a step. Left to us, a weight moves by so small a
    share of its tensor's rounding error that its code is another one after some tens of steps,
    whatever the size of the weights. The share grows with the root of the error's ratio to the
    weights: 3 % at 2 bits, half of it at 4, where less is to be gained and steps that large do
    harm. A factor of scales moves all weights of its group by 1.5 % of the error, and gains of
    norms by the mean of these. With a rate given for weights, factors of scales keep theirs.

    Args:
        errors: of `rounding_errors`, before anything is made up for.
    """
    shares = {name: error / size if size else 0.0 for name, (error, size) in errors.items()}
    norm = GAIN_RATE * sum(shares.values()) / len(shares) if shares else 0.0
    found: dict[str, float] = {}
    for name in student.earlier | student.parameters:
        whole, _, kind = name.rpartition("/")
        if name in errors:
            share = RATE * math.sqrt(shares[name])
            found[name] = share * errors[name][0] if given is None else given
        elif kind == CLIP and whole in student.training.inputs:
            found[name] = CLIP_RATE
        elif whole in shares:
            gains = student.training.weights[whole].gains
            assert gains is not None
            found[name] = GAIN_RATE * shares[whole] * gains.unit(kind)
        else:
            found[name] = norm if given is None else NORM_FACTOR * given
    return found


def passes(windows: int, seqlen: int) -> list[slice]:
    """The windows that go through a model at once."""
    together = max(1, BATCH_TOKENS // seqlen)
    return [slice(start, start + together) for start in range(0, windows, together)]


def _step(student: Student, reference: Checkpoint, plan: Plan, clock: _Clock, step: int) -> float:
    """Gradients of a step's windows; their mean loss of a token.

    Raises:
        Diverged: it is not finite, or a gradient is not.
        WeightError: weights or inputs of a layer are not.
    """
    count = len(plan.windows.inputs)
    chosen = np.arange((step - 1) * plan.batch, step * plan.batch) % count
    targets = plan.windows.targets[chosen]
    inputs = plan.windows.inputs[chosen]
    total = 0.0
    with torch.enable_grad(), student.observing():
        for part in passes(len(chosen), inputs.shape[1]):
            loss = _loss(student, reference, plan, inputs[part], targets[part]) / targets.size
            total += float(loss.detach())
            if not np.isfinite(total):
                raise Diverged(f"the loss is {total}, {_first_bad(student, inputs[part])}")
            loss.backward()
            clock.progress.advance(inputs[part].size, f"step {step}")
    check_gradients(student.parameters)
    return total


def _loss(student: Student, reference: Checkpoint, plan: Plan, inputs: I64, targets: I64) -> Any:
    """Summed over all tokens."""
    if plan.loss == COSINE:  # of a sentence, whose share of all tokens is that of its window
        return distances(reference, student.checkpoint, inputs, targets).sum() * inputs.shape[1]
    if plan.loss == "distill":
        return divergence(reference, student.checkpoint, inputs)
    ids = on_device(inputs, student.checkpoint.model)
    logits = student.checkpoint.model(input_ids=ids, use_cache=False).logits
    wanted = on_device(targets, student.checkpoint.model)
    return functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum")


def _first_bad(student: Student, inputs: I64) -> str:
    """Which layer's output is the first that is not finite."""
    bad: list[str] = []

    def look(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, _: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                bad.append(name)

        return hook

    model = student.checkpoint.model
    hooks = [
        module.register_forward_hook(look(name))
        for name, module in model.named_modules()
        if not isinstance(module, FakeWeight | FakeInput)
    ]
    try:
        with torch.no_grad():
            model(input_ids=on_device(inputs, model))
    finally:
        for hook in hooks:
            hook.remove()
    return f"first in the output of layer '{bad[0]}'" if bad else "all layers are finite"


class _Clock:
    """Tells a `Progress` of validations, and of the steps between them with the time that is left.

    Attributes:
        seconds: of the last step.
        judging: seconds of the last validation.
    """

    def __init__(self, plan: Plan, progress: Progress, every: int) -> None:
        self.plan, self.progress, self.every = plan, progress, every
        self.seconds = self.judging = 0.0
        self.held_out = 0.0

    def validated(self, course: Course, step: int, loss: float | None) -> float:
        """Run the validation windows, and note what is found.

        Raises:
            Diverged: it is no number.
        """
        begun = time.perf_counter()
        self.progress.end()
        self.held_out = self.plan.validate()
        self.judging = time.perf_counter() - begun
        course.validations.append(TuningStep(step, loss, self.held_out))
        if step and not np.isfinite(self.held_out):
            raise Diverged(f"the loss of the validation windows is {self.held_out}")
        self._begin(step, loss)
        return self.held_out

    def goes_on(self, course: Course) -> None:
        """An interrupted run is gone on with."""
        self.held_out = course.validations[-1].validation
        self.progress.end()
        self._begin(course.steps_run, None)

    def stepped(self, step: int, loss: float, seconds: float) -> None:
        """A step is done; the first says how long all will take."""
        self.seconds = seconds
        if step == 1 and self.every > 1:
            self.progress.end()
            self._begin(step, loss)

    def _begin(self, step: int, loss: float | None) -> None:
        """Tell of the steps until the next validation."""
        coming = min(self.every - step % self.every, self.plan.steps - step)
        if not coming:
            return
        told = f"tune, step {step} of {self.plan.steps}: held-out loss {self.held_out:.4g}"
        if loss is not None:
            left = (self.plan.steps - step) * (self.seconds + self.judging / self.every)
            told += f", loss {loss:.4g}, about {duration(left)} left"
        tokens = coming * self.plan.batch * self.plan.windows.inputs.shape[1]
        self.progress.begin(told, tokens, "tokens")
