"""DistilBERT: BERT without types of tokens, and with names of its own."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ANY, BOOL, INT, TEXT, TOKENS, ConfigClass
from qconvert.architectures.families import bert
from qconvert.architectures.families.bert import BERT_WHOLE, UNUSED_HEAD
from qconvert.architectures.families.keys import Keys, Sizes, common_keys, plain_sizes

_NAMES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
_CLASSES = ("DistilBertModel", "DistilBertForMaskedLM")
CONFIGS = (
    ConfigClass(
        "DistilBertConfig",
        "distilbert",
        _CLASSES,
        MappingProxyType(
            {
                "vocab_size": (INT, 30_522),
                "max_position_embeddings": (INT, 512),
                "n_layers": (INT, 6),
                "n_heads": (INT, 12),
                "dim": (INT, 768),
                "hidden_dim": (INT, 3072),
                "activation": (TEXT, "gelu"),
                "tie_word_embeddings": (BOOL, True),
            }
        ),
        (
            *("sinusoidal_pos_embds", "dropout", "attention_dropout", "initializer_range"),
            *("qa_dropout", "seq_classif_dropout", *TOKENS),
        ),
        ("per_layer_config",),
        MappingProxyType(_NAMES),
        harmless=MappingProxyType({"tie_weights_": ANY}),
    ),
)
_EPSILON = 1e-12  # transformers' class has it, and no field


def distilbert_sizes(config: Config) -> Sizes:
    inner = config.count("hidden_dim")
    # llama.cpp wants to know of one type, and needs no tensor of it
    return plain_sizes(config, _NAMES, grouped=False, inner=inner, types=1)


def distilbert_keys(config: Config, sizes: Sizes) -> Keys:
    return common_keys(config, sizes) | {
        "attention.layer_norm_epsilon": _EPSILON,
        "attention.causal": False,
        "vocab_size": sizes.named["vocabulary"],
    }


ROWS = (
    replace(
        next(r for r in bert.ROWS if "BertModel" in r.classes),
        name="DistilBERT",
        classes=_CLASSES,
        whole=tuple(s for s in BERT_WHOLE if s.name != "token_types.weight"),
        keys=distilbert_keys,
        sizes=distilbert_sizes,
        renames=(("distilbert.", ""),),
        dropped=(("vocab_", UNUSED_HEAD),),
    ),
)
