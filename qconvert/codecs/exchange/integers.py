"""Layouts of integer codes with a scale, and perhaps a zero point, for each group of columns.

Codes here are unsigned, 0..2^bits - 1, and zero points whole codes: value = (code - zero) · scale,
as every format has them that is made of such groups. What differs is how they are packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.affine.compensated import compensated, stored_parameters
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.codec import Coded, Encoder, Facts, Grain, Grid, Outcome, Stored
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.exchange.layout import Layout, refuse_values, ungrouped
from qconvert.codecs.gathered import Gathered
from qconvert.codecs.source import RUN_VALUES, finite_weights, source_rows, tiles_of
from qconvert.codecs.units import centred, exact_scales, regrouped, values_of
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import SCALE_NUMPY, round_scale, to_groups, zero_steps
from qconvert.kernels.records import (
    F32,
    U8,
    Bytes,
    Encoded,
    IntegerRows,
    Parameters,
    SourceRows,
    Weighting,
)
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod, default_method


@dataclass(frozen=True, slots=True)
class StreamRows:
    """Rows of codes on their way into a file.

    Attributes:
        codes: `kernels.pack_stream` of them, (R, n).
        scale: as stored, (R, G).
        zero: whole zero points, a byte each, or biases as stored, (R, G).
        columns: codes of a row.
    """

    codes: U8
    scale: NDArray[Any]
    zero: NDArray[Any]
    columns: int


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """Integer codes.

    Attributes:
        width: bits of a code.
        group: columns that share a scale; 0 where a row has one.
        symmetric: whether all zero points are the middle code, 2^(bits - 1).
        scale_dtype: of scales, a name of `qconvert.model.DTYPES`.
        shared: whether all rows have one scale, and one zero point.
        gathers: of a `StreamRows` what `laid_together` needs of all rows.
    """

    gathers: ClassVar[tuple[str, ...]] = ()
    width: int
    group: int
    symmetric: bool
    scale_dtype: str
    shared: bool = False

    @property
    def bits(self) -> float:
        return self.width

    def groups(self, columns: int) -> int:
        """Scales of a row, or of all rows."""
        return -(-columns // self.group) if self.group else 1

    def uneven(self, shape: tuple[int, ...]) -> str | None:
        return ungrouped(shape[-1], self.group)

    @abstractmethod
    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        """What is stored of some rows and columns; these begin at a multiple of 256 and of the
        group.
        """

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        return self.laid_stream(self._stream(rows))

    def gathered(self, rows: IntegerRows) -> dict[str, NDArray[Any]]:
        return self.gathered_stream(self._stream(rows))

    def _stream(self, rows: IntegerRows) -> StreamRows:
        dtype = SCALE_NUMPY[self.scale_dtype]
        zero = rows.zero.astype(np.uint8) if rows.offset is None else rows.offset.astype(dtype)
        codes = kernels.pack_stream(rows.codes.astype(np.uint8), self.width)
        return StreamRows(codes, rows.scale.astype(dtype), zero, rows.codes.shape[1])

    def laid_stream(self, rows: StreamRows) -> dict[str, Bytes]:
        """Parts of whole rows that follow each other in their tensors, by kind."""
        return {}

    def gathered_stream(self, rows: StreamRows) -> dict[str, NDArray[Any]]:
        """What `laid_together` needs of some rows, (R, n) each, by kind."""
        return {kind: getattr(rows, kind) for kind in self.gathers}

    @property
    def grain(self) -> Grain | None:
        return Grain("int", self.width, self.group)

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        return rows

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        found = regrouped(rows, self.group)
        if found is None or not exact_scales(found, self.scale_dtype):
            return None
        if self.symmetric:
            return centred(found, self.width)
        if found.offset is not None or not found.zero.size:
            return None
        most = (1 << self.width) - 1
        fits = found.zero.min() >= 0 and max(found.zero.max(), found.codes.max()) <= most
        return found if fits else None

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        first, low = divmod(tile.start, stored.shape[-1])
        rows, columns = slice(first, first + tile.rows), slice(low, low + tile.columns)
        found = self.integers(stored, rows, columns)
        # The least code of 8 symmetric bits is one that our encoder leaves out.
        least = int(self.symmetric and self.width == 8)
        grid = Grid(found.scale, least, (1 << self.width) - 1, always_scaled=False)
        return Coded(values_of(found), found, grid)

    def affine(self, columns: int) -> Affine:
        """The same grid as ours, whose search and kernels find codes for it."""
        return Affine(
            bits=self.width,
            granularity="block" if self.group else "channel",
            block=self.group,
            symmetric=self.symmetric,
            scale_dtype=self.scale_dtype if self.group else "F32",
            row_length=columns,
        )

    def scales(self, stored: Stored, kind: str, rows: slice) -> F32:
        """Scales of some rows, where they lie row by row, (R, G)."""
        groups = self.groups(stored.shape[1])
        size = SCALE_NUMPY[self.scale_dtype].itemsize * groups
        count = rows.stop - rows.start
        if self.shared:
            data = stored.read(kind, 0, size)
        else:
            data = stored.read(kind, rows.start * size, count * size)
        found = self.scales_from(stored, kind, data)
        return np.broadcast_to(found.reshape(-1, groups), (count, groups))

    def scales_from(self, stored: Stored, kind: str, data: bytes) -> F32:
        """Scales as they are stored, float32; raises a FormatError where one is not finite."""
        found = np.frombuffer(data, SCALE_NUMPY[self.scale_dtype]).astype(np.float32)
        if not np.isfinite(found).all():
            refuse_values(
                stored, f"a number of {kind} is not finite", "NaN or Inf", "finite scales"
            )
        return found


@dataclass(frozen=True, slots=True)
class IntegerEncoder(Encoder):
    """Codes of the grid that our affine schemes have, in another tool's layout.

    Attributes:
        code: the grid.
        weights: by the mean squares of the input channels, where known.
        rounder: see `Facts`.
        gathered: of all rows, what the layout gathers.
    """

    model: Model
    tensor: TensorInfo
    layout: IntegerLayout
    code: Affine
    method: RangeMethod
    weights: Weighting | None
    rounder: Rounder | None
    gathered: Gathered

    @property
    def encoding(self) -> IntegerLayout:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows = source_rows(self.model, self.tensor, tile)
        with finite_weights(self.model, self.tensor):
            if self.code.block and not self.rounder:
                done = kernels.quantize_stream(rows, self.code, self.method, False, self.weights)
                found = stream_rows(done, self.layout, tile)
            else:
                done, found = self._step_by_step(rows, tile)
        self.gathered.add(tile.start // tile.columns, self.layout.gathered_stream(found))
        return replace(done, segments=self.layout.laid_stream(found))

    def _step_by_step(self, rows: SourceRows, tile: Tile) -> tuple[Encoded, StreamRows]:
        """Whole rows with a scale each, or whose codes make up for each other's errors.

        Raises:
            FloatingPointError: NaN or Inf, or a float64 beyond float32.
        """
        code, dtype = self.code, self.layout.scale_dtype
        squares = None if self.weights is None else self.weights.mean_square
        x = kernels.values(rows)
        groups, counts = to_groups(x, code.block)
        p = kernels.fit(groups, code, self.method, counts, self.weights, whole=True)
        if not code.block:
            p = Parameters(round_scale(p.scale, dtype, np.abs(p.scale)), p.zero)
        done = kernels.encode_rows(x, code, p, squares)
        if self.rounder:
            done = compensated(x, done, p, code, self.rounder, squares)
            if code.block:
                p = Parameters(stored_parameters(done.segments, code).scale, p.zero)
        codes = kernels.load_codes(bytes(done.segments["codes"]), code).reshape(tile.rows, -1)
        zero = p.zero // zero_steps(code.bits)
        if code.symmetric:
            zero = np.full_like(p.zero, 1 << (code.bits - 1))
        shape = (tile.rows, code.row_groups)
        return done, StreamRows(
            kernels.pack_stream(codes[:, : tile.columns], code.bits),
            p.scale.reshape(shape).astype(SCALE_NUMPY[dtype]),
            zero.reshape(shape).astype(np.uint8),
            tile.columns,
        )

    def shared(self) -> dict[str, Bytes]:
        return self.layout.laid_together(self.tensor.shape, self.gathered.arrays)

    def outcome(self, seen: Encoded) -> Outcome:
        note: dict[str, Any] = {"range": self.method.describe()}
        if self.rounder:
            note |= self.rounder.note()
        weighted = self.weights is not None
        return Outcome(seen.error, note, clipped=seen.error.clipped, weighted=weighted)


def integer_encoder(
    model: Model, tensor: TensorInfo, layout: IntegerLayout, facts: Facts
) -> IntegerEncoder:
    """The encoder of a matrix that is no `Layout.misfit`."""
    columns = tensor.shape[1]
    code = layout.affine(columns)
    mean_square = facts.mean_square(columns)
    return IntegerEncoder(
        model,
        tensor,
        layout,
        code,
        facts.method or default_method(code.bits),
        None if mean_square is None else weighting(mean_square[None, :], code),
        facts.rounder,
        Gathered(tensor.shape[0]),
    )


def stream_rows(done: Encoded, layout: IntegerLayout, tile: Tile) -> StreamRows:
    """What `kernels.quantize_stream` has made of a tile."""
    rows, dtype, kinds = tile.rows, SCALE_NUMPY[layout.scale_dtype], done.segments
    codes = np.frombuffer(kinds["codes"], np.uint8).reshape(rows, -1)
    scale = np.frombuffer(kinds["scales"], dtype).reshape(rows, -1)
    if "biases" in kinds:
        zero: NDArray[Any] = np.frombuffer(kinds["biases"], dtype).reshape(scale.shape)
    elif "zero_points" in kinds:
        zero = np.frombuffer(kinds["zero_points"], np.uint8).reshape(scale.shape)
    else:
        zero = np.full(scale.shape, 1 << (layout.width - 1), np.uint8)
    return StreamRows(codes, scale, zero, tile.columns)
