"""How a stage tells that it is alive, without knowing about terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives steps of long work; implemented by the command line."""

    def begin(self, title: str, total: int, unit: str) -> None:
        """A stage of ``total`` units begins (``bytes`` are shown as such)."""
        ...

    def advance(self, amount: int, item: str = "") -> None:
        """``amount`` more units are done, the last of them on ``item``."""
        ...

    def end(self) -> None: ...


class Silent:
    """A `Progress` that tells nobody."""

    def begin(self, title: str, total: int, unit: str) -> None:
        pass

    def advance(self, amount: int, item: str = "") -> None:
        pass

    def end(self) -> None:
        pass
