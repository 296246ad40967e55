"""OLMo 2 and 3."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
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
    filled_sizes,
    layer_types,
    rotary,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import GATED, POST_NORMS, WHOLE, attention
from qconvert.architectures.rope import PLAIN, Rope, read_rope_by_layer


def _fields(**more: tuple[str, object]) -> Fields:
    sizes = (50_304, 4096, 11_008, 32, 32)
    bias = (BOOL, False)
    return decoder_fields(sizes, (INT_OR_NULL, None), 2048, 1e-5, attention_bias=bias) | more


CONFIGS = (
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


# Norms come after a block's halves, and over all heads at once.
_BLOCK = (
    *POST_NORMS,
    *attention(heads=False, bias=False),
    Slot("attn_q_norm.weight", "query"),
    Slot("attn_k_norm.weight", "key"),
    *GATED,
)

ROWS = (
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
)
