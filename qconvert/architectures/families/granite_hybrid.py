"""Granite 4: state-space layers and attention, with experts and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL_OR_NULL,
    DECODER,
    FLOATS_OR_NULL,
    INT,
    INT_OR_NULL,
    INT_OR_TEXT_OR_NULL,
    NUMBER_OR_NULL,
    TEXT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
)
from qconvert.architectures.families.granite import (
    EXPERT_FIELDS,
    GRANITE,
    GRANITE_PARTS,
    granite_fields,
    granite_keys,
)
from qconvert.architectures.families.keys import (
    FULL,
    SILU,
    Keys,
    Sizes,
    expert_keys,
    expert_sizes,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    DOWN,
    EXPERTS,
    GATE,
    GATED,
    NORMS,
    SHARED,
    UP,
    WHOLE,
    limited,
)
from qconvert.architectures.families.ssm import (
    SSM,
    UNLIMITED,
    attending_keys,
    attends,
    head_width,
    recurs,
    require_unlimited,
    ssm_keys,
    ssm_parts,
    ssm_sizes,
)
from qconvert.architectures.rope import BY_PAIR, Rope

MAMBA_FIELDS: dict[str, tuple[str, object]] = {
    "mamba_n_heads": (INT_OR_NULL, 128),
    "mamba_n_groups": (INT_OR_NULL, 1),
    "mamba_d_state": (INT_OR_NULL, 256),
    "mamba_d_head": (INT_OR_TEXT_OR_NULL, "auto"),
    "mamba_d_conv": (INT_OR_NULL, 4),
    "mamba_expand": (INT_OR_NULL, 2),
    "mamba_conv_bias": (BOOL_OR_NULL, True),
    "mamba_proj_bias": (BOOL_OR_NULL, False),
    "time_step_limit": (FLOATS_OR_NULL, UNLIMITED),
}

CONFIGS = (
    ConfigClass(
        "GraniteMoeHybridConfig",
        "granitemoehybrid",
        ("GraniteMoeHybridForCausalLM",),
        granite_fields(
            NUMBER_OR_NULL,
            **EXPERT_FIELDS,
            shared_intermediate_size=(INT, 1024),
            position_embedding_type=(TEXT_OR_NULL, None),
            layer_types=(TEXTS_OR_NULL, None),
            **MAMBA_FIELDS,
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef", "mamba_chunk_size"),
        (*(n for n in DECODER if n != "layer_types"), "head_dim"),
        MappingProxyType({"layers_block_type": "layer_types"}),
        harmless=MappingProxyType({"init_method": None, "normalization_function": ("rmsnorm",)}),
    ),
)

_ROTATED = "position_embedding_type"


def mamba_sizes(config: Config, inner: int) -> dict[str, int]:
    """Dimensions of state-space layers whose fields begin with ``mamba_``."""
    head_width(config, inner)
    return ssm_sizes(
        config, inner=inner, heads="mamba_n_heads", groups="mamba_n_groups",
        state="mamba_d_state", kernel="mamba_d_conv",
    )  # fmt: skip


def require_plain_mamba(config: Config) -> None:
    """Refuse what llama.cpp does not have in state-space layers."""
    config.require("mamba_conv_bias", (True,))
    config.require("mamba_proj_bias", (False, None))
    require_unlimited(config)


def hybrid_sizes(config: Config) -> Sizes:
    shared = config.count("shared_intermediate_size")
    if config.get("num_local_experts") == 0:
        plain = plain_sizes(config)
        plain = replace(plain, named=plain.named | {"inner": shared})
    else:
        plain = expert_sizes(config, "num_local_experts", "intermediate_size", shared=shared)
    if not any(recurs(config, plain, i) for i in range(plain.blocks)):
        return plain
    inner = config.count("mamba_expand", most=1024) * plain.named["width"]
    return replace(plain, named=plain.named | mamba_sizes(config, inner))


def attention_keys(config: Config, sizes: Sizes) -> Keys:
    """Of models in which all layers have attention."""
    found = granite_keys(config, sizes)
    if "experts" in sizes.named:
        found |= expert_keys(config, sizes)
        found["expert_shared_feed_forward_length"] = sizes.named["shared"]
    return found


def hybrid_keys(config: Config, sizes: Sizes) -> Keys:
    require_plain_mamba(config)
    config.require("mamba_expand", (2,))
    if not any(attends(config, sizes, i) for i in range(sizes.blocks)):
        raise config.unlike("layer_types", f"'{FULL}' for one layer at least")
    return attention_keys(config, sizes) | attending_keys(config, sizes) | ssm_keys(sizes)


def hybrid_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions, or none at all: llama.cpp goes by a key of another meaning."""
    if config.get(_ROTATED) == "rope":
        return rotary(BY_PAIR)(config, sizes)
    return Rope({"scaling.finetuned": False})


def _rope_with_experts(config: Config, sizes: Sizes) -> Rope:
    if config.get(_ROTATED) != "rope":
        raise config.unlike(_ROTATED, "'rope' where all layers have attention and experts")
    return hybrid_rope(config, sizes)


def _instead(fields: Mapping[str, Any]) -> Family | None:
    types = fields.get("layers_block_type", fields.get("layer_types"))
    attending = isinstance(types, list) and all(t in (FULL, "attention") for t in types)
    return _VARIANTS[attending, fields.get("num_local_experts", 8) == 0]


_DENSE_PARTS = {
    "shared_mlp.input_linear.weight": (GATE.name, UP.name),
    "shared_mlp.output_linear.weight": (DOWN.name,),
}
_HYBRID = Family(
    "Granite 4 (hybrid)",
    ("GraniteMoeHybridForCausalLM",),
    "granitehybrid",
    WHOLE,
    (
        *NORMS,
        *limited(tuple(s for s in GRANITE if s not in NORMS), attends),
        *limited(SSM, recurs),
        *(*EXPERTS, *SHARED),
    ),
    hybrid_keys,
    hybrid_sizes,
    hybrid_rope,
    SILU,
    parts=MappingProxyType(GRANITE_PARTS | ssm_parts("mamba")),
    instead=_instead,
)


def _dense(family: Family) -> Family:
    return replace(
        family,
        block=(*(s for s in family.block if s not in (*EXPERTS, *SHARED)), *GATED),
        parts=MappingProxyType({**family.parts, **_DENSE_PARTS}),
    )


_ATTENDING = replace(
    _HYBRID,
    arch="granitemoe",
    block=(*GRANITE, *EXPERTS, *SHARED),
    keys=attention_keys,
    rope=_rope_with_experts,
)
# By whether all layers attend, and whether there are no experts.
_VARIANTS = {
    (False, False): _HYBRID,
    (False, True): _dense(_HYBRID),
    (True, False): _ATTENDING,
    (True, True): replace(_dense(_ATTENDING), arch="granite", rope=hybrid_rope),
}

ROWS = (_HYBRID,)
