"""Configurations of published models, whole: each converts, with no warning but those it deserves.

Typed in from the files on the hub; long lists of numbers are shortened to a rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconvert.architectures.config_warnings import config_warnings
from qconvert.architectures.families import hyper_parameters
from qconvert.architectures.source import read_config
from qconvert.files.gguf_writer import GgufValue

Fields = dict[str, Any]


def decoder(
    kind: str, model_type: str, sizes: tuple[int, int, int, int, int], context: int, **more: Any
) -> Fields:
    """Fields that all files have; sizes are width, inner width, layers, heads, heads of keys."""
    width, inner, layers, heads, groups = sizes
    return {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": context,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "tie_word_embeddings": False,
        **more,
    }


def llama(sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    plain = {
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1,
        "hidden_act": "silu", "rope_scaling": None, "bos_token_id": 1, "eos_token_id": 2,
        "vocab_size": 32000,
    }  # fmt: skip
    return decoder("LlamaForCausalLM", "llama", sizes, context, **plain | more)


def mistral(sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    plain = {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000}
    return decoder("MistralForCausalLM", "mistral", sizes, context, **plain | more)


def qwen(kind: str, sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    plain = {
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
        "hidden_act": "silu", "rms_norm_eps": 1e-06, "use_sliding_window": False,
        "vocab_size": 151936,
    }  # fmt: skip
    name = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[kind]
    return decoder(f"{name}ForCausalLM", kind, sizes, context, **plain | more)


def qwen_vl(kind: str, sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    """The language model's fields at the top, as Qwen2-VL and Qwen2.5-VL have them."""
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind]
    plain = qwen("qwen2", sizes, context, max_window_layers=sizes[2], rope_theta=1000000.0)
    return plain | {
        "architectures": [f"{name}ForConditionalGeneration"], "model_type": kind,
        "image_token_id": 151655, "video_token_id": 151656, "vision_token_id": 151654,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "vision_config": {"depth": 32, "hidden_size": sizes[0], "in_chans": 3},
        **more,
    }  # fmt: skip


def gemma(kind: str, sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    plain = {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
        "cache_implementation": "hybrid", "eos_token_id": [1, 106], "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "vocab_size": 262144,
    }  # fmt: skip
    name = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}[kind]
    fields = decoder(name, kind, sizes, context, **plain | more)
    del fields["tie_word_embeddings"]
    return fields


