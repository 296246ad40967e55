"""Seed-OSS."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    GATED,
    POST_ATTENTION_NORM,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN

CONFIGS = (
    ConfigClass(
        "SeedOssConfig",
        "seed_oss",
        ("SeedOssForCausalLM",),
        decoder_fields(
            (155_136, 4096, 27_648, 64, 80),
            (INT_OR_NULL, 8),
            524_288,
            attention_bias=(BOOL, True),
            attention_out_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, 128),
        ),
        (*TRAINING, "residual_dropout", "pretraining_tp"),
        DECODER,
    ),
)


def seed_oss_keys(config: Config, sizes: Sizes) -> Keys:
    for bias in ("attention_out_bias", "mlp_bias"):
        config.require(bias, (False,))
    return decoder_keys(config, sizes)


ROWS = (
    Family(
        "Seed-OSS",
        ("SeedOssForCausalLM",),
        "seed_oss",
        WHOLE,
        (ATTENTION_NORM, POST_ATTENTION_NORM, *attention(heads=False, bias=None), *GATED),
        seed_oss_keys,
        plain_sizes,
        rotary(PLAIN),
        SILU,
    ),
)
