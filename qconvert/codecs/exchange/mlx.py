"""MLX, which mlx-lm, mlx-vlm and LM Studio load.

The law is formats/exchange/mlx.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.codec import Codec, Encoder, Facts, Outcome, Stored
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.exchange.integers import IntegerLayout, StreamRows, stream_rows
from qconvert.codecs.exchange.layout import Part
from qconvert.codecs.exchange.micro import FP4, FP8, MX_GROUP, NV_GROUP, Micro
from qconvert.codecs.exchange.micro_encoder import micro_encoder
from qconvert.codecs.source import RUN_VALUES, finite_weights, source_rows, tiles_of
from qconvert.codecs.units import exact_scales, regrouped, with_offset, without_offset
from qconvert.exchange_schemes import MLX_AFFINE, NOT_ROUNDED, MlxScheme
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import (
    SCALE_NUMPY,
    WORD,
    stream_bytes,
    weighted_error_sums,
)
from qconvert.kernels.records import (
    F32,
    U8,
    Bytes,
    CodeGrid,
    Encoded,
    ErrorSums,
    IntegerRows,
    Weighting,
)
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.ranges import RangeMethod, default_method

WORDS, SCALES, BIASES = ".weight", ".scales", ".biases"


def packed_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    """Of the words of a weight, whose rows are dense streams of bits."""
    return (*shape[:-1], stream_bytes(shape[-1], bits) * 8 // WORD)


def read_codes(stored: Stored, rows: slice, columns: slice, bits: int) -> U8:
    """Codes of some rows and columns, which begin at a byte, (R, C)."""
    whole = stream_bytes(stored.shape[-1], bits)
    count, width = rows.stop - rows.start, columns.stop - columns.start
    begin = columns.start * bits // 8
    size = min(stream_bytes(width, bits), whole - begin) if count == 1 else whole
    data = stored.read(WORDS, rows.start * whole + begin, (count - 1) * whole + size)
    return kernels.unpack_stream(np.frombuffer(data, np.uint8).reshape(count, -1), bits, width)


# --- a scale and a bias a group -------------------------------------------------------------------


@dataclass(frozen=True)
class AffineGroups(IntegerLayout):
    """Mode ``affine``: value = code · scale + bias."""

    stacks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"mlx_{self.width}bit_g{self.group}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        numbers = (*shape[:-1], self.groups(shape[-1]))
        return (
            Part(WORDS, "U32", packed_shape(shape, self.width)),
            Part(SCALES, self.scale_dtype, numbers),
            Part(BIASES, self.scale_dtype, numbers),
        )

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        return without_offset(rows, self.width)

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        found = regrouped(rows, self.group)
        if found is None or not exact_scales(found, self.scale_dtype):
            return None
        return with_offset(found, self.width, self.scale_dtype)

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        codes = read_codes(stored, rows, columns, self.width)
        scale, bias = (self._numbers(stored, kind, rows, columns) for kind in (SCALES, BIASES))
        zero = np.zeros(scale.shape, np.int32)
        return IntegerRows(codes.astype(np.int16), zero, scale, bias, self.group)

    def _numbers(self, stored: Stored, kind: str, rows: slice, columns: slice) -> F32:
        groups = self.groups(stored.shape[-1])
        size = DTYPES[self.scale_dtype].size * groups
        data = stored.read(kind, rows.start * size, (rows.stop - rows.start) * size)
        part = slice(columns.start // self.group, -(-columns.stop // self.group))
        return self.scales_from(stored, kind, data).reshape(-1, groups)[:, part]

    def laid_stream(self, rows: StreamRows) -> dict[str, Bytes]:
        return {
            WORDS: rows.codes.data,
            SCALES: rows.scale.tobytes(),
            BIASES: rows.zero.tobytes(),
        }


@dataclass(frozen=True, slots=True)
class MlxEncoder(Encoder):
    """The grid that our asymmetric scheme finds, its zero point as a bias that is rounded as it is
    stored; codes are chosen with what is stored.

    Attributes:
        code: our grid of the same width and groups.
        weights: by the mean squares of the input channels, where known.
        rounder: see `Facts`.
    """

    model: Model
    tensor: TensorInfo
    layout: AffineGroups
    code: Affine
    method: RangeMethod
    weights: Weighting | None
    rounder: Rounder | None

    @property
    def encoding(self) -> AffineGroups:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows = source_rows(self.model, self.tensor, tile)
        with finite_weights(self.model, self.tensor):
            done = kernels.quantize_stream(rows, self.code, self.method, True, self.weights)
        found = stream_rows(done, self.layout, tile)
        if self.rounder:
            return self._compensated(kernels.values(rows), found)
        return replace(done, segments=self.layout.laid_stream(found))

    def _compensated(self, x: F32, nearest: StreamRows) -> Encoded:
        """Rows x (R, C) in codes that make up for each other's errors."""
        assert self.rounder
        code, dtype = self.code, SCALE_NUMPY[self.code.scale_dtype]
        scale, bias = (n.astype(np.float32) for n in (nearest.scale, nearest.zero))
        codes = kernels.unpack_stream(nearest.codes, code.bits, nearest.columns)
        levels = np.arange(1 << code.bits, dtype=np.float32)
        grid = CodeGrid(levels, scale, np.zeros_like(scale), bias, code.block)
        codes, grid = self.rounder.codes(x, codes, grid, code.scale_dtype)
        zero = np.zeros(scale.size, np.int32)
        numbers = codes.reshape(scale.size, -1), grid.scale.ravel(), zero
        values = kernels.decode(*numbers, code.bits, False)
        values += bias.reshape(-1, 1)
        values = values.reshape(x.shape)
        sums, weighted = kernels.error_sums(x, values), (0.0, 0.0)
        if self.weights is not None:
            weighted = weighted_error_sums(x, values, self.weights.mean_square)
        error = ErrorSums(x.size, *sums, 0, *weighted)
        stream = kernels.pack_stream(codes, code.bits)
        found = replace(nearest, codes=stream, scale=grid.scale.astype(dtype))
        return Encoded(self.layout.laid_stream(found), error)

    def outcome(self, seen: Encoded) -> Outcome:
        note: dict[str, Any] = {"range": self.method.describe()}
        if self.rounder:
            note |= self.rounder.note()
        weighted = self.weights is not None
        return Outcome(seen.error, note, clipped=seen.error.clipped, weighted=weighted)


