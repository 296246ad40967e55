"""What is stored of a tensor as a whole, and not row by row, while tiles are encoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Gathered:
    """Arrays of all rows of a tensor, which tiles fill; tiles may come from several threads.

    Args:
        rows: of the tensor.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._arrays: dict[str, NDArray[Any]] = {}

    def add(self, first: int, some: Mapping[str, NDArray[Any]]) -> None:
        """Rows from ``first`` on, (R, n) each, by kind."""
        for kind, part in some.items():
            if kind not in self._arrays:  # another thread may be quicker
                whole = np.zeros((self._rows, part.shape[1]), part.dtype)
                self._arrays.setdefault(kind, whole)
            self._arrays[kind][first : first + len(part)] = part

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All rows, by kind."""
        return self._arrays
