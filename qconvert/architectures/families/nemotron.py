"""Nemotron and Minitron: norms that take the mean away, and squares of a ReLU."""

from __future__ import annotations

from dataclasses import replace

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
    filled_sizes,
    partial_rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_BIAS,
    ATTENTION_OUTPUT_BIAS,
    MEAN_NORMS,
    OUTPUT_BIAS,
    UNGATED,
    UNGATED_BIASES,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PARTIAL

CONFIGS = (
    ConfigClass(
        "NemotronConfig",
        "nemotron",
        ("NemotronForCausalLM",),
        decoder_fields(
            (256_000, 6144, 24_576, 32, 48),
            (INT_OR_NULL, None),
            4096,
            1e-5,
            activation=("hidden_act", "relu2"),
            epsilon="norm_eps",
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
    ),
)


def nemotron_keys(config: Config, sizes: Sizes) -> Keys:
    return decoder_keys(config, sizes, "norm_eps", mean=True)


ROWS = (
    Family(
        "Nemotron",
        ("NemotronForCausalLM",),
        "nemotron",
        (*WHOLE, OUTPUT_BIAS),
        (
            *MEAN_NORMS,
            *attention(heads=False, bias=None),
            replace(ATTENTION_OUTPUT_BIAS, flag=ATTENTION_BIAS),
            *UNGATED,
            *UNGATED_BIASES,
        ),
        nemotron_keys,
        filled_sizes,
        partial_rotary(PARTIAL, 0.5),
        ("relu2",),
        norm_offset=True,
        own_head=True,
    ),
)
