"""gpt-oss."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    expert_keys,
    expert_sizes,
    layer_types,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    ATTENTION_OUTPUT_BIAS,
    POST_ATTENTION_NORM,
    ROUTER,
    TURNED_DOWNS,
    WHOLE,
    attention,
    turned_half,
)
from qconvert.architectures.mapped import Order, strided
from qconvert.architectures.rope import PLAIN, Rope, read_rope, settled

CONFIGS = (
    ConfigClass(
        "GptOssConfig",
        "gpt_oss",
        ("GptOssForCausalLM",),
        decoder_fields(
            (201_088, 2880, 2880, 36, 64),
            (INT, 8),
            131_072,
            1e-5,
            num_local_experts=(INT, 128),
            head_dim=(INT, 64),
            sliding_window=(INT_OR_NULL, 128),
            num_experts_per_tok=(INT, 4),
            swiglu_alpha=(FLOAT, 1.702),
            swiglu_limit=(FLOAT, 7.0),
            layer_types=(TEXTS_OR_NULL, None),
            attention_bias=(BOOL, True),
        ),
        (*TRAINING, "router_aux_loss_coef", "output_router_logits"),
        DECODER,
        MappingProxyType({"num_experts": "num_local_experts"}),
        # What published files have and nothing reads.
        harmless=MappingProxyType({"experts_per_token": ANY, "initial_context_length": ANY}),
        theta=150_000.0,
    ),
)


def gpt_oss_sizes(config: Config) -> Sizes:
    heads = config.count("num_attention_heads")
    return expert_sizes(config, "num_local_experts", "intermediate_size", heads=heads)


def gpt_oss_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp has these numbers in its source.
    config.require("swiglu_alpha", (1.702,))
    config.require("swiglu_limit", (7.0,))
    config.require("attention_bias", (True,))
    sliding = layer_types(config, sizes, every_nth_full(sizes, 2))
    return (
        decoder_keys(config, sizes)
        | expert_keys(config, sizes)
        | {"expert_feed_forward_length": sizes.named["expert_inner"]}
        | window_keys(config, sliding)
    )


_DEFAULT = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_YARN = replace(PLAIN, rounded=True)


def gpt_oss_rope(config: Config, sizes: Sizes) -> Rope:
    if config.stated("rope_parameters") is None and config.stated("rope_scaling") is None:
        config = config.replaced(config.fields() | {"rope_parameters": dict(_DEFAULT)})
    return read_rope(settled(config, _YARN), sizes.head_dim, _YARN)


# Gates and what they multiply alternate in the columns of one matrix for each expert, which takes
# rows where GGUF has columns.
def _half(slot: str, first: int) -> tuple[Slot, Slot]:
    def biases(sizes: Sizes) -> Order:
        experts, inner = sizes.shape("experts expert_inner")
        return strided((experts, inner), (2 * inner, 2), first)

    source = "experts width gate_up"
    return (
        Slot(
            f"{slot}.weight",
            "experts expert_inner width",
            source=source,
            order=turned_half(first, alternating=True),
            # Turned round, as the codes of MXFP4 lie, they alternate in the rows.
            turned=lambda rows: 2 * rows + first,
        ),
        Slot(f"{slot}.bias", "experts expert_inner", source="experts gate_up", order=biases),
    )


_EXPERTS = (
    ROUTER,
    Slot("ffn_gate_inp.bias", "experts"),
    *_half("ffn_gate_exps", 0),
    *_half("ffn_up_exps", 1),
    replace(TURNED_DOWNS, turned=lambda rows: rows),
    Slot("ffn_down_exps.bias", "experts width"),
)
_HALVES = ("ffn_gate_exps", "ffn_up_exps")
_NAMES = {
    "self_attn.sinks": ("attn_sinks.weight",),
    "mlp.router.weight": ("ffn_gate_inp.weight",),
    "mlp.router.bias": ("ffn_gate_inp.bias",),
    "mlp.experts.gate_up_proj": tuple(f"{half}.weight" for half in _HALVES),
    "mlp.experts.gate_up_proj_bias": tuple(f"{half}.bias" for half in _HALVES),
    "mlp.experts.down_proj": ("ffn_down_exps.weight",),
    "mlp.experts.down_proj_bias": ("ffn_down_exps.bias",),
}

ROWS = (
    Family(
        "gpt-oss",
        ("GptOssForCausalLM",),
        "gpt-oss",
        WHOLE,
        (
            ATTENTION_NORM,
            POST_ATTENTION_NORM,
            *attention(heads=False, bias=True),
            ATTENTION_OUTPUT_BIAS,
            Slot("attn_sinks.weight", "heads"),
            *_EXPERTS,
        ),
        gpt_oss_keys,
        gpt_oss_sizes,
        gpt_oss_rope,
        SILU,
        own_head=True,
        parts=MappingProxyType(_NAMES),
    ),
)
