"""What texts for people are made of: tables, bars, numbers with their units."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from unicodedata import combining, east_asian_width

from qconvert.errors import printable

T = TypeVar("T")
WORST_SHOWN = 5
FLEXIBLE_WIDTH = 24  # what names and reasons are cut to at most
COLUMN_GAP = 3
PIPE_WIDTH = 20_000  # more than any table: nothing is cut in a log


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; see `table_lines`."""
    return "".join(table_lines(columns, rows, lambda row: row))


def table_lines(
    columns: Sequence[tuple[str, str]], items: Sequence[T], row: Callable[[T], Sequence[str]]
) -> Iterator[str]:
    """A table line by line; ``columns`` are (heading, "left" or "right").

    On a narrow terminal the first column and the one headed "why" are cut; figures never are.

    Args:
        items: what the rows are of; there may be hundreds of thousands.
        row: the cells of one of them; asked for twice, so that not all have to be kept.
    """
    headings = [heading for heading, _ in columns]
    full = [len(heading) for heading in headings]
    for item in items:
        cells = _cells(row(item))
        widths = map(len if _is_plain(cells) else _width, cells)
        full = [max(pair) for pair in zip(full, widths, strict=True)]
    wanted = list(full)
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    room = terminal - sum(full) - COLUMN_GAP * len(full)
    for i, heading in reversed(list(enumerate(headings))):
        if i == 0 or heading == "why":
            kept = min(full[i], max(FLEXIBLE_WIDTH, full[i] + min(room, 0)))
            room += full[i] - kept
            full[i] = kept
    right = [justify == "right" for _, justify in columns]
    gap = " " * COLUMN_GAP
    plain = gap.join(f"{{:{'>' if r else '<'}{n}}}" for r, n in zip(right, full, strict=True))
    yield _line(headings, full, right)
    yield "─" * (sum(full) + COLUMN_GAP * (len(full) - 1)) + "\n"
    for item in items:
        cells = _cells(row(item))
        if full == wanted and _is_plain(cells):  # the same line, in one step
            yield plain.format(*cells).rstrip() + "\n"
        else:
            yield _line(cells, full, right)


def _cells(row: Sequence[str]) -> Sequence[str]:
    return [printable(cell, PIPE_WIDTH) for cell in row]


def _is_plain(cells: Sequence[str]) -> bool:
    """Whether each letter takes one column."""
    return "".join(cells).isascii()


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        spare = width - _width(cell)
        if spare < 0:
            # The end of a tensor's name tells more than its beginning.
            cell = "…" + cell[1 - width :] if i == 0 else cell[: width - 1] + "…"
            spare = width - _width(cell)
        parts.append(" " * spare + cell if right[i] else cell + " " * spare)
    return (" " * COLUMN_GAP).join(parts).rstrip() + "\n"


def _width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def in_decibels(value: float | None) -> str:
    """With its unit, where there is a number."""
    return decibels(value) + ("" if value is None else " dB")


def _next(command: str) -> str:
    return f"next: {command}\n" if sys.stdout.isatty() else ""


EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of ``width`` characters, to an eighth of one; at least a sliver above
    0.
    """
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
