"""Arcee: Llama with squares of a ReLU in place of gates."""

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
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import NORMS, UNGATED, WHOLE, attention
from qconvert.architectures.rope import BY_PAIR

CONFIGS = (
    ConfigClass(
        "ArceeConfig",
        "arcee",
        ("ArceeForCausalLM",),
        decoder_fields(
            (32_000, 2560, 18_432, 32, 32),
            (INT_OR_NULL, None),
            4096,
            1e-5,
            activation=("hidden_act", "relu2"),
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
        divides=True,
    ),
)


def arcee_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    config.require("mlp_bias", (False,))
    return decoder_keys(config, sizes)


ROWS = (
    Family(
        "Arcee",
        ("ArceeForCausalLM",),
        "arcee",
        WHOLE,
        (*NORMS, *attention(heads=True, bias=False), *UNGATED),
        arcee_keys,
        plain_sizes,
        rotary(BY_PAIR),
        ("relu2",),
    ),
)
