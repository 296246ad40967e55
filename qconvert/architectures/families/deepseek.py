"""DeepSeek V2 and V3, and GLM 4.7 Flash: attention through latent vectors."""

from __future__ import annotations

import math
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import (
    ANY,
    BOOL,
    BOOL_OR_NULL,
    DECODER,
    FLOAT,
    INT,
    INT_OR_NULL,
    TEXT_OR_NULL,
    TEXTS_OR_NULL,
    TRAINING,
    ConfigClass,
    decoder_fields,
)
from qconvert.architectures.families.keys import (
    MAX_BLOCKS,
    MAX_EXPERTS,
    SILU,
    Keys,
    Sizes,
    decoder_keys,
    group_keys,
    leading_blocks,
    routed_keys,
)
from qconvert.architectures.families.row import Family, Further, Slot
from qconvert.architectures.families.slots import (
    LEADING_DENSE,
    NEXTN,
    NORMS,
    ROUTER_BIAS,
    ROUTER_BIAS_PART,
    WHOLE,
)
from qconvert.architectures.mapped import Order, strided
from qconvert.architectures.rope import Rope, Scalings, read_rope, settled

_LATENT: dict[str, tuple[str, object]] = {
    "kv_lora_rank": (INT, 512),
    "q_lora_rank": (INT_OR_NULL, 1536),
    "qk_rope_head_dim": (INT, 64),
    "qk_nope_head_dim": (INT, 128),
    "attention_bias": (BOOL, False),
}
CONFIGS = (
    ConfigClass(
        "DeepseekV2Config",
        "deepseek_v2",
        ("DeepseekV2ForCausalLM",),
        decoder_fields((102_400, 4096, 11_008, 32, 32), (INT_OR_NULL, None), 2048)
        | _LATENT
        | {
            "mlp_bias": (BOOL, False),
            "first_k_dense_replace": (INT, 0),
            "n_group": (INT_OR_NULL, None),
            "n_routed_experts": (INT, 64),
            "n_shared_experts": (INT, 2),
            "routed_scaling_factor": (FLOAT, 1.0),
            "topk_group": (INT_OR_NULL, None),
            "topk_method": (TEXT_OR_NULL, "greedy"),
            "norm_topk_prob": (BOOL_OR_NULL, False),
            "v_head_dim": (INT, 128),
            "num_experts_per_tok": (INT_OR_NULL, None),
            "moe_intermediate_size": (INT, 1407),
        },
        # The width of a head is that of its rotated part, whatever the field says.
        (*TRAINING, "pretraining_tp", "output_router_logits", "head_dim"),
        DECODER,
        MappingProxyType({"num_experts": "n_routed_experts"}),
        harmless=MappingProxyType(
            {
                "aux_loss_alpha": ANY,
                "seq_aux": ANY,
                "moe_layer_freq": (1,),
                "scoring_func": ("softmax",),
                "ep_size": ANY,
            }
        ),
        divides=True,
    ),
    ConfigClass(
        "DeepseekV3Config",
        "deepseek_v3",
        ("DeepseekV3ForCausalLM",),
        decoder_fields((129_280, 7168, 18_432, 61, 128), (INT_OR_NULL, 128), 4096)
        | _LATENT
        | {
            "moe_intermediate_size": (INT, 2048),
            "n_shared_experts": (INT, 1),
            "n_routed_experts": (INT, 256),
            "routed_scaling_factor": (FLOAT, 2.5),
            "v_head_dim": (INT_OR_NULL, 128),
            "n_group": (INT_OR_NULL, 8),
            "topk_group": (INT_OR_NULL, 4),
            "num_experts_per_tok": (INT_OR_NULL, 8),
            "first_k_dense_replace": (INT_OR_NULL, 3),
            "norm_topk_prob": (BOOL_OR_NULL, True),
            "rope_interleave": (BOOL_OR_NULL, True),
        },
        (*TRAINING, "pretraining_tp", "output_router_logits", "num_mtp_layers"),
        DECODER,
        MappingProxyType(
            {
                "num_local_experts": "n_routed_experts",
                "num_nextn_predict_layers": "num_mtp_layers",
            }
        ),
        harmless=MappingProxyType(
            {
                "aux_loss_alpha": ANY,
                "seq_aux": ANY,
                "moe_layer_freq": (1,),
                "scoring_func": ("sigmoid",),
                "topk_method": ("noaux_tc",),
                "ep_size": ANY,
            }
        ),
    ),
    ConfigClass(
        "Glm4MoeLiteConfig",
        "glm4_moe_lite",
        ("Glm4MoeLiteForCausalLM",),
        decoder_fields((154_880, 2048, 10_240, 47, 20), (INT, 20), 202_752, 1e-5)
        | _LATENT
        | {
            "q_lora_rank": (INT_OR_NULL, 768),
            "qk_nope_head_dim": (INT, 192),
            "moe_intermediate_size": (INT, 1536),
            "n_shared_experts": (INT, 1),
            "n_routed_experts": (INT, 64),
            "routed_scaling_factor": (FLOAT, 1.8),
            "v_head_dim": (INT, 256),
            "n_group": (INT, 1),
            "topk_group": (INT, 1),
            "num_experts_per_tok": (INT, 4),
            "norm_topk_prob": (BOOL, True),
            "rope_interleave": (BOOL, True),
            "mlp_layer_types": (TEXTS_OR_NULL, None),
        },
        (*TRAINING, "pretraining_tp", "output_router_logits"),
        DECODER,
        MappingProxyType({"num_local_experts": "n_routed_experts", "head_dim": "qk_rope_head_dim"}),
        harmless=MappingProxyType(
            {
                "num_nextn_predict_layers": ANY,
                "first_k_dense_replace": (1,),
                "topk_method": ("noaux_tc",),
            }
        ),
    ),
)

