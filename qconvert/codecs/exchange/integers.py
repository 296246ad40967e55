"""Layouts of integer codes with a scale, and perhaps a zero point, for each group of columns.

Codes here are unsigned, 0..2^bits - 1, and zero points whole codes: value = (code - zero) · scale,
as every format has them that is made of such groups. What differs is how they are packed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.affine.compensated import compensated, stored_parameters
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.weighting import weighting
from qconvert.codecs.codec import Coded, Encoder, Facts, Grain, Grid, Outcome, Stored, smaller
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.source import RUN_VALUES, finite_weights, source_rows, tiles_of
from qconvert.codecs.units import centred, exact_scales, regrouped, values_of
from qconvert.encoding import BITS, BLOCKS
from qconvert.exchange_schemes import ExchangeScheme
from qconvert.geometry import Tile, spans_tiles
from qconvert.kernels.arithmetic import SCALE_NUMPY, round_scale, to_groups, zero_steps
from qconvert.kernels.records import (
    F32,
    I32,
    U8,
    Bytes,
    Encoded,
    IntegerRows,
    Parameters,
    Weighting,
)
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod, default_method

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
        gathers: of ``codes``, ``scale`` and ``zero``, what `whole` needs of all rows.
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

    @abstractmethod
    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        """What is stored of some rows and columns; these begin at a multiple of 256 and of the
        group.
        """

    def pieces(self, rows: IntegerRows) -> dict[str, Bytes]:
        """Parts of whole rows that follow each other in their tensors, by kind."""
        return {}

    def whole(self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]) -> dict[str, Bytes]:
        """The other parts, of a weight of this shape and what was gathered of its rows: codes and
        zero points uint8, (R, C) and (R, G), scales float32 (R, G).
        """
        return {}

    @property
    def grain(self) -> Grain:
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

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        return self.pieces(rows)

    def gathered(self, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
        rows, columns = shape
        sizes: dict[str, tuple[type, int]] = {
            "codes": (np.uint8, columns),
            "scale": (np.float32, self.groups(columns)),
            "zero": (np.uint8, self.groups(columns)),
        }
        return {k: np.zeros((rows, sizes[k][1]), sizes[k][0]) for k in self.gathers}

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        return self.whole(shape, rows)

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
        found = np.frombuffer(data, SCALE_NUMPY[self.scale_dtype]).astype(np.float32)
        return np.broadcast_to(found.reshape(-1, groups), (count, groups))


def misfit(layout: IntegerLayout, tensor: TensorInfo, scheme: str) -> str | None:
    """Why a tensor cannot take an integer layout, or would not be smaller; None where it can."""
    if len(tensor.shape) != 2:
        return "no matrix of two dimensions, which is what readers of the format quantize"
    columns = tensor.shape[1]
    if layout.group and columns % layout.group:
        return f"rows of {columns:,} values do not divide into groups of {layout.group}"
    if spans_tiles(columns):
        return f"rows of {columns:,} values are too long"
    return smaller(layout, tensor, scheme)


def writable(scheme: ExchangeScheme) -> bool:
    """Whether our search has a grid like the scheme's."""
    return scheme.bits in BITS and (not scheme.group or scheme.group in BLOCKS)


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
    gathered: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def encoding(self) -> IntegerLayout:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows, code, weights = source_rows(self.model, self.tensor, tile), self.code, self.weights
        with finite_weights(self.model, self.tensor):
            done = kernels.quantize_rows(rows, code, self.method, EVERYWHERE, weights)
        squares = None if weights is None else weights.mean_square
        p = found = stored_parameters(done.segments, code)
        if not self.layout.group:
            shown = round_scale(found.scale, self.layout.scale_dtype, np.abs(found.scale))
            p = Parameters(shown, found.zero)
        x = kernels.values(rows)
        if not self.layout.symmetric:
            p = whole_zero_points(x, code, p, weights)
        if p is not found:
            done = replace(done, **_again(x, code, p, squares))
        if self.rounder:
            done = compensated(x, done, p, code, self.rounder, squares)
            if code.block:
                p = Parameters(stored_parameters(done.segments, code).scale, p.zero)
        integers = self._integers(done, p, tile)
        self._gather(integers, tile)
        return replace(done, segments=self.layout.pieces(integers))

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

    def _gather(self, rows: IntegerRows, tile: Tile) -> None:
        first = tile.start // tile.columns
        for kind, whole in self.gathered.items():
            whole[first : first + tile.rows] = getattr(rows, kind)

    def shared(self) -> dict[str, Bytes]:
        return self.layout.whole(self.tensor.shape, self.gathered)

    def outcome(self, seen: Encoded) -> Outcome:
        note: dict[str, Any] = {"range": self.method.describe()}
        if self.rounder:
            note |= self.rounder.note()
        weighted = self.weights is not None
        return Outcome(seen.error, note, clipped=seen.error.clipped, weighted=weighted)


