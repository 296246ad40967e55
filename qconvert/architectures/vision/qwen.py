"""Towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, two pictures of a film at once.

A film's kernels become two, one for each picture; of an image both get the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    INT,
    INT_OR_INTS,
    INTS,
    OBJECT_OR_NULL,
    TEXT,
    ConfigClass,
)
from qconvert.architectures.families.keys import SILU, Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.mapped import Order, strided
from qconvert.architectures.vision.row import Inputs, Projector
from qconvert.architectures.vision.towers import (
    PATCH_BIAS,
    POSITIONS,
    POST_NORM,
    QUICK_GELU,
    block,
    block_names,
    linear,
    module,
    square,
    tower_keys,
    tower_sizes,
    unscaled_rotation,
)
from qconvert.files.gguf_writer import GgufValue

_FILM = 2  # pictures that a kernel spans
_MERGE = 2  # patches along a side that become one token: llama.cpp's graphs have the number
_EPSILON = 1e-6  # transformers' classes have it, and no field
_THETA = 10_000.0
_WINDOW = 112  # pixels; llama.cpp has it where no key says it
_USUAL_SIDE = 560  # nothing is computed from it: images keep their size

_FIELDS = {
    "depth": (INT, 32),
    "num_heads": (INT, 16),
    "in_channels": (INT, 3),
    "patch_size": (INT_OR_INTS, 14),
    "spatial_merge_size": (INT, _MERGE),
    "temporal_patch_size": (INT_OR_INTS, _FILM),
    "rope_parameters": (OBJECT_OR_NULL, None),
}
_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}
# Older names, of which transformers reads none.
_HARMLESS = {"in_chans": (3,), "spatial_patch_size": ANY, "image_size": ANY}
_QWEN2 = ConfigClass(
    "Qwen2VLVisionConfig",
    "qwen2_vl_vision",
    (),
    {
        **_FIELDS,
        "embed_dim": (INT, 1280),
        "hidden_size": (INT, 3584),
        "hidden_act": (TEXT, QUICK_GELU),
        "mlp_ratio": (INT, 4),
    },
    ("initializer_range",),
    aliases=_ALIASES,
    harmless=_HARMLESS,
)
_QWEN25 = ConfigClass(
    "Qwen2_5_VLVisionConfig",
    "qwen2_5_vl_vision",
    (),
    {
        **_FIELDS,
        "hidden_size": (INT, 3584),
        "hidden_act": (TEXT, "silu"),
        "intermediate_size": (INT, 3420),
        "window_size": (INT, _WINDOW),
        "out_hidden_size": (INT, 3584),
        "fullatt_block_indexes": (INTS, (7, 15, 23, 31)),
    },
    ("initializer_range", "tokens_per_second"),
    aliases=_ALIASES,
    harmless=_HARMLESS,
)
_QWEN3 = ConfigClass(
    "Qwen3VLVisionConfig",
    "qwen3_vl_vision",
    (),
    {
        **_FIELDS,
        "depth": (INT, 27),
        "patch_size": (INT_OR_INTS, 16),
        "hidden_size": (INT, 1152),
        "hidden_act": (TEXT, "gelu_pytorch_tanh"),
        "intermediate_size": (INT, 4304),
        "out_hidden_size": (INT, 3584),
        "num_position_embeddings": (INT, 2304),
        "deepstack_visual_indexes": (INTS, (8, 16, 24)),
    },
    ("initializer_range",),
    aliases=_ALIASES,
    harmless=_HARMLESS,
)

# Only the last block's outputs go into the language model.
_QWEN35 = replace(
    _QWEN3,
    name="Qwen3_5VisionConfig",
    model_type="qwen3_5_vision",
    fields={n: f for n, f in _QWEN3.fields.items() if n != "deepstack_visual_indexes"},
    harmless={**_HARMLESS, "deepstack_visual_indexes": ([],)},
)


def _picture(number: int) -> Callable[[Sizes], Order]:
    """Kernels of one of two pictures, out of those of both."""

    def order(sizes: Sizes) -> Order:
        named = sizes.named
        area = named["patch"] ** 2
        return strided((named["width"] * 3, area), (_FILM * area, 1), number * area)

    return order


_KERNELS = tuple(
    Slot(
        f"v.patch_embd.weight{suffix}",
        "width 3 patch patch",
        source=f"width 3 {_FILM} patch patch",
        order=_picture(number),
    )
    for number, suffix in enumerate(("", ".1"))
)
_KERNEL_PARTS = {"visual.patch_embed.proj.weight": tuple(slot.name for slot in _KERNELS)}
_RENAMES = (
    ("model.visual.", "visual."),
    ("thinker.visual.", "visual."),
    ("visual.blocks.", "visual.layers."),
)


def _checked(inputs: Inputs, width: str = "out_hidden_size") -> None:
    """Refuse what llama.cpp's graphs have as constants otherwise."""
    tower = inputs.tower
    tower.require("spatial_merge_size", (_MERGE,))
    tower.require("temporal_patch_size", (_FILM,))
    unscaled_rotation(tower, _THETA)
    pictures = inputs.pictures.fields
    pictures.require("merge_size", (_MERGE, None))
    pictures.require("temporal_patch_size", (_FILM, None))
    pictures.require("patch_size", (square(tower, "patch_size"), None))
    if tower.count(width) != inputs.text_width:
        raise tower.unlike(width, f"the language model's width, {inputs.text_width}")


