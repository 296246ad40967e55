"""GPT-NeoX and Pythia: queries, keys and values of a head together, a part of each head rotated."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    GELU,
    Keys,
    Sizes,
    decoder_keys,
    partial_rotary,
    plain_sizes,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    BY_GROUP,
    MEAN_NORMS,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
)
from qconvert.architectures.rope import PARTIAL, Rope

_FIELDS = decoder_fields(
    (50_432, 6144, 24_576, 44, 64),
    ("", None),
    2048,
    1e-5,
    activation=("hidden_act", "gelu"),
    epsilon="layer_norm_eps",
    use_parallel_residual=(BOOL, True),
    attention_bias=(BOOL, True),
)
CONFIGS = (
    ConfigClass(
        "GPTNeoXConfig",
        "gpt_neox",
        ("GPTNeoXForCausalLM",),
        {n: f for n, f in _FIELDS.items() if n != "num_key_value_heads"},
        (*TRAINING, "hidden_dropout", "classifier_dropout", "is_decoder"),
        (
            *("rope_scaling", "original_max_position_embeddings", "rotary_pct", "rotary_emb_base"),
            *("is_causal", "per_layer_config", "sliding_window", "layer_types"),
            "attention_chunk_size",
        ),
        divides=True,
    ),
)

_PART = 0.25  # of a head that is rotated


def neox_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions: beside the object of all classes there are older names of this one."""
    names = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")
    fields = {n: config.stated(n) for n in names if config.given(n)}
    fields |= {
        "max_position_embeddings": sizes.named["context"],
        "rope_theta": config.number("rotary_emb_base", 10_000.0),
        "partial_rotary_factor": config.get("rotary_pct", _PART),
    }
    return partial_rotary(PARTIAL, _PART)(Config(fields, config.path), sizes)


def neox_sizes(config: Config) -> Sizes:
    return plain_sizes(config, grouped=False)


def neox_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (True,))
    return decoder_keys(config, sizes, "layer_norm_eps", mean=True) | {
        "use_parallel_residual": config.flag("use_parallel_residual")
    }


ROWS = (
    Family(
        "GPT-NeoX, Pythia",
        ("GPTNeoXForCausalLM",),
        "gptneox",
        (*WHOLE, OUTPUT_BIAS),
        (*MEAN_NORMS, *BY_GROUP, *PLAIN_INNER),
        neox_keys,
        neox_sizes,
        neox_rope,
        GELU,
        buffers=(".attention.bias", ".attention.masked_bias"),
        own_head=True,
    ),
)
