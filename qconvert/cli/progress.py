"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from qconvert.cli import colour
from qconvert.cli.streams import tell
from qconvert.errors import printable
from qconvert.progress import Progress, Silent
from qconvert.quantities import duration, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_SECONDS = 30.0


def make_progress(quiet: bool) -> Progress:
    """The right kind of progress for where stderr goes."""
    if quiet:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return BarProgress()
    return LineProgress()


def amount(value: int, unit: str) -> str:
    return size(value) if unit == "bytes" else f"{value:,}"


# Bars that are shown: until they end, the terminal has no cursor.
_bars: set[BarProgress] = set()


def end_bars() -> None:
    """Give the terminal back, whatever else is going on."""
    while _bars:
        _bars.pop().end()


class LineProgress:
    """One line when a stage begins, and one every 30 seconds: logs show life and stay short.

    The line says how much is done, how fast, and how long the rest takes at that rate.
    """

    def begin(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.started = self.last = time.monotonic()
        tell(f"{title}: {amount(total, unit)} {'' if unit == 'bytes' else unit}".rstrip())

    def advance(self, amount_done: int, item: str = "") -> None:
        self.done += amount_done
        now = time.monotonic()
        if now - self.last >= LINE_SECONDS:
            self.last = now
            tell(f"{self.title}: {self._state(now - self.started)}")

    def _state(self, seconds: float) -> str:
        text = f"{amount(self.done, self.unit)} of {amount(self.total, self.unit)}"
        rate = self.done / seconds
        if not rate:
            return text
        left = duration(max(self.total - self.done, 0) / rate)
        return f"{text}, {amount(round(rate), self.unit)} a second, about {left} left"

    def end(self) -> None:
        pass


class BarProgress:
    """A rich bar that disappears when the stage ends."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def begin(self, title: str, total: int, unit: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.end()
        _bars.add(self)
        if unit == "bytes":
            amounts: tuple[ProgressColumn, ...] = DownloadColumn(), TransferSpeedColumn()
        else:
            amounts = (MofNCompleteColumn(),)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *amounts,
            TimeRemainingColumn(),
            TextColumn("{task.fields[item]}", markup=False),
            console=Console(stderr=True, no_color=not colour.wanted(sys.stderr)),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, item="")

    def advance(self, amount_done: int, item: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount_done, item=printable(item))

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _bars.discard(self)
