"""How the tiles of a tensor become codes, scales and zero points: one read of the source.

What a decision needs to know of the whole tensor comes out of the same pass. Where it is wanted
before the first tile can be encoded, it is guessed from a sample; the conversion compares, and
encodes once more where the guess was wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.compensated import compensated, stored_parameters
from qconvert.codecs.affine.decide import (
    Decision,
    Sample,
    decide,
    decision_notes,
    sample_rows,
    sample_weights,
)
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.shared import Analysis, analyse, shares_parameters
from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.codec import Encoder, Facts, Outcome
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.source import RUN_VALUES, finite_weights, rows_of, source_rows, tiles_of
from qconvert.codecs.statistics import outlier_bounds
from qconvert.geometry import TILE_VALUES, Tile, row_length
from qconvert.kernels.arithmetic import SCALE_NUMPY, stored_zero_points
from qconvert.kernels.records import F32, Bytes, Encoded, Weighting
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod, default_method
from qconvert.schemes import AffineScheme


@dataclass(frozen=True, slots=True)
class BlockEncoder(Encoder):
    """Codes with scales and zero points that each tile finds for itself.

    Attributes:
        code: the encoding, as ``decision`` has it, which may be a guess.
        requested: symmetric (True) or asymmetric (False) when the scheme says so.
        weights: by the mean squares of the input channels, where known.
        rounder: see `Facts`.
    """

    model: Model
    tensor: TensorInfo
    code: Affine
    method: RangeMethod
    sample: Sample
    decision: Decision
    requested: bool | None
    bounds: tuple[float, float]
    weights: Weighting | None
    rounder: Rounder | None = None

    @property
    def encoding(self) -> Affine:
        return self.code

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows, weights = source_rows(self.model, self.tensor, tile), self._weights(tile)
        with finite_weights(self.model, self.tensor):
            done = kernels.quantize_rows(rows, self.encoding, self.method, self.bounds, weights)
        if self.rounder is None:
            return done
        p = stored_parameters(done.segments, self.encoding)
        squares = None if weights is None else weights.mean_square
        return compensated(kernels.values(rows), done, p, self.encoding, self.rounder, squares)

    def _weights(self, tile: Tile) -> Weighting | None:
        """Of the tile's columns; only rows of blocks are cut into runs of columns."""
        columns = self.encoding.row_length
        if self.weights is None or tile.columns == columns:
            return self.weights
        return self.weights.blocks(tile.start % columns, tile.columns, self.encoding.block)

    def settled(self, seen: Encoded) -> Encoder:
        assert seen.moments is not None
        decision = decide(seen.moments, seen.groups, self.requested, self.sample)
        return replace(self, decision=decision, code=decision.settled(self.code))

    def outcome(self, seen: Encoded) -> Outcome:
        assert seen.moments is not None
        share = seen.outside / seen.moments.count
        notes = decision_notes(self.decision, seen.moments, share, self.method)
        if self.rounder:
            notes |= self.rounder.note()
        clipped, weighted = seen.error.clipped, self.weights is not None
        return Outcome(seen.error, notes, clipped=clipped, weighted=weighted)


@dataclass(frozen=True, slots=True)
class SharedEncoder(Encoder):
    """Codes with scales and zero points that tiles share, found in passes of their own.

    Attributes:
        mean_square: of the input channels, (columns,), where known.
        rounder: see `Facts`.
    """

    model: Model
    tensor: TensorInfo
    method: RangeMethod
    analysis: Analysis
    mean_square: F32 | None
    rounder: Rounder | None = None

    @property
    def encoding(self) -> Affine:
        return self.analysis.encoding

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, TILE_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        parameters = self.analysis.parameters(tile)
        assert parameters is not None
        squares = None
        if self.mean_square is not None:
            column = tile.start % self.encoding.row_length
            squares = self.mean_square[None, column : column + tile.columns]
        x = rows_of(self.model, self.tensor, tile)
        done = kernels.encode_rows(x, self.encoding, parameters, squares)
        if self.rounder:
            done = compensated(x, done, parameters, self.encoding, self.rounder, squares)
        return replace(done, segments={"codes": done.segments["codes"]})

    def shared(self) -> dict[str, Bytes]:
        assert self.analysis.shared is not None
        scales = np.concatenate([p.scale for p in self.analysis.shared])
        zeros = np.concatenate([p.zero for p in self.analysis.shared])
        stored = {"scales": scales.astype(SCALE_NUMPY["F32"]).tobytes()}
        if self.encoding.symmetric:
            return {**stored}
        return {**stored, "zero_points": stored_zero_points(zeros, self.encoding).data}

    def outcome(self, seen: Encoded) -> Outcome:
        s = self.analysis.statistics
        assert s.moments is not None
        share = s.outlier_share or 0.0
        notes = decision_notes(self.analysis.decision, s.moments, share, self.method)
        if self.rounder:
            notes |= self.rounder.note()
        clipped, weighted = seen.error.clipped, self.mean_square is not None
        return Outcome(seen.error, notes, clipped=clipped, weighted=weighted)


def encoder_for(model: Model, tensor: TensorInfo, scheme: AffineScheme, facts: Facts) -> Encoder:
    """The encoder of a tensor, whose symmetry and dtype of scales are yet to be settled.

    Raises:
        WeightError: NaN or Inf, where all of the tensor is looked at first.
    """
    encoding = replace(planned(scheme, tensor), scale_dtype="F16" if scheme.block else "F32")
    method = facts.method or default_method(scheme.bits)
    mean_square = facts.mean_square(encoding.row_length)
    if shares_parameters(encoding):
        analysis = analyse(
            model, tensor, encoding, scheme.symmetric, method, facts.mapper, mean_square
        )
        return SharedEncoder(model, tensor, method, analysis, mean_square, facts.rounder)
    rows = sample_rows(model, tensor, encoding)
    if not kernels.all_finite(rows):
        rows = np.zeros_like(rows)  # the pass over the tensor will say what there is
    sample = Sample(rows, encoding, method, sample_weights(mean_square, tensor, encoding))
    guess = sample.guess(scheme.symmetric)
    bounds = outlier_bounds(kernels.moments(rows.ravel()))
    weights = None if mean_square is None else weighting(mean_square[None, :], encoding)
    return BlockEncoder(
        *(model, tensor, guess.settled(encoding), method, sample, guess, scheme.symmetric),
        *(bounds, weights, facts.rounder),
    )


def planned(scheme: AffineScheme, tensor: TensorInfo) -> Affine:
    """The encoding of a tensor; while undecided, asymmetric, and with the dtype of 16-bit scales
    whose name is the longer one.
    """
    return Affine(
        bits=scheme.bits,
        granularity=scheme.granularity,
        block=scheme.block,
        symmetric=bool(scheme.symmetric),
        scale_dtype="BF16" if scheme.block else "F32",
        row_length=row_length(tensor.shape),
    )
