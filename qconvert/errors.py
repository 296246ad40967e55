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
    Stopped                   a signal, after which a run can go on             exit 130 or 143

The command line turns the class into the exit code (``qconvert.cli.exits``); the text is made
here, in one place, from facts: where, what was found, what was wanted, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LINE = 480  # characters of a line at most, so that with what is put before it no line has over 500
QUOTED = 200  # of a name, path or value within one
MESSAGE = 400  # of an error, which is followed by what became of the output


def shortened(text: str, most: int) -> str:
    """``text`` of at most ``most`` characters: what is too long loses its middle and says how long
    it was.
    """
    return text if len(text) <= most else _ends(text, most, len(text))


def printable(text: str, most: int = QUOTED) -> str:
    """``text`` as it may be shown: without control characters, so that a name from a file cannot
    drive a terminal, and `shortened`, so that it cannot flood one.
    """
    length = len(text)
    if length <= most and text.isprintable():
        return text
    if length > 2 * most:  # only the ends will be seen
        text = text[:most] + text[-most:]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
    return text if len(text) <= most else _ends(text, most, length)


def _ends(text: str, most: int, length: int) -> str:
    mark = f"…({length:,} characters)…"[:most]
    head = (most - len(mark) + 1) // 2
    return text[:head] + mark + text[len(text) - (most - len(mark) - head) :]


def _fitting(lengths: Sequence[int], room: int) -> int:
    """The greatest length to which all may be cut so that together they take at most ``room``."""
    rest = sorted(lengths)
    while rest and rest[0] * len(rest) <= room:
        room -= rest.pop(0)
    return room // len(rest) if rest else max(lengths, default=0)


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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __str__(self) -> str:
        """One line: where, what, found, wanted, code; what is long gives way first."""
        parts = [
            ("", self.path, ": "),
            ("tensor '", self.tensor, "': "),
            ("", self.message, ""),
            (", found ", self.found, ""),
            (", wanted ", self.wanted, ""),
            (" [", self.code, "]"),
        ]
        said = [(before, text, after) for before, text, after in parts if text is not None]
        room = MESSAGE - sum(len(before) + len(after) for before, _, after in said)
        most = _fitting([len(printable(text, MESSAGE)) for _, text, _ in said], room)
        return "".join(before + printable(text, most) + after for before, text, after in said)


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


@contextmanager
def about(path: object) -> Iterator[None]:
    """What is refused in the block, where no other file is named, is refused of this one."""
    try:
        yield
    except QconvertError as e:
        if e.path is None and (isinstance(e, InputError) or e.tensor is not None):
            e.path = str(path)
        raise


class Terminated(BaseException):
    """The TERM signal arrived; a BaseException so that clean-up runs and nothing swallows it."""


class Stopped(BaseException):
    """A signal arrived and the work done so far was kept.

    Args:
        number: the signal.
        kept: what was kept and where, for people.
    """

    def __init__(self, number: int, kept: str) -> None:
        super().__init__(kept)
        self.number = number
