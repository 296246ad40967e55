"""Exit codes: they say whose turn it is, and change only with a major version."""

from __future__ import annotations

from enum import IntEnum

from qconvert.errors import InputError, MachineError, QconvertError, UsageError

# Words of the interpreter, which has no class for it.
NO_THREAD = "can't start new thread"


class ExitCode(IntEnum):
    """See the table in README.md."""

    DONE = 0
    NO = 1
    USAGE = 2
    INPUT = 3
    MACHINE = 4
    BUG = 70
    INTERRUPTED = 130
    READER_GONE = 141
    TERMINATED = 143


def code_of(error: QconvertError) -> ExitCode:
    """The exit code of a refusal, by its class."""
    for kind, code in (
        (UsageError, ExitCode.USAGE),
        (InputError, ExitCode.INPUT),
        (MachineError, ExitCode.MACHINE),
    ):
        if isinstance(error, kind):
            return code
    return ExitCode.BUG


def as_refusal(e: Exception) -> QconvertError:
    """Any exception as a refusal: ours, the machine's, or a bug of ours.

    This is the one place that decides what a failing system call means where nothing nearer to it
    has named the file.
    """
    if isinstance(e, QconvertError):
        return e
    if isinstance(e, MemoryError):
        return MachineError("out of memory")
    if isinstance(e, OSError):
        return MachineError((e.strerror or str(e)).lower(), path=e.filename)
    if isinstance(e, ImportError):  # a file of an installation that cannot be opened or mapped
        return MachineError(
            "a part of the program cannot be loaded",
            found=str(e),
            hint="see whether the machine is out of memory or files (ulimit -n), or install again",
        )
    if isinstance(e, SystemError):  # of an extension whose memory was refused
        return MachineError(f"the interpreter failed: {e}", hint="see whether memory is left")
    if isinstance(e, RuntimeError) and str(e) == NO_THREAD:
        return MachineError(
            "no thread can be started: resource temporarily unavailable",
            hint="raise the limit of processes (ulimit -u), or use fewer with --threads 1",
        )
    return QconvertError(
        f"a bug in qconvert: {type(e).__name__}: {e}",
        hint="set QCONVERT_DEBUG=1 for the traceback, and report it with the command line",
    )
