"""Scales of a quantized model's rows and gains of its norms, tuned so that it predicts next tokens
as its source does.

What is tuned is a factor for each output of a linear layer or a norm, which begins at 1; weights
stay as they are. The loss is KL(source || quantized) of the next tokens over all positions, by Adam
on the logarithms of the factors. Windows that were not trained on judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.running.device import CPU, device_of, on_device
from qconvert.running.hugging_face import Checkpoint

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
BATCH = 4  # windows of a step
WARM_UP = 5  # steps
MOST_JUDGED = 5  # times that the held-out windows are run, before the first step included


@dataclass(frozen=True, slots=True)
class Tuning:
    """What came of it.

    Attributes:
        factors: of the outputs of each layer, float32 (outputs,), by its module's name; empty
            where no step was better than none.
        step: after which they were those, 0 for none.
        before, after: mean divergence of the held-out windows in nats, without and with them.
    """

    factors: Mapping[str, F32]
    step: int
    before: float
    after: float


def tune(
    source: Checkpoint,
    quantized: Checkpoint,
    modules: Collection[str],
    training: I64,
    held_out: I64,
    steps: int,
    rate: float,
    advance: Callable[[int, str], None],
) -> Tuning:
    """Factors of the outputs of modules, their biases untouched.

    Args:
        modules: linear layers and norms of the quantized model, by name.
        training, held_out: windows of tokens, (n, length); training windows are taken in turn,
            `BATCH` a step.
        rate: of the logarithms of the factors, reached after `WARM_UP` steps and lowered to 0 along
            a cosine.
        advance: is told of tokens that were run for training or judging, and where.
    """
    import torch

    logs = {
        name: torch.zeros(len(quantized.model.get_submodule(name).weight), requires_grad=True)
        for name in modules
    }
    optimiser = torch.optim.Adam(list(logs.values()), lr=rate)
    judged = _judged(steps)
    with deterministic(quantized.model), _applied(quantized.model, logs), torch.enable_grad():
        best = before = _mean_divergence(source, quantized, held_out, advance)
        best_step, kept = 0, {}
        for step in range(1, steps + 1):
            for group in optimiser.param_groups:
                group["lr"] = rate * schedule(step, steps)
            optimiser.zero_grad(set_to_none=True)
            batch = training[np.arange((step - 1) * BATCH, step * BATCH) % len(training)]
            for window in batch:
                loss = divergence(source, quantized, window[None]) / batch.size
                loss.backward()
                advance(len(window), f"step {step}")
            optimiser.step()
            if step in judged:
                found = _mean_divergence(source, quantized, held_out, advance)
                if found < best:
                    best, best_step = found, step
                    kept = {k: v.detach().exp().numpy() for k, v in logs.items()}
    return Tuning(kept, best_step, before, best)


def tokens_run(training: int, held_out: int, steps: int) -> int:
    """Tokens that `tune` will have told of.

    Args:
        training: length of a window.
        held_out: tokens of all windows that judge.
    """
    return steps * BATCH * training + (len(_judged(steps)) + 1) * held_out


def _judged(steps: int) -> Sequence[int]:
    """The steps after which the held-out windows are run, the last among them."""
    times = min(steps, MOST_JUDGED - 1)
    return [round(steps * (i + 1) / times) for i in range(times)]


def schedule(step: int, steps: int) -> float:
    """Of the rate, at a step from 1 on."""
    warm = min(1.0, step / WARM_UP)
    return warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


@contextmanager
def _applied(model: Any, logs: Mapping[str, Any]) -> Iterator[None]:
    """Multiply the outputs of modules while they run."""
    with ExitStack() as hooks:
        for name, log in logs.items():
            hook = model.get_submodule(name).register_forward_hook(_times(log))
            hooks.callback(hook.remove)
        yield


def _times(log: Any) -> Callable[[Any, Any, Any], Any]:
    def hook(module: Any, _: Any, output: Any) -> Any:
        bias = module._parameters.get("bias")
        factor = log.exp()
        return output * factor if bias is None else (output - bias) * factor + bias

    return hook


def _mean_divergence(
    source: Checkpoint, quantized: Checkpoint, windows: I64, advance: Callable[[int, str], None]
) -> float:
    import torch

    total = 0.0
    with torch.no_grad():
        for window in windows:
            total += float(divergence(source, quantized, window[None]))
            advance(len(window), "held-out windows")
    return total / windows.size


def divergence(source: Checkpoint, quantized: Checkpoint, windows: I64) -> Any:
    """Σ over the positions of windows (n, length) of KL(source || quantized) of the next token, in
    nats.
    """
    import torch
    from torch.nn import functional

    ids = on_device(windows, source.model)
    with torch.no_grad():
        wanted = source.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
        wanted = functional.log_softmax(wanted, -1)
    found = quantized.model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
    found = functional.log_softmax(found, -1)
    return functional.kl_div(found, wanted, reduction="sum", log_target=True)


@contextmanager
def deterministic(model: Any) -> Iterator[None]:
    """Have torch give the same bits each time, and its setting back. Other devices than the CPU may
    have no such way for an operation; torch warns then.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=device_of(model).type != CPU)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
