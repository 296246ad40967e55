"""Tiny models of text and images, one for each kind of projector.

`MODELS` are their configurations, `IMAGES` the sizes of the pictures that are encoded and
`PREPROCESSORS` what lies in preprocessor_config.json. Shared by `make_projectors.py`, which asks
transformers and llama.cpp, and by test_projectors.py, which needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from config_cases import BASES, TOKENIZER, weights
from family_models import NARROW
from safetensors.numpy import save_file
from tiny_models import TOKENIZERS

Fields = dict[str, Any]


def _text(base: Fields, **more: Any) -> Fields:
    return {n: v for n, v in base.items() if n != "architectures"} | more


def _around(kind: str, model_type: str, text: Fields, vision: Fields, **more: Any) -> Fields:
    return {
        "architectures": [kind],
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
        **more,
    }


def _tower(model_type: str, **more: Any) -> Fields:
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,  # fewer, and the converter has no name for mm.2
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        **more,
    }


_QWEN = {"depth": 4, "num_heads": 2, "patch_size": 14, "hidden_size": 64}
_LLAMA, _QWEN2 = BASES["llama"], BASES["qwen2"]
_MROPE = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}

MODELS: dict[str, Fields] = {
    "gemma3": _around(
        "Gemma3ForConditionalGeneration", "gemma3", _text(BASES["gemma3_text"]),
        _tower("siglip_vision_model"), mm_tokens_per_image=4, image_token_index=20,
        boi_token_index=21, eoi_token_index=22, tie_word_embeddings=True,
    ),
    "qwen2_5_vl": _around(
        "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl",
        _text(_QWEN2, model_type="qwen2_5_vl_text", rope_scaling=_MROPE),
        _QWEN | {
            "model_type": "qwen2_5_vl_vision", "intermediate_size": 96, "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    ),
    "qwen2_vl": _around(
        "Qwen2VLForConditionalGeneration", "qwen2_vl",
        _text(_QWEN2, model_type="qwen2_vl_text", rope_scaling=_MROPE),
        _QWEN | {"model_type": "qwen2_vl_vision", "embed_dim": 64, "mlp_ratio": 2, "depth": 3},
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    ),
    "idefics3": _around(
        "Idefics3ForConditionalGeneration", "idefics3", _text(_LLAMA),
        _tower("idefics3_vision"), scale_factor=2, image_token_id=20,
    ),
    "smolvlm": _around(
        "SmolVLMForConditionalGeneration", "smolvlm", _text(_LLAMA),
        _tower("smolvlm_vision"), scale_factor=2, image_token_id=20,
    ),
    "internvl": _around(
        "InternVLForConditionalGeneration", "internvl", _text(_QWEN2),
        _tower(
            "internvl_vision", architectures=["InternVisionModel"], image_size=[56, 56],
            patch_size=[14, 14], attention_bias=True, num_hidden_layers=4,
        ),
        image_token_id=20, downsample_ratio=0.5, image_seq_length=4,
    ),
    "llava": _around(
        "LlavaForConditionalGeneration", "llava", _text(_LLAMA),
        _tower("clip_vision_model", projection_dim=64),
        image_token_index=20, image_seq_length=16, vision_feature_layer=-2,
    ),
    "llava_next": _around(
        "LlavaNextForConditionalGeneration", "llava_next", _text(BASES["mistral"]),
        _tower("clip_vision_model", projection_dim=64),
        image_token_index=20, image_seq_length=16, vision_feature_layer=-2,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    ),
    "pixtral": _around(
        "LlavaForConditionalGeneration", "llava", _text(BASES["mistral"], head_dim=32),
        _tower("pixtral", hidden_act="silu", image_size=112),
        image_token_index=20, image_seq_length=1, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "mistral3": _around(
        "Mistral3ForConditionalGeneration", "mistral3", _text(BASES["mistral"], head_dim=32),
        _tower("pixtral", hidden_act="silu", image_size=112),
        image_token_index=20, vision_feature_layer=-1, spatial_merge_size=2,
    ),
    "qwen3_vl": _around(
        "Qwen3VLForConditionalGeneration", "qwen3_vl",
        _text(
            BASES["qwen3"], model_type="qwen3_vl_text", rms_norm_eps=1e-6,
            rope_scaling={**_MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        ),
        {
            "model_type": "qwen3_vl", "depth": 3, "hidden_size": 64, "intermediate_size": 96,
            "num_heads": 2, "patch_size": 14, "out_hidden_size": 64, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    ),
    "qwen3_vl_moe": _around(
        "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe",
        _text(NARROW["qwen3_vl_moe"]["text_config"], rms_norm_eps=1e-6),
        {
            "model_type": "qwen3_vl_moe", "depth": 3, "hidden_size": 64, "intermediate_size": 96,
            "num_heads": 2, "patch_size": 14, "out_hidden_size": 64, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23,
    ),
    "llama4": _around(
        "Llama4ForConditionalGeneration", "llama4", _text(NARROW["llama4_text"]),
        _tower(
            "llama4_vision_model", intermediate_size=256, vision_output_dim=96,
            projector_input_dim=96, projector_output_dim=96, pixel_shuffle_ratio=0.5,
        ),
        image_token_index=20, boi_token_index=21, eoi_token_index=22,
    ),
    "gemma4": _around(
        "Gemma4ForConditionalGeneration", "gemma4", _text(NARROW["gemma4_text"]),
        {
            "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 32, "patch_size": 4, "position_embedding_size": 32,
            "pooling_kernel_size": 3, "standardize": True, "use_clipped_linears": True,
        },
        image_token_id=20, boi_token_id=21, eoi_token_id=22, tie_word_embeddings=True,
        audio_config=None,
    ),
}  # fmt: skip

# Width and height of what is encoded: of those that take any, more than one window.
IMAGES = {
    **dict.fromkeys(MODELS, (56, 56)),
    "qwen2_5_vl": (168, 140),
    "qwen2_vl": (84, 56),
    "qwen3_vl": (84, 56),
    "qwen3_vl_moe": (84, 56),
    "pixtral": (84, 56),
    "mistral3": (84, 56),
    "gemma4": (36, 24),
}
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PREPROCESSORS: dict[str, Fields] = {
    **dict.fromkeys(MODELS, _CLIP),
    "gemma3": _HALF | {"image_seq_length": 4},
    "idefics3": _HALF | {"size": {"longest_edge": 112}},
    "smolvlm": _HALF | {"size": {"longest_edge": 112}},
    "llama4": _HALF,
    "qwen3_vl": _HALF,
    "qwen3_vl_moe": _HALF,
    "gemma4": {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]},
}
# The token after each row of an image, whose embedding goes into the projector's file.
BREAK = {"pixtral": ("[IMG_BREAK]", 24), "mistral3": ("[IMG_BREAK]", 24)}
# As checkpoints call what transformers 5 saves: beginnings of names, and what stands there instead.
HUB = {
    **dict.fromkeys(
        ("gemma3", "llava", "llava_next"), (("vision_tower.", "vision_tower.vision_model."),)
    ),
    "internvl": (
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ),
}
# Classes whose first or only converter is llama.cpp's old pair of scripts, or none.
WITHOUT_CONVERTER = ("llava", "llava_next")
# Tensors and keys of ours that are not the converter's; formats/gguf.md says why.
OTHERWISE = {
    "qwen2_vl": ("clip.vision.feed_forward_length",),
    "internvl": ("v.position_embd.weight",),
    "gemma4": ("clip.use_gelu",),
    "llama4": ("v.blk.*.ln2.*", "v.blk.*.attn_post_norm.*"),
    "pixtral": ("v.token_embd.img_break",),
    "mistral3": ("v.token_embd.img_break",),
}


def written(name: str, shapes: Mapping[str, tuple[int, ...]], place: Path) -> Path:
    """The directory of a model, with weights that follow from their names.

    Args:
        shapes: of all its tensors.
    """
    place.mkdir(parents=True)
    zero_based = name == "gemma3"  # but for its tower, whose norms are called otherwise
    bounds = {"_min": -1.5, "_max": 1.5}
    tensors = weights({n: s for n, s in shapes.items() if s}, zero_based=zero_based)
    tensors |= {n: np.array(bounds[n[-4:]], np.float32) for n, s in shapes.items() if not s}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    model = MODELS[name]
    kind = model["text_config"]["model_type"].replace("2_5_vl_text", "2").replace("_vl_text", "")
    tokenizer = json.loads(json.dumps(TOKENIZERS[TOKENIZER.get(kind, "sp-llama")]))
    if name in BREAK:
        text, number = BREAK[name]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": number, "content": text, "special": True} | flags)
    for file, content in (
        ("config.json", model),
        ("preprocessor_config.json", PREPROCESSORS[name]),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", {}),
    ):
        (place / file).write_text(json.dumps(content, ensure_ascii=False))
    return place
