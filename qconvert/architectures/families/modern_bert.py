"""ModernBERT: an encoder with rotary positions, in which most layers look at tokens nearby."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    LAYER_OBJECTS_OR_NULL,
    TEXT,
    TEXTS_OR_NULL,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.bert import UNUSED_HEAD
from qconvert.architectures.families.heads import label_keys, labels, with_labels
from qconvert.architectures.families.keys import (
    FULL,
    GELU,
    MAX_BLOCKS,
    SILU,
    Keys,
    Sizes,
    common_keys,
    layer_types,
    plain_sizes,
    window_keys,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.rope import Rope, Scalings, read_rope_by_layer

_EVERY = "global_attn_every_n_layers"
_CONFIG = (
    ConfigClass(
        "ModernBertConfig",
        "modernbert",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        MappingProxyType(
            {
                "vocab_size": (INT, 50_368),
                "hidden_size": (INT, 768),
                "intermediate_size": (INT, 1152),
                "num_hidden_layers": (INT, 22),
                "num_attention_heads": (INT, 12),
                "hidden_activation": (TEXT, "gelu"),
                "max_position_embeddings": (INT, 8192),
                "norm_eps": (FLOAT, 1e-5),
                "norm_bias": (BOOL, False),
                "attention_bias": (BOOL, False),
                "mlp_bias": (BOOL, False),
                "layer_types": (TEXTS_OR_NULL, None),
                "rope_parameters": (LAYER_OBJECTS_OR_NULL, None),
                "local_attention": (INT, 128),
                "tie_word_embeddings": (BOOL, True),
            }
        ),
        (
            "initializer_range", "initializer_cutoff_factor", "attention_dropout",
            "embedding_dropout", "mlp_dropout", "decoder_bias", "classifier_pooling",
            "classifier_dropout", "classifier_bias", "classifier_activation",
            "deterministic_flash_attn", "sparse_prediction", "sparse_pred_ignore_index",
            "cls_token_id", "sep_token_id", *TOKENS,
        ),
        (_EVERY, "global_rope_theta", "local_rope_theta", "rope_scaling", "per_layer_config"),
        harmless=MappingProxyType(
            {
                "layer_norm_eps": ANY,
                "position_embedding_type": ANY,
                "reference_compile": ANY,
                "repad_logits_with_grad": ANY,
            }
        ),
        theta=160_000.0,
        divides=True,
    ),
)  # fmt: skip
_OF_HEAD = ("classifier_pooling", "classifier_bias", "classifier_activation")
_HEAD_CONFIG = with_labels(_CONFIG[0], "ModernBertForSequenceClassification")
CONFIGS = (*_CONFIG, replace(_HEAD_CONFIG, beside=(*_HEAD_CONFIG.beside, *_OF_HEAD)))
_POOLING = {"mean": 1, "cls": 2}  # llama.h's llama_pooling_type


def modern_bert_sizes(config: Config) -> Sizes:
    sizes = plain_sizes(config, grouped=False)
    sizes.named["fused"] = 3 * sizes.named["width"]
    return sizes


def modern_bert_keys(config: Config, sizes: Sizes) -> Keys:
    for name in ("norm_bias", "attention_bias", "mlp_bias"):
        if config.flag(name):
            raise config.unlike(name, "false")
    every = config.get(_EVERY, 3)
    if type(every) is not int or not 0 < every <= MAX_BLOCKS:
        raise config.wrong(_EVERY, f"an integer from 1 to {MAX_BLOCKS}")
    found = common_keys(config, sizes) | {
        "attention.layer_norm_epsilon": config.number("norm_eps", zero=True),
        "attention.causal": False,
        "vocab_size": sizes.named["vocabulary"],
    }
    sliding = layer_types(config, sizes, [bool(i % every) for i in range(sizes.blocks)])
    if all(sliding):  # llama.cpp ends its process
        raise config.unlike("layer_types", f"'{FULL}' for one layer at least")
    if any(sliding):
        # as many tokens to either side as half of it, in both programs
        found |= window_keys(config, sliding, "local_attention")
    if config.get("hidden_activation") in SILU:
        found["hidden_activation"] = "silu"
    return found


def modern_bert_classifier_sizes(config: Config) -> Sizes:
    sizes = modern_bert_sizes(config)
    sizes.named["labels"] = len(labels(config))
    return sizes


def modern_bert_classifier_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("classifier_bias", (False,), False)
    config.require("classifier_activation", GELU, "gelu")
    config.require("classifier_pooling", tuple(_POOLING), "cls")
    pooling = _POOLING[config.get("classifier_pooling", "cls")]
    keys = modern_bert_keys(config, sizes) | label_keys(config)
    return keys | {"classifier.pooling_type": pooling}


def modern_bert_rope(config: Config, sizes: Sizes) -> Rope:
    """Rotary positions, which no kind of layer has scaled."""
    if config.stated("rope_scaling") is not None:
        raise config.unlike("rope_scaling", "null")
    return read_rope_by_layer(
        config, sizes.head_dim, Scalings(("default",)), "local_rope_theta", "global_rope_theta"
    )


def _not_first(config: Config, sizes: Sizes, block: int) -> bool:
    return block > 0


_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("token_embd_norm.weight", "width"),
    Slot("output_norm.weight", "width"),
)
_BLOCK = (
    Slot("attn_norm.weight", "width", only=_not_first),
    Slot("attn_qkv.weight", "fused width"),
    Slot("attn_output.weight", "width width"),
    Slot("ffn_norm.weight", "width"),
    Slot("ffn_up.weight", "gate_up width"),
    Slot("ffn_down.weight", "width inner"),
)

ROWS = (
    Family(
        "ModernBERT (encoders)",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        "modern-bert",
        _WHOLE,
        _BLOCK,
        modern_bert_keys,
        modern_bert_sizes,
        modern_bert_rope,
        (*GELU, *SILU),
        renames=(("model.", ""),),
        dropped=(("head.", UNUSED_HEAD), ("decoder.", UNUSED_HEAD)),
        tied=True,
    ),
    Family(
        "ModernBERT with a classification head (rerankers)",
        ("ModernBertForSequenceClassification",),
        "modern-bert",
        (
            *_WHOLE,
            Slot("cls.weight", "width width"),
            Slot("cls.norm.weight", "width"),
            Slot("cls.output.weight", "labels width"),
            Slot("cls.output.bias", "labels"),
        ),
        _BLOCK,
        modern_bert_classifier_keys,
        modern_bert_classifier_sizes,
        modern_bert_rope,
        (*GELU, *SILU),
        renames=(
            ("model.", ""),
            ("classifier.weight", "classifier.out_proj.weight"),
            ("classifier.bias", "classifier.out_proj.bias"),
        ),
        tied=True,
    ),
)
