"""Tensors that several architectures have."""

from __future__ import annotations

from qconvert.architectures.families.row import Slot

OUTPUT = "output.weight"
WHOLE = (
    Slot("token_embd.weight", "vocabulary width"),
    Slot("output_norm.weight", "width"),
    Slot(OUTPUT, "vocabulary width"),
)


ATTENTION_BIAS = "attention_bias"


def attention(heads: bool, bias: bool | None) -> tuple[Slot, ...]:
    """Query, key, value and output; biases are required, absent or (None) as a field says."""
    q, k, v = (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "key"))
    found = [
        Slot(f"{q[0]}.weight", f"{q[1]} width", heads=heads),
        Slot(f"{k[0]}.weight", f"{k[1]} width", heads=heads),
        Slot(f"{v[0]}.weight", f"{v[1]} width"),
        Slot("attn_output.weight", "width query"),
    ]
    if bias is not False:
        flag = ATTENTION_BIAS if bias is None else None
        found += [
            Slot(f"{q[0]}.bias", q[1], heads=heads, flag=flag),
            Slot(f"{k[0]}.bias", k[1], heads=heads, flag=flag),
            Slot(f"{v[0]}.bias", v[1], flag=flag),
        ]
    return tuple(found)


NORMS = (Slot("attn_norm.weight", "width"), Slot("ffn_norm.weight", "width"))
HEAD_NORMS = (Slot("attn_q_norm.weight", "head"), Slot("attn_k_norm.weight", "head"))
POST_NORMS = (
    Slot("post_attention_norm.weight", "width"),
    Slot("post_ffw_norm.weight", "width"),
)
GATED = (
    Slot("ffn_gate.weight", "inner width"),
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_down.weight", "width inner"),
)
EXPERTS = (
    Slot("ffn_gate_inp.weight", "experts width"),
    Slot("ffn_gate_exps.weight", "experts expert_inner width"),
    Slot("ffn_up_exps.weight", "experts expert_inner width"),
    Slot("ffn_down_exps.weight", "experts width expert_inner"),
)
