"""Heads that sort texts into classes, or score them as rerankers do."""

from __future__ import annotations

from dataclasses import replace

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ConfigClass
from qconvert.architectures.families.keys import Keys
from qconvert.architectures.families.row import Slot
from qconvert.files.gguf_writer import GgufValue

_MAX_LABELS = 100_000
RANK = 4  # llama.h's llama_pooling_type

# What llama.cpp computes of the first token: a matrix, tanh, and a value for each label.
CLASSIFIER = (
    Slot("cls.weight", "width width"),
    Slot("cls.bias", "width"),
    Slot("cls.output.weight", "labels width"),
    Slot("cls.output.bias", "labels"),
)


def with_labels(known: ConfigClass, architecture: str) -> ConfigClass:
    """The class of a configuration for a model with such a head."""
    beside = (*known.beside, "id2label", "num_labels")
    return replace(known, architectures=(architecture,), beside=beside)


def labels(config: Config) -> list[str]:
    """Names of the labels in their order; transformers has two where none are stated.

    Raises:
        FormatError: they are not numbered from 0 on, are no texts, or another number is stated.
    """
    stated = config.stated("id2label")
    if stated is None:
        return [f"LABEL_{i}" for i in range(config.count("num_labels", 2, _MAX_LABELS))]
    wanted = "an object of texts by the numbers from 0 on"
    if not isinstance(stated, dict) or not 0 < len(stated) <= _MAX_LABELS:
        raise config.wrong("id2label", wanted)
    found = [stated.get(str(i)) for i in range(len(stated))]
    texts = [label for label in found if isinstance(label, str)]
    if len(texts) < len(found):
        raise config.wrong("id2label", wanted)
    if config.stated("num_labels") not in (None, len(texts)):
        raise config.wrong("num_labels", f"{len(texts)}, as id2label has")
    return texts


def label_keys(config: Config) -> Keys:
    """Keys of the head: llama.cpp counts its outputs by the labels."""
    return {"pooling_type": RANK, "classifier.output_labels": GgufValue("STRING", labels(config))}
