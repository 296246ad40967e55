"""Colour for terminals that want it: of the words that a line begins with, which say it as well."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Final, TextIO

from qconvert.errors import UsageError, printable

MODES: Final = ("auto", "always", "never")
_RESET = "\x1b[0m"
_RED, _GREEN, _YELLOW, _CYAN = "\x1b[1;31m", "\x1b[32m", "\x1b[33m", "\x1b[36m"
_BEGINNINGS = {
    "error:": _RED,
    "failed:": _RED,
    "FAIL ": _RED,
    "warning:": _YELLOW,
    "skip ": _YELLOW,
    "PASS ": _GREEN,
    "ok ": _GREEN,
    "  hint:": _CYAN,
    "next:": _CYAN,
}
_BEGUN = re.compile("|".join(map(re.escape, _BEGINNINGS)))


_chosen = "auto"  # of the command line that is run


def choose(arguments: Iterable[str]) -> None:
    """Take what a command line says of colour, before it is parsed: what cannot be parsed is told
    in colours too.

    Raises:
        UsageError: it is none of `MODES`.
    """
    global _chosen
    _chosen = "auto"
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--color":
            continue
        mode = value if equals else next(words, _chosen)  # without a value the parser refuses it
        if mode not in MODES:
            raise UsageError(
                f"--color '{printable(mode)}'", wanted=f"{', '.join(MODES[:-1])} or {MODES[-1]}"
            )
        _chosen = mode


def wanted(stream: TextIO) -> bool:
    """Whether a stream gets colours.

    ``auto`` is a terminal's, unless NO_COLOR is set to anything (no-color.org) or TERM is ``dumb``.
    """
    if _chosen != "auto":
        return _chosen == "always"
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def painted(line: str) -> str:
    """A line with the colour of what it begins with."""
    found = _BEGUN.match(line)
    if not found:
        return line
    return f"{_BEGINNINGS[found[0]]}{found[0].rstrip()}{_RESET}{line[len(found[0].rstrip()) :]}"


def painted_text(parts: Iterable[str]) -> Iterator[str]:
    """A text in pieces, each line painted; a line may be cut into several pieces."""
    begun = ""
    for part in parts:
        begun += part
        lines = begun.split("\n")
        begun = lines.pop()
        yield from (painted(line) + "\n" for line in lines)
    if begun:
        yield painted(begun)
