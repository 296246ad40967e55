"""Tensors that several architectures have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.mapped import Locate, Order, Rows, strided

In = Callable[[Config, Sizes, int], bool]  # in which blocks something is
OUTPUT = "output.weight"
EMBEDDING = Slot("token_embd.weight", "vocabulary width")
OUTPUT_NORM = Slot("output_norm.weight", "width")
OUTPUT_MATRIX = Slot(OUTPUT, "vocabulary width")
WITHOUT_OUTPUT = (EMBEDDING, OUTPUT_NORM)
WHOLE = (*WITHOUT_OUTPUT, OUTPUT_MATRIX)


ATTENTION_BIAS = "attention_bias"


def attention(heads: bool, bias: bool | None, flag: str = ATTENTION_BIAS) -> tuple[Slot, ...]:
    """Query, key, value and output; biases are required, absent or (None) as a field says."""
    q, k, v = (("attn_q", "query"), ("attn_k", "key"), ("attn_v", "key"))
    found = [
        Slot(f"{q[0]}.weight", f"{q[1]} width", heads=heads),
        Slot(f"{k[0]}.weight", f"{k[1]} width", heads=heads),
        Slot(f"{v[0]}.weight", f"{v[1]} width"),
        Slot("attn_output.weight", "width query"),
    ]
    if bias is not False:
        said = flag if bias is None else None
        found += [
            Slot(f"{q[0]}.bias", q[1], heads=heads, flag=said),
            Slot(f"{k[0]}.bias", k[1], heads=heads, flag=said),
            Slot(f"{v[0]}.bias", v[1], flag=said),
        ]
    return tuple(found)


ATTENTION_NORM = Slot("attn_norm.weight", "width")
INNER_NORM = Slot("ffn_norm.weight", "width")
NORMS = (ATTENTION_NORM, INNER_NORM)
# Norms that take the mean away, each with a bias; layers of BERT's kind before gates came.
OUTPUT_BIAS = Slot("output_norm.bias", "width")
ATTENTION_MEAN_NORM = (ATTENTION_NORM, Slot("attn_norm.bias", "width"))
INNER_MEAN_NORM = (INNER_NORM, Slot("ffn_norm.bias", "width"))
MEAN_NORMS = (*ATTENTION_MEAN_NORM, *INNER_MEAN_NORM)
PLAIN_INNER = (
    Slot("ffn_up.weight", "inner width"),
    Slot("ffn_up.bias", "inner"),
    Slot("ffn_down.weight", "width inner"),
    Slot("ffn_down.bias", "width"),
)
ATTENTION_OUTPUT_BIAS = Slot("attn_output.bias", "width")
FUSED = (
    Slot("attn_qkv.weight", "fused width"),
    Slot("attn_qkv.bias", "fused"),
    Slot("attn_output.weight", "width query"),
    ATTENTION_OUTPUT_BIAS,
)


def fused_by_group(sizes: Sizes) -> Locate:
    """Rows of queries, then keys, then values, where a checkpoint has together the queries that
    share keys, and these and their values after them.
    """
    head, query, key = sizes.head_dim, sizes.named["query"], sizes.named["key"]
    each = query // key  # of queries in a group, which has two heads more

    def locate(rows: Rows) -> Rows:
        number, row = np.divmod(rows, head)
        others = number - query // head
        group = np.where(others < 0, number // each, others % (key // head))
        place = np.where(others < 0, number % each, each + others // (key // head))
        return (group * (each + 2) + place) * head + row

    return locate


BY_GROUP = tuple(replace(s, rows=fused_by_group) if "qkv" in s.name else s for s in FUSED)


def turned_round(slot: Slot) -> Slot:
    """A matrix that a checkpoint has turned round."""

    def order(sizes: Sizes) -> Order:
        rows, columns = sizes.shape(slot.shape)
        return strided((rows, columns), (1, rows))

    return replace(slot, source=" ".join(reversed(slot.shape.split())), order=order)


QUERY_NORM = Slot("attn_q_norm.weight", "head")
KEY_NORM = Slot("attn_k_norm.weight", "head")
HEAD_NORMS = (QUERY_NORM, KEY_NORM)
POST_ATTENTION_NORM = Slot("post_attention_norm.weight", "width")
POST_NORMS = (POST_ATTENTION_NORM, Slot("post_ffw_norm.weight", "width"))
GATE = Slot("ffn_gate.weight", "inner width")
UP = Slot("ffn_up.weight", "inner width")
DOWN = Slot("ffn_down.weight", "width inner")
UNGATED = (UP, DOWN)
GATED = (GATE, *UNGATED)
MLP_BIAS = "mlp_bias"
UNGATED_BIASES = (
    Slot("ffn_up.bias", "inner", flag=MLP_BIAS),
    Slot("ffn_down.bias", "width", flag=MLP_BIAS),
)
GATED_BIASES = (Slot("ffn_gate.bias", "inner", flag=MLP_BIAS), *UNGATED_BIASES)
ROUTER = Slot("ffn_gate_inp.weight", "experts width")
EXPERT_GATES = Slot("ffn_gate_exps.weight", "experts expert_inner width")
EXPERT_UPS = Slot("ffn_up_exps.weight", "experts expert_inner width")
EXPERT_DOWNS = Slot("ffn_down_exps.weight", "experts width expert_inner")
EXPERTS = (ROUTER, EXPERT_GATES, EXPERT_UPS, EXPERT_DOWNS)


def turned_half(half: int, *, alternating: bool = False) -> Callable[[Sizes], Order]:
    """Where values of a half of the columns are, turned round: of the first or second half, or
    every second one.
    """

    def order(sizes: Sizes) -> Order:
        experts, width, inner = sizes.shape("experts width expert_inner")
        step, start = (2, half) if alternating else (1, half * inner)
        return strided((experts, inner, width), (2 * width * inner, step, 2 * inner), start)

    return order


def _turned_down(sizes: Sizes) -> Order:
    """Where values of experts' second matrices are, turned round."""
    experts, width, inner = sizes.shape("experts width expert_inner")
    return strided((experts, width, inner), (width * inner, 1, width))


