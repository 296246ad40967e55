"""EXAONE 4."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    INT_OR_TEXT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    MAX_BLOCKS,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    every_nth_full,
    expert_sizes,
    filled_sizes,
    group_keys,
    layer_types,
    leading_blocks,
    plain_sizes,
    rotary,
    routed_keys,
    window_keys,
)
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import (
    FURTHER,
    GATED,
    HEAD_NORMS,
    LEADING_DENSE,
    NORMS,
    POST_NORMS,
    ROUTER_BIAS,
    ROUTER_BIAS_PART,
    WHOLE,
    attention,
)
from qconvert.architectures.rope import BY_PAIR, PLAIN

CONFIGS = (
    ConfigClass(
        "ExaoneConfig",
        "exaone",
        ("ExaoneForCausalLM",),  # which transformers runs as LlamaForCausalLM
        decoder_fields(
            (102_400, 4096, 14_336, 32, 32),
            (INT_OR_NULL, 8),
            4096,
            1e-5,
            attention_bias=(BOOL, False),
            mlp_bias=(BOOL, False),
            head_dim=(INT_OR_NULL, None),
        ),
        TRAINING,
        DECODER,
        MappingProxyType(
            {
                "num_layers": "num_hidden_layers",
                "layer_norm_epsilon": "rms_norm_eps",
                "activation_function": "hidden_act",
            }
        ),
        harmless=MappingProxyType({"embed_dropout": ANY}),
        theta=500_000.0,
        divides=True,
    ),
    ConfigClass(
        "ExaoneMoeConfig",
        "exaone_moe",
        ("ExaoneMoeForCausalLM",),
        decoder_fields(
            (102_400, 4096, 16_384, 32, 32),
            (INT, 32),
            2048,
            1e-5,
            sliding_window=(INT, 4096),
            sliding_window_pattern=(INT_OR_TEXT_OR_NULL, 4),
            layer_types=(TEXTS_OR_NULL, None),
            mlp_layer_types=(TEXTS_OR_NULL, None),
            first_k_dense_replace=(INT, 1),
            moe_intermediate_size=(INT, 1024),
            num_experts=(INT, 64),
            num_experts_per_tok=(INT, 8),
            num_shared_experts=(INT, 1),
            norm_topk_prob=(BOOL, True),
            routed_scaling_factor=(FLOAT, 2.5),
            n_group=(INT, 1),
            topk_group=(INT, 1),
        ),
        (*TRAINING, "output_router_logits"),
        (*DECODER, "head_dim"),
        harmless=MappingProxyType(
            {
                "num_nextn_predict_layers": ANY,
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "is_moe_layer": ANY,
                "first_last_k_dense_replace": ANY,
            }
        ),
    ),
    ConfigClass(
        "Exaone4Config",
        "exaone4",
        ("Exaone4ForCausalLM",),
        decoder_fields(
            (102_400, 4096, 16_384, 32, 32),
            (INT, 32),
            2048,
            1e-5,
            sliding_window=(INT_OR_NULL, 4096),
            sliding_window_pattern=(INT_OR_TEXT_OR_NULL, 4),
            layer_types=(TEXTS_OR_NULL, None),
        ),
        TRAINING,
        (*DECODER, "head_dim"),
    ),
)

_WINDOWED = 64  # blocks of the one model in which llama.cpp has windows


def exaone4_keys(config: Config, sizes: Sizes) -> Keys:
    found = decoder_keys(config, sizes)
    windowed = sizes.blocks == _WINDOWED
    if config.optional_count("sliding_window") is None:
        if windowed:
            raise config.unlike("sliding_window", f"a number, in a model of {_WINDOWED} layers")
        if config.get("layer_types") is None or any(layer_types(config, sizes, [])):
            raise config.unlike("layer_types", "'full_attention', without a window")
        return found
    if not windowed:
        raise config.unlike("sliding_window", f"null, in a model of other than {_WINDOWED} layers")
    return found | window_keys(config, layer_types(config, sizes, _pattern(config, sizes)))


def _pattern(config: Config, sizes: Sizes) -> list[bool]:
    nth = config.get("sliding_window_pattern")
    if type(nth) is not int or not 0 < nth <= MAX_BLOCKS:
        raise config.wrong("sliding_window_pattern", f"an integer from 1 to {MAX_BLOCKS}")
    return every_nth_full(sizes, nth)


def exaone_moe_sizes(config: Config) -> Sizes:
    inner = config.count("moe_intermediate_size")
    found = expert_sizes(
        config,
        "num_experts",
        "moe_intermediate_size",
        shared=config.count("num_shared_experts") * inner,
    )
    found.named["dense"] = leading_blocks(config, found.blocks)
    return found


def exaone_moe_keys(config: Config, sizes: Sizes) -> Keys:
    stated = config.get("layer_types") is not None
    usual = [] if stated else _pattern(config, sizes)
    scale, norm = config.number("routed_scaling_factor"), config.flag("norm_topk_prob")
    return (
        decoder_keys(config, sizes)
        | window_keys(config, layer_types(config, sizes, usual))
        | routed_keys(config, sizes, "sigmoid", scale=scale, norm=norm)
        | group_keys(config, sizes)
        | {
            "expert_shared_count": config.count("num_shared_experts"),
            "expert_shared_feed_forward_length": sizes.named["shared"],
            "leading_dense_block_count": sizes.named["dense"],
        }
    )


def exaone_keys(config: Config, sizes: Sizes) -> Keys:
    for name in ("attention_bias", "mlp_bias"):
        config.require(name, (False,))
    return decoder_keys(config, sizes)


ROWS = (
    Family(
        "EXAONE 3 and 3.5",
        ("ExaoneForCausalLM",),
        "exaone",
        WHOLE,
        (*NORMS, *attention(heads=False, bias=False), *GATED),
        exaone_keys,
        plain_sizes,
        rotary(BY_PAIR),
        SILU,
    ),
    Family(
        "EXAONE mixture of experts",
        ("ExaoneMoeForCausalLM",),
        "exaone-moe",
        WHOLE,
        (*NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *LEADING_DENSE),
        exaone_moe_keys,
        exaone_moe_sizes,
        rotary(PLAIN),
        SILU,
        dropped=(("mtp.", FURTHER),),
        parts=MappingProxyType(
            ROUTER_BIAS_PART | {"mlp.e_score_correction_bias": (ROUTER_BIAS.name,)}
        ),
        own_head=True,
    ),
    Family(
        "EXAONE 4",
        ("Exaone4ForCausalLM",),
        "exaone4",
        WHOLE,
        (*POST_NORMS, *HEAD_NORMS, *attention(heads=False, bias=False), *GATED),
        exaone4_keys,
        filled_sizes,
        rotary(BY_PAIR),
        SILU,
    ),
)
