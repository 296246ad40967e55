"""EuroBERT: an encoder with Llama's layers."""

from __future__ import annotations

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.bert import UNUSED_HEAD
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import GATED, NORMS, WITHOUT_OUTPUT, attention
from qconvert.architectures.rope import PLAIN

_CLASSES = ("EuroBertModel", "EuroBertForMaskedLM")
CONFIGS = (
    ConfigClass(
        "EuroBertConfig",
        "eurobert",
        _CLASSES,
        decoder_fields(
            (128_256, 768, 3072, 12, 12),
            (INT_OR_NULL, None),
            8192,
            1e-5,
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        (*TRAINING, "pretraining_tp", "mask_token_id", "classifier_pooling"),
        tuple(n for n in DECODER if n != "is_causal"),
        divides=True,
    ),
)


def eurobert_keys(config: Config, sizes: Sizes) -> Keys:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False,))
    return decoder_keys(config, sizes) | {"attention.causal": False}


ROWS = (
    Family(
        "EuroBERT",
        _CLASSES,
        "eurobert",
        WITHOUT_OUTPUT,
        (*NORMS, *attention(heads=False, bias=False), *GATED),
        eurobert_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        renames=tuple((n, f"model.{n}") for n in ("layers.", "embed_tokens.", "norm.")),
        dropped=(("lm_head.", UNUSED_HEAD),),
        tied=True,
    ),
)
