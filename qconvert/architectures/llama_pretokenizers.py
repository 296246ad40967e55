"""How each of llama.cpp's pre-tokenizers cuts a text, as expressions for Python's ``re``.

A model of its ``src/llama-vocab.cpp`` and ``src/unicode.cpp`` at 0c1e57098, held against the
program itself, name by name. Where llama.cpp's expressions name classes of characters they run
over a text in which every character beyond ASCII stands for its class; so do these.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from qconvert.architectures.pretokenizers import (
    ASCII_MARKS,
    DEEPSEEK_CJK,
    EAST_ASIAN,
    LATIN,
    SCRIPTS,
)

_WHITE_SPACE = frozenset(
    [
        *(*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)),
        *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
    ]
)

# What characters beyond ASCII are replaced by, by the first letter of their category. Private-use
# characters: a text that has them itself is classed like any other.
_CLASSES = {"L": "\ue000", "N": "\ue001", "P": "\ue002", "S": "\ue003", "M": "\ue004"}
_OTHER = "\ue005"
_HAN = "\ue006"  # letters of what it takes for \p{Han}, in expressions that name it
_HAN_RANGES = (
    *(("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff")),
    *(("\U00020000", "\U0002a6df"), ("\U0002a700", "\U0002ebef"), ("\U0002f800", "\U0002fa1f")),
)
_SPACE_CLASS = "\x0b"

_S = r" \t\n\x0b\f\r"  # white space, for a set
_ALPHABETS = r"A-Za-z\ue000"  # letters of all other scripts
_L = rf"{_ALPHABETS}{_HAN}"
_N = r"0-9\ue001"
_CONTRACTED = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_LETTERS = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_OTHERS = rf" ?[^{_S}{_L}{_N}]+"
_BLANK = rf"[{_S}]*[\r\n]+|[{_S}]+(?![^{_S}])|[{_S}]+"

_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+|{_OTHERS}|[{_S}]+(?![^{_S}])|[{_S}]+"
_M, _P, _Y = r"\ue004", r"!-#%-*,-/:;?@\[-\]_{}\ue002", r"$+<->^`|~\ue003"
_NAMES = rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_Y}]?[{_L}{_M}]+"
_DEEPSEEK = rf"{_NAMES}| ?[{_P}{_Y}]+[\r\n]*|{_BLANK}"
_HALVED = "".join(rf"[{_S}]{{{1 << k}}}(?![^{_S}])|" for k in range(9, 1, -1))


@dataclass(frozen=True, slots=True)
class Plain:
    """An expression without classes of characters, which runs over the text itself, but that white
    space beyond ASCII is a vertical tab in it.
    """

    expression: str


_BLOOM = Plain(" ?[^(\\s|.,!?…。，、।۔،)]+")
_THREE = Plain("[0-9][0-9][0-9]")
# The third range was to begin with a compatibility ideograph, U+F900, and begins with what that is
# composed of: it takes in the scripts between.
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


# Of letters beyond ASCII it does not know the case: they may be either.
_CASED = (
    r"[^\r\n{l}{n}]?[A-Z\ue000\ue006{m}]*[a-z\ue000\ue006{m}]+{end}"
    r"|[^\r\n{l}{n}]?[A-Z\ue000\ue006{m}]+[a-z\ue000\ue006{m}]*{end}"
)
# Where it has classes of upper and lower case, both are all letters to it.
_CASELESS = rf"[^\r\n{_L}{_N}]?[{_L}{_M}]+(?:{_CONTRACTED})?"


def _modern(digits: str, blank: str = _BLANK, contracted: str = f"{_CONTRACTED}|") -> str:
    return rf"{contracted}{_LETTERS}|[{_N}]{digits}|{_OTHERS}[\r\n]*|{blank}"


def _cased(digits: str, end: str, marks: str = "") -> str:
    words = _CASED.format(l=_L, n=_N, m=marks, end=end)
    return rf"{words}|[{_N}]{digits}|{_OTHERS}[\r\n/]*|{_BLANK}"


# The expressions of each pre-tokenizer, one after the other on what the one before has left in one
# piece; and whether a word that is a token skips the merges.
_DIGITS = rf"[{_N}]"
# What lies before a number stays with its first digits.
_GROUPS = rf"[^{_N}]*[{_N}]{{1,3}}(?=(?:[{_N}]{{3}})*(?![{_N}]))"
PRE_TOKENIZERS: dict[str, tuple[tuple[str | Plain, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((_DIGITS, _GPT2), False),
    "llama-bpe": ((_modern("{1,3}"),), True),
    "smaug-bpe": ((_modern("{1,3}"),), False),
    "qwen2": ((_modern(""),), False),
    "gpt-4o": ((_cased("{1,3}", f"(?:{_CONTRACTED})?"),), False),
    "tekken": ((_cased("", ""),), True),
    "qwen35": (
        (
            rf"{_CONTRACTED}|[^\r\n{_L}{_N}]?[{_L}{_M}]+|[{_N}]"
            rf"| ?[^{_S}{_L}{_M}{_N}]+[\r\n]*|{_BLANK}",
        ),
        False,
    ),
    "seed-coder": ((rf"{_CONTRACTED}|{_LETTERS}|[{_N}]| ?[^{_S}{_L}{_N}\r\n]+|{_BLANK}",), False),
    "ufakzeka": ((_modern("", contracted=""),), False),
    "bailingmoe": ((_modern("", rf"[{_S}]*[\r\n]|[{_S}]+(?![^{_S}])|[{_S}]+"),), False),
    "jais-2": (
        (_modern("{1,3}", rf"[{_S}]*[\r\n]+|{_HALVED}[{_S}]{{1,2}}(?![^{_S}])|[{_S}]"),),
        False,
    ),
    "granite-embed-multi-97m": (
        (_cased("{1,3}", f"(?:{_CONTRACTED})?", marks=_M),),
        True,
    ),
    "minicpm5": ((rf"[{_N}]{{1,3}}", _modern("+")), True),
    "deepseek-v3": (
        (rf"[{_N}]{{1,3}}", Plain(EAST_ASIAN), _DEEPSEEK),
        False,
    ),
    "deepseek-coder": (
        (
            Plain(r"[\r\n]"),
            *(rf"[{_S}]?[{_L}]+", rf"[{_S}]?[{_P}]+", Plain(DEEPSEEK_CJK), _DIGITS),
        ),
        False,
    ),
    "deepseek-llm": (
        (
            Plain(r"[\r\n]"),
            *(Plain(rf"\s?[{LATIN}]+"), Plain(rf"\s?{ASCII_MARKS}+"), Plain(r"\s+\Z")),
            *(Plain(DEEPSEEK_CJK), rf"[{_N}]+"),
        ),
        False,
    ),
    "tiny_aya": ((_GROUPS, rf"{_CASELESS}|[{_N}]{{1,3}}|{_OTHERS}[\r\n/]*|{_BLANK}"), False),
    "laguna": ((Plain(r"[^\n]+|[\n]+"), _modern("")), False),
    "falcon": ((rf"[{_P}$+<=>^~|`]+", _GPT2, _THREE), False),
    "default": ((rf"[{_P}$+<=>^~|]+", _GPT2, rf"[{_N}]+", _THREE), False),
    "bloom": ((_BLOOM,), False),
    "viking": ((_BLOOM, _DIGITS), False),
    "chameleon": (
        (
            *(Plain(r"<sentinel:[0-9]+>"), Plain(r"IMGIMG[A-I]{1,4}Z")),
            *(Plain(r"[\t\n]|    |  "), _DIGITS, rf"[{_P}!-/:-@\[-`{{-~]", _GPT2),
        ),
        False,
    ),
    "superbpe": ((rf"[{_N}]+", Plain(r"(?=(\d{3})+(?!\d))")), False),
    "spark2_5": (
        (
            *(rf"[{_N}]{{1,3}}", Plain(EAST_ASIAN)),
            rf"{_NAMES}| ?[{_P}{_Y}]+|[\r\n]|[{_S}]+(?![^{_S}])|[{_S}]+",
            _DIGITS,
        ),
        False,
    ),
    "youtu": ((Plain(SCRIPTS), rf"{_CASELESS}|[{_N}]|{_OTHERS}[\r\n/]*|{_BLANK}"), True),
    "exaone-moe": (
        (
            rf"{_CONTRACTED}|[^\r\n{_L}{_N}]?(?:[{_L}][{_M}]*(?: [{_L}][{_M}]*)*)+|[{_N}]"
            rf"|{_OTHERS}[\r\n/]?|[{_S}]*[\r\n]|[{_S}]+(?![^{_S}])|[{_S}]+",
        ),
        False,
    ),
    "afmoe": ((_GROUPS, Plain(_ASIAN), _DEEPSEEK), False),
    "kimi-k2": (
        (
            rf"{_HAN}+|[^\r\n{_L}{_N}]?[{_ALPHABETS}]+(?:{_CONTRACTED})?|[{_N}]{{1,3}}"
            rf"|{_OTHERS}[\r\n]*|{_BLANK}",
        ),
        False,
    ),
}


# Other names of the same.
_NAMED_TOO = {
    "gpt-2": """
        mpt olmo phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe
        gigachat a.x-4.0 mellum modern-bert exaone4 jais trillion granite-docling
    """,
    "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
    "tiny_aya": "cohere2moe",
    "bailingmoe": "bailingmoe2 llada-moe",
    "bloom": "poro-chat gpt3-finnish",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
    "smaug-bpe": "dbrx chatglm-bpe",
    "qwen2": "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    "gpt-4o": "llama4 kanana2 minimax-m2 talkie",
}
_ALIASES = {name: tuple(others.split()) for name, others in _NAMED_TOO.items()}
PRE_TOKENIZERS |= {
    alias: PRE_TOKENIZERS[name] for name, aliases in _ALIASES.items() for alias in aliases
}
# Those whose texts begin with a token where a file does not say.
BEGINNING = frozenset({"llama-bpe", *_ALIASES["llama-bpe"], "tekken", "chameleon"}) - {
    "glm4",
    "glm5",
}


def plain_name(pre_tokenizer: str) -> str:
    """The first of several names of the same pre-tokenizer."""
    named = (name for name, aliases in _ALIASES.items() if pre_tokenizer in aliases)
    return next(named, pre_tokenizer)


def over_classes(text: str) -> tuple[str, str]:
    """What expressions run over: characters by their classes, and for `Plain` the text itself."""
    spaced = "".join(_SPACE_CLASS if c > "\x7f" and is_space(c) else c for c in text)
    return "".join(map(_class_of, text)), spaced


def is_space(character: str) -> bool:
    """Whether llama.cpp takes it for white space."""
    return ord(character) in _WHITE_SPACE


def _class_of(character: str) -> str:
    if ord(character) < 0x80:
        return character
    if is_space(character):
        return _SPACE_CLASS
    found = _CLASSES.get(unicodedata.category(character)[0], _OTHER)
    if found == _CLASSES["L"] and any(low <= character <= high for low, high in _HAN_RANGES):
        return _HAN
    return found
