"""Signals that ask to stop, held back for as long as something must not be torn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


class Held:
    """What has arrived and waits.

    Attributes:
        number: the signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None


@contextmanager
def held(*, once: bool = False) -> Iterator[Held]:
    """Let SIGINT and SIGTERM wait for the end of the block, where they take their effect.

    On threads that get no signals, and for signals that nobody handles here, nothing is changed.

    Args:
        once: a second signal takes effect at once, for work that may be long.
    """
    waiting = Held()
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if once and waiting.number is not None:
            before[number](number, frame)
        waiting.number = number

    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
    try:
        for number in before:
            signal.signal(number, note)
        yield waiting
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting.number is not None:
            before[waiting.number](waiting.number, None)
