"""The mean squares of input channels in a calibration file, read when a tensor wants them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import FormatError
from qconvert.files.calibration import layer_name
from qconvert.files.safetensors import open_safetensors


class MeanSquares:
    """Mean squares by tensor; `find` may be called from several threads at once.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_safetensors(path)
        self._tensors = {t.name: t for t in self._file.tensors}

    def find(self, tensor: str, columns: int) -> NDArray[np.float32] | None:
        """Mean squares of the input channels of a weight, (columns,), finite and not negative.

        None where the file has not got its layer, or the layer was never active: all are 0.

        Raises:
            FormatError: another number of channels than ``columns``, another dtype than F32, or a
                mean square that is negative, NaN or infinite.
        """
        name = f"{layer_name(tensor)}/mean_square"
        info = self._tensors.get(name)
        if info is None:
            return None
        if (info.shape, info.dtype) != ((columns,), "F32"):
            raise FormatError(
                "impossible values in the calibration",
                path=self.path,
                tensor=name,
                found=f"{info.dtype} {list(info.shape)}",
                wanted=f"F32 [{columns}]",
            )
        squares = self._file.values(info, 0, columns).astype(np.float32, copy=False)
        wrong = ~(np.isfinite(squares) & (squares >= 0))
        if wrong.any():
            raise FormatError(
                "impossible values in the calibration",
                path=self.path,
                tensor=name,
                found=f"a mean square of {squares[wrong][0]:g}",
                wanted="a finite number, at least 0",
            )
        return squares if squares.any() else None

    def check_unchanged(self) -> None:
        """Raise an InputError if the file is not the one that was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()
