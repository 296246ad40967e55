"""Gemma 4's tower: images of any size, positions looked up for each axis."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    BOOL_OR_NULL,
    FLOAT,
    INT,
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
    tower_keys,
    tower_sizes,
    unscaled_rotation,
)

_CONFIG = ConfigClass(
    "Gemma4VisionConfig",
    "gemma4_vision",
    (),
    {
        "hidden_size": (INT, 768),
        "intermediate_size": (INT, 3072),
        "num_hidden_layers": (INT, 16),
        "num_attention_heads": (INT, 12),
        "num_key_value_heads": (INT, 12),
        "head_dim": (INT, 64),
        "hidden_activation": (TEXT, "gelu_pytorch_tanh"),
        "rms_norm_eps": (FLOAT, 1e-6),
        "attention_bias": (BOOL_OR_NULL, False),
        "rope_parameters": (OBJECT_OR_NULL, None),
        "pooling_kernel_size": (INT, 3),
        "patch_size": (INT, 16),
        "position_embedding_size": (INT, 10240),
        "use_clipped_linears": (BOOL, False),
        "standardize": (BOOL, False),
    },
    ("attention_dropout", "initializer_range", "max_position_embeddings"),
)
_USUAL_SIDE = 224  # nothing is computed from it: images keep their size
_USUAL_POOL = 3
_THETA = 100.0
_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def _sizes(inputs: Inputs) -> Sizes:
    tower = inputs.tower
    found = tower_sizes(
        inputs,
        channels="",
        positions=tower.count("position_embedding_size"),
    )
    if tower.count("head_dim") != found.head_dim:
        raise tower.unlike("head_dim", "hidden_size / num_attention_heads")
    if tower.count("num_key_value_heads") != found.named["heads"]:
        raise tower.unlike("num_key_value_heads", "num_attention_heads")
    found.named["head"] = found.head_dim
    found.named["pixels"] = 3 * found.named["patch"] ** 2
    return found


def gemma4_keys(inputs: Inputs, sizes: Sizes) -> Keys:
    tower = inputs.tower
    tower.require("hidden_activation", ("gelu_pytorch_tanh",))
    tower.require("attention_bias", (False, None))
    unscaled_rotation(tower, _THETA)
    eps = tower.number("rms_norm_eps")
    # llama.cpp's own converter does not state the activation, and another one is computed
    found = tower_keys(inputs, sizes, image=_USUAL_SIDE, eps=eps, activation="hidden_activation")
    pool = tower.count("pooling_kernel_size")
    if pool != _USUAL_POOL:
        found["clip.vision.projector.scale_factor"] = pool
    return found


def _pixels(sizes: Sizes) -> Order:
    """Kernels colour by colour; checkpoints have the colours of each pixel together."""
    named = sizes.named
    patch = named["patch"]
    return strided(
        (named["width"], 3, patch * patch), (named["pixels"], 1, 3),
    )  # fmt: skip


def _standardizes(config: Config, sizes: Sizes, number: int) -> bool:
    return config.flag("standardize")


ROWS = (
    Projector(
        "Gemma 4",
        ("gemma4",),
        ("Gemma4ForConditionalGeneration",),
        "gemma4v",
        _CONFIG,
        (
            Slot(PATCHES.name, PATCHES.shape, source="width pixels", order=_pixels),
            Slot("v.position_embd.weight", "2 positions width"),
            Slot("v.std_bias", "width", only=_standardizes),
            Slot("v.std_scale", "width", only=_standardizes),
            Slot("mm.input_projection.weight", "text width"),
        ),
        (
            *block(bias=False, norm_bias=False, gated=True, mlp_bias=False),
            Slot("v.blk.{}.attn_q_norm.weight", "head"),
            Slot("v.blk.{}.attn_k_norm.weight", "head"),
            Slot("v.blk.{}.attn_post_norm.weight", "width"),
            Slot("v.blk.{}.ffn_post_norm.weight", "width"),
            *(
                Slot(f"v.blk.{{}}.{name}.{bound}", "1", source="", flag="use_clipped_linears")
                for name in _LINEARS
                for bound in _BOUNDS
            ),
        ),
        {
            **block_names(
                ln1="input_layernorm",
                ln2="pre_feedforward_layernorm",
                attn_post_norm="post_attention_layernorm",
                ffn_post_norm="post_feedforward_layernorm",
                attn_q_norm="self_attn.q_norm",
                attn_k_norm="self_attn.k_norm",
                attn_q="self_attn.q_proj.linear",
                attn_k="self_attn.k_proj.linear",
                attn_v="self_attn.v_proj.linear",
                attn_out="self_attn.o_proj.linear",
                ffn_gate="mlp.gate_proj.linear",
                ffn_up="mlp.up_proj.linear",
                ffn_down="mlp.down_proj.linear",
            ),
            **{
                f"{module}.{bound}": (f"v.blk.{{}}.{name}.{bound}",)
                for name, module in zip(
                    _LINEARS,
                    (
                        *(f"self_attn.{n}_proj" for n in "qkvo"),
                        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
                    ),
                    strict=True,
                )
                for bound in _BOUNDS
            },
            "vision_tower.patch_embedder.input_proj.weight": (PATCHES.name,),
            "vision_tower.patch_embedder.position_embedding_table": ("v.position_embd.weight",),
            "vision_tower.std_bias": ("v.std_bias",),
            "vision_tower.std_scale": ("v.std_scale",),
            "embed_vision.embedding_projection.weight": ("mm.input_projection.weight",),
        },
        (*TOWER, ("model.embed_vision.", "embed_vision.")),
        ("vision_tower.", "embed_vision."),
        _sizes,
        gemma4_keys,
        projector_key="clip.vision.projector_type",
    ),
)
