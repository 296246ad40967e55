"""dots.llm1."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.glm import glm4_moe_keys, glm4_moe_sizes
from qconvert.architectures.families.keys import FULL, SILU, Keys, Sizes, layer_types, rotary
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    HEAD_NORMS,
    LEADING_DENSE,
    NORMS,
    ROUTER_BIAS_PART,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN

CONFIGS = (
    ConfigClass(
        "Dots1Config",
        "dots1",
        ("Dots1ForCausalLM",),
        decoder_fields(
            (152_064, 4608, 10_944, 62, 32),
            (INT_OR_NULL, 32),
            2048,
            attention_bias=(BOOL, False),
            moe_intermediate_size=(INT, 1408),
            num_experts_per_tok=(INT_OR_NULL, None),
            n_shared_experts=(INT_OR_NULL, None),
            n_routed_experts=(INT_OR_NULL, None),
            routed_scaling_factor=(FLOAT, 1.0),
            n_group=(INT_OR_NULL, 1),
            topk_group=(INT_OR_NULL, 1),
            first_k_dense_replace=(INT_OR_NULL, 0),
            norm_topk_prob=(BOOL_OR_NULL, False),
            sliding_window=(INT_OR_NULL, 4096),
            max_window_layers=(INT_OR_NULL, 62),
            layer_types=(TEXTS_OR_NULL, None),
        ),
        (*TRAINING, "output_router_logits"),
        (*(n for n in DECODER if n not in ("sliding_window", "layer_types")), "head_dim"),
        MappingProxyType({"num_local_experts": "n_routed_experts"}),
    ),
)


def dots1_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    if sizes.named["key"] != sizes.named["query"]:
        raise config.unlike("num_key_value_heads", "as num_attention_heads")
    windowed = config.optional_count("sliding_window") is not None
    first = config.get("max_window_layers")
    if config.get("layer_types") is None and windowed and (first is None or first < sizes.blocks):
        raise config.unlike("max_window_layers", f"at least {sizes.blocks}, the number of layers")
    if any(layer_types(config, sizes, [])):
        raise config.unlike("layer_types", f"'{FULL}' for all layers")
    return glm4_moe_keys(config, sizes)


ROWS = (
    Family(
        "dots.llm1",
        ("Dots1ForCausalLM",),
        "dots1",
        WHOLE,
        (*NORMS, *attention(heads=False, bias=False), *HEAD_NORMS, *LEADING_DENSE),
        dots1_keys,
        glm4_moe_sizes,
        rotary(PLAIN),
        SILU,
        parts=MappingProxyType(ROUTER_BIAS_PART),
        own_head=True,
    ),
)
