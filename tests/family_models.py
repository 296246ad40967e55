"""Tiny models of the families that came after the first ones, with all kinds of layers in each.

`NARROW` are bases of `config_cases`; `WIDE` are the same with rows that divide into every block of
ggml's types. Shared by `make_families.py`, which asks transformers and llama.cpp, and by
test_families.py, which needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiny_models import TOKENIZERS, rows

Fields = dict[str, Any]
VOCABULARY = rows(TOKENIZERS["sp-llama"])


def _base(kind: str, model_type: str, **more: Any) -> Fields:
    return {
        "architectures": [kind],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | more


def _without(fields: Fields, *names: str) -> Fields:
    return {n: v for n, v in fields.items() if n not in names}


_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "kv_lora_rank": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    **_EXPERTS,
}
_SHARING = {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32}
_LINEAR = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_hidden_layers": 3,
    "partial_rotary_factor": 0.5,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 16,
    "tie_word_embeddings": True,
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL] * 2,
    "vocab_size_per_layer_input": VOCABULARY,
}
_GEMMA3N = {
    "vocab_size": rows(TOKENIZERS["sp-gemma"]),
    "vocab_size_per_layer_input": rows(TOKENIZERS["sp-gemma"]) - 40,
    "head_dim": 32,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 0,
    "sliding_window": 16,
    "activation_sparsity_pattern": [0.95] * 6,
    "tie_word_embeddings": True,
}
_GRANITE_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, **_MULTIPLIERS}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
    "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_MAMBA = {
    "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_head": "auto",
    "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
_GRANITE4 = {
    **_GRANITE_MOE, **_MAMBA, "shared_intermediate_size": 32, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", _FULL, "linear_attention"],
}  # fmt: skip

_NEMOTRON = _base(
    "NemotronHForCausalLM", "nemotron_h", layer_norm_epsilon=1e-5, head_dim=32, num_hidden_layers=5,
    layers_block_type=["linear_attention", "moe", _FULL, "moe", "linear_attention"],
    mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, n_routed_experts=4,
    moe_intermediate_size=48, moe_shared_expert_intermediate_size=32, num_experts_per_tok=2,
    routed_scaling_factor=2.5,
)  # fmt: skip


def _recurring(kind: str, model_type: str, **more: Any) -> Fields:
    """A model without attention."""
    without = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    found = _base(kind, model_type, tie_word_embeddings=True, layer_norm_epsilon=1e-5)
    return _without(found, *without, "max_position_embeddings") | {"state_size": 16} | more


def _learned(kind: str, model_type: str) -> Fields:
    """A model with positions that are learned."""
    found = _recurring(kind, model_type, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    return _without(found, "hidden_size", "num_hidden_layers", "state_size")


NARROW: dict[str, Fields] = {
    "internlm3": _base("InternLM3ForCausalLM", "internlm3", head_dim=32),
    "smollm3": _base("SmolLM3ForCausalLM", "smollm3", num_hidden_layers=4),
    "qwen2_moe": _base(
        "Qwen2MoeForCausalLM", "qwen2_moe", **_EXPERTS, num_experts=4,
        shared_expert_intermediate_size=32,
    ),
    "olmo2": _base("Olmo2ForCausalLM", "olmo2"),
    "olmo3": _base("Olmo3ForCausalLM", "olmo3", num_hidden_layers=4, sliding_window=16),
    "granite": _base("GraniteForCausalLM", "granite", **_MULTIPLIERS),
    "granitemoe": _base("GraniteMoeForCausalLM", "granitemoe", **_GRANITE_MOE),
    "granitemoeshared": _base(
        "GraniteMoeSharedForCausalLM", "granitemoeshared", **_GRANITE_MOE,
        shared_intermediate_size=32,
    ),
    "ministral3": _base(
        "Ministral3ForCausalLM", "ministral3", head_dim=32, rope_parameters=_YARN
    ),
    "seed_oss": _base("SeedOssForCausalLM", "seed_oss", head_dim=32),
    "exaone4": _base(
        "Exaone4ForCausalLM", "exaone4", sliding_window=None, layer_types=[_FULL] * 2
    ),
    "cohere": _without(
        _base("CohereForCausalLM", "cohere", layer_norm_eps=1e-5, tie_word_embeddings=True),
        "rms_norm_eps",
    ),
    "cohere2": _without(
        _base(
            "Cohere2ForCausalLM", "cohere2", layer_norm_eps=1e-5, tie_word_embeddings=True,
            num_hidden_layers=4, sliding_window=16,
        ),
        "rms_norm_eps",
    ),
    "hunyuan_v1_dense": _base("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", head_dim=32),
    "starcoder2": _without(
        _base("Starcoder2ForCausalLM", "starcoder2", norm_epsilon=1e-5), "rms_norm_eps"
    ),
    "stablelm": _without(
        _base("StableLmForCausalLM", "stablelm", layer_norm_eps=1e-5, use_qkv_bias=True),
        "rms_norm_eps",
    ),
    "gemma": _base(
        "GemmaForCausalLM", "gemma", head_dim=32, tie_word_embeddings=True,
        vocab_size=rows(TOKENIZERS["sp-gemma"]),
    ),
    "phi": _without(
        _base("PhiForCausalLM", "phi", layer_norm_eps=1e-5), "rms_norm_eps"
    ),
    "gpt_neox": _without(
        _base("GPTNeoXForCausalLM", "gpt_neox", layer_norm_eps=1e-5),
        "rms_norm_eps", "num_key_value_heads",
    ),
    "olmo": _without(_base("OlmoForCausalLM", "olmo"), "rms_norm_eps"),
    "mamba": _recurring("MambaForCausalLM", "mamba"),
    "falcon_mamba": _recurring(
        "FalconMambaForCausalLM", "falcon_mamba", mixer_rms_eps=1e-5, tie_word_embeddings=False
    ),
    "gpt2": _learned("GPT2LMHeadModel", "gpt2"),
    "gpt_bigcode": _learned("GPTBigCodeForCausalLM", "gpt_bigcode"),
    "bloom": _without(
        _recurring("BloomForCausalLM", "bloom", n_layer=2, n_head=4),
        "num_hidden_layers", "state_size",
    ),
    "falcon": _recurring(
        "FalconForCausalLM", "falcon", num_attention_heads=4, num_kv_heads=2,
        new_decoder_architecture=True, max_position_embeddings=256, tie_word_embeddings=False,
    ),
    "glm": _base("GlmForCausalLM", "glm", head_dim=16),
    "solar_open": _without(
        _base(
            "SolarOpenForCausalLM", "solar_open", **_EXPERTS, n_routed_experts=4, head_dim=32,
            routed_scaling_factor=1.5,
        ),
        "intermediate_size",
    ),
    "jais2": _without(
        _base("Jais2ForCausalLM", "jais2", layer_norm_eps=1e-5, head_dim=16), "rms_norm_eps"
    ),
    "exaone": _base("ExaoneForCausalLM", "exaone", head_dim=16),
    "exaone_moe": _base(
        "ExaoneMoeForCausalLM", "exaone_moe", **_EXPERTS, num_experts=4, num_hidden_layers=4,
        sliding_window=16,
    ),
    "jamba": _base(
        "JambaForCausalLM", "jamba", num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
        attn_layer_period=4, attn_layer_offset=2, mamba_d_state=16,
    ),
    "bamba": _base(
        "BambaForCausalLM", "bamba", num_hidden_layers=3, attn_layer_indices=[1], **_MAMBA,
        head_dim=32,
    ),
    "glm4": _base("Glm4ForCausalLM", "glm4", head_dim=32),
    "glm4_moe": _base(
        "Glm4MoeForCausalLM", "glm4_moe", **_EXPERTS, n_routed_experts=4, head_dim=32,
        use_qk_norm=True, first_k_dense_replace=1, routed_scaling_factor=1.5,
    ),
    "gpt_oss": _base(
        "GptOssForCausalLM", "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=32,
        sliding_window=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "lfm2": _without(
        _base(
            "Lfm2ForCausalLM", "lfm2", norm_eps=1e-5, tie_word_embeddings=True,
            num_hidden_layers=3, layer_types=["conv", _FULL, "conv"],
        ),
        "rms_norm_eps",
    ),
    "lfm2_moe": _without(
        _base(
            "Lfm2MoeForCausalLM", "lfm2_moe", norm_eps=1e-5, tie_word_embeddings=True,
            num_hidden_layers=3, layer_types=["conv", _FULL, "conv"], num_dense_layers=1,
            num_experts=4, **_EXPERTS,
        ),
        "rms_norm_eps",
    ),
    "minimax_m2": _base(
        "MiniMaxM2ForCausalLM", "minimax_m2", num_local_experts=4, num_experts_per_tok=2,
        head_dim=32, partial_rotary_factor=0.5,
    ),
    "deepseek_v2": _base(
        "DeepseekV2ForCausalLM", "deepseek_v2", **_LATENT, q_lora_rank=None, rms_norm_eps=1e-6,
    ),
    "deepseek_v3": _base(
        "DeepseekV3ForCausalLM", "deepseek_v3", **_LATENT, q_lora_rank=32, rms_norm_eps=1e-6,
        n_group=2, topk_group=1,
    ),
    "glm4_moe_lite": _without(
        _base(
            "Glm4MoeLiteForCausalLM", "glm4_moe_lite", **_LATENT, q_lora_rank=32,
            rms_norm_eps=1e-6,
        ),
        "first_k_dense_replace",
    ),
    "qwen3_next": _base(
        "Qwen3NextForCausalLM", "qwen3_next", **_LINEAR, **_SHARING, norm_topk_prob=True
    ),
    "qwen3_5_text": _base("Qwen3_5ForCausalLM", "qwen3_5_text", **_LINEAR),
    "qwen3_5_moe_text": _without(
        _base("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", **_LINEAR, **_SHARING),
        "intermediate_size",
    ),
    "gemma4_text": _base(
        "Gemma4ForCausalLM", "gemma4_text", **_GEMMA4, num_global_key_value_heads=1,
        attention_k_eq_v=True, num_kv_shared_layers=2, use_double_wide_mlp=True,
        hidden_size_per_layer_input=32,
    ),
    "gemma3n_text": _base("Gemma3nForCausalLM", "gemma3n_text", **_GEMMA3N),
    "granitemoehybrid": _base(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", **_GRANITE4
    ),
    "falcon_h1": _base(
        "FalconH1ForCausalLM", "falcon_h1", **_MAMBA, mamba_d_ssm=96, mamba_rms_norm=True,
        mamba_norm_before_gate=False, lm_head_multiplier=0.5, embedding_multiplier=3.0,
        mlp_multipliers=[0.7, 0.4], key_multiplier=0.3, attention_out_multiplier=0.9,
        attention_in_multiplier=1.2, ssm_multipliers=[0.4, 0.3, 0.5, 0.6, 0.2],
        ssm_in_multiplier=1.25, ssm_out_multiplier=0.25,
    ),
    "nemotron_h": _without(_NEMOTRON, "rms_norm_eps"),
    "llama4_text": _base(
        "Llama4ForCausalLM", "llama4_text", num_hidden_layers=4, head_dim=32,
        intermediate_size=48, intermediate_size_mlp=96, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=2,
    ),
    "olmoe": _base(
        "OlmoeForCausalLM", "olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=4
    ),
    "arcee": _base("ArceeForCausalLM", "arcee", hidden_act="relu2"),
    "nemotron": _without(
        _base(
            "NemotronForCausalLM", "nemotron", hidden_act="relu2", norm_eps=1e-5,
            rope_parameters={
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5
            },
        ),
        "rms_norm_eps",
    ),
    "ernie4_5": _base("Ernie4_5ForCausalLM", "ernie4_5", head_dim=32),
    "ernie4_5_moe": _base(
        "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", moe_num_experts=4, moe_k=2,
        moe_intermediate_size=48, num_hidden_layers=3,
    ),
    "dots1": _base(
        "Dots1ForCausalLM", "dots1", **_EXPERTS, n_routed_experts=4, n_shared_experts=2,
        first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5,
        sliding_window=None, num_key_value_heads=4,
    ),
    "hunyuan_v1_moe": _base(
        "HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", num_experts=4, moe_topk=2, head_dim=32,
    ),
    "mamba2": _without(
        _base(
            "Mamba2ForCausalLM", "mamba2", layer_norm_epsilon=1e-5, num_heads=8, head_dim=16,
            n_groups=2, state_size=16,
        ),
        "rms_norm_eps", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings",
    ),
}  # fmt: skip


def _encoder(kind: str, model_type: str, **more: Any) -> Fields:
    """An encoder of BERT's kind."""
    without = ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    return _without(
        _base(
            kind, model_type, max_position_embeddings=258, pad_token_id=1, bos_token_id=0,
            type_vocab_size=1, layer_norm_eps=1e-5, hidden_act="gelu", **more,
        ),
        *without,
    )  # fmt: skip


