"""A pass over a tensor ahead of its encoding: statistics, the decision, and parameters that all its
tiles share.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.decide import Decision, Sample, decide, sample_rows, sample_weights
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.streams import fit_stream
from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.channels import ChannelStatistics, TileChannels
from qconvert.codecs.source import check_finite, rows_of
from qconvert.codecs.statistics import TensorStatistics, merge, observe
from qconvert.geometry import Tile, spans_tiles, tiles
from qconvert.kernels.records import EMPTY_GROUPS, F32, GroupStatistics, Parameters, Weighting
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the first pass found.

    Attributes:
        encoding: settled.
        shared: parameters by row (or a single one for a tensor scale) where a group spans several
            tiles, else None.
    """

    statistics: TensorStatistics
    decision: Decision
    encoding: Affine
    shared: tuple[Parameters, ...] | None

    def parameters(self, tile: Tile) -> Parameters | None:
        """The shared parameters of a tile, None when it has its own."""
        if self.shared is None:
            return None
        row = tile.start // self.encoding.row_length
        return self.shared[0] if self.encoding.granularity == "tensor" else self.shared[row]


def analyse(
    model: Model,
    tensor: TensorInfo,
    encoding: Affine,
    requested: bool | None,
    method: RangeMethod,
    mapper: Mapper,
    mean_square: F32 | None = None,
    channels: ChannelStatistics | None = None,
) -> Analysis:
    """Observe a tensor, decide, and fit what spans tiles.

    Args:
        mean_square: of the input channels, (columns,), where known.
        channels: to which tiles are added too.

    Raises:
        WeightError: NaN, Inf, or beyond the range of binary32.
    """
    columns = encoding.row_length
    rows = tensor.size // columns

    def work(tile: Tile) -> tuple[TensorStatistics, GroupStatistics, TileChannels | None]:
        values = model.values(tensor, tile.start, tile.stop)
        found = observe(values, tile.start)
        seen = channels.of_tile(tile, values) if channels else None
        if found.nonfinite:
            return found, EMPTY_GROUPS, seen
        with np.errstate(over="ignore"):  # float64 beyond float32 is refused below
            x = values.astype(np.float32, copy=False).reshape(tile.rows, tile.columns)
        return found, kernels.observe_groups(x, encoding, method.name == "mse"), seen

    def take(
        done: tuple[TensorStatistics, GroupStatistics, TileChannels | None],
    ) -> tuple[TensorStatistics, GroupStatistics]:
        found, groups, seen = done
        if channels and seen:
            channels.add(seen)
        return found, groups

    statistics, groups = reduce(
        lambda a, b: (merge(a[0], b[0]), a[1] + b[1]), map(take, mapper(work, tiles(rows, columns)))
    )
    check_finite(statistics, tensor, model.path)
    assert statistics.moments is not None
    sample = Sample(
        *(sample_rows(model, tensor, encoding), encoding, method),
        sample_weights(mean_square, tensor, encoding),
    )
    decision = decide(statistics.moments, groups, requested, sample)
    settled = decision.settled(encoding)
    shared = _shared(model, tensor, settled, method, mean_square, mapper)
    return Analysis(statistics, decision, settled, shared)


def shares_parameters(encoding: Affine) -> bool:
    """Whether a group spans several tiles, so that its range is not known from one."""
    long_channel = encoding.granularity == "channel" and spans_tiles(encoding.row_length)
    return encoding.granularity == "tensor" or long_channel


def _shared(
    model: Model,
    tensor: TensorInfo,
    encoding: Affine,
    method: RangeMethod,
    mean_square: F32 | None,
    mapper: Mapper,
) -> tuple[Parameters, ...] | None:
    columns = encoding.row_length
    rows = tensor.size // columns
    if not shares_parameters(encoding):
        return None
    if encoding.granularity == "tensor":
        spans = [tuple(tiles(rows, columns))]
    else:
        spans = [
            tuple(Tile(1, t.columns, t.start + row * columns, t.last) for t in tiles(1, columns))
            for row in range(rows)
        ]
    of_row = None if mean_square is None else weighting(mean_square[None, :], encoding)

    def values(tile: Tile) -> F32:
        return rows_of(model, tensor, tile).ravel()

    def weights(of_row: Weighting, tile: Tile) -> Weighting:
        return of_row.columns(tile.start % columns, tile.columns).repeated(tile.rows)

    def shared(span: tuple[Tile, ...]) -> Parameters:
        loads = [partial(values, tile) for tile in span]
        weighted = [partial(weights, of_row, tile) for tile in span] if of_row else None
        return fit_stream(loads, encoding, method, weighted, mapper)

    return tuple(map(shared, spans))
