"""Configurations of models whose code came with them, in the form of the class that transformers
has for them by now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CHAT = "internvl_chat"
# Fields of the whole model that mean something here, and what transformers calls them.
_WHOLE = {
    "downsample_ratio": "downsample_ratio",
    "select_layer": "vision_feature_layer",
    "ps_version": "ps_version",
    "min_dynamic_patch": "min_dynamic_patch",
    "max_dynamic_patch": "max_dynamic_patch",
    "torch_dtype": "torch_dtype",
    "quantization_config": "quantization_config",
}
_TOWER = {"qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm"}
# Of the tower's code: how it is trained and run.
_UNUSED = (
    "drop_path_rate", "dropout", "initializer_factor", "use_flash_attn", "auto_map",
    "architectures",
)  # fmt: skip


def in_todays_form(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of config.json; of InternVL's first form (``InternVLChatModel``) in the words of
    transformers' InternVL. Objects that are none are left as they are, for others to refuse.
    """
    text, tower = fields.get("llm_config"), fields.get("vision_config")
    if fields.get("model_type") != _CHAT or not isinstance(text, dict):
        return fields
    found = {new: fields[old] for old, new in _WHOLE.items() if old in fields}
    text = {n: v for n, v in text.items() if n not in ("architectures", "auto_map")}
    tied = text.get("tie_word_embeddings", fields.get("tie_word_embeddings"))
    return found | {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": _tower(tower) if isinstance(tower, dict) else tower,
        **({} if tied is None else {"tie_word_embeddings": tied}),
    }


def _tower(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {_TOWER.get(n, n): v for n, v in fields.items() if n not in _UNUSED}
    return found | {"model_type": "internvl_vision"}
