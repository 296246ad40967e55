"""Blocks of vision transformers, sizes and keys that projectors share."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import GELU, MAX_BLOCKS, SILU, Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.mapped import Locate
from qconvert.architectures.vision.row import Inputs
from qconvert.errors import FormatError

CHANNELS = 3
QUICK_GELU = "quick_gelu"
MAX_IMAGE = 1 << 14  # pixels of a side
PATCHES = Slot("v.patch_embd.weight", "width 3 patch patch")
PATCH_BIAS = Slot("v.patch_embd.bias", "width")
POSITIONS = Slot("v.position_embd.weight", "positions width")


def _class_last(sizes: Sizes) -> Locate:
    """Rows of positions in the order of llama.cpp's graphs, which put the class token behind the
    patches; transformers has it before them.
    """
    return lambda rows: (rows + 1) % sizes.named["positions"]


# Of towers whose class token comes first in transformers. llama.cpp's own converter leaves the rows
# as they are, and every patch gets the position of the one before it.
POSITIONS_AFTER_CLASS = Slot("v.position_embd.weight", "positions width", rows=_class_last)
POST_NORM = (Slot("v.post_ln.weight", "width"), Slot("v.post_ln.bias", "width"))

Parts = dict[str, tuple[str, ...]]


def linear(name: str, shape: str, *, bias: bool | str = True, heads: bool = False) -> list[Slot]:
    """A matrix of each block, with a bias always, never, or where a field says so."""
    found = [Slot(f"v.blk.{{}}.{name}.weight", shape, heads=heads)]
    if bias:
        flag = bias if isinstance(bias, str) else None
        found.append(Slot(f"v.blk.{{}}.{name}.bias", shape.split()[0], heads=heads, flag=flag))
    return found


def block(
    *,
    bias: bool | str = True,
    out_bias: bool | str | None = None,
    norm_bias: bool = True,
    gated: bool = False,
    mlp_bias: bool = True,
    heads: bool = False,
    key: str = "width",
    query: str = "width",
) -> tuple[Slot, ...]:
    """A block of attention and two or three matrices.

    Args:
        bias: of queries, keys and values: always, never, or where a field says so.
        out_bias: of the attention's output; None: likewise.
        norm_bias: whether norms have one: they take the mean away then.
        gated: whether a third matrix gates.
        mlp_bias: of the matrices after the attention.
        heads: whether rows of queries and keys are to be interleaved.
        key, query: dimensions of keys and values, and of queries.
    """
    norm = ["weight", "bias"] if norm_bias else ["weight"]
    found = [Slot(f"v.blk.{{}}.ln{i}.{kind}", "width") for i in (1, 2) for kind in norm]
    found += linear("attn_q", f"{query} width", bias=bias, heads=heads)
    found += linear("attn_k", f"{key} width", bias=bias, heads=heads)
    found += linear("attn_v", f"{key} width", bias=bias)
    found += linear("attn_out", f"width {query}", bias=bias if out_bias is None else out_bias)
    for name in ("ffn_gate", "ffn_up") if gated else ("ffn_up",):
        found += linear(name, "inner width", bias=mlp_bias)
    found += linear("ffn_down", "width inner", bias=mlp_bias)
    return tuple(found)


def block_names(**names: str) -> Parts:
    """The parts that a block has by its modules' names.

    Args:
        names: of modules, by what llama.cpp calls their tensors; ``attn_q__attn_k__attn_v`` is one
            that has three equal parts.
    """
    return {
        f"{module}.{kind}": tuple(f"v.blk.{{}}.{slot}.{kind}" for slot in slots.split("__"))
        for slots, module in names.items()
        for kind in ("weight", "bias")
    }


def module(name: str, slot: str) -> Parts:
    """A module outside the blocks."""
    return {f"{name}.{kind}": (f"{slot}.{kind}",) for kind in ("weight", "bias")}


# As CLIP and SigLIP call their modules.
CLIP_NAMES = block_names(
    ln1="layer_norm1",
    ln2="layer_norm2",
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_out="self_attn.out_proj",
    ffn_up="mlp.fc1",
    ffn_down="mlp.fc2",
)
EMBEDDINGS: Parts = {
    **module("vision_tower.embeddings.patch_embedding", "v.patch_embd"),
    "vision_tower.embeddings.position_embedding.weight": ("v.position_embd.weight",),
}
# A tower by whatever name it has in checkpoints, of transformers before and after its version 5.
TOWER = (
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_tower."),
    ("vision_model.", "vision_tower."),
    ("vision_tower.vision_model.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def square(config: Config, name: str, most: int = MAX_IMAGE) -> int:
    """A side, of what may be stated as two equal ones.

    Raises:
        FormatError: it is no such size.
    """
    value = config.get(name)
    sides = list(value) if isinstance(value, list | tuple) else [value]
    if not 1 <= len(sides) <= 2 or any(type(s) is not int or s != sides[0] for s in sides):
        raise config.wrong(name, "one number of pixels, or two that are the same")
    if not 1 <= sides[0] <= most:
        raise config.wrong(name, f"a number of pixels from 1 to {most}")
    return int(sides[0])


def tower_sizes(
    inputs: Inputs,
    *,
    width: str = "hidden_size",
    inner: int | None = None,
    blocks: str = "num_hidden_layers",
    heads: str = "num_attention_heads",
    channels: str = "num_channels",
    head: int | None = None,
    **more: int,
) -> Sizes:
    """Dimensions of a tower.

    Args:
        width, blocks, heads, channels: names of fields.
        inner: the width inside a block; None: ``intermediate_size``.
        head: the width of a head, where it does not follow.
        more: dimensions beside.

    Raises:
        FormatError: they contradict each other.
    """
    config = inputs.tower
    if channels in (config.known.fields if config.known else ()):
        config.require(channels, (CHANNELS,))
    across, count = config.count(width), config.count(heads)
    if (head is None and across % count) or (head or across // count) % 2:
        raise FormatError(
            "heads do not divide as they should",
            path=config.path,
            found=f"{count} heads of a width of {across}",
            wanted="a width that is a multiple of the heads, of an even width each",
            code="ARCH-HEADS",
        )
    return Sizes(
        blocks=config.count(blocks, most=MAX_BLOCKS),
        head_dim=head or across // count,
        named={
            "width": across,
            "inner": config.count("intermediate_size") if inner is None else inner,
            "patch": square(config, "patch_size", 1024),
            "text": inputs.text_width,
            "heads": count,
            **more,
        },
    )


def image_grid(inputs: Inputs) -> tuple[int, int]:
    """The side of an image, and how many patches there are along it.

    Raises:
        FormatError: patches do not fill it.
    """
    config = inputs.tower
    side, patch = square(config, "image_size"), square(config, "patch_size", 1024)
    if side % patch:
        raise config.wrong("image_size", f"a multiple of the patches' {patch} pixels")
    return side, side // patch


def check_grouping(patches: int, factor: int, source: Config, name: str) -> None:
    """Refuse a grid of patches that cannot be taken together by so many along each side.

    Raises:
        FormatError: they do not divide.
    """
    if patches % factor:
        raise source.wrong(name, f"a divisor of the {patches} patches along a side")


def tower_keys(
    inputs: Inputs, sizes: Sizes, *, image: int, eps: float, activation: str | None = None
) -> Keys:
    """Keys that every projector has.

    Args:
        image: side of an image in pixels.
        eps: smallest divisor of norms.
        activation: the field of the tower that names it; None: it is not stated.
    """
    named = sizes.named
    found: Keys = {
        "clip.has_vision_encoder": True,
        "clip.vision.projection_dim": named["text"],
        "clip.vision.image_size": image,
        "clip.vision.patch_size": named["patch"],
        "clip.vision.embedding_length": named["width"],
        "clip.vision.feed_forward_length": named["inner"],
        "clip.vision.block_count": sizes.blocks,
        "clip.vision.attention.head_count": named["heads"],
        "clip.vision.attention.layer_norm_epsilon": eps,
        **inputs.pictures.keys(),
    }
    if activation is not None:
        found |= activation_keys(inputs.tower, activation)
    return found


def activation_keys(config: Config, name: str) -> Keys:
    """Which function follows the first matrix of a block; quick GELU where no key says.

    Raises:
        UnsupportedError: one that llama.cpp has not.
    """
    config.require(name, (*GELU, *SILU, QUICK_GELU))
    if config.get(name) == QUICK_GELU:
        return {}
    return {"clip.use_silu" if config.get(name) in SILU else "clip.use_gelu": True}


def unscaled_rotation(config: Config, theta: float) -> None:
    """Refuse rotary positions with another base than the constant that llama.cpp has, or stretched.

    Raises:
        UnsupportedError: the tower's ``rope_parameters`` ask for such.
    """
    stated = config.get("rope_parameters")
    wanted = f"rope_type 'default', rope_theta {theta:g}"
    if stated is None:
        return
    kind, base = stated.get("rope_type", "default"), stated.get("rope_theta", theta)
    other = set(stated) - {"rope_type", "rope_theta", "type"}
    if kind not in ("default", "axial") or base != theta or other:
        raise config.unlike("rope_parameters", wanted)
