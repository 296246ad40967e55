"""How llama.cpp cuts texts under each name of a pre-tokenizer, as make_pretokenizers.py found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qconvert.architectures.pretokenizers import pre_tokenizer_steps
from qconvert.files.gguf_writer import GgufValue, MetadataValue

TABLE = Path(__file__).parent / "data" / "pretokenizers.json"

# Where the rules of tokenizer.json are from, by name; those that are not here are not known to us.
_ITSELF = "expressions that llama.cpp has; the published file was not seen"
_COMMENT = "the published expression in a comment of llama.cpp"
_PACKAGES = "published files, in packages of npm"
ORIGINS = {
    **dict.fromkeys(("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "gpt-4o"), _PACKAGES),
    **dict.fromkeys(("tekken", "deepseek-v3"), _PACKAGES),
    **dict.fromkeys(("qwen35", "seed-coder", "ufakzeka", "bailingmoe", "jais-2"), _COMMENT),
    **dict.fromkeys(("minicpm5", "tiny_aya", "exaone-moe", "chameleon"), _COMMENT),
    **dict.fromkeys(("granite-embed-multi-97m", "laguna", "superbpe", "youtu"), _ITSELF),
    **dict.fromkeys(("deepseek-coder", "deepseek-llm"), _ITSELF),
    "falcon": "quoted in issue 3502 of llama.cpp",
    "bloom": "quoted in transformers.js",
    "viking": "quoted in issue 7309 of llama.cpp",
    "spark2_5": "quoted in mllm (UbiquitousLearning)",
    "kimi-k2": "tokenization_kimi.py, quoted in a comment of llama.cpp",
}


def digest(ids: list[list[int]]) -> str:
    """A hash of the tokens of texts."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def uncut(vocabulary: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with a vocabulary, whose rules cut nothing."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_steps(()),
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", **vocabulary},
    }


def keys(vocabulary: dict[str, Any], name: str) -> dict[str, MetadataValue]:
    """What a file says of a tokenizer with a vocabulary and a pre-tokenizer."""
    tokens, merges = list(vocabulary["vocab"]), [" ".join(m) for m in vocabulary["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": GgufValue("STRING", tokens),
        "tokenizer.ggml.token_type": GgufValue("INT32", [1] * len(tokens)),
        "tokenizer.ggml.merges": GgufValue("STRING", merges),
    }
