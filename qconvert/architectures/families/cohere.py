"""Cohere: Command-R, and Command-R 7B with its windows."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT,
    FLOAT_OR_NULL,
    INT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    MAX_BLOCKS,
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
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    GATED,
    WITHOUT_OUTPUT,
    attention,
)
from qconvert.architectures.rope import PLAIN

_SIZES = ((256_000, 8192, 22_528, 40, 64), (INT_OR_NULL, None), 8192, 1e-5)
CONFIGS = (
    ConfigClass(
        "CohereConfig",
        "cohere",
        ("CohereForCausalLM",),
        {
            **decoder_fields(
                *_SIZES,
                tied=True,
                epsilon="layer_norm_eps",
                logit_scale=(FLOAT_OR_NULL, 0.0625),
                attention_bias=(BOOL, False),
                use_qk_norm=(BOOL_OR_NULL, False),
            ),
            "layer_norm_eps": (FLOAT_OR_NULL, 1e-5),
        },
        TRAINING,
        (*DECODER, "head_dim"),
        theta=500_000.0,
    ),
    ConfigClass(
        "Cohere2Config",
        "cohere2",
        ("Cohere2ForCausalLM",),
        decoder_fields(
            *_SIZES,
            tied=True,
            epsilon="layer_norm_eps",
            logit_scale=(FLOAT, 0.0625),
            attention_bias=(BOOL, False),
            sliding_window=(INT_OR_NULL, 4096),
            layer_types=(TEXTS_OR_NULL, None),
        ),
        TRAINING,
        (*DECODER, "sliding_window_pattern"),
    ),
)


def _keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    scale = {"logit_scale": config.number("logit_scale")}
    return decoder_keys(config, sizes, "layer_norm_eps", mean=True) | scale


def cohere_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp has norms of heads in models of 64 layers and more.
    config.require("use_qk_norm", (False, None))
    if sizes.blocks >= _NORMED:
        raise config.unlike("num_hidden_layers", f"less than {_NORMED}, without norms of heads")
    return _keys(config, sizes)


def cohere2_keys(config: Config, sizes: Sizes) -> Keys:
    pattern = config.get("sliding_window_pattern", 4)
    if type(pattern) is not int or not 0 < pattern <= MAX_BLOCKS:
        raise config.wrong("sliding_window_pattern", f"an integer from 1 to {MAX_BLOCKS}")
    sliding = layer_types(config, sizes, every_nth_full(sizes, pattern))
    return _keys(config, sizes) | window_keys(config, sliding)


_NORMED = 64
# One norm for attention and the inner layer, which are added up.
_BLOCK = (ATTENTION_NORM, *attention(heads=False, bias=False), *GATED)

ROWS = (
    Family(
        "Command-R (Cohere)",
        ("CohereForCausalLM",),
        "command-r",
        WITHOUT_OUTPUT,
        _BLOCK,
        cohere_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        tied=True,
    ),
    Family(
        "Cohere 2",
        ("Cohere2ForCausalLM",),
        "cohere2",
        WITHOUT_OUTPUT,
        _BLOCK,
        cohere2_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        tied=True,
    ),
)
