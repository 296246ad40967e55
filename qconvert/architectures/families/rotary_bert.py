"""Encoders of BERT's kind with rotary positions: Nomic-BERT and Jina embeddings v3."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    INT_OR_NULL,
    OBJECT_OR_NULL,
    ROTARY,
    TEXT,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.bert import BERT_BLOCK, BERT_WHOLE, UNUSED_HEAD, bert_keys
from qconvert.architectures.families.keys import GELU, SILU, Sizes, plain_sizes, rotary
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import GATED, attention
from qconvert.architectures.rope import PLAIN

_UNUSED = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
    "classifier_dropout", *TOKENS,
)  # fmt: skip


def _class(
    name: str, model_type: str, sizes: tuple[int, ...], eps: float, theta: float, gated: bool
) -> ConfigClass:
    """Sizes are of vocabulary, width, layers, heads, inner width, context and token types."""
    vocabulary, width, layers, heads, inner, context, types = sizes
    own = {"head_dim": (INT_OR_NULL, None)} if gated else {"tie_word_embeddings": (BOOL, True)}
    return ConfigClass(
        f"{name}Config",
        model_type,
        (f"{name}Model", f"{name}ForMaskedLM"),
        MappingProxyType(
            {
                "vocab_size": (INT, vocabulary),
                "hidden_size": (INT, width),
                "num_hidden_layers": (INT, layers),
                "num_attention_heads": (INT, heads),
                "intermediate_size": (INT, inner),
                "hidden_act": (TEXT, "silu" if gated else "gelu"),
                "max_position_embeddings": (INT, context),
                "type_vocab_size": (INT, types),
                "layer_norm_eps": (FLOAT, eps),
                "rope_parameters": (OBJECT_OR_NULL, None),
                **own,
            }
        ),
        _UNUSED if gated else (*_UNUSED, "use_cache"),
        (*ROTARY, "per_layer_config"),
        harmless=MappingProxyType({"tie_word_embeddings": ANY} if gated else {}),
        theta=theta,
        divides=True,
    )


CONFIGS = (
    _class(
        "NomicBert", "nomic_bert", (30_528, 768, 12, 12, 3072, 2048, 2), 1e-12, 1000.0, gated=True
    ),
    _class(
        "JinaEmbeddingsV3", "jina_embeddings_v3", (250_002, 1024, 24, 16, 4096, 8194, 1), 1e-5,
        20_000.0, gated=False,
    ),
)  # fmt: skip


def rotary_bert_sizes(config: Config) -> Sizes:
    sizes = plain_sizes(config, grouped=False, types=config.count("type_vocab_size"))
    if sizes.named["query"] != sizes.named["width"]:
        raise config.unlike("head_dim", "hidden_size / num_attention_heads")
    return sizes


_NORMS = tuple(
    Slot(f"{norm}_output_norm.{part}", "width")
    for norm in ("attn", "layer")
    for part in ("weight", "bias")
)
# Published checkpoints have queries, keys and values fused and names of their own; transformers'
# modules have others.
_PARTS = MappingProxyType(
    {
        f"{source}.{part}": tuple(f"{slot}.{part}" for slot in slots)
        for part in ("weight", "bias")
        for source, slots in {
            "attn.Wqkv": ("attn_q", "attn_k", "attn_v"),
            "mixer.Wqkv": ("attn_q", "attn_k", "attn_v"),
            "self_attn.q_proj": ("attn_q",),
            "self_attn.k_proj": ("attn_k",),
            "self_attn.v_proj": ("attn_v",),
            "mlp.fc1": ("ffn_up",),
            "mlp.fc2": ("ffn_down",),
            "post_attention_layernorm": ("attn_output_norm",),
            "post_mlp_layernorm": ("layer_output_norm",),
        }.items()
    }
)
_WHOLE = tuple(slot for slot in BERT_WHOLE if slot.name != "position_embd.weight")

ROWS = (
    Family(
        "Nomic-BERT (encoders such as nomic-embed-text)",
        CONFIGS[0].architectures,
        "nomic-bert",
        _WHOLE,
        (*attention(heads=False, bias=False), *GATED, *_NORMS),
        bert_keys,
        rotary_bert_sizes,
        rotary(PLAIN),
        SILU,
        renames=(("nomic_bert.", ""),),
        dropped=(("pooler.", UNUSED_HEAD), ("cls.", UNUSED_HEAD)),
        parts=_PARTS,
        tied=True,
    ),
    Family(
        "Jina embeddings v3 (encoder)",
        CONFIGS[1].architectures,
        "jina-bert-v3",
        _WHOLE,
        BERT_BLOCK,
        bert_keys,
        rotary_bert_sizes,
        rotary(PLAIN),
        GELU,
        renames=(("roberta.", ""),),
        dropped=(("pooler.", UNUSED_HEAD), ("lm_head.", UNUSED_HEAD)),
        parts=_PARTS,
        tied=True,
    ),
)
