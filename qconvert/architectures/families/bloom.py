"""Bloom: distances between tokens lower the scores of attention (ALiBi)."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ANY, BOOL, FLOAT, INT, TOKENS, ConfigClass
from qconvert.architectures.families.keys import (
    GELU,
    OLDER_WIDTH,
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    width_field,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    BY_GROUP,
    MEAN_NORMS,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
)

_NAMES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
CONFIGS = (
    ConfigClass(
        "BloomConfig",
        "bloom",
        ("BloomForCausalLM",),
        {
            "vocab_size": (INT, 250_880),
            "hidden_size": (INT, 64),
            "n_layer": (INT, 2),
            "n_head": (INT, 8),
            "layer_norm_epsilon": (FLOAT, 1e-5),
            "apply_residual_connection_post_layernorm": (BOOL, False),
            "pretraining_tp": (INT, 1),
            "slow_but_exact": (BOOL, False),
            "tie_word_embeddings": (BOOL, True),
        },
        ("initializer_range", "use_cache", *TOKENS, "hidden_dropout", "attention_dropout"),
        (
            *("is_causal", "per_layer_config", "attention_chunk_size", "layer_types"),
            *("sliding_window", OLDER_WIDTH, "seq_length"),
        ),
        MappingProxyType(_NAMES),
        harmless=MappingProxyType(
            {
                **dict.fromkeys(("attention_softmax_in_fp32", "bias_dropout_fusion"), ANY),
                **dict.fromkeys(("masked_softmax_fusion", "offset_alibi", "skip_bias_add"), ANY),
                "skip_bias_add_qkv": ANY,
                "n_inner": (None,),
            }
        ),
    ),
)

_TRAINED = 2048  # tokens of a text in training; a model has no limit of them


def bloom_sizes(config: Config) -> Sizes:
    width = width_field(config)
    return plain_sizes(
        config,
        _NAMES | {"hidden_size": width},
        grouped=False,
        inner=4 * config.count(width),
        context=config.count("seq_length", _TRAINED),
    )


def bloom_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("apply_residual_connection_post_layernorm", (False,))
    if config.count("pretraining_tp") > 1:
        # transformers then adds up parts of two matrices, and leaves out their biases
        config.require("slow_but_exact", (False,))
    return decoder_keys(config, sizes, "layer_norm_epsilon", mean=True)


ROWS = (
    Family(
        "Bloom",
        ("BloomForCausalLM",),
        "bloom",
        (
            *(*WHOLE, OUTPUT_BIAS),
            Slot("token_embd_norm.weight", "width"),
            Slot("token_embd_norm.bias", "width"),
        ),
        (*MEAN_NORMS, *BY_GROUP, *PLAIN_INNER),
        bloom_keys,
        bloom_sizes,
        None,
        GELU,
        renames=(("transformer.", ""),),
    ),
)
