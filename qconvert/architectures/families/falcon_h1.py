"""Falcon H1: attention and a state-space layer beside each other in every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT_OR_NULL,
    FLOATS_OR_NULL,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.granite_hybrid import (
    MAMBA_FIELDS,
    mamba_sizes,
    require_plain_mamba,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import ATTENTION_NORM, GATED, WHOLE, attention
from qconvert.architectures.families.ssm import SSM, ssm_keys, ssm_parts
from qconvert.architectures.rope import PLAIN

_LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}
_ONES = (
    "lm_head_multiplier", "embedding_multiplier", "key_multiplier", "attention_out_multiplier",
    "attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier",
)  # fmt: skip

_MULTIPLIERS: dict[str, tuple[str, object]] = {name: (FLOAT_OR_NULL, 1.0) for name in _ONES}
_MULTIPLIERS |= {name: (FLOATS_OR_NULL, None) for name in _LISTS}
_FIELDS = decoder_fields(
    (128_000, 4096, 14_336, 32, 32),
    (INT_OR_NULL, 8),
    8192,
    1e-5,
    attention_bias=(BOOL, False),
    mlp_bias=(BOOL, False),
    projectors_bias=(BOOL_OR_NULL, False),
    mamba_d_ssm=(INT_OR_NULL, 1024),
    mamba_norm_before_gate=(BOOL_OR_NULL, True),
    mamba_rms_norm=(BOOL_OR_NULL, False),
)

CONFIGS = (
    ConfigClass(
        "FalconH1Config",
        "falcon_h1",
        ("FalconH1ForCausalLM",),
        _FIELDS | MAMBA_FIELDS | _MULTIPLIERS,
        (*TRAINING, "num_logits_to_keep", "mamba_chunk_size"),
        (*(n for n in DECODER if n != "layer_types"), "head_dim"),
        MappingProxyType({"layer_types": "layers_block_type"}),
    ),
)


def falcon_sizes(config: Config) -> Sizes:
    plain = plain_sizes(config)
    inner = config.optional_count("mamba_d_ssm")
    if inner is None:
        inner = config.count("mamba_expand", most=1024) * plain.named["width"]
    return replace(plain, named=plain.named | mamba_sizes(config, inner))


def falcon_keys(config: Config, sizes: Sizes) -> Keys:
    require_plain_mamba(config)
    for field in ("attention_bias", "mlp_bias", "projectors_bias"):
        config.require(field, (False, None))
    if config.flag("mamba_rms_norm"):
        config.require("mamba_norm_before_gate", (False, None))
    return decoder_keys(config, sizes) | ssm_keys(sizes)


def _number(*fields: str) -> Callable[[Config, Sizes], Sequence[float]]:
    """All rows are multiplied by these fields."""

    def factors(config: Config, sizes: Sizes) -> Sequence[float]:
        found = 1.0
        for field in fields:
            found *= config.number(field)
        return [found]

    return factors


def _listed(config: Config, field: str) -> list[float]:
    count = _LISTS[field]
    return [1.0] * count if config.get(field) is None else config.numbers(field, count)


def _of_mlp(which: int) -> Callable[[Config, Sizes], Sequence[float]]:
    return lambda config, sizes: [_listed(config, "mlp_multipliers")[which]]


def _projected(config: Config, sizes: Sizes) -> Sequence[float]:
    """Rows of the gate, the inner values, both matrices and the time steps, each with its own."""
    inner, groups, state, heads = sizes.shape("ssm_inner ssm_groups ssm_state ssm_heads")
    counts = (inner, inner, groups * state, groups * state, heads)
    whole = config.number("ssm_in_multiplier")
    each = _listed(config, "ssm_multipliers")
    return [whole * factor for factor, n in zip(each, counts, strict=True) for _ in range(n)]


# llama.cpp has no multipliers here: its converter too multiplies the weights.
_FACTORS = {
    "token_embd.weight": _number("embedding_multiplier"),
    "output.weight": _number("lm_head_multiplier"),
    "attn_q.weight": _number("attention_in_multiplier"),
    "attn_k.weight": _number("attention_in_multiplier", "key_multiplier"),
    "attn_v.weight": _number("attention_in_multiplier"),
    "attn_output.weight": _number("attention_out_multiplier"),
    "ffn_gate.weight": _of_mlp(0),
    "ffn_down.weight": _of_mlp(1),
    "ssm_in.weight": _projected,
    "ssm_out.weight": _number("ssm_out_multiplier"),
}


def _multiplied(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    return tuple(replace(slot, factors=_FACTORS.get(slot.name)) for slot in slots)


_FFN_NORM = Slot("ffn_norm", "width")  # without the usual ending, in this architecture only
_NORMED = tuple(
    replace(slot, flag="mamba_rms_norm") if slot.name == "ssm_norm.weight" else slot for slot in SSM
)

ROWS = (
    Family(
        "Falcon H1",
        ("FalconH1ForCausalLM",),
        "falcon-h1",
        _multiplied(WHOLE),
        _multiplied(
            (ATTENTION_NORM, _FFN_NORM, *attention(heads=False, bias=False), *_NORMED, *GATED)
        ),
        falcon_keys,
        falcon_sizes,
        rotary(PLAIN),
        SILU,
        parts=MappingProxyType(ssm_parts("mamba") | {"pre_ff_layernorm.weight": (_FFN_NORM.name,)}),
        own_head=True,
    ),
)
