"""Tiles of a source tensor on their way to an encoder: read, and held to be finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np

from qconvert import kernels
from qconvert.codecs.channels import ChannelStatistics, TileChannels
from qconvert.codecs.statistics import TensorStatistics, merge, observe
from qconvert.errors import WeightError
from qconvert.geometry import Tile, row_length, tiles
from qconvert.kernels.records import F32, SourceRows
from qconvert.mapper import Mapper
from qconvert.model import DTYPES, Model, TensorInfo

F32_MAX = float(np.finfo(np.float32).max)
# Values encoded at once where tiles share nothing: with fewer, handing over between threads shows
# (a third more time at 1 << 18), with more, nothing is gained.
RUN_VALUES = 1 << 20


def tiles_of(tensor: TensorInfo, most: int) -> Iterator[Tile]:
    """A tensor in tiles of at most so many values."""
    columns = row_length(tensor.shape)
    return tiles(tensor.size // columns, columns, most)


def source_rows(model: Model, tensor: TensorInfo, tile: Tile) -> SourceRows:
    """A tile as it lies in its file."""
    width = DTYPES[tensor.dtype].size
    data = model.raw(tensor, tile.start * width, tile.rows * tile.columns * width)
    return SourceRows(data, tensor.dtype, (tile.rows, tile.columns))


def rows_of(model: Model, tensor: TensorInfo, tile: Tile) -> F32:
    """A tile as finite float32 rows; float64 is rounded.

    Raises:
        WeightError: see `check_finite`.
    """
    with finite_weights(model, tensor):
        return kernels.values(source_rows(model, tensor, tile))


def largest_weight(model: Model, tensor: TensorInfo, tile: Tile) -> float:
    """The largest magnitude of a tile, for messages."""
    return float(np.abs(kernels.values(source_rows(model, tensor, tile))).max())


@contextmanager
def finite_weights(model: Model, tensor: TensorInfo) -> Iterator[None]:
    """Say what is wrong with weights that turn out not to be finite.

    Raises:
        WeightError: see `check_finite`.
    """
    try:
        yield
    except FloatingPointError:
        # What is said about them is counted over all of the tensor.
        found = observe_tensor(model, tensor, row_length(tensor.shape), map)
        check_finite(found, tensor, model.path)
        raise


def observe_tensor(
    model: Model,
    tensor: TensorInfo,
    columns: int,
    mapper: Mapper,
    channels: ChannelStatistics | None = None,
) -> TensorStatistics:
    """Statistics of a whole tensor that has values; tiles are added to ``channels`` too."""

    def work(tile: Tile) -> tuple[TensorStatistics, TileChannels | None]:
        values = model.values(tensor, tile.start, tile.stop)
        found = channels.of_tile(tile, values) if channels else None
        return observe(values, tile.start), found

    def take(done: tuple[TensorStatistics, TileChannels | None]) -> TensorStatistics:
        if channels and done[1]:
            channels.add(done[1])
        return done[0]

    return reduce(merge, map(take, mapper(work, tiles(tensor.size // columns, columns))))


def check_finite(statistics: TensorStatistics, tensor: TensorInfo, path: Path) -> None:
    """Refuse weights that no scale can hold.

    Raises:
        WeightError: NaN or Inf, or a float64 beyond the range of binary32.
    """
    if statistics.nonfinite:
        raise WeightError(
            f"{statistics.nonfinite:,} of {statistics.size:,} weights are NaN or Inf, "
            f"the first at index {statistics.first_nonfinite:,}",
            path=path,
            tensor=tensor.name,
            wanted="finite weights",
            hint=f"mend the source, or keep the tensor with --keep '{tensor.name}'",
        )
    if (statistics.absmax or 0.0) > F32_MAX:
        raise WeightError(
            "a weight is beyond the range of binary32",
            path=path,
            tensor=tensor.name,
            found=f"{statistics.absmax:g}",
            wanted=f"at most {F32_MAX:g}",
            hint=f"keep the tensor with --keep '{tensor.name}'",
        )
