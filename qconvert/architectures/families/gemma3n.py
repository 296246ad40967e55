"""Gemma 3n, alone and as the text part of a model of several kinds of input."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    FLOAT_OR_FLOATS_OR_NULL,
    INT,
    INT_OR_INTS,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.gemma import gemma3_rope
from qconvert.architectures.families.keys import (
    FULL,
    GELU,
    SLIDING,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    layer_types,
    plain_sizes,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    AUDIO,
    GATED,
    INSIDE,
    KEY_NORM,
    NORMS,
    OF_LAYER,
    POST_NORMS,
    QUERY_NORM,
    VISION,
    WHOLE,
    attention,
    limited,
    own_keys,
)
from qconvert.architectures.mapped import Locate, Rows
from qconvert.files.gguf_writer import GgufValue

_fields = dict(
    decoder_fields(
        (262_400, 2048, 16_384, 35, 8),
        (INT, 2),
        32_768,
        tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        head_dim=(INT, 256),
        attention_bias=(BOOL, False),
        sliding_window=(INT, 512),
        layer_types=(TEXTS_OR_NULL, None),
        final_logit_softcapping=(FLOAT, 30.0),
        vocab_size_per_layer_input=(INT, 262_144),
        hidden_size_per_layer_input=(INT, 256),
        altup_active_idx=(INT, 0),
        altup_correct_scale=(BOOL, True),
        altup_num_inputs=(INT, 4),
        num_kv_shared_layers=(INT, 15),
        laurel_rank=(INT, 64),
        activation_sparsity_pattern=(FLOAT_OR_FLOATS_OR_NULL, None),
    )
)
_fields["intermediate_size"] = (INT_OR_INTS, 16_384)
_TEXT = ConfigClass(
    "Gemma3nTextConfig",
    "gemma3n_text",
    ("Gemma3nForCausalLM",),
    _fields,
    (*TRAINING, "altup_coef_clip"),
    ("is_causal", "per_layer_config", "attention_chunk_size", "rope_scaling", "rope_theta",
     "rope_local_base_freq"),
    harmless=MappingProxyType(
        {"hidden_act": ANY, "altup_lr_multiplier": ANY, "query_pre_attn_scalar": ANY}
    ),
    theta=1_000_000.0,
    divides=True,
)  # fmt: skip
CONFIGS = (
    _TEXT,
    ConfigClass(
        "Gemma3nConfig",
        "gemma3n",
        ("Gemma3nForConditionalGeneration",),
        MappingProxyType({}),
        (
            *("text_config", "vision_config", "audio_config", "initializer_range", "use_cache"),
            *("audio_soft_tokens_per_image", "vision_soft_tokens_per_image"),
            *("boi_token_id", "eoi_token_id", "image_token_id"),
            *("boa_token_id", "eoa_token_id", "audio_token_id", "tie_word_embeddings"),
        ),
        ("per_layer_config",),
        inner=("text_config", _TEXT),
    ),
)

# What llama.cpp's code has as constants: no key says otherwise.
_FIXED: dict[str, object] = {
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "laurel_rank": 64,
    "final_logit_softcapping": 30.0,
}
_OWN_KEYS = 20  # layers from here on look at keys and values of the last ones before
_SPARSE, _SPARSITY, _DEVIATIONS = 10, 0.95, 1.6448533535003662


def gemma3n_sizes(config: Config) -> Sizes:
    for field, value in _FIXED.items():
        config.require(field, (value,))
    inner = config.get("intermediate_size")
    if isinstance(inner, list):
        blocks = config.count("num_hidden_layers")
        if len(inner) != blocks or len(set(inner)) != 1:
            raise config.unlike("intermediate_size", f"one number, {blocks} times if at all")
        config = config.replaced(config.fields() | {"intermediate_size": inner[0]})
    plain = plain_sizes(config)
    shared = config.get("num_kv_shared_layers")
    own = min(plain.blocks, _OWN_KEYS)
    if shared != plain.blocks - own:
        raise config.unlike("num_kv_shared_layers", str(plain.blocks - own))
    table = config.count("vocab_size_per_layer_input")
    if table > plain.named["vocabulary"]:
        raise config.unlike("vocab_size_per_layer_input", "at most vocab_size")
    each = config.count("hidden_size_per_layer_input")
    more = {
        "own": own,
        "table": table,
        "each": each,
        "every": each * plain.blocks,
        "rank": config.count("laurel_rank"),
    }
    return replace(plain, named=plain.named | more)


def gemma3n_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    blocks, own = sizes.blocks, sizes.named["own"]
    sliding = layer_types(config, sizes, every_nth_full(sizes, 5))
    if own < blocks and sliding[own - 2 : own] != [True, False]:
        # llama.cpp has layers with windows look at the second but last of the first 20
        raise config.unlike("layer_types", f"'{SLIDING}', then '{FULL}' for layers {own - 2} on")
    if all(sliding):
        raise config.unlike("layer_types", f"'{FULL}' for one layer at least")
    sparse = min(blocks, _SPARSE)
    wanted = [_SPARSITY] * sparse + [0.0] * (blocks - sparse)
    usual = wanted if blocks > _SPARSE else [0.0] * blocks
    if (config.get("activation_sparsity_pattern") or usual) != wanted:
        raise config.unlike(
            "activation_sparsity_pattern", f"{_SPARSITY} for {sparse} layers, then 0.0"
        )
    return (
        decoder_keys(config, sizes)
        | window_keys(config, sliding)
        | {
            "altup.active_idx": 0,
            "altup.num_inputs": config.count("altup_num_inputs"),
            "embedding_length_per_layer_input": sizes.named["each"],
            "attention.shared_kv_layers": blocks - own,
            "activation_sparsity_scale": GgufValue(
                "FLOAT32", [_DEVIATIONS] * sparse + [float("-inf")] * (blocks - sparse)
            ),
        }
    )


def _said(config: Config) -> str | None:
    return (
        "llama.cpp divides by one less in the deviation of activations that are cut off: outputs "
        "differ a little, by less the wider the layer"
    )


def _shared_keys(config: Config, sizes: Sizes, block: int) -> bool:
    """Published checkpoints have keys and values in these blocks too, which nothing reads."""
    return not own_keys(config, sizes, block)


def _table(sizes: Sizes) -> Locate:
    """Rows of a table of fewer tokens: transformers takes the first one for those beyond."""
    rows = sizes.named["table"]

    def locate(wanted: Rows) -> Rows:
        found: Rows = wanted * (wanted < rows)
        return found

    return locate


_QUERY, _KEY, _VALUE, _OUTPUT = attention(heads=False, bias=False)
_KEYS = (_KEY, _VALUE, KEY_NORM)
_BLOCK = (
    *NORMS,
    *POST_NORMS,
    _QUERY,
    *limited(_KEYS, own_keys),
    *limited(tuple(replace(slot, zeros=True) for slot in _KEYS), _shared_keys),
    _OUTPUT,
    QUERY_NORM,
    *GATED,
    *OF_LAYER,
    Slot("altup_correct_coef.weight", "4 4"),
    Slot("altup_correct_scale.weight", "width"),
    Slot("altup_predict_coef.weight", "16 4"),
    Slot("altup_router.weight", "4 width"),
    Slot("altup_router_norm.weight", "width"),
    Slot("laurel_l.weight", "rank width"),
    Slot("laurel_r.weight", "width rank"),
    Slot("laurel_post_norm.weight", "width"),
)
_EVERY = (
    Slot("altup_proj.weight", "3 width width"),
    Slot("altup_unembd_proj.weight", "3 width width"),
    Slot("per_layer_token_embd.weight", "vocabulary every", source="table every", rows=_table),
    Slot("per_layer_model_proj.weight", "every width"),
    Slot("per_layer_proj_norm.weight", "each"),
)
_PARTS: dict[str, tuple[str, ...]] = {
    "altup.correct_output_scale": ("altup_correct_scale.weight",),
    "model.altup_projections.weight": ("altup_proj.weight",),
    "model.altup_unembed_projections.weight": ("altup_unembd_proj.weight",),
}

ROWS = (
    Family(
        "Gemma 3n (text)",
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        "gemma3n",
        (*WHOLE, *_EVERY),
        _BLOCK,
        gemma3n_keys,
        gemma3n_sizes,
        gemma3_rope,
        GELU,
        tied=True,
        renames=INSIDE,
        dropped=(*VISION, *AUDIO),
        parts=MappingProxyType(_PARTS),
        said=_said,
    ),
)