# Experts whose matrices lie turned round, gates beside what they multiply.
TURNED_DOWNS = replace(EXPERT_DOWNS, source="experts expert_inner width", order=_turned_down)
TURNED_EXPERTS = (
    ROUTER,
    replace(EXPERT_GATES, source="experts width expert_gate_up", order=turned_half(0)),
    replace(EXPERT_UPS, source="experts width expert_gate_up", order=turned_half(1)),
    TURNED_DOWNS,
)
# The same as one or the other form, as a checkpoint has it.
EITHER_EXPERTS = tuple(
    replace(slot, stored=turned if turned.order else None)
    for slot, turned in zip(EXPERTS, TURNED_EXPERTS, strict=True)
)


def leading_dense(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether a block is among the first, which have no experts."""
    return block < sizes.named["dense"]


def own_keys(config: Config, sizes: Sizes, block: int) -> bool:
    """Whether a block is among the first, whose keys and values later ones look at."""
    return block < sizes.named["own"]


def negated(only: In) -> In:
    """All other blocks."""
    return lambda config, sizes, block: not only(config, sizes, block)


def limited(slots: tuple[Slot, ...], only: In) -> tuple[Slot, ...]:
    """The same in some blocks, of those that have them at all."""

    def both(slot: Slot) -> In:
        own = slot.only
        if own is None:
            return only
        return lambda config, sizes, block: only(config, sizes, block) and own(config, sizes, block)

    return tuple(replace(slot, only=both(slot)) for slot in slots)


def _shared(config: Config, sizes: Sizes, block: int) -> bool:
    return sizes.named["shared"] > 0


# An expert that every token has.
UNGATED_SHARED = (
    Slot("ffn_up_shexp.weight", "shared width", only=_shared),
    Slot("ffn_down_shexp.weight", "width shared", only=_shared),
)
SHARED = (Slot("ffn_gate_shexp.weight", "shared width", only=_shared), *UNGATED_SHARED)

# What a router's weights are increased by where it chooses, not where it weighs.
ROUTER_BIAS = Slot("exp_probs_b.bias", "experts")
# Dense blocks first, then experts.
LEADING_DENSE = (
    *limited(GATED, leading_dense),
    *limited((*EXPERTS, ROUTER_BIAS, *SHARED), negated(leading_dense)),
)
ROUTER_BIAS_PART: dict[str, tuple[str, ...]] = {
    "mlp.gate.e_score_correction_bias": (ROUTER_BIAS.name,)
}
# What joins a block's own embedding of a token.
OF_LAYER = (
    Slot("inp_gate.weight", "each width"),
    Slot("proj.weight", "width each"),
    Slot("post_norm.weight", "width"),
)
SHARED_GATE = Slot("ffn_gate_inp_shexp.weight", "width", source="1 width")


# Where a language model is inside a model of several kinds of input.
INSIDE = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_HEARD = "belongs to the audio part, which is a file of its own in llama.cpp"
SEEN = "belongs to the vision part, a file of its own in llama.cpp, which --mmproj writes"


def seen(*parts: str, end: str = ".") -> tuple[tuple[str, str], ...]:
    """Modules that turn images into tokens, inside the model or beside it."""
    return tuple((f"{inside}{part}{end}", SEEN) for inside in ("", "model.") for part in parts)


VISION = seen("vision_tower", "multi_modal_projector", "embed_vision", "visual")
AUDIO = tuple(
    (f"{inside}{part}.", _HEARD)
    for inside in ("", "model.")
    for part in ("audio_tower", "embed_audio")
)
FURTHER = "predicts further tokens at once, which llama.cpp does not do with this architecture"

# What joins the embedding of a token with the hidden state before it, and what there is of an
# embedding, a last norm and an output matrix of the layer's own.
NEXTN_INPUT = (
    Slot("nextn.eh_proj.weight", "width both_widths"),
    Slot("nextn.enorm.weight", "width"),
    Slot("nextn.hnorm.weight", "width"),
)
NEXTN_NORM = Slot("nextn.shared_head_norm.weight", "width", optional=True)
NEXTN = (
    *NEXTN_INPUT,
    Slot("nextn.embed_tokens.weight", "vocabulary width", optional=True),
    Slot("nextn.shared_head_head.weight", "vocabulary width", optional=True),
    NEXTN_NORM,
)
NEXTN_PARTS = {
    **{f"{name}.weight": (f"nextn.{name}.weight",) for name in ("eh_proj", "enorm", "hnorm")},
    "embed_tokens.weight": ("nextn.embed_tokens.weight",),
    **{f"shared_head.{n}.weight": (f"nextn.shared_head_{n}.weight",) for n in ("head", "norm")},
}
