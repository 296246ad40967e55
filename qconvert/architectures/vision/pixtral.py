"""Pixtral's tower, alone in LLaVA's form and with merged patches in Mistral 3: images of any size.

After each row of patches but the last there is a token of the language model's, whose embedding
llama.cpp wants in the projector's file.
"""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    INT,
    INT_OR_INTS,
    OBJECT_OR_NULL,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.mapped import Order, strided
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    PATCHES,
    TOWER,
    block,
    block_names,
    module,
    square,
    tower_keys,
    tower_sizes,
    unscaled_rotation,
)
from qconvert.errors import FormatError

BREAK = "[IMG_BREAK]"
_EPSILON = 1e-5  # transformers' class has it, and no field
_CONFIG = ConfigClass(
    "PixtralVisionConfig",
    "pixtral",
    (),
    {
        "hidden_size": (INT, 1024),
        "intermediate_size": (INT, 4096),
        "num_hidden_layers": (INT, 24),
        "num_attention_heads": (INT, 16),
        "num_channels": (INT, 3),
        "image_size": (INT_OR_INTS, 1024),
        "patch_size": (INT_OR_INTS, 16),
        "hidden_act": (TEXT, "gelu"),
        "rope_parameters": (OBJECT_OR_NULL, None),
    },
    ("attention_dropout", "initializer_range"),
    ("rope_theta",),
    harmless={"head_dim": ANY},  # transformers divides the width by the heads
)


def _break(inputs: Inputs) -> int:
    """The id of the token after a row.

    Raises:
        FormatError: the vocabulary has none.
    """
    found = inputs.token(BREAK)
    if found is None or not 0 <= found < inputs.text.count("vocab_size"):
        raise FormatError(
            f"the token after a row of an image, {BREAK}, is not in the vocabulary",
            path=inputs.whole.path.with_name("tokenizer.json"),
            found="no such token among those that were added",
            hint="take the tokenizer.json that comes with the model",
            code="ARCH-TOKEN",
        )
    return found


def _merge(inputs: Inputs) -> int:
    return inputs.whole.count("spatial_merge_size", 2)


def _sizes(inputs: Inputs) -> Sizes:
    found = tower_sizes(
        inputs,
        vocabulary=inputs.text.count("vocab_size"),
        break_row=_break(inputs),
        bias=int(inputs.whole.flag("multimodal_projector_bias", inputs.whole_is("llava"))),
    )
    if found.head_dim % 4:
        raise inputs.tower.wrong("num_attention_heads", "heads of a width that four divides")
    found.named["merged"] = found.named["width"] * _merge(inputs) ** 2
    return found


def pixtral_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    inputs.whole.require("vision_feature_select_strategy", ("full",))
    return _pixtral_keys(inputs, sizes, None)


def _pixtral_keys(inputs: Inputs, sizes: Sizes, layer: int | None) -> Keys:
    """Of both.

    Args:
        layer: whose outputs are taken where no field says it.
    """
    tower, whole = inputs.tower, inputs.whole
    unscaled_rotation(tower, 10_000.0)
    tower.require("rope_theta", (10_000.0, 10_000, None))
    tower.require("hidden_act", ("silu", "gelu"))
    whole.require("projector_hidden_act", ("gelu",), "gelu")
    whole.require("vision_feature_layer", (-1,), layer)
    side = square(tower, "image_size")
    return tower_keys(inputs, sizes, image=side, eps=_EPSILON, activation="hidden_act")


def mistral3_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    if inputs.text.number("rms_norm_eps") != _EPSILON:
        # of the norm before patches are merged, which has the tower's in llama.cpp
        raise inputs.text.unlike("rms_norm_eps", f"{_EPSILON:g}")
    return {**_pixtral_keys(inputs, sizes, -1), "clip.vision.spatial_merge_size": _merge(inputs)}


def _row(sizes: Sizes) -> Order:
    """One row of the embeddings."""
    width = sizes.named["text"]
    return strided((width,), (1,), sizes.named["break_row"] * width)


def _biased(config: Config, sizes: Sizes, number: int) -> bool:
    return bool(sizes.named["bias"])


_WHOLE = (
    PATCHES,
    Slot("v.pre_ln.weight", "width"),
    Slot("v.token_embd.img_break", "text", source="vocabulary text", order=_row),
    Slot("mm.1.weight", "text width"),
    Slot("mm.1.bias", "text", only=_biased),
    Slot("mm.2.weight", "text text"),
    Slot("mm.2.bias", "text", only=_biased),
)
_BLOCK = block(bias=False, norm_bias=False, gated=True, mlp_bias=False, heads=True)
_PROJECTION = "multi_modal_projector"
_EMBEDDINGS = "language_model.embed_tokens.weight"
_PARTS = {
    **block_names(
        ln1="attention_norm",
        ln2="ffn_norm",
        attn_q="attention.q_proj",
        attn_k="attention.k_proj",
        attn_v="attention.v_proj",
        attn_out="attention.o_proj",
        ffn_gate="feed_forward.gate_proj",
        ffn_up="feed_forward.up_proj",
        ffn_down="feed_forward.down_proj",
    ),
    "vision_tower.patch_conv.weight": ("v.patch_embd.weight",),
    "vision_tower.ln_pre.weight": ("v.pre_ln.weight",),
    _EMBEDDINGS: ("v.token_embd.img_break",),
    **module(f"{_PROJECTION}.linear_1", "mm.1"),
    **module(f"{_PROJECTION}.linear_2", "mm.2"),
}
_RENAMES = (
    *TOWER,
    ("model.language_model.", "language_model."),
    ("language_model.model.", "language_model."),
)
_PREFIXES = ("vision_tower.", f"{_PROJECTION}.", _EMBEDDINGS)

ROWS = (
    Projector(
        "Pixtral",
        ("llava",),
        ("LlavaForConditionalGeneration",),
        "pixtral",
        _CONFIG,
        _WHOLE,
        _BLOCK,
        _PARTS,
        _RENAMES,
        _PREFIXES,
        _sizes,
        pixtral_keys,
        towers=("pixtral",),
    ),
    Projector(
        "Mistral 3",
        ("mistral3",),
        ("Mistral3ForConditionalGeneration",),
        "pixtral",
        _CONFIG,
        (
            *_WHOLE,
            Slot("mm.input_norm.weight", "width"),
            Slot("mm.patch_merger.weight", "width merged"),
        ),
        _BLOCK,
        {
            **_PARTS,
            f"{_PROJECTION}.norm.weight": ("mm.input_norm.weight",),
            f"{_PROJECTION}.patch_merger.merging_layer.weight": ("mm.patch_merger.weight",),
        },
        _RENAMES,
        _PREFIXES,
        _sizes,
        mistral3_keys,
        towers=("pixtral",),
    ),
)
