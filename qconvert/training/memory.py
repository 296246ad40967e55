"""Memory that a training takes, from the shapes of the model, and memory that there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qconvert.errors import MachineError
from qconvert.quantities import size
from qconvert.stages.plan import PlannedTensor

VALUE = 4  # bytes of a float32
TRAINED_COPIES = 4  # of a trained parameter: its gradient, Adam's two moments, the best state
ACTIVATION_COPIES = 24  # of a token's hidden state in a block until the backward pass
INNER_COPIES = 6  # of its state within the feed-forward layer
LOGIT_COPIES = 6  # of a token's logits: both models', their logarithms, and gradients
LIBRARIES = 500 << 20  # torch and transformers themselves, and what allocators keep

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def needed_bytes(
    plan: Sequence[PlannedTensor],
    trained: str,
    config: Mapping[str, Any],
    tokens: int,
    teacher_values: int,
) -> int:
    """What a training takes at most, about.

    Args:
        plan: of the model's tensors.
        trained: of `qconvert.training.options.PARTS`.
        config: of the model.
        tokens: that go through a model at once.
        teacher_values: parameters of the model that is learned from.
    """
    coded = [p for p in plan if p.scheme is not None]
    values = sum(p.tensor.size for p in plan)
    moving = trained_values(plan, trained)
    # Of a quantized weight its decoded value, a byte for where it is clipped, and its codes.
    of_codes = sum((VALUE + 1) * p.tensor.size + p.encoding.size(p.tensor.shape) for p in coded)
    of_weights = VALUE * (values + teacher_values + TRAINED_COPIES * moving)

    return LIBRARIES + of_weights + of_codes + VALUE * tokens * token_values(config)


def token_values(config: Mapping[str, Any]) -> int:
    """Numbers that a token has in a model of this config until the backward pass, about."""

    def number(*names: str) -> int:
        found = (config.get(name) for name in names)
        return next((n for n in found if isinstance(n, int)), 0)

    width, layers = number("hidden_size", "n_embd"), number("num_hidden_layers", "n_layer")
    inner = number("intermediate_size") or 4 * width
    of_token = layers * (ACTIVATION_COPIES * width + INNER_COPIES * inner)
    of_token += LOGIT_COPIES * number("vocab_size")
    return of_token


def trained_values(plan: Sequence[PlannedTensor], trained: str) -> int:
    """How many parameters are trained, at most."""
    weights = sum(p.tensor.size for p in plan if p.scheme is not None) if trained != "norms" else 0
    flat = sum(p.tensor.size for p in plan if p.scheme is None and len(p.tensor.shape) == 1)
    return weights + flat


def available_bytes() -> int | None:
    """Memory that may still be taken, by the system and by the limit of a container; None where
    neither says.
    """
    found = [n for n in (_of_system(), _of_container()) if n is not None]
    return min(found) if found else None


def check_memory(needed: int) -> None:
    """Refuse what does not fit.

    Raises:
        MachineError: there is less.
    """
    there = available_bytes()
    if there is not None and there < needed:
        raise MachineError(
            "not enough memory to tune the model",
            found=f"{size(there)} available",
            wanted=f"about {size(needed)}",
            hint="a smaller --seqlen, --train norms, or a machine with more",
            code="TUNE-MEMORY",
        )


def _of_system() -> int | None:
    text = _read(MEMINFO)
    lines = (line.split() for line in text.splitlines())
    found = next((words[1] for words in lines if words[:1] == ["MemAvailable:"]), "")
    return int(found) * 1024 if found.isdecimal() else None


def _of_container() -> int | None:
    most, used = (_read(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    return max(0, int(most) - int(used)) if most.isdecimal() and used.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
