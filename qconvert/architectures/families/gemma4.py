"""Gemma 4, alone and as the text part of a model of several kinds of input."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT_OR_NULL,
    INT,
    INT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    GELU,
    MAX_EXPERTS,
    MAX_HEAD,
    NO_CAP,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    expert_keys,
    layer_types,
    plain_sizes,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    AUDIO,
    EXPERT_DOWNS,
    GATED,
    INSIDE,
    KEY_NORM,
    NORMS,
    OF_LAYER,
    POST_NORMS,
    QUERY_NORM,
    ROUTER,
    VISION,
    WHOLE,
    attention,
    limited,
    own_keys,
)
from qconvert.architectures.rope import Rope
from qconvert.files.gguf_writer import GgufValue

_fields = dict(
    decoder_fields(
        (262_144, 2304, 9216, 30, 8),
        (INT, 4),
        131_072,
        tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        head_dim=(INT, 256),
        attention_bias=(BOOL, False),
        sliding_window=(INT, 512),
        layer_types=(TEXTS_OR_NULL, None),
        final_logit_softcapping=(FLOAT_OR_NULL, None),
        use_bidirectional_attention=("'all', 'vision', or null", None),
        vocab_size_per_layer_input=(INT, 262_144),
        hidden_size_per_layer_input=(INT, 256),
        attention_k_eq_v=(BOOL, False),
        num_kv_shared_layers=(INT, 0),
        enable_moe_block=(BOOL, False),
        use_double_wide_mlp=(BOOL, False),
        num_experts=(INT_OR_NULL, None),
        top_k_experts=(INT_OR_NULL, None),
        moe_intermediate_size=(INT_OR_NULL, None),
    )
)
_BESIDE = ("is_causal", "per_layer_config", "attention_chunk_size", "rope_scaling")
_TEXT = ConfigClass(
    "Gemma4TextConfig",
    "gemma4_text",
    ("Gemma4ForCausalLM",),
    _fields,
    TRAINING,
    (*_BESIDE, "global_head_dim", "num_global_key_value_heads"),
    harmless=MappingProxyType({"hidden_act": ANY}),
)
CONFIGS = (
    _TEXT,
    ConfigClass(
        "Gemma4Config",
        "gemma4",
        ("Gemma4ForConditionalGeneration",),
        MappingProxyType({}),
        (
            *("text_config", "vision_config", "audio_config", "initializer_range"),
            *("boi_token_id", "eoi_token_id", "image_token_id", "video_token_id"),
            *("boa_token_id", "eoa_token_index", "audio_token_id", "tie_word_embeddings"),
        ),
        ("per_layer_config",),
        inner=("text_config", _TEXT),
    ),
)

_CAP = "final_logit_softcapping"
_GLOBAL = "global_head_dim"
_GLOBAL_DEFAULT = 512


def _sliding(config: Config, sizes: Sizes) -> list[bool]:
    found = layer_types(config, sizes, every_nth_full(sizes, 6))
    return [*found[:-1], False]  # transformers makes the last one full whatever is said


def _overridden(config: Config) -> tuple[int, int | None]:
    """Width of heads, and heads of keys if they are others, in full layers."""
    stated = config.stated(_PER_LAYER)
    if stated is None:
        groups = config.optional_count("num_global_key_value_heads")
        used = config.flag("attention_k_eq_v")
        return config.count(_GLOBAL, _GLOBAL_DEFAULT, MAX_HEAD), groups if used else None
    objects = list(stated.values()) if isinstance(stated, dict) else []
    if not objects or any(o != objects[0] for o in objects) or not isinstance(objects[0], dict):
        raise config.unlike(_PER_LAYER, "one object for every full layer")
    fields = config.inner(objects[0], _PER_LAYER)
    if set(fields.names()) - {"head_dim", "num_key_value_heads"}:
        raise config.unlike(_PER_LAYER, "head_dim and num_key_value_heads")
    return (
        fields.count("head_dim", config.count("head_dim"), MAX_HEAD),
        fields.optional_count("num_key_value_heads"),
    )


_PER_LAYER = "per_layer_config"


def gemma4_sizes(config: Config) -> Sizes:
    sliding_head = config.count("head_dim", most=MAX_HEAD)
    plain = plain_sizes(config)
    blocks, named = plain.blocks, plain.named
    sliding = _sliding(config, plain)
    full_head, full_groups = _overridden(config)
    heads = config.count("num_attention_heads")
    groups = config.count("num_key_value_heads")
    full_groups = full_groups or groups
    if full_head % 2 or heads % full_groups:
        raise config.wrong("num_attention_heads", f"a multiple of {full_groups}, heads even")
    stated = config.stated(_PER_LAYER)
    wanted = {str(i) for i in range(blocks) if not sliding[i]}
    if stated is not None and {str(i) for i in stated} != wanted:
        raise config.unlike(_PER_LAYER, "an object for each full layer, and for no other")
    shared = config.get("num_kv_shared_layers")
    if type(shared) is not int or not 0 <= shared < blocks:
        raise config.wrong("num_kv_shared_layers", f"an integer from 0 to {blocks - 1}")
    own = blocks - shared
    kinds = set(sliding[:own])
    if shared and set(sliding) != kinds:
        raise config.wrong("num_kv_shared_layers", "fewer, for each kind of layer needs one before")
    double = config.flag("use_double_wide_mlp")
    inner = [named["inner"] * (2 if double and i >= own else 1) for i in range(blocks)]
    each = config.get("hidden_size_per_layer_input")
    if type(each) is not int or each < 0:
        raise config.wrong("hidden_size_per_layer_input", "zero or a positive integer")
    if each and config.count("vocab_size_per_layer_input") != named["vocabulary"]:
        raise config.unlike("vocab_size_per_layer_input", "as vocab_size")
    experts = {}
    if config.flag("enable_moe_block"):
        experts = {
            "experts": config.count("num_experts", most=MAX_EXPERTS),
            "expert_inner": config.count("moe_intermediate_size"),
            "gate_up_experts": 2 * config.count("moe_intermediate_size"),
        }
    widths = [sliding_head if s else full_head for s in sliding]
    counts = [groups if s else full_groups for s in sliding]
    return replace(
        plain,
        named=named
        | experts
        | {"own": own, "each": each, "every": each * blocks, "full_head": full_head},
        by_block={
            "head": tuple(widths),
            "query": tuple(heads * w for w in widths),
            "key": tuple(c * w for c, w in zip(counts, widths, strict=True)),
            "groups": tuple(counts),
            "inner": tuple(inner),
        },
    )


def gemma4_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    config.require("use_bidirectional_attention", (None, "vision"))
    sliding = _sliding(config, sizes)
    found = decoder_keys(config, sizes) | window_keys(config, sliding)
    head = config.count("head_dim")
    full = sizes.named["full_head"]
    found |= {
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": head,
        "attention.value_length_swa": head,
        "attention.head_count_kv": GgufValue("UINT32", list(sizes.by_block["groups"])),
        "attention.shared_kv_layers": sizes.blocks - sizes.named["own"],
        "feed_forward_length": GgufValue("UINT32", list(sizes.by_block["inner"])),
        "embedding_length_per_layer_input": sizes.named["each"],
    }
    capped = config.get(_CAP) is not None
    found[_CAP] = config.number(_CAP) if capped else NO_CAP  # llama.cpp takes 30 for an absent one
    if "experts" in sizes.named:
        found |= expert_keys(config, sizes, "top_k_experts")
        found["expert_feed_forward_length"] = sizes.named["expert_inner"]
    return found


_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPES: dict[str, dict[str, object]] = {
    _FULL: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1_000_000.0,
    },
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}


def gemma4_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions: in full layers the last pairs of a head are left as they are.

    llama.cpp rotates all pairs, and divides their frequencies by a factor: 1e30 for those.
    """
    config.require("rope_scaling", (None,))
    outer = config.section("rope_parameters") or config.inner(_ROPES, "rope_parameters")
    full, sliding = outer.section(_FULL), outer.section(_SLIDING)
    if full is None or sliding is None:
        raise outer.wrong(_SLIDING if full else _FULL, "an object")
    full.require("rope_type", ("proportional",))
    sliding.require("rope_type", ("default",))
    sliding.require("partial_rotary_factor", (1.0, None))
    full.require("factor", (1.0, None))
    pairs = sizes.named["full_head"] // 2
    part = full.number("partial_rotary_factor", 1.0)
    if part > 1:
        raise full.wrong("partial_rotary_factor", "at most 1")
    rotated = int(part * pairs)
    factors = np.where(np.arange(pairs) < rotated, 1.0, 1e30).astype(np.float32)
    rope = Rope(
        {
            "dimension_count": sizes.named["full_head"],
            "dimension_count_swa": config.count("head_dim"),
            "freq_base": full.number("rope_theta"),
            "freq_base_swa": sliding.number("rope_theta"),
        },
        {"rope_freqs.weight": factors},
    )
    known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
    for fields in (full, sliding):
        rope.unread += [fields.described(n) for n in fields.names() if n not in known]
    return rope


