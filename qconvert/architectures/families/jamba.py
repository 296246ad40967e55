"""Jamba: layers of Mamba 1's kind, of which each so manieth attends instead, without positions."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    INT,
    INT_OR_TEXT,
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
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    EXPERTS,
    GATED,
    NORMS,
    WHOLE,
    attention,
    limited,
    negated,
)
from qconvert.architectures.families.ssm import (
    FIRST_SSM,
    MAX_KERNEL,
    MAX_STATE,
    MIXED_PARTS,
    attending_keys,
    first_keys,
    first_sizes,
    time_step_rank,
)

_FIELDS = decoder_fields(
    (65_536, 4096, 14_336, 32, 32),
    (INT, 8),
    262_144,
    num_experts_per_tok=(INT, 2),
    num_experts=(INT, 16),
    expert_layer_period=(INT, 2),
    expert_layer_offset=(INT, 1),
    attn_layer_period=(INT, 8),
    attn_layer_offset=(INT, 4),
    mamba_d_state=(INT, 16),
    mamba_d_conv=(INT, 4),
    mamba_expand=(INT, 2),
    mamba_dt_rank=(INT_OR_TEXT, "auto"),
    mamba_conv_bias=(BOOL, True),
    mamba_proj_bias=(BOOL, False),
)
CONFIGS = (
    ConfigClass(
        "JambaConfig",
        "jamba",
        ("JambaForCausalLM",),
        {n: f for n, f in _FIELDS.items() if n != "rope_parameters"},
        (
            *(*TRAINING, "output_router_logits", "router_aux_loss_coef", "use_mamba_kernels"),
            *("use_mambapy", "use_associative_scan"),
        ),
        ("is_causal", "per_layer_config", "sliding_window", "attention_chunk_size", "head_dim"),
        MappingProxyType({"num_local_experts": "num_experts"}),
        harmless=MappingProxyType(
            {
                **dict.fromkeys(
                    ("num_logits_to_keep", "calc_logits_for_entire_prompt", "n_ctx"), ANY
                ),
                "mamba_inner_layernorms": (True,),
            }
        ),
    ),
)


def _each(config: Config, kind: str, block: int) -> bool:
    """Whether a block is one of each so many."""
    period, offset = config.count(f"{kind}_layer_period"), config.get(f"{kind}_layer_offset")
    if type(offset) is not int or not 0 <= offset < period:
        raise config.wrong(f"{kind}_layer_offset", f"less than {kind}_layer_period, {period}")
    return block % period == offset


def _attends(config: Config, sizes: Sizes, block: int) -> bool:
    return _each(config, "attn", block)


def _sparse(config: Config, sizes: Sizes, block: int) -> bool:
    return _each(config, "expert", block) and sizes.named["experts"] > 1


def jamba_sizes(config: Config) -> Sizes:
    plain = expert_sizes(config, "num_experts", "intermediate_size")
    width = plain.named["width"]
    if plain.named["query"] != width:
        raise config.unlike("head_dim", "hidden_size / num_attention_heads")
    inner = config.count("mamba_expand", most=1024) * width
    state = config.count("mamba_d_state", most=MAX_STATE)
    kernel = config.count("mamba_d_conv", most=MAX_KERNEL)
    rank = time_step_rank(config, "mamba_dt_rank", width)
    return replace(plain, named=plain.named | first_sizes(inner, state, rank, kernel))


def jamba_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("mamba_conv_bias", (True,))
    config.require("mamba_proj_bias", (False,))
    config.require("mamba_expand", (2,))
    attending = [_attends(config, sizes, i) for i in range(sizes.blocks)]
    if all(attending) or not any(attending):
        raise config.unlike("attn_layer_period", "layers of both kinds")
    experts: Keys = {}
    if sizes.named["experts"] > 1:  # one is a plain layer, whatever the number that is used
        experts = expert_keys(config, sizes)
    return (
        decoder_keys(config, sizes)
        | attending_keys(config, sizes, _attends)
        | experts
        | first_keys(sizes)
    )


_NORMED = ("dt", "b", "c")  # what a state-space layer makes of its input
_INSIDE_NORMS = (
    Slot("ssm_dt_norm.weight", "ssm_rank"),
    Slot("ssm_b_norm.weight", "ssm_state"),
    Slot("ssm_c_norm.weight", "ssm_state"),
)

ROWS = (
    Family(
        "Jamba",
        ("JambaForCausalLM",),
        "jamba",
        WHOLE,
        (
            *NORMS,
            *limited(attention(heads=False, bias=False), _attends),
            *limited((*FIRST_SSM, *_INSIDE_NORMS), negated(_attends)),
            *limited(EXPERTS, _sparse),
            *limited(GATED, negated(_sparse)),
        ),
        jamba_keys,
        jamba_sizes,
        None,
        SILU,
        parts=MappingProxyType(
            MIXED_PARTS
            | {f"mamba.{n}_layernorm.weight": (f"ssm_{n}_norm.weight",) for n in _NORMED}
        ),
    ),
)
