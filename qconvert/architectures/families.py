"""The table of architectures: which tensors a model has, of which shapes, and which keys.

A new architecture of a known kind is one row of `FAMILIES`. Facts are llama.cpp's: a tensor that
its loader does not ask for, or one that it misses, makes it refuse the whole file.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import CONFIG_CLASSES, ConfigClass
from qconvert.architectures.family_keys import (
    GELU,
    MAX_BLOCKS,
    SILU,
    Keys,
    Sizes,
    bert_keys,
    bert_sizes,
    decoder_keys,
    filled_sizes,
    gemma2_keys,
    gemma3_keys,
    gemma3_rope,
    mixtral_keys,
    mixtral_sizes,
    phi3_keys,
    phi3_rope,
    plain_sizes,
    plain_window,
    qwen3_moe_keys,
    qwen3_moe_sizes,
    rotary,
    switched_window,
)
from qconvert.architectures.rope import BY_PAIR, PLAIN, Rope
from qconvert.errors import UnsupportedError
from qconvert.files.gguf_writer import GgufValue, MetadataValue


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that llama.cpp's loader asks for.

    Attributes:
        name: in GGUF; within a block without ``blk.N.``.
        shape: names of `Sizes`, outermost dimension first.
        heads: whether its rows are those of heads with rotated halves, to be interleaved.
        flag: field of the configuration that says whether there is such a tensor; none: always.
    """

    name: str
    shape: str
    heads: bool = False
    flag: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what llama.cpp calls an architecture, and what transformers calls it.

    Attributes:
        name: for people.
        classes: values of config.json's ``architectures``.
        arch: GGUF's ``general.architecture``.
        whole: tensors outside the blocks.
        block: tensors of each block.
        keys: hyper-parameters, below ``<arch>.``; rotary ones come from ``rope``.
        sizes: dimensions.
        rope: rotary positions; None without.
        activations: what ``hidden_act`` or ``hidden_activation`` may be.
        window: the sliding window that the configuration asks for and llama.cpp does not apply.
        norm_offset: whether transformers adds one to the weights of norms; llama.cpp does not.
        tied: what ``tie_word_embeddings`` is where config.json does not say; None: whatever the
            tensors are.
        renames: beginnings of source names, and what stands for them in gguf-py's table.
        dropped: beginnings of source names that llama.cpp has no use for, and why.
    """

    name: str
    classes: tuple[str, ...]
    arch: str
    whole: tuple[Slot, ...]
    block: tuple[Slot, ...]
    keys: Callable[[Config, Sizes], Keys]
    sizes: Callable[[Config], Sizes]
    rope: Callable[[Config, Sizes], Rope] | None
    activations: tuple[str, ...]
    window: Callable[[Config, Sizes], int | None] = lambda config, sizes: None
    norm_offset: bool = False
    tied: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


# --- tensors ---

OUTPUT = "output.weight"
_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("output_norm.weight", "width"),
    Slot(OUTPUT, "vocabulary width"),
)


_ATTENTION_BIAS, _MLP_BIAS = "attention_bias", "mlp_bias"


def _attention(heads: bool, bias: bool | None) -> tuple[Slot, ...]:
    """Query, key, value and output; biases are required, absent or (None) as a field says."""
    q, k, v = (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "key"))
    found = [
        Slot(f"{q[0]}.weight", f"{q[1]} width", heads=heads),
        Slot(f"{k[0]}.weight", f"{k[1]} width", heads=heads),
        Slot(f"{v[0]}.weight", f"{v[1]} width"),
        Slot("attn_output.weight", "width query"),
    ]
    if bias is not False:
        flag = _ATTENTION_BIAS if bias is None else None
        found += [
            Slot(f"{q[0]}.bias", q[1], heads=heads, flag=flag),
            Slot(f"{k[0]}.bias", k[1], heads=heads, flag=flag),
            Slot(f"{v[0]}.bias", v[1], flag=flag),
        ]
    return tuple(found)


_NORMS = (Slot("attn_norm.weight", "width"), Slot("ffn_norm.weight", "width"))
_HEAD_NORMS = (Slot("attn_q_norm.weight", "head"), Slot("attn_k_norm.weight", "head"))
_POST_NORMS = (
    Slot("post_attention_norm.weight", "width"),
    Slot("post_ffw_norm.weight", "width"),
)
_GATED = (
    Slot("ffn_gate.weight", "inner width"),
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_down.weight", "width inner"),
)
_EXPERTS = (
    Slot("ffn_gate_inp.weight", "experts width"),
    Slot("ffn_gate_exps.weight", "experts expert_inner width"),
    Slot("ffn_up_exps.weight", "experts expert_inner width"),
    Slot("ffn_down_exps.weight", "experts width expert_inner"),
)
_LLAMA = (
    *_NORMS,
    *_attention(heads=True, bias=None),
    Slot("attn_output.bias", "width", flag=_ATTENTION_BIAS),
)
_LLAMA_DENSE = (
    *_GATED,
    Slot("ffn_gate.bias", "inner", flag=_MLP_BIAS),
    Slot("ffn_up.bias", "inner", flag=_MLP_BIAS),
    Slot("ffn_down.bias", "width", flag=_MLP_BIAS),
)
_PHI3 = (
    *_NORMS,
    Slot("attn_qkv.weight", "fused width"),
    Slot("attn_output.weight", "width query"),
    Slot("ffn_up.weight", "gate_up width"),
    Slot("ffn_down.weight", "width inner"),
)
_BERT_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("position_embd.weight", "context width"),
    Slot("token_types.weight", "types width"),
    Slot("token_embd_norm.weight", "width"),
    Slot("token_embd_norm.bias", "width"),
)
_BERT = (
    *_attention(heads=False, bias=True),
    Slot("attn_output.bias", "width"),
    Slot("attn_output_norm.weight", "width"),
    Slot("attn_output_norm.bias", "width"),
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_up.bias", "inner"),
    Slot("ffn_down.weight", "width inner"),
    Slot("ffn_down.bias", "width"),
    Slot("layer_output_norm.weight", "width"),
    Slot("layer_output_norm.bias", "width"),
)

# --- rows ---

_UNUSED_HEAD = "is a part that llama.cpp's encoders do not have"
_VISION = "belongs to the vision part, which is a file of its own in llama.cpp"
# A family that transformers stores inside a model of text and images.
_INSIDE = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)

FAMILIES = (
    Family(
        "Llama (also Mistral, SmolLM)",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "llama",
        _WHOLE,
        (*_LLAMA, *_LLAMA_DENSE),
        decoder_keys,
        plain_sizes,
        rotary(BY_PAIR),
        SILU,
        plain_window,
    ),
    Family(
        "Mixtral",
        ("MixtralForCausalLM",),
        "llama",
        _WHOLE,
        (*_LLAMA, *_EXPERTS),
        mixtral_keys,
        mixtral_sizes,
        rotary(BY_PAIR),
        SILU,
        plain_window,
    ),
    Family(
        "Qwen2",
        ("Qwen2ForCausalLM",),
        "qwen2",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=True), *_GATED),
        decoder_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
    ),
    Family(
        "Qwen3",
        ("Qwen3ForCausalLM",),
        "qwen3",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=False), *_HEAD_NORMS, *_GATED),
        decoder_keys,
        plain_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
    ),
    Family(
        "Qwen3 mixture of experts",
        ("Qwen3MoeForCausalLM",),
        "qwen3moe",
        _WHOLE,
        (*_NORMS, *_attention(heads=False, bias=False), *_HEAD_NORMS, *_EXPERTS),
        qwen3_moe_keys,
        qwen3_moe_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
    ),
    Family(
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        "gemma2",
        _WHOLE[:-1],  # its loader has no other output matrix than the token embedding
        (*_NORMS, *_POST_NORMS, *_attention(heads=False, bias=False), *_GATED),
        gemma2_keys,
        plain_sizes,
        rotary(PLAIN),
        GELU,
        norm_offset=True,
        tied=True,
    ),
    Family(
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3",
        _WHOLE,
        (*_NORMS, *_POST_NORMS, *_HEAD_NORMS, *_attention(heads=False, bias=False), *_GATED),
        gemma3_keys,
        plain_sizes,
        gemma3_rope,
        GELU,
        norm_offset=True,
        tied=True,
        renames=_INSIDE,
        dropped=(
            ("vision_tower.", _VISION),
            ("model.vision_tower.", _VISION),
            ("multi_modal_projector.", _VISION),
            ("model.multi_modal_projector.", _VISION),
        ),
    ),
    Family(
        "Phi-3",
        ("Phi3ForCausalLM",),
        "phi3",
        _WHOLE,
        _PHI3,
        phi3_keys,
        filled_sizes,
        phi3_rope,
        SILU,
        plain_window,
    ),
    Family(
        "BERT (encoders such as all-MiniLM)",
        ("BertModel", "BertForMaskedLM"),
        "bert",
        _BERT_WHOLE,
        _BERT,
        bert_keys,
        bert_sizes,
        None,
        GELU,
        renames=(("bert.", ""),),
        dropped=(("pooler.", _UNUSED_HEAD), ("cls.", _UNUSED_HEAD)),
        tied=True,
    ),
)


def known_class(fields: Mapping[str, Any]) -> ConfigClass | None:
    """The class of a configuration; None when no row of the tables has it.

    transformers goes by ``model_type``; the class of model that ``architectures`` names must be one
    that we take, unless there is none.
    """
    by_type = next((c for c in CONFIG_CLASSES if c.model_type == fields.get("model_type")), None)
    if by_type and by_type.model_type == "mistral" and "layer_types" in fields:
        return None  # transformers takes it for another, 'ministral'
    named = _class_names(fields)
    by_name = next((c for c in CONFIG_CLASSES if any(n in c.architectures for n in named)), None)
    if fields.get("architectures") in (None, []):
        return by_type
    return by_name and (by_name if fields.get("model_type") is None else by_type)


def known_family(fields: Mapping[str, Any]) -> Family | None:
    """The row for a configuration; None when no row has its class."""
    known = known_class(fields)
    return next((f for f in FAMILIES if known and known.architectures[0] in f.classes), None)


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
    if "layer_types" in fields:
        found += " with layer_types"
    raise UnsupportedError(
        "architecture has no row in our table for GGUF",
        path=path,
        found=reprlib.repr(found)[1:-1] if len(found) > 120 else found,
        wanted=", ".join(family.name for family in FAMILIES),
        hint="--raw writes the tensors under their own names, for tools other than llama.cpp",
        code="ARCH-UNKNOWN",
    )


def _class_names(fields: Mapping[str, Any]) -> list[str]:
    named = fields.get("architectures")
    return [n for n in named if isinstance(n, str)] if isinstance(named, list) else []


def hyper_parameters(family: Family, config: Config, sizes: Sizes) -> tuple[Keys, Rope]:
    """The keys below the architecture's name, with what rotary positions need.

    Raises:
        FormatError: a field of the configuration is missing or unusable.
        UnsupportedError: a field asks for something llama.cpp does not do for this architecture.
    """
    gemma = config.known and "hidden_activation" in config.known.fields
    config.require("hidden_activation" if gemma else "hidden_act", family.activations)
    if config.stated("per_layer_config"):
        raise config.unlike("per_layer_config", "the same for all layers")
    keys = family.keys(config, sizes)
    rope = family.rope(config, sizes) if family.rope else Rope()
    keys |= {f"rope.{key}": value for key, value in rope.keys.items()}
    return {f"{family.arch}.{key}": _typed(value) for key, value in keys.items()}, rope


def _typed(value: MetadataValue) -> MetadataValue:
    """Counts as llama.cpp reads them."""
    return GgufValue("UINT32", value) if type(value) is int else value


__all__ = [
    "FAMILIES",
    "MAX_BLOCKS",
    "OUTPUT",
    "Family",
    "Sizes",
    "Slot",
    "family_of",
    "hyper_parameters",
    "known_class",
    "known_family",
]
