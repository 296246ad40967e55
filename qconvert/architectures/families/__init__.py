"""The table of architectures: which tensors a model has, of which shapes, and which keys.

A new architecture of a known kind is one row in the file of its family. Facts are llama.cpp's: a
tensor that its loader does not ask for, or one that it misses, makes it refuse the whole file.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ConfigClass
from qconvert.architectures.families import (
    arcee,
    bamba,
    bert,
    bloom,
    cohere,
    deepseek,
    distilbert,
    dots1,
    ernie,
    eurobert,
    exaone,
    falcon,
    falcon_h1,
    gemma,
    gemma3n,
    gemma4,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    granite_hybrid,
    hunyuan,
    jais,
    jamba,
    lfm,
    llama,
    llama4,
    mamba,
    minimax,
    mistral,
    modern_bert,
    nemotron,
    nemotron_h,
    olmo,
    phi,
    qwen,
    qwen_linear,
    qwen_seeing,
    roberta,
    rotary_bert,
    seed_oss,
    seeing,
    smollm,
    stablelm,
    starcoder,
    t5,
)
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.rope import Rope
from qconvert.errors import UnsupportedError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

_MODULES = (
    llama,
    qwen,
    gemma,
    phi,
    smollm,
    olmo,
    granite,
    granite_hybrid,
    mistral,
    seed_oss,
    exaone,
    cohere,
    hunyuan,
    starcoder,
    stablelm,
    glm,
    gpt2,
    gpt_neox,
    bloom,
    falcon,
    gpt_oss,
    lfm,
    minimax,
    deepseek,
    qwen_linear,
    qwen_seeing,
    gemma3n,
    gemma4,
    mamba,
    jamba,
    bamba,
    falcon_h1,
    nemotron_h,
    llama4,
    arcee,
    nemotron,
    jais,
    ernie,
    dots1,
    bert,
    distilbert,
    roberta,
    modern_bert,
    eurobert,
    rotary_bert,
    t5,
    seeing,
)
FAMILIES: tuple[Family, ...] = tuple(row for module in _MODULES for row in module.ROWS)
CONFIG_CLASSES: tuple[ConfigClass, ...] = tuple(c for m in _MODULES for c in m.CONFIGS)


# What files of models with code of their own call a class that transformers has by now.
_OTHER_TYPES = {"kimi_k2": "deepseek_v3"}


def known_class(fields: Mapping[str, Any]) -> ConfigClass | None:
    """The class of a configuration; None when no row of the tables has it.

    transformers goes by ``model_type``; the class of model that ``architectures`` names must be one
    that we take, unless there is none.
    """
    named = _class_names(fields)
    kind = fields.get("model_type")
    kind = _OTHER_TYPES.get(kind, kind) if isinstance(kind, str) else kind
    of_type = [c for c in CONFIG_CLASSES if c.model_type == kind and _holds(c, fields)]
    ours = (c for c in of_type if any(n in c.architectures for n in named))
    by_type = next(ours, of_type[0] if of_type else None)
    if by_type and by_type.model_type == "mistral" and "layer_types" in fields:
        return None  # transformers takes it for another, 'ministral'
    by_name = next((c for c in CONFIG_CLASSES if any(n in c.architectures for n in named)), None)
    if fields.get("architectures") in (None, []):
        return by_type
    return by_name and (by_name if fields.get("model_type") is None else by_type)


def _holds(known: ConfigClass, fields: Mapping[str, Any]) -> bool:
    """Whether the language model inside is of the class's own, where the file says of which."""
    inside = fields.get(known.inner[0]) if known.inner else None
    named = inside.get("model_type") if isinstance(inside, dict) else None
    return known.inner is None or named in (None, known.inner[1].model_type)


def known_family(fields: Mapping[str, Any]) -> Family | None:
    """The row for a configuration; None when no row has its class."""
    known = known_class(fields)
    found = next((f for f in FAMILIES if known and known.architectures[0] in f.classes), None)
    if known is None or found is None:
        return found
    inside = fields.get(known.inner[0]) if known.inner else fields
    return found.instead(inside if isinstance(inside, dict) else {}) or found


def family_of(fields: Mapping[str, Any], path: Path) -> tuple[Family, ConfigClass]:
    """The row for a configuration, and its class.

    Raises:
        UnsupportedError: no row has its class; the message names those that there are.
    """
    family, known = known_family(fields), known_class(fields)
    if family and known:
        return family, known
    found = ", ".join(_class_names(fields)) or "no architectures"
    if fields.get("model_type") is not None:
        found += f", model_type {reprlib.repr(fields['model_type'])}"
    inside = fields.get("text_config")
    if isinstance(inside, dict) and isinstance(inside.get("model_type"), str):
        found += f" around {reprlib.repr(inside['model_type'])}"
    if "layer_types" in fields:
        found += " with layer_types"
    raise UnsupportedError(
        "architecture has no row in our table for GGUF",
        path=path,
        found=reprlib.repr(found)[1:-1] if len(found) > 120 else found,
        wanted=_near(_class_names(fields)),
        hint="formats/gguf.md has a table of all; --raw writes the tensors under their own names, "
        "for tools other than llama.cpp",
        code="ARCH-UNKNOWN",
    )


def _near(named: list[str]) -> str:
    """The classes whose names are nearest to these, and how many families there are."""
    classes = sorted(name for family in FAMILIES for name in family.classes)
    # names of one kind of model end alike, which makes none near
    alike = {c.replace("ForCausalLM", "").replace("Model", ""): c for c in reversed(classes)}
    first = named[0].replace("ForCausalLM", "").replace("Model", "")[:80] if named else ""
    near = [alike[n] for n in difflib.get_close_matches(first, alike, 3, 0.5)]
    of_all = f"a class of one of {len(FAMILIES)} families"
    return f"{of_all}; near by name: {', '.join(near)}" if near else of_all


def _class_names(fields: Mapping[str, Any]) -> list[str]:
    named = fields.get("architectures")
    return [n for n in named if isinstance(n, str)] if isinstance(named, list) else []


def hyper_parameters(family: Family, config: Config, sizes: Sizes) -> tuple[Keys, Rope]:
    """The keys below the architecture's name, with what rotary positions need.

    Raises:
        FormatError: a field of the configuration is missing or unusable.
        UnsupportedError: a field asks for something llama.cpp does not do for this architecture.
    """
    fields = config.known.fields if config.known else {}
    named = (
        "hidden_activation",
        "mlp_hidden_act",
        "hidden_act",
        "activation_function",
        "activation",
    )
    activation = next((n for n in named if n in fields), None)
    if activation:
        config.require(activation, family.activations)
    if config.stated("per_layer_config") and not family.per_layer:
        raise config.unlike("per_layer_config", "the same for all layers")
    keys = family.keys(config, sizes)
    rope = family.rope(config, sizes) if family.rope else Rope()
    keys |= {f"rope.{key}": value for key, value in rope.keys.items()}
    return {f"{family.arch}.{key}": _typed(value) for key, value in keys.items()}, rope


def _typed(value: MetadataValue) -> MetadataValue:
    """Counts as llama.cpp reads them."""
    return GgufValue("UINT32", value) if type(value) is int else value


__all__ = [
    "CONFIG_CLASSES",
    "FAMILIES",
    "family_of",
    "hyper_parameters",
    "known_class",
    "known_family",
]
