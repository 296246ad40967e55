"""Qwen 2 and 3."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    INTS_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    Fields,
    decoder_fields,
)
from qconvert.architectures.families.heads import label_keys, labels, with_labels
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_keys,
    expert_sizes,
    experts_everywhere,
    filled_sizes,
    layer_types,
    plain_sizes,
    rotary,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    EXPERTS,
    GATED,
    HEAD_NORMS,
    NORMS,
    SHARED,
    SHARED_GATE,
    WHOLE,
    WITHOUT_OUTPUT,
    attention,
)
from qconvert.architectures.mapped import Locate, Rows
from qconvert.architectures.rope import PLAIN
from qconvert.files.gguf_writer import GgufValue


def _with_windows(fields: Fields) -> Fields:
    """The same with sliding windows as Qwen2 and 3 have them."""
    return MappingProxyType(
        {
            **fields,
            "use_sliding_window": (BOOL, False),
            "sliding_window": (INT_OR_NULL, 4096),
            "max_window_layers": (INT, 28),
            "layer_types": (TEXTS_OR_NULL, None),
        }
    )


_CLASSES = (
    ConfigClass(
        "Qwen2Config",
        "qwen2",
        ("Qwen2ForCausalLM",),
        _with_windows(decoder_fields((151_936, 4096, 22_016, 32, 32), (INT_OR_NULL, 32), 32_768)),
        TRAINING,
        (*DECODER, "head_dim"),
        harmless=MappingProxyType({"use_mrope": (False,)}),
    ),
    ConfigClass(
        "Qwen3Config",
        "qwen3",
        ("Qwen3ForCausalLM",),
        _with_windows(
            decoder_fields(
                (151_936, 4096, 22_016, 32, 32),
                (INT_OR_NULL, 32),
                32_768,
                head_dim=(INT, 128),
                attention_bias=(BOOL, False),
            )
        ),
        TRAINING,
        DECODER,
    ),
    ConfigClass(
        "Qwen2MoeConfig",
        "qwen2_moe",
        ("Qwen2MoeForCausalLM",),
        _with_windows(
            decoder_fields(
                (151_936, 2048, 5632, 24, 16),
                (INT_OR_NULL, 16),
                32_768,
                decoder_sparse_step=(INT, 1),
                moe_intermediate_size=(INT, 1408),
                shared_expert_intermediate_size=(INT, 5632),
                num_experts_per_tok=(INT, 4),
                num_experts=(INT, 60),
                norm_topk_prob=(BOOL, False),
                mlp_only_layers=(INTS_OR_NULL, None),
                qkv_bias=(BOOL, True),
            )
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef"),
        (*DECODER, "head_dim"),
    ),
    ConfigClass(
        "Qwen3MoeConfig",
        "qwen3_moe",
        ("Qwen3MoeForCausalLM",),
        decoder_fields(
            (151_936, 2048, 6144, 24, 32),
            (INT, 4),
            32_768,
            attention_bias=(BOOL, False),
            use_sliding_window=(BOOL, False),
            sliding_window=(INT_OR_NULL, 4096),
            decoder_sparse_step=(INT, 1),
            moe_intermediate_size=(INT, 768),
            num_experts_per_tok=(INT, 8),
            num_experts=(INT, 128),
            norm_topk_prob=(BOOL, False),
            mlp_only_layers=(INTS_OR_NULL, None),
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef"),
        (*DECODER, "head_dim"),
        MappingProxyType({"num_local_experts": "num_experts"}),
        harmless=MappingProxyType(
            {
                "max_window_layers": ANY,
                "qkv_bias": (False,),
                "shared_expert_intermediate_size": (0,),
                "use_qk_norm": (True,),
            }
        ),
    ),
)  # fmt: skip
CONFIGS = (*_CLASSES, with_labels(_CLASSES[1], "Qwen3ForSequenceClassification"))


def switched_window(config: Config, sizes: Sizes) -> int | None:
    """A window that is there when a flag says so, in Qwen2 and 3 for the upper layers only."""
    used = config.flag("use_sliding_window")
    stated = config.optional_count("sliding_window") if used else None
    if config.known and "layer_types" in config.known.fields:
        first = config.get("max_window_layers")
        if stated is not None and first is None:
            raise config.wrong("max_window_layers", "an integer")
        usual = [stated is not None and i >= first for i in range(sizes.blocks)]
        if not any(layer_types(config, sizes, usual)):
            return None
        if stated is None:
            raise config.wrong(
                "use_sliding_window", "true with a sliding_window, as layer_types names such layers"
            )
    return stated if stated is not None and stated < sizes.named["context"] else None


def qwen3_moe_sizes(config: Config) -> Sizes:
    return expert_sizes(config, "num_experts", "moe_intermediate_size")


def qwen3_moe_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp divides the chosen experts' weights by their sum, which is 1 anyway where all are
    # chosen.
    experts_everywhere(config, sizes)
    experts = expert_keys(config, sizes)
    normed = config.flag("norm_topk_prob", True)  # also where a class has no such field
    if not normed and experts["expert_used_count"] != sizes.named["experts"]:
        raise config.unlike("norm_topk_prob", "true")
    return (
        decoder_keys(config, sizes)
        | experts
        | {"expert_feed_forward_length": sizes.named["expert_inner"]}
    )


def qwen2_moe_sizes(config: Config) -> Sizes:
    filled_sizes(config)
    shared = config.count("shared_expert_intermediate_size")
    return expert_sizes(config, "num_experts", "moe_intermediate_size", shared=shared)


def qwen2_moe_keys(config: Config, sizes: Sizes) -> Keys:
    # llama.cpp does not divide here.
    experts_everywhere(config, sizes)
    experts = expert_keys(config, sizes)
    if config.flag("norm_topk_prob") and experts["expert_used_count"] != sizes.named["experts"]:
        raise config.unlike("norm_topk_prob", "false")
    return (
        decoder_keys(config, sizes)
        | experts
        | {
            "expert_feed_forward_length": sizes.named["expert_inner"],
            "expert_shared_feed_forward_length": sizes.named["shared"],
        }
    )


# --- a head that classifies ---


def qwen3_classifier_sizes(config: Config) -> Sizes:
    count = len(labels(config))
    return plain_sizes(config, labels=count, scores=max(count, 2))


def qwen3_classifier_keys(config: Config, sizes: Sizes) -> Keys:
    """Keys; of one label's value llama.cpp's softmax would be 1, so zero stands beside it."""
    found = decoder_keys(config, sizes) | label_keys(config)
    named = labels(config)
    if len(named) == 1:
        both = [*named, f"not {named[0]}"]
        found["classifier.output_labels"] = GgufValue("STRING", both)
    return found


def _scores(sizes: Sizes) -> Locate:
    count = sizes.named["labels"]

    def locate(rows: Rows) -> Rows:
        return np.where(rows < count, rows, -1)  # a row of zeros

    return locate


_QWEN3 = (*NORMS, *attention(heads=False, bias=False), *HEAD_NORMS, *GATED)

ROWS = (
    Family(
        "Qwen2",
        ("Qwen2ForCausalLM",),
        "qwen2",
        WHOLE,
        (*NORMS, *attention(heads=False, bias=True), *GATED),
        decoder_keys,
        filled_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
    ),
    Family(
        "Qwen3",
        ("Qwen3ForCausalLM",),
        "qwen3",
        WHOLE,
        _QWEN3,
        decoder_keys,
        plain_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
        scores=True,
    ),
    Family(
        "Qwen3 with a classification head (rerankers)",
        ("Qwen3ForSequenceClassification",),
        "qwen3",
        (
            *WITHOUT_OUTPUT,
            Slot("cls.output.weight", "scores width", source="labels width", rows=_scores),
        ),
        _QWEN3,
        qwen3_classifier_keys,
        qwen3_classifier_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
        parts=MappingProxyType({"score.weight": ("cls.output.weight",)}),
    ),
    Family(
        "Qwen2 mixture of experts",
        ("Qwen2MoeForCausalLM",),
        "qwen2moe",
        WHOLE,
        (
            *NORMS,
            *attention(heads=False, bias=None, flag="qkv_bias"),
            *EXPERTS,
            *SHARED,
            SHARED_GATE,
        ),
        qwen2_moe_keys,
        qwen2_moe_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
        own_head=True,
    ),
    Family(
        "Qwen3 mixture of experts",
        ("Qwen3MoeForCausalLM",),
        "qwen3moe",
        WHOLE,
        (*NORMS, *attention(heads=False, bias=False), *HEAD_NORMS, *EXPERTS),
        qwen3_moe_keys,
        qwen3_moe_sizes,
        rotary(PLAIN),
        SILU,
        switched_window,
    ),
)
