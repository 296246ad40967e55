"""StableLM."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    partial_rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_MEAN_NORM,
    GATED,
    INNER_MEAN_NORM,
    OUTPUT_BIAS,
    WHOLE,
    attention,
    limited,
)
from qconvert.architectures.rope import PARTIAL

CONFIGS = (
    ConfigClass(
        "StableLmConfig",
        "stablelm",
        ("StableLmForCausalLM",),
        decoder_fields(
            (50_304, 2560, 6912, 32, 32),
            (INT, 32),
            4096,
            1e-5,
            epsilon="layer_norm_eps",
            use_qkv_bias=(BOOL, False),
            qk_layernorm=(BOOL, False),
            use_parallel_residual=(BOOL, False),
        ),
        (*TRAINING, "hidden_dropout"),
        (*DECODER, "head_dim"),
    ),
)


def stablelm_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("qk_layernorm", (False,))
    return decoder_keys(config, sizes, "layer_norm_eps", mean=True)


def _in_turn(config: Config, sizes: Sizes, block: int) -> bool:
    return not config.flag("use_parallel_residual")


ROWS = (
    Family(
        "StableLM",
        ("StableLmForCausalLM",),
        "stablelm",
        (*WHOLE, OUTPUT_BIAS),
        (
            *ATTENTION_MEAN_NORM,
            *limited(INNER_MEAN_NORM, _in_turn),
            *attention(heads=False, bias=None, flag="use_qkv_bias"),
            *GATED,
        ),
        stablelm_keys,
        filled_sizes,
        partial_rotary(PARTIAL, 0.25),
        SILU,
        own_head=True,
    ),
)
