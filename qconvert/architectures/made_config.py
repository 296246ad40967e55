"""config.json from the keys of a GGUF file, for architectures whose keys say all of it.

What is made is held against the file: the keys and tensors that the configuration gives on the way
there have to be those of the file, and every key of the architecture has to be one that it gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.families import family_of, hyper_parameters
from qconvert.architectures.families.keys import FULL, NO_CAP, SLIDING
from qconvert.architectures.families.slots import OUTPUT
from qconvert.architectures.rope import llama3_factors
from qconvert.architectures.source import read_config
from qconvert.errors import QconvertError, UnsupportedError
from qconvert.files.gguf import ARCHITECTURE
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import GgufValue

HINT = "give the original model's directory with --config"
# What llama.cpp takes where a file does not say.
_THETA = 10_000.0
_EPSILON = "attention.layer_norm_rms_epsilon"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Says nothing by itself: the length that a scaling begins at, where there is no scaling.
_IDLE = frozenset({"rope.scaling.original_context_length"})
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of all that were published


@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a file below its architecture, and its tensors."""

    gguf: AnyGgufModel
    arch: str

    def get(self, name: str, default: Any = None) -> Any:
        key = f"{self.arch}.{name}"
        return self.gguf.value(key)[1] if key in self.gguf.metadata else default

    def count(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int:
            raise self.refused(name, value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float):
            raise self.refused(name, value)
        # The shortest decimal that the same binary32 comes of: what somebody had written.
        return float(str(np.float32(value)))

    def refused(self, name: str, value: object) -> UnsupportedError:
        found = "no such key" if value is None else repr(value)[:80]
        return UnsupportedError(
            f"key '{self.arch}.{name}' says nothing that {self.arch} has in a config.json",
            path=self.gguf.path,
            found=found,
            hint=HINT,
            code="ARCH-MADE-CONFIG",
        )

    @property
    def names(self) -> set[str]:
        """Of the tensors."""
        return {t.name for t in self.gguf.tensors}

    def rows(self, tensor: str) -> int:
        """How many rows a matrix has."""
        found = next((t for t in self.gguf.tensors if t.name == tensor), None)
        if found is None or len(found.shape) != 2:
            raise self.refused("vocab_size", None)
        return found.shape[0]

    def values(self, tensor: str) -> NDArray[np.float32] | None:
        """All of a small tensor; None where there is none."""
        found = next((t for t in self.gguf.tensors if t.name == tensor), None)
        return None if found is None else self.gguf.values(found, 0, found.size).astype(np.float32)


Fields = dict[str, Any]


def _decoder(k: _Keys) -> Fields:
    heads, width = k.count("attention.head_count"), k.count("embedding_length")
    return {
        "vocab_size": k.rows("token_embd.weight"),
        "hidden_size": width,
        "intermediate_size": k.count("feed_forward_length"),
        "num_hidden_layers": k.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": k.count("attention.head_count_kv", heads),
        "head_dim": k.count("attention.key_length", width // max(heads, 1)),
        "max_position_embeddings": k.count("context_length"),
        "rms_norm_eps": k.number(_EPSILON),
        "tie_word_embeddings": OUTPUT not in k.names,
        "rope_parameters": _rope(k),
    }


def _without_head_dim(k: _Keys) -> Fields:
    """Of classes without the field: it is the width by the number of heads."""
    fields = _decoder(k)
    del fields["head_dim"]
    return fields


def _rope(k: _Keys) -> Fields:
    theta = k.number("rope.freq_base", _THETA)
    kind = k.get("rope.scaling.type", "none")
    factors = k.values("rope_freqs.weight")
    if kind == "none" and factors is not None:
        return {"rope_theta": theta, **_llama3(k, theta, factors)}
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    found: Fields = {"rope_type": kind, "rope_theta": theta}
    if kind == "longrope":
        for length in ("short", "long"):
            values = k.values(f"rope_factors_{length}.weight")
            if values is None:
                raise k.refused("rope.scaling.type", kind)
            found[f"{length}_factor"] = [float(str(v)) for v in values]
        found["attention_factor"] = k.number("rope.scaling.attn_factor", 1.0)
        return found
    found["factor"] = k.number("rope.scaling.factor", 1.0)
    if kind == "yarn":
        found["original_max_position_embeddings"] = k.count("rope.scaling.original_context_length")
    return found


def _llama3(k: _Keys, theta: float, factors: NDArray[np.float32]) -> Fields:
    """Llama 3's scaling by the factors that it gives, which a file has instead of its fields.

    Only the quotients of the original context and the two bounds count, and all published models
    have the same bounds: one of some contexts gives the same factors, bit for bit, or none.
    """
    factor = float(factors.max(initial=1.0))
    for original in (1 << n for n in range(5, 24)):
        low, high = _LLAMA3.values()
        made = llama3_factors(theta, 2 * len(factors), factor, low, high, original)
        if np.array_equal(made, factors):
            return {
                "rope_type": "llama3",
                "factor": factor,
                **_LLAMA3,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedError(
        "factors of rotary frequencies that no known scaling gives",
        path=k.gguf.path,
        tensor="rope_freqs.weight",
        hint=HINT,
        code="ARCH-MADE-CONFIG",
    )


def _llama(k: _Keys) -> Fields:
    if k.get("expert_count"):
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **_decoder(k),
            "num_local_experts": k.count("expert_count"),
            "num_experts_per_tok": k.count("expert_used_count"),
            "sliding_window": None,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_decoder(k),
        "attention_bias": "blk.0.attn_output.bias" in k.names,
        "mlp_bias": "blk.0.ffn_down.bias" in k.names,
    }


def _qwen2(k: _Keys) -> Fields:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **_without_head_dim(k),
        "use_sliding_window": False,
    }


def _qwen3(k: _Keys) -> Fields:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **_decoder(k),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def _qwen3_moe(k: _Keys) -> Fields:
    return {
        **_qwen3(k),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": k.count("expert_count"),
        "num_experts_per_tok": k.count("expert_used_count"),
        "moe_intermediate_size": k.count("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(k: _Keys, every: int, largest: int) -> Fields:
    """Gemma 2 and 3: every n-th layer is a full one, if no key says otherwise.

    Args:
        largest: blocks of the model whose attention has another scale than its heads' width.
    """
    fields = _decoder(k)
    blocks, wide = fields["num_hidden_layers"], fields["hidden_size"]
    usual = [(i + 1) % every != 0 for i in range(blocks)]
    sliding = k.get("attention.sliding_window_pattern", usual)
    if not isinstance(sliding, list) or len(sliding) != blocks:
        raise k.refused("attention.sliding_window_pattern", sliding)
    per_head = wide // fields["num_attention_heads"]
    cap = k.number("final_logit_softcapping", NO_CAP)
    return fields | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if blocks == largest else fields["head_dim"],
        "sliding_window": k.count("attention.sliding_window", 4096),
        "layer_types": [SLIDING if windowed else FULL for windowed in sliding],
        "final_logit_softcapping": None if cap == NO_CAP else cap,
    }


def _gemma2(k: _Keys) -> Fields:
    cap = k.number("final_logit_softcapping", 30.0)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **_gemma(k, 2, 46),
        "attn_logit_softcapping": k.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": None if cap == NO_CAP else cap,
    }


def _gemma3(k: _Keys) -> Fields:
    fields = _gemma(k, 6, 62)
    local = {"rope_type": "default", "rope_theta": k.number("rope.freq_base_swa", _THETA)}
    fields["rope_parameters"] = {FULL: fields["rope_parameters"], SLIDING: local}
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **fields}


