"""State-space layers of Mamba 2's kind, and of Mamba 1's, as several architectures have them.

A checkpoint has the logarithm of each head's decay, a decay and a skip for each head as vectors,
and one norm over the inner width; GGUF has the decay itself, both as columns, and the norm as one
row for each group.
"""

from __future__ import annotations

import math

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import FULL, Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.families.slots import In
from qconvert.architectures.mapped import NEGATED_EXP
from qconvert.errors import FormatError
from qconvert.files.gguf_writer import GgufValue

UNLIMITED = (0.0, math.inf)
_MOST_INNER = MAX_STATE = 1 << 24
MAX_KERNEL = 64
LINEAR = "linear_attention"
# Names that transformers still takes for kinds of layers.
OLDER = {"mamba": LINEAR, "attention": FULL}
# The converter's, for models whose positions have no end.
ENDLESS = 1 << 20


def ssm_sizes(
    config: Config, *, inner: int, heads: str, groups: str, state: str, kernel: str
) -> dict[str, int]:
    """Dimensions of state-space layers.

    Args:
        config: of the model.
        inner: width that the heads share.
        heads, groups, state, kernel: fields that count heads, groups of heads with the same input
            and output matrices, values of a head's state, and steps of the convolution.

    Raises:
        FormatError: heads or groups do not divide what they should.
    """
    count, parts = config.count(heads), config.count(groups)
    if inner > _MOST_INNER or inner % count or count % parts:
        raise FormatError(
            "heads of state-space layers do not divide as they should",
            path=config.path,
            found=f"{count} heads, {parts} groups, inner width {inner}",
            wanted=f"'{heads}' that divides the width, '{groups}' that divides the heads",
            code="ARCH-HEADS",
        )
    each = config.count(state, most=_MOST_INNER)
    mixed = inner + 2 * parts * each
    return {
        "ssm_inner": inner,
        "ssm_heads": count,
        "ssm_groups": parts,
        "ssm_group": inner // parts,
        "ssm_state": each,
        "ssm_kernel": config.count(kernel, most=MAX_KERNEL),
        "ssm_mixed": mixed,
        "ssm_projected": inner + mixed + count,
    }


def ssm_keys(sizes: Sizes) -> Keys:
    named = sizes.named
    return {
        "ssm.conv_kernel": named["ssm_kernel"],
        "ssm.inner_size": named["ssm_inner"],
        "ssm.state_size": named["ssm_state"],
        "ssm.time_step_rank": named["ssm_heads"],
        "ssm.group_count": named["ssm_groups"],
    }


def head_width(config: Config, inner: int) -> None:
    """Hold the stated width of a head, where it is no text, to what the heads share.

    Raises:
        FormatError: it is another.
    """
    stated = config.get("mamba_d_head")
    if stated != "auto" and stated != inner // config.count("mamba_n_heads"):
        raise config.wrong("mamba_d_head", f"'auto', or {inner} / mamba_n_heads")


def kinds(config: Config, sizes: Sizes) -> list[str]:
    """Which kind each layer is of; all are state-space layers where nothing is said.

    Raises:
        FormatError: not one for each layer, or of another kind.
    """
    types = config.get("layer_types")
    if types is None:
        return [LINEAR] * sizes.blocks
    found = [OLDER.get(t, t) for t in types]
    if len(found) != sizes.blocks or not set(found) <= {LINEAR, FULL}:
        wanted = f"'{FULL}' or '{LINEAR}' for each of {sizes.blocks} layers"
        raise config.wrong("layer_types", wanted)
    return found


