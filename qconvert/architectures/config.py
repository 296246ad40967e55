"""config.json of a model directory, each field checked when it is read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from qconvert.errors import FormatError, UnsupportedError

MAX_COUNT = (1 << 31) - 1  # ggml counts in int32


class Config:
    """Fields of a JSON object by name; a field that is null counts as absent.

    Args:
        fields: the object.
        path: the file, for messages.
        defaults: for fields that transformers leaves out of the file.
    """

    def __init__(
        self, fields: Mapping[str, Any], path: Path, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self._fields = {**(defaults or {}), **{k: v for k, v in fields.items() if v is not None}}

    def get(self, name: str) -> Any:
        """The field as it is, or None."""
        return self._fields.get(name)

    def count(self, name: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """An integer from 1 to ``most``.

        Raises:
            FormatError: it is none, or absent without a default.
        """
        value = self._fields.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self._wrong(name, value, f"an integer from 1 to {most}")
        return value

    def optional_count(self, name: str, most: int = MAX_COUNT) -> int | None:
        """As `count`; None when absent."""
        return None if self._fields.get(name) is None else self.count(name, most=most)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive finite number.

        Raises:
            FormatError: it is none, or absent without a default.
        """
        value = self._fields.get(name, default)
        if not _positive(value):
            raise self._wrong(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A truth value.

        Raises:
            FormatError: it is none.
        """
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def section(self, name: str) -> Config | None:
        """An object inside this one; None when absent.

        Raises:
            FormatError: it is no object.
        """
        value = self._fields.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        return Config(value, self.path)

    def numbers(self, name: str, length: int) -> list[float]:
        """So many positive numbers.

        Raises:
            FormatError: it is something else or absent.
        """
        value = self._fields.get(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_positive(v) for v in value)
        ):
            raise self._wrong(name, value, f"{length} positive numbers")
        return [float(v) for v in value]

    def require(self, name: str, supported: tuple[object, ...], default: object) -> None:
        """Refuse a field that asks for something llama.cpp would not do.

        Raises:
            UnsupportedError: it is none of ``supported``.
        """
        value = self._fields.get(name, default)
        if not any(value == s and type(value) is type(s) for s in supported):
            raise UnsupportedError(
                f"llama.cpp does not run this architecture with '{name}' other than usual",
                path=self.path,
                found=reprlib.repr(value),
                wanted=" or ".join(map(repr, supported)),
                code="ARCH-CONFIG-VALUE",
            )

    def _wrong(self, name: str, value: object, wanted: str) -> FormatError:
        return FormatError(
            f"field '{name}' is missing" if value is None else f"field '{name}' is not usable",
            path=self.path,
            found=None if value is None else reprlib.repr(value),
            wanted=wanted,
            code="ARCH-CONFIG",
        )


def _positive(value: object) -> TypeGuard[float]:
    """Whether it is a number that binary32 holds; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
