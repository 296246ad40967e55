"""MiniMax M2."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    DECODER,
    INT,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_sizes,
    partial_rotary,
    routed_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import EXPERTS, NORMS, ROUTER_BIAS, WHOLE, attention
from qconvert.architectures.rope import PARTIAL, Rope

CONFIGS = (
    ConfigClass(
        "MiniMaxM2Config",
        "minimax_m2",
        ("MiniMaxM2ForCausalLM",),
        decoder_fields(
            (200_064, 3072, 1536, 62, 48),
            (INT, 8),
            196_608,
            head_dim=(INT, 128),
            num_experts_per_tok=(INT, 8),
            num_local_experts=(INT, 256),
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        (*DECODER, "rotary_dim"),
        MappingProxyType({"num_experts": "num_local_experts"}),
        # What published files have and transformers takes for granted.
        harmless=MappingProxyType(
            {
                "use_qk_norm": (True,),
                "qk_norm_type": ("per_layer",),
                "scoring_func": ("sigmoid",),
                "use_routing_bias": (True,),
                "use_mtp": ANY,
                "num_mtp_modules": ANY,
                "mtp_transformer_layers": ANY,
                "shared_intermediate_size": (0,),
                "attn_type_list": ANY,
            }
        ),
        theta=5_000_000.0,
    ),
)


def minimax_m2_sizes(config: Config) -> Sizes:
    return expert_sizes(config, "num_local_experts", "intermediate_size")


def minimax_m2_keys(config: Config, sizes: Sizes) -> Keys:
    return decoder_keys(config, sizes) | routed_keys(config, sizes, "sigmoid")


def minimax_m2_rope(config: Config, sizes: Sizes) -> Rope:
    # Published files say how many dimensions are rotated, rather than which part of them.
    rotated = config.optional_count("rotary_dim")
    if rotated is not None and not config.given(_PARTIAL):
        part = {_PARTIAL: rotated / sizes.head_dim, "rotary_dim": rotated}
        config = config.replaced(config.fields() | part)
    return partial_rotary(PARTIAL, 1.0)(config, sizes)


_PARTIAL = "partial_rotary_factor"

ROWS = (
    Family(
        "MiniMax M2",
        ("MiniMaxM2ForCausalLM",),
        "minimax-m2",
        WHOLE,
        (
            *NORMS,
            *attention(heads=False, bias=False),
            Slot("attn_q_norm.weight", "query"),
            Slot("attn_k_norm.weight", "key"),
            *EXPERTS,
            ROUTER_BIAS,
        ),
        minimax_m2_keys,
        minimax_m2_sizes,
        minimax_m2_rope,
        SILU,
        own_head=True,
        parts=MappingProxyType(
            {
                # in a checkpoint, and in transformers' modules
                "block_sparse_moe.e_score_correction_bias": (ROUTER_BIAS.name,),
                "mlp.e_score_correction_bias": (ROUTER_BIAS.name,),
            }
        ),
    ),
)
