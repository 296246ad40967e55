"""ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL_OR_NULL,
    DECODER,
    FLOAT_OR_NULL,
    INT,
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
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    FURTHER,
    GATED,
    LEADING_DENSE,
    NORMS,
    ROUTER_BIAS,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import PLAIN

_UNUSED = tuple(n for n in TRAINING if n != "attention_dropout")
CONFIGS = (
    ConfigClass(
        "Ernie4_5Config",
        "ernie4_5",
        ("Ernie4_5ForCausalLM",),
        decoder_fields(
            (103_424, 1024, 3072, 18, 16),
            (INT_OR_NULL, 2),
            131_072,
            1e-5,
            tied=True,
            use_bias=(BOOL_OR_NULL, False),
            head_dim=(INT_OR_NULL, 128),
        ),
        _UNUSED,
        DECODER,
        theta=500_000.0,
    ),
    ConfigClass(
        "Ernie4_5_MoeConfig",
        "ernie4_5_moe",
        ("Ernie4_5_MoeForCausalLM",),
        decoder_fields(
            (103_424, 2560, 12_288, 28, 20),
            (INT_OR_NULL, 4),
            131_072,
            1e-5,
            tied=True,
            use_bias=(BOOL_OR_NULL, False),
            moe_intermediate_size=(INT, 1536),
            moe_k=(INT_OR_NULL, 6),
            moe_num_experts=(INT_OR_NULL, 64),
            moe_num_shared_experts=(INT_OR_NULL, 2),
            moe_layer_start_index=(INT_OR_NULL, 1),
            moe_layer_end_index=(INT_OR_NULL, -1),
            moe_layer_interval=(INT_OR_NULL, 1),
            moe_norm_min=(FLOAT_OR_NULL, 1e-12),
        ),
        (*_UNUSED, "output_router_logits", "router_aux_loss_coef"),
        (*DECODER, "head_dim"),
        MappingProxyType({"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}),
        theta=500_000.0,
    ),
)


def ernie_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("use_bias", (False, None))
    return decoder_keys(config, sizes)


_LEAST_SUM = 6e-5  # of weights of experts: llama.cpp divides by no less


def ernie_moe_sizes(config: Config) -> Sizes:
    inner, shared = config.count("moe_intermediate_size"), config.get("moe_num_shared_experts")
    plain = expert_sizes(
        config, "moe_num_experts", "moe_intermediate_size",
        shared=inner * config.count("moe_num_shared_experts") if shared else 0,
    )  # fmt: skip
    dense = config.get("moe_layer_start_index")
    if dense is None or not 0 <= dense < plain.blocks:
        raise config.wrong("moe_layer_start_index", f"an integer from 0 to {plain.blocks - 1}")
    return replace(plain, named=plain.named | {"dense": dense})


def ernie_moe_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("moe_layer_interval", (1,))
    config.require("moe_layer_end_index", (-1, sizes.blocks - 1))
    if config.number("moe_norm_min", zero=True) > _LEAST_SUM:
        raise config.unlike("moe_norm_min", f"at most {_LEAST_SUM}")
    found = (
        ernie_keys(config, sizes)
        | expert_keys(config, sizes, "moe_k")
        | {
            "expert_feed_forward_length": sizes.named["expert_inner"],
            "interleave_moe_layer_step": 1,
            "leading_dense_block_count": sizes.named["dense"],
        }
    )
    if sizes.named["shared"]:
        found["expert_shared_feed_forward_length"] = sizes.named["shared"]
    return found


_LEADING_DENSE = tuple(
    replace(slot, source="1 experts") if slot.name == ROUTER_BIAS.name else slot
    for slot in LEADING_DENSE
)

ROWS = (
    Family(
        "ERNIE 4.5",
        ("Ernie4_5ForCausalLM",),
        "ernie4_5",
        WHOLE,
        # pairs of rotated dimensions are adjacent in the checkpoint as well
        (*NORMS, *attention(heads=False, bias=False), *GATED),
        ernie_keys,
        plain_sizes,
        rotary(PLAIN),
        SILU,
        tied=True,
        renames=(("ernie.", "model."),),
    ),
    Family(
        "ERNIE 4.5 mixture of experts",
        ("Ernie4_5_MoeForCausalLM",),
        "ernie4_5-moe",
        WHOLE,
        (*NORMS, *attention(heads=False, bias=False), *_LEADING_DENSE),
        ernie_moe_keys,
        ernie_moe_sizes,
        rotary(PLAIN),
        SILU,
        tied=True,
        renames=(("ernie.", "model."),),
        dropped=tuple(
            (f"model.mtp_{part}.", FURTHER)
            for part in ("block", "emb_norm", "hidden_norm", "linear_proj")
        ),
        parts=MappingProxyType(
            {
                f"mlp.{module}.e_score_correction_bias": (ROUTER_BIAS.name,)
                # of checkpoints, and of transformers' modules
                for module in ("moe_statics", "gate.moe_statics")
            }
        ),
    ),
)
