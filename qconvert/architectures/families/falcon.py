"""Falcon 7B, 11B, 40B and 180B: queries that share keys lie together with them, attention and the
inner layer are added up.
"""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT_OR_NULL,
    INT,
    INT_OR_NULL,
    OBJECT_OR_NULL,
    TEXT_OR_NULL,
    TRAINING,
    ConfigClass,
)
from qconvert.architectures.families.keys import (
    GELU,
    OLDER_WIDTH,
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    rotary,
    width_field,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    ATTENTION_MEAN_NORM,
    BY_GROUP,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
    limited,
)
from qconvert.architectures.rope import PLAIN

_GROUPED, _NORMS = "new_decoder_architecture", "num_ln_in_parallel_attn"
CONFIGS = (
    ConfigClass(
        "FalconConfig",
        "falcon",
        ("FalconForCausalLM",),
        {
            "vocab_size": (INT, 65_024),
            "hidden_size": (INT, 4544),
            "num_hidden_layers": (INT, 32),
            "num_attention_heads": (INT, 71),
            _NORMS: (INT_OR_NULL, None),
            "layer_norm_epsilon": (FLOAT_OR_NULL, 1e-5),
            "num_kv_heads": (INT_OR_NULL, None),
            "alibi": (BOOL_OR_NULL, False),
            _GROUPED: (BOOL_OR_NULL, False),
            "multi_query": (BOOL_OR_NULL, True),
            "parallel_attn": (BOOL_OR_NULL, True),
            "bias": (BOOL_OR_NULL, False),
            "max_position_embeddings": (INT, 2048),
            "rope_parameters": (OBJECT_OR_NULL, None),
            "ffn_hidden_size": (INT_OR_NULL, None),
            "activation": (TEXT_OR_NULL, "gelu"),
            "tie_word_embeddings": (BOOL, True),
        },
        (*TRAINING, "hidden_dropout"),
        (*DECODER, OLDER_WIDTH),
        harmless=MappingProxyType(
            {"apply_residual_connection_post_layernorm": ANY, "ff_factor": ANY}
        ),
    ),
)


def falcon_sizes(config: Config) -> Sizes:
    width, grouped = width_field(config), config.flag(_GROUPED)
    several = grouped or not config.flag("multi_query")
    return plain_sizes(
        config,
        {"hidden_size": width},
        groups=config.optional_count("num_kv_heads") if several else 1,
        inner=config.optional_count("ffn_hidden_size") or 4 * config.count(width),
    )


def _of_attention(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether attention has a norm of its own."""
    return config.flag(_GROUPED) and config.get(_NORMS) in (None, 2)


def falcon_keys(config: Config, sizes: Sizes) -> Keys:
    for name, wanted in (("alibi", False), ("bias", False), ("parallel_attn", True)):
        if config.flag(name) != wanted:
            raise config.unlike(name, str(wanted).lower())
    config.require(_NORMS, (None, 1, 2) if config.flag(_GROUPED) else (None, 1))
    return decoder_keys(config, sizes, "layer_norm_epsilon", mean=True)


_NORM2 = (Slot("attn_norm_2.weight", "width"), Slot("attn_norm_2.bias", "width"))


def _matrices(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    return tuple(slot for slot in slots if slot.name.endswith(".weight"))


ROWS = (
    Family(
        "Falcon",
        ("FalconForCausalLM",),
        "falcon",
        (*WHOLE, OUTPUT_BIAS),
        (
            *ATTENTION_MEAN_NORM,
            *limited(_NORM2, _of_attention),
            *_matrices((*BY_GROUP, *PLAIN_INNER)),
        ),
        falcon_keys,
        falcon_sizes,
        rotary(PLAIN),
        GELU,
    ),
)