# --- floating codes ---


@dataclass(frozen=True)
class FloatGroups(Micro):
    """Modes ``mxfp4``, ``mxfp8`` and ``nvfp4``: the same numbers in words of 32 bits, and bytes for
    scales whatever these mean.
    """

    stacks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"mlx_{self.mode}"

    @property
    def mode(self) -> str:
        """What MLX calls it."""
        return super().name

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (
            Part(*self.packed, packed_shape(shape, self.bits)),
            Part(*self.scales, (*shape[:-1], self.groups(shape[-1]))),
        )


MODES = {
    layout.mode: layout
    for layout in (
        FloatGroups(number, (WORDS, "U32"), (SCALES, "U8"), group)
        for number, group in ((FP4, MX_GROUP), (FP8, MX_GROUP), (FP4, NV_GROUP))
    )
}


# --- the codec ---


def _planned(scheme: MlxScheme, tensor: TensorInfo) -> AffineGroups | FloatGroups:
    if scheme.mode != MLX_AFFINE:
        return MODES[scheme.mode]
    return AffineGroups(scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype)


def _refuses(scheme: MlxScheme, tensor: TensorInfo) -> str | None:
    return _planned(scheme, tensor).misfit(tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: MlxScheme, facts: Facts) -> Encoder:
    layout = _planned(scheme, tensor)
    if isinstance(layout, FloatGroups):
        return micro_encoder(model, tensor, layout, facts, ())
    columns = tensor.shape[-1]
    code = layout.affine(columns)
    mean_square = facts.mean_square(columns)
    weights = None if mean_square is None else weighting(mean_square[None, :], code)
    method = facts.method or default_method(code.bits)
    return MlxEncoder(model, tensor, layout, code, method, weights, facts.rounder)


CODEC: Codec[MlxScheme] = Codec(
    *("mlx", _planned, _refuses, _encoder),
    uncompensated=lambda scheme, tensor: None if scheme.number == "int" else NOT_ROUNDED,
)
