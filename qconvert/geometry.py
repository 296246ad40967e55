"""How a tensor is cut: into rows, blocks, code groups, and the tiles that bound memory.

The rules are those of formats/qblk/SPEC.md section 3.2 and formats/schemes/SPEC.md section 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

PACK_GROUP = 32  # values that are packed together below 8 bits
TILE_VALUES = 1 << 18  # a multiple of every block; fixed, because sums are merged tile by tile
CONVOLUTION_DIM = 32  # a last dimension below this is a convolution kernel, not a row


def row_length(shape: tuple[int, ...]) -> int:
    """Values in a row of a tensor that is to be quantized."""
    if not shape:
        return 1
    if len(shape) > 2 and shape[-1] < CONVOLUTION_DIM:
        return math.prod(shape[1:])
    return shape[-1]


@dataclass(frozen=True, slots=True)
class Tile:
    """A piece of a tensor that is read and worked on at once.

    Either whole rows, or a run of columns of one row when a row is longer than a tile.

    Attributes:
        rows: number of rows (1 for a run of columns).
        columns: number of columns.
        start: index of the first value in the flattened tensor.
        last: whether the tile reaches the end of its rows.
    """

    rows: int
    columns: int
    start: int
    last: bool

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


def spans_tiles(columns: int) -> bool:
    """Whether a row of ``columns`` values is cut into several tiles."""
    return columns > TILE_VALUES


def tiles(rows: int, columns: int, most: int = TILE_VALUES) -> Iterator[Tile]:
    """Cut ``rows`` rows of ``columns`` values into tiles of at most ``most`` values, in order.

    Args:
        most: a multiple of every block; another one than `TILE_VALUES` only where no group of
            values is cut by it.
    """
    if rows == 0 or columns == 0:
        return
    if columns <= most:
        step = most // columns
        for r in range(0, rows, step):
            yield Tile(min(step, rows - r), columns, r * columns, True)
        return
    for r in range(rows):
        for c in range(0, columns, most):
            width = min(most, columns - c)
            yield Tile(1, width, r * columns + c, c + width == columns)
