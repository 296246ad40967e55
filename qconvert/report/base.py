"""What all reports have in common, and reports as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Self

from qconvert import __version__
from qconvert.errors import QconvertError, shortened
from qconvert.quantities import counted

PART_PIECES = 1 << 14  # words and signs of a document that are written at a time

LONGEST_FACT = 4096  # characters of a path, name or hint in an error: as long as a path may be


@dataclass(repr=False)
class Report:
    """Base of all reports.

    Attributes:
        status: ``pass``, ``fail`` (a promise is broken) or ``error``.
        warnings: things that a careful user wants to know; ``--strict`` makes them a failure.
    """

    SCHEMA: ClassVar[str] = ""

    kernels: str
    status: str = field(default="pass", kw_only=True)
    warnings: list[str] = field(default_factory=list, kw_only=True)
    # Wall time, for people; not part of the JSON, which is the same for the same work.
    seconds: float = field(default=0.0, kw_only=True)

    def __repr__(self) -> str:
        said = list(self._said())
        if self.warnings:
            said.append(counted(len(self.warnings), "warning"))
        return f"<{type(self).__name__} {self.status}: {', '.join(said)}>"

    def _said(self) -> Iterator[str]:
        """What a person is told of it in a line."""
        yield self.kernels

    def judged(self, strict: bool) -> Self:
        """The report itself; under ``strict`` a warning is a failure."""
        if strict and self.warnings and self.status == "pass":
            self.status = "fail"
        return self

    def to_json(self) -> dict[str, Any]:
        """The document that the command prints under ``--json``."""
        found: dict[str, Any] = json.loads("".join(self.json_parts()))
        return found

    def json_parts(self) -> Iterator[str]:
        """The document of ``--json`` in pieces: of a hundred thousand tensors it is long."""
        head = {"schema": self.SCHEMA, "qconvert": __version__, "status": self.status}
        body = _fields(self)
        for name in ("status", "seconds"):
            del body[name]
        return dump_parts({**head, **body})


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


class _Encoder(json.JSONEncoder):
    """Dataclasses as objects, one at a time."""

    def default(self, o: Any) -> Any:
        return _fields(o) if dataclasses.is_dataclass(o) else super().default(o)


def _fields(o: Any) -> dict[str, Any]:
    return {f.name: finite(getattr(o, f.name)) for f in dataclasses.fields(o)}


def dump_parts(value: dict[str, Any]) -> Iterator[str]:
    """One JSON document in ASCII, so that no name in it can drive a terminal, and a line feed."""
    pieces = _Encoder(indent=2, allow_nan=False).iterencode(value)
    while part := "".join(islice(pieces, PART_PIECES)):
        yield part
    yield "\n"


def dump(value: dict[str, Any]) -> str:
    """`dump_parts` in one."""
    return "".join(dump_parts(value))


def error_json(error: QconvertError, exit_code: int) -> dict[str, Any]:
    """An error as the object that ``--json`` prints."""
    facts = {
        "code": error.code,
        "exit": exit_code,
        "message": str(error),
        "hint": None if error.hint is None else shortened(error.hint, LONGEST_FACT),
        "path": None if error.path is None else shortened(error.path, LONGEST_FACT),
        "tensor": None if error.tensor is None else shortened(error.tensor, LONGEST_FACT),
    }
    return {
        "schema": "qconvert.error/1",
        "qconvert": __version__,
        "status": "error",
        "error": facts,
    }