def _phi3(k: _Keys) -> Fields:
    fields = _without_head_dim(k)
    width = fields["hidden_size"] // max(fields["num_attention_heads"], 1)
    rotated = k.count("rope.dimension_count", width)
    if rotated != width:
        fields["rope_parameters"]["partial_rotary_factor"] = rotated / width
    context = fields["max_position_embeddings"]
    original = k.count("rope.scaling.original_context_length", context)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **fields,
        "original_max_position_embeddings": original,
        "sliding_window": k.count("attention.sliding_window", 0) or None,
    }


_MADE: Mapping[str, Callable[[_Keys], Fields]] = MappingProxyType(
    {
        "llama": _llama,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "qwen3moe": _qwen3_moe,
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "phi3": _phi3,
    }
)


def made_config(gguf: AnyGgufModel) -> Fields:
    """The fields of a config.json.

    Raises:
        UnsupportedError: an architecture whose keys do not say all of it, or a key that says
            something that no field does; names it.
    """
    arch = str(gguf.metadata.get(ARCHITECTURE))
    if arch not in _MADE:
        raise UnsupportedError(
            f"no config.json can be made of what a GGUF file of {arch} says",
            path=gguf.path,
            found=f"{ARCHITECTURE} {arch}",
            wanted=", ".join(_MADE),
            hint=HINT,
            code="ARCH-MADE-CONFIG",
        )
    keys = _Keys(gguf, arch)
    fields = _MADE[arch](keys) | {"dtype": _dtype(gguf)} | _tokens(gguf)
    _check(keys, fields)
    return fields


