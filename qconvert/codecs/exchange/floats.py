"""Weights of eight bits and floating, E4M3, with a scale for the tensor, for each row or block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import ml_dtypes
import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Coded, Encoder, Facts, Outcome, Read, Stored
from qconvert.codecs.exchange.layout import Layout, Part, check_finite, furthest
from qconvert.codecs.source import RUN_VALUES, rows_of, tiles_of
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import round_scale
from qconvert.kernels.records import F32, U8, Bytes, Encoded, ErrorSums
from qconvert.mapper import Mapper
from qconvert.model import DTYPES, Model, TensorInfo

WEIGHT, INPUT_SCALE = ".weight", ".input_scale"
OTHER_INPUTS = "other"
COMMON = ".scale"  # what scales are called between formats
E4M3 = "F8_E4M3"
LARGEST = np.float32(448)  # of E4M3
_LEAST_NORMAL = np.float32(2.0**-6)
_SIGNIFICAND = 23  # bits of binary32


@dataclass(frozen=True)
class Float8(Layout):
    """E4M3 numbers times scales.

    Attributes:
        suffix: of the scales.
        scale_dtype: of `qconvert.model.DTYPES`; F8_E8M0 for powers of two.
        block: rows and columns that share a scale, 0 for all of them.
        dimensions: of the tensor of scales: formats write a single scale, and one a row, each in
            several ways.
        inputs: see `Layout`; `OTHER_INPUTS` where no scheme has them so.
    """

    suffix: str
    scale_dtype: str
    block: tuple[int, int]
    dimensions: int = 2
    inputs: str = ""
    static: bool = False

    @property
    def name(self) -> str:
        rows, columns = self.block
        if self.static:
            return "fp8_static" if rows else "fp8_tensor_static"
        if not columns:
            return "fp8_channel" if rows else "fp8_tensor"
        return f"fp8_block{rows}" if rows == columns else f"fp8_block{rows}x{columns}"

    @property
    def bits(self) -> float:
        return 8

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many scales there are, down and across."""
        rows, columns = self.block
        return -(-shape[0] // rows) if rows else 1, -(-shape[1] // columns) if columns else 1

    def uneven(self, shape: tuple[int, ...]) -> str | None:
        rows, columns = self.block
        if columns and (shape[0] % rows or shape[1] % columns):
            return f"{list(shape)} does not divide into blocks of {rows} x {columns}"
        return None

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        found = (
            Part(WEIGHT, E4M3, shape),
            Part(self.suffix, self.scale_dtype, self.grid(shape)[: self.dimensions]),
        )
        return (*found, Part(INPUT_SCALE, self.scale_dtype, (1,))) if self.static else found

    def static_input(self, scale: float, zero_point: int) -> dict[str, Bytes]:
        """See `Layout.static_input`: the end of the range furthest from 0 is 448."""
        number = np.float32(furthest(scale, zero_point) / LARGEST).astype(_NUMPY[self.scale_dtype])
        return {INPUT_SCALE: number.tobytes()}

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        columns = stored.shape[1]
        first, low = divmod(tile.start, columns)
        raw = stored.read(WEIGHT, tile.start, tile.rows * tile.columns)
        values = kernels.widen(raw, E4M3).reshape(tile.rows, tile.columns)
        scale, block = self._scales(stored, first, first + tile.rows), self.block[1]
        with np.errstate(over="ignore", invalid="ignore"):
            if block and low % block == 0 and tile.columns % block == 0:  # no array of its own
                groups = values.reshape(tile.rows, -1, block)
                groups *= scale[:, low // block : (low + tile.columns) // block, None]
                return Coded(values)
            if block:
                scale = np.repeat(scale, block, axis=1)[:, low : low + tile.columns]
            return Coded(values * scale)

    def _scales(self, stored: Stored, first: int, last: int) -> F32:
        """Of rows ``first..last``, (rows, scales across); a single one, (1, 1), of the tensor."""
        down, across = self.grid(stored.shape)
        size = DTYPES[self.scale_dtype].size * across
        rows = self.block[0]
        begin, end = (first // rows, -(-last // rows)) if rows else (0, down)
        data = stored.read(self.suffix, begin * size, (end - begin) * size)
        scale = kernels.widen(data, self.scale_dtype).astype(np.float32).reshape(-1, across)
        if rows <= 1:
            return scale
        return np.repeat(scale, rows, axis=0)[first - begin * rows : last - begin * rows]

    def common(self, stored: Stored) -> Stored:
        """With scales of float32, which hold those of all dtypes."""
        wide = replace(self, suffix=COMMON, scale_dtype="F32", dimensions=2)
        size = DTYPES[self.scale_dtype].size

        def read(kind: str, offset: int, count: int) -> bytes:
            if kind != COMMON:
                return stored.read(kind, offset, count)
            data = stored.read(self.suffix, offset // 4 * size, count // 4 * size)
            return kernels.widen(data, self.scale_dtype).astype("<f4").tobytes()

        return replace(stored, encoding=wide, read=read)

    def taking(self, stored: Stored) -> Read | None:
        wide = replace(self, suffix=COMMON, scale_dtype="F32", dimensions=2)
        if stored.encoding != wide or self.scale_dtype not in _NUMPY or self.static:
            return None
        count = math.prod(self.grid(stored.shape))
        scale = np.frombuffer(stored.read(COMMON, 0, 4 * count), "<f4")
        with np.errstate(over="ignore"):
            narrow = scale.astype(_NUMPY[self.scale_dtype])
        if (narrow.astype(np.float32) != scale).any():
            return None
        scales = narrow.tobytes()

        def read(kind: str, offset: int, size: int) -> bytes:
            whole = kind != self.suffix
            return stored.read(kind, offset, size) if whole else scales[offset : offset + size]

        return read

    def check(self, stored: Stored) -> None:
        check_finite(stored, self.suffix, self.scale_dtype, math.prod(self.grid(stored.shape)))


@dataclass(frozen=True, slots=True)
class Float8Encoder(Encoder):
    """The nearest numbers with the largest of what shares a scale at the end of their range.

    FP8 Formats for Deep Learning (Micikevicius et al., 2022): as the format is floating, where its
    range ends makes no difference to the error of most weights.

    Attributes:
        largest: magnitude of all that has one scale; None where rows or blocks have their own.
    """

    model: Model
    tensor: TensorInfo
    layout: Float8
    largest: np.float32 | None = None

    @property
    def encoding(self) -> Float8:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        whole = (self.layout.block[0] or 1) * self.tensor.shape[1]  # rows that share scales
        return tiles_of(self.tensor, max(RUN_VALUES // whole, 1) * whole)

    def encode(self, tile: Tile) -> Encoded:
        x = rows_of(self.model, self.tensor, tile)
        segments: dict[str, Bytes] = {}
        if self.largest is not None:
            each = self._scales(np.full((1, 1), self.largest))
        else:
            scale = self._scales(block_maxima(np.abs(x), self.layout.block))
            each = spread(scale, self.layout.block, x.shape)
            segments[self.layout.suffix] = self._stored(scale)
        segments[WEIGHT] = near = e4m3(x / each).tobytes()
        sums = kernels.error_sums(x, kernels.widen(near, E4M3).reshape(x.shape) * each)
        return Encoded(segments, ErrorSums(x.size, *sums))

    def shared(self) -> dict[str, Bytes]:
        if self.largest is None:
            return {}
        return {self.layout.suffix: self._stored(self._scales(np.full((1, 1), self.largest)))}

    def _scales(self, magnitude: F32) -> F32:
        """Of the largest magnitudes of what shares one, as they are stored."""
        scale = round_scale(magnitude / LARGEST, self.layout.scale_dtype, magnitude)
        return np.where(magnitude > 0, scale, np.float32(1))

    def _stored(self, scale: F32) -> bytes:
        return scale.astype(_NUMPY[self.layout.scale_dtype]).tobytes()

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(seen.error)


def float8_encoder(
    model: Model, tensor: TensorInfo, layout: Float8, facts: Facts, parts: Sequence[str]
) -> Float8Encoder:
    """The encoder of a matrix that is no `Layout.misfit`.

    Args:
        parts: names of the tensors that have one scale of the tensor with it.
    """
    whole = not any(layout.block)
    largest = largest_of(model, tensor, parts, facts.mapper) if whole else None
    return Float8Encoder(model, tensor, layout, largest)


def largest_of(
    model: Model, tensor: TensorInfo, parts: Sequence[str], mapper: Mapper
) -> np.float32:
    """The largest magnitude of a tensor and those that have one scale with it."""
    found = np.float32(0)
    for t in model.tensors:
        if t.name == tensor.name or t.name in parts:
            each = mapper(partial(_largest, model, t), tiles_of(t, RUN_VALUES))
            found = max([found, *each])
    return found


def _largest(model: Model, tensor: TensorInfo, tile: Tile) -> np.float32:
    return np.float32(np.abs(rows_of(model, tensor, tile)).max())


_NUMPY: dict[str, type | np.dtype[np.generic]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def e4m3(x: F32) -> U8:
    """The nearest E4M3 of finite numbers, of two the even one, 448 for what is beyond, as uint8.

    The bits of ml_dtypes, which takes five times as long.
    """
    magnitude = np.minimum(np.abs(x), LARGEST)
    bits = magnitude.view(np.uint32)
    # Three bits of the significand stay, and the exponent counts from -7 rather than -127.
    kept = np.uint32(_SIGNIFICAND - 3)
    half = np.uint32((1 << (_SIGNIFICAND - 4)) - 1)
    normal = ((bits + half + (bits >> kept & np.uint32(1))) >> kept) - np.uint32((127 - 7) << 3)
    small = np.rint(magnitude * np.float32(2**9)).astype(np.uint32)  # steps below 2^-6
    codes = np.where(magnitude < _LEAST_NORMAL, small, normal).astype(np.uint8)
    return codes | np.signbit(x).astype(np.uint8) << np.uint8(7)


def block_maxima(x: F32, block: tuple[int, int]) -> F32:
    """The largest number of each block of rows and columns, 0 columns for all of them; rows begin
    where a block does.
    """
    step = block[1] or x.shape[1]
    across = np.maximum.reduceat(x, np.arange(0, x.shape[1], step), axis=1)
    found: F32 = np.maximum.reduceat(across, np.arange(0, len(x), block[0]), axis=0)
    return found


def spread(scale: F32, block: tuple[int, int], shape: tuple[int, ...]) -> F32:
    """Scales of blocks for every row, and every column where these have several."""
    each = np.repeat(scale, block[0], axis=0)[: shape[0]]
    return np.repeat(each, block[1], axis=1)[:, : shape[1]] if block[1] else each
