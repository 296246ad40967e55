"""How much a JSON text would take to parse, found out before a parser sees it.

A parser recurses and allocates as the text asks for: an empty list of two bytes becomes 56, a
letter beyond U+FFFF makes four bytes of each byte of its text. What is counted here is exact up to
the first place where the text is no JSON, and there a parser stops.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 20
_QUOTE = ord('"')
_OPEN, _CLOSE, _COMMA, _COLON, _SPACE, _DIGIT, _EXPONENT = range(1, 8)
_KINDS = np.zeros(256, np.uint8)
for _kind, _bytes in (
    (_OPEN, b"[{"),
    (_CLOSE, b"]}"),
    (_COMMA, b","),
    (_COLON, b":"),
    (_SPACE, b" \t\r\n"),
    (_DIGIT, b"0123456789"),
    (_EXPONENT, b"eE"),
):
    _KINDS[list(_bytes)] = _kind

# Python keeps a text in as many bytes a letter as its largest letter needs: the lead bytes of UTF-8
# from which on it needs more, and escapes that stand for such letters.
_WIDER = ((0xF0, 4), (0xC4, 2))
_WIDE_ESCAPES = ((re.compile(rb"\\u[dD][89abAB]"), 4), (re.compile(rb"\\u(?!00)"), 2))
# From the start of a text to the first escaped surrogate that is not half of a pair; linear.
_PAIRED = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?:(?![dD][89a-fA-F])|[dD][89abAB]..\\u(?=[dD][c-fC-F])))*+", re.DOTALL
)


@dataclass(slots=True)
class JsonSize:
    """What a JSON text holds outside its strings, and what its letters take.

    Attributes:
        depth: deepest nesting; an object in nothing has depth 1.
        containers: objects and arrays.
        keys: of all objects.
        values: of all objects and arrays, or more by the number of empty ones.
        spaces: white space.
        digits: the longest run of them.
        exponents: whether a number has one.
        text_bytes: memory of the text as Python keeps it.
    """

    depth: int = 0
    containers: int = 0
    keys: int = 0
    values: int = 0
    spaces: int = 0
    digits: int = 0
    exponents: bool = False
    text_bytes: int = 0


def json_size(data: bytes) -> JsonSize:
    """Measure a text in linear time and little memory."""
    found = JsonSize()
    depth = inside = at = letters = largest = run = 0
    while at < len(data):
        part = _unbroken(data, at)
        at += len(part)
        # Escapes of the same length that hide neither a backslash nor a quote.
        plain = part.replace(rb"\\", b"__").replace(rb"\"", b"__")
        codes = np.frombuffer(plain, np.uint8)
        kinds, inside = _outside_strings(codes, inside)
        largest = max(largest, int(codes.max()))
        letters += len(codes) - (
            int(np.count_nonzero(codes & 0xC0 == 0x80)) if largest > 127 else 0
        )
        if not kinds.any():  # in the midst of a string
            run = 0
            continue
        counts = [int(np.count_nonzero(kinds == k)) for k in range(_EXPONENT + 1)]
        found.containers += counts[_OPEN]
        found.values += counts[_OPEN] + counts[_COMMA]
        found.keys += counts[_COLON]
        found.spaces += counts[_SPACE]
        if counts[_OPEN] or counts[_CLOSE]:
            brackets = kinds[(kinds == _OPEN) | (kinds == _CLOSE)]
            levels = depth + np.cumsum(np.where(brackets == _OPEN, 1, -1))
            found.depth = max(found.depth, int(levels.max()))
            depth = int(levels[-1])
        longest, run = _digits(kinds, run) if counts[_DIGIT] else (0, 0)
        found.digits = max(found.digits, longest)
        found.exponents |= counts[_EXPONENT] > 0 and _exponents(kinds)
    found.text_bytes = letters * _width(data, largest)
    return found


def lone_surrogate(data: bytes) -> int | None:
    """Where a text has an escaped surrogate that stands for no letter; None where it has none."""
    match = _PAIRED.match(data)
    end = match.end() if match else 0
    return end if end + 1 < len(data) else None


def _unbroken(data: bytes, at: int) -> bytes:
    """The next part of a text, which does not end between a backslash and what it escapes."""
    part = data[at : at + _CHUNK]
    backslashes = len(part) - len(part.rstrip(b"\\"))
    return part[:-1] if backslashes % 2 and at + len(part) < len(data) else part


def _outside_strings(codes: NDArray[np.uint8], inside: int) -> tuple[NDArray[np.uint8], int]:
    """The kind of each byte, 0 in strings; and whether a string goes on at the end.

    Args:
        codes: without escaped quotes.
        inside: whether they begin in a string.
    """
    parity = np.cumsum(codes == _QUOTE, dtype=np.uint8)  # modulo 256: still odd in strings
    parity += np.uint8(inside)
    parity &= 1
    kinds = _KINDS[codes]
    kinds *= parity ^ 1
    return kinds, int(parity[-1])


def _digits(kinds: NDArray[np.uint8], before: int) -> tuple[int, int]:
    """The longest run of digits, and the one at the end.

    Args:
        before: length of the run that ends where these begin.
    """
    places = np.flatnonzero(kinds == _DIGIT)
    if not len(places):
        return 0, 0
    ends = np.append(np.flatnonzero(np.diff(places) != 1), len(places) - 1)
    lengths = np.diff(ends, prepend=-1)
    if places[0] == 0:
        lengths[0] += before
    return int(lengths.max()), int(lengths[-1]) if places[-1] == len(kinds) - 1 else 0


def _exponents(kinds: NDArray[np.uint8]) -> bool:
    """Whether an E follows a digit, or what came before these."""
    after = np.flatnonzero(kinds == _EXPONENT)
    return bool(after[0] == 0 or (kinds[after - 1] == _DIGIT).any())


def _width(data: bytes, largest: int) -> int:
    width = next((w for lead, w in _WIDER if largest >= lead), 1)
    return max(width, next((w for escape, w in _WIDE_ESCAPES if escape.search(data)), 1))
