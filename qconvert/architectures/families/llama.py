"""Llama, Mistral, Mixtral and InternLM 3."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    INT,
    INT_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    expert_keys,
    expert_sizes,
    plain_sizes,
    plain_window,
    rotary,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    ATTENTION_BIAS,
    ATTENTION_OUTPUT_BIAS,
    EXPERTS,
    GATED,
    GATED_BIASES,
    NORMS,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import BY_PAIR, DYNAMIC

MISTRAL = ConfigClass(
    "MistralConfig",
    "mistral",
    ("MistralForCausalLM",),
    decoder_fields(
        (32_000, 4096, 14_336, 32, 32),
        (INT, 8),
        131_072,
        head_dim=(INT_OR_NULL, None),
        sliding_window=(INT_OR_NULL, 4096),
    ),
    TRAINING,
    DECODER,
    harmless=MappingProxyType({"attention_bias": (False,), "mlp_bias": (False,)}),
)
CONFIGS = (
    ConfigClass(
        "LlamaConfig",
        "llama",
        ("LlamaForCausalLM",),
        decoder_fields(
            (32_000, 4096, 11_008, 32, 32),
            (INT_OR_NULL, None),
            2048,
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        (*TRAINING, "pretraining_tp"),
        DECODER,
        harmless=MappingProxyType(
            {
                "rope_interleaved": (False,),
                "is_llama_config": ANY,
                "max_sequence_length": ANY,
                "use_sliding_window": (False,),
            }
        ),
        divides=True,
    ),
    MISTRAL,
    ConfigClass(
        "MixtralConfig",
        "mixtral",
        ("MixtralForCausalLM",),
        decoder_fields(
            (32_000, 4096, 14_336, 32, 32),
            (INT, 8),
            131_072,
            1e-5,
            head_dim=(INT_OR_NULL, None),
            sliding_window=(INT_OR_NULL, None),
            num_experts_per_tok=(INT, 2),
            num_local_experts=(INT, 8),
        ),
        (*TRAINING, "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        DECODER,
        MappingProxyType({"num_experts": "num_local_experts"}),
        harmless=MappingProxyType({"attention_bias": (False,)}),
        theta=1_000_000.0,
    ),
    ConfigClass(
        "InternLM3Config",
        "internlm3",
        ("InternLM3ForCausalLM",),  # which transformers runs as LlamaForCausalLM
        decoder_fields(
            (128_512, 4096, 10_240, 48, 32),
            (INT_OR_NULL, 2),
            32_768,
            1e-5,
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, 128),
        ),
        TRAINING,
        DECODER,
        MappingProxyType({"qkv_bias": "attention_bias", "bias": "mlp_bias"}),
        divides=True,
    ),
)  # fmt: skip


def mixtral_sizes(config: Config) -> Sizes:
    return expert_sizes(config, "num_local_experts", "intermediate_size")


def mixtral_keys(config: Config, sizes: Sizes) -> Keys:
    return decoder_keys(config, sizes) | expert_keys(config, sizes)


def internlm3_keys(config: Config, sizes: Sizes) -> Keys:
    if config.flag("attention_bias") != config.flag("mlp_bias"):  # transformers takes both or none
        raise config.wrong("mlp_bias", f"the same as {config.described('attention_bias')}")
    return decoder_keys(config, sizes)


_LLAMA = (
    *NORMS,
    *attention(heads=True, bias=None),
    replace(ATTENTION_OUTPUT_BIAS, flag=ATTENTION_BIAS),
)

ROWS = (
    Family(
        "Llama (also Mistral, SmolLM)",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "llama",
        WHOLE,
        (*_LLAMA, *GATED, *GATED_BIASES),
        decoder_keys,
        plain_sizes,
        rotary(BY_PAIR),
        SILU,
        plain_window,
    ),
    Family(
        "InternLM 3",
        ("InternLM3ForCausalLM",),
        "llama",
        WHOLE,
        (*_LLAMA, *GATED, *GATED_BIASES),
        internlm3_keys,
        plain_sizes,
        rotary(DYNAMIC),
        SILU,
        plain_window,
    ),
    Family(
        "Mixtral",
        ("MixtralForCausalLM",),
        "llama",
        WHOLE,
        (*_LLAMA, *EXPERTS),
        mixtral_keys,
        mixtral_sizes,
        rotary(BY_PAIR),
        SILU,
        plain_window,
    ),
)
