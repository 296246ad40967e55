"""Configurations of models whose code came with them, in the form of the class that transformers
has for them by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CHAT = "internvl_chat"
# What the classes that came with the models have where a file does not say (InternVLChatConfig and
# InternVisionConfig); transformers' own have other values. A saved file leaves out what is equal.
_WHOLE: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "select_layer": -1,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "qkv_bias": False,
    "qk_normalization": True,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
}
_RENAMED = {
    "select_layer": "vision_feature_layer",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
# Of how the tower is trained and run.
_UNUSED = (
    "drop_path_rate", "dropout", "initializer_factor", "use_flash_attn", "auto_map",
    "architectures",
)  # fmt: skip
# Of the whole model: what has another name here, and values that ask for what is done anyway.
_ELSEWHERE = ("llm_config", "auto_map", "template", "tie_word_embeddings")
_ASKS_NOTHING: dict[str, Any] = {
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "pad2square": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}


def in_todays_form(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json; of InternVL's first form (``InternVLChatModel``) in the words of
    transformers' InternVL. Objects that are none are left as they are, for others to refuse.
    """
    text, tower = fields.get("llm_config"), fields.get("vision_config")
    if fields.get("model_type") != _CHAT or not isinstance(text, dict):
        return fields
    text = {n: v for n, v in text.items() if n not in ("architectures", "auto_map")}
    tied = text.get("tie_word_embeddings", fields.get("tie_word_embeddings"))
    tower = _tower(tower) if isinstance(tower, dict) else tower
    return _whole(fields, text, tower) | {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": tower,
        **({} if tied is None else {"tie_word_embeddings": tied}),
    }


def _whole(fields: Mapping[str, Any], text: Mapping[str, Any], tower: Any) -> dict[str, Any]:
    """Fields of the whole model; those that ask for something else stay, for others to say so."""
    nothing = _ASKS_NOTHING | {"hidden_size": text.get("hidden_size")}
    if isinstance(tower, dict):
        nothing["force_image_size"] = tower["image_size"]
    return _named(
        _WHOLE
        | {
            n: v
            for n, v in fields.items()
            if n not in _ELSEWHERE and not (n in nothing and v == nothing[n])
        }
    )


def _tower(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = _named(_TOWER | {n: v for n, v in fields.items() if n not in _UNUSED})
    return found | {"model_type": "internvl_vision"}


def _named(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {_RENAMED.get(n, n): v for n, v in fields.items()}
