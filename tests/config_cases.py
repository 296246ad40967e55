"""Tiny models whose configurations config_table.json changes field by field.

Every class of configuration has a base; weights follow from the names of tensors. Shared by
`make_config_table.py`, which asks transformers and llama.cpp, and by test_config_table.py, which
needs neither.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from family_models import ENCODERS, NARROW
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tiny_models import TOKENIZERS, rows

TOKENS = 160  # of the text; more than any window and original context that is to be seen
CONTEXT = 256  # llama.cpp's smallest
# What is recorded of the outputs: at these positions, each so manieth.
POSITIONS, EVERY = (5, 79, 159), 61
# Largest difference, of the largest output. ggml takes GELU from a table of binary16.
TOLERANCE = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3", "starcoder2", *ENCODERS), 3e-3),
    **dict.fromkeys(("gemma", "phi", "gpt_neox", "gpt2", "gpt_bigcode", "bloom", "falcon"), 3e-3),
    **dict.fromkeys(("gemma3n_text", "gemma3n"), 3e-3),
    **dict.fromkeys(("gemma4_text", "gemma4"), 6e-3),
}
EXACT = 3e-4
REMOVED = "<removed>"  # in the place of a value: the field is not there

Fields = dict[str, Any]


def changed(base: Fields, changes: Fields) -> Fields:
    """A configuration with fields set or removed, in the object of the text model too."""
    whole = {n: v for n, v in (base | changes).items() if v != REMOVED}
    inner = changes.get("text_config")
    if isinstance(inner, dict) and isinstance(base.get("text_config"), dict):
        whole["text_config"] = changed(base["text_config"], inner)
    return whole


# --- bases ----------------------------------------------------------------------------------------

TOKENIZER = {
    "llama": "llama-bpe",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
    "gemma2": "sp-gemma",
    "gemma3_text": "sp-gemma",
    "gemma3": "sp-gemma",
    "gemma3_text-encoder": "sp-gemma",
    "gemma3n_text": "sp-gemma",
    "gemma3n": "sp-gemma",
    "gemma": "sp-gemma",
    "bert": "wordpiece",
    "xlm-roberta": "unigram",
    "roberta": "gpt-2",
    "camembert": "unigram",
    "distilbert": "wordpiece",
    "modernbert": "gpt-2",
    "nomic_bert": "wordpiece",
    "jina_embeddings_v3": "unigram",
    "t5": "unigram",
    "mt5": "unigram",
    "umt5": "unigram",
    "t5-encoder": "unigram",
}


def _base(kind: str, model_type: str, **more: Any) -> Fields:
    return {
        "architectures": [kind],
        "model_type": model_type,
        "vocab_size": rows(TOKENIZERS[TOKENIZER.get(model_type, "sp-llama")]),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **more,
    }


_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 48}
_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "tie_word_embeddings": True,
}
_GEMMA3 = _base("Gemma3ForCausalLM", "gemma3_text", **_GEMMA, num_hidden_layers=6)
BASES: dict[str, Fields] = {
    "llama": _base("LlamaForCausalLM", "llama"),
    "mistral": _base("MistralForCausalLM", "mistral", sliding_window=None),
    "mixtral": _base("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _base("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _base("Qwen3ForCausalLM", "qwen3", head_dim=32),
    "qwen3_moe": _base("Qwen3MoeForCausalLM", "qwen3_moe", **_EXPERTS, num_experts=4),
    "gemma2": _base("Gemma2ForCausalLM", "gemma2", **_GEMMA),
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {n: v for n, v in _GEMMA3.items() if n != "architectures"},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 300,
        "boi_token_index": 301,
        "eoi_token_index": 302,
    },
    "phi3": _base("Phi3ForCausalLM", "phi3", original_max_position_embeddings=CONTEXT),
    "bert": {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": rows(TOKENIZERS["wordpiece"]),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
    },
}
BASES |= NARROW
DECODERS = tuple(name for name in BASES if name not in (*ENCODERS, "gemma3"))


# Classes whose norms are stored less one.
ZERO_BASED = ("gemma2", "gemma3", "qwen3_next", "qwen3_5")

# --- weights and directories ----------------------------------------------------------------------


def weights(
    shapes: Mapping[str, tuple[int, ...]], *, zero_based: bool
) -> dict[str, NDArray[np.float32]]:
    """Values from names alone, large enough for every field to be seen in the logits.

    Args:
        shapes: of the tensors.
        zero_based: whether norms are stored less one, as Gemma has them.
    """
    found = {}
    for name, shape in shapes.items():
        stream = np.random.RandomState(zlib.crc32(name.encode()))
        values = stream.standard_normal(tuple(shape))
        if "norm" in name.lower() and name.endswith("weight"):
            values = 0.2 * values + (0 if zero_based else 1)
        elif len(shape) == 1:
            values = 0.3 * values
        elif "embed" not in name:
            values = values * 1.5 / np.sqrt(shape[-1])
        if name.endswith("Attention.q.weight"):  # T5 has the scale of scores in its weights
            values = values / 8
        found[name] = values.astype(np.float32)
    return found


class Directories:
    """Model directories, one for each set of tensors: cases differ in config.json only."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._made: dict[tuple[str, str], Path] = {}

    def made(self, base: str, config: Fields, shapes: Mapping[str, tuple[int, ...]]) -> Path:
        """The directory with these tensors, the base's tokenizer and this config.json."""
        key = (base, json.dumps(folded(shapes), sort_keys=True))
        if key not in self._made:
            self._made[key] = self._written(base, shapes)
        (self._made[key] / "config.json").write_text(json.dumps(config))
        return self._made[key]

    def _written(self, base: str, shapes: Mapping[str, tuple[int, ...]]) -> Path:
        place = self._home / f"{base}-{len(self._made)}"
        place.mkdir(parents=True)
        tensors = weights(shapes, zero_based=base == "gemma" or base.startswith(ZERO_BASED))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        tokenizer = TOKENIZERS[TOKENIZER.get(base, "sp-llama")]
        (place / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
        around = (
            {"cls_token": "[CLS]", "sep_token": "[SEP]"}
            if base in ("bert", "distilbert", "nomic_bert")
            else {}
        )
        (place / "tokenizer_config.json").write_text(json.dumps(around))
        return place


def folded(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[list[int]]]:
    """Tensors with the numbers of layers and experts taken out of their names.

    Returns:
        By name with ``*`` for each number: how many of them there are, and the shape.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        numbers = tuple(int(n) for n in _NUMBER.findall(name))
        groups.setdefault((_NUMBER.sub("*", name), tuple(shape)), []).append(numbers)
    found: dict[str, list[list[int]]] = {}
    for (name, shape), numbers in groups.items():
        counts = [max(column) + 1 for column in zip(*numbers, strict=True)]
        if len(numbers) == math.prod(counts):
            found[name] = [counts, list(shape)]
        else:  # some layers only
            found |= {_filled(name, n): [[], list(shape)] for n in numbers}
    return found


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _filled(name: str, numbers: tuple[int, ...]) -> str:
    return name.replace("*", "{}").format(*numbers)


def unfolded(folded_shapes: Mapping[str, list[list[int]]]) -> dict[str, tuple[int, ...]]:
    """The tensors that `folded` was given."""
    return {
        _filled(name, numbers): tuple(shape)
        for name, (counts, shape) in folded_shapes.items()
        for numbers in itertools.product(*map(range, counts))
    }


def text() -> list[int]:
    """Ids of the text of every case, within the smallest vocabulary."""
    return [5 + (37 * i * i + 11 * i) % 79 for i in range(TOKENS)]
