"""How the tiles of a tensor become bytes: one class a family of schemes, one read of the source.

What a decision needs to know of the whole tensor comes out of the same pass. Where it is wanted
before the first tile can be encoded, it is guessed from a sample; `quantize` compares, and encodes
once more where the guess was wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding, Encoding, RawEncoding
from qconvert.errors import WeightError
from qconvert.geometry import TILE_VALUES, Tile, row_length, tiles
from qconvert.kernels.arithmetic import SCALE_NUMPY, stored_zero_points
from qconvert.kernels.records import Bytes, Encoded, Weighting
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.observers.statistics import outlier_bounds
from qconvert.quantizers.weighting import weighting
from qconvert.ranges import RangeMethod
from qconvert.schemes import CastScheme, GgmlScheme
from qconvert.stages.analyse import (
    Analysis,
    analyse,
    finite_weights,
    rows_of,
    shares_parameters,
    source_rows,
)
from qconvert.stages.decide import (
    Decision,
    Sample,
    decide,
    decision_notes,
    sample_rows,
    sample_weights,
)

KEPT_BYTES = 1 << 22  # of a kept tensor that are copied at once
# Values encoded at once where tiles share nothing: with fewer, handing over between threads shows
# (a third more time at 1 << 18), with more, nothing is gained.
RUN_VALUES = 1 << 20


class Encoder(Protocol):
    """Makes the bytes of one tensor; `encode` may run on several threads at once."""

    @property
    def encoding(self) -> Encoding: ...

    def tiles(self) -> Iterator[Tile]: ...

    def encode(self, tile: Tile) -> Encoded: ...


@dataclass(frozen=True, slots=True)
class KeptEncoder:
    """Bytes as they are; a tile is a run of them."""

    model: Model
    tensor: TensorInfo

    @property
    def encoding(self) -> Encoding:
        return RawEncoding(self.tensor.dtype)

    def tiles(self) -> Iterator[Tile]:
        size = self.tensor.nbytes
        for start in range(0, max(size, 1), KEPT_BYTES):
            yield Tile(1, min(KEPT_BYTES, size - start), start, start + KEPT_BYTES >= size)

    def encode(self, tile: Tile) -> Encoded:
        data = self.model.raw(self.tensor, tile.start, tile.columns)
        nonfinite = 0
        if self.tensor.floating:
            values = kernels.widen(data, self.tensor.dtype)
            nonfinite = int(len(values) - np.count_nonzero(np.isfinite(values)))
        return Encoded({"data": data}, nonfinite=nonfinite)


@dataclass(frozen=True, slots=True)
class CastEncoder:
    """Another floating dtype."""

    model: Model
    tensor: TensorInfo
    scheme: CastScheme

    @property
    def encoding(self) -> Encoding:
        return RawEncoding(self.scheme.dtype)

    def tiles(self) -> Iterator[Tile]:
        return _tiles(self.tensor, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        """
        Raises:
            WeightError: NaN or Inf, or a weight beyond the dtype.
        """
        rows = source_rows(self.model, self.tensor, tile)
        with finite_weights(self.model, self.tensor):
            done = kernels.cast(rows, self.scheme.dtype)
        if not math.isfinite(done.error.noise):
            raise WeightError(
                f"a weight does not fit {self.scheme.dtype}",
                path=self.model.path,
                tensor=self.tensor.name,
                found=f"{np.abs(kernels.values(rows)).max():g}",
                hint=self._hint(),
            )
        return done

    def _hint(self) -> str:
        kept = f"keep the tensor with --keep '{self.tensor.name}'"
        if self.scheme.dtype != "F16":  # no dtype reaches further
            return kept
        return f"{kept}, or take bf16: --tensor-scheme '{self.tensor.name}=bf16'"


@dataclass(frozen=True, slots=True)
class GgmlEncoder:
    """Blocks of a ggml type.

    Attributes:
        importance: of the input channels, (columns,), or (matrices, columns) for experts.
    """

    model: Model
    tensor: TensorInfo
    scheme: GgmlScheme
    importance: NDArray[np.float32] | None = None

    @property
    def encoding(self) -> Encoding:
        return RawEncoding(self.scheme.ggml_type)

    def tiles(self) -> Iterator[Tile]:
        return _tiles(self.tensor, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        """
        Raises:
            WeightError: NaN or Inf, or a scale beyond float16.
        """
        kind = GGML_BLOCKS[self.scheme.ggml_type]
        rows = source_rows(self.model, self.tensor, tile)
        weights = self._importance(tile)
        if weights is not None:
            weights = weights.reshape(-1, kind.block)
        with finite_weights(self.model, self.tensor):
            done = kernels.ggml_quantize(kind.name, rows, weights)
        # A scale that is not finite decodes to no number: only then need scales be looked at.
        data = np.frombuffer(done.segments["data"], np.uint8).reshape(-1, kind.nbytes)
        if not math.isfinite(done.error.noise) and not kind.finite_scales(data):
            raise WeightError(
                "a block's scale does not fit its stored type",
                path=self.model.path,
                tensor=self.tensor.name,
                found=f"weights up to {np.abs(kernels.values(rows)).max():g}",
                hint=f"keep the tensor with --keep '{self.tensor.name}'",
            )
        return done

    def _importance(self, tile: Tile) -> NDArray[np.float32] | None:
        """Of the tile's columns, one row for all of its rows or one for each."""
        if self.importance is None:
            return None
        columns = self.importance.shape[-1]
        first, column = divmod(tile.start, columns)
        if self.importance.ndim == 1:
            return self.importance[column : column + tile.columns]
        matrix = (first + np.arange(tile.rows)) // self.tensor.shape[-2]
        if matrix[0] == matrix[-1]:
            matrix = matrix[:1]
        return self.importance[matrix, column : column + tile.columns]


