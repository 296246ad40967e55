"""Language models of other families inside models that see: LLaVA, Pixtral, Idefics 3, SmolVLM and
InternVL. What sees is written by ``--mmproj``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config_classes import ANY, ConfigClass
from qconvert.architectures.families import llama, qwen
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import INSIDE, VISION, seen

_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = "llama", "mistral", "qwen2", "qwen3"
_INNER = {c.model_type: c for c in reversed((*llama.CONFIGS, *qwen.CONFIGS))}


def _around(
    name: str,
    model_type: str,
    kind: str,
    inner: tuple[str, ...],
    unused: tuple[str, ...],
    aliases: Mapping[str, str] = MappingProxyType({}),
    harmless: tuple[str, ...] = (),
) -> tuple[ConfigClass, ...]:
    """Classes of a model around each of several language models; the first is its default."""
    return tuple(
        ConfigClass(
            name,
            model_type,
            (kind,),
            MappingProxyType({}),
            ("text_config", "vision_config", "tie_word_embeddings", *unused),
            ("per_layer_config",),
            aliases,
            harmless=MappingProxyType(dict.fromkeys(harmless, ANY)),
            inner=("text_config", _INNER[inside]),
        )
        for inside in inner
    )


_LLAVA = (
    "image_token_index", "image_seq_length", "projector_hidden_act", "vision_feature_layer",
    "vision_feature_select_strategy", "multimodal_projector_bias",
)  # fmt: skip
_INDEX = MappingProxyType({"image_token_id": "image_token_index"})
_IDEFICS = ("use_cache", "image_token_id", "scale_factor")
_INTERNVL = (
    "image_token_id", "image_seq_length", "downsample_ratio", "projector_hidden_act",
    "vision_feature_layer", "vision_feature_select_strategy",
)  # fmt: skip
_INSIDE_LLAVA = (_LLAMA, _MISTRAL, _QWEN2)

CONFIGS = (
    *_around(
        "LlavaConfig", "llava", "LlavaForConditionalGeneration", _INSIDE_LLAVA, _LLAVA, _INDEX
    ),
    *_around(
        "LlavaNextConfig", "llava_next", "LlavaNextForConditionalGeneration", _INSIDE_LLAVA,
        (*_LLAVA, "image_grid_pinpoints"), _INDEX,
    ),
    *_around(
        "Idefics3Config", "idefics3", "Idefics3ForConditionalGeneration", (_LLAMA,), _IDEFICS
    ),
    *_around("SmolVLMConfig", "smolvlm", "SmolVLMForConditionalGeneration", (_LLAMA,), _IDEFICS),
    *_around(
        "InternVLConfig", "internvl", "InternVLForConditionalGeneration", (_QWEN2, _QWEN3, _LLAMA),
        _INTERNVL, harmless=("ps_version", "min_dynamic_patch", "max_dynamic_patch"),
    ),
)  # fmt: skip

_BASES = {
    _LLAMA: next(r for r in llama.ROWS if "LlamaForCausalLM" in r.classes),
    _QWEN2: next(r for r in qwen.ROWS if "Qwen2ForCausalLM" in r.classes),
    _QWEN3: next(r for r in qwen.ROWS if "Qwen3ForCausalLM" in r.classes),
}


def _row(base: str, name: str, classes: tuple[str, ...]) -> Family:
    """A row of another family under the names that it has inside."""
    return replace(
        _BASES[base],
        name=name,
        classes=classes,
        renames=(*INSIDE, ("model.text_model.", "model.")),
        dropped=(
            *VISION,
            *seen("vision_model", "connector", "mlp1"),
            *seen("image_newline", end=""),
        ),
        scores=False,
    )


def _instead(
    name: str, classes: tuple[str, ...], *bases: str
) -> Callable[[Mapping[str, Any]], Family | None]:
    """Rows for language models other than the usual one."""
    rows = {base: _row(base, name, classes) for base in bases}
    return lambda fields: rows.get(str(fields.get("model_type")))


_LLAVAS = (
    "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration",
)  # fmt: skip
_NAME = "LLaVA, Pixtral, Idefics 3, SmolVLM (text)"
_INTERN, _INTERNS = "InternVL (text)", ("InternVLForConditionalGeneration",)

ROWS = (
    replace(_row(_LLAMA, _NAME, _LLAVAS), instead=_instead(_NAME, _LLAVAS, _QWEN2)),
    replace(_row(_QWEN2, _INTERN, _INTERNS), instead=_instead(_INTERN, _INTERNS, _QWEN3, _LLAMA)),
)
