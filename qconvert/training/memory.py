"""Memory that a training takes, from the shapes of the model, and memory that there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qconvert.errors import MachineError
from qconvert.quantities import size
from qconvert.roles import place_of
from qconvert.running.hidden_states import HELD_BYTES
from qconvert.stages.plan import PlannedTensor
from qconvert.training.scales import TunedScales

VALUE = 4  # bytes of a float32
DECODED = VALUE + 1  # of a quantized weight: its decoded value, and where it is clipped
TRAINED_COPIES = 4  # of a trained parameter: its gradient, Adam's two moments, the best state
ACTIVATION_COPIES = 24  # of a token's hidden state in a block until the backward pass
INNER_COPIES = 6  # of its state within the feed-forward layer
LOGIT_COPIES = 6  # of a token's logits: both models', their logarithms, and gradients
WIDTH, LAYERS = ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer")  # in configs
LIBRARIES = 500 << 20  # torch and transformers themselves, and what allocators keep

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def needed_bytes(
    plan: Sequence[PlannedTensor],
    trained: str,
    config: Mapping[str, Any],
    tokens: int,
    teacher_values: int,
    of_block: int = 0,
) -> int:
    """What a training takes at most, about.

    Args:
        plan: of the model's tensors.
        trained: of `qconvert.training.options.PARTS`.
        config: of the model.
        tokens: that go through a model at once.
        teacher_values: parameters of the model that is learned from.
        of_block: of `block_bytes`, where blocks are trained first.
    """
    coded = [p for p in plan if p.scheme is not None]
    values = sum(p.tensor.size for p in plan)
    codes = sum(p.encoding.size(p.tensor.shape) for p in coded)
    moving = TRAINED_COPIES * trained_values(plan, trained)
    end_to_end = VALUE * (moving + tokens * token_values(config))
    end_to_end += DECODED * sum(p.tensor.size for p in coded)
    return LIBRARIES + VALUE * (values + teacher_values) + codes + max(end_to_end, of_block)


def block_bytes(
    plan: Sequence[PlannedTensor], config: Mapping[str, Any], tokens: int, windows_tokens: int
) -> int:
    """What the largest block takes while it is trained, besides the models, about.

    Args:
        windows_tokens: those of all windows, whose hidden states are kept.
    """
    sizes: Counter[str] = Counter()
    for p in plan:
        if block := place_of(p.tensor.name).block:
            sizes[block] += p.tensor.size
    values = max(sizes.values(), default=0)
    layers = max(1, _number(config, *LAYERS))
    of_token = token_values(dict(config) | {"vocab_size": 0}) // layers
    states = min(HELD_BYTES, 2 * VALUE * windows_tokens * _number(config, *WIDTH))
    return VALUE * (TRAINED_COPIES * values + tokens * of_token) + DECODED * values + states


def token_values(config: Mapping[str, Any]) -> int:
    """Numbers that a token has in a model of this config until the backward pass, about."""

    width, layers = _number(config, *WIDTH), _number(config, *LAYERS)
    inner = _number(config, "intermediate_size") or 4 * width
    of_token = layers * (ACTIVATION_COPIES * width + INNER_COPIES * inner)
    of_token += LOGIT_COPIES * _number(config, "vocab_size")
    return of_token


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = (config.get(name) for name in names)
    return next((n for n in found if isinstance(n, int)), 0)


def trained_values(plan: Sequence[PlannedTensor], trained: str) -> int:
    """How many parameters are trained, at most."""
    coded = [p for p in plan if p.scheme is not None]
    if trained == "scales":
        return sum(sum(TunedScales.sizes(p.encoding, p.tensor.shape)) for p in coded)
    weights = sum(p.tensor.size for p in coded) if trained != "norms" else 0
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
