"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer.json says.

llama.cpp has the regular expressions compiled in and takes their name from ``tokenizer.ggml.pre``.
Here the name is found from the expressions themselves; a set that is not in the table is refused,
for a wrong name gives other tokens without a word.
"""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.errors import UnsupportedError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CASED_UPPER = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
O200K = (
    rf"{_CASED}{_CONTRACTIONS}?|{_CASED_UPPER}{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_MARKS_SLASH}|{_SPACES}"
)
TEKKEN = rf"{_CASED}|{_CASED_UPPER}|\p{{N}}|{_MARKS_SLASH}|{_SPACES}"
DIGIT = "<each digit by itself>"
_SHOWN = 200  # characters of an expression in a message

# (expressions in order, whether whole words of the vocabulary skip the merges) -> name
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((CL100K,), True): "llama-bpe",
    ((CL100K,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((O200K,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
}

# Every name that llama.cpp at 0c1e57098 loads (src/llama-vocab.cpp); it refuses any other.
_LOADED = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe
    command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone
    exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
    gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de
    jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe
    llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2
    modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
    tiny_aya trillion ufakzeka viking whitespace youtu
"""
LOADED = frozenset(_LOADED.split())


def named_warning(name: str) -> str | None:
    """What to say about a name that the user gives; None about one that llama.cpp loads."""
    if name in LOADED:
        return None
    near = difflib.get_close_matches(name, sorted(LOADED), n=1)
    meant = f"; did you mean '{near[0]}'?" if near else ""
    return f"no llama.cpp that we know loads a pre-tokenizer '{name}'{meant}"


def pre_tokenizer_name(tokenizer: TokenizerJson) -> str:
    """The name for a byte-level BPE tokenizer.

    Raises:
        UnsupportedError: llama.cpp is not known to split text in this way.
    """
    expressions: list[str] = []
    for step in tokenizer.steps("pre_tokenizer"):
        found = _expressions(step)
        if found is None:
            raise _unknown(tokenizer, [reprlib.repr(step)])
        expressions += found
    ignore_merges = tokenizer.model.get("ignore_merges") is True
    name = NAMES.get((tuple(expressions), ignore_merges))
    if name is None:
        raise _unknown(tokenizer, [*expressions, *(["ignore_merges"] if ignore_merges else [])])
    return name


def _expressions(step: dict[str, Any]) -> list[str] | None:
    """The regular expressions by which one step splits; None for a step that we do not know."""
    kind = step.get("type")
    if kind == "Split":
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        # Two ways to say that every match is a piece of its own.
        way = (step.get("behavior"), step.get("invert"))
        if isinstance(regex, str) and way in (("Isolated", False), ("Removed", True)):
            return [regex]
    if kind == "Digits" and step.get("individual_digits") is True:
        return [DIGIT]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    return None


def _unknown(tokenizer: TokenizerJson, found: list[str]) -> UnsupportedError:
    return UnsupportedError(
        "pre-tokenizer is none that we know in llama.cpp",
        path=tokenizer.path,
        found=" then ".join(e if len(e) <= _SHOWN else e[:_SHOWN] + "..." for e in found[:4]),
        wanted=", ".join(sorted(NAMES.values())),
        hint="if you know which of llama.cpp's it is, say --pre-tokenizer NAME",
        code="ARCH-PRE-TOKENIZER",
    )
