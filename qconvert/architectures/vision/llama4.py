"""Llama 4's tower."""

from __future__ import annotations

from qconvert.architectures.config_classes import (
    BOOL,
    FLOAT,
    INT,
    INT_OR_INTS,
    OBJECT_OR_NULL,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    POSITIONS,
    POST_NORM,
    TOWER,
    block,
    block_names,
    check_grouping,
    image_grid,
    module,
    tower_keys,
    tower_sizes,
    unscaled_rotation,
)

_CONFIG = ConfigClass(
    "Llama4VisionConfig",
    "llama4_vision_model",
    (),
    {
        "hidden_size": (INT, 768),
        "hidden_act": (TEXT, "gelu"),
        "num_hidden_layers": (INT, 34),
        "num_attention_heads": (INT, 16),
        "num_channels": (INT, 3),
        "intermediate_size": (INT, 5632),
        "vision_output_dim": (INT, 7680),
        "image_size": (INT_OR_INTS, 448),
        "patch_size": (INT_OR_INTS, 14),
        "norm_eps": (FLOAT, 1e-5),
        "vision_feature_select_strategy": (TEXT, "default"),
        "pixel_shuffle_ratio": (FLOAT, 0.5),
        "projector_input_dim": (INT, 4096),
        "projector_output_dim": (INT, 4096),
        "multi_modal_projector_bias": (BOOL, False),
        "rope_parameters": (OBJECT_OR_NULL, None),
    },
    ("initializer_range", "projector_dropout", "attention_dropout"),
    ("rope_theta",),
)


def _factor(inputs: Inputs) -> int:
    """Patches along a side that become one token."""
    ratio = inputs.tower.number("pixel_shuffle_ratio")
    if ratio > 1 or not (1 / ratio).is_integer():
        raise inputs.tower.wrong("pixel_shuffle_ratio", "1 / 2, or 1 by another whole number")
    return int(1 / ratio)


def _sizes(inputs: Inputs) -> Sizes:
    tower = inputs.tower
    _, patches = image_grid(inputs)
    found = tower_sizes(
        inputs,
        positions=patches * patches + 1,
        first=tower.count("projector_input_dim"),
        second=tower.count("projector_output_dim"),
    )
    named = found.named
    named["pixels"] = 3 * named["patch"] ** 2
    named["merged"] = named["width"] * _factor(inputs) ** 2
    if found.head_dim % 4:
        raise tower.wrong("num_attention_heads", "heads of a width that four divides")
    if tower.count("vision_output_dim") != named["second"]:
        raise tower.unlike("vision_output_dim", "projector_output_dim")
    return found


def llama4_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    tower = inputs.tower
    tower.require("hidden_act", ("gelu",))
    tower.require("vision_feature_select_strategy", ("default",))
    tower.require("multi_modal_projector_bias", (False,))
    tower.require("rope_theta", (10_000.0, 10_000, None))
    unscaled_rotation(tower, 10_000.0)
    side, patches = image_grid(inputs)
    check_grouping(patches, _factor(inputs), tower, "pixel_shuffle_ratio")
    eps = tower.number("norm_eps")
    return {
        **tower_keys(inputs, sizes, image=side, eps=eps, activation="hidden_act"),
        "clip.vision.projector.scale_factor": _factor(inputs),
    }


_COLUMNS = (
    "llama.cpp gives the tokens of each tile of an image column by column, transformers row by row"
)

ROWS = (
    Projector(
        "Llama 4",
        ("llama4",),
        ("Llama4ForConditionalGeneration",),
        "llama4",
        _CONFIG,
        (
            Slot("v.class_embd", "width"),
            Slot("v.patch_embd.weight", "width pixels"),
            POSITIONS,
            Slot("v.pre_ln.weight", "width"),
            Slot("v.pre_ln.bias", "width"),
            *POST_NORM,
            Slot("mm.model.mlp.1.weight", "first merged"),
            Slot("mm.model.mlp.2.weight", "second first"),
            Slot("mm.model.fc.weight", "text second"),
        ),
        block(),
        {
            **block_names(
                ln1="input_layernorm",
                ln2="post_attention_layernorm",
                attn_q="self_attn.q_proj",
                attn_k="self_attn.k_proj",
                attn_v="self_attn.v_proj",
                attn_out="self_attn.o_proj",
                ffn_up="mlp.fc1",
                ffn_down="mlp.fc2",
            ),
            "vision_tower.class_embedding": ("v.class_embd",),
            "vision_tower.patch_embedding.linear.weight": ("v.patch_embd.weight",),
            "vision_tower.positional_embedding_vlm": ("v.position_embd.weight",),
            **module("vision_tower.layernorm_pre", "v.pre_ln"),
            **module("vision_tower.layernorm_post", "v.post_ln"),
            "vision_tower.vision_adapter.mlp.fc1.weight": ("mm.model.mlp.1.weight",),
            "vision_tower.vision_adapter.mlp.fc2.weight": ("mm.model.mlp.2.weight",),
            "multi_modal_projector.linear_1.weight": ("mm.model.fc.weight",),
        },
        TOWER,
        ("vision_tower.", "multi_modal_projector."),
        _sizes,
        llama4_keys,
        said=_COLUMNS,
    ),
)
