"""Mistral 4, the text part of Mistral 3's class: latent vectors as in DeepSeek, and
queries that grow with distance.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.deepseek import (
    LATENT_BLOCK,
    LATENT_PARTS,
    latent_keys,
    latent_rope,
    latent_sizes,
)
from qconvert.architectures.families.keys import SILU, Keys, Sizes, group_keys, routed_keys
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import INSIDE, ROUTER_BIAS, VISION, WHOLE
from qconvert.architectures.rope import Rope, Scalings, settled

MISTRAL4 = ConfigClass(
    "Mistral4Config",
    "mistral4",
    (),
    decoder_fields(
        (131_072, 4096, 12_288, 36, 32),
        (INT_OR_NULL, 32),
        1_048_576,
        moe_intermediate_size=(INT, 2048),
        n_shared_experts=(INT, 1),
        n_routed_experts=(INT, 128),
        routed_scaling_factor=(FLOAT, 1.0),
        kv_lora_rank=(INT, 256),
        q_lora_rank=(INT_OR_NULL, 1024),
        qk_rope_head_dim=(INT, 64),
        v_head_dim=(INT_OR_NULL, 128),
        qk_nope_head_dim=(INT, 64),
        n_group=(INT_OR_NULL, 1),
        topk_group=(INT_OR_NULL, 1),
        num_experts_per_tok=(INT_OR_NULL, 4),
        first_k_dense_replace=(INT_OR_NULL, 0),
        norm_topk_prob=(BOOL_OR_NULL, True),
        rope_interleave=(BOOL_OR_NULL, True),
        attention_bias=(BOOL, False),
    ),
    (*TRAINING, "output_router_logits", "pretraining_tp"),
    tuple(n for n in DECODER if n != "partial_rotary_factor"),
    MappingProxyType({"num_local_experts": "n_routed_experts"}),
)

_SCALE, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
_PART = "partial_rotary_factor"
# What the class has where nothing is stated.
_USUAL = {
    "type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 128.0,
    _ORIGINAL: 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    _SCALE: 0.1,
}
_KINDS = Scalings(("yarn",), partial=True, beside=(_SCALE, _ORIGINAL, "max_position_embeddings"))


def _stated(config: Config) -> Config:
    if config.get("rope_parameters") is not None:
        return config
    return config.replaced(config.fields() | {"rope_parameters": _USUAL})


def mistral4_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions; the part of a head that is rotated is what its widths say."""
    part = sizes.named["rotated"] / sizes.head_dim
    kinds, config = replace(_KINDS, whole=part), _stated(config)
    found = settled(config, kinds)
    if int(found.part * sizes.head_dim) != sizes.named["rotated"]:
        raise found.fields.unlike(_PART, f"{part}, as qk_rope_head_dim says")
    return latent_rope(config, sizes, kinds, divided=True)


def mistral4_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("rope_interleave", (True,))
    # Queries far from the beginning grow: by this times the logarithm of how many of the original
    # contexts lie before them.
    fields = settled(_stated(config), _KINDS).fields
    scale, norm = config.number("routed_scaling_factor"), config.flag("norm_topk_prob")
    return (
        latent_keys(config, sizes)
        | routed_keys(config, sizes, "softmax", scale=scale, norm=norm)
        | group_keys(config, sizes)
        | {
            "attention.temperature_scale": fields.number(_SCALE),
            "attention.temperature_length": fields.count(_ORIGINAL),
        }
    )


LATENT = Family(
    "Mistral 4 (text)",
    ("Mistral3ForConditionalGeneration",),
    "mistral4",
    WHOLE,
    tuple(slot for slot in LATENT_BLOCK if slot.name != ROUTER_BIAS.name),
    mistral4_keys,
    latent_sizes,
    mistral4_rope,
    SILU,
    parts=MappingProxyType(LATENT_PARTS),
    renames=INSIDE,
    dropped=VISION,
)
