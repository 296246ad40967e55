"""Changes of the tiny models' configurations: every field, and fields beside each other.

For `make_config_table.py`. What the fields of a class are is transformers' to say; here are values
for them, and combinations that configurations are found with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from config_cases import BASES, DECODERS, REMOVED, Fields
from family_models import ENCODERS, NARROW

from qconvert.architectures.config_classes import ConfigClass
from qconvert.architectures.families import known_class


@dataclass(frozen=True, slots=True)
class Case:
    """A change of a base.

    Attributes:
        field: that the case is about.
        value: what it is set to, for people.
        changes: fields of config.json, or `REMOVED`.
        weights: the changes by which the checkpoint's tensors are found, if other ones.
    """

    field: str
    value: str
    changes: Fields = field(default_factory=dict)
    weights: Fields | None = None


FULL, SLIDING = "full_attention", "sliding_attention"

# --- cases ----------------------------------------------------------------------------------------

WITHOUT_WIDTH = "yarn, head_dim left out"
# What is to be taken although transformers does not load it, and why.
TAKEN = {
    "longrope called su": "transformers 5 wants the original context inside beside the older name",
    WITHOUT_WIDTH: "transformers does not fill in head_dim for this class, and stumbles over that",
}
# Values that are not the default; a second type, and what no model can have, among them.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [320, 0],
    "hidden_size": [96, 64.0, "64", 66],
    "intermediate_size": [64, 96.0],
    "num_hidden_layers": [1, 3, 2.0, 0],
    "num_attention_heads": [2, 8, 4.0],
    "num_key_value_heads": [1, 4, 3, 2.0],
    "head_dim": [32, 16, 8, 0, 15, 16.0, "16"],
    "max_position_embeddings": [512, 256.0],
    "moe_intermediate_size": [32],
    "num_local_experts": [2, 8, 0],
    "num_experts": [2, 8, 0],
    "num_experts_per_tok": [1, 3, 4, 5, 0],
    "type_vocab_size": [1, 3, 0],
    "rms_norm_eps": [1e-2, 0.5, 0.0, 1e-45, 1, "1e-5", -1e-5],
    "layer_norm_eps": [1e-2, 0.5, 0.0, 1, "1e-5"],
    "hidden_act": ["swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", 7],
    "hidden_activation": ["gelu", "gelu_new", "gelu_fast", "silu", "relu"],
    "attention_bias": [True, "true", 1],
    "mlp_bias": [True],
    "rope_theta": [500.0, 500, 1e6, 0, -1.0, "1e4", 1.0, 0.5],
    "partial_rotary_factor": [0.5, 1.0, 1, 0.0, 2.0, 0.4, "1"],
    "original_max_position_embeddings": [64],
    "is_causal": [True, False],
    "per_layer_config": [{}, {"0": {"intermediate_size": 32}}],
    "query_pre_attn_scalar": [16, 32.0, 0],
    "attn_logit_softcapping": [1.0, 50, 0.0],
    "final_logit_softcapping": [5.0, 30, 0.0, -1.0],
    "use_bidirectional_attention": [True],
    "norm_topk_prob": [False],
    "decoder_sparse_step": [2, 0],
    "mlp_only_layers": [[0], [7], [], "0"],
    "is_decoder": [True],
    "add_cross_attention": [True],
    "position_embedding_type": ["absolute", "relative_key"],
    "sliding_window": [8, 16, 256, 4096, 0, -1, 8.0, "8"],
    "sliding_window_pattern": [2, 3, 1, -2, 0, 2.0, 100],
    "rope_local_base_freq": [500.0, 500, 0],
    "use_sliding_window": [True, 1],
    "max_window_layers": [0, -1, "1"],
    "layer_types": [
        ["full_attention"],
        "full_attention",
        ["chunked_attention", "full_attention"],
        ["full_attention", "full_attention"],
        ["sliding_attention", "full_attention"],
    ],
    "attention_chunk_size": [8],
    "rope_parameters": [{}, [], "linear"],
    "rope_scaling": [{}, [], [1], "linear"],
    "tie_word_embeddings": [True, "true"],
}
_UNUSED: dict[str, list[Any]] = {  # no computation depends on these
    "num_labels": [3],
    "initializer_range": [0.5],
    "use_cache": [False],
    "attention_dropout": [0.5],
    "hidden_dropout_prob": [0.5],
    "attention_probs_dropout_prob": [0.5],
    "classifier_dropout": [0.5],
    "resid_pdrop": [0.5],
    "embd_pdrop": [0.5],
    "pretraining_tp": [2],
    "pad_token_id": [3, -1],
    "bos_token_id": [4],
    "eos_token_id": [4, [4, 5]],
    "output_router_logits": [True],
    "router_aux_loss_coef": [0.5],
    "router_jitter_noise": [0.5],
    "mm_tokens_per_image": [9],
    "boi_token_index": [303],
    "eoi_token_index": [303],
    "image_token_index": [303],
    "output_hidden_states": [True],
    "return_dict": [True],
    "dtype": ["float16"],
    "torch_dtype": ["bfloat16"],
    "chunk_size_feed_forward": [8],
    "is_encoder_decoder": [False],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "transformers_version": ["4.40.0"],
    "_name_or_path": ["somewhere"],
    "tokenizer_class": ["PreTrainedTokenizerFast"],
    "temperature": [0.5],
    "output_attentions": [True],
    "tie_last_hidden_states": [True],
    "attn_implementation": ["sdpa"],
    "cache_implementation": ["hybrid"],
}
# transformers caps the logits of no model of text and images
UNUSED = (*_UNUSED, "text_config.final_logit_softcapping")
VALUES |= _UNUSED
VALUES |= {
    "no_rope_layers": [[1, 0]],
    "shared_expert_intermediate_size": [48, 0],
    "shared_intermediate_size": [48, 0],
    "qkv_bias": [False],
    "embedding_multiplier": [2.0, 3],
    "logits_scaling": [4.0, 0.0],
    "residual_multiplier": [0.25, 0.0],
    "attention_multiplier": [0.25, 0.0],
    "attention_out_bias": [True],
    "logit_scale": [0.5, 0.0],
    "use_qk_norm": [True],
    "use_bias": [False],
    "norm_epsilon": [1e-2],
    "use_qkv_bias": [False],
    "qk_layernorm": [True],
    "use_parallel_residual": [True],
    "eod_token_id": [5],
    "n_routed_experts": [8, 0],
    "n_shared_experts": [2, 0],
    "routed_scaling_factor": [2.0, 0.0],
    "n_group": [2, 3],
    "topk_group": [2, 0],
    "first_k_dense_replace": [0, 2],
    "num_mtp_layers": [2],
    "swiglu_alpha": [1.5],
    "swiglu_limit": [5.0],
    "norm_eps": [1e-2],
    "conv_bias": [True],
    "conv_L_cache": [4, 0],
    "block_multiple_of": [32],
    "block_ffn_dim_multiplier": [2.0],
    "block_auto_adjust_ff_dim": [False],
    "full_attn_idxs": [[0]],
    "tie_embedding": [False],
    "block_ff_dim": [128],
    "num_dense_layers": [2, 3],
    "vocab_size_per_layer_input": [320],
    **{
        name: [303]
        for name in (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "boi_token_id",
            "eoi_token_id",
            "boa_token_id",
            "eoa_token_index",
            "eoa_token_id",
            "audio_token_id",
        )
    },
    "projector_hidden_act": ["relu"],
    "vision_feature_layer": [-1],
    "vision_feature_select_strategy": ["full"],
    "image_seq_length": [9],
    "image_grid_pinpoints": [[[28, 56]]],
    "scale_factor": [2],
    "downsample_ratio": [0.5],
    "multimodal_projector_bias": [False],
    "spatial_merge_size": [2],
    "hidden_size_per_layer_input": [64, 0],
    "altup_active_idx": [1],
    "audio_soft_tokens_per_image": [188],
    "vision_soft_tokens_per_image": [256],
    "altup_correct_scale": [False],
    "altup_num_inputs": [3],
    "altup_coef_clip": [1.0],
    "laurel_rank": [32],
    "activation_sparsity_pattern": [[0.0] * 6, [0.5] * 6],
    "attention_k_eq_v": [False],
    "num_kv_shared_layers": [0, 3],
    "enable_moe_block": [True],
    "use_double_wide_mlp": [False],
    "top_k_experts": [2],
    "global_head_dim": [32],
    "num_global_key_value_heads": [2],
    "linear_conv_kernel_dim": [3],
    "linear_key_head_dim": [8],
    "linear_value_head_dim": [8],
    "linear_num_key_heads": [1, 3],
    "linear_num_value_heads": [2, 3],
    "full_attention_interval": [3],
    "use_expert_bias": [False],
    "rotary_dim": [8],
    "kv_lora_rank": [48],
    "q_lora_rank": [48],
    "qk_rope_head_dim": [8, 15],
    "qk_nope_head_dim": [8],
    "v_head_dim": [32],
    "topk_method": ["group_limited_greedy"],
    "rope_interleave": [False],
    "mlp_layer_types": [["dense", "dense"], ["sparse", "sparse"], ["sparse", "dense"]],
    "residual_dropout": [0.5],
    "embedding_dropout": [0.5],
    "hidden_dropout": [0.5],
}
VALUES |= {
    "d_model": [96],
    "d_kv": [16],
    "d_ff": [64],
    "num_layers": [1],
    "num_decoder_layers": [1, 4],
    "num_heads": [2],
    "relative_attention_num_buckets": [16, 30],
    "relative_attention_max_distance": [64],
    "layer_norm_epsilon": [1e-2],
    "feed_forward_proj": ["gated-gelu", "gelu", "gated-silu"],
    "dropout_rate": [0.5],
    "initializer_factor": [0.5],
    "n_positions": [64],
}
VALUES |= {
    "initializer_cutoff_factor": [1.0],
    "norm_bias": [True],
    "local_attention": [32, 7, 0],
    "mlp_dropout": [0.5],
    "decoder_bias": [False],
    "classifier_pooling": ["mean"],
    "classifier_bias": [True],
    "classifier_activation": ["relu"],
    "deterministic_flash_attn": [True],
    "sparse_prediction": [True],
    "sparse_pred_ignore_index": [-1],
    "cls_token_id": [4],
    "sep_token_id": [4],
    "global_attn_every_n_layers": [2, 1, 0],
    "global_rope_theta": [500.0],
    "local_rope_theta": [500.0],
}
VALUES |= {
    "num_heads": [4, 7, 0],
    "state_size": [32, 0],
    "layer_norm_epsilon": [1e-2],
    "expand": [4, 0],
    "conv_kernel": [3, 0],
    "n_groups": [1, 3],
    "use_conv_bias": [False],
    "time_step_limit": [[0.0, 0.5], [0.5, {"__float__": "Infinity"}]],
    "mamba_d_ssm": [64, 100],
    "mamba_norm_before_gate": [True],
    "mamba_rms_norm": [False],
    "projectors_bias": [True],
    "num_logits_to_keep": [2],
    "lm_head_multiplier": [2.0, 0.0],
    "mlp_multipliers": [[1.0, 2.0], [1.0]],
    "key_multiplier": [2.0],
    "attention_out_multiplier": [2.0],
    "attention_in_multiplier": [2.0],
    "ssm_multipliers": [[1.0, 2.0, 0.5, 1.5, 0.7], [1.0]],
    "ssm_in_multiplier": [2.0],
    "ssm_out_multiplier": [2.0],
    "intermediate_size_mlp": [64],
    "moe_layers": [[0, 1, 2, 3], [3], [0, 3], []],
    "interleave_moe_layer_step": [1, 0],
    "no_rope_layer_interval": [2, 4],
    "attn_temperature_tuning": [False],
    "floor_scale": [16],
    "attn_scale": [0.5],
    "clip_qkv": [0.5],
    "moe_k": [1, 5],
    "moe_num_experts": [8],
    "moe_num_shared_experts": [1, 0],
    "moe_layer_start_index": [0, 3],
    "moe_layer_end_index": [1, 2],
    "moe_layer_interval": [2],
    "moe_norm_min": [0.9],
    "moe_topk": [[2, 2], [2, 1], 5],
    "layers_block_type": [
        ["linear_attention", "moe", FULL, "mlp", "linear_attention"],
        [FULL, "moe", FULL, "moe", FULL],
        ["linear_attention", "moe", SLIDING],
    ],
    "hybrid_override_pattern": ["MEM*E", "M-M*-", "MEMZ*", 7],
    "mlp_hidden_act": ["silu"],
    "use_mamba_kernels": [False],
    "ssm_state_size": [32],
    "mamba_num_heads": [4, 7],
    "mamba_head_dim": [32],
    "mamba_hidden_act": ["relu"],
    "moe_shared_expert_intermediate_size": [48],
    "moe_latent_size": [32],
    "moe_shared_expert_overlap": [False],
    "num_nextn_predict_layers": [1],
    "mtp_layers_block_type": [["moe"]],
    "mamba_ssm_cache_dtype": ["float16"],
    "mamba_dt_min": [0.05],
    "mamba_n_heads": [4, 7],
    "mamba_n_groups": [1, 3],
    "mamba_d_state": [32],
    "mamba_d_head": [16, 32],
    "mamba_d_conv": [3],
    "mamba_expand": [1],
    "mamba_conv_bias": [False],
    "mamba_proj_bias": [True],
    "mamba_chunk_size": [64],
    "chunk_size": [64],
    "residual_in_fp32": [False],
    "time_step_rank": [7],
    "time_step_min": [0.01],
    "time_step_max": [0.2],
    "time_step_floor": [0.5],
    "rescale_prenorm_residual": [True],
}
VALUES |= {
    "rotary_pct": [0.5],
    "rotary_emb_base": [500],
    "use_mambapy": [True],
    "use_associative_scan": [False],
    "time_step_scale": [0.5],
    "time_step_init_scheme": ["constant"],
    "mixer_rms_eps": [1e-2],
}
VALUES |= {
    "n_embd": [96],
    "n_layer": [1, 0],
    "n_head": [2, 3],
    "n_inner": [128],
    "n_embed": [96],
    "activation_function": ["relu", "gelu"],
    "activation": ["relu", "gelu_new"],
    "attn_pdrop": [0.5],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "reorder_and_upcast_attn": [True],
    "add_cross_attention": [True],
    "multi_query": [False],
    "attention_softmax_in_fp32": [False],
    "scale_attention_softmax_in_fp32": [False],
    "summary_type": ["last"],
    "summary_use_proj": [False],
    "summary_activation": ["tanh"],
    "summary_proj_to_labels": [False],
    "summary_first_dropout": [0.5],
    "apply_residual_connection_post_layernorm": [True],
    "slow_but_exact": [True],
    "seq_length": [512],
    "num_ln_in_parallel_attn": [1, 3],
    "num_kv_heads": [1, 4, 3],
    "alibi": [True],
    "new_decoder_architecture": [False],
    "parallel_attn": [False],
    "bias": [True],
    "ffn_hidden_size": [128],
    "n_layers": [1, 0],
    "n_heads": [2, 3],
    "dim": [96],
    "hidden_dim": [64],
    "dropout": [0.5],
    "qa_dropout": [0.5],
    "seq_classif_dropout": [0.5],
    "sinusoidal_pos_embds": [True],
}
VALUES |= {
    "expert_layer_period": [1, 3, 0],
    "expert_layer_offset": [0, 2],
    "attn_layer_period": [3, 1, 0],
    "attn_layer_offset": [1, 5],
    "mamba_dt_rank": [6],
    "attn_layer_indices": [[0, 2], [], [0, 1, 2]],
    "z_loss_coefficient": [0.5],
}
VALUES |= {
    "num_shared_experts": [2, 0],
    "decoder_start_token_id": [7],
    "mask_token_id": [7],
}
# Read by transformers though no field of the class, or of every class before transformers 5.
BESIDE = (
    "torch_dtype", "_name_or_path", "tokenizer_class", "temperature", "output_attentions",
    "tie_last_hidden_states", "attn_implementation", "cache_implementation", "per_layer_config",
)  # fmt: skip
BESIDE_DECODERS = (
    "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "is_causal", "sliding_window", "layer_types", "attention_chunk_size",
)  # fmt: skip
BESIDE_CLASS = {
    "qwen2": ("head_dim",),
    "qwen3_moe": ("head_dim",),
    "phi3": ("head_dim",),
    "gemma3_text": ("sliding_window_pattern", "rope_local_base_freq"),
    "bert": ("position_embedding_type", "head_dim"),
}
# Without the field the class's default makes another model, of which no checkpoint is at hand, and
# which may be too large to build.
DEFAULT_IS_ANOTHER = frozenset(
    {
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "moe_intermediate_size",
        "num_local_experts", "num_experts", "text_config", "vision_config",
    }
)  # fmt: skip
# Fields that move outputs by what the order of additions rounds away, and by no more.
ROUNDING = ("chunk_size", "mamba_chunk_size")
# Fields that a refusal may name instead: one contradicts the other.
RELATED = {
    "head_dim": ("query_pre_attn_scalar",),
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
    "num_attention_heads": ("num_key_value_heads", "mrope_section"),
    "hidden_size": ("mrope_section",),
    "partial_rotary_factor": ("mrope_section",),
    "num_experts_per_tok": ("n_group",),
    "layer_types": ("num_kv_shared_layers", "position_embedding_type"),
    "enable_moe_block": ("num_experts",),
    "linear_num_key_heads": ("linear_num_value_heads",),
    "max_position_embeddings": ("pad_token_id",),
    "layers_block_type": ("layer_types",),
    "num_hidden_layers": (
        "attn_layer_period",
        "attn_layer_indices",
        "layer_types",
        "first_k_dense_replace",
        "moe_layer_start_index",
        "num_dense_layers",
        "mlp_layer_types",
        "num_kv_shared_layers",
    ),
}
# Which matrix is the output matrix is settled by comparing the two that a checkpoint may have.
NOT_HERE = {"gemma3": ("tie_word_embeddings",)}
NOT_FIELDS = ("architectures", "text_config", "vision_config", "audio_config")

_LONG = [1.0 + 0.5 * i for i in range(16)]
_SHORT = [1.0 + 0.05 * i for i in range(16)]


def field_cases(name: str, fields: list[str]) -> Iterator[Case]:
    """Each field set, null, and removed."""
    for f in fields:
        for value in VALUES[f]:
            if value == 66 and name in ("mixtral", "qwen3_moe"):
                continue  # torch multiplies experts by rows of whole 16 bytes
            yield Case(f, json.dumps(value), {f: value})
        yield Case(f, "null", {f: None})
        if f in BASES[name]:
            yield Case(f, "absent", {f: REMOVED})


def rope_cases(name: str) -> Iterator[Case]:
    """Rotary positions, in the words of old and new configurations."""
    pairs = {"qwen3": 16, "gemma2": 16}.get(name, 8)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    long = {"rope_type": "longrope", "short_factor": _SHORT[:pairs], "long_factor": _LONG[:pairs]}

    # transformers' class of Mixtral does not fill in the width of a head, and stumbles over that
    width = {"head_dim": 16} if name == "mixtral" else {}

    def scaling(value: str, fields: Fields | None, **beside: Any) -> Case:
        return Case("rope_scaling", value, {"rope_scaling": fields, **width, **beside})

    def parameters(value: str, fields: Fields, **beside: Any) -> Case:
        return Case("rope_parameters", value, {"rope_parameters": fields, **width, **beside})

    for kind in ("type", "rope_type"):
        yield scaling(f"{kind} linear", {kind: "linear", "factor": 2.0})
        yield scaling(
            f"{kind} yarn",
            {**yarn, "rope_type": "yarn"}
            if kind == "rope_type"
            else {"type": "yarn", **{n: v for n, v in yarn.items() if n != "rope_type"}},
        )
    linear = {"rope_type": "linear", "factor": 4.0}
    yield scaling("rope_type linear, type dynamic", {**linear, "type": "dynamic"})
    yield scaling("rope_type null, type linear", {"rope_type": None, "type": "linear", "factor": 2})
    yield scaling(
        "rope_type default, type linear", {**linear, "rope_type": "default", "type": "linear"}
    )
    for factor in (2, 1.0, 0.5, None, "2", 0, -2.0, 5e-324, 1e300, True):
        yield scaling(f"linear, factor {json.dumps(factor)}", linear | {"factor": factor})
    yield scaling("linear without factor", {"rope_type": "linear"})
    yield scaling("linear, attention_factor 0.5", linear | {"attention_factor": 0.5})
    yield scaling("linear, unknown field", linear | {"factr": 0.5})
    for kind in ("dynamic", "su", "mrope", "proportional", "none", 7, ["linear"], {}, ""):
        yield scaling(f"rope_type {json.dumps(kind)}", {"rope_type": kind, "factor": 2.0})
    # two names for one thing
    yield parameters("linear", linear)
    yield parameters("linear, beside rope_theta 500", linear, rope_theta=500.0)
    yield parameters(
        "linear with rope_theta 500, beside rope_theta 1e6",
        linear | {"rope_theta": 500.0},
        rope_theta=1e6,
    )
    yield parameters(
        "linear with rope_theta 500, beside rope_theta null",
        linear | {"rope_theta": 500.0},
        rope_theta=None,
    )
    yield parameters("linear with rope_theta null", linear | {"rope_theta": None}, rope_theta=500.0)
    yield parameters(
        "default with rope_theta 500 (integer)", {"rope_type": "default", "rope_theta": 500}
    )
    yield parameters("rope_theta 500 alone", {"rope_theta": 500.0})
    yield scaling(
        "linear, beside rope_parameters with rope_theta 500",
        linear,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    yield scaling("linear, beside rope_parameters yarn", linear, rope_parameters=yarn)
    yield scaling("null, beside rope_parameters linear", None, rope_parameters=linear)
    yield scaling("empty, beside rope_parameters linear", {}, rope_parameters=linear)
    yield scaling("linear, beside rope_parameters null", linear, rope_parameters=None)
    yield scaling("linear with rope_theta 500", linear | {"rope_theta": 500.0}, rope_theta=1e6)
    yield scaling("linear with partial_rotary_factor 0.5", linear | {"partial_rotary_factor": 0.5})
    yield parameters(
        "partial_rotary_factor 0.5", {"rope_type": "default", "partial_rotary_factor": 0.5}
    )
    yield parameters(
        "partial_rotary_factor 0.5, beside 0.25",
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        partial_rotary_factor=0.25,
    )
    yield parameters(
        "partial_rotary_factor null", {"rope_type": "default", "partial_rotary_factor": None}
    )
    yield parameters("by layer", {FULL: linear, SLIDING: {"rope_type": "default"}})
    yield parameters("by layer, one null", {FULL: linear, SLIDING: None})
    # YaRN
    for n, values in {
        "factor": (4, 1.0, 0.5, None, 16.0),
        "attention_factor": (0.5, 1, 1.0, None, 0, "1"),
        "beta_fast": (4.0, 8, None, 0, 1e3, -1.0),
        "beta_slow": (2.0, 0.25, None, 0),
        "mscale": (0.7, None),
        "mscale_all_dim": (0.7,),
        "truncate": (False, True, None, 0),
        "original_max_position_embeddings": (32, None, 0, 64.0, 4096),
    }.items():
        for v in values:
            yield scaling(f"yarn, {n} {json.dumps(v)}", yarn | {n: v})
    yield scaling("yarn without factor", {n: v for n, v in yarn.items() if n != "factor"})
    yield scaling("yarn without original", {"rope_type": "yarn", "factor": 2.0})
    yield scaling("yarn, original outside too", yarn, original_max_position_embeddings=32)
    yield scaling(
        "yarn, mscale 1 and mscale_all_dim 1", yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}
    )
    yield scaling(
        "yarn, mscale 0.7 and mscale_all_dim 1.4", yarn | {"mscale": 0.7, "mscale_all_dim": 1.4}
    )
    yield scaling(
        "yarn, mscale 0 and mscale_all_dim 1", yarn | {"mscale": 0, "mscale_all_dim": 1.0}
    )
    yield scaling("yarn, betas as they are by default", yarn | {"beta_fast": 32, "beta_slow": 1})
    yield scaling(
        "yarn, betas, truncate and attention_factor",
        yarn | {"beta_fast": 4.0, "beta_slow": 2.0, "truncate": False, "attention_factor": 0.8},
    )
    yield scaling("yarn, finetuned", yarn | {"finetuned": True})
    yield scaling("yarn, rope_theta 1", yarn | {"rope_theta": 1.0})
    yield scaling("yarn, rope_theta 500", yarn, rope_theta=500.0)
    # Llama 3
    yield scaling("llama3", llama3)
    original = "original_max_position_embeddings"
    for n, v in (
        ("factor", 4), ("factor", 5e-324), ("low_freq_factor", 2), ("high_freq_factor", 1.0),
        ("low_freq_factor", 0), (original, None), (original, 512),
    ):  # fmt: skip
        yield scaling(f"llama3, {n} {json.dumps(v)}", llama3 | {n: v})
    for n in ("factor", "low_freq_factor", "original_max_position_embeddings"):
        yield scaling(f"llama3 without {n}", {m: v for m, v in llama3.items() if m != n})
    yield scaling("llama3, original outside too", llama3, original_max_position_embeddings=64)
    # LongRoPE: a context that is no longer than the original one, and a text that is longer
    whole, stretched = {original: 256}, {original: 128, "max_position_embeddings": 512}
    for label, where in (("short", whole), ("long", stretched)):
        for inside in (False, True):
            fields = long | ({original: where[original]} if inside else {})
            beside = {n: v for n, v in where.items() if not (inside and n == original)}
            yield scaling(
                f"longrope, {label}, original {'inside' if inside else 'outside'}", fields, **beside
            )
        for n, v in (
            ("factor", 4.0),
            ("attention_factor", 0.5),
            ("attention_factor", None),
            ("factor", 1),
        ):
            yield scaling(f"longrope, {label}, {n} {json.dumps(v)}", long | {n: v}, **where)
    yield scaling(
        "longrope, text shorter than the original, context longer",
        long,
        **{original: 200, "max_position_embeddings": 512},
    )
    yield scaling("longrope, original 1", long, **{original: 1})
    yield scaling("longrope, original 0", long, **{original: 0})
    yield scaling("longrope, other lengths", long | {"short_factor": [1.0]}, **whole)
    yield scaling(
        "longrope without long_factor",
        {n: v for n, v in long.items() if n != "long_factor"},
        **whole,
    )
    yield scaling("longrope, a zero", long | {"short_factor": [0.0] * pairs}, **whole)
    yield scaling("longrope called su", long | {"rope_type": "su"}, **whole)
    yield scaling(
        "longrope called su, original inside", long | {"rope_type": "su", original: 256}, **whole
    )
    yield scaling("longrope called yarn", long | {"rope_type": "yarn"}, **whole)


def gemma3_rope_cases() -> Iterator[Case]:
    """One base for full layers, another for sliding ones."""
    linear = {"rope_type": "linear", "factor": 4.0}

    def both(full: Any, sliding: Any, **beside: Any) -> Fields:
        return {"rope_parameters": {FULL: full, SLIDING: sliding}, **beside}

    for value, changes in {
        "both bases": both({"rope_theta": 500.0}, {"rope_theta": 50.0}),
        "both bases, older ones beside": both(
            {"rope_theta": 500.0}, {"rope_theta": 50.0}, rope_theta=7.0, rope_local_base_freq=7.0
        ),
        "without bases, older ones beside": both(
            {"rope_type": "default"}, {}, rope_theta=500.0, rope_local_base_freq=50.0
        ),
        "full linear": both(linear, {"rope_type": "default"}),
        "full called type linear": both({"type": "linear", "factor": 4.0}, {}),
        "full linear, factor null": both(linear | {"factor": None}, {}),
        "sliding linear": both({"rope_type": "default"}, linear),
        "full yarn": both(
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {}
        ),
        "full null": both(None, {"rope_theta": 50.0}),
        "sliding null": both({"rope_theta": 500.0}, None),
        "full alone": {"rope_parameters": {FULL: {"rope_theta": 500.0}}},
        "sliding alone": {"rope_parameters": {SLIDING: {"rope_theta": 50.0}}},
        "full no object": both("linear", {}),
        "flat": {"rope_parameters": linear | {"rope_theta": 500.0}},
        "full with partial_rotary_factor 0.5": both({"partial_rotary_factor": 0.5}, {}),
        "rope_theta null inside": both({"rope_theta": None}, {}),
    }.items():
        yield Case("rope_parameters", value, changes)
    for value, changes in {
        "rope_type linear": {"rope_scaling": linear},
        "type linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "rope_type linear, beside rope_parameters": both(
            {"rope_theta": 500.0}, {}, rope_scaling=linear
        ),
        "rope_type linear, beside rope_parameters without full": {
            "rope_parameters": {SLIDING: {"rope_theta": 50.0}}, "rope_scaling": linear,
        },
        "rope_type linear, beside full null": both(None, {}, rope_scaling=linear),
        "rope_type llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
        "by layer": {"rope_scaling": {FULL: linear}},
    }.items():  # fmt: skip
        yield Case("rope_scaling", value, changes)


def class_cases(name: str) -> Iterator[Case]:
    """What belongs to one class: layers, windows, experts, biases, tied names."""
    if name == "llama":
        yield Case("attention_bias", "true, checkpoint without", {"attention_bias": True}, {})
        yield Case("attention_bias", "false, checkpoint with", {}, {"attention_bias": True})
        yield Case("mlp_bias", "true, checkpoint without", {"mlp_bias": True}, {})
        yield Case("mlp_bias", "false, checkpoint with", {}, {"mlp_bias": True})
        yield Case("architectures", "absent", {"architectures": REMOVED})
        yield Case("architectures", "null", {"architectures": None})
        yield Case("model_type", "mistral", {"model_type": "mistral"})
        yield Case("model_type", "own", {"model_type": "my_llama"})
        yield Case("rope_thetta", "500.0", {"rope_thetta": 500.0})
        yield Case("num_experts", "4", {"num_experts": 4})
    if name in ("llama", "gemma2", "qwen3"):
        yield Case("hidden_size", "66, head_dim 32", {"hidden_size": 66, "head_dim": 32})
    if name == "mistral":
        yield Case("attention_bias", "true, checkpoint with", {"attention_bias": True}, {})
        yield Case(
            "sliding_window",
            "absent, context 8192",
            {"sliding_window": REMOVED, "max_position_embeddings": 8192},
        )
        yield Case("layer_types", "full", {"layer_types": [FULL, FULL]})
    if name == "mixtral":
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        yield Case("rope_scaling", WITHOUT_WIDTH, {"rope_scaling": yarn})
    if name in ("mixtral", "qwen3_moe"):
        yield Case(
            "num_experts", "4, num_local_experts 8", {"num_experts": 4, "num_local_experts": 8}
        )
        yield Case(
            "num_experts", "8, num_local_experts 4", {"num_experts": 8, "num_local_experts": 4}
        )
        own, other = ("num_local_experts", "num_experts")[:: 1 if name == "mixtral" else -1]
        yield Case("num_experts", f"{other} alone", {own: REMOVED, other: 4})
        yield Case("num_experts", f"{other} null", {other: None})
    if name in ("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text"):
        on = {"use_sliding_window": True, "sliding_window": 16}
        yield Case("sliding_window", "16, not used", {"sliding_window": 16})
        yield Case("sliding_window", "16, used, max_window_layers 0", on | {"max_window_layers": 0})
        yield Case("sliding_window", "16, used, max_window_layers 1", on | {"max_window_layers": 1})
        yield Case("sliding_window", "16, used, max_window_layers 2", on | {"max_window_layers": 2})
        yield Case("sliding_window", "16, used, max_window_layers absent", on)
        yield Case(
            "sliding_window", "256, used", on | {"sliding_window": 256, "max_window_layers": 0}
        )
        yield Case(
            "sliding_window", "null, used", on | {"sliding_window": None, "max_window_layers": 0}
        )
        yield Case("layer_types", "sliding, window 16 used", on | {"layer_types": [SLIDING] * 2})
        yield Case("layer_types", "sliding, window not used", {"layer_types": [SLIDING] * 2})
        yield Case(
            "layer_types",
            "full, window 16 used",
            on | {"layer_types": [FULL] * 2, "max_window_layers": 0},
        )
        yield Case("layer_types", "full, by the older name", {"layer_types": ["attention"] * 2})
    if name == "qwen3_moe":
        yield Case("sliding_window", "16, not used", {"sliding_window": 16})
        yield Case("sliding_window", "16, used", {"use_sliding_window": True, "sliding_window": 16})
        yield Case(
            "norm_topk_prob",
            "false, all experts used",
            {"norm_topk_prob": False, "num_experts_per_tok": 4},
        )
    if name in ("gemma2", "gemma3_text"):
        n = BASES[name]["num_hidden_layers"]
        for label, types in {
            "all full": [FULL] * n,
            "all sliding": [SLIDING] * n,
            "the other way": [FULL, *[SLIDING] * (n - 1)],
            "as usual": [FULL if not (i + 1) % (2 if n == 2 else 6) else SLIDING for i in range(n)],
            "too many": [FULL] * (n + 1),
        }.items():
            yield Case("layer_types", label, {"layer_types": types})
        yield Case(
            "layer_types",
            "all full, without window",
            {"layer_types": [FULL] * n, "sliding_window": None},
        )
        yield Case("hidden_act", "relu", {"hidden_act": "relu"})
        yield Case(
            "attn_logit_softcapping",
            "1.0, final 2.0",
            {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
        )
    if name == "gemma3_text":
        yield Case("_sliding_window_pattern", "2", {"_sliding_window_pattern": 2})
    if name == "bloom":
        both = {"slow_but_exact": True, "pretraining_tp": 2}
        yield Case("slow_but_exact", "true, pretraining_tp 2", both)
    if name == "bert":
        yield Case("architectures", "absent", {"architectures": REMOVED})
        yield Case(
            "is_decoder",
            "true, add_cross_attention",
            {"is_decoder": True, "add_cross_attention": True},
        )


def inner_cases() -> Iterator[Case]:
    """The text model inside Gemma3ForConditionalGeneration."""
    for case in (
        *field_cases("gemma3_text", ["rms_norm_eps", "sliding_window", "final_logit_softcapping",
                                     "query_pre_attn_scalar", "rope_theta", "rope_local_base_freq",
                                     "sliding_window_pattern"]),
        *gemma3_rope_cases(),
    ):  # fmt: skip
        yield Case(f"text_config.{case.field}", case.value, {"text_config": case.changes})
    for f, value in (("sliding_window", 4), ("num_hidden_layers", 99), ("rms_norm_eps", 0.5),
                     ("rope_scaling", {"rope_type": "linear", "factor": 4.0})):  # fmt: skip
        yield Case(f, f"{json.dumps(value)}, outside", {f: value})
    yield Case("text_config", "a list", {"text_config": []})
    yield Case("architectures", "absent", {"architectures": REMOVED})


# Values that mean something to one class only, and those of names that are read beside its fields.
OWN: dict[str, dict[str, list[Any]]] = {
    "smollm3": {
        "no_rope_layers": [[1, 1, 1, 0], [0, 1, 1, 1]],
        "layer_types": [[FULL] * 4, [SLIDING] * 4],
    },
    "olmo3": {"layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2]},
    "cohere2": {"layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2]},
    "exaone4": {"layer_types": [[FULL] * 2, [SLIDING] * 2]},
    "modernbert": {
        "layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2],
        "hidden_activation": ["gelu_new", "silu", "relu"],
        "global_attn_every_n_layers": [2, 1, 0],
        "rope_parameters": [
            {},
            {FULL: {"rope_theta": 500.0}, SLIDING: {"rope_theta": 50.0}},
            {FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, SLIDING: {}},
        ],
        "rope_scaling": [{"rope_type": "linear", "factor": 4.0}],
    },
    "gemma3_text-encoder": {
        "use_bidirectional_attention": [False],
        "layer_types": [[FULL] * 6, [SLIDING] * 6, [FULL, SLIDING] * 3],
        "sliding_window": [17, 4, 256],
        "sliding_window_pattern": [2, 3],
        "rope_parameters": [
            {},
            {FULL: {"rope_theta": 500.0}, SLIDING: {"rope_theta": 50.0}},
            {FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, SLIDING: {}},
        ],
        "rope_scaling": [{"rope_type": "linear", "factor": 4.0}],
    },
    **{
        name: {
            "feed_forward_proj": ["gelu", "gated-silu"],
            "tie_word_embeddings": [True, False],
        }
        for name in ("mt5", "umt5")
    },
    "exaone_moe": {
        "layer_types": [[FULL] * 4, [SLIDING] * 4, [FULL, SLIDING] * 2],
        "mlp_layer_types": [["dense"] * 4, ["dense", "dense", "sparse", "sparse"]],
        "sliding_window": [17, 4, 256],
    },
    # Gated ones are the encoder's, and "t5, gated" of `MORE`: ggml's GELU is less exact.
    "t5": {
        "feed_forward_proj": ["gelu", "gated-silu"],
        "tie_word_embeddings": [True, False],
    },
    "t5-encoder": {
        "feed_forward_proj": ["relu", "gelu", "gated-silu"],
        "tie_word_embeddings": [True],
        "num_decoder_layers": [1],
    },
    **{name: {"n_positions": [512]} for name in ("gpt2", "gpt_bigcode")},
    "bloom": {"seq_length": [512]},
    "gpt_oss": {"layer_types": [[FULL, SLIDING], [SLIDING] * 2]},
    **{
        name: {"layer_types": [[FULL] * 3, ["linear_attention", FULL, "linear_attention"]]}
        for name in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
    },
    "gemma4_text": {
        "final_logit_softcapping": [100.0],
        "hidden_size_per_layer_input": [64],
        "layer_types": [[FULL] * 4, [FULL, FULL, SLIDING, FULL]],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": [2],
        "intermediate_size": [512, [2048] * 6, [2048] * 5 + [512]],
        "vocab_size_per_layer_input": [313, 400],
        "layer_types": [[FULL] * 6, [SLIDING] * 6, [FULL, FULL, SLIDING] * 2],
        "rope_parameters": [
            {
                FULL: {"rope_type": "default", "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 700.0},
            },
            {
                FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            },
        ],
    },
    "granitemoehybrid": {
        "layer_types": [
            [FULL] * 3,
            ["mamba", "attention", "attention"],
            ["linear_attention"] * 3,
            [FULL, SLIDING, "linear_attention"],
        ],
        "position_embedding_type": ["rope", "nope"],
        "num_local_experts": [2, 0],
    },
    "nemotron_h": {
        "time_step_min": [0.0, 0.5],
        "hybrid_override_pattern": ["MEM*E"],
        "mamba_conv_bias": [True],
    },
    "llama4_text": {
        "use_qk_norm": [False],
        "no_rope_layers": [[1, 1, 1, 0], [0, 1, 1, 1], []],
        "attention_chunk_size": [8192, 512, 16],
        "layer_types": [[FULL] * 4, ["chunked_attention"] * 4, [SLIDING] * 4],
        "max_position_embeddings": [512, 16384],
    },
    **{
        name: {
            "rope_parameters": [
                {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 10_000.0},
                {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "mscale": 1.0},
            ],
            "moe_topk": [[2, 2], [2, 1], 5],
        }
        for name in ("hunyuan_v1_dense", "hunyuan_v1_moe")
    },
    "dots1": {
        "layer_types": [[FULL] * 2, [FULL, SLIDING]],
        "sliding_window": [16],
        "max_window_layers": [1],
    },
    **{name: {"rms_norm_eps": [1e-2, 1e-5, 0.0]} for name in ("qwen2_vl_text", "qwen2_5_vl_text")},
    "lfm2": {"layer_types": [[FULL] * 3, ["conv"] * 3, [FULL, "conv", FULL]]},
    "lfm2_moe": {"layer_types": [[FULL] * 3, ["conv"] * 3, [FULL, "conv", FULL]]},
}


def family_cases(name: str) -> Iterator[Case]:
    """Of classes in `NARROW` fewer: what fields of every class do, others have shown.

    Fields that nothing depends on are changed together, and stand in one case.
    """
    known = known_class(BASES[name])
    assert known is not None
    yield from _field_cases(known, BASES[name], OWN.get(name, {}))
    if known.inner is None:
        yield from class_cases(name) if name == "bloom" else ()
        return
    inside, inner = known.inner
    if any(base["model_type"] == inner.model_type for base in BASES.values()):
        found = [
            Case(f, json.dumps(value), {f: value})
            for f, value in (
                ("rms_norm_eps", 0.5),
                ("num_hidden_layers", 1),
                ("hidden_act", "relu"),
            )
        ]
    else:  # a class that no other base is of
        text = BASES[name][inside]
        found = [*_field_cases(inner, text, OWN.get(inner.model_type, {}))]
        found += [*class_cases(inner.model_type), *_section_cases(text)]
    for case in found:
        yield Case(f"{inside}.{case.field}", case.value, {inside: case.changes})


def _section_cases(text: Fields) -> Iterator[Case]:
    """Pairs of dimensions for time, height and width."""
    rope = text.get("rope_parameters", {})
    first, second, third = rope.get("mrope_section", (0, 0, 0))
    if not first:
        return
    for label, sections in {
        "in another order": [third, second, first],
        "of which one is too short": [first + second, 0, third],
        "longer": [s + 8 for s in (first, second, third)],
        "two": [first, second],
        "no numbers": [str(first), second, third],
    }.items():
        changes = {"rope_parameters": rope | {"mrope_section": sections}}
        yield Case("rope_parameters.mrope_section", label, changes)
    old = {n: v for n, v in rope.items() if n != "rope_type"} | {"type": "mrope"}
    changes = {"rope_scaling": old, "rope_parameters": REMOVED}
    yield Case("rope_scaling", "mrope, the older name", changes)


def _field_cases(known: ConfigClass, base: Fields, own: dict[str, list[Any]]) -> Iterator[Case]:
    """Each field of a class."""
    for f, (kind, _) in known.fields.items():
        for value in own.get(f) or VALUES[f][: 1 if f in VALUES_OF_ALL else 2]:
            yield Case(f, json.dumps(value), {f: value})
        if kind.endswith("null"):
            yield Case(f, "null", {f: None})
    left_out = (*NOT_FIELDS, *(("tie_word_embeddings",) if known.inner else ()))
    unused = {f: VALUES[f][0] for f in known.unused if f not in (*left_out, *ROUNDING)}
    for f in ROUNDING:
        if f in known.unused:
            yield Case(f, json.dumps(VALUES[f][0]), {f: VALUES[f][0]})
    yield Case(", ".join(unused), "others", unused)
    for f in known.beside:
        for value in own.get(f) or VALUES[f][:1]:
            yield Case(f, json.dumps(value), {f: value})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    brief = {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "yarn": yarn,
        "yarn, betas": yarn | {"beta_fast": 4.0, "beta_slow": 2.0},
        "yarn, mscale": yarn | {"mscale": 0.7, "mscale_all_dim": 1.4},
        "llama3": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
        "default, rope_theta 500": {"rope_type": "default", "rope_theta": 500.0},
        "default, partial_rotary_factor 0.5": {
            "rope_type": "default", "partial_rotary_factor": 0.5,
        },
    }  # fmt: skip
    if "rope_parameters" in known.fields and "rope_parameters" not in own:
        for label, fields in brief.items():
            whole = base.get("rope_parameters", {}) | {"rope_theta": 10_000.0} | fields
            yield Case("rope_parameters", label, {"rope_parameters": whole})
        old = {"rope_scaling": brief["yarn"], "rope_parameters": REMOVED}
        yield Case("rope_scaling", "yarn", old)


# Fields that the first classes have as well: one other value is enough.
VALUES_OF_ALL = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_norm_eps",
    "norm_epsilon", "norm_eps", "tie_word_embeddings", "hidden_act", "rope_parameters",
)  # fmt: skip


def cases(name: str, own: list[str]) -> list[Case]:
    """All cases of a class with these fields."""
    if name in NARROW:
        return list(family_cases(name))
    beside = BESIDE + BESIDE_CLASS.get(name, ())
    if name in DECODERS:
        beside += BESIDE_DECODERS
    fields = [f for f in own if f not in (*NOT_FIELDS, *NOT_HERE.get(name, ()))]
    found = list(field_cases(name, [*fields, *(b for b in beside if b not in fields)]))
    if name == "gemma3":
        found += inner_cases()
    elif name == "gemma3_text":
        found += gemma3_rope_cases()
    elif name not in ENCODERS:
        found += rope_cases(name)
    found += class_cases(name)
    return found
