"""The schemes that may be named, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report


@dataclass(slots=True)
class ListedScheme:
    """A scheme.

    Attributes:
        bits: per weight, with scales and all: of a matrix of 4096 x 4096, and of what goes into
            GGUF by the rules of a mix, of all of Llama 3.1 8B. None where that depends.
        container: that it is written in unless another is asked for.
        runs: what loads the result.
        purpose: what it is for.
    """

    name: str
    bits: float | None
    container: str
    runs: str
    purpose: str


@dataclass(repr=False)
class SchemesReport(Report):
    """Result of ``quantize --list-schemes``."""

    SCHEMA: ClassVar[str] = "qconvert.schemes/1"

    schemes: list[ListedScheme]

    def _said(self) -> Iterator[str]:
        yield counted(len(self.schemes), "scheme")