NARROW |= {
    "xlm-roberta": _encoder("XLMRobertaModel", "xlm-roberta"),
    "roberta": _encoder("RobertaModel", "roberta"),
    "eurobert": _base("EuroBertModel", "eurobert", head_dim=16),
    "camembert": _encoder("CamembertModel", "camembert"),
    "distilbert": {
        "architectures": ["DistilBertModel"], "model_type": "distilbert",
        "vocab_size": rows(TOKENIZERS["wordpiece"]), "dim": 64, "hidden_dim": 96,
        "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256,
    },
    "modernbert": _without(
        _encoder(
            "ModernBertModel", "modernbert", num_hidden_layers=4, local_attention=16,
            norm_eps=1e-5, cls_token_id=0, sep_token_id=2,
        ),
        "type_vocab_size", "layer_norm_eps", "hidden_act",
    ),
}  # fmt: skip


def _wrapped(kind: str, model_type: str, inner: str, vision: Fields, **more: Any) -> Fields:
    """A model of text and images around one of `NARROW`."""
    return {
        "architectures": [kind],
        "model_type": model_type,
        "text_config": _without(NARROW[inner], "architectures"),
        "vision_config": vision,
        **more,
    }


_QWEN_VISION = {
    "model_type": "qwen3_5_vision",
    **{"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
    **{"out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 16},
}
NARROW |= {
    "qwen3_5": _wrapped(
        "Qwen3_5ForConditionalGeneration", "qwen3_5", "qwen3_5_text", _QWEN_VISION
    ),
    "qwen3_5_moe": _wrapped(
        "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", "qwen3_5_moe_text",
        _QWEN_VISION | {"model_type": "qwen3_5_moe_vision"},
    ),
    "mistral3": _wrapped(
        "Mistral3ForConditionalGeneration", "mistral3", "ministral3",
        {
            "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        tie_word_embeddings=False,
    ),
    "llama4": _wrapped(
        "Llama4ForConditionalGeneration", "llama4", "llama4_text",
        {
            "model_type": "llama4_vision_model", "hidden_size": 32, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
        },
    ),
    "gemma3n": _wrapped(
        "Gemma3nForConditionalGeneration", "gemma3n", "gemma3n_text",
        {
            "model_type": "gemma3n_vision", "architecture": "test_vit", "hidden_size": 64,
            "vocab_size": 8, "vocab_offset": rows(TOKENIZERS["sp-gemma"]),
        },
        audio_config={
            "model_type": "gemma3n_audio", "hidden_size": 32, "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1, "vocab_size": 8, "input_feat_size": 16,
            "vocab_offset": rows(TOKENIZERS["sp-gemma"]) + 8, "sscp_conv_channel_size": [8, 8],
        },
    ),
    "gemma4": _wrapped(
        "Gemma4ForConditionalGeneration", "gemma4", "gemma4_text",
        {
            "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 16, "patch_size": 4, "position_embedding_size": 16,
        },
    ),
}  # fmt: skip
NARROW["mistral3-mistral4"] = NARROW["mistral3"] | {
    "text_config": _without(
        _base("", "mistral4", **_LATENT, q_lora_rank=32, rms_norm_eps=1e-6, rope_parameters=_YARN),
        "architectures",
    )
}
_PLAIN = _base("", "llama")
_TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _seeing(name: str, tower: str, text: Fields) -> Fields:
    kinds = {"llava": "Llava", "llava_next": "LlavaNext", "idefics3": "Idefics3"}
    kinds |= {"smolvlm": "SmolVLM", "internvl": "InternVL"}
    return {
        "architectures": [f"{kinds[name]}ForConditionalGeneration"],
        "model_type": name,
        "text_config": _without(text, "architectures"),
        "vision_config": _TOWER | {"model_type": tower},
        "tie_word_embeddings": False,
    }


NARROW |= {
    "llava": _seeing("llava", "clip_vision_model", _PLAIN),
    "llava_next": _seeing("llava_next", "clip_vision_model", _PLAIN),
    "idefics3": _seeing("idefics3", "idefics3_vision", _PLAIN),
    "smolvlm": _seeing("smolvlm", "smolvlm_vision", _PLAIN),
    "internvl": _seeing("internvl", "internvl_vision", _base("", "qwen2")),
}


def _seeing_qwen(name: str, kind: str, text: Fields, **vision: Any) -> Fields:
    return {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": name,
        "text_config": _without(text, "architectures", "tie_word_embeddings"),
        "vision_config": _QWEN_VISION | {"model_type": f"{name}_vision"} | vision,
        "tie_word_embeddings": False,
    }


def _flat(model: Fields) -> Fields:
    """As checkpoints have it: the language model's fields at the top."""
    text = _without(model["text_config"], "model_type", "rope_parameters")
    rope = model["text_config"]["rope_parameters"]
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    whole = _without(model, "text_config") | text
    return whole | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _sections(*pairs: int, **more: Any) -> Fields:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(pairs)} | more


_SPLIT = {"rms_norm_eps": 1e-6, "rope_parameters": _sections(2, 3, 3)}
_TURNS = {"head_dim": 32, "rope_parameters": _sections(6, 5, 5, mrope_interleaved=True)}
_DEEP = {"depth": 2, "deepstack_visual_indexes": [0]}
NARROW |= {
    "qwen2_vl": _seeing_qwen(
        "qwen2_vl", "Qwen2VL", _base("", "qwen2_vl_text", **_SPLIT), embed_dim=32, hidden_size=64
    ),
    "qwen2_5_vl": _seeing_qwen(
        "qwen2_5_vl", "Qwen2_5_VL", _base("", "qwen2_5_vl_text", **_SPLIT),
        fullatt_block_indexes=[0],
    ),
    "qwen3_vl": _seeing_qwen(
        "qwen3_vl", "Qwen3VL", _base("", "qwen3_vl_text", **_TURNS), **_DEEP
    ),
    "qwen3_vl_moe": _seeing_qwen(
        "qwen3_vl_moe", "Qwen3VLMoe",
        _base("", "qwen3_vl_moe_text", **_TURNS, **_EXPERTS, num_experts=4), **_DEEP,
    ),
}  # fmt: skip
NARROW |= {
    "nomic_bert": _encoder("NomicBertModel", "nomic_bert") | {
        "hidden_act": "silu", "max_position_embeddings": 256,
    },
    "jina_embeddings_v3": _encoder("JinaEmbeddingsV3Model", "jina_embeddings_v3") | {
        "max_position_embeddings": 256,
    },
}  # fmt: skip
_ENCODER3 = "gemma3_text-encoder"  # its model_type is that of a decoder
NARROW[_ENCODER3] = _base(
    "Gemma3TextModel", "gemma3_text", head_dim=32, query_pre_attn_scalar=32, sliding_window=16,
    num_hidden_layers=6, use_bidirectional_attention=True, tie_word_embeddings=True,
    vocab_size=rows(TOKENIZERS["sp-gemma"]),
)  # fmt: skip
_T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
NARROW |= {
    "t5": _T5,  # the first form: outputs are scaled
    "t5-encoder": _T5 | {
        "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
}  # fmt: skip
NARROW |= {
    "mt5": _T5 | {
        "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
        "feed_forward_proj": "relu",  # ggml's GELU is less exact
    },
    "umt5": _T5 | {
        "architectures": ["UMT5ForConditionalGeneration"], "model_type": "umt5",
        "feed_forward_proj": "relu",
    },
}  # fmt: skip
STACKS = ("t5", "mt5", "umt5")  # of an encoder and a decoder
# What is compared of these are hidden states.
ENCODERS = (
    *(
        "bert",
        "xlm-roberta",
        "roberta",
        "camembert",
        "distilbert",
        "eurobert",
        "modernbert",
        _ENCODER3,
    ),
    *("nomic_bert", "jina_embeddings_v3", "t5-encoder"),
)
SEEING = ("llava", "llava_next", "idefics3", "smolvlm", "internvl")
SEEING_QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
WRAPPED = (
    "mistral3-mistral4",
    *("qwen3_5", "qwen3_5_moe", "mistral3", "llama4", "gemma3n", "gemma4"),
    *(*SEEING, *SEEING_QWEN),
)

# More models for `make_families.py`: of classes that are in `NARROW` otherwise.
MORE: dict[str, Fields] = {
    "mistral3, around mistral": NARROW["mistral3"] | {
        "text_config": _without(
            _base("", "mistral", head_dim=32, sliding_window=None), "architectures"
        )
    },
    "llava, around mistral": _seeing(
        "llava", "clip_vision_model", _base("", "mistral", head_dim=32, sliding_window=None)
    ),
    "llava, around qwen2": _seeing("llava", "clip_vision_model", _base("", "qwen2")),
    "internvl, around qwen3": _seeing(
        "internvl", "internvl_vision", _base("", "qwen3", head_dim=32)
    ),
    "internvl, around llama": _seeing("internvl", "internvl_vision", _PLAIN),
    # as published, but for a base with which the slowest pairs turn visibly
    "qwen3_vl, published sections": _seeing_qwen(
        "qwen3_vl", "Qwen3VL", _base(
            "", "qwen3_vl_text", head_dim=128,
            rope_parameters=_sections(24, 20, 20, mrope_interleaved=True, rope_theta=50.0),
        ), **_DEEP,
    ),
    "qwen2_5_vl, as published": _flat(NARROW["qwen2_5_vl"]),
    "falcon, one head of keys": _without(
        NARROW["falcon"] | {"new_decoder_architecture": False, "tie_word_embeddings": True},
        "num_kv_heads",
    ),
    "falcon, one norm": NARROW["falcon"] | {"num_ln_in_parallel_attn": 1},
    "bloom, 6 heads": NARROW["bloom"] | {"n_head": 6, "hidden_size": 768},
    "nemotron_h, dense": NARROW["nemotron_h"] | {
        "layers_block_type": ["mamba", "mlp", "attention", "mlp", "mamba"]
    },
    "nemotron_h, latent": NARROW["nemotron_h"] | {"moe_latent_size": 32},
    "jamba, one expert": NARROW["jamba"] | {"num_experts": 1},
    "falcon_mamba, as published": NARROW["falcon_mamba"] | {"mixer_rms_eps": 1e-6},
    "falcon_h1, tied": NARROW["falcon_h1"] | {
        "tie_word_embeddings": True, "mamba_rms_norm": False,
    },
    **{
        f"granitemoehybrid, {name}": _base(
            "GraniteMoeHybridForCausalLM", "granitemoehybrid", **_GRANITE4 | more
        )
        for name, more in {
            "dense": {"num_local_experts": 0},
            "attention": {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
            "attention, dense": {
                "layer_types": ["attention"] * 3, "position_embedding_type": "rope",
                "num_local_experts": 0,
            },
            "attention, dense, without positions": {
                "layer_types": ["attention"] * 3, "num_local_experts": 0,
            },
        }.items()
    },
    "gemma4_text, experts": _base(
        "Gemma4ForCausalLM", "gemma4_text", **_GEMMA4, enable_moe_block=True, num_experts=4,
        top_k_experts=2, moe_intermediate_size=48, hidden_size_per_layer_input=0,
    ),
    "gemma3n_text, shared": _base(
        "Gemma3nForCausalLM", "gemma3n_text", **_GEMMA3N | {
            "num_hidden_layers": 22, "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
        },
    ),
    "t5, gated": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    **{
        f"{kind.lower()}, encoder": _T5 | {
            "architectures": [f"{kind}EncoderModel"], "model_type": kind.lower(),
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        }
        for kind in ("MT5", "UMT5")
    },
    "bert, classifier": _encoder(
        "BertForSequenceClassification", "bert", id2label={"0": "score"}
    ),
    "xlm-roberta, classifier": _encoder(
        "XLMRobertaForSequenceClassification", "xlm-roberta",
        id2label={"0": "bad", "1": "good", "2": "neither"},
    ),
    "qwen3, classifier": _base(
        "Qwen3ForSequenceClassification", "qwen3", head_dim=32, id2label={"0": "score"},
        vocab_size=rows(TOKENIZERS["qwen2"]),
    ),
    "qwen3, three labels": _base(
        "Qwen3ForSequenceClassification", "qwen3", head_dim=32,
        vocab_size=rows(TOKENIZERS["qwen2"]), id2label={"0": "bad", "1": "good", "2": "neither"},
    ),
    "modernbert, classifier": NARROW["modernbert"] | {
        "architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "mean",
        "id2label": {"0": "score"},
    },
    "exaone4, windows": _base(
        "Exaone4ForCausalLM", "exaone4", sliding_window=16, num_hidden_layers=64
    ),
    "deepseek_v3, yarn": _base(
        "DeepseekV3ForCausalLM", "deepseek_v3", **_LATENT, q_lora_rank=32, rms_norm_eps=1e-6,
        n_group=2, topk_group=1, rope_parameters=_YARN | {"mscale_all_dim": 0.5},
    ),
    "gpt_oss, yarn": _base(
        "GptOssForCausalLM", "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=32,
        sliding_window=16, rope_parameters=_YARN | {"truncate": True},
    ),
}  # fmt: skip

# Models with a layer that predicts a further token: the layers that its tensors are like, and what
# they are named in its checkpoints.
_LAST = {"model.layers.{last}.": "model.layers.{next}."}
_QWEN = {"model.layers.{last}.": "mtp.layers.0."}
_OWN = {name: f"model.layers.{{next}}.{name}" for name in ("eh_proj", "enorm", "hnorm")}
_QWEN_OWN = {
    "eh_proj": "mtp.fc", "enorm": "mtp.pre_fc_norm_embedding", "hnorm": "mtp.pre_fc_norm_hidden",
    "norm": "mtp.norm",
}  # fmt: skip
_GLM_OWN = _OWN | {
    "norm": "model.layers.{next}.shared_head.norm",
    "head": "model.layers.{next}.shared_head.head",
    "embedding": "model.layers.{next}.embed_tokens",
}
FURTHER: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite", "deepseek_v3"), (_LAST, _GLM_OWN)),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), (_QWEN, _QWEN_OWN)),
    "nemotron_h": (
        {"backbone.layers.2.": "mtp.layers.0.", "backbone.layers.1.": "mtp.layers.1."},
        {name: f"mtp.layers.0.{name}" for name in ("eh_proj", "enorm", "hnorm")}
        | {"norm": "mtp.layers.1.final_layernorm"},
    ),
}
_FURTHER = ", further"
MORE |= {f"{name}{_FURTHER}": NARROW[name] for name in FURTHER}
_TURNED = ", turned round"
MORE[f"qwen3_vl_moe{_TURNED}"] = NARROW["qwen3_vl_moe"]
Shapes = Mapping[str, tuple[int, ...]]


def with_further(name: str, config: Fields, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Tensors of a checkpoint, with those of a layer that predicts a further token if the name of
    the model says so: transformers leaves them out.
    """
    found = dict(shapes)
    if not name.endswith(_FURTHER):
        return found
    like, own = FURTHER[name.removesuffix(_FURTHER)]
    layers = config["num_hidden_layers"]
    for old, new in like.items():
        start, other = (s.format(last=layers - 1, next=layers) for s in (old, new))
        found |= {
            other + n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)
        }
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    of = {"eh_proj": (width, 2 * width)}
    of |= dict.fromkeys(("head", "embedding"), (vocabulary, width))
    return found | {
        f"{place}.weight".format(next=layers): of.get(part, (width,)) for part, place in own.items()
    }


def as_stored(name: str, config: Fields, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Tensors of the checkpoint of a model, which its name may say to differ from what transformers
    saves: in a layer for a further token, or in experts that are turned round.
    """
    found = with_further(name, config, shapes)
    if not name.endswith(_TURNED):
        return found
    return {n: (s[0], s[2], s[1]) if ".experts." in n else s for n, s in found.items()}


# Fields of `NARROW`, and what makes a multiple of 256 of rows that depend on them.
_WIDER = {
    "hidden_size": 256,
    "mamba_d_ssm": 512,
    "d_model": 256,
    "d_ff": 512,
    "d_kv": 64,
    "n_embd": 256,
    "dim": 256,
    "hidden_dim": 512,
    "intermediate_size": 512,
    "intermediate_size_mlp": 512,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
    "moe_latent_size": 256,
    "mamba_head_dim": 64,
    "shared_expert_intermediate_size": 256,
    "shared_intermediate_size": 256,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "v_head_dim": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "hidden_size_per_layer_input": 256,
    "global_head_dim": 128,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}


def wide(fields: Fields) -> Fields:
    """The same model with rows of multiples of 256 values."""
    wider = {n: max(_WIDER[n], v) if v and n in _WIDER else v for n, v in fields.items()}
    for name in ("rope_parameters", "rope_scaling"):
        if sections := (fields.get(name) or {}).get("mrope_section"):
            head = wider.get("head_dim") or wider["hidden_size"] // wider["num_attention_heads"]
            more = head // 2 // sum(sections)
            wider[name] = fields[name] | {"mrope_section": [s * more for s in sections]}
    if "text_config" in fields:
        wider["text_config"] = wide(fields["text_config"])
    vision = fields.get("vision_config", {})
    if "out_hidden_size" in vision:
        wider["vision_config"] = vision | {"out_hidden_size": 256}
        if "embed_dim" in vision:  # where the width is another field's
            wider["vision_config"] |= {"hidden_size": 256}
    return wider
