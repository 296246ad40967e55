"""SmolLM 3."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    INTS_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    FULL,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    layer_types,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import GATED, NORMS, WHOLE, attention
from qconvert.architectures.rope import PLAIN

CONFIGS = (
    ConfigClass(
        "SmolLM3Config",
        "smollm3",
        ("SmolLM3ForCausalLM",),
        decoder_fields(
            (128_256, 2048, 11_008, 36, 16),
            (INT_OR_NULL, 4),
            32_768,
            tied=True,
            use_sliding_window=(BOOL, False),
            sliding_window=(INT_OR_NULL, None),
            no_rope_layers=(INTS_OR_NULL, None),
            no_rope_layer_interval=(INT, 4),
            layer_types=(TEXTS_OR_NULL, None),
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
        ),
        TRAINING,
        (*DECODER, "head_dim"),
        harmless=MappingProxyType({"max_window_layers": (0, 28), "pretraining_tp": (1, 2)}),
        theta=2_000_000.0,
    ),
)

_STEP = 4  # of llama.cpp's layers without rotary positions


def smollm3_keys(config: Config, sizes: Sizes) -> Keys:
    for bias in ("attention_bias", "mlp_bias"):
        config.require(bias, (False,))
    rotated = config.get("no_rope_layers")
    usual = every_nth_full(sizes, _STEP)
    if rotated is not None and [bool(r) for r in rotated[: sizes.blocks]] != usual:
        raise config.unlike("no_rope_layers", f"0 for each {_STEP}th layer, 1 for the others")
    if rotated is None and every_nth_full(sizes, config.count("no_rope_layer_interval")) != usual:
        raise config.unlike("no_rope_layer_interval", str(_STEP))
    if config.flag("use_sliding_window") and config.optional_count("sliding_window"):
        raise config.unlike("use_sliding_window", "false")
    if any(layer_types(config, sizes, [])):
        raise config.unlike("layer_types", f"'{FULL}'")
    return decoder_keys(config, sizes)


ROWS = (
    Family(
        "SmolLM 3",
        ("SmolLM3ForCausalLM",),
        "smollm3",
        WHOLE,
        (*NORMS, *attention(heads=True, bias=False), *GATED),
        smollm3_keys,
        plain_sizes,
        rotary(PLAIN),
        SILU,
    ),
)