def recurs(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether a block is a state-space layer."""
    return kinds(config, sizes)[block] == LINEAR


def attends(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether it has attention instead."""
    return not recurs(config, sizes, block)


def attending_keys(config: Config, sizes: Sizes, attends: In = attends) -> Keys:
    """Heads of keys in each layer, none where it is a state-space layer."""
    groups = sizes.named["key"] // sizes.head_dim
    attended = [attends(config, sizes, i) for i in range(sizes.blocks)]
    return {"attention.head_count_kv": GgufValue("UINT32", [groups if a else 0 for a in attended])}


def require_unlimited(config: Config, field: str = "time_step_limit") -> None:
    """Refuse limits of the time steps: llama.cpp takes them as they are.

    Raises:
        UnsupportedError: there is one that a softplus can reach.
    """
    found = config.get(field)
    if not isinstance(found, list | tuple) or tuple(found) != UNLIMITED:
        raise config.unlike(field, "[0.0, Infinity]")


SSM = (
    Slot("ssm_in.weight", "ssm_projected width"),
    Slot("ssm_conv1d.weight", "ssm_mixed ssm_kernel", source="ssm_mixed 1 ssm_kernel"),
    Slot("ssm_conv1d.bias", "ssm_mixed"),
    Slot("ssm_dt.bias", "ssm_heads"),
    Slot("ssm_a", "ssm_heads 1", source="ssm_heads", change=NEGATED_EXP),
    Slot("ssm_d", "ssm_heads 1", source="ssm_heads"),
    Slot("ssm_norm.weight", "ssm_groups ssm_group", source="ssm_inner"),
    Slot("ssm_out.weight", "width ssm_inner"),
)


def ssm_parts(inside: str) -> dict[str, tuple[str, ...]]:
    """Names within a block, of a module that is called ``inside``."""
    return {
        f"{inside}.dt_bias": ("ssm_dt.bias",),
        f"{inside}.A_log": ("ssm_a",),
        f"{inside}.D": ("ssm_d",),
        f"{inside}.norm.weight": ("ssm_norm.weight",),
        **{
            f"{inside}.{theirs}.{kind}": (f"{ours}.{kind}",)
            for theirs, ours in (
                ("in_proj", "ssm_in"), ("conv1d", "ssm_conv1d"), ("out_proj", "ssm_out"),
            )
            for kind in ("weight", "bias")
        },
    }  # fmt: skip


# Names of blocks that have a module ``mamba`` or attention, and ``feed_forward``.
MIXED_PARTS: dict[str, tuple[str, ...]] = {
    "pre_ff_layernorm.weight": ("ffn_norm.weight",),
    **{
        f"feed_forward.{n}_proj.{kind}": (f"ffn_{n}.{kind}",)
        for n in ("gate", "up", "down")
        for kind in ("weight", "bias")
    },
    **{
        f"feed_forward.experts.{n}_proj.weight": (f"ffn_{n}_exps.weight",)
        for n in ("gate", "up", "down")
    },
    "feed_forward.router.weight": ("ffn_gate_inp.weight",),
}

# --- Mamba 1: every value of the inner width is a head with decays of its own ---

FIRST_SSM = (
    Slot("ssm_in.weight", "ssm_twice width"),
    Slot("ssm_conv1d.weight", "ssm_inner ssm_kernel", source="ssm_inner 1 ssm_kernel"),
    Slot("ssm_conv1d.bias", "ssm_inner"),
    Slot("ssm_x.weight", "ssm_chosen ssm_inner"),
    Slot("ssm_dt.weight", "ssm_inner ssm_rank"),
    Slot("ssm_dt.bias", "ssm_inner"),
    Slot("ssm_a", "ssm_inner ssm_state", change=NEGATED_EXP),
    Slot("ssm_d", "ssm_inner"),
    Slot("ssm_out.weight", "width ssm_inner"),
)


def first_sizes(inner: int, state: int, rank: int, kernel: int) -> dict[str, int]:
    """Dimensions: of the inner layer, a state, what time steps are made of, and a convolution."""
    return {
        "ssm_inner": inner,
        "ssm_twice": 2 * inner,
        "ssm_state": state,
        "ssm_rank": rank,
        "ssm_chosen": rank + 2 * state,
        "ssm_kernel": kernel,
    }


def time_step_rank(config: Config, field: str, width: int) -> int:
    """Width of what time steps are made of: a sixteenth of the model's where it is 'auto'."""
    return -(-width // 16) if config.get(field) == "auto" else config.count(field)


def first_keys(sizes: Sizes) -> Keys:
    named = sizes.named
    return {
        "ssm.conv_kernel": named["ssm_kernel"],
        "ssm.inner_size": named["ssm_inner"],
        "ssm.state_size": named["ssm_state"],
        "ssm.time_step_rank": named["ssm_rank"],
    }