def _dtype(gguf: AnyGgufModel) -> str:
    """Of the model: where scales of blocks are binary16, another could not hold them."""
    sizes = dict.fromkeys(_DTYPES, 0)
    for t in gguf.tensors:
        sizes[t.dtype if t.dtype in sizes else "F16"] += t.size
    return _DTYPES[max(sizes, key=lambda name: sizes[name])]


def _tokens(gguf: AnyGgufModel) -> Fields:
    """Ids of special tokens; of a turn's end as well, which ends a text too."""

    def stated(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = gguf.value(key)[1] if key in gguf.metadata else None
        return value if type(value) is int else None

    ends = [i for i in dict.fromkeys((stated("eos"), stated("eot"))) if i is not None]
    found: Fields = {"bos_token_id": stated("bos"), "pad_token_id": stated("padding")}
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return found


def _check(k: _Keys, fields: Fields) -> None:
    """Hold the keys and tensors that a configuration gives against those of the file."""
    path = Path(f"{k.gguf.path} (config.json made of it)")
    try:
        family, _ = family_of(fields, path)
        family, config = read_config(fields, path)
        sizes = family.sizes(config)
        made, rope = hyper_parameters(family, config, sizes)
    except QconvertError as error:
        error.hint = HINT
        raise
    for name in _below(k):
        key = f"{k.arch}.{name}"
        if key not in made and name in _IDLE and not k.get("rope.scaling.type"):
            continue
        if not _same(made.get(key), k.get(name), name, sizes.blocks):
            raise k.refused(name, k.get(name))
    for tensor, values in rope.tensors.items():
        there = k.values(tensor)
        if there is None or not np.array_equal(there, values):
            raise k.refused("rope", f"tensor {tensor}")


def _below(k: _Keys) -> Iterator[str]:
    start = f"{k.arch}."
    return (key.removeprefix(start) for key in k.gguf.metadata if key.startswith(start))


def _same(made: object, there: object, name: str, blocks: int) -> bool:
    """Whether a key that is made says what the file's does: numbers as binary32 has them."""
    made = made.value if isinstance(made, GgufValue) else made
    if isinstance(there, list) and not isinstance(made, list | tuple):
        if made is None and name == "attention.sliding_window_pattern":
            return True  # the usual one, which needs no key
        return len(there) == blocks and all(_same(made, x, name, blocks) for x in there)
    if isinstance(made, bool) or isinstance(there, bool | str):
        return made == there and type(made) is type(there)
    if isinstance(made, int | float) and isinstance(there, int | float):
        return bool(np.float32(made) == np.float32(there))
    return made == there