def _sizes(inputs: Inputs, width: str, inner: int, **more: int) -> Sizes:
    found = tower_sizes(
        inputs, width=width, inner=inner, blocks="depth", heads="num_heads",
        channels="in_channels", **more,
    )  # fmt: skip
    if found.head_dim % 4:
        raise inputs.tower.wrong("num_heads", "heads of a width that four divides")
    found.named["merged"] = found.named["width"] * _MERGE**2
    return found


def _qwen2_sizes(inputs: Inputs) -> Sizes:
    tower = inputs.tower
    return _sizes(inputs, "embed_dim", tower.count("embed_dim") * tower.count("mlp_ratio"))


def qwen2_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    _checked(inputs, "hidden_size")
    inputs.tower.require("hidden_act", (QUICK_GELU,))
    return tower_keys(inputs, sizes, image=_USUAL_SIDE, eps=_EPSILON, activation="hidden_act")


def _qwen25_sizes(inputs: Inputs) -> Sizes:
    return _sizes(inputs, "hidden_size", inputs.tower.count("intermediate_size"))


def qwen25_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    """Blocks look at windows, but for each so manieth."""
    tower = inputs.tower
    _checked(inputs)
    tower.require("window_size", (_WINDOW,))
    tower.require("hidden_act", SILU)
    full = list(tower.get("fullatt_block_indexes"))
    step = full[0] + 1 if full and type(full[0]) is int else 0
    if not 1 <= step <= sizes.blocks or full != list(range(step - 1, sizes.blocks, step)):
        raise tower.unlike("fullatt_block_indexes", f"each so manieth of {sizes.blocks} blocks")
    return {
        **tower_keys(inputs, sizes, image=_USUAL_SIDE, eps=_EPSILON, activation="hidden_act"),
        "clip.vision.n_wa_pattern": step,
    }


def _qwen3_sizes(inputs: Inputs) -> Sizes:
    count = inputs.tower.count("num_position_embeddings")
    if math.isqrt(count) ** 2 != count:
        raise inputs.tower.wrong("num_position_embeddings", "a square")
    inner = inputs.tower.count("intermediate_size")
    return _sizes(inputs, "hidden_size", inner, positions=count)


def _deep(config: Config, blocks: int) -> list[int]:
    """Blocks whose outputs go into the language model's first layers, besides the last's."""
    found = list(config.get("deepstack_visual_indexes", ()))
    if any(type(i) is not int or not 0 <= i < blocks for i in found) or found != sorted(set(found)):
        raise config.wrong("deepstack_visual_indexes", f"some of {blocks} blocks, in their order")
    return found


def qwen3_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    tower = inputs.tower
    _checked(inputs)
    tower.require("hidden_act", ("gelu_pytorch_tanh",))
    deep = _deep(tower, sizes.blocks)
    side = math.isqrt(sizes.named["positions"]) * sizes.named["patch"]
    return {
        **tower_keys(inputs, sizes, image=side, eps=_EPSILON, activation="hidden_act"),
        "clip.vision.spatial_merge_size": _MERGE,
        "clip.vision.is_deepstack_layers": GgufValue(
            "BOOL", [i in deep for i in range(sizes.blocks)]
        ),
    }


