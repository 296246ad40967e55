"""Qwen 3 Next and Qwen 3.5: linear attention in most layers, gated attention in the others."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    INT,
    INTS_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    FULL,
    MAX_BLOCKS,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_keys,
    expert_sizes,
    experts_everywhere,
    partial_rotary,
    plain_sizes,
    two_kinds,
)
from qconvert.architectures.families.row import Family, Further, Slot
from qconvert.architectures.families.sections import INTERLEAVED, sectioned
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    EXPERTS,
    GATED,
    HEAD_NORMS,
    INSIDE,
    NEXTN,
    POST_ATTENTION_NORM,
    SHARED,
    SHARED_GATE,
    VISION,
    WHOLE,
    attention,
    limited,
)
from qconvert.architectures.mapped import NEGATED_EXP, Locate, Order, Rows, strided
from qconvert.architectures.rope import PARTIAL, Rope
from qconvert.files.gguf_writer import GgufValue

_LINEAR: dict[str, tuple[str, object]] = {
    "attention_bias": (BOOL, False),
    "head_dim": (INT, 256),
    "linear_conv_kernel_dim": (INT, 4),
    "linear_key_head_dim": (INT, 128),
    "linear_value_head_dim": (INT, 128),
    "linear_num_key_heads": (INT, 16),
    "linear_num_value_heads": (INT, 32),
    "layer_types": (TEXTS_OR_NULL, None),
}
_EXPERT_FIELDS: dict[str, tuple[str, object]] = {
    "moe_intermediate_size": (INT, 512),
    "shared_expert_intermediate_size": (INT, 512),
    "num_experts_per_tok": (INT, 10),
    "num_experts": (INT, 512),
}
_ROUTER = ("output_router_logits", "router_aux_loss_coef")
_BESIDE = (*DECODER, "full_attention_interval")
_DENSE = ConfigClass(
    "Qwen3_5TextConfig",
    "qwen3_5_text",
    ("Qwen3_5ForCausalLM",),
    decoder_fields((248_320, 4096, 12_288, 32, 16), (INT, 4), 32_768) | _LINEAR,
    TRAINING,
    _BESIDE,
    harmless=MappingProxyType(
        {
            "attn_output_gate": (True,),
            "mamba_ssm_dtype": ANY,
            "mlp_only_layers": ([],),
            "mtp_num_hidden_layers": ANY,
            "mtp_use_dedicated_embeddings": ANY,
        }
    ),
)
_fields = dict(decoder_fields((248_320, 2048, 1, 40, 16), (INT, 2), 32_768))
del _fields["intermediate_size"]
_SPARSE = replace(
    _DENSE,
    name="Qwen3_5MoeTextConfig",
    model_type="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    fields=_fields
    | _LINEAR
    | _EXPERT_FIELDS
    | {"num_experts": (INT, 256), "num_experts_per_tok": (INT, 8)},
    unused=(*TRAINING, *_ROUTER),
)


def around(name: str, model_type: str, architecture: str, inner: ConfigClass) -> ConfigClass:
    """Qwen's models of text and images around a language model."""
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return ConfigClass(
        name,
        model_type,
        (architecture,),
        MappingProxyType({}),
        ("text_config", "vision_config", "tie_word_embeddings", *ids),
        ("per_layer_config",),
        inner=("text_config", inner),
    )


