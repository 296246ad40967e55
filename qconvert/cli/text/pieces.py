"""What texts for people are made of: tables, bars, numbers with their units."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from qconvert.cli.text.fitting import Column, fit, folded, text_width
from qconvert.cli.text.names import DistinctNames, start_of
from qconvert.cli.text.signs import display_width, signs, written
from qconvert.errors import printable
from qconvert.quantities import figure

T = TypeVar("T")
WORST_SHOWN = 5
LABEL = " " * 11  # below a label, where its line goes on
CELL_MOST = 20_000  # letters of a cell that are looked at


def table(columns: Sequence[tuple[str, str] | Column], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; see `table_lines`."""
    return "".join(table_lines(columns, rows, lambda row: row))


def table_lines(
    columns: Sequence[tuple[str, str] | Column],
    items: Sequence[T],
    row: Callable[[T], Sequence[str]],
    elsewhere: str = "--json",
) -> Iterator[str]:
    """A table line by line, none wider than `text_width`.

    Where not all has room, gaps shrink, headings fold, the first column is cut in the middle of
    its names and words elsewhere at their end, and whole columns are left out, as `Column` says;
    what is not shown is said below. Figures are never cut.

    Args:
        columns: or pairs of heading and ``left`` or ``right``.
        items: what the rows are of; there may be hundreds of thousands.
        row: the cells of one of them; asked for twice, and a third time where names are cut, so
            that not all have to be kept.
        elsewhere: the option that shows what had no room.
    """
    every = [Column(*c) for c in columns]
    drawn = signs()
    widest = [0] * len(every)
    first: Sequence[str] | None = None
    alike = [c.quiet for c in every]
    for item in items:
        cells = _cells(row(item))
        widths = map(len if _is_plain(cells) else display_width, cells)
        widest = [max(pair) for pair in zip(widest, widths, strict=True)]
        first = cells if first is None else first
        alike = [a and x == y for a, x, y in zip(alike, cells, first, strict=True)]
    hidden = [i for i, a in enumerate(alike) if a and first and _hides(first[i], len(items))]
    found = fit(every, widest, [i for i in range(len(every)) if i not in hidden], text_width())
    head = [folded(every[i].heading, w) for i, w in zip(found.shown, found.widths, strict=True)]
    high = max(map(len, head))
    right = [every[i].right for i in found.shown]
    gap = " " * found.gap
    for line in range(high):
        words = [h[line - high + len(h)] if line >= high - len(h) else "" for h in head]
        yield _line(words, found.widths, right, gap, drawn.cut)
    yield drawn.rule * (sum(found.widths) + found.gap * (len(found.shown) - 1)) + "\n"
    cut = any(widest[i] > w for i, w in zip(found.shown, found.widths, strict=True))
    place, most = found.shown[0], found.widths[0]
    names = None
    if widest[place] > most:
        names = DistinctNames((_cells(row(t))[place] for t in items), most, drawn.cut)
    pattern = gap.join(
        f"{{:{'>' if r else '<'}{n}}}" for r, n in zip(right, found.widths, strict=True)
    )
    for number_of_row, item in enumerate(items, 1):
        cells = _cells(row(item))
        cells = [cells[i] for i in found.shown]
        if names:
            cells[0] = names.shown(cells[0], number_of_row)
        if not cut and _is_plain(cells):  # the same line, in one step
            yield pattern.format(*cells).rstrip() + "\n"
        else:
            yield _line(cells, found.widths, right, gap, drawn.cut)
    if first:
        yield from _unseen(every, first, hidden, found.dropped, elsewhere)


def _hides(cell: str, rows: int) -> bool:
    """Whether a column with this cell in all of its rows says too little to be shown."""
    return rows > 1 or cell in NOTHING


NOTHING = ("-", "0", "0%", "none", "")


def _unseen(
    columns: Sequence[Column],
    first: Sequence[str],
    hidden: Sequence[int],
    dropped: Sequence[int],
    elsewhere: str,
) -> Iterator[str]:
    """What columns would have said that are hidden, and which had no room."""
    said = [(columns[i].heading, first[i]) for i in hidden]
    none = ", ".join(heading for heading, cell in said if cell in NOTHING)
    told = [f"{heading}: {cell} in all" for heading, cell in said if cell not in NOTHING]
    told += [f"{none}: none"] if none else []
    if dropped:
        left = ", ".join(columns[i].heading for i in dropped)
        told.append(f"no room for: {left} (see {elsewhere})")
    if told:
        yield "\n" + wrapped("; ".join(told)) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """``text`` in lines of `text_width`, all but the first with ``indent`` before them."""
    return "\n".join(
        textwrap.wrap(
            *(text, text_width()),
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
    )


def fitted(text: str) -> str:
    """Labelled lines, wrapped where they are too long; tables are not."""
    width = text_width()
    return "".join(
        wrapped(line, LABEL) + "\n" if display_width(line) > width else line + "\n"
        for line in text.splitlines()
    )


def _cells(row: Sequence[str]) -> Sequence[str]:
    return [written(printable(cell, CELL_MOST)) for cell in row]


def _is_plain(cells: Sequence[str]) -> bool:
    """Whether each letter takes one column."""
    return "".join(cells).isascii()


def _line(
    cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], gap: str, sign: str
) -> str:
    parts = []
    for cell, width, to_right in zip(cells, widths, right, strict=True):
        spare = width - display_width(cell)
        if spare < 0:
            cell = start_of(cell, width - 1) + sign
            spare = width - display_width(cell)
        parts.append(" " * spare + cell if to_right else cell + " " * spare)
    return gap.join(parts).rstrip() + "\n"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else figure(value, digits)


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def in_decibels(value: float | None) -> str:
    """With its unit, where there is a number."""
    return decibels(value) + ("" if value is None else " dB")


def next_step(command: str) -> str:
    """A line for people with what to do then; a pipe needs none."""
    return f"next: {command}\n" if sys.stdout.isatty() else ""


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of ``width`` characters, to a part of one; at least a sliver above 0."""
    parts = signs().parts
    steps = len(parts) - 1
    filled = round(share * width * steps)
    if share > 0:
        filled = max(filled, 1)
    return parts[-1] * (filled // steps) + (parts[filled % steps] if filled % steps else "")
