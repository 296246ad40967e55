"""Arrays that are too large to keep in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.files.atomic import machine_errors


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