@dataclass(frozen=True, slots=True)
class AffineEncoder:
    """Codes with scales and zero points that each tile finds for itself.

    Attributes:
        decision: what ``encoding`` rests on, perhaps a guess.
        requested: symmetric (True) or asymmetric (False) when the scheme says so.
        weights: by the mean squares of the input channels, where known.
    """

    model: Model
    tensor: TensorInfo
    encoding: AffineEncoding
    method: RangeMethod
    sample: Sample
    decision: Decision
    requested: bool | None
    bounds: tuple[float, float]
    weights: Weighting | None

    def tiles(self) -> Iterator[Tile]:
        return _tiles(self.tensor, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        """
        Raises:
            WeightError: NaN or Inf.
        """
        rows, weights = source_rows(self.model, self.tensor, tile), self._weights(tile)
        with finite_weights(self.model, self.tensor):
            return kernels.quantize_rows(rows, self.encoding, self.method, self.bounds, weights)

    def _weights(self, tile: Tile) -> Weighting | None:
        """Of the tile's columns; only rows of blocks are cut into runs of columns."""
        columns = self.encoding.row_length
        if self.weights is None or tile.columns == columns:
            return self.weights
        return self.weights.blocks(tile.start % columns, tile.columns, self.encoding.block)

    @property
    def weighted(self) -> bool:
        """Whether mean squares of the input channels were known."""
        return self.weights is not None

    def settled(self, seen: Encoded) -> AffineEncoder:
        """This encoder, or another one where the whole tensor says otherwise than the sample."""
        assert seen.moments is not None
        decision = decide(seen.moments, seen.groups, self.requested, self.sample)
        return replace(self, decision=decision, encoding=_settle(self.encoding, decision))

    def notes(self, seen: Encoded) -> dict[str, object]:
        """The decision as reports have it."""
        assert seen.moments is not None
        share = seen.outside / seen.moments.count
        return decision_notes(self.decision, seen.moments, share, self.method)


@dataclass(frozen=True, slots=True)
class SharedEncoder:
    """Codes with scales and zero points that tiles share, found in passes of their own.

    Attributes:
        mean_square: of the input channels, (columns,), where known.
    """

    model: Model
    tensor: TensorInfo
    method: RangeMethod
    analysis: Analysis
    mean_square: NDArray[np.float32] | None

    @property
    def encoding(self) -> AffineEncoding:
        return self.analysis.encoding

    def tiles(self) -> Iterator[Tile]:
        return _tiles(self.tensor, TILE_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        parameters = self.analysis.parameters(tile)
        assert parameters is not None
        squares = None
        if self.mean_square is not None:
            column = tile.start % self.encoding.row_length
            squares = self.mean_square[None, column : column + tile.columns]
        x = rows_of(self.model, self.tensor, tile)
        done = kernels.encode_rows(x, self.encoding, parameters, squares)
        return replace(done, segments={"codes": done.segments["codes"]})

    @property
    def weighted(self) -> bool:
        """Whether mean squares of the input channels were known."""
        return self.mean_square is not None

    def shared(self) -> dict[str, Bytes]:
        """What is stored once, by the kind of segment."""
        assert self.analysis.shared is not None
        scales = np.concatenate([p.scale for p in self.analysis.shared])
        zeros = np.concatenate([p.zero for p in self.analysis.shared])
        stored = {"scales": scales.astype(SCALE_NUMPY["F32"]).tobytes()}
        if self.encoding.symmetric:
            return {**stored}
        return {**stored, "zero_points": stored_zero_points(zeros, self.encoding).data}

    def notes(self, seen: Encoded) -> dict[str, object]:
        """The decision as reports have it."""
        s = self.analysis.statistics
        assert s.moments is not None
        return decision_notes(
            self.analysis.decision, s.moments, s.outlier_share or 0.0, self.method
        )


def affine_encoder(
    model: Model,
    tensor: TensorInfo,
    encoding: AffineEncoding,
    requested: bool | None,
    method: RangeMethod,
    mapper: Mapper,
    mean_square: NDArray[np.float32] | None = None,
) -> AffineEncoder | SharedEncoder:
    """The encoder for ``encoding``, whose symmetry and dtype of scales are yet to be settled.

    Args:
        mean_square: of the input channels, (columns,), where known.

    Raises:
        WeightError: NaN or Inf.
    """
    if shares_parameters(encoding):
        analysis = analyse(model, tensor, encoding, requested, method, mapper, mean_square)
        return SharedEncoder(model, tensor, method, analysis, mean_square)
    rows = sample_rows(model, tensor, encoding)
    if not kernels.all_finite(rows):
        rows = np.zeros_like(rows)  # the pass over the tensor will say what there is
    sample = Sample(rows, encoding, method, sample_weights(mean_square, tensor, encoding))
    guess = sample.guess(requested)
    bounds = outlier_bounds(kernels.moments(rows.ravel()))
    settled = _settle(encoding, guess)
    weights = None if mean_square is None else weighting(mean_square[None, :], encoding)
    return AffineEncoder(model, tensor, settled, method, sample, guess, requested, bounds, weights)


def _settle(encoding: AffineEncoding, decision: Decision) -> AffineEncoding:
    return replace(encoding, symmetric=decision.symmetric, scale_dtype=decision.scale_dtype)


def _tiles(tensor: TensorInfo, most: int) -> Iterator[Tile]:
    columns = row_length(tensor.shape)
    return tiles(tensor.size // columns, columns, most)