def gemma3(**text: Any) -> Fields:
    plain = {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": plain | {"sliding_window": 1024} | text,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    }  # fmt: skip


def phi3(sizes: tuple[int, int, int, int, int], context: int, **more: Any) -> Fields:
    plain = {
        "_name_or_path": "Phi-3", "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1,
        "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "pad_token_id": 32000,
        "original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rope_scaling": None,
        "rope_theta": 10000.0, "vocab_size": 32064,
    }  # fmt: skip
    return decoder("Phi3ForCausalLM", "phi3", sizes, context, **plain | more)


def longrope(pairs: int) -> Fields:
    return {
        "long_factor": [1.0 + i for i in range(pairs)],
        "short_factor": [1.0 + i / 100 for i in range(pairs)],
        "type": "longrope",
    }


def bert(width: int, layers: int, **more: Any) -> Fields:
    return {
        "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1,
        "classifier_dropout": None, "gradient_checkpointing": False, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "hidden_size": width, "initializer_range": 0.02,
        "intermediate_size": 4 * width, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
        "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": layers,
        "pad_token_id": 0, "position_embedding_type": "absolute", "torch_dtype": "float32",
        "transformers_version": "4.30.0", "type_vocab_size": 2, "use_cache": True,
        "vocab_size": 30522, **more,
    }  # fmt: skip


LLAMA3 = {
    "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
}  # fmt: skip
R1 = {"bos_token_id": 151643, "eos_token_id": 151643, "use_mrope": False, "sliding_window": 4096}

# Fields, keys that follow from them, and words of the warnings.
PUBLISHED: dict[str, tuple[Fields, Fields, list[str]]] = {
    "Llama-3.2-1B-Instruct": (
        llama(
            (2048, 8192, 16, 32, 8), 131072, vocab_size=128256, head_dim=64, rope_theta=500000.0,
            tie_word_embeddings=True, rope_scaling=LLAMA3 | {"factor": 32.0},
            eos_token_id=[128001, 128008, 128009], bos_token_id=128000,
        ),
        {"llama.attention.key_length": 64, "llama.rope.freq_base": 500000.0},
        [],
    ),
    "DeepSeek-R1-Distill-Llama-70B": (
        llama((8192, 28672, 80, 64, 8), 131072, vocab_size=128256, rope_theta=500000.0,
              rope_scaling=LLAMA3, head_dim=128),
        {"llama.attention.head_count_kv": 8, "llama.block_count": 80},
        [],
    ),
    "SmolLM2-135M": (
        llama((576, 1536, 30, 9, 3), 8192, vocab_size=49152, rope_theta=100000,
              is_llama_config=True, rope_interleaved=False, tie_word_embeddings=True),
        {"llama.attention.key_length": 64, "llama.rope.freq_base": 100000.0},
        [],
    ),
    "SmolLM2-1.7B-Instruct": (
        llama((2048, 8192, 24, 32, 32), 8192, vocab_size=49152, rope_theta=130000,
              **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}}),
        {"llama.rope.freq_base": 130000.0},
        [],
    ),
    "TinyLlama-1.1B-Chat-v1.0": (
        llama((2048, 5632, 22, 32, 4), 2048, rope_theta=10000.0),
        {"llama.attention.head_count_kv": 4},
        [],
    ),
    "Yi-34B": (
        llama((7168, 20480, 60, 56, 8), 4096, vocab_size=64000, rope_theta=5000000.0),
        {"llama.rope.freq_base": 5e6},
        [],
    ),
    "CodeLlama-7b": (
        llama((4096, 11008, 32, 32, 32), 16384, vocab_size=32016, rope_theta=1000000),
        {"llama.rope.freq_base": 1e6, "llama.context_length": 16384},
        [],
    ),
    "deepseek-coder-6.7b": (
        llama((4096, 11008, 32, 32, 32), 16384, vocab_size=32256, rope_theta=100000,
              rope_scaling={"factor": 4.0, "type": "linear"}),
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        [],
    ),
    "LLaMA-2-7B-32K": (
        llama((4096, 11008, 32, 32, 32), 32768, rope_scaling={"factor": 8.0, "type": "linear"},
              auto_map={"AutoModelForCausalLM": "modeling_flash_llama.LlamaForCausalLM"}),
        {"llama.rope.scaling.factor": 8.0, "llama.rope.freq_base": 10000.0},
        [],
    ),
    "Yarn-Llama-2-7b-64k": (
        llama((4096, 11008, 32, 32, 32), 65536, rope_scaling={
            "factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
            "finetuned": True,
        }),
        {
            "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 16.0,
            "llama.rope.scaling.original_context_length": 4096,
        },
        [],
    ),
    "Llama 3 saved by transformers 5": (
        {
            **{k: v for k, v in llama((4096, 14336, 32, 32, 8), 131072, vocab_size=128256).items()
               if k not in ("rope_scaling", "torch_dtype")},
            "dtype": "bfloat16", "pad_token_id": None, "head_dim": 128,
            "rope_parameters": LLAMA3 | {"rope_theta": 500000.0},
        },
        {"llama.rope.freq_base": 500000.0},
        [],
    ),
    "Mistral-7B-v0.1": (
        mistral((4096, 14336, 32, 32, 8), 32768, rope_theta=10000.0, sliding_window=4096),
        {"llama.attention.key_length": 128},
        ["window of 4096"],
    ),
    "Mistral-7B-Instruct-v0.3": (
        mistral((4096, 14336, 32, 32, 8), 32768, rope_theta=1000000.0, sliding_window=None,
                vocab_size=32768),
        {"llama.rope.freq_base": 1e6},
        [],
    ),
    "Mistral-Nemo-Instruct-2407": (
        mistral((5120, 14336, 40, 32, 8), 1024000, head_dim=128, rope_theta=1000000.0,
                sliding_window=None, vocab_size=131072),
        {"llama.attention.key_length": 128, "llama.rope.dimension_count": 128},
        [],
    ),
    "Mixtral-8x7B-Instruct-v0.1": (
        decoder("MixtralForCausalLM", "mixtral", (4096, 14336, 32, 32, 8), 32768,
                attention_dropout=0.0, bos_token_id=1, eos_token_id=2, hidden_act="silu",
                num_experts_per_tok=2, num_local_experts=8, output_router_logits=False,
                rope_theta=1000000.0, router_aux_loss_coef=0.02, sliding_window=None,
                vocab_size=32000),
        {"llama.expert_count": 8, "llama.rope.freq_base": 1e6},
        [],
    ),
    "Qwen2.5-7B-Instruct with YaRN": (
        qwen("qwen2", (3584, 18944, 28, 28, 4), 32768, max_window_layers=28,
             rope_theta=1000000.0, sliding_window=131072, vocab_size=152064,
             rope_scaling={
                 "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn",
             }),
        {"qwen2.rope.scaling.factor": 4.0, "qwen2.rope.scaling.original_context_length": 32768},
        [],
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        qwen("qwen2", (1536, 8960, 28, 12, 2), 131072, max_window_layers=21, rope_theta=10000,
             **R1),
        {"qwen2.rope.freq_base": 10000.0},
        [],
    ),
    "Qwen3-8B": (
        qwen("qwen3", (4096, 12288, 36, 32, 8), 40960, attention_bias=False, head_dim=128,
             max_window_layers=36, rope_scaling=None, rope_theta=1000000, sliding_window=None),
        {"qwen3.attention.key_length": 128, "qwen3.rope.freq_base": 1e6},
        [],
    ),
    "Qwen3-Coder-30B-A3B-Instruct": (
        qwen("qwen3_moe", (2048, 5472, 48, 32, 4), 262144, decoder_sparse_step=1, head_dim=128,
             max_window_layers=28, mlp_only_layers=[], moe_intermediate_size=768,
             norm_topk_prob=True, num_experts=128, num_experts_per_tok=8,
             output_router_logits=False, qkv_bias=False, rope_scaling=None, rope_theta=10000000,
             router_aux_loss_coef=0.0, shared_expert_intermediate_size=0, sliding_window=None,
             use_qk_norm=True),
        {"qwen3moe.expert_used_count": 8, "qwen3moe.expert_feed_forward_length": 768},
        [],
    ),
    "Qwen2-VL-2B-Instruct": (
        qwen_vl("qwen2_vl", (1536, 8960, 28, 12, 2), 32768, tie_word_embeddings=True,
                sliding_window=32768),
        {
            "qwen2vl.rope.dimension_sections": [16, 24, 24, 0], "qwen2vl.rope.freq_base": 1e6,
            "qwen2vl.attention.head_count_kv": 2,
        },
        ["without rms_norm_eps"],
    ),
    "Qwen2.5-VL-7B-Instruct": (
        qwen_vl("qwen2_5_vl", (3584, 18944, 28, 28, 4), 128000, tie_word_embeddings=False,
                sliding_window=32768, vocab_size=152064),
        {"qwen2vl.context_length": 128000, "qwen2vl.vocab_size": 152064},
        ["without rms_norm_eps"],
    ),
    "Qwen3-VL-4B-Instruct": (
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655,
            "model_type": "qwen3_vl", "tie_word_embeddings": True,
            "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653,
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
                "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
                "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
                "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
                "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
                "rms_norm_eps": 1e-06, "rope_theta": 5000000, "tie_word_embeddings": True,
                "use_cache": True, "vocab_size": 151936, "rope_scaling": {
                    "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
            },
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act":
                "gelu_pytorch_tanh", "hidden_size": 1024, "in_channels": 3,
                "initializer_range": 0.02, "intermediate_size": 4096, "model_type": "qwen3_vl",
                "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2560,
                "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
        },
        {
            "qwen3vl.n_deepstack_layers": 3, "qwen3vl.rope.dimension_sections": [24, 21, 21, 0],
            "qwen3vl.rope.freq_base": 5e6, "qwen3vl.attention.key_length": 128,
        },
        [],
    ),
    "gemma-2-2b-it": (
        gemma("gemma2", (2304, 9216, 26, 8, 4), 8192, vocab_size=256000, rope_theta=10000.0,
              attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
              hidden_act="gelu_pytorch_tanh"),
        {"gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0},
        [],
    ),
    "gemma-2-27b": (
        gemma("gemma2", (4608, 36864, 46, 32, 16), 8192, vocab_size=256000, rope_theta=10000.0,
              attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
              hidden_act="gelu_pytorch_tanh", head_dim=128, query_pre_attn_scalar=144,
              _attn_implementation="eager"),
        {"gemma2.attention.key_length": 128},
        [],
    ),
    "gemma-3-270m": (
        gemma("gemma3_text", (640, 2048, 18, 4, 1), 32768, _sliding_window_pattern=6,
              attn_logit_softcapping=None, final_logit_softcapping=None,
              layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
              rope_local_base_freq=10000.0, rope_scaling=None, rope_theta=1000000.0,
              sliding_window=512, use_bidirectional_attention=False),
        {"gemma3.attention.sliding_window": 512, "gemma3.rope.freq_base_swa": 10000.0},
        [],
    ),
    "gemma-3-1b-it": (
        gemma("gemma3_text", (1152, 6912, 26, 4, 1), 32768, attn_logit_softcapping=None,
              final_logit_softcapping=None, rope_local_base_freq=10000, rope_scaling=None,
              rope_theta=1000000, sliding_window=512, sliding_window_pattern=6),
        {"gemma3.attention.sliding_window": 512, "gemma3.rope.freq_base": 1e6},
        [],
    ),
    "gemma-3-4b-it": (
        gemma3(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
        {
            "gemma3.rope.scaling.factor": 8.0, "gemma3.attention.key_length": 256,
            "gemma3.vocab_size": 262208, "gemma3.attention.head_count": 8,
            "gemma3.attention.sliding_window": 1024, "gemma3.context_length": 131072,
        },
        [],
    ),
    "gemma-3-12b-it": (
        gemma3(hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
               num_hidden_layers=48, num_key_value_heads=8),
        {"gemma3.attention.head_count_kv": 8},
        [],
    ),
    "gemma-3-27b-it": (
        gemma3(head_dim=128, hidden_size=5376, intermediate_size=21504, num_attention_heads=32,
               num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168),
        {"gemma3.attention.key_length": 128},
        [],
    ),
    "Phi-3-mini-4k-instruct": (
        phi3((3072, 8192, 32, 32, 32), 4096, sliding_window=2047),
        {"phi3.rope.dimension_count": 96, "phi3.attention.sliding_window": 2047},
        ["window of 2047"],
    ),
    "Phi-3-medium-128k-instruct": (
        phi3((5120, 17920, 40, 40, 10), 131072, rope_scaling=longrope(64), sliding_window=131072),
        {
            "phi3.rope.scaling.original_context_length": 4096,
            "phi3.rope.scaling.attn_factor": 1.1902380714238083,
        },
        ["4096 tokens"],
    ),
    "phi-4": (
        phi3((5120, 17920, 40, 40, 10), 16384, original_max_position_embeddings=16384,
             rope_theta=250000, sliding_window=None, vocab_size=100352),
        {"phi3.rope.freq_base": 250000.0},
        [],
    ),
    "Phi-4-mini-instruct": (
        phi3((3072, 8192, 32, 24, 8), 131072, rope_scaling=longrope(48), sliding_window=262144,
             partial_rotary_factor=0.75, vocab_size=200064, tie_word_embeddings=True,
             full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False),
        {"phi3.rope.dimension_count": 96},
        ["4096 tokens"],
    ),
    "gemma-2b": (
        {
            "architectures": ["GemmaForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256,
            "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 16384,
            "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8,
            "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
            "torch_dtype": "bfloat16", "transformers_version": "4.38.0.dev0", "use_cache": True,
            "vocab_size": 256000,
        },
        {"gemma.attention.key_length": 256, "gemma.attention.head_count_kv": 1},
        [],
    ),
    "phi-2": (
        {
            "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 50256,
            "embd_pdrop": 0.0, "eos_token_id": 50256, "hidden_act": "gelu_new",
            "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "phi",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1,
            "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.37.0", "use_cache": True,
            "vocab_size": 51200,
        },
        {"phi2.rope.dimension_count": 32, "phi2.attention.layer_norm_epsilon": 1e-05},
        [],
    ),
    "pythia-160m": (
        {
            "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
            "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02,
            "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
            "model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12,
            "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
            "use_parallel_residual": True, "vocab_size": 50304,
        },
        {
            "gptneox.rope.dimension_count": 16, "gptneox.use_parallel_residual": True,
            "gptneox.rope.freq_base": 10000.0,
        },
        [],
    ),
    "gpt2": (
        {
            "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
            "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
            "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
            "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
            "vocab_size": 50257,
        },
        {"gpt2.context_length": 1024, "gpt2.feed_forward_length": 3072},
        [],
    ),
    "bloom-560m": (
        {
            "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0,
            "attention_softmax_in_fp32": True, "architectures": ["BloomForCausalLM"],
            "bias_dropout_fusion": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
            "unk_token_id": 0, "hidden_dropout": 0.0, "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-05, "masked_softmax_fusion": True, "model_type": "bloom",
            "n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16,
            "offset_alibi": 100, "pretraining_tp": 1, "seq_length": 2048, "skip_bias_add": True,
            "skip_bias_add_qkv": False, "transformers_version": "4.20.0", "use_cache": True,
            "vocab_size": 250880,
        },
        {"bloom.embedding_length": 1024, "bloom.attention.head_count": 16},
        [],
    ),
    "falcon-7b": (
        {
            "alibi": False, "apply_residual_connection_post_layernorm": False,
            "architectures": ["FalconForCausalLM"], "attention_dropout": 0.0, "bias": False,
            "bos_token_id": 11, "eos_token_id": 11, "hidden_dropout": 0.0, "hidden_size": 4544,
            "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "falcon",
            "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
            "num_hidden_layers": 32, "parallel_attn": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.27.4", "use_cache": True, "vocab_size": 65024,
        },
        {"falcon.attention.head_count_kv": 1, "falcon.feed_forward_length": 18176},
        [],
    ),
    # its 'expand' is 16, which intermediate_size outdoes
    "falcon-mamba-7b": (
        {
            "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
            "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
            "mixer_rms_eps": 1e-06, "model_type": "falcon_mamba", "num_hidden_layers": 64,
            "pad_token_id": 11, "rescale_prenorm_residual": False, "residual_in_fp32": True,
            "state_size": 16, "tie_word_embeddings": False, "time_step_floor": 0.0001,
            "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
            "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16",
            "use_bias": False, "use_cache": True, "use_conv_bias": True, "use_mambapy": False,
            "vocab_size": 65024,
        },
        {"mamba.ssm.inner_size": 8192, "mamba.ssm.time_step_rank": 256},
        ["mixer_rms_eps"],
    ),
    "mamba-130m-hf": (
        {
            "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4,
            "d_inner": 1536, "d_model": 768, "eos_token_id": 0, "expand": 2,
            "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
            "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
            "model_type": "mamba", "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0,
            "pad_vocab_size_multiple": 8, "rescale_prenorm_residual": False,
            "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
            "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
            "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0,
            "torch_dtype": "float32", "use_bias": False, "use_cache": True,
            "use_conv_bias": True, "vocab_size": 50280,
        },
        {"mamba.ssm.inner_size": 1536, "mamba.block_count": 24},
        [],
    ),
    "Jamba-v0.1": (
        {
            "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0,
            "attn_layer_offset": 4, "attn_layer_period": 8, "bos_token_id": 1,
            "calc_logits_for_entire_prompt": False, "eos_token_id": 2, "expert_layer_offset": 1,
            "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.02, "intermediate_size": 14336, "mamba_conv_bias": True,
            "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2,
            "mamba_inner_layernorms": True, "mamba_proj_bias": False,
            "max_position_embeddings": 262144, "model_type": "jamba", "n_ctx": 262144,
            "num_attention_heads": 32, "num_experts": 16, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "output_router_logits": False,
            "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
            "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.40.0.dev0", "use_cache": True, "use_mamba_kernels": True,
            "vocab_size": 65536,
        },
        {
            "jamba.attention.head_count_kv": ([0] * 4 + [8] + [0] * 3) * 4,
            "jamba.expert_count": 16,
        },
        [],
    ),
    "Qwen3-VL-30B-A3B-Instruct": (
        {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655,
            "model_type": "qwen3_vl_moe", "tie_word_embeddings": False,
            "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
            "vision_start_token_id": 151652, "vision_end_token_id": 151653,
            "text_config": {
                "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
                "decoder_sparse_step": 1, "dtype": "bfloat16", "eos_token_id": 151645,
                "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
                "initializer_range": 0.02, "intermediate_size": 6144,
                "max_position_embeddings": 262144, "mlp_only_layers": [],
                "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 768,
                "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
                "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
                "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True,
                "vocab_size": 151936, "rope_scaling": {
                    "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
            },
            "vision_config": {
                "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_size": 1152,
                "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl_moe",
                "out_hidden_size": 2048,
            },
        },
        {
            "qwen3vlmoe.n_deepstack_layers": 3, "qwen3vlmoe.expert_count": 128,
            "qwen3vlmoe.rope.dimension_sections": [24, 21, 21, 0],
            "qwen3vlmoe.expert_feed_forward_length": 768,
        },
        [],
    ),
    "EXAONE-3.5-2.4B-Instruct": (
        {
            "activation_function": "silu", "architectures": ["ExaoneForCausalLM"],
            "attention_dropout": 0.0, "bos_token_id": 1, "embed_dropout": 0.0,
            "eos_token_id": 361, "head_dim": 80, "hidden_size": 2560, "initializer_range": 0.02,
            "intermediate_size": 7168, "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 32768, "model_type": "exaone", "num_attention_heads": 32,
            "num_key_value_heads": 8, "num_layers": 30, "pad_token_id": 0,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
            "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 102400,
        },
        {"exaone.block_count": 30, "exaone.rope.freq_base": 1e6},
        [],
    ),
    "distilbert-base-uncased": (
        {
            "activation": "gelu", "architectures": ["DistilBertForMaskedLM"],
            "attention_dropout": 0.1, "dim": 768, "dropout": 0.1, "hidden_dim": 3072,
            "initializer_range": 0.02, "max_position_embeddings": 512, "model_type": "distilbert",
            "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
            "transformers_version": "4.10.0.dev0", "vocab_size": 30522,
        },
        {"bert.block_count": 6, "bert.attention.layer_norm_epsilon": 1e-12},
        [],
    ),
    "bge-small-en-v1.5": (
        bert(384, 12, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}),
        {"bert.attention.layer_norm_epsilon": 1e-12, "bert.context_length": 512},
        [],
    ),
    "all-MiniLM-L6-v2": (bert(384, 6), {"bert.block_count": 6}, []),
    "bert-base-chinese": (
        bert(768, 12, directionality="bidi", pooler_fc_size=768, pooler_num_attention_heads=12,
             pooler_num_fc_layers=3, pooler_size_per_head=128, pooler_type="first_token_transform",
             vocab_size=21128, architectures=["BertForMaskedLM"]),
        {"bert.embedding_length": 768},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_converts_with_these_keys_and_warnings(name: str) -> None:
    fields, wanted, words = PUBLISHED[name]
    family, config = read_config(fields, Path("config.json"))
    sizes = family.sizes(config)
    keys, rope = hyper_parameters(family, config, sizes)
    plain = {k: v.value if isinstance(v, GgufValue) else v for k, v in keys.items()}
    lists = {k: v for k, v in wanted.items() if isinstance(v, list)}
    assert {k: plain.get(k) for k in lists} == lists
    numbers = {k: v for k, v in wanted.items() if k not in lists}
    assert {k: plain.get(k) for k in numbers} == pytest.approx(numbers)
    warnings = config_warnings(fields, family, config, sizes, rope)
    assert len(warnings) == len(words), warnings
    for warning, word in zip(warnings, words, strict=True):
        assert word in warning
