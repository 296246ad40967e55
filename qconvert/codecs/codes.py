"""Codes, scales and zero points of a tensor, for whoever wants to look at them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized tensor as it is stored: value = (codes - zero_point) * scale, in float32, or, of
    a table, (table[codes] - zero_point) * scale.

    Attributes:
        codes: uint8 (R, c), one row of the tensor after the other, 0..2^bits - 1 (symmetric 8-bit
            codes and zero points are those of the file plus 128).
        scales: float32 (R, G), one for each group of a row.
        zero_points: float32 (R, G); quarters below 8 bits, 2^(bits - 1) when symmetric; of a table
            what shifts it, or 0.
        block: columns of a group; c when a row has one scale. The last group may be shorter.
        bits: of a code.
        table: the value of each code before it is scaled, float32 (2^bits,); None where codes are
            numbers.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.float32]
    block: int
    bits: int
    table: NDArray[np.float32] | None = None

    @property
    def scale(self) -> NDArray[np.float32]:
        """Of every code, float32 (R, c)."""
        return self._of_codes(self.scales)

    @property
    def zero_point(self) -> NDArray[np.float32]:
        """Of every code, float32 (R, c)."""
        return self._of_codes(self.zero_points)

    def _of_codes(self, of_groups: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(of_groups, self.block, axis=1)[:, : self.codes.shape[1]]

    def dequantize(self) -> NDArray[np.float32]:
        """The values, (R, c); the same bits as `Tensor.dequantize`."""
        numbers = self.codes if self.table is None else self.table[self.codes]
        values: NDArray[np.float32] = (numbers - self.zero_point) * self.scale
        return values

    def __repr__(self) -> str:
        rows, columns = self.codes.shape
        return f"<Codes {rows} x {columns}, {self.bits} bits, groups of {self.block}>"
