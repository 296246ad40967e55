"""Nemotron H: state-space layers, attention and feed-forward layers, one of them in each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    FLOAT,
    INT,
    INT_OR_NULL,
    NUMBER,
    TEXT,
    TEXTS_OR_NULL,
    TOKENS,
    ConfigClass,
)
from qconvert.architectures.families.keys import (
    FULL,
    MAX_BLOCKS,
    MAX_EXPERTS,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    group_keys,
    plain_sizes,
    routed_keys,
)
from qconvert.architectures.families.row import Family, Further, Slot
from qconvert.architectures.families.slots import (
    ATTENTION_NORM,
    FURTHER,
    NEXTN_INPUT,
    NEXTN_NORM,
    POST_ATTENTION_NORM,
    ROUTER,
    ROUTER_BIAS,
    UNGATED,
    UNGATED_SHARED,
    WHOLE,
    attention,
    limited,
)
from qconvert.architectures.families.ssm import (
    LINEAR,
    OLDER,
    SSM,
    ssm_keys,
    ssm_parts,
    ssm_sizes,
)
from qconvert.files.gguf_writer import GgufValue

# Names that transformers still reads for these fields.
_OLD_NAMES = {
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "use_conv_bias": "mamba_conv_bias",
    "time_step_min": "mamba_dt_min",
}

CONFIGS = (
    ConfigClass(
        "NemotronHConfig",
        "nemotron_h",
        ("NemotronHForCausalLM",),
        {
            "vocab_size": (INT, 131_072),
            "hidden_size": (INT, 4096),
            "layers_block_type": (TEXTS_OR_NULL, None),
            "tie_word_embeddings": (BOOL, False),
            "num_attention_heads": (INT, 32),
            "num_key_value_heads": (INT, 8),
            "head_dim": (INT, 128),
            "max_position_embeddings": (INT, 4096),
            "intermediate_size": (INT, 21_504),
            "mlp_hidden_act": (TEXT, "relu2"),
            "mlp_bias": (BOOL, False),
            "ssm_state_size": (INT, 128),
            "mamba_num_heads": (INT, 128),
            "mamba_head_dim": (INT, 64),
            "mamba_hidden_act": (TEXT, "silu"),
            "n_groups": (INT, 8),
            "conv_kernel": (INT, 4),
            "time_step_min": (FLOAT, 0.001),
            "use_conv_bias": (BOOL, True),
            "n_routed_experts": (INT, 8),
            "moe_intermediate_size": (INT, 7688),
            "moe_shared_expert_intermediate_size": (INT, 7688),
            "moe_latent_size": (INT_OR_NULL, None),
            "num_experts_per_tok": (INT, 2),
            "routed_scaling_factor": (NUMBER, 1.0),
            "n_group": (INT, 1),
            "topk_group": (INT, 1),
            "norm_topk_prob": (BOOL, True),
            "use_bias": (BOOL, False),
            "layer_norm_epsilon": (FLOAT, 1e-5),
        },
        (
            *("initializer_range", "use_cache", *TOKENS, "attention_dropout", "hidden_dropout"),
            *("num_logits_to_keep", "attention_bias", "sliding_window", "use_mamba_kernels"),
            *("expand", "time_step_max", "time_step_limit", "time_step_floor", "chunk_size"),
            *("mamba_proj_bias", "mamba_ssm_cache_dtype", "output_router_logits"),
            *("n_shared_experts", "moe_shared_expert_overlap", "residual_in_fp32"),
            *("num_nextn_predict_layers", "mtp_layers_block_type", "rescale_prenorm_residual"),
        ),
        ("is_causal", "per_layer_config", "hybrid_override_pattern", *_OLD_NAMES.values()),
        MappingProxyType(
            {"layer_types": "layers_block_type", "num_local_experts": "n_routed_experts"}
        ),
        harmless=MappingProxyType(
            {
                "num_hidden_layers": ANY,  # counted by the kinds of layers
                "attention_head_dim": ANY,
                "mtp_hybrid_override_pattern": ANY,
            }
        ),
    ),
)

_EXPERTS, _DENSE = "moe", "mlp"
_LETTERS = {"M": LINEAR, "E": _EXPERTS, "*": FULL, "-": _DENSE}
_USUAL = [LINEAR, _EXPERTS, FULL, _DENSE]
_PATTERN = "hybrid_override_pattern"


def _kinds(config: Config) -> list[str]:
    """Which kind each block is of."""
    listed, pattern = config.get("layers_block_type"), config.get(_PATTERN)
    name = "layers_block_type"
    if listed is not None:
        found = [OLDER.get(kind, kind) for kind in listed]
    elif config.given(_PATTERN):
        name = _PATTERN
        if not isinstance(pattern, str):
            raise config.wrong(_PATTERN, f"letters of {''.join(_LETTERS)}")
        found = [_LETTERS.get(letter, letter) for letter in pattern]
    else:
        found = _USUAL
    if not 1 <= len(found) <= MAX_BLOCKS or not set(found) <= set(_USUAL):
        raise config.wrong(name, f"up to {MAX_BLOCKS} of {', '.join(_USUAL)}")
    return found


def _of(*kinds: str) -> Callable[[Config, Sizes, int], bool]:
    return lambda config, sizes, block: _kinds(config)[block] in kinds


def _stated(config: Config, field: str) -> str:
    """The name by which the file has a field: the older one counts."""
    older = _OLD_NAMES[field]
    return older if config.given(older) else field


def nemotron_sizes(config: Config) -> Sizes:
    kinds = _kinds(config)
    more = {}
    if _EXPERTS in kinds:
        latent = config.optional_count("moe_latent_size")
        more = {
            "experts": config.count("n_routed_experts", most=MAX_EXPERTS),
            "expert_inner": config.count("moe_intermediate_size"),
            "shared": config.count("moe_shared_expert_intermediate_size"),
            "latent": latent or config.count("hidden_size"),
        }
    inner = config.count("mamba_num_heads") * config.count("mamba_head_dim")
    more |= ssm_sizes(
        config, inner=inner, heads="mamba_num_heads", groups=_stated(config, "n_groups"),
        state="ssm_state_size", kernel=_stated(config, "conv_kernel"),
    )  # fmt: skip
    plain = plain_sizes(config, blocks=len(kinds))
    return replace(plain, named=plain.named | more)


def nemotron_keys(config: Config, sizes: Sizes) -> Keys:
    config.require(_stated(config, "use_conv_bias"), (True,))
    for field in ("use_bias", "mlp_bias"):
        config.require(field, (False,))
    config.require("mamba_hidden_act", SILU)
    least = _stated(config, "time_step_min")
    if config.number(least, zero=True) > _LEAST_STEP:
        # transformers makes smaller time steps as large as this; llama.cpp takes them as they are
        raise config.unlike(least, f"at most {_LEAST_STEP}")
    kinds, named = _kinds(config), sizes.named
    for needed in (LINEAR, FULL):  # or llama.cpp ends its process
        if needed not in kinds:
            raise config.unlike("layers_block_type", f"'{needed}' for one layer at least")
    if {_EXPERTS, _DENSE} <= set(kinds):
        raise config.unlike("layers_block_type", f"either '{_EXPERTS}' or '{_DENSE}', not both")
    sparse = _EXPERTS in kinds
    widths = {_DENSE: named["inner"], _EXPERTS: named.get("expert_inner", 0)}
    groups = named["key"] // sizes.head_dim
    # One that predicts a further token attends, and has experts.
    attending = [groups * (k == FULL) for k in kinds] + [groups] * sizes.further
    inner = [widths.get(k, 0) for k in kinds] + [widths[_EXPERTS]] * sizes.further
    found = decoder_keys(config, sizes, "layer_norm_epsilon") | {
        "attention.layer_norm_epsilon": config.number("layer_norm_epsilon", zero=True),
        "attention.head_count_kv": GgufValue("UINT32", attending),
        "feed_forward_length": GgufValue("UINT32", inner),
        **ssm_keys(sizes),
    }
    if sparse:
        scale, norm = config.number("routed_scaling_factor"), config.flag("norm_topk_prob")
        found |= routed_keys(config, sizes, "sigmoid", scale=scale, norm=norm)
        found |= group_keys(config, sizes)
        found["expert_shared_feed_forward_length"] = named["shared"]
        if config.get("moe_latent_size") is not None:
            found["moe_latent_size"] = named["latent"]
    return found


_LEAST_STEP = 1e-3


def _said(config: Config) -> str | None:
    least = config.number(_stated(config, "time_step_min"), zero=True)
    return (
        f"llama.cpp has no least time step of state-space layers, and transformers one of {least}: "
        "outputs differ a little where a step is smaller"
        if least
        else None
    )


def _latent(config: Config, sizes: Sizes, block: int) -> bool:
    return config.get("moe_latent_size") is not None


_ATTENTION = attention(heads=False, bias=False)
_MIXED = (ATTENTION_NORM, *limited(SSM, _of(LINEAR)), *limited(_ATTENTION, _of(FULL)))
# Of the last layer's own there is a norm.
_NEXTN = (*NEXTN_INPUT, replace(NEXTN_NORM, optional=False))
_SPARSE = (
    ROUTER,
    ROUTER_BIAS,
    Slot("ffn_up_exps.weight", "experts expert_inner latent"),
    Slot("ffn_down_exps.weight", "experts latent expert_inner"),
    *UNGATED_SHARED,
    *limited(
        (
            Slot("ffn_latent_down.weight", "latent width"),
            Slot("ffn_latent_up.weight", "width latent"),
        ),
        _latent,
    ),
)
_PARTS = {
    "norm.weight": ATTENTION_NORM.name,
    **{
        f"mixer.{letter}_proj.weight": f"attn_{name}.weight"
        for letter, name in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output"))
    },
    **{f"mixer.{way}_proj.weight": f"ffn_{way}.weight" for way in ("up", "down")},
    **{
        f"mixer.experts.{way}_proj{end}": f"ffn_{way}_exps.weight"
        for way in ("up", "down")
        for end in ("", ".weight")
    },
    **{
        f"mixer.shared_experts.{way}_proj.weight": f"ffn_{way}_shexp.weight"
        for way in ("up", "down")
    },
    "post_norm.weight": POST_ATTENTION_NORM.name,
    "mixer.gate.weight": ROUTER.name,
    "mixer.gate.e_score_correction_bias": ROUTER_BIAS.name,
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
}


def _instead(fields: Mapping[str, Any]) -> Family | None:
    listed = fields.get("layer_types", fields.get("layers_block_type"))
    pattern = fields.get(_PATTERN, "")
    if isinstance(listed, list):
        return _ROW if _EXPERTS not in listed else None
    return _ROW if isinstance(pattern, str) and pattern and "E" not in pattern else None


_MOE = Family(
    "Nemotron H",
    ("NemotronHForCausalLM",),
    "nemotron_h_moe",
    WHOLE,
    (*_MIXED, *limited(_SPARSE, _of(_EXPERTS))),
    nemotron_keys,
    nemotron_sizes,
    None,
    ("relu2",),
    renames=(("backbone.", "model."),),
    parts=MappingProxyType({name: (slot,) for name, slot in _PARTS.items()} | ssm_parts("mixer")),
    instead=_instead,
    said=_said,
    further=Further(
        (ATTENTION_NORM, POST_ATTENTION_NORM, *_ATTENTION, *_SPARSE, *_NEXTN),
        (
            ("mtp.layers.1.norm.", "model.layers.{}.post_norm."),
            ("mtp.layers.1.final_layernorm.", "model.layers.{}.shared_head.norm."),
            *((f"mtp.layers.{half}.", "model.layers.{}.") for half in (0, 1)),
        ),
    ),
)
_ROW = replace(
    _MOE,
    further=None,
    dropped=(("mtp.", FURTHER),),
    arch="nemotron_h",
    block=(*_MIXED, *limited(UNGATED, _of(_DENSE))),
)

ROWS = (_MOE,)
