"""Jais 2: norms that take the mean away, and squares of a ReLU."""

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
from qconvert.architectures.families.keys import Keys, Sizes, decoder_keys, plain_sizes, rotary
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_OUTPUT_BIAS,
    MEAN_NORMS,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN

CONFIGS = (
    ConfigClass(
        "Jais2Config",
        "jais2",
        ("Jais2ForCausalLM",),
        decoder_fields(
            (150_272, 3328, 26_624, 32, 26),
            (INT_OR_NULL, None),
            8192,
            1e-5,
            activation=("hidden_act", "relu2"),
            epsilon="layer_norm_eps",
            attention_bias=(BOOL, True),
            mlp_bias=(BOOL, True),
            head_dim=(INT_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
        divides=True,
    ),
)


def jais2_keys(config: Config, sizes: Sizes) -> Keys:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (True,))
    return decoder_keys(config, sizes, "layer_norm_eps", mean=True)


ROWS = (
    Family(
        "Jais 2",
        ("Jais2ForCausalLM",),
        "jais2",
        (*WHOLE, OUTPUT_BIAS),
        (*MEAN_NORMS, *attention(heads=False, bias=True), ATTENTION_OUTPUT_BIAS, *PLAIN_INNER),
        jais2_keys,
        plain_sizes,
        rotary(PLAIN),
        ("relu2",),
    ),
)