CONFIGS = (
    ConfigClass(
        "Qwen3NextConfig",
        "qwen3_next",
        ("Qwen3NextForCausalLM",),
        decoder_fields((151_936, 2048, 5632, 48, 16), (INT, 2), 32_768)
        | _LINEAR
        | _EXPERT_FIELDS
        | {
            "decoder_sparse_step": (INT, 1),
            "norm_topk_prob": (BOOL, True),
            "mlp_only_layers": (INTS_OR_NULL, None),
        },
        (*TRAINING, *_ROUTER),
        _BESIDE,
    ),
    _DENSE,
    _SPARSE,
    around("Qwen3_5Config", "qwen3_5", "Qwen3_5ForConditionalGeneration", _DENSE),
    around("Qwen3_5MoeConfig", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", _SPARSE),
)

LINEAR = "linear_attention"
_LARGEST_EPSILON = 1e-4


def attends(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether a block has attention that is not linear."""
    types = config.get("layer_types")
    if types is None:
        return (block + 1) % _interval(config) == 0
    return bool(types[block] == FULL)


def _interval(config: Config) -> int:
    interval = config.get("full_attention_interval", 4)
    if type(interval) is not int or not 1 <= interval <= MAX_BLOCKS:
        raise config.wrong("full_attention_interval", f"an integer from 1 to {MAX_BLOCKS}")
    return interval


def _recurs(config: Config, sizes: Sizes, block: int) -> bool:
    return not attends(config, sizes, block)


def linear_sizes(config: Config) -> Sizes:
    if config.known and "num_experts" in config.known.fields:
        shared = config.count("shared_expert_intermediate_size")
        plain = expert_sizes(config, "num_experts", "moe_intermediate_size", shared=shared)
    else:
        plain = plain_sizes(config)
    keys, values = (config.count(f"linear_num_{kind}_heads") for kind in ("key", "value"))
    width = config.count("linear_key_head_dim")
    if config.count("linear_value_head_dim") != width:
        raise config.unlike("linear_value_head_dim", "as linear_key_head_dim")
    if values % keys:
        raise config.wrong("linear_num_value_heads", f"a multiple of {keys} heads of keys")
    linear = {
        "gated_query": 2 * plain.named["query"],
        "key_heads": keys,
        "value_heads": values,
        "both_heads": 2 * values,
        "shares": values // keys,
        "state": width,
        "value": values * width,
        "mixed": (2 * keys + values) * width,
        "projected": 2 * (keys + values) * width,
        "kernel": config.count("linear_conv_kernel_dim", most=64),
    }
    return replace(plain, named=plain.named | linear)


def linear_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    two_kinds(config, sizes, LINEAR)
    recurrent = [_recurs(config, sizes, i) for i in range(sizes.blocks)]
    if all(recurrent) or not any(recurrent):  # llama.cpp ends its process
        raise config.unlike("layer_types", f"'{FULL}' for one layer, '{LINEAR}' for another")
    if config.number("rms_norm_eps", zero=True) > _LARGEST_EPSILON:
        # Queries and keys of linear attention have 1e-6 in transformers, and this in llama.cpp.
        raise config.unlike("rms_norm_eps", f"at most {_LARGEST_EPSILON}")
    named = sizes.named
    found = decoder_keys(config, sizes) | {
        "attention.recurrent_layers": GgufValue("BOOL", recurrent + [False] * sizes.further),
        "full_attention_interval": 4 if config.given("layer_types") else _interval(config),
        "ssm.conv_kernel": named["kernel"],
        "ssm.state_size": named["state"],
        "ssm.group_count": named["key_heads"],
        "ssm.time_step_rank": named["value_heads"],
        "ssm.inner_size": named["value"],
    }
    if "experts" in named:
        experts_everywhere(config, sizes)
        config.require("norm_topk_prob", (True, None))
        found |= expert_keys(config, sizes) | {
            "expert_feed_forward_length": named["expert_inner"],
            "expert_shared_feed_forward_length": named["shared"],
        }
    return found


_MROPE = replace(PARTIAL, whole=0.25, beside=INTERLEAVED)
sectioned_rope = sectioned(_MROPE, (11, 11, 10), interleaved=True)


def next_rope(config: Config, sizes: Sizes) -> Rope:
    return partial_rotary(PARTIAL, 0.25)(config, sizes)


# --- orders ---


def _tiled(sizes: Sizes, width: int, first: int = 0) -> Locate:
    """Rows of value heads, after the first so many rows.

    A checkpoint has those that share a head of keys together, llama.cpp the first of each, then the
    second of each, and so on.
    """
    heads, shares = sizes.named["key_heads"], sizes.named["shares"]

    def locate(rows: Rows) -> Rows:
        share, rest = np.divmod(rows - first, heads * width)
        head, row = np.divmod(rest, width)
        return np.where(rows < first, rows, first + (head * shares + share) * width + row)

    return locate


def _mixed(sizes: Sizes) -> Locate:
    """Queries and keys, then values."""
    return _tiled(sizes, sizes.named["state"], 2 * sizes.named["key_heads"] * sizes.named["state"])


def _values(sizes: Sizes) -> Locate:
    return _tiled(sizes, sizes.named["state"])


def _heads(sizes: Sizes) -> Locate:
    return _tiled(sizes, 1)


def _columns(sizes: Sizes) -> Order:
    """Columns of value heads."""
    width, heads, shares, state = sizes.shape("width key_heads shares state")
    strides = (sizes.named["value"], state, shares * state, 1)
    return strided((width, shares, heads, state), strides)


def _projected(sizes: Sizes) -> Locate:
    """Queries, keys and values out of rows that have them, and gates, for each head of keys."""
    heads, shares, state = sizes.shape("key_heads shares state")
    each = 2 * (1 + shares) * state

    def locate(rows: Rows) -> Rows:
        part = np.minimum(rows // (heads * state), 2)  # queries, keys, values
        width = np.where(part == 2, shares * state, state)
        head, row = np.divmod(rows - part * heads * state, width)
        found: Rows = head * each + part * state + row
        return found

    return locate


def _gates(sizes: Sizes) -> Locate:
    shares, state = sizes.shape("shares state")

    def locate(rows: Rows) -> Rows:
        head, row = np.divmod(rows, shares * state)
        return head * 2 * (1 + shares) * state + (2 + shares) * state + row

    return locate


_ATTENTION = (
    replace(attention(heads=False, bias=False)[0], shape="gated_query width"),
    *attention(heads=False, bias=False)[1:],
    *HEAD_NORMS,
)
_A = Slot("ssm_a", "value_heads", change=NEGATED_EXP)
_DT = Slot("ssm_dt.bias", "value_heads")
_CONVOLUTION = Slot("ssm_conv1d.weight", "mixed kernel", source="mixed 1 kernel")
_STATE_NORM = Slot("ssm_norm.weight", "state", plain=True)
_OUT = Slot("ssm_out.weight", "width value")
_NEXT = limited(
    (
        Slot("attn_qkv.weight", "mixed width", source="projected width", rows=_projected),
        Slot("attn_gate.weight", "value width", source="projected width", rows=_gates),
        Slot("ssm_ba.weight", "both_heads width"),
        *(_A, _DT, _CONVOLUTION, _STATE_NORM, _OUT),
    ),
    _recurs,
)
_TILED = limited(
    (
        Slot("attn_qkv.weight", "mixed width", rows=_mixed),
        Slot("attn_gate.weight", "value width", rows=_values),
        Slot("ssm_alpha.weight", "value_heads width", rows=_heads),
        Slot("ssm_beta.weight", "value_heads width", rows=_heads),
        replace(_A, rows=_heads),
        replace(_DT, rows=_heads),
        replace(_CONVOLUTION, rows=_mixed),
        _STATE_NORM,
        replace(_OUT, order=_columns),
    ),
    _recurs,
)
_COMMON = (ATTENTION_NORM, POST_ATTENTION_NORM, *limited(_ATTENTION, attends))
_SHARING = (*EXPERTS, *SHARED, SHARED_GATE)
_PARTS: dict[str, tuple[str, ...]] = {
    "post_attention_layernorm.weight": (POST_ATTENTION_NORM.name,),
    "linear_attn.in_proj_qkv.weight": ("attn_qkv.weight",),
    "linear_attn.in_proj_z.weight": ("attn_gate.weight",),
    "linear_attn.in_proj_a.weight": ("ssm_alpha.weight",),
    "linear_attn.in_proj_b.weight": ("ssm_beta.weight",),
    "linear_attn.in_proj_qkvz.weight": ("attn_qkv.weight", "attn_gate.weight"),
    "linear_attn.in_proj_ba.weight": ("ssm_ba.weight",),
    "linear_attn.A_log": ("ssm_a",),
    "linear_attn.dt_bias": ("ssm_dt.bias",),
    "linear_attn.conv1d.weight": ("ssm_conv1d.weight",),
    "linear_attn.norm.weight": ("ssm_norm.weight",),
    "linear_attn.out_proj.weight": ("ssm_out.weight",),
}
_RENAMES = (("model.mtp.", "mtp."),)


def _further(*network: Slot) -> Further:
    """A layer of attention that is not linear."""
    return Further(
        (ATTENTION_NORM, POST_ATTENTION_NORM, *_ATTENTION, *network, *NEXTN),
        (
            ("mtp.layers.0.", "model.layers.{}."),
            ("mtp.fc.", "model.layers.{}.eh_proj."),
            ("mtp.pre_fc_norm_embedding.", "model.layers.{}.enorm."),
            ("mtp.pre_fc_norm_hidden.", "model.layers.{}.hnorm."),
            ("mtp.norm.", "model.layers.{}.shared_head.norm."),
            ("mtp.embed_tokens.", "model.layers.{}.embed_tokens."),
        ),
    )


ROWS = (
    Family(
        "Qwen3 Next",
        ("Qwen3NextForCausalLM",),
        "qwen3next",
        WHOLE,
        (*_COMMON, *_NEXT, *_SHARING),
        linear_keys,
        linear_sizes,
        next_rope,
        SILU,
        norm_offset=True,
        renames=_RENAMES,
        parts=MappingProxyType(_PARTS),
        further=_further(*_SHARING),
    ),
    Family(
        "Qwen 3.5",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        "qwen35",
        WHOLE,
        (*_COMMON, *_TILED, *GATED),
        linear_keys,
        linear_sizes,
        sectioned_rope,
        SILU,
        norm_offset=True,
        renames=(*INSIDE, *_RENAMES),
        dropped=VISION,
        parts=MappingProxyType(_PARTS),
        further=_further(*GATED),
    ),
    Family(
        "Qwen 3.5 mixture of experts",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        "qwen35moe",
        WHOLE,
        (*_COMMON, *_TILED, *_SHARING),
        linear_keys,
        linear_sizes,
        sectioned_rope,
        SILU,
        norm_offset=True,
        renames=(*INSIDE, *_RENAMES),
        dropped=VISION,
        parts=MappingProxyType(_PARTS),
        further=_further(*_SHARING),
    ),
)
