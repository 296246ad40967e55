"""Every way in which qconvert refuses, one class a broken promise.

::

    QconvertError
    ├── UsageError            the command line is wrong                         exit 2
    ├── InputError            an input cannot be used                           exit 3
    │   ├── FormatError         a file breaks a rule of its format
    │   ├── UnsupportedError    well-formed, but not something we can handle
    │   └── WeightError         NaN, Inf or overflowing weights
    └── MachineError          the machine refused: exists, full, no permission  exit 4
        └── OutputExistsError
    Terminated                the TERM signal                                   exit 143

The command line turns the class into the exit code (``qconvert.cli.exits``); the text is made
here, in one place, from facts: where, what was found, what was wanted, and what to do.
"""

from __future__ import annotations

import json


def printable(text: str) -> str:
    """``text`` without control characters, so that a name from a file cannot drive a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class QconvertError(Exception):
    """A refusal with the facts a person needs to act on it.

    Args:
        message: what is wrong, lower case, one line, without path and tensor.
        path: the file concerned.
        tensor: the tensor concerned.
        found: what was there.
        wanted: what should have been there.
        hint: what to do about it.
        code: a stable name of the broken rule, such as ``QBLK-004``.
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        tensor: str | None = None,
        found: object = None,
        wanted: object = None,
        hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.tensor = tensor
        self.found = None if found is None else str(found)
        self.wanted = None if wanted is None else str(wanted)
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        where = "".join(
            f"{part}: "
            for part in (
                None if self.path is None else printable(self.path),
                None if self.tensor is None else f"tensor '{printable(self.tensor)}'",
            )
            if part
        )
        text = where + printable(self.message)
        if self.found is not None:
            text += f", found {printable(self.found)}"
        if self.wanted is not None:
            text += f", wanted {printable(self.wanted)}"
        if self.code is not None:
            text += f" [{self.code}]"
        return text


class UsageError(QconvertError):
    """The command line asks for something that does not exist or contradicts itself."""


class InputError(QconvertError):
    """An input file cannot be used."""


class FormatError(InputError):
    """A file breaks a rule of the format it claims to be in."""


class UnsupportedError(InputError):
    """A file is well-formed but holds something that the chosen operation cannot take."""


class WeightError(InputError):
    """Weights that cannot be quantized: NaN, Inf, or beyond the range of the target."""


class MachineError(QconvertError):
    """The operating system refused: no permission, disk full, no such directory."""


class OutputExistsError(MachineError):
    """The output exists and nobody asked to replace it."""


class Terminated(BaseException):
    """The TERM signal arrived; a BaseException so that clean-up runs and nothing swallows it."""
