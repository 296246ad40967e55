"""Encoders of BERT's kind."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ANY, BOOL, FLOAT, INT, TEXT, TOKENS, ConfigClass
from qconvert.architectures.families.heads import CLASSIFIER, label_keys, labels, with_labels
from qconvert.architectures.families.keys import GELU, Keys, Sizes, common_keys, plain_sizes
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import ATTENTION_OUTPUT_BIAS, PLAIN_INNER, attention

BERT_CONFIG = ConfigClass(
    "BertConfig",
    "bert",
    ("BertModel", "BertForMaskedLM"),
    MappingProxyType(
        {
            "vocab_size": (INT, 30_522),
            "hidden_size": (INT, 768),
            "intermediate_size": (INT, 3072),
            "num_hidden_layers": (INT, 12),
            "num_attention_heads": (INT, 12),
            "hidden_act": (TEXT, "gelu"),
            "max_position_embeddings": (INT, 512),
            "type_vocab_size": (INT, 2),
            "layer_norm_eps": (FLOAT, 1e-12),
            "is_decoder": (BOOL, False),
            "add_cross_attention": (BOOL, False),
            "tie_word_embeddings": (BOOL, True),
        }
    ),
    (
        "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
        "use_cache", "classifier_dropout", *TOKENS,
    ),
    ("position_embedding_type", "per_layer_config"),
    harmless=MappingProxyType(
        {
            "directionality": ANY,
            "pooler_fc_size": ANY,
            "pooler_num_attention_heads": ANY,
            "pooler_num_fc_layers": ANY,
            "pooler_size_per_head": ANY,
            "pooler_type": ANY,
        }
    ),
    divides=True,
)  # fmt: skip
CONFIGS = (BERT_CONFIG, with_labels(BERT_CONFIG, "BertForSequenceClassification"))


def bert_sizes(config: Config) -> Sizes:
    return plain_sizes(config, grouped=False, types=config.count("type_vocab_size"))


def bert_classifier_sizes(config: Config) -> Sizes:
    types, count = config.count("type_vocab_size"), len(labels(config))
    return plain_sizes(config, grouped=False, types=types, labels=count)


def bert_keys(config: Config, sizes: Sizes) -> Keys:
    if config.stated("position_embedding_type") is not None:
        config.require("position_embedding_type", ("absolute",))
    for name in ("is_decoder", "add_cross_attention"):
        if config.flag(name):
            raise config.unlike(name, "false")
    return common_keys(config, sizes) | {
        "attention.layer_norm_epsilon": config.number("layer_norm_eps", zero=True),
        "attention.causal": False,
        "vocab_size": sizes.named["vocabulary"],
    }


def bert_classifier_keys(config: Config, sizes: Sizes) -> Keys:
    return bert_keys(config, sizes) | label_keys(config)


BERT_WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("position_embd.weight", "context width"),
    Slot("token_types.weight", "types width"),
    Slot("token_embd_norm.weight", "width"),
    Slot("token_embd_norm.bias", "width"),
)
BERT_BLOCK = (
    *attention(heads=False, bias=True),
    ATTENTION_OUTPUT_BIAS,
    Slot("attn_output_norm.weight", "width"),
    Slot("attn_output_norm.bias", "width"),
    *PLAIN_INNER,
    Slot("layer_output_norm.weight", "width"),
    Slot("layer_output_norm.bias", "width"),
)

UNUSED_HEAD = "is a part that llama.cpp's encoders do not have"

ROWS = (
    Family(
        "BERT (encoders such as all-MiniLM)",
        ("BertModel", "BertForMaskedLM"),
        "bert",
        BERT_WHOLE,
        BERT_BLOCK,
        bert_keys,
        bert_sizes,
        None,
        GELU,
        renames=(("bert.", ""),),
        dropped=(("pooler.", UNUSED_HEAD), ("cls.", UNUSED_HEAD)),
        tied=True,
    ),
    Family(
        "BERT with a classification head (rerankers such as ms-marco-MiniLM)",
        ("BertForSequenceClassification",),
        "bert",
        (*BERT_WHOLE, *CLASSIFIER),
        BERT_BLOCK,
        bert_classifier_keys,
        bert_classifier_sizes,
        None,
        GELU,
        # llama.cpp's head has the pooler's matrix and tanh
        renames=(
            ("bert.pooler.dense.", "classifier.dense."),
            ("bert.", ""),
            ("classifier.weight", "classifier.out_proj.weight"),
            ("classifier.bias", "classifier.out_proj.bias"),
        ),
        tied=True,
    ),
)
