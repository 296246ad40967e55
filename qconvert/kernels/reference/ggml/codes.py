"""Where the codes of ggml's block types lie, so that others can be written with the same scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import U8
from qconvert.kernels.reference.ggml.codebooks import E2M1, IQ4

Plane = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """The codes of a type as a block stores them.

    Attributes:
        levels: what codes count for, ascending: those of `Parts`.
        stored: how each of them is stored, uint8.
        planes: (start, bits, low, width): from byte ``start`` on lie ``bits`` bits of each code,
            from bit ``low`` on; byte i of a run of ``width`` bytes has those of the values i,
            i + width, ... of as many values as the run has room for.
    """

    levels: NDArray[np.int16]
    stored: U8
    planes: tuple[Plane, ...]

    def places(self, codes: NDArray[np.int16]) -> U8:
        """Places among the levels of codes as `Parts` has them."""
        low, high = self.levels[0], self.levels[-1]
        place: U8 = np.searchsorted(self.levels, np.arange(low, high + 1)).astype(np.uint8)
        found: U8 = place[codes - low]
        return found

    def written(self, data: U8, places: U8) -> U8:
        """Blocks, (k, nbytes), with codes that have these places among the levels, (k, block)."""
        data, codes = data.copy(), self.stored[places]
        for start, bits, low, width in self.planes:
            part = (codes >> np.uint8(low)) & np.uint8((1 << bits) - 1)
            runs = part.reshape(len(data), -1, 8 // bits, width)
            shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
            plane = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(data), -1)
            data[:, start : start + plane.shape[1]] = plane
        return data


def _numbers(low: int, high: int, *planes: Plane) -> CodeLayout:
    """Codes that are integers from ``low``, which is stored as 0, to ``high``."""
    levels = np.arange(low, high + 1, dtype=np.int16)
    return CodeLayout(levels, (levels - low).astype(np.uint8), planes)


def _table(table: NDArray[np.int16], *planes: Plane) -> CodeLayout:
    """Codes that are stored as places in a table; of equal numbers the first."""
    levels, stored = np.unique(table, return_index=True)
    return CodeLayout(levels, stored.astype(np.uint8), planes)


_BYTES = np.arange(-127, 128, dtype=np.int16)  # ggml writes no -128

CODE_LAYOUTS = {
    "Q4_0": _numbers(-8, 7, (2, 4, 0, 16)),
    "Q4_1": _numbers(0, 15, (4, 4, 0, 16)),
    "Q5_0": _numbers(-16, 15, (2, 1, 4, 1), (6, 4, 0, 16)),
    "Q5_1": _numbers(0, 31, (4, 1, 4, 1), (8, 4, 0, 16)),
    "Q8_0": CodeLayout(_BYTES, _BYTES.astype(np.int8).view(np.uint8), ((2, 8, 0, 32),)),
    "Q2_K": _numbers(0, 3, (16, 2, 0, 32)),
    "Q3_K": _numbers(-4, 3, (0, 1, 2, 32), (32, 2, 0, 32)),
    "Q4_K": _numbers(0, 15, (16, 4, 0, 32)),
    "Q5_K": _numbers(0, 31, (16, 1, 4, 32), (48, 4, 0, 32)),
    "Q6_K": _numbers(-32, 31, (0, 4, 0, 64), (128, 2, 4, 32)),
    "IQ4_NL": _table(IQ4, (2, 4, 0, 16)),
    "IQ4_XS": _table(IQ4, (8, 4, 0, 16)),
    "MXFP4": _table(E2M1, (1, 4, 0, 16)),
    "NVFP4": _table(E2M1, (4, 4, 0, 8)),
}
