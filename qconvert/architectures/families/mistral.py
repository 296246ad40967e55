"""Ministral 3, alone and as the text part of Mistral 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    DECODER,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    plain_window,
    rotary,
)
from qconvert.architectures.families.llama import MISTRAL
from qconvert.architectures.families.mistral4 import LATENT, MISTRAL4
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import GATED, INSIDE, NORMS, VISION, WHOLE, attention
from qconvert.architectures.rope import BY_PAIR, Rope, read_rope, settled

_SCALE = "llama_4_scaling_beta"
_ORIGINAL = "original_max_position_embeddings"
_ROPE = replace(BY_PAIR, beside=(_SCALE, _ORIGINAL, "max_position_embeddings"))

_TEXT = ConfigClass(
    "Ministral3Config",
    "ministral3",
    ("Ministral3ForCausalLM",),
    decoder_fields(
        (131_072, 4096, 14_336, 34, 32),
        (INT, 8),
        262_144,
        1e-5,
        head_dim=(INT, 128),
        sliding_window=(INT_OR_NULL, None),
    ),
    TRAINING,
    DECODER,
)
_WRAPPED = ConfigClass(
    "Mistral3Config",
    "mistral3",
    ("Mistral3ForConditionalGeneration",),
    MappingProxyType({}),
    (
        *("text_config", "vision_config", "image_token_index", "projector_hidden_act"),
        *("vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size"),
        "tie_word_embeddings",
    ),
    ("per_layer_config",),
    MappingProxyType({"image_token_id": "image_token_index"}),
    inner=("text_config", _TEXT),
)
_AROUND_MISTRAL4 = replace(_WRAPPED, inner=("text_config", MISTRAL4))
# Mistral Small 3.1 and 3.2: the model of text and images around the older one.
_AROUND_MISTRAL = replace(_WRAPPED, inner=("text_config", MISTRAL))
CONFIGS = (_TEXT, _WRAPPED, _AROUND_MISTRAL, _AROUND_MISTRAL4)


def ministral3_keys(config: Config, sizes: Sizes) -> Keys:
    # Queries far from the beginning grow: by this times the logarithm of how many of the original
    # contexts lie before them.
    rotary = settled(config, _ROPE)
    return decoder_keys(config, sizes) | {
        "attention.temperature_scale": rotary.fields.number(_SCALE),
        "rope.scaling.original_context_length": rotary.fields.count(_ORIGINAL),
    }


def ministral3_rope(config: Config, sizes: Sizes) -> Rope:
    return read_rope(settled(config, _ROPE), sizes.head_dim, _ROPE)


def _instead(fields: Mapping[str, Any]) -> Family | None:
    return {MISTRAL.model_type: _SMALL, MISTRAL4.model_type: LATENT}.get(
        str(fields.get("model_type"))
    )


_MINISTRAL = Family(
    "Ministral 3 (also Mistral 3)",
    ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    "mistral3",
    WHOLE,
    (*NORMS, *attention(heads=True, bias=False), *GATED),
    ministral3_keys,
    plain_sizes,
    ministral3_rope,
    SILU,
    plain_window,
    renames=INSIDE,
    dropped=VISION,
    instead=_instead,
)
_SMALL = replace(_MINISTRAL, name="Mistral Small 3", keys=decoder_keys, rope=rotary(BY_PAIR))

ROWS = (_MINISTRAL,)
