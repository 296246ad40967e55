"""OLMo 1, 2 and 3, and OLMoE."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    FLOAT_OR_NULL,
    INT,
    INT_OR_NULL,
    TEXTS_OR_NULL,
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
    every_nth_full,
    expert_keys,
    expert_sizes,
    filled_sizes,
    layer_types,
    rotary,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    EMBEDDING,
    EXPERTS,
    GATED,
    NORMS,
    OUTPUT_MATRIX,
    POST_NORMS,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN, Rope, read_rope_by_layer


def _fields(**more: tuple[str, object]) -> Fields:
    sizes = (50_304, 4096, 11_008, 32, 32)
    bias = (BOOL, False)
    return decoder_fields(sizes, (INT_OR_NULL, None), 2048, 1e-5, attention_bias=bias) | more


CONFIGS = (
    ConfigClass(
        "OlmoConfig",
        "olmo",
        ("OlmoForCausalLM",),
        {
            **{n: f for n, f in _fields().items() if n != "rms_norm_eps"},
            "clip_qkv": (FLOAT_OR_NULL, None),
        },
        TRAINING,
        (*DECODER, "head_dim"),
    ),
    ConfigClass(
        "Olmo2Config",
        "olmo2",
        ("Olmo2ForCausalLM",),
        _fields(),
        TRAINING,
        (*DECODER, "head_dim"),
    ),
    ConfigClass(
        "Olmo3Config",
        "olmo3",
        ("Olmo3ForCausalLM",),
        _fields(sliding_window=(INT_OR_NULL, 4096), layer_types=(TEXTS_OR_NULL, None)),
        TRAINING,
        (*DECODER, "head_dim"),
        theta=500_000.0,
    ),
    ConfigClass(
        "OlmoeConfig",
        "olmoe",
        ("OlmoeForCausalLM",),
        decoder_fields(
            (50_304, 2048, 2048, 16, 16),
            (INT_OR_NULL, None),
            4096,
            1e-5,
            attention_bias=(BOOL, False),
            clip_qkv=(FLOAT_OR_NULL, None),
            num_experts_per_tok=(INT, 8),
            num_experts=(INT, 64),
            norm_topk_prob=(BOOL, False),
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef"),
        (*DECODER, "head_dim"),
        MappingProxyType({"num_local_experts": "num_experts"}),
    ),
)


def olmo2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    return decoder_keys(config, sizes)


def olmo3_keys(config: Config, sizes: Sizes) -> Keys:
    sliding = layer_types(config, sizes, every_nth_full(sizes, 4))
    windows = window_keys(config, sliding) if any(sliding) else {}
    return olmo2_keys(config, sizes) | windows


def olmo3_rope(config: Config, sizes: Sizes) -> Rope:
    rope = read_rope_by_layer(config, sizes.head_dim, PLAIN, local=None)
    if rope.keys.pop("freq_base_swa") != rope.keys["freq_base"]:
        # llama.cpp has one base for all layers here.
        raise config.unlike("rope_theta", "one for all layers, as in 'rope_parameters'")
    return rope


def olmoe_sizes(config: Config) -> Sizes:
    filled_sizes(config)
    sizes = expert_sizes(config, "num_experts", "intermediate_size")
    if sizes.named["key"] != sizes.named["width"]:  # llama.cpp norms keys by the whole width
        raise config.unlike("num_key_value_heads", "as num_attention_heads")
    return sizes


def olmoe_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("clip_qkv", (None,))
    config.require("norm_topk_prob", (False,))
    return olmo2_keys(config, sizes) | expert_keys(config, sizes)


# Norms come after a block's halves, and over all heads at once.
_ATTENTION = (
    *attention(heads=False, bias=False),
    Slot("attn_q_norm.weight", "query"),
    Slot("attn_k_norm.weight", "key"),
)
_BLOCK = (*POST_NORMS, *_ATTENTION, *GATED)

_EPSILON = 1e-5  # transformers' class has it, and no field


def olmo_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    found = decoder_keys(config, sizes, _EPSILON, mean=True)
    if config.get("clip_qkv") is not None:
        found["attention.clamp_kqv"] = config.number("clip_qkv")
    return found


ROWS = (
    Family(
        "OLMo",
        ("OlmoForCausalLM",),
        "olmo",
        (EMBEDDING, OUTPUT_MATRIX),  # its norms have no weights
        (*attention(heads=True, bias=False), *GATED),
        olmo_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
    ),
    Family(
        "OLMo 2",
        ("Olmo2ForCausalLM",),
        "olmo2",
        WHOLE,
        _BLOCK,
        olmo2_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        own_head=True,
    ),
    Family(
        "OLMo 3",
        ("Olmo3ForCausalLM",),
        "olmo2",
        WHOLE,
        _BLOCK,
        olmo3_keys,
        filled_sizes,
        olmo3_rope,
        SILU,
        own_head=True,
    ),
    Family(
        "OLMoE",
        ("OlmoeForCausalLM",),
        "olmoe",
        WHOLE,
        (*NORMS, *_ATTENTION, *EXPERTS),
        olmoe_keys,
        olmoe_sizes,
        rotary(PLAIN),
        SILU,
        own_head=True,
    ),
)
