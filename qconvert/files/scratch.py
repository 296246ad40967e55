"""Arrays that are too large to keep in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.files.atomic import machine_errors
from qconvert.kernels.records import Bytes


class Scratch:
    """A file without a name in the directory of the output, gone with the last array that is in
    it; a context manager, after which nothing more is kept.

    Args:
        output: a file that is being made.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        with machine_errors(output):
            self._file = TemporaryFile(dir=output.parent)  # noqa: SIM115

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same array, read-only and in the file; the system pages it in and out.

        Raises:
            MachineError: the disk is full, or refuses.
        """
        if not array.size:
            return array
        with machine_errors(self.output):
            offset = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(array).data.cast("B"))
            self._file.flush()
            return np.memmap(self._file, array.dtype, "r", offset, array.shape)

    def append(self, data: Bytes) -> int:
        """Put bytes behind all others; where they begin, for `read` and `write`. One thread at a
        time.

        Raises:
            MachineError: the disk is full, or refuses.
        """
        with machine_errors(self.output):
            offset = self._file.seek(0, 2)
            self._file.write(data)
            self._file.flush()
        return offset

    def write(self, offset: int, data: Bytes) -> None:
        """Other bytes in the place of some.

        Raises:
            MachineError: the disk refuses.
        """
        with machine_errors(self.output):
            view = memoryview(data).cast("B")
            while view:
                done = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[done:], offset + done

    def read(self, offset: int, size: int) -> bytes:
        """Bytes that were put there; by several threads at once if need be.

        Raises:
            MachineError: the disk refuses.
        """
        parts = []
        with machine_errors(self.output):
            while size:
                part = os.pread(self._file.fileno(), size, offset)
                if not part:
                    raise OSError(errno.EIO, "a scratch file has lost its end")
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        return b"".join(parts)
