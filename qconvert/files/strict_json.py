"""JSON from files that are not trusted."""

from __future__ import annotations

import gc
import json
import math
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qconvert.errors import FormatError, InputError
from qconvert.files.json_size import JsonSize, json_size, lone_surrogate
from qconvert.files.regular import RegularFile

MAX_JSON_DEPTH = 16
# What a header of 250,000 tensors needs, an index of as many, or a tokenizer of 500,000 tokens and
# as many merges. A text at these limits takes up to 450 MiB: a member of an object 140 bytes, an
# object 200, and the text once more where it is one string.
MAX_JSON_CONTAINERS = 1_250_000
MAX_JSON_KEYS = 1_250_000
MAX_JSON_VALUES = 4_000_000
MAX_JSON_MEMBERS = 1_000_000  # of one object
MAX_JSON_TEXT = 140 << 20  # bytes of memory, see `JsonSize.text_bytes`
MAX_DIGITS = 308  # of an integer: any such becomes a finite float

_LOCATED_TEXT = 1 << 24  # of a longer text no tensor is named: that would parse it again
_INFINITY = {"__float__": "Infinity"}
_SPACE = re.compile(r"[ \t\r\n]*")


def strict_json(
    data: bytes,
    path: Path,
    *,
    digits: int = MAX_DIGITS,
    of_tensors: bool = False,
    infinity: bool = False,
) -> Any:
    """``data`` as JSON, read in the one way in which all readers agree.

    Args:
        digits: of an integer at most.
        of_tensors: its members are tensors: a fault within one names it.
        infinity: whether ``Infinity`` is taken, which Python writes though JSON has no such number,
            and ``{"__float__": "Infinity"}``, which transformers writes in its place.

    Raises:
        FormatError: not UTF-8, not JSON, the same key twice in an object, NaN or Infinity, a number
            beyond binary64, a lone surrogate, or beyond the limits of depth and number.
    """

    tensor: str | None = None

    def refusal(message: str, code: str, found: object = None) -> FormatError:
        return FormatError(message, path=path, tensor=tensor, found=found, code=code)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | float:
        if len(pairs) > MAX_JSON_MEMBERS:
            raise refusal("an object of the JSON has too many members", "ST-NESTING", len(pairs))
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise refusal(
                "the same key twice in the JSON", "ST-DUPLICATE", reprlib.repr(repeated(pairs))
            )
        return math.inf if infinity and fields == _INFINITY else fields

    def integer(text: str) -> int:
        if len(text) > digits and len(text.lstrip("-")) > digits:
            raise refusal("integer with too many digits in the JSON", "ST-JSON", f"{len(text)}")
        return int(text)

    def floating(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise refusal("number beyond binary64 in the JSON", "ST-NAN", reprlib.repr(text))
        return number

    def constant(name: str) -> float:
        if infinity and name == "Infinity":
            return math.inf
        raise refusal("number that JSON does not have", "ST-NAN", name)

    size = _checked_size(data, path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refusal(
            "JSON is not UTF-8", "ST-UTF8", f"byte {data[error.start]:#04x} at {error.start}"
        ) from error
    lone = lone_surrogate(data)
    long = size.digits > MAX_DIGITS
    decoder = json.JSONDecoder(
        object_pairs_hook=unique,
        parse_int=integer if long else int,
        parse_float=floating if long or size.exponents else float,
        parse_constant=constant,
    )
    try:
        with no_collection():
            fields = decoder.decode(text)
    except (FormatError, json.JSONDecodeError) as error:
        error.__traceback__ = None  # it holds what was parsed so far
        tensor = _member(text, decoder) if of_tensors else None
        if isinstance(error, FormatError):
            error.tensor = tensor
            raise
        found = f"{error.msg.lower()}: character {error.pos}"
        raise refusal("not JSON", "ST-JSON", found) from error
    if lone is not None:
        tensor = _member(text, decoder, len(data[:lone].decode())) if of_tensors else None
        raise refusal("lone surrogate in the JSON", "ST-UTF8", f"{data[lone : lone + 6]!r}")
    return fields


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The JSON object in a regular file of at most ``most`` bytes.

    Raises:
        InputError: the file cannot be opened, is too large, or holds something else.
        FormatError: see `strict_json`.
    """
    file = RegularFile(path)
    try:
        if file.size > most:
            raise InputError(
                "the file is too large",
                path=path,
                found=f"{file.size:,} bytes",
                wanted=f"at most {most:,}",
                code="FILE-SIZE",
            )
        data = file.read(0, file.size)
    finally:
        file.close()
    fields = strict_json(data, path)
    if not isinstance(fields, dict):
        raise FormatError("not an object of JSON", path=path, code="ST-JSON")
    return fields


def repeated(pairs: list[tuple[str, Any]]) -> str:
    """The first key that is there twice; in linear time."""
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("no key twice")


def _member(text: str, decoder: json.JSONDecoder, place: int | None = None) -> str | None:
    """The key of the outermost object whose value holds the character at ``place``, or else the
    first fault; None where that is outside of all values.
    """

    def after(at: int) -> int:
        """The place of the next character that is no space."""
        match = _SPACE.match(text, at)
        assert match
        return match.end()

    if len(text) > _LOCATED_TEXT:
        return None
    at = after(after(0) + 1)
    while True:
        try:
            found = json.decoder.scanstring(text, at + 1)  # type: ignore[attr-defined]
        except ValueError:
            return None
        key, at = str(found[0]), after(after(found[1]) + 1)
        try:
            _, at = decoder.raw_decode(text, at)
        except (ValueError, FormatError):
            return key
        if place is not None and at > place:
            return key
        at = after(at)
        if text[at : at + 1] != ",":
            return None
        at = after(at + 1)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep the collector from going through millions of new objects again and again, among which
    there can be no cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def beyond_limits(size: JsonSize, keys: int = MAX_JSON_KEYS) -> tuple[str, int, int] | None:
    """What a parser must not see: what there is too much of, how much there is, and the most.

    Args:
        keys: at most.
    """
    limits = (
        ("nested too deep", size.depth, MAX_JSON_DEPTH),
        ("of too many objects and arrays", size.containers, MAX_JSON_CONTAINERS),
        ("of too many keys", size.keys, keys),
        ("of too many values", size.values, MAX_JSON_VALUES),
        ("too long in memory, with its widest letter", size.text_bytes, MAX_JSON_TEXT),
    )
    return next((limit for limit in limits if limit[1] > limit[2]), None)


def _checked_size(data: bytes, path: Path) -> JsonSize:
    size = json_size(data)
    beyond = beyond_limits(size)
    if beyond:
        what, found, most = beyond
        raise FormatError(
            f"JSON is {what}",
            path=path,
            found=f"{found:,}",
            wanted=f"at most {most:,}",
            code="ST-NESTING",
        )
    return size
