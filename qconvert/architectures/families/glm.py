"""GLM 4 in its two forms, GLM 4.5 with experts, and Solar Open, which is like it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    MAX_EXPERTS,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    group_keys,
    leading_blocks,
    partial_rotary,
    plain_sizes,
    rotary,
    routed_keys,
)
from qconvert.architectures.families.row import Family, Further, Slot
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    HEAD_NORMS,
    LEADING_DENSE,
    NEXTN,
    NORMS,
    POST_ATTENTION_NORM,
    POST_NORMS,
    ROUTER_BIAS_PART,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PARTIAL, PLAIN

_GLM4 = ConfigClass(
    "Glm4Config",
    "glm4",
    ("Glm4ForCausalLM",),
    decoder_fields(
        (151_552, 4096, 13_696, 40, 32),
        (INT, 2),
        131_072,
        1.5625e-07,
        head_dim=(INT, 128),
        attention_bias=(BOOL, True),
    ),
    TRAINING,
    DECODER,
)
_EXPERT_FIELDS: dict[str, Any] = {  # of both classes with experts
    "num_experts_per_tok": (INT, 8),
    "n_shared_experts": (INT, 1),
    "n_routed_experts": (INT, 128),
    "routed_scaling_factor": (FLOAT, 1.0),
    "n_group": (INT, 1),
    "topk_group": (INT, 1),
    "norm_topk_prob": (BOOL, True),
}
_SOLAR = decoder_fields(
    (196_608, 4096, 0, 48, 64),
    (INT, 8),
    131_072,
    1e-5,
    attention_bias=(BOOL, False),
    moe_intermediate_size=(INT, 1280),
    **_EXPERT_FIELDS,
    head_dim=(INT, 128),
)
CONFIGS = (
    replace(
        _GLM4,
        name="GlmConfig",
        model_type="glm",
        architectures=("GlmForCausalLM",),
        fields={
            **_GLM4.fields,
            "num_key_value_heads": (INT_OR_NULL, 2),
            "head_dim": (INT_OR_NULL, 128),
        },
    ),
    _GLM4,
    ConfigClass(
        "SolarOpenConfig",
        "solar_open",
        ("SolarOpenForCausalLM",),
        {n: f for n, f in _SOLAR.items() if n != "intermediate_size"},
        (*TRAINING, "output_router_logits"),
        DECODER,
        MappingProxyType({"num_local_experts": "n_routed_experts"}),
        harmless=MappingProxyType(
            {
                "first_k_dense_replace": (0,),
                "intermediate_size": ANY,
                "use_qk_norm": (False,),
            }
        ),
        theta=1_000_000.0,
    ),
    ConfigClass(
        "Glm4MoeConfig",
        "glm4_moe",
        ("Glm4MoeForCausalLM",),
        decoder_fields(
            (151_552, 4096, 10_944, 46, 96),
            (INT, 8),
            131_072,
            1e-5,
            attention_bias=(BOOL, False),
            moe_intermediate_size=(INT, 1408),
            first_k_dense_replace=(INT, 1),
            **_EXPERT_FIELDS,
            use_qk_norm=(BOOL, False),
        ),
        (*TRAINING, "output_router_logits", "num_mtp_layers"),
        (*DECODER, "head_dim"),
        MappingProxyType(
            {
                "num_local_experts": "n_routed_experts",
                "num_nextn_predict_layers": "num_mtp_layers",
            }
        ),
    ),
)

_HALF = partial_rotary(PARTIAL, 0.5)


def glm_sizes(config: Config) -> Sizes:
    if config.get("head_dim") is None:  # transformers does not fill it in
        raise config.wrong("head_dim", "an integer")
    return filled_sizes(config)


def glm4_moe_sizes(config: Config) -> Sizes:
    return _mixed_sizes(config, leading_blocks(config, config.count("num_hidden_layers")))


def solar_open_sizes(config: Config) -> Sizes:
    return _mixed_sizes(config, 0)


def _mixed_sizes(config: Config, dense: int) -> Sizes:
    inner = config.count("moe_intermediate_size")
    return plain_sizes(
        config,
        experts=config.count("n_routed_experts", most=MAX_EXPERTS),
        expert_inner=inner,
        shared=config.count("n_shared_experts") * inner,
        dense=dense,
    )


def glm4_moe_keys(config: Config, sizes: Sizes) -> Keys:
    norm = config.flag("norm_topk_prob")
    scale = config.number("routed_scaling_factor")
    return (
        decoder_keys(config, sizes)
        | routed_keys(config, sizes, "sigmoid", scale=scale, norm=norm)
        | group_keys(config, sizes)
        | {
            "expert_shared_count": config.count("n_shared_experts"),
            "leading_dense_block_count": sizes.named["dense"],
        }
    )


_SPARSE = (
    ATTENTION_NORM,
    POST_ATTENTION_NORM,
    *attention(heads=False, bias=None),
    *(replace(norm, flag="use_qk_norm") for norm in HEAD_NORMS),
    *LEADING_DENSE,
)

_FUSED = (
    *attention(heads=False, bias=None),
    Slot("ffn_up.weight", "gate_up width"),
    Slot("ffn_down.weight", "width inner"),
)
_DENSE = Family(
    "GLM 4",
    ("Glm4ForCausalLM",),
    "glm4",
    WHOLE,
    (*NORMS, *POST_NORMS, *_FUSED),
    decoder_keys,
    plain_sizes,
    _HALF,
    SILU,
)
_MIXTURE = Family(
    "GLM 4.5 mixture of experts",
    ("Glm4MoeForCausalLM",),
    "glm4moe",
    WHOLE,
    _SPARSE,
    glm4_moe_keys,
    glm4_moe_sizes,
    _HALF,
    SILU,
    parts=MappingProxyType(ROUTER_BIAS_PART),
    further=Further((*_SPARSE, *NEXTN)),
)

ROWS = (
    replace(
        _DENSE,
        name="GLM 4 (first form)",
        classes=("GlmForCausalLM",),
        arch="chatglm",
        block=(*NORMS, *_FUSED),
        sizes=glm_sizes,
    ),
    _DENSE,
    _MIXTURE,
    replace(
        _MIXTURE,
        name="Solar Open",
        classes=("SolarOpenForCausalLM",),
        sizes=solar_open_sizes,
        rope=rotary(PLAIN),
        further=None,
    ),
)
