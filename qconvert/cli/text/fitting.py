"""Columns of a table that fit a width: cut, folded, hidden or left out, in that order."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qconvert.cli.text.signs import display_width

# Logs and mails are read, and lines that wrap are not: a pipe gets the width that they show. What
# a script reads is --json, where nothing is cut.
PIPE_WIDTH = 100
LEAST_WIDTH = 60
GAP, NARROW_GAP = 3, 2
NAME_LEAST, TEXT_LEAST = 28, 16  # columns to which names, and other words, may be cut


def text_width() -> int:
    """Columns for a text: those of the terminal, or of ``COLUMNS`` where that is set."""
    told = os.environ.get("COLUMNS", "")
    if sys.stdout.isatty() or (told.isdecimal() and len(told) < 9 and int(told) > 0):
        return max(shutil.get_terminal_size().columns, LEAST_WIDTH)
    return PIPE_WIDTH


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        justify: ``left``, which is of words, or ``right``, of figures; figures are never cut.
        keep: where not all have room, columns with the lowest number go first, and of equal ones
            figures, the last first, then words, and at last the first figure.
        quiet: whether it is hidden, and said in a line below, where all its cells are alike.
    """

    heading: str
    justify: str
    keep: int = 5
    quiet: bool = False

    @property
    def right(self) -> bool:
        return self.justify == "right"


@dataclass(frozen=True, slots=True)
class Fit:
    """Which columns are shown, and how wide.

    Attributes:
        shown: their places.
        widths: of those.
        gap: between them.
        dropped: places of those without room.
    """

    shown: list[int]
    widths: list[int]
    gap: int
    dropped: list[int]


def fit(columns: Sequence[Column], cells: Sequence[int], shown: Sequence[int], room: int) -> Fit:
    """Fit the columns at ``shown``, whose widest cells are ``cells``, into ``room``."""
    shown = list(shown)
    whole = {i: max(cells[i], display_width(columns[i].heading)) for i in shown}
    if sum(whole.values()) + GAP * (len(shown) - 1) <= room:
        return Fit(shown, [whole[i] for i in shown], GAP, [])
    least = {i: _least(columns[i], cells[i], first=i == shown[0]) for i in shown}
    dropped = []
    figure = next((i for i in shown[1:] if columns[i].right), None)

    def worth(i: int) -> tuple[int, int, int]:
        """What comes first goes first."""
        column = columns[i]
        kind = 2 if i == figure else 0 if column.right else 1
        return column.keep, kind, -i if column.right else i

    while len(shown) > 1 and _total(least, shown) > room:
        place = min(shown[1:], key=worth)
        shown.remove(place)
        dropped.append(place)
    spare = room - _total(least, shown)
    for i in shown:
        # Headings may stay folded, cells may not stay cut while there is room.
        more = min(max(cells[i] - least[i], 0), spare) if spare > 0 else min(spare, 0)
        least[i] = max(least[i] + more, 1)
        spare -= more
    return Fit(shown, [least[i] for i in shown], NARROW_GAP, sorted(dropped))


def _total(widths: dict[int, int], shown: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + NARROW_GAP * (len(shown) - 1)


def _least(column: Column, cells: int, first: bool) -> int:
    heading = max(map(display_width, column.heading.split()), default=0)
    if column.right and not first:
        return max(cells, heading)
    return max(min(cells, NAME_LEAST if first else TEXT_LEAST), heading)


def folded(heading: str, width: int) -> list[str]:
    """A heading in lines of at most ``width`` columns, as far as its words allow."""
    lines = [""]
    for word in heading.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if display_width(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
