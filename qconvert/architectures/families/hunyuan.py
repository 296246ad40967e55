"""Hunyuan, dense."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import SILU, Keys, Sizes, decoder_keys, plain_sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import GATED, HEAD_NORMS, NORMS, WHOLE, attention
from qconvert.architectures.rope import PLAIN, Rope, read_rope, settled

CONFIGS = (
    ConfigClass(
        "HunYuanDenseV1Config",
        "hunyuan_v1_dense",
        ("HunYuanDenseV1ForCausalLM",),
        decoder_fields(
            (290_943, 4096, 11_008, 32, 32),
            (INT_OR_NULL, None),
            2048,
            1e-5,
            attention_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        (*TRAINING, "pretraining_tp", "eod_token_id"),
        DECODER,
    ),
)


def hunyuan_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    return decoder_keys(config, sizes)


def hunyuan_rope(config: Config, sizes: Sizes) -> Rope:
    return read_rope(settled(config, PLAIN), sizes.head_dim, PLAIN)


ROWS = (
    Family(
        "Hunyuan (dense)",
        ("HunYuanDenseV1ForCausalLM",),
        "hunyuan-dense",
        WHOLE,
        (*NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *GATED),
        hunyuan_keys,
        plain_sizes,
        hunyuan_rope,
        SILU,
        parts=MappingProxyType(
            {
                "self_attn.query_layernorm.weight": ("attn_q_norm.weight",),
                "self_attn.key_layernorm.weight": ("attn_k_norm.weight",),
            }
        ),
    ),
)
