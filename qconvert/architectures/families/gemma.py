"""Gemma 1, 2 and 3, and the encoder made of the latter."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT_OR_NULL,
    INT,
    INT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    FULL,
    GELU,
    MAX_BLOCKS,
    NO_CAP,
    SLIDING,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    layer_types,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    GATED,
    HEAD_NORMS,
    INSIDE,
    NORMS,
    POST_NORMS,
    VISION,
    WHOLE,
    WITHOUT_OUTPUT,
    attention,
)
from qconvert.architectures.rope import PLAIN, Rope, read_rope_by_layer
from qconvert.files.gguf_writer import GgufValue

_GEMMA3_TEXT = ConfigClass(
    "Gemma3TextConfig",
    "gemma3_text",
    ("Gemma3ForCausalLM",),
    decoder_fields(
        (262_208, 2304, 9216, 26, 8),
        (INT, 4),
        131_072,
        tied=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        head_dim=(INT, 256),
        attention_bias=(BOOL, False),
        query_pre_attn_scalar=(INT, 256),
        sliding_window=(INT_OR_NULL, 4096),
        layer_types=(TEXTS_OR_NULL, None),
        final_logit_softcapping=(FLOAT_OR_NULL, None),
        attn_logit_softcapping=(FLOAT_OR_NULL, None),
        use_bidirectional_attention=(BOOL_OR_NULL, False),
    ),
    TRAINING,
    (*DECODER, "sliding_window_pattern", "rope_local_base_freq"),
    # The class stores the pattern under its own name, and never reads it back.
    harmless=MappingProxyType({"_sliding_window_pattern": ANY, "hidden_act": ANY}),
    theta=1_000_000.0,
    divides=True,
)

# Inside a model of text and images transformers does not cap the logits, whatever the field says.
_CAP = "final_logit_softcapping"
_GEMMA3_INSIDE = replace(
    _GEMMA3_TEXT,
    fields=MappingProxyType({n: f for n, f in _GEMMA3_TEXT.fields.items() if n != _CAP}),
    unused=(*TRAINING, _CAP),
)

# No logits are computed of an encoder.
_ENCODER = replace(_GEMMA3_INSIDE, architectures=("Gemma3TextModel",))

CONFIGS = (
    ConfigClass(
        "GemmaConfig",
        "gemma",
        ("GemmaForCausalLM",),
        decoder_fields(
            (256_000, 3072, 24_576, 28, 16),
            (INT, 16),
            8192,
            tied=True,
            activation=("hidden_act", "gelu_pytorch_tanh"),
            head_dim=(INT, 256),
            attention_bias=(BOOL, False),
            use_bidirectional_attention=(BOOL_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
        harmless=MappingProxyType({"hidden_activation": ANY}),
        divides=False,
    ),
    ConfigClass(
        "Gemma2Config",
        "gemma2",
        ("Gemma2ForCausalLM",),
        decoder_fields(
            (256_000, 2304, 9216, 26, 8),
            (INT, 4),
            8192,
            tied=True,
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            head_dim=(INT, 256),
            attention_bias=(BOOL, False),
            query_pre_attn_scalar=(INT, 256),
            sliding_window=(INT_OR_NULL, 4096),
            layer_types=(TEXTS_OR_NULL, None),
            final_logit_softcapping=(FLOAT_OR_NULL, 30.0),
            attn_logit_softcapping=(FLOAT_OR_NULL, 50.0),
            use_bidirectional_attention=(BOOL_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
        harmless=MappingProxyType({"hidden_act": ANY}),
        divides=True,
    ),
    _GEMMA3_TEXT,
    _ENCODER,
    ConfigClass(
        "Gemma3Config",
        "gemma3",
        ("Gemma3ForConditionalGeneration",),
        MappingProxyType({}),
        (
            "text_config", "vision_config", "mm_tokens_per_image", "boi_token_index",
            "eoi_token_index", "image_token_index", "initializer_range", "tie_word_embeddings",
        ),
        ("per_layer_config",),
        aliases=MappingProxyType(
            {
                "image_token_id": "image_token_index",
                "boi_token_id": "boi_token_index",
                "eoi_token_id": "eoi_token_index",
            }
        ),
        inner=("text_config", _GEMMA3_INSIDE),
    ),
)  # fmt: skip


def _gemma_keys(
    config: Config, sizes: Sizes, largest: int, sliding: list[bool], usual: list[bool]
) -> Keys:
    """Keys of Gemma 2 and 3.

    llama.cpp derives two things from others: the scale of attention from the head width (from the
    width of the model in the one with ``largest`` blocks), and, where no key says it, which layers
    look at a window only.
    """
    heads = config.count("num_attention_heads")
    scale = sizes.named["width"] // heads if sizes.blocks == largest else sizes.head_dim
    if config.count("query_pre_attn_scalar") != scale:
        raise config.unlike("query_pre_attn_scalar", str(scale))
    found = decoder_keys(config, sizes)
    window = config.count("sliding_window")  # transformers wants one, be it for no layer
    if any(sliding):
        found["attention.sliding_window"] = window
        if sliding != usual:
            found["attention.sliding_window_pattern"] = GgufValue("BOOL", sliding)
    return found


def _causal(config: Config) -> None:
    if config.flag("use_bidirectional_attention"):
        raise config.unlike("use_bidirectional_attention", "false")


def gemma_keys(config: Config, sizes: Sizes) -> Keys:
    _causal(config)
    config.require("attention_bias", (False,))
    return decoder_keys(config, sizes)


def gemma2_keys(config: Config, sizes: Sizes) -> Keys:
    _causal(config)
    if config.get("attn_logit_softcapping") is None:  # llama.cpp always has one for these scores
        raise config.unlike("attn_logit_softcapping", "a number")
    capped = config.get("final_logit_softcapping") is not None
    usual = every_nth_full(sizes, 2)
    sliding = layer_types(config, sizes, usual)
    if not any(sliding):  # llama.cpp ends its process
        raise config.unlike("layer_types", f"'{SLIDING}' for one layer at least")
    return _gemma_keys(config, sizes, 46, sliding, usual) | {
        "attn_logit_softcapping": config.number("attn_logit_softcapping"),
        # llama.cpp takes 30 for an absent one
        "final_logit_softcapping": config.number("final_logit_softcapping") if capped else NO_CAP,
    }


def gemma3_keys(config: Config, sizes: Sizes) -> Keys:
    _causal(config)
    found = _gemma3_keys(config, sizes, 62)
    if config.get("final_logit_softcapping") is not None:
        found["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return found


def gemma3_encoder_keys(config: Config, sizes: Sizes) -> Keys:
    if not config.flag("use_bidirectional_attention"):
        raise config.unlike("use_bidirectional_attention", "true")
    sliding = _gemma3_layers(config, sizes)
    if all(sliding) or not any(sliding):  # llama.cpp ends its process, or wants a window
        raise config.unlike("layer_types", f"'{FULL}' and '{SLIDING}' for one layer at least each")
    # Half of the window to either side, in both programs.
    return _gemma3_keys(config, sizes, 0) | {"attention.causal": False}


def _gemma3_layers(config: Config, sizes: Sizes) -> list[bool]:
    """Which layers look at a window only."""
    pattern = config.get("sliding_window_pattern", 6)
    if type(pattern) is not int or not 0 < abs(pattern) <= MAX_BLOCKS:
        raise config.wrong("sliding_window_pattern", f"an integer from 1 to {MAX_BLOCKS}")
    return layer_types(config, sizes, every_nth_full(sizes, pattern))


def _gemma3_keys(config: Config, sizes: Sizes, largest: int) -> Keys:
    sliding = _gemma3_layers(config, sizes)
    return _gemma_keys(config, sizes, largest, sliding, every_nth_full(sizes, 6))


def gemma3_rope(config: Config, sizes: Sizes) -> Rope:
    return read_rope_by_layer(config, sizes.head_dim)


_BLOCK3 = (*NORMS, *POST_NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *GATED)

ROWS = (
    Family(
        "Gemma",
        ("GemmaForCausalLM",),
        "gemma",
        WITHOUT_OUTPUT,
        (*NORMS, *attention(heads=False, bias=False), *GATED),
        gemma_keys,
        plain_sizes,
        rotary(PLAIN),
        GELU,
        norm_offset=True,
        tied=True,
    ),
    Family(
        "Gemma 2",
        ("Gemma2ForCausalLM",),
        "gemma2",
        WITHOUT_OUTPUT,  # its loader has no other output matrix than the token embedding
        (*NORMS, *POST_NORMS, *attention(heads=False, bias=False), *GATED),
        gemma2_keys,
        plain_sizes,
        rotary(PLAIN),
        GELU,
        norm_offset=True,
        tied=True,
    ),
    Family(
        "Gemma 3 (text)",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3",
        WHOLE,
        _BLOCK3,
        gemma3_keys,
        plain_sizes,
        gemma3_rope,
        GELU,
        norm_offset=True,
        tied=True,
        renames=INSIDE,
        dropped=VISION,
    ),
    Family(
        "EmbeddingGemma (encoder)",
        ("Gemma3TextModel",),
        "gemma-embedding",
        WITHOUT_OUTPUT,
        _BLOCK3,
        gemma3_encoder_keys,
        plain_sizes,
        gemma3_rope,
        GELU,
        norm_offset=True,
        tied=True,
        dense=True,
    ),
)
