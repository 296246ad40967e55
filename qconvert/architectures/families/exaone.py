"""EXAONE 4."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    DECODER,
    INT,
    INT_OR_NULL,
    INT_OR_TEXT_OR_NULL,
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
from qconvert.architectures.families.slots import GATED, HEAD_NORMS, POST_NORMS, WHOLE, attention
from qconvert.architectures.rope import BY_PAIR

CONFIGS = (
    ConfigClass(
        "Exaone4Config",
        "exaone4",
        ("Exaone4ForCausalLM",),
        decoder_fields(
            (102_400, 4096, 16_384, 32, 32),
            (INT, 32),
            2048,
            1e-5,
            sliding_window=(INT_OR_NULL, 4096),
            sliding_window_pattern=(INT_OR_TEXT_OR_NULL, 4),
            layer_types=(TEXTS_OR_NULL, None),
        ),
        TRAINING,
        (*DECODER, "head_dim"),
    ),
)

_WINDOWED = 64  # blocks of the one model in which llama.cpp has windows


def exaone4_keys(config: Config, sizes: Sizes) -> Keys:
    found = decoder_keys(config, sizes)
    windowed = sizes.blocks == _WINDOWED
    if config.optional_count("sliding_window") is None:
        if windowed:
            raise config.unlike("sliding_window", f"a number, in a model of {_WINDOWED} layers")
        if config.get("layer_types") is None or any(layer_types(config, sizes, [])):
            raise config.unlike("layer_types", "'full_attention', without a window")
        return found
    if not windowed:
        raise config.unlike("sliding_window", f"null, in a model of other than {_WINDOWED} layers")
    return found | window_keys(config, layer_types(config, sizes, _pattern(config, sizes)))


def _pattern(config: Config, sizes: Sizes) -> list[bool]:
    nth = config.get("sliding_window_pattern")
    if type(nth) is not int or not 0 < nth <= MAX_BLOCKS:
        raise config.wrong("sliding_window_pattern", f"an integer from 1 to {MAX_BLOCKS}")
    return every_nth_full(sizes, nth)


ROWS = (
    Family(
        "EXAONE 4",
        ("Exaone4ForCausalLM",),
        "exaone4",
        WHOLE,
        (*POST_NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *GATED),
        exaone4_keys,
        filled_sizes,
        rotary(BY_PAIR),
        SILU,
    ),
)
