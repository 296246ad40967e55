"""JSON from files that are not trusted."""

from __future__ import annotations

import json
import re
import reprlib
from pathlib import Path
from typing import Any

from qconvert.errors import FormatError

MAX_JSON_DEPTH = 16
MAX_JSON_CONTAINERS = 4_000_000  # a tensor needs three; an empty list of 2 bytes costs 64 in memory

# One match for each bracket outside strings, and one for the end. It matches everywhere (hence the
# end, and the closing quote that may be missing) and never backtracks: linear time for any text.
_BRACKET = re.compile(r'(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+"?)*+([\[\]{}]|\Z)', re.DOTALL)


# A string, closed or not: an unclosed one must not be tried again from each quote inside it.
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)


def outside_strings(text: str) -> str:
    """A JSON text without its strings."""
    return _STRING.sub("", text)


def nesting(outside: str) -> int:
    """The deepest nesting of a text without strings; nothing recurses."""
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", outside):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def strict_json(data: bytes, path: Path) -> Any:
    """``data`` as JSON, read in the one way in which all readers agree.

    Raises:
        FormatError: not UTF-8, not JSON, the same key twice in an object, NaN or Infinity, a lone
            surrogate, or beyond the limits of depth and number of containers.
    """

    def refusal(message: str, code: str, found: object = None) -> FormatError:
        return FormatError(message, path=path, found=found, code=code)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise refusal("the same key twice in the JSON", "ST-DUPLICATE", reprlib.repr(key))
            for text in (key, value):
                if isinstance(text, str) and not _encodable(text):
                    raise refusal("lone surrogate in the JSON", "ST-UTF8", reprlib.repr(text))
            fields[key] = value
        return fields

    def constant(name: str) -> float:
        raise refusal("number that JSON does not have", "ST-NAN", name)

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(
            "JSON is not UTF-8", "ST-UTF8", f"byte {data[error.start]:#04x} at {error.start}"
        ) from error
    _check_nesting(text, path)
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise refusal(
            "not JSON", "ST-JSON", f"{error.msg.lower()}: character {error.pos}"
        ) from error
    except ValueError as error:  # Python refuses to convert thousands of digits
        raise refusal("integer with too many digits in the JSON", "ST-JSON") from error


def _check_nesting(text: str, path: Path) -> None:
    """Bound depth and number of containers before a parser that recurses sees the text."""
    depth = count = 0
    for match in _BRACKET.finditer(text):
        if match[1] in ("]", "}"):
            depth -= 1
        elif match[1]:
            depth += 1
            count += 1
        if depth <= 0:
            return  # the value is complete: a parser stops here as well
        if depth > MAX_JSON_DEPTH or count > MAX_JSON_CONTAINERS:
            raise FormatError(
                "JSON is nested too deep or has too many objects and arrays",
                path=path,
                found=f"depth {depth}, number {count}",
                wanted=f"depth at most {MAX_JSON_DEPTH}, number at most {MAX_JSON_CONTAINERS}",
                code="ST-NESTING",
            )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