_MERGER = (
    Slot("mm.0.weight", "merged merged"),
    Slot("mm.0.bias", "merged"),
    Slot("mm.2.weight", "text merged"),
    Slot("mm.2.bias", "text"),
)
_MERGER_PARTS = {
    **module("visual.merger.ln_q", "v.post_ln"),
    **module("visual.merger.mlp.0", "mm.0"),
    **module("visual.merger.mlp.2", "mm.2"),
    **_KERNEL_PARTS,
}
_ATTENTION = {"ln1": "norm1", "ln2": "norm2", "attn_out": "attn.proj"}
_CUT = {**_ATTENTION, "attn_q__attn_k__attn_v": "attn.qkv"}


def _is_deep(config: Config, sizes: Sizes, number: int) -> bool:
    return number in _deep(config, sizes.blocks)


def _fused() -> tuple[Slot, ...]:
    """A block whose queries, keys and values stay one matrix."""
    apart = ("attn_q.", "attn_k.", "attn_v.")
    found = [slot for slot in block() if not any(f".{name}" in slot.name for name in apart)]
    found += linear("attn_qkv", "fused width")
    for name, rows, columns in (("fc1", "merged", "merged"), ("fc2", "text", "merged")):
        found += [
            Slot(f"v.deepstack.{{}}.{name}.weight", f"{rows} {columns}", only=_is_deep),
            Slot(f"v.deepstack.{{}}.{name}.bias", rows, only=_is_deep),
        ]
    found += [
        Slot(f"v.deepstack.{{}}.norm.{kind}", "merged", only=_is_deep)
        for kind in ("weight", "bias")
    ]
    return tuple(found)


def _deep_parts(inputs: Inputs, sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """Mergers of blocks, which checkpoints count by themselves."""
    found: dict[str, tuple[str, ...]] = {}
    for place, number in enumerate(_deep(inputs.tower, sizes.blocks)):
        start = f"visual.deepstack_merger_list.{place}"
        for ours, name in (("norm", "norm"), ("fc1", "linear_fc1"), ("fc2", "linear_fc2")):
            found |= module(f"{start}.{name}", f"v.deepstack.{number}.{ours}")
    return found


def _qwen3_fused(inputs: Inputs) -> Sizes:
    found = _qwen3_sizes(inputs)
    found.named["fused"] = 3 * found.named["width"]
    return found


ROWS = (
    Projector(
        "Qwen2-VL",
        ("qwen2_vl",),
        ("Qwen2VLForConditionalGeneration",),
        "qwen2vl_merger",
        _QWEN2,
        (*_KERNELS, *POST_NORM, *_MERGER),
        block(),
        {**block_names(**_CUT, ffn_up="mlp.fc1", ffn_down="mlp.fc2"), **_MERGER_PARTS},
        _RENAMES,
        ("visual.",),
        _qwen2_sizes,
        qwen2_keys,
    ),
    Projector(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        ("Qwen2_5_VLForConditionalGeneration",),
        "qwen2.5vl_merger",
        _QWEN25,
        (*_KERNELS, POST_NORM[0], *_MERGER),
        block(norm_bias=False, gated=True),
        {
            **block_names(
                **_CUT, ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"
            ),
            **_MERGER_PARTS,
        },
        _RENAMES,
        ("visual.",),
        _qwen25_sizes,
        qwen25_keys,
    ),
    *(
        Projector(
            name,
            model_types,
            classes,
            "qwen3vl_merger",
            config,
            (*_KERNELS, PATCH_BIAS, POSITIONS, *POST_NORM, *_MERGER),
            _fused(),
            {
                **block_names(
                    **_ATTENTION,
                    attn_qkv="attn.qkv",
                    ffn_up="mlp.linear_fc1",
                    ffn_down="mlp.linear_fc2",
                ),
                **module("visual.merger.norm", "v.post_ln"),
                **module("visual.merger.linear_fc1", "mm.0"),
                **module("visual.merger.linear_fc2", "mm.2"),
                **_KERNEL_PARTS,
                "visual.patch_embed.proj.bias": ("v.patch_embd.bias",),
                "visual.pos_embed.weight": ("v.position_embd.weight",),
            },
            _RENAMES,
            ("visual.",),
            _qwen3_fused,
            qwen3_keys,
            more_parts=_deep_parts,
        )
        for name, model_types, classes, config in (
            (
                "Qwen3-VL",
                ("qwen3_vl", "qwen3_vl_moe"),
                ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"),
                _QWEN3,
            ),
            (
                "Qwen 3.5",
                ("qwen3_5", "qwen3_5_moe"),
                ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
                _QWEN35,
            ),
        )
    ),
)
