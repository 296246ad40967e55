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
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
SEED = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Without contractions; with runs of digits, which another expression has cut before.
BARE = rf"{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
RUNS = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_MARKS}|{_SPACES}"
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_HALVED = "".join(rf"\s{{{1 << k}}}(?!\S)|" for k in range(9, 1, -1))
JAIS2 = (
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|\s*[\r\n]+"
    rf"|{_HALVED}\s{{1,2}}(?!\S)|\s{{1}}"
)
# Numbers, then Chinese and Japanese, then the rest, in expressions of their own.
NUMBERS = r"\p{N}{1,3}"
EAST_ASIAN = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
LATIN = (  # and the other scripts with two cases
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
ASCII_MARKS = "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]"
CHINESE = "[一-龥ࠀ-一가-\ud7ff]+"
GROUPS = r"\d{1,3}(?=(?:\d{3})*\b)"
LINES = r"[^\n]+|[\n]+"
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
    ((QWEN35,), False): "qwen35",
    ((SEED,), False): "seed-coder",
    ((BARE,), False): "ufakzeka",
    ((BAILING,), False): "bailingmoe",
    ((JAIS2,), False): "jais-2",
    ((O200K,), True): "granite-embed-multi-97m",
    ((NUMBERS, RUNS), True): "minicpm5",
    ((NUMBERS, EAST_ASIAN, DEEPSEEK), False): "deepseek-v3",
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, DIGIT), False): "deepseek-coder",
    (
        (r"[\r\n]", rf"\s?[{LATIN}]+", rf"\s?{ASCII_MARKS}+", r"\s+$", CHINESE, DIGIT),
        False,
    ): "deepseek-llm",
    ((GROUPS, O200K), False): "tiny_aya",
    ((LINES, QWEN2), False): "laguna",
}
# Other ways to write the same character, as some files have it, and the same expression.
_WRITTEN = (("\r", r"\r"), ("\n", r"\n"), (r"\"", '"'))
_SAME = {r"\p{N}": DIGIT, r"\p{N}{1}": DIGIT}

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
            for written, usual in _WRITTEN:
                regex = regex.replace(written, usual)
            return [_SAME.get(regex, regex)]
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
