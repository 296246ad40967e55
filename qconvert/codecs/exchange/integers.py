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
from qconvert.codecs.source import finite_weights, source_rows, tiles_of
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

# Values that are worked on together, of which several arrays stay in a core's cache.
AT_ONCE = 1 << 18
EVERYWHERE = (-np.inf, np.inf)  # no value is an outlier: nothing is decided by them here


@dataclass(frozen=True)
class IntegerLayout(Layout):
    """Integer codes.

    Attributes:
        width: bits of a code.
        group: columns that share a scale; 0 where a row has one.
        symmetric: whether all zero points are the middle code, 2^(bits - 1).
        scale_dtype: of scales, a name of `qconvert.model.DTYPES`.
        shared: whether all rows have one scale, and one zero point.
        gathers: of ``codes``, ``scale`` and ``zero``, what `laid_together` needs of all rows.
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
        """Parts of whole rows that follow each other in their tensors, by kind."""
        return {}

    def gathered(self, rows: IntegerRows) -> dict[str, NDArray[Any]]:
        """What `laid_together` needs of some rows, (R, n) each, by kind."""
        kept: dict[str, NDArray[Any]] = {
            "codes": as_codes(rows),
            "scale": rows.scale,
            "zero": rows.zero.astype(np.uint8),
        }
        return {kind: kept[kind] for kind in self.gathers}

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
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, AT_ONCE))

    def encode(self, tile: Tile) -> Encoded:
        rows, code = source_rows(self.model, self.tensor, tile), self.code
        squares = None if self.weights is None else self.weights.mean_square
        with finite_weights(self.model, self.tensor):
            done, p = self._nearest(rows)
        if self.rounder:
            done = compensated(kernels.values(rows), done, p, code, self.rounder, squares)
            if code.block:
                p = Parameters(stored_parameters(done.segments, code).scale, p.zero)
        integers = self._integers(done, p, tile)
        self.gathered.add(tile.start // tile.columns, self.layout.gathered(integers))
        return replace(done, segments=self.layout.laid(integers))

    def _nearest(self, rows: SourceRows) -> tuple[Encoded, Parameters]:
        """Whole rows in codes of our grid, and the parameters that these were made with.

        Raises:
            FloatingPointError: NaN or Inf, or a float64 beyond float32.
        """
        code = self.code
        if code.block and code.symmetric:  # nothing is to be changed in what is found
            done = kernels.quantize_rows(rows, code, self.method, EVERYWHERE, self.weights)
            return done, stored_parameters(done.segments, code)
        x = kernels.values(rows)
        groups, counts = to_groups(x, code.block)
        p = kernels.fit(groups, code, self.method, counts, self.weights, whole=True)
        if not code.block:
            p = Parameters(round_scale(p.scale, self.layout.scale_dtype, np.abs(p.scale)), p.zero)
        squares = None if self.weights is None else self.weights.mean_square
        return kernels.encode_rows(x, code, p, squares), p

    def _integers(self, done: Encoded, p: Parameters, tile: Tile) -> IntegerRows:
        code = self.code
        codes = kernels.load_codes(bytes(done.segments["codes"]), code).reshape(tile.rows, -1)
        shape = (tile.rows, code.row_groups)
        middle = 1 << (code.bits - 1)
        zero = np.full(shape, middle) if code.symmetric else p.zero // zero_steps(code.bits)
        return IntegerRows(
            codes=codes[:, : tile.columns].astype(np.int16),
            zero=zero.reshape(shape).astype(np.int32),
            scale=p.scale.reshape(shape),
            offset=None,
            group=code.block or tile.columns,
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


def as_codes(rows: IntegerRows) -> U8:
    """Codes of rows as bytes, (R, C)."""
    return rows.codes.astype(np.uint8)
