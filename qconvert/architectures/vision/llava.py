"""LLaVA 1.5 and 1.6, around a tower of CLIP's: the outputs of an early block are projected."""

from __future__ import annotations

from qconvert.architectures.config_classes import (
    FLOAT,
    INT,
    INT_OR_INTS_OR_NULL,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    CLIP_NAMES,
    EMBEDDINGS,
    PATCHES,
    POSITIONS_AFTER_CLASS,
    QUICK_GELU,
    TOWER,
    block,
    image_grid,
    module,
    tower_keys,
    tower_sizes,
)
from qconvert.files.gguf_writer import GgufValue

_CLIP = ConfigClass(
    "CLIPVisionConfig",
    "clip_vision_model",
    (),
    {
        "hidden_size": (INT, 768),
        "intermediate_size": (INT, 3072),
        "num_hidden_layers": (INT, 12),
        "num_attention_heads": (INT, 12),
        "num_channels": (INT, 3),
        "image_size": (INT_OR_INTS_OR_NULL, 224),
        "patch_size": (INT_OR_INTS_OR_NULL, 32),
        "hidden_act": (TEXT, QUICK_GELU),
        "layer_norm_eps": (FLOAT, 1e-5),
    },
    ("projection_dim", "attention_dropout", "initializer_range", "initializer_factor"),
    harmless={"vocab_size": None},
)


def _layers(inputs: Inputs) -> list[int]:
    """After how many blocks the outputs are taken.

    Raises:
        FormatError: no such blocks, or not in their order, in which llama.cpp joins them.
    """
    whole, blocks = inputs.whole, inputs.tower.count("num_hidden_layers")
    stated = whole.get("vision_feature_layer", -2)
    several = stated if isinstance(stated, list) else [stated]
    if not several or any(type(n) is not int or not -blocks <= n <= blocks for n in several):
        raise whole.wrong("vision_feature_layer", f"some of {blocks} blocks")
    found = [n if n >= 0 else blocks + 1 + n for n in several]
    if found != sorted(set(found)) or not found[0]:
        raise whole.wrong("vision_feature_layer", "blocks in their order, of which none is 0")
    return found


def _sizes(inputs: Inputs) -> Sizes:
    _, patches = image_grid(inputs)
    found = tower_sizes(inputs, positions=patches * patches + 1)
    layers = _layers(inputs)
    found.named["joined"] = found.named["width"] * len(layers)
    return Sizes(max(layers), found.head_dim, found.named)


def llava_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    whole = inputs.whole
    whole.require("projector_hidden_act", ("gelu",), "gelu")
    whole.require("vision_feature_select_strategy", ("default",), "default")
    whole.require("multimodal_projector_bias", (True,), True)
    side, _ = image_grid(inputs)
    eps = inputs.tower.number("layer_norm_eps")
    return {
        **tower_keys(inputs, sizes, image=side, eps=eps, activation="hidden_act"),
        "clip.vision.feature_layer": GgufValue("INT32", _layers(inputs)),
    }


def llava_next_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    """Images are cut into tiles of one of these sizes."""
    whole = inputs.whole
    stated = whole.get("image_grid_pinpoints")
    pairs = stated if isinstance(stated, list) else []
    good = [p for p in pairs if isinstance(p, list) and len(p) == 2]
    flat = [n for pair in good for n in pair]
    if not pairs or len(good) != len(pairs) or any(type(n) is not int or n < 1 for n in flat):
        raise whole.wrong("image_grid_pinpoints", "a list of pairs of pixels")
    return {
        **llava_keys(inputs, sizes),
        "clip.vision.mm_patch_merge_type": "spatial_unpad",
        "clip.vision.image_grid_pinpoints": GgufValue("INT32", flat),
    }


def _later(inputs: Inputs, sizes: Sizes) -> tuple[tuple[str, str], ...]:
    """Blocks after the last whose outputs are taken."""
    blocks = inputs.tower.count("num_hidden_layers")
    why = "comes after the block whose outputs the language model gets"
    return tuple(
        (f"vision_tower.encoder.layers.{number}.", why) for number in range(sizes.blocks, blocks)
    )


_PROJECTION = "multi_modal_projector"
_FIRST = (
    "llama.cpp leaves out the first patch of each image, or tile of one, and gives the class token "
    "in its stead, as the last"
)
_TILES = (
    f"{_FIRST}; it puts tiles one after another, where transformers arranges their tokens as "
    "they lie in the image, without those of padding and with a token at the end of each row"
)

ROWS = tuple(
    Projector(
        name,
        (model_type,),
        (kind,),
        "mlp",
        _CLIP,
        (
            Slot("v.class_embd", "width"),
            PATCHES,
            POSITIONS_AFTER_CLASS,
            Slot("v.pre_ln.weight", "width"),
            Slot("v.pre_ln.bias", "width"),
            Slot("mm.0.weight", "text joined"),
            Slot("mm.0.bias", "text"),
            Slot("mm.2.weight", "text text"),
            Slot("mm.2.bias", "text"),
        ),
        block(),
        {
            **CLIP_NAMES,
            **EMBEDDINGS,
            "vision_tower.embeddings.class_embedding": ("v.class_embd",),
            **module("vision_tower.pre_layrnorm", "v.pre_ln"),
            **module(f"{_PROJECTION}.linear_1", "mm.0"),
            **module(f"{_PROJECTION}.linear_2", "mm.2"),
        },
        (*TOWER, ("model.image_newline", "image_newline")),
        ("vision_tower.", "multi_modal_projector.", "image_newline"),
        _sizes,
        keys,
        towers=("clip_vision_model",),
        dropped=(
            ("vision_tower.post_layernorm.", "is of a use of the tower without a language model"),
            ("image_newline", "llama.cpp puts no token at the ends of rows"),
        ),
        more_dropped=_later,
        said=said,
    )
    for name, model_type, kind, keys, said in (
        ("LLaVA 1.5", "llava", "LlavaForConditionalGeneration", llava_keys, _FIRST),
        ("LLaVA 1.6", "llava_next", "LlavaNextForConditionalGeneration", llava_next_keys, _TILES),
    )
)
