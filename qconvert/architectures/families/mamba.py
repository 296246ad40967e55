"""Mamba 2."""

from __future__ import annotations

from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    FLOATS,
    INT,
    TEXT,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.keys import MAX_BLOCKS, SILU, Keys, Sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import NORMS, WHOLE
from qconvert.architectures.families.ssm import (
    ENDLESS,
    SSM,
    UNLIMITED,
    require_unlimited,
    ssm_keys,
    ssm_parts,
    ssm_sizes,
)

CONFIGS = (
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
            *("time_step_rank", "time_step_min", "time_step_max", "time_step_floor"),
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
    config.require("use_bias", (False,))
    config.require("use_conv_bias", (True,))
    # transformers divides matrices by it when it has loaded them, not only when it makes them
    config.require("rescale_prenorm_residual", (False,))
    require_unlimited(config)
    return {
        "context_length": ENDLESS,
        "embedding_length": sizes.named["width"],
        "block_count": sizes.blocks,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": config.number("layer_norm_epsilon", zero=True),
        "vocab_size": sizes.named["vocabulary"],
        **ssm_keys(sizes),
    }


ROWS = (
    Family(
        "Mamba 2",
        ("Mamba2ForCausalLM",),
        "mamba2",
        WHOLE,
        (NORMS[0], *SSM),
        mamba2_keys,
        mamba2_sizes,
        None,
        SILU,
        # Codestral Mamba has them one level further down
        renames=(("model.backbone.", "backbone."), ("model.lm_head.", "lm_head.")),
        parts=MappingProxyType(ssm_parts("mixer")),
    ),
)
