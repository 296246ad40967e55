"""Granite, dense and with experts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    NUMBER,
    NUMBER_OR_NULL,
    TRAINING,
    ConfigClass,
    Fields,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_keys,
    expert_sizes,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_BIAS,
    ATTENTION_OUTPUT_BIAS,
    EXPERTS,
    GATED,
    GATED_BIASES,
    NORMS,
    SHARED,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import BY_PAIR

# GGUF's name of each multiplier.
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
}


def granite_fields(number: str, **more: tuple[str, object]) -> Fields:
    sizes = (32_000, 4096, 11_008, 32, 32)
    bias = (BOOL, False)
    plain = decoder_fields(sizes, (INT_OR_NULL, None), 2048, attention_bias=bias)
    return plain | {name: (number, 1.0) for name in _MULTIPLIERS} | more


EXPERT_FIELDS: dict[str, tuple[str, object]] = {
    "num_local_experts": (INT_OR_NULL, 8),
    "num_experts_per_tok": (INT_OR_NULL, 2),
}
_MOE = ConfigClass(
    "GraniteMoeConfig",
    "granitemoe",
    ("GraniteMoeForCausalLM",),
    granite_fields(NUMBER_OR_NULL, **EXPERT_FIELDS),
    (*TRAINING, "output_router_logits", "router_aux_loss_coef"),
    (*DECODER, "head_dim"),
    harmless=MappingProxyType({"mlp_bias": (False,)}),
)
CONFIGS = (
    ConfigClass(
        "GraniteConfig",
        "granite",
        ("GraniteForCausalLM",),
        granite_fields(NUMBER, mlp_bias=(BOOL, False)),
        TRAINING,
        (*DECODER, "head_dim"),
    ),
    _MOE,
    replace(
        _MOE,
        name="GraniteMoeSharedConfig",
        model_type="granitemoeshared",
        architectures=("GraniteMoeSharedForCausalLM",),
        fields=granite_fields(NUMBER_OR_NULL, **EXPERT_FIELDS, shared_intermediate_size=(INT, 0)),
    ),
)


def granite_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp takes its own scale of attention for zero, and for the others one.
    scales = {key: config.number(field) for field, key in _MULTIPLIERS.items()}
    return decoder_keys(config, sizes) | scales


def granite_moe_sizes(config: Config) -> Sizes:
    shared = config.get("shared_intermediate_size", 0)
    width = config.count("shared_intermediate_size") if shared else 0
    return expert_sizes(config, "num_local_experts", "intermediate_size", shared=width)


def granite_moe_keys(config: Config, sizes: Sizes) -> Keys:
    found = granite_keys(config, sizes) | expert_keys(config, sizes)
    if sizes.named["shared"]:
        found["expert_shared_feed_forward_length"] = sizes.named["shared"]
    return found


GRANITE = (
    *NORMS,
    *attention(heads=True, bias=None),
    replace(ATTENTION_OUTPUT_BIAS, flag=ATTENTION_BIAS),
)
GRANITE_PARTS = {
    "block_sparse_moe.input_linear.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "block_sparse_moe.output_linear.weight": ("ffn_down_exps.weight",),
    "block_sparse_moe.router.layer.weight": ("ffn_gate_inp.weight",),
    # transformers' modules have other names than its checkpoints
    "block_sparse_moe.router.weight": ("ffn_gate_inp.weight",),
    "block_sparse_moe.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "block_sparse_moe.experts.down_proj": ("ffn_down_exps.weight",),
    "shared_mlp.input_linear.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "shared_mlp.output_linear.weight": ("ffn_down_shexp.weight",),
}

ROWS = (
    Family(
        "Granite",
        ("GraniteForCausalLM",),
        "granite",
        WHOLE,
        (*GRANITE, *GATED, *GATED_BIASES),
        granite_keys,
        plain_sizes,
        rotary(BY_PAIR),
        SILU,
    ),
    Family(
        "Granite mixture of experts",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        "granitemoe",
        WHOLE,
        (*GRANITE, *EXPERTS, *SHARED),
        granite_moe_keys,
        granite_moe_sizes,
        rotary(BY_PAIR),
        SILU,
        parts=MappingProxyType(GRANITE_PARTS),
    ),
)