# llama.cpp takes models of so many blocks for the ones that have no latent queries.
_WITHOUT_LATENT_QUERIES = (26, 27)
_LARGEST_EPSILON = 1e-4


def latent_sizes(config: Config) -> Sizes:
    heads = config.count("num_attention_heads")
    groups = config.optional_count("num_key_value_heads") or heads
    if groups != heads:
        raise config.unlike("num_key_value_heads", "as many as heads of queries")
    blocks = config.count("num_hidden_layers", most=MAX_BLOCKS)
    rotated, plain = config.count("qk_rope_head_dim"), config.count("qk_nope_head_dim")
    if rotated % 2:
        raise config.wrong("qk_rope_head_dim", "an even number")
    values, rank = config.count("v_head_dim"), config.count("kv_lora_rank")
    inner = config.count("moe_intermediate_size")
    head = rotated + plain
    return Sizes(
        blocks=blocks,
        head_dim=head,
        named={
            "vocabulary": config.count("vocab_size"),
            "width": config.count("hidden_size"),
            "inner": config.count("intermediate_size"),
            "context": config.count("max_position_embeddings"),
            "heads": heads,
            "plain": plain,
            "values": values,
            "query": heads * head,
            "queries": config.optional_count("q_lora_rank") or 0,
            "latent": rank,
            "latent_rotated": rank + rotated,
            "rotated": rotated,
            "both": heads * (plain + values),
            "output": heads * values,
            "key": head,
            "experts": config.count("n_routed_experts", most=MAX_EXPERTS),
            "expert_inner": inner,
            "shared": config.count("n_shared_experts") * inner,
            "dense": leading_blocks(config, blocks),
        },
    )


def latent_keys(config: Config, sizes: Sizes) -> Keys:
    """What models with latent vectors have in common."""
    config.require("attention_bias", (False,))
    if config.number("rms_norm_eps", zero=True) > _LARGEST_EPSILON:
        # Norms of latent vectors have 1e-6 in transformers, and this in llama.cpp.
        raise config.unlike("rms_norm_eps", f"at most {_LARGEST_EPSILON}")
    if sizes.blocks in _WITHOUT_LATENT_QUERIES and sizes.named["queries"]:
        raise config.unlike("q_lora_rank", f"null in a model of {sizes.blocks} layers")
    named = sizes.named
    return decoder_keys(config, sizes) | {
        "attention.head_count_kv": 1,  # what heads share are the latent vectors
        "attention.key_length": named["latent_rotated"],
        "attention.value_length": named["latent"],
        "attention.key_length_mla": sizes.head_dim,
        "attention.value_length_mla": named["values"],
        "attention.q_lora_rank": named["queries"],
        "attention.kv_lora_rank": named["latent"],
        "expert_shared_count": config.count("n_shared_experts"),
        "leading_dense_block_count": named["dense"],
    }


def deepseek2_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("topk_method", ("greedy",))
    config.require("norm_topk_prob", (False, None))
    config.require("mlp_bias", (False,))
    scale = config.number("routed_scaling_factor")
    return latent_keys(config, sizes) | routed_keys(
        config, sizes, "softmax", scale=scale, norm=False
    )


