"""The standard streams as they are handed over: closed, full, or with nobody at the other end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from qconvert.cli import colour
from qconvert.errors import LINE, MachineError, printable

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc from Python 3.12 on


def prepare_streams() -> None:
    """Make sure of the descriptors 0, 1 and 2, and of streams that can be written to.

    A descriptor that is closed would be given to the next file that is opened, and what is printed
    would land in an output.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # One that fails when it is written to: a report that nobody gets is an error.
            with suppress(OSError):
                os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Lossy(2, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


class _Lossy(io.FileIO):
    """Loses what cannot be written: nobody reads it, and the work does not depend on it."""

    def write(self, data: Buffer, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def tell(text: str) -> None:
    """One line on stderr."""
    line = printable(text, LINE)
    if colour.wanted(sys.stderr):
        line = colour.painted(line)
    print(line, file=sys.stderr, flush=True)


def write_stdout(text: str | Iterable[str]) -> bool:
    """Write a text, or its parts, to stdout; False when its reader has gone (Typer would take the
    error for its own).

    Raises:
        MachineError: it cannot be written to.
    """
    try:
        sys.stdout.writelines((text,) if isinstance(text, str) else text)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        return False
    except OSError as e:
        abandon_stdout()
        raise stdout_refusal(e) from e
    return True


def stdout_refusal(e: OSError) -> MachineError:
    """The error that a stdout is, which is closed, full or broken."""
    return MachineError(f"{(e.strerror or str(e)).lower()}, while writing to the standard output")


def abandon_stdout() -> None:
    """Let stdout end in nothing: the interpreter flushes it at exit and would complain again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
