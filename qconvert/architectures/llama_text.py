"""Words as llama.cpp cuts them out of a text, before any token is looked up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from qconvert.architectures.llama_pretokenizers import (
    PRE_TOKENIZERS,
    Plain,
    is_space,
    over_classes,
)


def split_words(text: str, pre_tokenizer: str) -> list[str]:
    """The words of byte-level BPE, as a pre-tokenizer of `PRE_TOKENIZERS` cuts them."""
    spans = [(0, len(text))]
    classes, spaced = over_classes(text)
    for expression in PRE_TOKENIZERS[pre_tokenizer][0]:
        if isinstance(expression, Plain):  # whose \s and \d are those of the C locale
            pattern, over = re.compile(expression.expression, re.ASCII), spaced
        else:
            pattern, over = re.compile(expression), classes
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
        if category[0] == "P" or ascii_symbol or _is_bert_chinese(ord(character)):
            if words[-1]:
                words.append("")
            words[-1] = character
            words.append("")
        else:
            words[-1] += character
    return [word for word in words if word]


# What llama.cpp's WordPiece takes for Chinese characters: BERT's own ranges, but that one of those
# begins at U+2B820.
_BERT_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def _is_bert_chinese(code: int) -> bool:
    return any(low <= code <= high for low, high in _BERT_CHINESE)
