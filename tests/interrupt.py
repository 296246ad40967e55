"""A run that stops halfway, for tests of what goes on from there."""

from __future__ import annotations

from qconvert.progress import Silent


class Interrupt(Silent):
    """Stops the run after so many pieces, as Ctrl-C would."""

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces

    def advance(self, amount: int, item: str = "") -> None:
        if item:
            self.pieces -= 1
            if not self.pieces:
                raise KeyboardInterrupt
