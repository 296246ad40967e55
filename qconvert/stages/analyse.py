"""A pass over a tensor ahead of its encoding: statistics, the decision, and parameters that all its
tiles share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.errors import WeightError
from qconvert.geometry import Tile, row_length, spans_tiles, tiles
from qconvert.kernels.records import (
    EMPTY_GROUPS,
    GroupStatistics,
    Parameters,
    SourceRows,
    Weighting,
)
from qconvert.mapper import Mapper
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.observers.statistics import TensorStatistics, merge, observe
from qconvert.quantizers.fitting import fit_stream
from qconvert.quantizers.weighting import weighting
from qconvert.ranges import RangeMethod
from qconvert.stages.decide import Decision, Sample, decide, sample_rows, sample_weights

F32_MAX = float(np.finfo(np.float32).max)


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
    encoding: AffineEncoding
    shared: tuple[Parameters, ...] | None

    def parameters(self, tile: Tile) -> Parameters | None:
        """The shared parameters of a tile, None when it has its own."""
        if self.shared is None:
            return None
        row = tile.start // self.encoding.row_length
        return self.shared[0] if self.encoding.granularity == "tensor" else self.shared[row]


def source_rows(model: Model, tensor: TensorInfo, tile: Tile) -> SourceRows:
    """A tile as it lies in its file."""
    width = DTYPES[tensor.dtype].size
    data = model.raw(tensor, tile.start * width, tile.rows * tile.columns * width)
    return SourceRows(data, tensor.dtype, (tile.rows, tile.columns))


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


def rows_of(model: Model, tensor: TensorInfo, tile: Tile) -> NDArray[np.float32]:
    """A tile as finite float32 rows; float64 is rounded.

    Raises:
        WeightError: see `check_finite`.
    """
    with finite_weights(model, tensor):
        return kernels.values(source_rows(model, tensor, tile))


def observe_tensor(
    model: Model, tensor: TensorInfo, columns: int, mapper: Mapper
) -> TensorStatistics:
    """Statistics of a whole tensor that has values."""

    def work(tile: Tile) -> TensorStatistics:
        return observe(model.values(tensor, tile.start, tile.stop), tile.start)

    return reduce(merge, mapper(work, tiles(tensor.size // columns, columns)))


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


def analyse(
    model: Model,
    tensor: TensorInfo,
    encoding: AffineEncoding,
    requested: bool | None,
    method: RangeMethod,
    mapper: Mapper,
    mean_square: NDArray[np.float32] | None = None,
) -> Analysis:
    """Observe a tensor, decide, and fit what spans tiles.

    Args:
        mean_square: of the input channels, (columns,), where known.

    Raises:
        WeightError: see `check_finite`.
    """
    columns = encoding.row_length
    rows = tensor.size // columns

    def work(tile: Tile) -> tuple[TensorStatistics, GroupStatistics]:
        values = model.values(tensor, tile.start, tile.stop)
        found = observe(values, tile.start)
        if found.nonfinite:
            return found, EMPTY_GROUPS
        with np.errstate(over="ignore"):  # float64 beyond float32 is refused below
            x = values.astype(np.float32, copy=False).reshape(tile.rows, tile.columns)
        return found, kernels.observe_groups(x, encoding, method.name == "mse")

    statistics, groups = reduce(
        lambda a, b: (merge(a[0], b[0]), a[1] + b[1]), mapper(work, tiles(rows, columns))
    )
    check_finite(statistics, tensor, model.path)
    assert statistics.moments is not None
    sample = Sample(
        *(sample_rows(model, tensor, encoding), encoding, method),
        sample_weights(mean_square, tensor, encoding),
    )
    decision = decide(statistics.moments, groups, requested, sample)
    settled = replace(encoding, symmetric=decision.symmetric, scale_dtype=decision.scale_dtype)
    shared = _shared(model, tensor, settled, method, mean_square, mapper)
    return Analysis(statistics, decision, settled, shared)


def shares_parameters(encoding: AffineEncoding) -> bool:
    """Whether a group spans several tiles, so that its range is not known from one."""
    long_channel = encoding.granularity == "channel" and spans_tiles(encoding.row_length)
    return encoding.granularity == "tensor" or long_channel


def _shared(
    model: Model,
    tensor: TensorInfo,
    encoding: AffineEncoding,
    method: RangeMethod,
    mean_square: NDArray[np.float32] | None,
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

    def values(tile: Tile) -> NDArray[np.float32]:
        return rows_of(model, tensor, tile).ravel()

    def weights(of_row: Weighting, tile: Tile) -> Weighting:
        return of_row.columns(tile.start % columns, tile.columns).repeated(tile.rows)

    def shared(span: tuple[Tile, ...]) -> Parameters:
        loads = [partial(values, tile) for tile in span]
        weighted = [partial(weights, of_row, tile) for tile in span] if of_row else None
        return fit_stream(loads, encoding, method, weighted, mapper)

    return tuple(map(shared, spans))
