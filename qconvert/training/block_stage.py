"""The first stage of tune in two: block by block, each learns what the float model's block makes.

A block of the student gets the hidden states that the blocks before it make, as far as they are
trained, and learns the hidden states that the float model has behind the same block: by the mean
square of the difference, with gradients for that block alone (Block-AP of EfficientQAT: Chen et
al., 2024, arXiv 2407.11062, section 3.2). The whole model is trained afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.errors import UnsupportedError, WeightError
from qconvert.files.scratch import Scratch
from qconvert.kernels.records import ErrorSums
from qconvert.progress import Progress
from qconvert.report import TunedBlock
from qconvert.running.blocks import BlockChain, NoBlocks
from qconvert.running.device import on_device
from qconvert.running.hidden_states import HELD_BYTES, HiddenStates
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.quality import I64
from qconvert.running.tuning import deterministic, schedule
from qconvert.training.loop import (
    Course,
    Diverged,
    Student,
    adam,
    check_gradients,
    passes,
    set_rates,
)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What blocks are trained on, and how.

    Attributes:
        windows: tokens (n, T), taken in turn, ``batch`` a step.
        steps: of each block.
        rates: of the parameters, by name.
    """

    windows: I64
    steps: int
    batch: int
    rates: Mapping[str, float]


@contextmanager
def refusing(source: Path) -> Iterator[None]:
    """Refuse a model that is not run block by block.

    Raises:
        UnsupportedError: it is not.
    """
    try:
        yield
    except NoBlocks as e:
        raise UnsupportedError(
            "--blocks: the model is not run block by block",
            path=source,
            found=str(e),
            hint="leave --blocks out",
        ) from e


def names_in_blocks(model: Checkpoint, tokens: I64) -> set[str]:
    """The parameters that are inside of blocks.

    Args:
        tokens: of a window, (T,).

    Raises:
        NoBlocks: the model is not run block by block.
    """
    chain = BlockChain(model, tokens)
    places = chain.places()
    hidden = chain.entering(tokens)
    for k in range(len(chain.blocks)):
        chain.check_together(k, hidden, hidden[::-1].copy())
        hidden = chain.run(k, hidden)
    return {name for name, p in model.model.named_parameters() if id(p) in places}


