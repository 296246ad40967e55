"""Characters and words as llama.cpp sees them, before any token is looked up.

Its classes of characters are those of Unicode's general categories; its regular expressions run
over a text in which every character beyond ASCII stands for its class.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from qconvert.architectures.pretokenizers import ASCII_MARKS, CHINESE, EAST_ASIAN, LATIN

_SPACES = frozenset(
    [
        *(*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B)),
        *(0x2028, 0x2029, 0x202F, 0x205F, 0x3000),
    ]
)

# What characters beyond ASCII are replaced by, by the first letter of their category. Private-use
# characters: a text that has them itself is classed like any other.
_CLASSES = {"L": "\ue000", "N": "\ue001", "P": "\ue002", "S": "\ue003", "M": "\ue004"}
_OTHER = "\ue005"
_SPACE_CLASS = "\x0b"

_S = r" \t\n\x0b\f\r"  # white space, for a set
_L = r"A-Za-z\ue000"
_N = r"0-9\ue001"
_CONTRACTED = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_LETTERS = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_OTHERS = rf" ?[^{_S}{_L}{_N}]+"
_BLANK = rf"[{_S}]*[\r\n]+|[{_S}]+(?![^{_S}])|[{_S}]+"

_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+|{_OTHERS}|[{_S}]+(?![^{_S}])|[{_S}]+"
_M, _P, _Y = r"\ue004", r"!-#%-*,-/:;?@\[-\]_{}\ue002", r"$+<->^`|~\ue003"
_DEEPSEEK = (
    rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_Y}]?[{_L}{_M}]+| ?[{_P}{_Y}]+[\r\n]*|{_BLANK}"
)
_HALVED = "".join(rf"[{_S}]{{{1 << k}}}(?![^{_S}])|" for k in range(9, 1, -1))


@dataclass(frozen=True, slots=True)
class _Plain:
    """An expression without classes of characters, which runs over the text itself."""

    expression: str


# Of letters beyond ASCII it does not know the case: they may be either.
_CASED = (
    r"[^\r\n{l}{n}]?[A-Z\ue000{m}]*[a-z\ue000{m}]+{end}"
    r"|[^\r\n{l}{n}]?[A-Z\ue000{m}]+[a-z\ue000{m}]*{end}"
)


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
PRE_TOKENIZERS: dict[str, tuple[tuple[str | _Plain, ...], bool]] = {
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
        (rf"[{_N}]{{1,3}}", _Plain(EAST_ASIAN), _DEEPSEEK),
        False,
    ),
    "deepseek-coder": (
        (
            _Plain(r"[\r\n]"),
            *(rf"[{_S}]?[{_L}]+", rf"[{_S}]?[{_P}]+", _Plain(CHINESE), _DIGITS),
        ),
        False,
    ),
    "deepseek-llm": (
        (
            _Plain(r"[\r\n]"),
            *(_Plain(rf"\s?[{LATIN}]+"), _Plain(rf"\s?{ASCII_MARKS}+"), _Plain(r"\s+\Z")),
            *(_Plain(CHINESE), rf"[{_N}]+"),
        ),
        False,
    ),
    # Whose classes of upper and lower case are all letters to llama.cpp.
    "tiny_aya": (
        (
            _GROUPS,
            rf"[^\r\n{_L}{_N}]?[{_L}{_M}]+(?:{_CONTRACTED})?|[{_N}]{{1,3}}|{_OTHERS}[\r\n/]*|{_BLANK}",
        ),
        False,
    ),
    "laguna": ((_Plain(r"[^\n]+|[\n]+"), _modern("")), False),
}


# Other names of the same.
_ALIASES = {
    "gpt-2": ("mpt", "olmo", "phi-2"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "tiny_aya": ("cohere2moe",),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx",),
    "qwen2": (
        "deepseek-r1-qwen",
        "kormo",
        "megrez",
        "stablelm2",
        "hunyuan",
        "solar-open",
        "grok-2",
    ),
    "gpt-4o": ("llama4", "kanana2", "minimax-m2"),
}
PRE_TOKENIZERS |= {
    alias: PRE_TOKENIZERS[name] for name, aliases in _ALIASES.items() for alias in aliases
}


def plain_name(pre_tokenizer: str) -> str:
    """The first of several names of the same pre-tokenizer."""
    named = (name for name, aliases in _ALIASES.items() if pre_tokenizer in aliases)
    return next(named, pre_tokenizer)


def is_space(character: str) -> bool:
    """Whether llama.cpp takes it for white space."""
    return ord(character) in _SPACES


def split_words(text: str, pre_tokenizer: str) -> list[str]:
    """The words of byte-level BPE, as a pre-tokenizer of `PRE_TOKENIZERS` cuts them."""
    spans = [(0, len(text))]
    classes = "".join(map(_class_of, text))
    spaced = "".join(_SPACE_CLASS if c > "\x7f" and is_space(c) else c for c in text)
    for expression in PRE_TOKENIZERS[pre_tokenizer][0]:
        plain = isinstance(expression, _Plain)
        pattern = re.compile(
            expression.expression if isinstance(expression, _Plain) else expression
        )
        over = spaced if plain else classes
        spans = [cut for start, stop in spans for cut in _cut(pattern, over, start, stop)]
    return [text[start:stop] for start, stop in spans]


def _cut(
    pattern: re.Pattern[str], classes: str, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Matches, and what lies between them."""
    piece = classes[start:stop]  # an end of a piece is an end of the text to an expression
    at = 0
    for match in pattern.finditer(piece):
        if match.start() > at:
            yield start + at, start + match.start()
        if match.end() > match.start():
            yield start + match.start(), start + match.end()
        at = match.end()
    if at < len(piece):
        yield start + at, stop


def _class_of(character: str) -> str:
    if ord(character) < 0x80:
        return character
    if is_space(character):
        return _SPACE_CLASS
    return _CLASSES.get(unicodedata.category(character)[0], _OTHER)


# --- WordPiece ---


def bert_words(text: str, *, lowercase: bool, strip_accents: bool) -> list[str]:
    """Words of WordPiece: cut at white space, around punctuation and Chinese characters."""
    words = [""]
    for character in text:
        if strip_accents:  # the first character of what it decomposes to, alone
            character = unicodedata.normalize("NFD", character)[0]
        category = unicodedata.category(character)
        if is_space(character):
            if words[-1]:
                words.append("")
            continue
        if character in "\0\ufffd" or (category[0] == "C" and category != "Cn"):
            continue
        if strip_accents and category[0] == "M":
            continue
        if lowercase:
            character = character.lower()[0]
        ascii_symbol = ord(character) < 0x7F and category[0] == "S"
        if category[0] == "P" or ascii_symbol or _is_chinese(ord(character)):
            if words[-1]:
                words.append("")
            words[-1] = character
            words.append("")
        else:
            words[-1] += character
    return [word for word in words if word]


_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_chinese(code: int) -> bool:
    return any(low <= code <= high for low, high in _CHINESE)
