"""RoBERTa, XLM-RoBERTa and CamemBERT: encoders of BERT's kind whose positions begin after the
padding's.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import INT, INT_OR_NULL, ConfigClass
from qconvert.architectures.families.bert import (
    BERT_BLOCK,
    BERT_CONFIG,
    BERT_WHOLE,
    UNUSED_HEAD,
    bert_keys,
)
from qconvert.architectures.families.heads import CLASSIFIER, label_keys, labels, with_labels
from qconvert.architectures.families.keys import GELU, Keys, Sizes, plain_sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.mapped import Locate, window

_PAD = "pad_token_id"


def _class(kind: str, model_type: str, vocabulary: int) -> ConfigClass:
    fields = {"vocab_size": (INT, vocabulary), _PAD: (INT_OR_NULL, 1)}
    return replace(
        BERT_CONFIG,
        name=f"{kind}Config",
        model_type=model_type,
        architectures=(f"{kind}Model", f"{kind}ForMaskedLM"),
        fields=MappingProxyType({**BERT_CONFIG.fields, **fields}),
        unused=tuple(name for name in BERT_CONFIG.unused if name != _PAD),
    )


_CLASSES = (
    _class("XLMRoberta", "xlm-roberta", 30_522),
    _class("Roberta", "roberta", 50_265),
    _class("Camembert", "camembert", 30_522),
)
_HEADS = tuple(
    f"{kind}ForSequenceClassification" for kind in ("XLMRoberta", "Roberta", "Camembert")
)
CONFIGS = (*_CLASSES, *(with_labels(c, head) for c, head in zip(_CLASSES, _HEADS, strict=True)))


def roberta_sizes(config: Config, **more: int) -> Sizes:
    """Sizes; positions of tokens are counted from the one after the padding's id."""
    pad, positions = config.get(_PAD), config.count("max_position_embeddings")
    if type(pad) is not int or not 0 <= pad < min(config.count("vocab_size"), positions - 1):
        raise config.unlike(_PAD, "the id of a token, less than the last position")
    sizes = plain_sizes(
        config, grouped=False, types=config.count("type_vocab_size"), positions=positions, **more
    )
    sizes.named["context"] = positions - pad - 1
    return sizes


def roberta_keys(config: Config, sizes: Sizes) -> Keys:
    return bert_keys(config, sizes) | {"context_length": sizes.named["context"]}


def roberta_classifier_sizes(config: Config) -> Sizes:
    return roberta_sizes(config, labels=len(labels(config)))


def roberta_classifier_keys(config: Config, sizes: Sizes) -> Keys:
    return roberta_keys(config, sizes) | label_keys(config)


def _positions(sizes: Sizes) -> Locate:
    """The rows of positions that tokens have: those up to the padding's are left out."""
    rows = sizes.named["positions"]
    return window(rows, rows - sizes.named["context"], rows)


_WHOLE = tuple(
    replace(slot, source="positions width", rows=_positions, cut=True)
    if slot.name == "position_embd.weight"
    else slot
    for slot in BERT_WHOLE
)
_RENAMES = (("roberta.", ""),)

ROWS = (
    Family(
        "RoBERTa, XLM-RoBERTa and CamemBERT (encoders such as bge-m3)",
        tuple(name for known in _CLASSES for name in known.architectures),
        "bert",
        _WHOLE,
        BERT_BLOCK,
        roberta_keys,
        roberta_sizes,
        None,
        GELU,
        renames=_RENAMES,
        dropped=(("pooler.", UNUSED_HEAD), ("lm_head.", UNUSED_HEAD)),
        tied=True,
    ),
    Family(
        "RoBERTa, XLM-RoBERTa and CamemBERT with a classification head (such as bge-reranker)",
        _HEADS,
        "bert",
        (*_WHOLE, *CLASSIFIER),
        BERT_BLOCK,
        roberta_classifier_keys,
        roberta_classifier_sizes,
        None,
        GELU,
        renames=_RENAMES,
        tied=True,
    ),
)