class BlockStage:
    """A run over the blocks of a student, from the first one on that ``course`` has not.

    Args:
        source: the float model that the student was made of.
        scratch: for hidden states that are too many for memory.

    Raises:
        NoBlocks: the model is not run block by block.
    """

    def __init__(
        self,
        student: Student,
        source: Checkpoint,
        plan: BlockPlan,
        scratch: Scratch,
        progress: Progress,
    ) -> None:
        self.student, self.plan, self.progress = student, plan, progress
        windows = plan.windows
        self.source = BlockChain(source, windows[0])
        self.chain = BlockChain(student.checkpoint, windows[0])
        self.inside = self._parameters()
        first = self.source.entering(windows[0])
        shape = (first.shape[0], first.shape[1])
        file = None if 2 * len(windows) * first.nbytes <= HELD_BYTES else scratch
        self.wanted, self.found = (HiddenStates(len(windows), shape, file) for _ in range(2))

    def train(self, course: Course, asked: Callable[[], bool], between: Callable[[], None]) -> None:
        """Train the blocks in place, and note what became of each.

        Args:
            asked: whether somebody wants to stop. A block that is not finished begins anew then.
            between: is called where the training can be left and gone on with.
        """
        with deterministic(self.student.checkpoint.model):
            self._enter()
            for k, names in enumerate(self.inside):
                told = f"tune, block {k + 1} of {len(self.inside)}"
                done = k < len(course.blocks)
                tokens = self.plan.windows.size * (2 if done else 4)
                length = self.plan.windows.shape[1]
                tokens += 0 if done else self.plan.steps * self.plan.batch * length
                self.progress.begin(told, tokens, "tokens")
                self._advance(self.source, self.wanted, k)
                if not done:
                    course.blocks.append(self._block(k, names, asked, between))
                self._advance(self.chain, self.found, k)
                self.progress.end()
                between()

    def _parameters(self) -> list[dict[str, Any]]:
        """What is trained of each block, by name."""
        places = self.chain.places()
        found: list[dict[str, Any]] = [{} for _ in self.chain.blocks]
        for name, parameter in self.student.of_blocks().items():
            k = places.get(id(parameter))
            if k is not None:
                found[k][name] = parameter
        return found

    def _enter(self) -> None:
        """Fill the hidden states before the first block."""
        for w, tokens in enumerate(self.plan.windows):
            self.wanted.put(w, self.source.entering(tokens))
            self.found.put(w, self.chain.entering(tokens))

    def _advance(self, chain: BlockChain, states: HiddenStates, k: int) -> None:
        """Bring hidden states through a block."""
        for w in range(len(self.plan.windows)):
            states.put(w, chain.run(k, states.get(w)))
            self.progress.advance(self.plan.windows.shape[1], "windows through the block")

    def _sums(self, k: int) -> tuple[float, float]:
        """Sums of squares of what is wanted in all windows, and of what the block lacks to it."""
        wanted = lacking = 0.0
        for w in range(len(self.plan.windows)):
            found, float_states = self.chain.run(k, self.found.get(w)), self.wanted.get(w)
            wanted += float(np.square(float_states, dtype=np.float64).sum())
            lacking += float(np.square(found - float_states, dtype=np.float64).sum())
            self.progress.advance(self.plan.windows.shape[1], "windows through the block")
        return wanted, lacking

    def _block(
        self,
        k: int,
        names: Mapping[str, Any],
        asked: Callable[[], bool],
        between: Callable[[], None],
    ) -> TunedBlock:
        """Train one; it stays as it was where that is better."""
        wanted, before = self._sums(k)
        start, warning = self.student.state(names), None

        def leave() -> None:
            if asked():
                self.student.restore(start)
                between()

        try:
            if names:  # not where --keep has all of it
                self._steps(k, names, wanted / len(self.plan.windows), leave)
            after = self._sums(k)[1]
        except (Diverged, WeightError) as e:
            after, warning = math.inf, e.message if isinstance(e, WeightError) else str(e)
        if not after < before:
            self.student.restore(start)
            after = before
        was, now = (ErrorSums(signal=wanted, noise=noise).sqnr_db for noise in (before, after))
        return TunedBlock(was, now, warning)

    def _steps(
        self, k: int, names: Mapping[str, Any], unit: float, leave: Callable[[], None]
    ) -> None:
        """Steps of Adam.

        Args:
            unit: what losses are divided by: the sum of squares of a window's wanted states.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        plan, parameters = self.plan, list(names.values())
        wanting = [p.requires_grad for p in parameters]
        optimiser, rates = adam(names), [plan.rates[name] for name in names]
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad(), self.student.observing():
            for step in range(1, plan.steps + 1):
                leave()
                set_rates(optimiser, rates, schedule(step, plan.steps))
                optimiser.zero_grad(set_to_none=True)
                taken = np.arange((step - 1) * plan.batch, step * plan.batch) % len(plan.windows)
                self._step(k, taken, unit, f"step {step} of {plan.steps}")
                check_gradients(names, f" at step {step}")
                optimiser.step()
        for p, before in zip(parameters, wanting, strict=True):
            p.grad = None
            p.requires_grad_(before)

    def _step(self, k: int, taken: I64, unit: float, told: str) -> None:
        """Gradients of the windows of a step."""
        for part in passes(len(taken), self.plan.windows.shape[1]):
            states = (self.found, self.wanted)
            found, wanted = (
                on_device(np.stack([of.get(w) for w in taken[part]]), self.student.checkpoint.model)
                for of in states
            )
            change = self.chain.run_together(k, found) - wanted
            loss = change.square().sum() / (unit * len(taken))
            if not torch.isfinite(loss):
                raise Diverged(f"the loss is {float(loss.detach())} at {told}")
            loss.backward()
            self.progress.advance(wanted[..., 0].numel(), told)
