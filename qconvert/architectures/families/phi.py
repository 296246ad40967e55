"""Phi 1, 1.5 and 2, and Phi-3."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    GELU,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    filled_sizes,
    partial_rotary,
    plain_window,
    rotated,
)
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import (
    ATTENTION_MEAN_NORM,
    ATTENTION_OUTPUT_BIAS,
    NORMS,
    OUTPUT_BIAS,
    PLAIN_INNER,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import LONG, PARTIAL, Rope, read_rope, settled

CONFIGS = (
    ConfigClass(
        "PhiConfig",
        "phi",
        ("PhiForCausalLM",),
        decoder_fields(
            (51_200, 2048, 8192, 24, 32),
            (INT_OR_NULL, None),
            2048,
            1e-5,
            activation=("hidden_act", "gelu_new"),
            epsilon="layer_norm_eps",
            qk_layernorm=(BOOL, False),
        ),
        (*TRAINING, "resid_pdrop", "embd_pdrop"),
        (*DECODER, "head_dim"),
    ),
    ConfigClass(
        "Phi3Config",
        "phi3",
        ("Phi3ForCausalLM",),
        decoder_fields(
            (32_064, 3072, 8192, 32, 32),
            (INT_OR_NULL, None),
            4096,
            1e-5,
            original_max_position_embeddings=(INT, 4096),
            sliding_window=(INT_OR_NULL, None),
        ),
        (*TRAINING, "resid_pdrop", "embd_pdrop"),
        (*DECODER, "head_dim"),
        harmless=MappingProxyType(
            {
                "attention_bias": (False,),
                "mlp_bias": (False,),
                "lm_head_bias": (False,),
                "full_attn_mod": (1,),
                "interpolate_factor": (1,),
            }
        ),
    ),
)  # fmt: skip


def phi2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("qk_layernorm", (False,))
    return decoder_keys(config, sizes, "layer_norm_eps", mean=True)


def phi3_keys(config: Config, sizes: Sizes) -> Keys:
    # A window of zero says that there is none.
    return decoder_keys(config, sizes) | {
        "attention.sliding_window": config.optional_count("sliding_window") or 0
    }


def phi3_rope(config: Config, sizes: Sizes) -> Rope:
    parameters = settled(config, LONG)
    return read_rope(parameters, rotated(parameters, sizes.head_dim), LONG)


_PHI3 = (
    *NORMS,
    Slot("attn_qkv.weight", "fused width"),
    Slot("attn_output.weight", "width query"),
    Slot("ffn_up.weight", "gate_up width"),
    Slot("ffn_down.weight", "width inner"),
)

ROWS = (
    Family(
        "Phi 1, 1.5 and 2",
        ("PhiForCausalLM",),
        "phi2",
        (*WHOLE, OUTPUT_BIAS, Slot("output.bias", "vocabulary")),
        # One norm for attention and the inner layer, which are added up.
        (
            *ATTENTION_MEAN_NORM,
            *attention(heads=False, bias=True),
            ATTENTION_OUTPUT_BIAS,
            *PLAIN_INNER,
        ),
        phi2_keys,
        filled_sizes,
        partial_rotary(PARTIAL, 0.5),
        GELU,
        own_head=True,
    ),
    Family(
        "Phi-3",
        ("Phi3ForCausalLM",),
        "phi3",
        WHOLE,
        _PHI3,
        phi3_keys,
        filled_sizes,
        phi3_rope,
        SILU,
        plain_window,
    ),
)
