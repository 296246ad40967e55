"""Hidden states of many windows, of which few are wanted at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.files.scratch import Scratch

F32 = NDArray[np.float32]
HELD_BYTES = 1 << 30  # of hidden states in memory; more of them are in a file


class HiddenStates:
    """An array for each window, in memory or, where all would take too much of it, in a file.

    Args:
        shape: of each array.
        scratch: the file; None for memory.
    """

    def __init__(self, windows: int, shape: tuple[int, int], scratch: Scratch | None) -> None:
        self._shape = shape
        self._scratch = scratch
        self._held: list[F32] = []
        self._places: list[int] = []
        nothing = np.zeros(shape, np.float32)
        for _ in range(windows):
            if scratch is None:
                self._held.append(nothing)
            else:
                self._places.append(scratch.append(nothing.tobytes()))

    def get(self, window: int) -> F32:
        """Of a window; not to be changed. Several threads may ask."""
        if self._scratch is None:
            return self._held[window]
        size = 4 * self._shape[0] * self._shape[1]
        data = self._scratch.read(self._places[window], size)
        return np.frombuffer(data, np.float32).reshape(self._shape)

    def put(self, window: int, hidden: F32) -> None:
        """In the place of those of a window."""
        if self._scratch is None:
            self._held[window] = hidden.copy()
        else:
            self._scratch.write(self._places[window], hidden.tobytes())
