"""config.json of a model directory, each field checked when it is read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.architectures.config_classes import ConfigClass
from qconvert.errors import FormatError, UnsupportedError

MAX_COUNT = (1 << 31) - 1  # ggml counts in int32
# What is stored as binary32 and divided by: far from where it becomes zero or infinite.
LEAST, MOST = 1e-30, 1e30


class Config:
    """Fields of a JSON object by name: what the file states, else the default of the class.

    A field that is null is stated: `given` tells it from one that is absent, and so does reading it
    as anything but null. A name that no computation of the class reads is not there at all.

    Args:
        fields: the object.
        path: the file, for messages.
        known: the class of transformers that reads the object; None: every name is a field, without
            a type and without a default.
        inside: where the object is in the file, for messages: ``rope_scaling.``

    Raises:
        FormatError: a field is of another type than the class takes.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        path: Path,
        known: ConfigClass | None = None,
        inside: str = "",
    ) -> None:
        self.path = path
        self.known = known
        self._inside = inside
        self._given = dict(fields)
        self._alias: dict[str, str] = {}
        if known:
            self._given = {n: v for n, v in fields.items() if known.reads(n)}
            # transformers sets second names after the fields that they stand for
            for alias, name in known.aliases.items():
                if alias in self._given:
                    self._given[name] = self._given.pop(alias)
                    self._alias[name] = alias
            for name, value in self._given.items():
                if not known.takes(name, value):
                    raise self.wrong(name, known.fields[name][0])

    def given(self, name: str) -> bool:
        """Whether the file states the field, be it as null."""
        return name in self._given

    def get(self, name: str, default: Any = None) -> Any:
        """The field as it is, the default of its class, or ``default``."""
        if name in self._given:
            return self._given[name]
        of_class = self.known.default(name) if self.known else None
        return default if of_class is None else of_class

    def stated(self, name: str) -> Any:
        """The field as the file has it; None when it is null or absent."""
        return self._given.get(name)

    def count(self, name: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """An integer from 1 to ``most``.

        Raises:
            FormatError: it is none, or absent without a default.
        """
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.wrong(name, f"an integer from 1 to {most}")
        return value

    def optional_count(self, name: str, most: int = MAX_COUNT) -> int | None:
        """As `count`; None when it is null, or absent without a default."""
        return None if self.get(name) is None else self.count(name, most=most)

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive number that binary32 holds with its reciprocal, or ``zero``.

        Raises:
            FormatError: it is none, or absent without a default.
        """
        value = self.get(name, default)
        if not _between(0.0 if zero else LEAST, value):
            raise self.wrong(name, "zero or more" if zero else "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value; null counts as false.

        Raises:
            FormatError: it is none.
        """
        value = self.get(name, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def section(self, name: str) -> Config | None:
        """An object inside this one; None when null or absent.

        Raises:
            FormatError: it is no object.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return self.inner(value, name)

    def inner(self, fields: Mapping[str, Any], name: str) -> Config:
        """An object that stands under ``name``, or that may be taken to."""
        return Config(fields, self.path, inside=f"{self._inside}{name}.")

    def replaced(self, fields: Mapping[str, Any]) -> Config:
        """Other fields in this place."""
        return Config(fields, self.path, self.known, self._inside)

    def fields(self) -> dict[str, Any]:
        """What the file states."""
        return dict(self._given)

    def names(self) -> list[str]:
        """Of the fields that the file states."""
        return list(self._given)

    def described(self, name: str) -> str:
        """The field as the file calls it, with where it is, for messages."""
        return f"{self._inside}{self._alias.get(name, name)}"

    def quoted(self, name: str) -> str:
        """Its value, for messages."""
        return _plain(self.get(name))

    def numbers(self, name: str, length: int) -> list[float]:
        """So many positive numbers.

        Raises:
            FormatError: it is something else or absent.
        """
        value = self.get(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_between(LEAST, v) for v in value)
        ):
            raise self.wrong(name, f"{length} positive numbers")
        return [float(v) for v in value]

    def require(self, name: str, supported: tuple[object, ...], default: object = None) -> None:
        """Refuse a field that asks for something llama.cpp would not do.

        Raises:
            UnsupportedError: it is none of ``supported``.
        """
        value = self.get(name, default)
        if not any(value == s and type(value) is type(s) for s in supported):
            raise self.unlike(name, " or ".join(map(_plain, supported)))

    def unlike(self, name: str, wanted: str) -> UnsupportedError:
        """A field that asks for something that llama.cpp does not do."""
        return UnsupportedError(
            "llama.cpp does not run this architecture with "
            f"'{self.described(name)}' other than usual",
            path=self.path,
            found=_plain(self.get(name)),
            wanted=wanted,
            code="ARCH-CONFIG-VALUE",
        )

    def wrong(self, name: str, wanted: str) -> FormatError:
        """A field that is missing or that cannot be used."""
        value = self.get(name)
        missing = value is None and name not in self._given
        return FormatError(
            f"field '{self.described(name)}' is {'missing' if missing else 'not usable'}",
            path=self.path,
            found=None if missing else _plain(value),
            wanted=wanted,
            code="ARCH-CONFIG",
        )


def _between(least: float, value: object) -> bool:
    """Whether it is a number of a size that can be stored; a truth value is none."""
    return type(value) in (int, float) and least <= value <= MOST  # type: ignore[operator]


def _plain(value: object) -> str:
    """A value as JSON has it, cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)
