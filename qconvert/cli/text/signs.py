"""Characters that the standard output can show: blocks and dashes, or ASCII."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from unicodedata import combining, east_asian_width


@dataclass(frozen=True, slots=True)
class Signs:
    """What tables and bars are drawn with.

    Attributes:
        rule: of the line below headings.
        cut: for what was left out; one column wide, so that it costs no more than it saves.
        parts: a bar's last character, by its share; the last of them is a full one.
        heights: of a line of small bars, from the lowest.
    """

    rule: str
    cut: str
    parts: str
    heights: str


BLOCKS = Signs("─", "…", " ▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█")
ASCII = Signs("-", "~", " .#", "_.:-=+*#")


def signs() -> Signs:
    """The signs of where stdout goes.

    Python writes UTF-8 under ``LC_ALL=C`` (PEP 540), where a terminal may know ASCII alone.
    """
    plain = sys.flags.utf8_mode and os.environ.get("LC_ALL") in ("C", "POSIX")
    drawn = BLOCKS.rule + BLOCKS.cut + BLOCKS.parts + BLOCKS.heights
    return ASCII if plain or not _encodes(drawn) else BLOCKS


def written(text: str) -> str:
    """``text`` as stdout will have it, where letters that it does not know are escaped."""
    if text.isascii() or _encodes(text):
        return text
    return text.encode(_encoding(), "backslashreplace").decode(_encoding())


def display_width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    if text.isascii():
        return len(text)
    return sum(map(_letter_width, text))


@cache
def _letter_width(letter: str) -> int:
    return 0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _encodes(text: str) -> bool:
    try:
        text.encode(_encoding())
    except UnicodeEncodeError:
        return False
    return True
