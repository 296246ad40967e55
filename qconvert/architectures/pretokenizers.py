"""The rules of a tokenizer.json by which text is split, and llama.cpp's names for them.

llama.cpp has the regular expressions compiled in and takes their name from ``tokenizer.ggml.pre``.
Each set in the table is one that llama.cpp follows under that name, as far as it can: the tests cut
texts by both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qconvert.architectures.tokenizer_json import TokenizerJson

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
_NAME = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK = rf"{_NAME}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
SPARK = rf"{_NAME}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-\u303f\ufe30-\ufe4f]+|[ㄅ-ㄯ]+|" + EAST_ASIAN
YOUTU = rf"{_CASED}{_CONTRACTIONS}?|{_CASED_UPPER}{_CONTRACTIONS}?|\p{{N}}|{_MARKS_SLASH}|{_SPACES}"
EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_OTHER_UPPER, _OTHER_LOWER = (f"{c[:-1]}&&[^\\p{{Han}}]]" for c in (_UPPER, _LOWER))
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_OTHER_UPPER}*{_OTHER_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_OTHER_UPPER}+{_OTHER_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
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
# Of DeepSeek's first tokenizers. Its second range takes in all scripts from U+0800 to the first.
DEEPSEEK_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
GROUPS = r"\d{1,3}(?=(?:\d{3})*\b)"
LINES = r"[^\n]+|[\n]+"
# Steps that are no expressions.
DIGIT = "<each digit by itself>"
DIGITS = "<runs of digits>"
MARK = "<each punctuation character by itself>"
MARKS = "<runs of punctuation>"
BYTES = "<bytes as letters>"  # what follows sees these; where it is not named it comes last

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
    ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, DIGIT), False): "deepseek-coder",
    (
        (r"[\r\n]", rf"\s?[{LATIN}]+", rf"\s?{ASCII_MARKS}+", r"\s+$", DEEPSEEK_CJK, DIGIT),
        False,
    ): "deepseek-llm",
    ((GROUPS, O200K), False): "tiny_aya",
    ((LINES, QWEN2), False): "laguna",
    ((MARKS, GPT2, BYTES, DIGITS, "[0-9][0-9][0-9]"), False): "falcon",
    ((BLOOM,), False): "bloom",
    ((BLOOM, DIGIT), False): "viking",
    (
        (
            *(r"<sentinel:[0-9]+>", r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
            *(r"([\t\n]|    |  )", DIGIT, MARK, GPT2),
        ),
        False,
    ): "chameleon",
    ((DIGITS, r"(?=(\d{3})+(?!\d))"), False): "superbpe",
    ((NUMBERS, EAST_ASIAN, SPARK, DIGIT), False): "spark2_5",
    ((SCRIPTS, YOUTU), True): "youtu",
    ((EXAONE_MOE,), False): "exaone-moe",
    ((KIMI,), True): "kimi-k2",
}
# Other ways to write the same character, as some files have it, and the same expression.
_WRITTEN = (("\r", r"\r"), ("\n", r"\n"), ("\t", r"\t"), (r"\"", '"'))
_SAME = {r"\p{N}": DIGIT, r"\p{N}{1}": DIGIT, r"\p{N}+": DIGITS}
# Steps without an expression: type, the field that says how, and what is in it.
_STEPS: dict[str, tuple[str, str, Any]] = {
    DIGIT: ("Digits", "individual_digits", True),
    DIGITS: ("Digits", "individual_digits", False),
    MARK: ("Punctuation", "behavior", "Isolated"),
    MARKS: ("Punctuation", "behavior", "Contiguous"),
}


def cut_by(tokenizer: TokenizerJson) -> tuple[str, ...] | None:
    """Expressions, and steps that are none, in the order of a tokenizer's pre-tokenizer.

    None: one of its steps is of a kind that no pre-tokenizer of llama.cpp has.
    """
    expressions: list[str] = []
    steps = tokenizer.steps("pre_tokenizer")
    for i, step in enumerate(steps):
        found = _expressions(step)
        if found is None:
            return None
        expressions += found
        if step.get("type") == "ByteLevel" and i + 1 < len(steps):
            expressions.append(BYTES)
    return tuple(expressions)


def pre_tokenizer_steps(expressions: Iterable[str]) -> dict[str, Any]:
    """The pre-tokenizer of a tokenizer.json that cuts by expressions, and steps, of `NAMES`."""
    steps: list[dict[str, Any]] = []
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    expressions = tuple(expressions)
    level["use_regex"] = GPT2 in expressions
    for expression in expressions:
        if expression in _STEPS:
            kind, field, value = _STEPS[expression]
            steps.append({"type": kind, field: value})
        elif expression == BYTES:
            steps.append(level)
        elif expression != GPT2:
            pattern = {"Regex": expression}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            steps.append(split)
    if level not in steps:
        steps.append(level)
    return {"type": "Sequence", "pretokenizers": steps}


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
    for expression, (named, field, value) in _STEPS.items():
        if kind == named and step.get(field) == value:
            return [expression]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    return None
