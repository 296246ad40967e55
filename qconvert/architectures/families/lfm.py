"""LFM 2, dense and with experts: short convolutions, and attention in some layers."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    FLOAT,
    INT,
    INTS_OR_NULL,
    NUMBER,
    OBJECT_OR_NULL,
    TEXTS_OR_NULL,
    TOKENS,
    ConfigClass,
    Fields,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    FULL,
    MAX_EXPERTS,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    rotary,
    routed_keys,
    two_kinds,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    EMBEDDING,
    GATED,
    HEAD_NORMS,
    LEADING_DENSE,
    NORMS,
    OUTPUT_MATRIX,
    attention,
    limited,
)
from qconvert.architectures.rope import PLAIN
from qconvert.files.gguf_writer import GgufValue

_UNUSED = ("initializer_range", "use_cache", *TOKENS)
_SIZES = (65_536, 2560, 12_288, 32, 32)


def _fields(sizes: tuple[int, int, int, int, int], **more: tuple[str, object]) -> Fields:
    known = decoder_fields(sizes, (INT, 8), 128_000, 1e-5, tied=True, epsilon="norm_eps")
    plain = {name: kind for name, kind in known.items() if name != "hidden_act"}
    convolution = {"conv_bias": (BOOL, False), "conv_L_cache": (INT, 3)}
    return plain | convolution | {"layer_types": (TEXTS_OR_NULL, None)} | more


CONFIGS = (
    ConfigClass(
        "Lfm2Config",
        "lfm2",
        ("Lfm2ForCausalLM",),
        _fields(
            _SIZES,
            block_multiple_of=(INT, 256),
            block_ffn_dim_multiplier=(NUMBER, 1.0),
            block_auto_adjust_ff_dim=(BOOL, True),
            full_attn_idxs=(INTS_OR_NULL, None),
        ),
        _UNUSED,
        (*DECODER, "head_dim", "tie_embedding", "block_ff_dim"),
        theta=1_000_000.0,
    ),
    ConfigClass(
        "Lfm2MoeConfig",
        "lfm2_moe",
        ("Lfm2MoeForCausalLM",),
        _fields(
            (65_536, 2048, 7168, 32, 32),
            rope_parameters=(OBJECT_OR_NULL, None),
            moe_intermediate_size=(INT, 1792),
            num_dense_layers=(INT, 2),
            num_experts_per_tok=(INT, 4),
            num_experts=(INT, 32),
            use_expert_bias=(BOOL, True),
            routed_scaling_factor=(FLOAT, 1.0),
            norm_topk_prob=(BOOL, True),
        ),
        (*_UNUSED, "output_router_logits"),
        (*DECODER, "head_dim", "tie_embedding"),
        theta=1_000_000.0,
    ),
)

_CONVOLUTION = "conv"


def attends(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether a block has attention, rather than a convolution."""
    types = config.get("layer_types")
    if types is None:
        listed = config.get("full_attn_idxs")
        return listed is None or block in listed
    return bool(types[block] == FULL)


def _convolves(config: Config, sizes: Sizes, block: int) -> bool:
    return not attends(config, sizes, block)


def lfm2_sizes(config: Config) -> Sizes:
    config.require("tie_embedding", (None,))
    config.require("block_ff_dim", (None,))
    plain = filled_sizes(config)
    return replace(plain, named=plain.named | _inner(config) | _convolution_sizes(config))


def _convolution_sizes(config: Config) -> dict[str, int]:
    return {
        "kernel": config.count("conv_L_cache", most=64),
        "three_width": 3 * config.count("hidden_size"),
    }


def _inner(config: Config) -> dict[str, int]:
    """The inner width, which is two thirds of the stated one, made a multiple."""
    inner = config.count("intermediate_size")
    if config.flag("block_auto_adjust_ff_dim"):
        step = config.count("block_multiple_of")
        stretched = int(config.number("block_ffn_dim_multiplier") * int(2 * inner / 3))
        inner = step * -(-stretched // step)
    return {"inner": inner}


def lfm2_moe_sizes(config: Config) -> Sizes:
    config.require("tie_embedding", (None,))
    filled = filled_sizes(config)
    dense = config.get("num_dense_layers")
    if not 0 <= dense < filled.blocks:
        raise config.wrong("num_dense_layers", f"an integer from 0 to {filled.blocks - 1}")
    named = {
        "experts": config.count("num_experts", most=MAX_EXPERTS),
        "expert_inner": config.count("moe_intermediate_size"),
        "shared": 0,
        "dense": dense,
    }
    return replace(filled, named=filled.named | named | _convolution_sizes(config))


def lfm2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("conv_bias", (False,))
    two_kinds(config, sizes, _CONVOLUTION)
    attended = [attends(config, sizes, i) for i in range(sizes.blocks)]
    if not any(attended):
        raise config.unlike("layer_types", f"'{FULL}' for one layer at least")
    if all(attended):  # llama.cpp ends its process
        raise config.unlike("layer_types", f"'{_CONVOLUTION}' for one layer at least")
    groups = sizes.named["key"] // sizes.head_dim
    return decoder_keys(config, sizes, "norm_eps") | {
        "attention.head_count_kv": GgufValue("UINT32", [groups if a else 0 for a in attended]),
        "shortconv.l_cache": sizes.named["kernel"],
    }


def lfm2_moe_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("use_expert_bias", (True,))
    config.require("norm_topk_prob", (True,))
    config.require("routed_scaling_factor", (1.0,))
    return (
        lfm2_keys(config, sizes)
        | routed_keys(config, sizes, "sigmoid")
        | {"leading_dense_block_count": sizes.named["dense"]}
    )


_BLOCK = (
    *NORMS,
    *limited((*attention(heads=False, bias=False), *HEAD_NORMS), attends),
    *limited(
        (
            Slot("shortconv.conv.weight", "width kernel", source="width 1 kernel"),
            Slot("shortconv.in_proj.weight", "three_width width"),
            Slot("shortconv.out_proj.weight", "width width"),
        ),
        _convolves,
    ),
)
# llama.cpp has the last norm under this name.
_ENDS = (EMBEDDING, Slot("token_embd_norm.weight", "width"), OUTPUT_MATRIX)
_NAMES = {
    "feed_forward.expert_bias": ("exp_probs_b.bias",),
    "feed_forward.experts.w1.weight": ("ffn_gate_exps.weight",),
    "feed_forward.experts.w2.weight": ("ffn_down_exps.weight",),
    "feed_forward.experts.w3.weight": ("ffn_up_exps.weight",),
}

ROWS = (
    Family(
        "LFM 2",
        ("Lfm2ForCausalLM",),
        "lfm2",
        _ENDS,
        (*_BLOCK, *GATED),
        lfm2_keys,
        lfm2_sizes,
        rotary(PLAIN),
        (),
    ),
    Family(
        "LFM 2 mixture of experts",
        ("Lfm2MoeForCausalLM",),
        "lfm2moe",
        _ENDS,
        (*_BLOCK, *LEADING_DENSE),
        lfm2_moe_keys,
        lfm2_moe_sizes,
        rotary(PLAIN),
        (),
        parts=MappingProxyType(_NAMES),
    ),
)
