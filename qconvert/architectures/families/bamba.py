"""Bamba: layers of Mamba 2's kind, and some with attention that rotates half of each head."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    INT_OR_NULL,
    INTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.granite import GRANITE
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
    partial_rotary,
    plain_sizes,
    rotated,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    GATED,
    GATED_BIASES,
    NORMS,
    WHOLE,
    limited,
    negated,
)
from qconvert.architectures.families.ssm import (
    MIXED_PARTS,
    SSM,
    attending_keys,
    ssm_keys,
    ssm_parts,
)
from qconvert.architectures.mapped import Locate, Rows, interleaved
from qconvert.architectures.rope import PARTIAL, Rope, settled

_PART = 0.5  # of a head that is rotated; transformers reads no field beside rope_parameters
_SCALINGS = replace(PARTIAL, whole=_PART)
_NOT_READ = "partial_rotary_factor"
CONFIGS = (
    ConfigClass(
        "BambaConfig",
        "bamba",
        ("BambaForCausalLM",),
        decoder_fields(
            (128_000, 4096, 14_336, 32, 32),
            (INT_OR_NULL, 8),
            262_144,
            1e-5,
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            attn_layer_indices=(INTS_OR_NULL, None),
        )
        | MAMBA_FIELDS,
        (*TRAINING, "num_logits_to_keep", "mamba_chunk_size", "z_loss_coefficient"),
        (*(n for n in DECODER if n not in ("layer_types", _NOT_READ)), "head_dim"),
        MappingProxyType({"layer_types": "layers_block_type"}),
        harmless=MappingProxyType({"attn_rotary_emb": ANY}),
    ),
)


def _attends(config: Config, sizes: Sizes, block: int) -> bool:
    return block in (config.get("attn_layer_indices") or ())


def bamba_sizes(config: Config) -> Sizes:
    plain = plain_sizes(config)
    inner = config.count("mamba_expand", most=1024) * plain.named["width"]
    part = rotated(settled(config, _SCALINGS), plain.head_dim)
    return replace(plain, named=plain.named | mamba_sizes(config, inner) | {"rotated": part})


def bamba_keys(config: Config, sizes: Sizes) -> Keys:
    require_plain_mamba(config)
    config.require("mamba_expand", (2,))
    attending = [_attends(config, sizes, i) for i in range(sizes.blocks)]
    if all(attending) or not any(attending):
        raise config.unlike("attn_layer_indices", "layers of both kinds")
    return decoder_keys(config, sizes) | attending_keys(config, sizes, _attends) | ssm_keys(sizes)


def bamba_rope(config: Config, sizes: Sizes) -> Rope:
    return partial_rotary(_SCALINGS, _PART)(config, sizes)


def _interleaved_part(sizes: Sizes) -> Locate:
    """Rows of the rotated part of each head as adjacent pairs, others as they are."""
    head, part = sizes.head_dim, sizes.named["rotated"]
    whole = interleaved(part)

    def locate(rows: Rows) -> Rows:
        row = rows % head
        return rows - row + np.where(row < part, whole(row), row)

    return locate


_ATTENTION = tuple(
    replace(s, heads=False, rows=_interleaved_part) if s.heads else s
    for s in GRANITE
    if s not in NORMS
)
ROWS = (
    Family(
        "Bamba",
        ("BambaForCausalLM",),
        "granitehybrid",
        WHOLE,
        (
            *NORMS,
            *limited(_ATTENTION, _attends),
            *limited(SSM, negated(_attends)),
            *(*GATED, *GATED_BIASES),
        ),
        bamba_keys,
        bamba_sizes,
        bamba_rope,
        SILU,
        parts=MappingProxyType(MIXED_PARTS | ssm_parts("mamba")),
    ),
)
