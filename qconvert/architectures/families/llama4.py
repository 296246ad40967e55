"""Llama 4, alone and as the text part of a model of text and images."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    INTS_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    FULL,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_keys,
    expert_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    EXPERT_DOWNS,
    EXPERT_GATES,
    EXPERT_UPS,
    GATED,
    INSIDE,
    NORMS,
    SEEN,
    SHARED,
    TURNED_EXPERTS,
    VISION,
    WHOLE,
    attention,
    limited,
    negated,
)
from qconvert.architectures.rope import BY_PAIR

_ROUTER = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
_TEXT = ConfigClass(
    "Llama4TextConfig",
    "llama4_text",
    ("Llama4ForCausalLM",),
    decoder_fields(
        (202_048, 5120, 8192, 48, 40),
        (INT, 8),
        131_072,
        1e-5,
        head_dim=(INT, 128),
        intermediate_size_mlp=(INT, 16_384),
        num_experts_per_tok=(INT, 1),
        num_local_experts=(INT, 16),
        moe_layers=(INTS_OR_NULL, None),
        interleave_moe_layer_step=(INT, 1),
        use_qk_norm=(BOOL, True),
        no_rope_layers=(INTS_OR_NULL, None),
        no_rope_layer_interval=(INT, 4),
        attention_chunk_size=(INT_OR_NULL, 8192),
        layer_types=(TEXTS_OR_NULL, None),
        attn_temperature_tuning=(BOOL, True),
        floor_scale=(INT, 8192),
        attn_scale=(FLOAT, 0.1),
        attention_bias=(BOOL, False),
    ),
    (*TRAINING, *_ROUTER),
    tuple(n for n in DECODER if n not in ("layer_types", "attention_chunk_size")),
    theta=500_000.0,
)
CONFIGS = (
    _TEXT,
    ConfigClass(
        "Llama4Config",
        "llama4",
        ("Llama4ForConditionalGeneration",),
        MappingProxyType({}),
        (
            *("text_config", "vision_config", "boi_token_index", "eoi_token_index"),
            *("image_token_index", "tie_word_embeddings"),
        ),
        ("per_layer_config",),
        MappingProxyType(
            {
                "image_token_id": "image_token_index",
                "boi_token_id": "boi_token_index",
                "eoi_token_id": "eoi_token_index",
            }
        ),
        inner=("text_config", _TEXT),
    ),
)

_CHUNKED = "chunked_attention"
# llama.cpp has all of these as constants.
_CHUNK, _INTERVAL = 8192, 4
_FAR = {"floor_scale": 8192, "attn_scale": 0.1}
_UNNORMED_EXPERTS = 128  # the number by which it knows the model without norms of queries and keys


def _step(config: Config, blocks: int) -> int:
    """Which so-manieth blocks have experts.

    Raises:
        UnsupportedError: those that the file names are not at even distances.
    """
    named = config.get("moe_layers")
    if named is None:
        return config.count("interleave_moe_layer_step")
    for step in range(1, blocks + 1):
        if sorted(set(named)) == list(range(step - 1, blocks, step)):
            return step
    raise config.unlike("moe_layers", "each so-manieth layer of all")


def _sparse(config: Config, sizes: Sizes, block: int) -> bool:
    return (block + 1) % sizes.named["step"] == 0


def llama4_sizes(config: Config) -> Sizes:
    plain = expert_sizes(
        config, "num_local_experts", "intermediate_size", shared=config.count("intermediate_size")
    )
    more = {
        "inner": config.count("intermediate_size_mlp"),
        "step": _step(config, plain.blocks),
    }
    return replace(plain, named=plain.named | more)


def _require_positions(config: Config, sizes: Sizes) -> None:
    """Hold what depends on positions to llama.cpp's constants, where the context reaches them."""
    if sizes.blocks < _INTERVAL:  # llama.cpp ends its process where no layer sees everything
        raise config.unlike("num_hidden_layers", f"at least {_INTERVAL}")
    rotated = [int(bool((i + 1) % _INTERVAL)) for i in range(sizes.blocks)]
    listed = config.get("no_rope_layers")
    if listed:
        if listed[: sizes.blocks] != rotated:
            raise config.unlike("no_rope_layers", f"0 for each {_INTERVAL}th layer, 1 for others")
    else:
        config.require("no_rope_layer_interval", (_INTERVAL,))
    types = config.get("layer_types")
    if types is not None and (len(types) != sizes.blocks or not set(types) <= {FULL, _CHUNKED}):
        raise config.wrong(
            "layer_types", f"'{FULL}' or '{_CHUNKED}' for each of {sizes.blocks} layers"
        )
    far = sizes.named["context"] >= _CHUNK
    if far and types is not None and [t == _CHUNKED for t in types] != [bool(r) for r in rotated]:
        raise config.unlike("layer_types", f"'{FULL}' for each {_INTERVAL}th layer")
    chunk = config.optional_count("attention_chunk_size")
    if chunk != _CHUNK and (far or (chunk is not None and chunk < sizes.named["context"])):
        raise config.unlike("attention_chunk_size", str(_CHUNK))
    if config.flag("attn_temperature_tuning"):
        for field, usual in _FAR.items():
            config.require(field, (usual,))
    elif far:
        raise config.unlike("attn_temperature_tuning", "true")


def llama4_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    config.require("use_qk_norm", (sizes.named["experts"] != _UNNORMED_EXPERTS,))
    _require_positions(config, sizes)
    return (
        decoder_keys(config, sizes)
        | expert_keys(config, sizes)
        | {
            "expert_feed_forward_length": sizes.named["expert_inner"],
            "interleave_moe_layer_step": sizes.named["step"],
        }
    )


ROWS = (
    Family(
        "Llama 4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        "llama4",
        WHOLE,
        (
            *(*NORMS, *attention(heads=False, bias=False)),
            *limited(GATED, negated(_sparse)),
            *limited((*TURNED_EXPERTS, *SHARED), _sparse),
        ),
        llama4_keys,
        llama4_sizes,
        rotary(BY_PAIR),
        SILU,
        renames=INSIDE,
        dropped=(*VISION, ("vision_model.", SEEN), ("model.vision_model.", SEEN)),
        parts=MappingProxyType(
            {
                "feed_forward.experts.gate_up_proj": (EXPERT_GATES.name, EXPERT_UPS.name),
                "feed_forward.experts.down_proj": (EXPERT_DOWNS.name,),
            }
        ),
    ),
)
