"""Channels of a matrix in the pass that gives its statistics: which rows (outputs) and columns
(inputs) stand out, which are dead, and blocks of values that are all alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.geometry import Tile
from qconvert.kernels.records import F32, F64
from qconvert.report import ChannelSummary

BLOCK = 32  # values that are held to be alike; the smallest block but one of any scheme
MAX_CHANNELS = 1 << 22  # rows or columns of which sums are kept, 16 bytes each
DEAD = 1e-4  # of the median channel's largest magnitude: below, nothing is left of a channel


@dataclass(frozen=True, slots=True)
class TileChannels:
    """Of a tile of (R, c) values; magnitudes and squares are float64.

    Attributes:
        rows, columns: largest magnitude and sum of squares of each, (2, R) and (2, c).
        constant: blocks of `BLOCK` values of a row that are all alike.
        blocks: all of them.
    """

    tile: Tile
    rows: F64
    columns: F64
    constant: int
    blocks: int


class ChannelStatistics:
    """Adds up tiles, in their order: the same bits for any number of threads.

    Args:
        rows, columns: of the matrix.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._rows = np.zeros((2, rows))
        self._columns = np.zeros((2, columns))
        self.constant = 0
        self.blocks = 0

    @staticmethod
    @np.errstate(over="ignore")
    def of_tile(tile: Tile, values: NDArray[np.floating[Any]]) -> TileChannels:
        """A tile by itself; NaN and Inf count as 0."""
        x: F32 = values.astype(np.float32, copy=False).reshape(tile.rows, tile.columns)
        if not kernels.all_finite(x):
            x = np.where(np.isfinite(x), x, np.float32(0))
        magnitudes = np.abs(x)
        squares = np.square(x, dtype=np.float64)
        whole = tile.columns // BLOCK * BLOCK
        constant = 0
        if whole:
            low, high, _ = kernels.extrema(x[:, :whole].reshape(-1, BLOCK))
            constant = int(np.count_nonzero(low == high))
        return TileChannels(
            tile,
            np.stack([magnitudes.max(axis=1), squares.sum(axis=1)]),
            np.stack([magnitudes.max(axis=0), squares.sum(axis=0)]),
            constant,
            tile.rows * (whole // BLOCK),
        )

    def add(self, found: TileChannels) -> None:
        """Add the next tile."""
        tile, columns = found.tile, self._columns.shape[1]
        row, column = divmod(tile.start, columns)
        _join(self._rows[:, row : row + tile.rows], found.rows)
        _join(self._columns[:, column : column + tile.columns], found.columns)
        self.constant += found.constant
        self.blocks += found.blocks

    @property
    def rows(self) -> ChannelSummary:
        return _findings(self._rows[0], self._rows[1], self._columns.shape[1])

    @property
    def columns(self) -> ChannelSummary:
        return _findings(self._columns[0], self._columns[1], self._rows.shape[1])


def _join(total: F64, more: F64) -> None:
    np.maximum(total[0], more[0], out=total[0])
    total[1] += more[1]


def _findings(absmax: F64, squares: F64, length: int) -> ChannelSummary:
    """Of channels of so many values; a dead one has no magnitude above `DEAD` of the median's."""
    median = _median(absmax)
    rest = np.sqrt(np.maximum(squares - absmax * absmax, 0) / max(length - 1, 1))
    usual = _median(rest)
    widest, loudest = int(absmax.argmax()), int(rest.argmax())
    return ChannelSummary(
        count=len(absmax),
        dead=int(np.count_nonzero(absmax <= DEAD * median)),
        widest=widest,
        absmax_ratio=float(absmax[widest]) / median if median > 0 else None,
        loudest=loudest,
        rms_ratio=float(rest[loudest] / usual) if usual > 0 else None,
    )


def _median(values: F64) -> float:
    """`numpy.median`, which takes five times as long for a few hundred values."""
    ordered = np.sort(values)
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
