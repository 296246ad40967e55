"""What a page is made of; the template `page.html` lays it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from markupsafe import Markup

from qconvert.quantities import figure

T = TypeVar("T")
ROWS_SHOWN = 2000  # of a table: more make a page slow to open, and `--json` has them all
ROWS_OPENED = 200  # that a browser lays out at first; the page's search and sorting know all


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence that a reader should see first.

    Attributes:
        kind: ``bad``, ``note`` or ``good``.
        commands: what to type, where that helps.
    """

    kind: str
    text: str
    commands: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure with its unit, and what it means."""

    term: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    picture: Markup
    caption: str


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        kind: ``text``, ``number`` (sorted by value, set to the right), ``long`` (text that is cut
            until its row is opened) or ``picture``.
        meaning: of the heading, shown where a pointer rests on it and in the list of terms.
    """

    heading: str
    kind: str = "text"
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: as it is read, and where that is no number, as it is sorted."""

    text: str | Markup
    order: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be sorted and searched.

    Attributes:
        total: rows that there are; at most `ROWS_SHOWN` of them are in ``rows``.
        first: by what they were chosen, for the reader.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    total: int
    first: str = ""


def table_of(
    title: str,
    columns: Sequence[Column],
    items: Sequence[T],
    row: Callable[[T], Sequence[Cell]],
    first: str = "",
) -> Table:
    """A table of things, the first `ROWS_SHOWN` of them.

    Args:
        row: the cells of one.
        first: by what they are ordered, for the reader of a table that is cut.
    """
    return Table(title, columns, [row(item) for item in items[:ROWS_SHOWN]], len(items), first)


@dataclass(frozen=True, slots=True)
class Page:
    """A page.

    Attributes:
        verdict: in a sentence; ``status`` gives its colour: ``pass``, ``fail`` or ``done``.
    """

    command: str
    title: str
    status: str
    verdict: str
    findings: Sequence[Finding] = ()
    facts: Sequence[Fact] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    closing: Sequence[Fact] = field(default=())


def warned(warnings: Iterable[str]) -> list[Finding]:
    return [Finding("bad", warning) for warning in warnings]


def number(value: float | None, digits: int = 4) -> Cell:
    """A number, to be sorted by itself and not by its rounded text."""
    return Cell("–") if value is None else Cell(figure(value, digits), value)


def decibels(value: float | None, measured: bool) -> Cell:
    """An SQNR; nothing lost is more than any number of decibels."""
    if not measured:
        return Cell("–")
    return Cell("exact", 1e9) if value is None else Cell(f"{value:.2f}", value)