def _own_values(config: Config, sizes: Sizes, block: int) -> bool:
    shared = config.flag("attention_k_eq_v") and not _sliding(config, sizes)[block]
    return own_keys(config, sizes, block) and not shared


def _each(config: Config, sizes: Sizes, block: int) -> bool:
    return sizes.named["each"] > 0


def _with_experts(config: Config, sizes: Sizes, block: int) -> bool:
    return "experts" in sizes.named


_QUERY, _KEY, _VALUE, _OUTPUT = attention(heads=False, bias=False)
_BLOCK = (
    *NORMS,
    *POST_NORMS,
    _QUERY,
    *limited((_KEY,), own_keys),
    *limited((_VALUE,), _own_values),
    _OUTPUT,
    QUERY_NORM,
    *limited((KEY_NORM,), own_keys),
    *GATED,
    Slot("layer_output_scale.weight", "1"),
    *limited(OF_LAYER, _each),
    *limited(
        (
            ROUTER,
            Slot("ffn_gate_inp.scale", "width"),
            Slot("ffn_gate_up_exps.weight", "experts gate_up_experts width"),
            EXPERT_DOWNS,
            Slot("ffn_down_exps.scale", "experts"),
            Slot("pre_ffw_norm_2.weight", "width"),
            Slot("post_ffw_norm_1.weight", "width"),
            Slot("post_ffw_norm_2.weight", "width"),
        ),
        _with_experts,
    ),
)
_EVERY = (
    Slot("per_layer_token_embd.weight", "vocabulary every", only=_each),
    Slot("per_layer_model_proj.weight", "every width", only=_each),
    Slot("per_layer_proj_norm.weight", "each", only=_each),
)
_PARTS: dict[str, tuple[str, ...]] = {
    "layer_scalar": ("layer_output_scale.weight",),
    "router.proj.weight": ("ffn_gate_inp.weight",),
    "router.scale": ("ffn_gate_inp.scale",),
    "router.per_expert_scale": ("ffn_down_exps.scale",),
    "experts.gate_up_proj": ("ffn_gate_up_exps.weight",),
    "experts.down_proj": ("ffn_down_exps.weight",),
}

ROWS = (
    Family(
        "Gemma 4 (text)",
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
        "gemma4",
        (*WHOLE, *_EVERY),
        _BLOCK,
        gemma4_keys,
        gemma4_sizes,
        gemma4_rope,
        GELU,
        tied=True,
        renames=INSIDE,
        dropped=(*VISION, *AUDIO),
        parts=MappingProxyType(_PARTS),
        per_layer=True,
    ),
)
