"""InternVL, in transformers' form and in its first one (``InternVLChatModel``)."""

from __future__ import annotations

from dataclasses import replace

from qconvert.architectures.config_classes import (
    BOOL,
    FLOAT,
    INT,
    INT_OR_INTS,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    PATCH_BIAS,
    PATCHES,
    POSITIONS_AFTER_CLASS,
    TOWER,
    block,
    block_names,
    check_grouping,
    image_grid,
    module,
    tower_keys,
    tower_sizes,
)

_CONFIG = ConfigClass(
    "InternVLVisionConfig",
    "internvl_vision",
    (),
    {
        "hidden_size": (INT, 1024),
        "intermediate_size": (INT, 4096),
        "num_hidden_layers": (INT, 24),
        "num_attention_heads": (INT, 16),
        "attention_bias": (BOOL, False),
        "use_qk_norm": (BOOL, False),
        "hidden_act": (TEXT, "gelu"),
        "norm_type": (TEXT, "layer_norm"),
        "layer_norm_eps": (FLOAT, 1e-6),
        "image_size": (INT_OR_INTS, (448, 448)),
        "patch_size": (INT_OR_INTS, (14, 14)),
        "num_channels": (INT, 3),
        "use_mask_token": (BOOL, False),
        "use_absolute_position_embeddings": (BOOL, True),
        "use_mean_pooling": (BOOL, True),
    },
    (
        "hidden_dropout_prob", "attention_dropout", "projection_dropout", "initializer_range",
        "layer_scale_init_value",
    ),
)  # fmt: skip
_USUAL_TILES = (1, 12)  # llama.cpp's, where no key says how many


def _factor(inputs: Inputs) -> int:
    """Patches along a side that become one token."""
    ratio = inputs.whole.number("downsample_ratio", 0.5)
    if ratio > 1 or not (1 / ratio).is_integer():
        raise inputs.whole.wrong("downsample_ratio", "1 / 2, or 1 by another whole number")
    return int(1 / ratio)


def _sizes(inputs: Inputs) -> Sizes:
    _, patches = image_grid(inputs)
    found = tower_sizes(inputs, positions=patches * patches + 1)
    found.named["merged"] = found.named["width"] * _factor(inputs) ** 2
    return found


def internvl_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    tower, whole = inputs.tower, inputs.whole
    # llama.cpp takes other norms by the sizes of the one tower that has them, of 6 billion values.
    tower.require("norm_type", ("layer_norm",))
    for name, wanted in (
        ("use_qk_norm", False),
        ("use_mask_token", False),
        ("use_absolute_position_embeddings", True),
        ("use_mean_pooling", True),
    ):
        tower.require(name, (wanted,))
    tower.require("hidden_act", ("gelu", "silu"))
    whole.require("ps_version", ("v2",), "v2")  # the first one mixes rows and columns
    whole.require("projector_hidden_act", ("gelu",), "gelu")
    whole.require("vision_feature_layer", (-1,), -1)
    whole.require("vision_feature_select_strategy", ("default",), "default")
    side, patches = image_grid(inputs)
    if whole.get("force_image_size"):  # of the first form, where it differs
        raise whole.unlike("force_image_size", f"'vision_config.image_size', {side}")
    factor = _factor(inputs)
    check_grouping(patches, factor, whole, "downsample_ratio")
    eps = tower.number("layer_norm_eps")
    found = tower_keys(inputs, sizes, image=side, eps=eps, activation="hidden_act")
    found["clip.vision.projector.scale_factor"] = factor
    pictures = inputs.pictures.fields
    least, most = (
        pictures.count(ours, whole.count(first, usual))
        for ours, first, usual in (
            ("min_patches", "min_dynamic_patch", _USUAL_TILES[0]),
            ("max_patches", "max_dynamic_patch", _USUAL_TILES[1]),
        )
    )
    if (least, most) != _USUAL_TILES:
        found |= {"clip.vision.preproc_min_tiles": least, "clip.vision.preproc_max_tiles": most}
    return found


_EMBEDDINGS = "vision_tower.embeddings"
_PROJECTION = "multi_modal_projector"
_PATCHES = f"{_EMBEDDINGS}.patch_embeddings.projection"
_FIRST_FORM = (
    ("vision_model.encoder.", "vision_tower.encoder."),
    ("vision_model.embeddings.class_embedding", f"{_EMBEDDINGS}.cls_token"),
    ("vision_model.embeddings.position_embedding", f"{_EMBEDDINGS}.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", f"{_PATCHES}."),
    ("mlp1.0.", f"{_PROJECTION}.layer_norm."),
    ("mlp1.1.", f"{_PROJECTION}.linear_1."),
    ("mlp1.3.", f"{_PROJECTION}.linear_2."),
)
_FIRST_NAMES = {
    **block_names(
        ln1="norm1", ln2="norm2", attn_q__attn_k__attn_v="attn.qkv", attn_out="attn.proj"
    ),
    "ls1": ("v.blk.{}.ls1.weight",),
    "ls2": ("v.blk.{}.ls2.weight",),
}

ROWS = (
    Projector(
        "InternVL",
        ("internvl",),
        ("InternVLForConditionalGeneration",),
        "internvl",
        _CONFIG,
        (
            Slot("v.class_embd", "1 1 width"),
            PATCHES,
            PATCH_BIAS,
            replace(POSITIONS_AFTER_CLASS, shape="1 positions width"),
            Slot("mm.model.mlp.0.weight", "merged"),
            Slot("mm.model.mlp.0.bias", "merged"),
            Slot("mm.model.mlp.1.weight", "text merged"),
            Slot("mm.model.mlp.1.bias", "text"),
            Slot("mm.model.mlp.3.weight", "text text"),
            Slot("mm.model.mlp.3.bias", "text"),
        ),
        (
            *block(bias="attention_bias", out_bias=True),
            Slot("v.blk.{}.ls1.weight", "width"),
            Slot("v.blk.{}.ls2.weight", "width"),
        ),
        {
            **block_names(
                ln1="layernorm_before",
                ln2="layernorm_after",
                attn_q="attention.q_proj",
                attn_k="attention.k_proj",
                attn_v="attention.v_proj",
                attn_out="attention.projection_layer",
                ffn_up="mlp.fc1",
                ffn_down="mlp.fc2",
            ),
            "lambda_1": ("v.blk.{}.ls1.weight",),
            "lambda_2": ("v.blk.{}.ls2.weight",),
            f"{_EMBEDDINGS}.cls_token": ("v.class_embd",),
            f"{_EMBEDDINGS}.position_embeddings": ("v.position_embd.weight",),
            **_FIRST_NAMES,
            **module(_PATCHES, "v.patch_embd"),
            **module(f"{_PROJECTION}.layer_norm", "mm.model.mlp.0"),
            **module(f"{_PROJECTION}.linear_1", "mm.model.mlp.1"),
            **module(f"{_PROJECTION}.linear_2", "mm.model.mlp.3"),
        },
        (
            *_FIRST_FORM,
            *TOWER,
            ("vision_tower.encoder.layer.", "vision_tower.encoder.layers."),
        ),
        ("vision_tower.", "multi_modal_projector."),
        _sizes,
        internvl_keys,
    ),
)
