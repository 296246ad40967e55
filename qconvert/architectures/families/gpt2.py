"""GPT-2, and StarCoder 1, whose queries share one head of keys: learned positions, and norms and
layers of BERT's kind before attention.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    INT_OR_NULL,
    TEXT,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.keys import GELU, Keys, Sizes, decoder_keys, plain_sizes
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    FUSED,
    MEAN_NORMS,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
    turned_round,
)

_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_FIELDS = {
    "vocab_size": (INT, 50_257),
    "n_positions": (INT, 1024),
    "n_embd": (INT, 768),
    "n_layer": (INT, 12),
    "n_head": (INT, 12),
    "n_inner": (INT_OR_NULL, None),
    "activation_function": (TEXT, "gelu_new"),
    "layer_norm_epsilon": (FLOAT, 1e-5),
    "scale_attn_weights": (BOOL, True),
    "add_cross_attention": (BOOL, False),
    "tie_word_embeddings": (BOOL, True),
}
_UNUSED = ("initializer_range", "use_cache", *TOKENS, "resid_pdrop", "embd_pdrop", "attn_pdrop")
_BESIDE = ("is_causal", "per_layer_config", "attention_chunk_size", "layer_types", "sliding_window")
_GPT2 = ConfigClass(
    "GPT2Config",
    "gpt2",
    ("GPT2LMHeadModel",),
    {**_FIELDS, "scale_attn_by_inverse_layer_idx": (BOOL, False)},
    (
        *(*_UNUSED, "reorder_and_upcast_attn", "summary_type", "summary_use_proj"),
        *("summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    ),
    _BESIDE,
    MappingProxyType(_NAMES),
    harmless=MappingProxyType({"n_ctx": ANY}),
)
CONFIGS = (
    _GPT2,
    replace(
        _GPT2,
        name="GPTBigCodeConfig",
        model_type="gpt_bigcode",
        architectures=("GPTBigCodeForCausalLM",),
        fields={
            **_FIELDS,
            "activation_function": (TEXT, "gelu_pytorch_tanh"),
            "multi_query": (BOOL, True),
        },
        unused=(*_UNUSED, "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"),
        harmless=MappingProxyType(
            {
                **dict.fromkeys(("inference_runner", "max_batch_size", "max_sequence_length"), ANY),
                **dict.fromkeys(("pad_key_length", "pre_allocate_kv_cache", "n_ctx"), ANY),
                **dict.fromkeys(("summary_activation", "summary_first_dropout"), ANY),
                **dict.fromkeys(("summary_proj_to_labels", "summary_type"), ANY),
                **dict.fromkeys(("summary_use_proj", "validate_runner_input"), ANY),
            }
        ),
    ),
)


def gpt2_sizes(config: Config, groups: int | None = None) -> Sizes:
    inner = config.optional_count("n_inner") or 4 * config.count("n_embd")
    return plain_sizes(config, _NAMES, grouped=False, groups=groups, inner=inner)


def starcoder_sizes(config: Config) -> Sizes:
    return gpt2_sizes(config, groups=1)


def gpt2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("scale_attn_weights", (True,))
    config.require("add_cross_attention", (False,))
    config.require("scale_attn_by_inverse_layer_idx", (False, None))
    return decoder_keys(config, sizes, "layer_norm_epsilon", mean=True)


def starcoder_keys(config: Config, sizes: Sizes) -> Keys:
    # With a head of keys for each, a checkpoint has them in another order.
    config.require("multi_query", (True,))
    return gpt2_keys(config, sizes)


_BLOCK = (*MEAN_NORMS, *FUSED, *PLAIN_INNER)
_STARCODER = Family(
    "StarCoder 1",
    ("GPTBigCodeForCausalLM",),
    "starcoder",
    (*WHOLE, Slot("position_embd.weight", "context width"), OUTPUT_BIAS),
    _BLOCK,
    starcoder_keys,
    starcoder_sizes,
    None,
    GELU,
    renames=(("transformer.", ""),),
    buffers=(".attn.bias", ".attn.masked_bias"),
)
ROWS = (
    replace(
        _STARCODER,
        name="GPT-2",
        classes=("GPT2LMHeadModel",),
        arch="gpt2",
        block=tuple(turned_round(s) if len(s.shape.split()) > 1 else s for s in _BLOCK),
        keys=gpt2_keys,
        sizes=gpt2_sizes,
    ),
    _STARCODER,
)