def _again(x: F32, code: Affine, p: Parameters, squares: F32 | None) -> dict[str, Any]:
    """Segments and error of rows encoded with other parameters than those found for them."""
    done = kernels.encode_rows(x, code, p, squares)
    return {"segments": done.segments, "error": done.error}


def whole_zero_points(x: F32, code: Affine, p: Parameters, weights: Weighting | None) -> Parameters:
    """Zero points that are whole codes, and scales that suit them, for rows (R, C).

    Tried are the two whole codes about each zero point, with the scale that was found and with one
    that clips a twelfth of the wider side; either once more with the scale of least squares for the
    codes that come out. Of all these stays what leaves least error in its group, the first of equal
    ones: within 0.15 dB of a search through all zero points and scales.
    """
    steps = zero_steps(code.bits)
    if steps == 1:
        return p
    groups, counts = to_groups(x, code.block)
    weight = np.ones_like(groups)
    if counts is not None:
        weight[np.arange(groups.shape[1]) >= counts[:, None]] = 0
    if weights is not None:
        weight = np.tile(weights.weight, (len(groups) // len(weights.weight), 1))
    best, least = p, np.full(len(groups), np.inf)
    lower = p.zero // steps
    for zero in (lower, np.minimum(lower + 1, code.levels)):
        for start in (p.scale, _clipping(groups, code, zero, p.scale)):
            scale = start
            for last in (False, True):
                now = Parameters(scale, (zero * steps).astype(np.int32))
                noise, fitted = _tried(groups, weight, code, now)
                better = noise < least
                least = np.where(better, noise, least)
                best = Parameters(
                    np.where(better, now.scale, best.scale),
                    np.where(better, now.zero, best.zero),
                )
                scale = scale if last else fitted
    return best


def _clipping(groups: F32, code: Affine, zero: I32, found: F32) -> F32:
    """Scales that leave a twelfth of the wider side beyond the grid; those found where there is no
    side.
    """
    above, below = code.levels - zero, zero
    top, bottom = groups.max(axis=1), -groups.min(axis=1)
    nothing = np.zeros_like(found)
    up = np.divide(top, above, out=nothing.copy(), where=above > 0, casting="unsafe")
    down = np.divide(bottom, below, out=nothing, where=below > 0, casting="unsafe")
    scale = np.maximum(up, down) * np.float32(11 / 12)
    return _stored_scale(np.where(scale > 0, scale, found), code)


def _tried(
    groups: F32, weight: F32, code: Affine, p: Parameters
) -> tuple[NDArray[np.float64], F32]:
    """Σ w (x - x')² of each group, (G,), and the scales of least squares for its codes."""
    codes, _ = kernels.encode(groups, p.scale, p.zero, code.bits, code.symmetric)
    steps = codes.astype(np.float32) - (p.zero // zero_steps(code.bits))[:, None]
    steps = steps.astype(np.float32)
    difference = groups - steps * p.scale[:, None]
    noise: NDArray[np.float64] = (weight * difference * difference).sum(axis=1, dtype=np.float64)
    cross = (weight * groups * steps).sum(axis=1, dtype=np.float64)
    square = (weight * steps * steps).sum(axis=1, dtype=np.float64)
    fits = (cross > 0) & (square > 0)
    scale = np.divide(cross, square, out=p.scale.astype(np.float64), where=fits)
    return noise, _stored_scale(scale.astype(np.float32), code)


def _stored_scale(scale: F32, code: Affine) -> F32:
    return round_scale(scale, code.scale_dtype, np.abs(scale))


def integer_encoder(
    model: Model, tensor: TensorInfo, layout: IntegerLayout, facts: Facts
) -> IntegerEncoder:
    """The encoder of a matrix that has no `misfit`."""
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
        layout.gathered(tensor.shape),
    )


def as_codes(rows: IntegerRows) -> U8:
    """Codes of rows as bytes, (R, C)."""
    return rows.codes.astype(np.uint8)
