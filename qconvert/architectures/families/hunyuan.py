"""Hunyuan, dense and with experts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import MOST, Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    INT_OR_INTS,
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
    expert_keys,
    expert_sizes,
    plain_sizes,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    EXPERTS,
    GATED,
    HEAD_NORMS,
    NORMS,
    SHARED,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN, Rope, read_rope, settled

CONFIGS = (
    ConfigClass(
        "HunYuanDenseV1Config",
        "hunyuan_v1_dense",
        ("HunYuanDenseV1ForCausalLM",),
        decoder_fields(
            (290_943, 4096, 11_008, 32, 32),
            (INT_OR_NULL, None),
            2048,
            1e-5,
            attention_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        (*TRAINING, "pretraining_tp", "eod_token_id"),
        DECODER,
    ),
    ConfigClass(
        "HunYuanMoEV1Config",
        "hunyuan_v1_moe",
        ("HunYuanMoEV1ForCausalLM",),
        decoder_fields(
            (290_943, 4096, 11_008, 32, 32),
            (INT_OR_NULL, None),
            2048,
            1e-5,
            attention_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
            num_experts=(INT, 1),
            moe_topk=(INT_OR_INTS, 1),
        ),
        (*TRAINING, "pretraining_tp", "eod_token_id", "sep_token_id", "output_router_logits"),
        DECODER,
        MappingProxyType({"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"}),
    ),
)


def hunyuan_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("attention_bias", (False,))
    return decoder_keys(config, sizes)


_DYNAMIC = "dynamic"
_ROPE = replace(PLAIN, kinds=(*PLAIN.kinds, _DYNAMIC))
_LEAST_HEAD = 4  # the exponent is divided by the width less two


def hunyuan_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions, of which these models call 'dynamic' what is another base, once for all."""
    found, width = settled(config, _ROPE), sizes.head_dim
    if found.kind != _DYNAMIC:
        return read_rope(found, width, _ROPE)
    alpha = found.optional("alpha")
    found.fields.number("factor")  # which transformers wants, and does not read
    if alpha is None or width < _LEAST_HEAD:
        raise found.fields.unlike("rope_type", f"one of {', '.join(PLAIN.kinds)}, or an 'alpha'")
    base = found.theta * min(alpha, MOST) ** (width / (width - 2))
    if base > MOST:
        raise found.fields.wrong("alpha", f"a base of at most {MOST:g}")
    return Rope({"dimension_count": width, "freq_base": base}, unread=found.unread())


def hunyuan_moe_sizes(config: Config) -> Sizes:
    shared = config.count("intermediate_size")
    return expert_sizes(config, "num_experts", "intermediate_size", shared=shared)


def hunyuan_moe_keys(config: Config, sizes: Sizes) -> Keys:
    used = config.get("moe_topk")
    each = used if isinstance(used, list) else [used]
    if len(set(each)) != 1 or (isinstance(used, list) and len(used) < sizes.blocks):
        raise config.unlike("moe_topk", "one number for all layers")
    field = config.replaced(config.fields() | {"moe_topk": each[0]})
    return (
        hunyuan_keys(config, sizes)
        | expert_keys(field, sizes, "moe_topk")
        | {
            "expert_feed_forward_length": sizes.named["expert_inner"],
            "expert_shared_feed_forward_length": sizes.named["shared"],
        }
    )


_NORM_PARTS = {
    "self_attn.query_layernorm.weight": ("attn_q_norm.weight",),
    "self_attn.key_layernorm.weight": ("attn_k_norm.weight",),
}


ROWS = (
    Family(
        "Hunyuan (dense)",
        ("HunYuanDenseV1ForCausalLM",),
        "hunyuan-dense",
        WHOLE,
        (*NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *GATED),
        hunyuan_keys,
        plain_sizes,
        hunyuan_rope,
        SILU,
        parts=MappingProxyType(_NORM_PARTS),
    ),
    Family(
        "Hunyuan mixture of experts",
        ("HunYuanMoEV1ForCausalLM",),
        "hunyuan-moe",
        WHOLE,
        (*NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *EXPERTS, *SHARED),
        hunyuan_moe_keys,
        hunyuan_moe_sizes,
        hunyuan_rope,
        SILU,
        parts=MappingProxyType(_NORM_PARTS),
    ),
)
