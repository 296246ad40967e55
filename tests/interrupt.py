"""A run that stops halfway, for tests of what goes on from there."""

from __future__ import annotations

from qconvert.progress import Silent


class Interrupt(Silent):
    """Stops the run after so many pieces, as Ctrl-C would."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.unit = ""

    def begin(self, title: str, total: int, unit: str) -> None:
        self.unit = unit

    def advance(self, amount: int, item: str = "") -> None:
        if item and self.unit != "packages":  # those that are loaded first
            self.pieces -= 1
            if not self.pieces:
                raise KeyboardInterrupt
