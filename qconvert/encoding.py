"""How a tensor lies in a qblk file: encodings and the sizes that follow from them.

formats/qblk/SPEC.md sections 3.2 and 4; pure integers, shared by planner, writer and reader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qconvert.geometry import PACK_GROUP
from qconvert.model import DTYPES

BITS = (2, 3, 4, 5, 6, 8)
BLOCKS = (16, 32, 64, 128, 256)
GRANULARITIES = ("tensor", "channel", "block")
SCALE_SIZES = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class RawEncoding:
    """Values stored as they are, or cast to ``dtype``."""

    dtype: str

    def segments(self, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
        """Kind and size in bytes of each segment."""
        return (("data", DTYPES[self.dtype].nbytes(math.prod(shape))),)

    def to_json(self) -> dict[str, object]:
        return {"dtype": self.dtype, "kind": "raw"}


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

    def segments(self, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
        """Kind and size in bytes of each segment."""
        groups = self.groups(shape)
        sizes = [
            ("codes", self.rows(shape) * self.row_codes * self.bits // 8),
            ("scales", groups * SCALE_SIZES[self.scale_dtype]),
        ]
        if not self.symmetric:
            packed = -(-groups // PACK_GROUP) * 4 * self.zero_point_bits
            sizes.append(("zero_points", groups if self.bits == 8 else packed))
        return tuple(sizes)

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = {
            "bits": self.bits,
            "granularity": self.granularity,
            "kind": "affine",
            "row_length": self.row_length,
            "scale_dtype": self.scale_dtype,
            "symmetric": self.symmetric,
        }
        if self.block:
            fields["block"] = self.block
        return fields


Encoding = RawEncoding | AffineEncoding


def stored_size(encoding: Encoding, shape: tuple[int, ...]) -> int:
    """Bytes of all segments of a tensor, padding between segments not counted."""
    return sum(size for _, size in encoding.segments(shape))
