"""Exit codes: they say whose turn it is, and change only with a major version."""

from __future__ import annotations

from enum import IntEnum

from qconvert.errors import InputError, MachineError, QconvertError, UsageError


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
