"""Towers of the SigLIP kind: Gemma 3, Idefics 3 and SmolVLM."""

from __future__ import annotations

import math
from dataclasses import replace

from qconvert.architectures.config_classes import ANY, FLOAT, INT, INT_OR_INTS, TEXT, ConfigClass
from qconvert.architectures.families.keys import GELU, Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    CLIP_NAMES,
    EMBEDDINGS,
    PATCH_BIAS,
    PATCHES,
    POSITIONS,
    POST_NORM,
    TOWER,
    block,
    check_grouping,
    image_grid,
    module,
    tower_keys,
    tower_sizes,
)

_SIGLIP = ConfigClass(
    "SiglipVisionConfig",
    "siglip_vision_model",
    (),
    {
        "hidden_size": (INT, 768),
        "intermediate_size": (INT, 3072),
        "num_hidden_layers": (INT, 12),
        "num_attention_heads": (INT, 12),
        "num_channels": (INT, 3),
        "image_size": (INT_OR_INTS, 224),
        "patch_size": (INT_OR_INTS, 16),
        "hidden_act": (TEXT, "gelu_pytorch_tanh"),
        "layer_norm_eps": (FLOAT, 1e-6),
    },
    ("attention_dropout", "vision_use_head"),
)
_IDEFICS = replace(
    _SIGLIP,
    name="Idefics3VisionConfig",
    model_type="idefics3_vision",
    fields={
        **_SIGLIP.fields,
        "hidden_size": (INT, 1152),
        "num_attention_heads": (INT, 16),
        "patch_size": (INT_OR_INTS, 32),
    },
    unused=("attention_dropout", "initializer_range"),
    # how the processor cuts images, which its own file says, and remarks on how it was made
    harmless={"max_image_size": ANY, "size": ANY, "use_base_siglip": ANY},
)
_SMOLVLM = replace(_IDEFICS, name="SmolVLMVisionConfig", model_type="smolvlm_vision")


def _sizes(inputs: Inputs) -> Sizes:
    _, patches = image_grid(inputs)
    return tower_sizes(inputs, positions=patches * patches)


def _siglip_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    side, _ = image_grid(inputs)
    inputs.tower.require("hidden_act", GELU)
    eps = inputs.tower.number("layer_norm_eps")
    return tower_keys(inputs, sizes, image=side, eps=eps, activation="hidden_act")


_USUAL_MERGE = 4  # patches that Gemma's projector averages along a side, where no key says it


def gemma3_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    """Patches are averaged, as many as leave so many tokens of an image."""
    _, patches = image_grid(inputs)
    tokens = inputs.whole.count("mm_tokens_per_image", 256)
    side = math.isqrt(tokens)
    if side * side != tokens or patches % side:
        raise inputs.whole.wrong(
            "mm_tokens_per_image", f"a square of a divisor of the {patches} patches along a side"
        )
    pictures = inputs.pictures.fields
    if pictures.given("image_seq_length") and pictures.get("image_seq_length") != tokens:
        raise pictures.unlike("image_seq_length", f"{tokens}, as config.json has it")
    found = _siglip_keys(inputs, sizes)
    if patches // side != _USUAL_MERGE:
        found["clip.vision.projector.scale_factor"] = patches // side
    return found


def idefics3_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    """Squares of patches become one token, their values one after another."""
    side, patches = image_grid(inputs)
    factor = inputs.whole.count("scale_factor", 2)
    check_grouping(patches, factor, inputs.whole, "scale_factor")
    size = inputs.pictures.fields.section("size")
    longest = size.optional_count("longest_edge") if size else None
    return _siglip_keys(inputs, sizes) | {
        "clip.vision.projector.scale_factor": factor,
        "clip.vision.preproc_image_size": longest or side,
    }


def _idefics3_sizes(inputs: Inputs) -> Sizes:
    found = _sizes(inputs)
    factor = inputs.whole.count("scale_factor", 2)
    found.named["merged"] = found.named["width"] * factor * factor
    return found


_TOWER = (PATCHES, PATCH_BIAS, POSITIONS, *POST_NORM)
_PARTS = {
    **CLIP_NAMES,
    **EMBEDDINGS,
    **module("vision_tower.post_layernorm", "v.post_ln"),
}
_GEMMA3 = "multi_modal_projector.mm_"

ROWS = (
    Projector(
        "Gemma 3",
        ("gemma3",),
        ("Gemma3ForConditionalGeneration",),
        "gemma3",
        _SIGLIP,
        (
            *_TOWER,
            Slot("mm.input_projection.weight", "width text"),  # its columns are the text's width
            Slot("mm.soft_emb_norm.weight", "width"),
        ),
        block(),
        _PARTS
        | {
            f"{_GEMMA3}input_projection_weight": ("mm.input_projection.weight",),
            f"{_GEMMA3}soft_emb_norm.weight": ("mm.soft_emb_norm.weight",),
        },
        TOWER,
        ("vision_tower.", "multi_modal_projector."),
        _sizes,
        gemma3_keys,
        dropped=(("vision_tower.head.", "is of a use of the tower without a language model"),),
        norm_offset=True,
    ),
    *(
        Projector(
            name,
            (model_type,),
            (kind,),
            "idefics3",
            config,
            (*_TOWER, Slot("mm.model.fc.weight", "text merged")),
            block(),
            _PARTS | {"connector.modality_projection.proj.weight": ("mm.model.fc.weight",)},
            (*TOWER, ("model.connector.", "connector.")),
            ("vision_tower.", "connector."),
            _idefics3_sizes,
            idefics3_keys,
        )
        for name, model_type, kind, config in (
            ("Idefics 3", "idefics3", "Idefics3ForConditionalGeneration", _IDEFICS),
            ("SmolVLM", "smolvlm", "SmolVLMForConditionalGeneration", _SMOLVLM),
        )
    ),
)
