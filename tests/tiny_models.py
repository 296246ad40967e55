"""Model directories of every architecture, tiny, with weights that NumPy's frozen stream gives.

Written as Hugging Face lays them out: names and shapes are transformers', stated by hand. The same
directories were given to transformers to record what it computes (golden/regenerate.py).
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]
WIDTH, INNER, HEADS, GROUPS, HEAD = 64, 96, 4, 2, 16
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


# --- tokenizers -----------------------------------------------------------------------------------


def added(i: int, text: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, "special": special, **flags}


def around(first: str | None, last: str | None, ids: dict[str, int]) -> dict[str, Any]:
    """A post-processor that puts tokens before and after a text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pieces = [{"SpecialToken": {"id": t, "type_id": 0}} if t else None for t in (first, last)]
    single = [p for p in (pieces[0], text, pieces[1]) if p]
    tokens = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (first, last) if t}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": tokens,
    }


def byte_characters() -> list[str]:
    """The characters that stand for bytes in byte-level BPE, byte by byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def byte_level(kind: str) -> dict[str, Any]:
    """Byte-level BPE: 256 bytes and a few merges."""
    pairs = [
        ("Ġ", "t"), ("h", "e"), ("i", "n"), ("Ġ", "a"), ("Ġt", "he"), ("1", "2"), ("e", "r"),
        ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("a", "n"), ("an", "d"), ("Ġ", "and"), ("Ċ", "Ċ"),
        ("12", "3"), ("q", "u"),
    ]  # fmt: skip
    vocab = {t: i for i, t in enumerate([*byte_characters(), *(a + b for a, b in pairs)])}
    n = len(vocab)
    specials = ["<|begin|>", "<|end|>"]
    split: dict[str, Any] = {"type": "Split", "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = {
        "gpt-2": [bytes_ | {"use_regex": True}],
        "smollm": [{"type": "Digits", "individual_digits": True}, bytes_ | {"use_regex": True}],
        "llama-bpe": [split | {"pattern": {"Regex": LLAMA3}}, bytes_ | {"use_regex": False}],
        "qwen2": [split | {"pattern": {"Regex": QWEN2}}, bytes_ | {"use_regex": False}],
    }[kind]
    ids = {s: n + i for i, s in enumerate(specials)}
    return {
        "version": "1.0",
        "added_tokens": [*(added(i, s) for s, i in ids.items()), added(n + 2, "<tool>", False)],
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": around("<|begin|>" if kind == "llama-bpe" else None, None, ids),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "ignore_merges": kind == "llama-bpe",
            "vocab": vocab,
            # as it is written today, and as it was
            "merges": [list(p) if kind == "llama-bpe" else " ".join(p) for p in pairs],
        },
    }


def sentencepiece(kind: str) -> dict[str, Any]:
    """SentencePiece's BPE as transformers converts it, all merges of every token among them."""
    control = ["<unk>", "<s>", "</s>"]
    user = ["▁▁", "\n\n"] if kind == "gemma" else []
    pieces = ["▁t", "he", "▁a", "in", "▁the", "er", "nd", "▁and", "▁is", "is", "at", "▁at"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,'TH0123é"]
    tokens = [*control, *user, *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = [
        [p[:cut], p[cut:]]
        for p in [*user, *pieces]
        for cut in range(1, len(p))
        if p[:cut] in vocab and p[cut:] in vocab
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    return {
        "version": "1.0",
        "added_tokens": [
            *(added(i, t) for i, t in enumerate(control)),
            *(added(3 + i, t, False) for i, t in enumerate(user)),
        ],
        "normalizer": replace if kind == "gemma" else prepend,
        "pre_tokenizer": split | {"invert": False} if kind == "gemma" else None,
        "post_processor": around("<s>", None, vocab),
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def wordpiece() -> dict[str, Any]:
    """WordPiece as BERT has it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,'!"]
    words = ["the", "quick", "fox", "##s", "##er", "##ing", "over", "cafe", "test"]
    inner = [f"##{c}" for c in "abcdefghijklmnopqrtuvwxyz0123456789"]
    vocab = {t: i for i, t in enumerate([*special, *letters, *words, *inner])}
    return {
        "version": "1.0",
        "added_tokens": [added(i, t) for i, t in enumerate(special)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": around("[CLS]", "[SEP]", vocab),
        "decoder": None,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def unigram() -> dict[str, Any]:
    """Unigram pieces with log probabilities."""
    vocab: list[list[Any]] = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0]]
    pieces = ["▁the", "▁a", "er", "▁", *"abcdefghijklmnopqrstuvwxyz."]
    vocab += [[p, -1.5 - 0.25 * i] for i, p in enumerate(pieces)]
    return {
        "version": "1.0",
        "added_tokens": [added(i, t) for i, t in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        "post_processor": around(None, "</s>", {"</s>": 2}),
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
    }


def charsmap(replacements: dict[str, str]) -> str:
    """SentencePiece's normalization map, base64: a double array as darts-clone lays it out, each
    node's children in a block of 256 units of their own, and the replacements behind it.
    """
    texts, places = b"", {}
    for key, text in replacements.items():
        places[key.encode()] = len(texts)
        texts += text.encode() + b"\0"
    starts = sorted({k[:n] for k in places for n in range(len(k) + 1)}, key=len)
    block = {start: 256 * (i + 1) for i, start in enumerate(starts)}
    units = [0] * (256 * (len(starts) + 1))
    for start in starts:
        at = block[start[:-1]] + start[-1] if start else 0
        label = start[-1] if start else 0
        units[at] = (at ^ block[start]) << 10 | (start in places) << 8 | label
        if start in places:
            units[block[start]] = 1 << 31 | places[start]
    array = struct.pack(f"<{len(units)}I", *units)
    return base64.b64encode(struct.pack("<I", len(array)) + array + texts).decode()


TOKENIZERS = {
    **{k: byte_level(k) for k in ("gpt-2", "smollm", "llama-bpe", "qwen2")},
    **{f"sp-{k}": sentencepiece(k) for k in ("llama", "gemma")},
    "wordpiece": wordpiece(),
    "unigram": unigram(),
}
BYTE_LEVEL_END = 256 + 15 + 1  # id of <|end|>


def rows(tokenizer: dict[str, Any]) -> int:
    """Rows of an embedding that is three longer than the vocabulary."""
    vocab = tokenizer["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return max([*ids, *(t["id"] for t in tokenizer["added_tokens"])]) + 4


# --- architectures --------------------------------------------------------------------------------


def _config(kind: str, model_type: str, tokenizer: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [kind],
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": rows(TOKENIZERS[tokenizer]),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "qconvert_tokenizer": tokenizer,
        **more,
    }


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
}
CONFIGS = {
    "llama": _config("LlamaForCausalLM", "llama", "llama-bpe", rope_theta=500000.0),
    "llama-3-scaling": _config(
        "LlamaForCausalLM", "llama", "llama-bpe", head_dim=32, tie_word_embeddings=True,
        rope_scaling=LLAMA3_SCALING,
    ),
    "llama-biases": _config("LlamaForCausalLM", "llama", "sp-llama", attention_bias=True),
    "smollm": _config("LlamaForCausalLM", "llama", "smollm", tie_word_embeddings=True),
    "mistral": _config("MistralForCausalLM", "mistral", "sp-llama", sliding_window=None),
    "qwen2": _config("Qwen2ForCausalLM", "qwen2", "qwen2", tie_word_embeddings=True),
    "qwen2-yarn": _config(
        "Qwen2ForCausalLM", "qwen2", "qwen2",
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "qwen3": _config("Qwen3ForCausalLM", "qwen3", "qwen2", head_dim=32),
    "gemma2": _config(
        "Gemma2ForCausalLM", "gemma2", "sp-gemma", head_dim=32, query_pre_attn_scalar=32,
        sliding_window=16, tie_word_embeddings=True,
    ),
    "gemma3": _config(
        "Gemma3ForCausalLM", "gemma3_text", "sp-gemma", head_dim=32, query_pre_attn_scalar=32,
        sliding_window=16, tie_word_embeddings=True, num_hidden_layers=7,
        rope_theta=1000000.0, rope_local_base_freq=10000.0,
    ),
    "phi3": _config(
        "Phi3ForCausalLM", "phi3", "sp-llama", original_max_position_embeddings=256,
    ),
    "phi3-longrope": _config(
        "Phi3ForCausalLM", "phi3", "sp-llama", max_position_embeddings=512,
        original_max_position_embeddings=256, rope_scaling=LONGROPE,
    ),
    "bert": {
        name: value
        for name, value in _config(
            "BertModel", "bert", "wordpiece", layer_norm_eps=1e-12, type_vocab_size=2,
            hidden_act="gelu",
        ).items()
        if name not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")  # it has none
    },
    "qwen3-moe": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe", "qwen2", head_dim=32, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True,
    ),
    "mixtral": _config(
        "MixtralForCausalLM", "mixtral", "sp-llama", num_local_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip


def source_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as transformers stores them."""
    if config["model_type"] == "bert":
        yield from _bert_shapes(config)
        return
    kind = config["model_type"]
    width, head = config["hidden_size"], config.get("head_dim") or HEAD
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        at, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        if kind == "phi3":
            yield f"{at}qkv_proj.weight", (q + 2 * kv, width)
        else:
            for name, n in (("q", q), ("k", kv), ("v", kv)):
                yield f"{at}{name}_proj.weight", (n, width)
                if kind == "qwen2" or config.get("attention_bias"):
                    yield f"{at}{name}_proj.bias", (n,)
        yield f"{at}o_proj.weight", (width, q)
        if config.get("attention_bias"):
            yield f"{at}o_proj.bias", (width,)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            yield f"{at}q_norm.weight", (head,)
            yield f"{at}k_norm.weight", (head,)
        yield f"model.layers.{i}.input_layernorm.weight", (width,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (width,)
        if kind.startswith("gemma"):
            yield f"model.layers.{i}.pre_feedforward_layernorm.weight", (width,)
            yield f"model.layers.{i}.post_feedforward_layernorm.weight", (width,)
        inner = config["intermediate_size"]
        if kind == "phi3":
            yield f"{mlp}gate_up_proj.weight", (2 * inner, width)
            yield f"{mlp}down_proj.weight", (width, inner)
        elif kind == "mixtral":
            moe = f"model.layers.{i}.block_sparse_moe."
            yield f"{moe}gate.weight", (config["num_local_experts"], width)
            for e in range(config["num_local_experts"]):
                for name, shape in (("w1", (inner, width)), ("w2", (width, inner)),
                                    ("w3", (inner, width))):  # fmt: skip
                    yield f"{moe}experts.{e}.{name}.weight", shape
        elif kind == "qwen3_moe":
            inner = config["moe_intermediate_size"]
            yield f"{mlp}gate.weight", (config["num_experts"], width)
            for e in range(config["num_experts"]):
                yield f"{mlp}experts.{e}.gate_proj.weight", (inner, width)
                yield f"{mlp}experts.{e}.up_proj.weight", (inner, width)
                yield f"{mlp}experts.{e}.down_proj.weight", (width, inner)
        else:
            yield f"{mlp}gate_proj.weight", (inner, width)
            yield f"{mlp}up_proj.weight", (inner, width)
            yield f"{mlp}down_proj.weight", (width, inner)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], width)


def _bert_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = config["hidden_size"], config["intermediate_size"]

    def both(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield "embeddings.word_embeddings.weight", (config["vocab_size"], width)
    yield "embeddings.position_embeddings.weight", (config["max_position_embeddings"], width)
    yield "embeddings.token_type_embeddings.weight", (2, width)
    yield from both("embeddings.LayerNorm", width)
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield from both(f"{layer}.attention.self.{name}", width, width)
        yield from both(f"{layer}.attention.output.dense", width, width)
        yield from both(f"{layer}.attention.output.LayerNorm", width)
        yield from both(f"{layer}.intermediate.dense", inner, width)
        yield from both(f"{layer}.output.dense", width, inner)
        yield from both(f"{layer}.output.LayerNorm", width)
    yield from both("pooler.dense", width, width)


def weights(config: dict[str, Any]) -> Tensors:
    """Values that keep activations near one, from NumPy's stream that never changes."""
    stream = np.random.RandomState(7)
    zero_based = config["model_type"].startswith("gemma")  # its norms are stored less one
    tensors: Tensors = {}
    for name, shape in source_shapes(config):
        values = stream.uniform(-1, 1, shape)
        if "norm" in name.lower() and name.endswith("weight"):
            values = 0.2 * values + (not zero_based)
        elif len(shape) == 1:
            values = 0.1 * values
        elif "embed" not in name:
            values = values * 2.5 / np.sqrt(shape[-1])
        tensors[name] = values.astype(np.float32)
    return tensors


def write_directory(
    directory: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """Write one of `CONFIGS`, with fields, tensors or tokenizer replaced."""
    fields = dict(CONFIGS[name])
    kind = fields.pop("qconvert_tokenizer")
    directory.mkdir(parents=True, exist_ok=True)
    whole = fields | (config or {})
    (directory / "config.json").write_text(json.dumps(whole))
    tokenizer = TOKENIZERS[kind] if tokenizer is None else tokenizer
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    named = {t.get("content") for t in tokenizer.get("added_tokens", [])}
    settings = {
        f"{role}_token": text
        for role, text in (
            ("bos", "<s>"), ("eos", "</s>"), ("bos", "<|begin|>"), ("eos", "<|end|>"),
            ("cls", "[CLS]"), ("sep", "[SEP]"), ("pad", "[PAD]"), ("mask", "[MASK]"),
        )
        if text in named
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    save_file(weights(fields) if tensors is None else tensors, directory / "model.safetensors")
    return directory
