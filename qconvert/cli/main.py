"""The way in: signals first, then everything else.

Nothing is imported here that is not imported already when Python has started, so that hardly a
moment is left in which an interrupt would show Python's own traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

WORDS = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
CANNOT_START = 4


def run() -> NoReturn:
    """The ``qconvert`` command."""
    for number in WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells in scripts set it
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable
    try:
        from qconvert.cli.command import run_process
    except Exception as e:  # a machine that cannot read the program's files
        _write(f"error: qconvert cannot be loaded, nothing was written: {e}\n")
        os._exit(CANNOT_START)
    run_process(sys.argv[1:])


def main(arguments: list[str]) -> int:
    """Run a command line and return its exit code; nothing escapes but the code."""
    from qconvert.cli.command import main as command

    return command(arguments)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind what runs; but an import would swallow what is raised in it, or print it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number)
        frame = frame.f_back
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    from qconvert.errors import Terminated

    raise Terminated


def _unraisable(raised: sys.UnraisableHookArgs) -> None:
    """An interrupt that Python would drop, in a destructor; other exceptions there change nothing,
    and are shown to those who look for bugs.
    """
    name = raised.exc_type.__name__
    if name in ("KeyboardInterrupt", "Terminated"):
        _leave(signal.SIGINT if name == "KeyboardInterrupt" else signal.SIGTERM)
    elif os.environ.get("QCONVERT_DEBUG"):
        sys.__unraisablehook__(raised)


def _leave(number: int) -> NoReturn:
    """End the process here, with nothing half-written left."""
    beside = sys.modules.get("qconvert.files.beside")
    progress = sys.modules.get("qconvert.cli.progress")
    for module, name in ((beside, "remove_partial_files"), (progress, "end_bars")):
        if tidy := getattr(module, name, None):
            tidy()
    word, code = WORDS[signal.Signals(number)]
    _write(f"{word}\n")
    os._exit(code)


def _write(text: str) -> None:
    data = text[:500].encode("utf-8", "backslashreplace")
    try:
        os.write(2, data)
    except OSError:  # closed, or nobody reads it
        return
