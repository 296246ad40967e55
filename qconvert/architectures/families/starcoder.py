"""StarCoder 2."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    GELU,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    plain_window,
    rotary,
)
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
        "Starcoder2Config",
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        decoder_fields(
            (49_152, 3072, 12_288, 30, 24),
            (INT, 2),
            4096,
            1e-5,
            tied=True,
            activation=("hidden_act", "gelu_pytorch_tanh"),
            epsilon="norm_epsilon",
            sliding_window=(INT_OR_NULL, None),
            use_bias=(BOOL, True),
        ),
        (*TRAINING, "residual_dropout", "embedding_dropout"),
        (*DECODER, "head_dim"),
    ),
)


def starcoder2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("use_bias", (True,))
    return decoder_keys(config, sizes, "norm_epsilon", mean=True)


ROWS = (
    Family(
        "StarCoder 2",
        ("Starcoder2ForCausalLM",),
        "starcoder2",
        (*WHOLE, OUTPUT_BIAS),
        (
            *MEAN_NORMS,
            *attention(heads=False, bias=True),
            ATTENTION_OUTPUT_BIAS,
            *PLAIN_INNER,
        ),
        starcoder2_keys,
        filled_sizes,
        rotary(PLAIN),
        GELU,
        plain_window,
    ),
)
