"""Mamba 1 and 2, and Falcon Mamba."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    FLOATS,
    INT,
    INT_OR_TEXT,
    TEXT,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.keys import MAX_BLOCKS, SILU, Keys, Sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import ATTENTION_NORM, WHOLE
from qconvert.architectures.families.ssm import (
    ENDLESS,
    FIRST_SSM,
    MAX_KERNEL,
    MAX_STATE,
    SSM,
    UNLIMITED,
    first_keys,
    first_sizes,
    require_unlimited,
    ssm_keys,
    ssm_parts,
    ssm_sizes,
    time_step_rank,
)

_INNER = "intermediate_size"  # no field, but it counts before 'expand' where a file has it
_TIME_STEPS = ("time_step_min", "time_step_max", "time_step_floor")
_FIRST = ConfigClass(
    "MambaConfig",
    "mamba",
    ("MambaForCausalLM",),
    {
        "vocab_size": (INT, 50_280),
        "hidden_size": (INT, 768),
        "state_size": (INT, 16),
        "num_hidden_layers": (INT, 32),
        "layer_norm_epsilon": (FLOAT, 1e-5),
        "expand": (INT, 2),
        "conv_kernel": (INT, 4),
        "use_bias": (BOOL, False),
        "use_conv_bias": (BOOL, True),
        "hidden_act": (TEXT, "silu"),
        "time_step_rank": (INT_OR_TEXT, "auto"),
        "rescale_prenorm_residual": (BOOL, False),
        "tie_word_embeddings": (BOOL, True),
    },
    (
        *("initializer_range", "use_cache", *TOKENS, "residual_in_fp32", *_TIME_STEPS),
        *("time_step_scale", "time_step_init_scheme", "use_mambapy", "use_associative_scan"),
    ),
    ("per_layer_config", _INNER),
    harmless=MappingProxyType(
        {
            **dict.fromkeys(("d_inner", "d_model", "n_layer"), ANY),
            **{"fused_add_norm": ANY, "rms_norm": (True,), "ssm_cfg": ({},)},
            "pad_vocab_size_multiple": ANY,
        }
    ),
)
_FALCON = replace(
    _FIRST,
    name="FalconMambaConfig",
    model_type="falcon_mamba",
    architectures=("FalconMambaForCausalLM",),
    fields={**_FIRST.fields, "mixer_rms_eps": (FLOAT, 1e-6)},
    harmless=MappingProxyType({**_FIRST.harmless, "use_falcon_mambapy": ANY}),
)
CONFIGS = (
    _FIRST,
    _FALCON,
    ConfigClass(
        "Mamba2Config",
        "mamba2",
        ("Mamba2ForCausalLM",),
        {
            "num_heads": (INT, 128),
            "head_dim": (INT, 64),
            "vocab_size": (INT, 32_768),
            "hidden_size": (INT, 4096),
            "state_size": (INT, 128),
            "num_hidden_layers": (INT, 64),
            "layer_norm_epsilon": (FLOAT, 1e-5),
            "expand": (INT, 2),
            "conv_kernel": (INT, 4),
            "n_groups": (INT, 8),
            "use_bias": (BOOL, False),
            "use_conv_bias": (BOOL, True),
            "hidden_act": (TEXT, "silu"),
            "time_step_limit": (FLOATS, UNLIMITED),
            "rescale_prenorm_residual": (BOOL, False),
            "tie_word_embeddings": (BOOL, False),
        },
        (
            *("initializer_range", "use_cache", *TOKENS, "chunk_size", "residual_in_fp32"),
            *("time_step_rank", *_TIME_STEPS),
        ),
        ("per_layer_config",),
        harmless=MappingProxyType(
            {
                "norm_before_gate": ANY,
                "rms_norm": (True,),
                "intermediate_size": ANY,
                "time_step_init_scheme": ANY,
                "time_step_scale": ANY,
            }
        ),
    ),
)


def mamba2_sizes(config: Config) -> Sizes:
    width = config.count("hidden_size")
    inner = config.count("expand", most=1024) * width
    if config.count("num_heads") * config.count("head_dim") != inner:
        raise config.wrong("num_heads", f"expand * hidden_size = {inner} with 'head_dim'")
    names = {"heads": "num_heads", "groups": "n_groups", "state": "state_size"}
    return Sizes(
        blocks=config.count("num_hidden_layers", most=MAX_BLOCKS),
        head_dim=config.count("head_dim"),
        named={"vocabulary": config.count("vocab_size"), "width": width}
        | ssm_sizes(config, inner=inner, kernel="conv_kernel", **names),
    )


def mamba2_keys(config: Config, sizes: Sizes) -> Keys:
    _plain(config)
    require_unlimited(config)
    return _no_attention(config, sizes) | ssm_keys(sizes)


def mamba_sizes(config: Config) -> Sizes:
    width, state = config.count("hidden_size"), config.count("state_size", most=MAX_STATE)
    rank = time_step_rank(config, "time_step_rank", width)
    kernel = config.count("conv_kernel", most=MAX_KERNEL)
    inner = config.count("expand", most=1024) * width
    if config.stated(_INNER) is not None:
        inner = config.count(_INNER, most=MAX_STATE)
    return Sizes(
        blocks=config.count("num_hidden_layers", most=MAX_BLOCKS),
        head_dim=width,
        named={
            "vocabulary": config.count("vocab_size"),
            "width": width,
            **first_sizes(inner, state, rank, kernel),
        },
    )


def _no_attention(config: Config, sizes: Sizes) -> Keys:
    return {
        "context_length": ENDLESS,
        "embedding_length": sizes.named["width"],
        "block_count": sizes.blocks,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", zero=True),
        "vocab_size": sizes.named["vocabulary"],
    }


def _plain(config: Config) -> None:
    config.require("use_bias", (False,))
    config.require("use_conv_bias", (True,))
    # transformers divides matrices by it when it has loaded them, not only when it makes them
    config.require("rescale_prenorm_residual", (False,))


def mamba_keys(config: Config, sizes: Sizes) -> Keys:
    _plain(config)
    if sizes.named["ssm_inner"] != 2 * sizes.named["width"]:
        field = "expand" if config.stated(_INNER) is None else _INNER
        raise config.unlike(field, "a width twice that of the model")
    return _no_attention(config, sizes) | first_keys(sizes)


_LARGEST_EPSILON = 1e-5


def falcon_mamba_keys(config: Config, sizes: Sizes) -> Keys:
    """Keys; llama.cpp has one smallest divisor for the norms of a block and of what is in it."""
    inside, outside = (config.number(n, zero=True) for n in ("mixer_rms_eps", "layer_norm_epsilon"))
    if inside != outside and max(inside, outside) > _LARGEST_EPSILON:
        raise config.unlike(
            "mixer_rms_eps", f"layer_norm_epsilon, or both up to {_LARGEST_EPSILON}"
        )
    return mamba_keys(config, sizes) | {"ssm.dt_b_c_rms": True}


def _one_epsilon(config: Config) -> str | None:
    if config.get("mixer_rms_eps") == config.get("layer_norm_epsilon"):
        return None
    return (
        "llama.cpp computes the norms inside a state-space layer with layer_norm_epsilon, the "
        "model with mixer_rms_eps: small activations come out slightly otherwise"
    )


ROWS = (
    Family(
        "Mamba",
        ("MambaForCausalLM",),
        "mamba",
        WHOLE,
        (ATTENTION_NORM, *FIRST_SSM),
        mamba_keys,
        mamba_sizes,
        None,
        SILU,
    ),
    Family(
        "Falcon Mamba",
        ("FalconMambaForCausalLM",),
        "mamba",
        WHOLE,
        (ATTENTION_NORM, *FIRST_SSM),
        falcon_mamba_keys,
        mamba_sizes,
        None,
        SILU,
        said=_one_epsilon,
    ),
    Family(
        "Mamba 2",
        ("Mamba2ForCausalLM",),
        "mamba2",
        WHOLE,
        (ATTENTION_NORM, *SSM),
        mamba2_keys,
        mamba2_sizes,
        None,
        SILU,
        # Codestral Mamba has them one level further down
        renames=(("model.backbone.", "backbone."), ("model.lm_head.", "lm_head.")),
        parts=MappingProxyType(ssm_parts("mixer")),
    ),
)
