"""Fields of quantization blocks, checked as they are read."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.shards import CONFIG
from qconvert.model import TensorInfo

# A hint where tensors and configuration contradict each other.
OTHER_VERSIONS = "tensors and configuration are of different versions: download them again"
MAX_PATTERN = 1000  # characters of a regular expression


def refuse_setting(path: Path, name: str, found: object, wanted: str) -> NoReturn:
    """Refuse a field that has another type or value than the format allows.

    Raises:
        FormatError: always.
    """
    raise FormatError(
        f"'{name}' of the quantization block",
        path=path / CONFIG if path.is_dir() else path,
        found=reprlib.repr(found),
        wanted=wanted,
        hint="the configuration is damaged or of another version: download it again",
        code="EXCHANGE-CONFIG",
    )


def unsupported(path: Path, what: str, found: object, wanted: str) -> UnsupportedError:
    """What to raise of a field that means something that is not read here."""
    return UnsupportedError(
        what,
        path=path / CONFIG if path.is_dir() else path,
        found=reprlib.repr(found),
        wanted=wanted,
        hint="convert the checkpoint that it was made from",
        code="EXCHANGE-UNSUPPORTED",
    )


def check_keys(path: Path, where: str, fields: Mapping[str, Any], known: frozenset[str]) -> None:
    """Refuse fields that nobody here knows: they may change what codes mean.

    Raises:
        UnsupportedError: names them, and how many there are.
    """
    unknown = sorted(fields.keys() - known)
    if unknown:
        count = f"{len(unknown)} fields" if len(unknown) > 1 else "a field"
        wanted = "fields that are known: " + " ".join(sorted(known))
        raise unsupported(path, f"{count} of {where} may change what codes mean", unknown, wanted)


def integer(path: Path, name: str, found: Any, least: int, most: int) -> int:
    """A whole number within bounds; raises a FormatError."""
    if type(found) is not int or not least <= found <= most:
        refuse_setting(path, name, found, f"a whole number from {least} to {most}")
    return found


def flag(path: Path, name: str, found: Any) -> bool:
    """A truth value; raises a FormatError."""
    if type(found) is not bool:
        refuse_setting(path, name, found, "true or false")
    return found


def text(path: Path, name: str, found: Any) -> str:
    """A string; raises a FormatError."""
    if not isinstance(found, str):
        refuse_setting(path, name, found, "a string")
    return found


def pattern(path: Path, name: str, found: str) -> re.Pattern[str]:
    """A regular expression; raises a FormatError."""
    try:
        if len(found) > MAX_PATTERN:
            raise re.error("too long")
        return re.compile(found)
    except re.error as e:
        refuse_setting(path, name, found, f"a regular expression ({e})")


def section(path: Path, name: str, found: Any) -> Mapping[str, Any]:
    """An object; raises a FormatError."""
    if not isinstance(found, dict):
        refuse_setting(path, name, found, "an object")
    return found


def scale_dtype(path: Path, scales: TensorInfo | None, default: str) -> str:
    """Of scales that are there, or ``default``; raises a FormatError of one that is no floating
    dtype of weights.
    """
    if scales is None:
        return default
    if scales.dtype not in ("BF16", "F16", "F32"):
        raise FormatError(
            "scales of another dtype than the format has",
            path=path,
            tensor=scales.name,
            found=scales.dtype,
            wanted="BF16, F16 or F32",
            code="EXCHANGE-SHAPE",
        )
    return scales.dtype


def texts(path: Path, name: str, found: Any) -> tuple[str, ...]:
    """A list of strings; raises a FormatError."""
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        refuse_setting(path, name, found, "a list of strings")
    return tuple(found)
