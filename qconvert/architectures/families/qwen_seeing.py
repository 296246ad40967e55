"""Language models inside Qwen2-VL, Qwen2.5-VL and Qwen3-VL, the last one with experts too;
``--mmproj`` writes what sees.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    INT,
    INT_OR_NULL,
    INTS_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families import qwen
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.qwen_linear import around
from qconvert.architectures.families.sections import INTERLEAVED, SECTIONS, sectioned
from qconvert.architectures.families.slots import EITHER_EXPERTS, EXPERTS, INSIDE, VISION
from qconvert.architectures.rope import PLAIN

# No field of these classes, but of those around them; published files have it in both places.
_TIED = "tie_word_embeddings"
_HARMLESS = MappingProxyType({_TIED: ANY})


def _fields(found: dict[str, tuple[str, object]]) -> dict[str, tuple[str, object]]:
    return {name: kind for name, kind in found.items() if name != _TIED}


_QWEN2 = ConfigClass(
    "Qwen2VLTextConfig",
    "qwen2_vl_text",
    (),
    _fields(
        decoder_fields(
            (152_064, 8192, 29_568, 80, 64),
            (INT_OR_NULL, 8),
            32_768,
            1e-5,
            use_sliding_window=(BOOL_OR_NULL, False),
            sliding_window=(INT_OR_NULL, 4096),
            max_window_layers=(INT_OR_NULL, 80),
            layer_types=(TEXTS_OR_NULL, None),
        )
    ),
    TRAINING,
    (*DECODER, "head_dim"),
    harmless=_HARMLESS,
    theta=1_000_000.0,
)
_QWEN25 = replace(_QWEN2, name="Qwen2_5_VLTextConfig", model_type="qwen2_5_vl_text")
_TOWER = "vision_config"
_QWEN3 = ConfigClass(
    "Qwen3VLTextConfig",
    "qwen3_vl_text",
    (),
    _fields(
        decoder_fields(
            (151_936, 4096, 22_016, 32, 32),
            (INT_OR_NULL, 32),
            128_000,
            head_dim=(INT, 128),
            attention_bias=(BOOL, False),
        )
    ),
    ("initializer_range", "use_cache", "attention_dropout", "pad_token_id"),
    DECODER,
    harmless=_HARMLESS,
    theta=500_000.0,
    outside=(_TOWER,),
)
# transformers' class with experts has the field of the one around it.
_QWEN3_MOE = ConfigClass(
    "Qwen3VLMoeTextConfig",
    "qwen3_vl_moe_text",
    (),
    decoder_fields(
        (151_936, 2048, 5632, 24, 16),
        (INT, 16),
        128_000,
        tied=True,
        head_dim=(INT_OR_NULL, None),
        attention_bias=(BOOL, False),
        decoder_sparse_step=(INT, 1),
        moe_intermediate_size=(INT, 1408),
        num_experts_per_tok=(INT, 4),
        num_experts=(INT, 60),
        mlp_only_layers=(INTS_OR_NULL, None),
    ),
    (*TRAINING, "output_router_logits", "router_aux_loss_coef"),
    DECODER,
    MappingProxyType({"num_local_experts": "num_experts"}),
    harmless=MappingProxyType({"norm_topk_prob": (True,)}),
    theta=500_000.0,
    outside=(_TOWER,),
)
_QWEN2_VL = "Qwen2VLForConditionalGeneration"
_QWEN25_VL = "Qwen2_5_VLForConditionalGeneration"
_QWEN3_VL = "Qwen3VLForConditionalGeneration"
_QWEN3_VL_MOE = "Qwen3VLMoeForConditionalGeneration"

CONFIGS = (
    replace(around("Qwen2VLConfig", "qwen2_vl", _QWEN2_VL, _QWEN2), flat=True),
    replace(around("Qwen2_5_VLConfig", "qwen2_5_vl", _QWEN25_VL, _QWEN25), flat=True),
    around("Qwen3VLConfig", "qwen3_vl", _QWEN3_VL, _QWEN3),
    around("Qwen3VLMoeConfig", "qwen3_vl_moe", _QWEN3_VL_MOE, _QWEN3_MOE),
)

_LARGEST_EPSILON = 1e-5


def qwen2_keys(config: Config, sizes: Sizes) -> Keys:
    """Keys; llama.cpp's loader reads that of the norms' smallest divisor for others only."""
    if config.number("rms_norm_eps", zero=True) > _LARGEST_EPSILON:
        raise config.unlike("rms_norm_eps", f"at most {_LARGEST_EPSILON}")
    return _BASES["Qwen2"].keys(config, sizes)


def _without_epsilon(config: Config) -> str | None:
    if config.number("rms_norm_eps", zero=True) == 0:
        return None
    return (
        "llama.cpp 0c1e57098 computes norms of this architecture without rms_norm_eps, which the "
        "file has: small activations come out slightly otherwise than in transformers"
    )


_USUAL_DEEP = (8, 16, 24)  # of transformers' class


def deep_keys(config: Config) -> Keys:
    """Outputs of some blocks of the tower go into so many first layers."""
    tower = config.section(_TOWER)
    outside = Config(tower.fields() if tower else {}, config.path, inside=f"{_TOWER}.")
    name = "deepstack_visual_indexes"
    deep = outside.get(name, list(_USUAL_DEEP))
    if not isinstance(deep, list):
        raise outside.wrong(name, "a list of blocks")
    return {"n_deepstack_layers": len(deep)}


def qwen3_keys(config: Config, sizes: Sizes) -> Keys:
    return _BASES["Qwen3"].keys(config, sizes) | deep_keys(config)


def qwen3_moe_keys(config: Config, sizes: Sizes) -> Keys:
    return _SPARSE.keys(config, sizes) | deep_keys(config)


_BASES = {r.name: r for r in qwen.ROWS}
_SPARSE = _BASES["Qwen3 mixture of experts"]
_SPLIT = replace(PLAIN, beside=(SECTIONS,), older={"mrope": "default"})
_TURNS = replace(PLAIN, beside=INTERLEAVED)

ROWS = (
    replace(
        _BASES["Qwen2"],
        name="Qwen2-VL, Qwen2.5-VL (text)",
        classes=(_QWEN2_VL, _QWEN25_VL),
        arch="qwen2vl",
        keys=qwen2_keys,
        rope=sectioned(_SPLIT, (16, 24, 24), interleaved=False),
        renames=INSIDE,
        dropped=VISION,
        said=_without_epsilon,
    ),
    replace(
        _BASES["Qwen3"],
        name="Qwen3-VL (text)",
        classes=(_QWEN3_VL,),
        arch="qwen3vl",
        keys=qwen3_keys,
        rope=sectioned(_TURNS, (24, 20, 20), interleaved=True),
        renames=INSIDE,
        dropped=VISION,
        scores=False,
    ),
    replace(
        _SPARSE,
        name="Qwen3-VL mixture of experts (text)",
        classes=(_QWEN3_VL_MOE,),
        arch="qwen3vlmoe",
        # published matrices of experts are turned round, those that transformers 5 saves are not
        block=(*(s for s in _SPARSE.block if s not in EXPERTS), *EITHER_EXPERTS),
        keys=qwen3_moe_keys,
        rope=sectioned(_TURNS, (24, 20, 20), interleaved=True),
        renames=INSIDE,
        dropped=VISION,
    ),
)
