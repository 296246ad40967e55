"""The numbers of an affine encoding, for kernels and codec: formats/qblk/SPEC.md section 4."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qconvert.geometry import PACK_GROUP

BITS = (2, 3, 4, 5, 6, 8)
BLOCKS = (16, 32, 64, 128, 256)
GRANULARITIES = ("tensor", "channel", "block")
SCALE_SIZES = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class AffineEncoding:
    """Codes with a scale, and a zero point unless symmetric, per tensor, channel or block."""

    bits: int
    granularity: str
    block: int  # 0 unless granularity is "block"
    symmetric: bool
    scale_dtype: str
    row_length: int

    @property
    def levels(self) -> int:
        """The largest unsigned code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def row_codes(self) -> int:
        """Codes stored per row, padding included."""
        block = self.block or 1
        unit = block if self.bits == 8 else max(block, PACK_GROUP)
        return -(-self.row_length // unit) * unit

    @property
    def row_groups(self) -> int:
        """Scales per row (1 for channel; also 1 for tensor, where all rows share it)."""
        return -(-self.row_length // self.block) if self.block else 1

    @property
    def zero_point_bits(self) -> int:
        """Width of a stored zero point: quarter steps below 8 bits."""
        return 8 if self.bits == 8 else self.bits + 2

    @property
    def scheme(self) -> str:
        unit = f"block{self.block}" if self.block else self.granularity
        return f"q{self.bits}_{unit}_{'sym' if self.symmetric else 'asym'}"

    def rows(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.row_length

    def groups(self, shape: tuple[int, ...]) -> int:
        """Number of scales of the whole tensor."""
        return 1 if self.granularity == "tensor" else self.rows(shape) * self.row_groups