def deepseek3_keys(config: Config, sizes: Sizes) -> Keys:
    config.require("rope_interleave", (True,))
    scale, norm = config.number("routed_scaling_factor"), config.flag("norm_topk_prob")
    return (
        latent_keys(config, sizes)
        | routed_keys(config, sizes, "sigmoid", scale=scale, norm=norm)
        | group_keys(config, sizes)
    )


_KINDS = Scalings(("default", "yarn"))


def latent_rope(
    config: Config, sizes: Sizes, kinds: Scalings = _KINDS, *, divided: bool = False
) -> Rope:
    """Rotary positions, and with YaRN the scale of attention.

    With f = 1 + 0.1 ln(factor) llama.cpp multiplies what is rotated by A, and all scores by
    A^2 (1 + log_mul ln(factor))^2, where A is ``attn_factor`` if log_mul is not zero, else f times
    it. transformers multiplies what is rotated by a factor of its own and all scores by
    (1 + 0.1 mscale_all_dim ln(factor))^2. Where A is ``divided`` by 1 + log_mul ln(factor) and
    multiplied by f in any case, scores are those of f times ``attn_factor``.
    """
    p = settled(config, kinds)
    rope = read_rope(p, sizes.named["rotated"], kinds)
    if p.kind == "yarn":
        stretch = p.fields.number("factor")
        usual = 1 + 0.1 * math.log(stretch) if stretch > 1 else 1.0
        rotated = float(rope.keys.pop("scaling.attn_factor", 1.0)) * usual  # type: ignore[arg-type]
        whole = 0.0 if not p.fields.stated(_WHOLE) else p.fields.number(_WHOLE)
        scores = 1 + 0.1 * whole * math.log(stretch) if stretch > 1 else 1.0
        log_mul = (scores / rotated - 1) / math.log(stretch) if stretch > 1 else 0.0
        factor = rotated / usual if abs(log_mul) < 1e-9 else rotated
        rope.keys["scaling.attn_factor"] = scores / usual if divided else factor
        if abs(log_mul) >= 1e-9:
            rope.keys["scaling.yarn_log_multiplier"] = log_mul
    return rope


_WHOLE = "mscale_all_dim"


def _latent_queries(config: Config, sizes: Sizes, block: int) -> bool:
    return sizes.named["queries"] > 0


def _plain_queries(config: Config, sizes: Sizes, block: int) -> bool:
    return not sizes.named["queries"]


def _keys_order(sizes: Sizes) -> Order:
    heads, plain, values, rank = sizes.shape("heads plain values latent")
    return strided((heads, rank, plain), ((plain + values) * rank, 1, rank))


def _values_order(sizes: Sizes) -> Order:
    heads, plain, values, rank = sizes.shape("heads plain values latent")
    return strided((heads, values, rank), ((plain + values) * rank, rank, 1), plain * rank)


LATENT_BLOCK = (
    *NORMS,
    Slot("attn_q.weight", "query width", only=_plain_queries),
    Slot("attn_q_a.weight", "queries width", only=_latent_queries),
    Slot("attn_q_a_norm.weight", "queries", only=_latent_queries),
    Slot("attn_q_b.weight", "query queries", only=_latent_queries),
    Slot("attn_kv_a_mqa.weight", "latent_rotated width"),
    Slot("attn_kv_a_norm.weight", "latent"),
    Slot("attn_k_b.weight", "heads latent plain", source="both latent", order=_keys_order),
    Slot("attn_v_b.weight", "heads values latent", source="both latent", order=_values_order),
    Slot("attn_output.weight", "width output"),
    *LEADING_DENSE,
)
LATENT_PARTS: dict[str, tuple[str, ...]] = {
    "self_attn.kv_b_proj.weight": ("attn_k_b.weight", "attn_v_b.weight"),
}

ROWS = (
    Family(
        "DeepSeek V2",
        ("DeepseekV2ForCausalLM",),
        "deepseek2",
        WHOLE,
        tuple(slot for slot in LATENT_BLOCK if slot.name != ROUTER_BIAS.name),
        deepseek2_keys,
        latent_sizes,
        latent_rope,
        SILU,
        parts=MappingProxyType(LATENT_PARTS),
    ),
    Family(
        "DeepSeek V3 (also GLM 4.7 Flash)",
        ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
        "deepseek2",
        WHOLE,
        LATENT_BLOCK,
        deepseek3_keys,
        latent_sizes,
        latent_rope,
        SILU,
        parts=MappingProxyType(LATENT_PARTS | ROUTER_BIAS_PART),
        further=Further((*LATENT_BLOCK, *NEXTN)),
    ),
)
