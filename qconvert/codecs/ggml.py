"""ggml's block types: rows of blocks, each with its scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Codec, Encoder, Encoding, Facts, Outcome, smaller
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.exchange.floats import largest_of
from qconvert.codecs.exchange.micro import LARGEST
from qconvert.codecs.ggml_blocks import FACTOR, GgmlEncoding, ScaledBlocks, scaled_values
from qconvert.codecs.source import (
    RUN_VALUES,
    finite_weights,
    largest_weight,
    source_rows,
    tiles_of,
)
from qconvert.errors import WeightError
from qconvert.geometry import Tile
from qconvert.ggml_types import GGML_TYPES, GgmlType
from qconvert.kernels.records import (
    F32,
    U8,
    Bytes,
    CodeGrid,
    Encoded,
    ErrorSums,
    Multiples,
    SourceRows,
)
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.kernels.reference.ggml.codes import CODE_LAYOUTS
from qconvert.kernels.reference.ggml.scales import HALF_SCALES, STEPS, with_half
from qconvert.model import Model, TensorInfo
from qconvert.schemes import GgmlScheme


@dataclass(frozen=True, slots=True)
class GgmlEncoder(Encoder):
    """Blocks of a ggml type.

    Attributes:
        importance: of the input channels, (columns,), or (matrices, columns) for experts.
        rounder: see `Facts`.
        factor: the scale of the tensor, by which weights are divided before; None without one.
    """

    model: Model
    tensor: TensorInfo
    type: GgmlType
    importance: F32 | None = None
    rounder: Rounder | None = None
    factor: np.float32 | None = None

    @property
    def encoding(self) -> Encoding:
        return GgmlEncoding(self.type) if self.factor is None else ScaledBlocks()

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows, weights = source_rows(self.model, self.tensor, tile), self._importance(tile)
        if weights is not None:
            weights = weights.reshape(-1, self.type.block)
        with finite_weights(self.model, self.tensor):
            if self.factor is not None:
                x = kernels.values(rows)
                rows = SourceRows.of(x / self.factor)
            done = kernels.ggml_quantize(self.type.name, rows, weights)
        # A scale that is not finite decodes to no number: only then need scales be looked at.
        data = np.frombuffer(done.segments["data"], np.uint8).reshape(-1, self.type.nbytes)
        finite = math.isfinite(done.error.noise)
        if not finite and not GGML_BLOCKS[self.type.name].finite_scales(data):
            raise WeightError(
                "a block's scale does not fit its stored type",
                path=self.model.path,
                tensor=self.tensor.name,
                found=f"weights up to {largest_weight(self.model, self.tensor, tile):g}",
                hint=f"keep the tensor with --keep '{self.tensor.name}'",
            )
        if self.rounder is not None and finite:
            source = kernels.values(rows) if self.factor is None else x
            return self._compensated(source, data, self.rounder)
        if self.factor is None:
            return done
        values = scaled_values(data, self.factor).reshape(x.shape)
        return Encoded(done.segments, ErrorSums(x.size, *kernels.error_sums(x, values)))

    def _compensated(self, x: F32, data: U8, rounder: Rounder) -> Encoded:
        """Blocks of whole rows (R, C) with other codes than those of ``data``, and with scales and
        minima of groups that suit them; the numbers that groups of a block share stay.
        """
        name = self.type.name
        kind, layout, steps = GGML_BLOCKS[name], CODE_LAYOUTS[name], STEPS.get(name)
        parts = kind.splitter(data)
        shape = (len(x), x.shape[1] // kind.group)
        scale = np.ascontiguousarray(parts.scale).reshape(shape)
        if self.factor is not None:
            scale = scale * self.factor
        nothing = np.zeros_like(scale)
        offset = nothing if parts.offset is None else parts.offset.reshape(shape)
        levels = layout.levels.astype(np.float32)
        units = kind.scales(data)
        grid = CodeGrid(
            *(levels, scale, nothing, offset, kind.group),
            scales=_multiples(units[:, 0], shape, *steps.scales) if steps else None,
            offsets=_multiples(-units[:, 1], shape, 0, steps.minima)
            if steps and steps.minima
            else None,
        )
        own = "F16" if name in HALF_SCALES else None
        places, grid = rounder.codes(x, layout.places(parts.codes).reshape(x.shape), grid, own)
        data = layout.written(data, places.reshape(-1, kind.block))
        if own:
            data = with_half(data, grid.scale)
        if steps:
            assert grid.scales
            scales, offsets = _counts(grid.scale, grid.scales), None
            if grid.offsets:
                offsets = _counts(grid.offset, grid.offsets).reshape(parts.scale.shape)
            data = steps.written(data, scales.reshape(parts.scale.shape), offsets)
        if self.factor is None:
            values = kernels.ggml_decode(name, data).reshape(x.shape)
        else:
            values = scaled_values(data, self.factor).reshape(x.shape)
        sums = kernels.error_sums(x, values)
        return Encoded({"data": data.reshape(-1).data}, ErrorSums(x.size, *sums))

    def shared(self) -> dict[str, Bytes]:
        return {} if self.factor is None else {FACTOR: self.factor.astype("<f4").tobytes()}

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(seen.error, self.rounder.note() if self.rounder else None)

    def _importance(self, tile: Tile) -> F32 | None:
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


def _multiples(unit: F32, shape: tuple[int, int], low: int, high: int) -> Multiples:
    """Multiples of the units of blocks, (k,), in their groups, (R, G)."""
    return Multiples(np.repeat(unit, shape[0] * shape[1] // len(unit)).reshape(shape), low, high)


def _counts(numbers: F32, of: Multiples) -> F32:
    """How many units there are in each; 0 of no unit."""
    found: F32 = np.rint(numbers / np.where(of.unit != 0, of.unit, np.float32(np.inf)))
    return found


def _planned(scheme: GgmlScheme, tensor: TensorInfo) -> Encoding:
    return ScaledBlocks() if scheme.scaled else GgmlEncoding(GGML_TYPES[scheme.ggml_type])


def _refuses(scheme: GgmlScheme, tensor: TensorInfo) -> str | None:
    block = GGML_TYPES[scheme.ggml_type].block
    columns = tensor.shape[-1] if tensor.shape else 1
    if columns % block:
        return f"rows of {columns:,} values do not divide into blocks of {block}"
    return smaller(_planned(scheme, tensor), tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: GgmlScheme, facts: Facts) -> Encoder:
    kind, importance = GGML_TYPES[scheme.ggml_type], facts.importance
    if importance is None and len(tensor.shape) == 2:
        importance = facts.mean_square(tensor.shape[-1])
    factor = _factor(model, tensor, kind, importance, facts) if scheme.scaled else None
    return GgmlEncoder(model, tensor, kind, importance, facts.rounder, factor)


def _factor(
    model: Model, tensor: TensorInfo, kind: GgmlType, importance: F32 | None, facts: Facts
) -> np.float32:
    """The least power of two, as a scale of a tensor, with which no group needs a larger scale than
    NVFP4 has; 1 where that leaves no less error in the first rows.

    Of the groups' scales the exponents alone are others than without it, and a power of two moves
    into formats that have its reciprocal.
    """
    one = np.float32(1)
    mantissa, exponent = np.frexp(largest_of(model, tensor, (), facts.mapper) / LARGEST)
    factor = np.ldexp(one, exponent - (mantissa == 0.5))
    if mantissa == 0 or factor < np.finfo(np.float32).tiny:
        return one
    plain = GgmlEncoder(model, tensor, kind, importance, factor=one)
    first = next(plain.tiles())
    with np.errstate(over="ignore"):
        scaled = GgmlEncoder(model, tensor, kind, importance, factor=factor)
        return factor if _noise(scaled, first) < _noise(plain, first) else one


def _noise(encoder: GgmlEncoder, tile: Tile) -> float:
    """Of a tile; infinite where blocks do not hold its weights."""
    try:
        return encoder.encode(tile).error.noise
    except WeightError:
        return math.inf


def _uncompensated(scheme: GgmlScheme, tensor: TensorInfo) -> str | None:
    if scheme.ggml_type in CODE_LAYOUTS:
        return None
    return f"codes of {scheme.ggml_type} are not rounded that way"


def _passes(scheme: GgmlScheme, tensor: TensorInfo) -> bool:
    return scheme.scaled


CODEC: Codec[GgmlScheme] = Codec(
    *("ggml", _planned, _refuses, _encoder), uncompensated=_uncompensated, passes=_passes
)
