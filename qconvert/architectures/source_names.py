"""Names and shapes that checkpoints of an architecture have, without one at hand.

gguf-py's table leads from many names to one and not back. What stands here is held against that
table, and the row of the architecture, each time: `restored` maps the names and refuses what is
missing or left over.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from types import MappingProxyType

from qconvert.architectures.config import Config
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import OUTPUT
from qconvert.architectures.mapping import slots_of

Shape = tuple[int, ...]

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DENSE = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = _DENSE | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_FOUR_NORMS = _DENSE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _experts(place: str, gate: str, up: str, down: str) -> dict[str, str]:
    each = {"gate": gate, "up": up, "down": down}
    named = {f"ffn_{part}_exps": f"{place}.experts.*.{name}" for part, name in each.items()}
    return _DENSE | named | {"ffn_gate_inp": f"{place}.gate"}


_MIXTRAL = _experts("block_sparse_moe", "w1", "w3", "w2")
_QWEN = _experts("mlp", "gate_proj", "up_proj", "down_proj")
# By the first class of a family: what stands for each name of GGUF within a block. A star stands
# for the number of an expert.
NAMES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "LlamaForCausalLM": _DENSE,
        "MixtralForCausalLM": _MIXTRAL,
        "Qwen2ForCausalLM": _DENSE,
        "Qwen3ForCausalLM": _DENSE,
        "Qwen3MoeForCausalLM": _QWEN,
        "Gemma2ForCausalLM": _FOUR_NORMS,
        "Gemma3ForCausalLM": _FOUR_NORMS,
        "Phi3ForCausalLM": _FUSED,
    }
)


def source_shapes(family: Family, config: Config, there: Set[str]) -> dict[str, Shape] | None:
    """Shapes of a checkpoint's tensors by their names; None where its names are not known.

    Args:
        family, config: of the model.
        there: names of the tensors in the GGUF file, which tell whether it has a head of its own.
    """
    names = NAMES.get(family.classes[0])
    if names is None:
        return None
    sizes = family.sizes(config)
    found: dict[str, Shape] = {}
    for name, slot in slots_of(family, config, sizes, with_output=OUTPUT in there):
        shape = sizes.shape(slot.shape)
        block, _, inside = name.removeprefix("blk.").partition(".")
        if not name.startswith("blk."):
            stem, _, end = name.rpartition(".")
            found[f"{_WHOLE[stem]}.{end}"] = shape
            continue
        stem, _, end = inside.rpartition(".")
        if stem not in names:
            return None
        plain = f"model.layers.{block}.{names[stem]}.{end}"
        if "*" in plain:
            found |= {plain.replace("*", str(i)): shape[1:] for i in range(shape[0])}
        else:
            found[plain] = shape
    return found
