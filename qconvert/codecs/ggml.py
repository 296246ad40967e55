"""ggml's block types: rows of blocks, each with its scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.codec import (
    Codec,
    Coded,
    Encoder,
    Encoding,
    Facts,
    Grain,
    Grid,
    Outcome,
    Segment,
    Stored,
    rescaled_numbers,
    smaller,
)
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.raw import RawEncoding
from qconvert.codecs.source import (
    RUN_VALUES,
    finite_weights,
    largest_weight,
    source_rows,
    tiles_of,
)
from qconvert.codecs.units import byte_scales, centred, exact_scales, regrouped, with_offset
from qconvert.errors import UnsupportedError, WeightError
from qconvert.geometry import Tile
from qconvert.ggml_types import GGML_TYPES, GgmlType
from qconvert.kernels.records import (
    F32,
    U8,
    Bytes,
    CodeGrid,
    Encoded,
    ErrorSums,
    IntegerRows,
    Multiples,
)
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.kernels.reference.ggml.codes import CODE_LAYOUTS
from qconvert.kernels.reference.ggml.scales import HALF_SCALES, STEPS, with_half
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.schemes import GgmlScheme

# Where a block has the float16 numbers that all of its values are multiples of, d and, of types
# with minima, m: the first byte and how many (block structures in ggml-common.h at 0c1e57098).
HALVES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0"), (0, 1)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 2), "Q3_K": (108, 1), "Q6_K": (208, 1), "TQ1_0": (52, 1), "TQ2_0": (64, 1)},
}
# Types whose codes can move to another encoding, and how many bits these have.
MOVABLE = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
# The same of small floating numbers, and the type of the scales in a block's first bytes.
FLOATING = {"MXFP4": "F8_E8M0", "NVFP4": "F8_E4M3"}


@dataclass(frozen=True, slots=True)
class GgmlEncoding(Encoding):
    """Blocks of a ggml type, along the last dimension."""

    type: GgmlType

    @property
    def name(self) -> str:
        return self.type.name

    @property
    def bits(self) -> float:
        return 8 * self.type.nbytes / self.type.block

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return (Segment("data", math.prod(shape) // self.type.block * self.type.nbytes),)

    def to_json(self) -> dict[str, object]:
        raise AssertionError("no qblk file has ggml's types")

    def values(self, stored: Stored, start: int, stop: int) -> NDArray[Any]:
        t = self.type
        if start == stop:
            return np.empty(0, np.float32)
        first, last = start // t.block, -(-stop // t.block)
        values = self._decoded(self._blocks(stored, first, last), stored).ravel()
        skipped = first * t.block
        return values[start - skipped : stop - skipped]

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        t, shape = self.type, (tile.rows, tile.columns)
        kind = GGML_BLOCKS.get(t.name)
        if kind is None or tile.start % t.block or tile.columns % t.block:
            return Coded(self.values(stored, tile.start, tile.stop).reshape(shape))
        data = self._blocks(stored, tile.start // t.block, tile.stop // t.block)
        parts = kind.splitter(data)
        scale = parts.scale.reshape(tile.rows, -1)

        def by_group(of_blocks: F32 | None) -> F32 | None:
            if of_blocks is None:
                return None
            return np.repeat(of_blocks, kind.block // kind.group).reshape(scale.shape)

        of_scale, of_offset = kind.rounding(data)
        integers = IntegerRows(
            codes=parts.codes.reshape(shape),
            zero=np.zeros(scale.shape, np.int32),
            scale=scale,
            offset=None if parts.offset is None else parts.offset.reshape(scale.shape),
            group=kind.group,
        )
        grid = Grid(
            scale=scale * np.float32(kind.gap),  # of a step, the widest gap between two codes
            low=kind.codes[0],
            high=kind.codes[1],
            code_step=kind.gap,
            always_scaled=False,
            scale_rounding=by_group(of_scale),
            offset_rounding=by_group(of_offset),
        )
        return Coded(self._decoded(data, stored).reshape(shape), integers, grid)

    @property
    def grain(self) -> Grain | None:
        if self.type.name in FLOATING:
            return Grain("e2m1", 4, GGML_BLOCKS[self.type.name].group)
        bits = MOVABLE.get(self.type.name)
        return Grain("int", bits, self.type.block) if bits else None

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        if rows.offset is not None or self.type.name in FLOATING:  # codes are as they should be
            return rows
        middle = 1 << (MOVABLE[self.type.name] - 1)
        return replace(rows, codes=rows.codes + np.int16(middle), zero=rows.zero + middle)

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        if self.type.name in FLOATING:
            small = regrouped(rows, GGML_BLOCKS[self.type.name].group)
            return None if small is None or self._byte_scales(small) is None else small
        found = regrouped(rows, self.type.block)
        if found is None or not exact_scales(found, "F16"):
            return None
        bits = MOVABLE[self.type.name]
        return with_offset(found, bits, "F16") if self._has_offset else centred(found, bits)

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        layout, block = CODE_LAYOUTS[self.type.name], self.type.block
        data = np.zeros((rows.codes.size // block, self.type.nbytes), np.uint8)
        if self.type.name in FLOATING:
            scales = self._byte_scales(rows)
            assert scales is not None  # or they would not have been held
            data[:, : block // rows.group] = scales.reshape(len(data), -1)
            data = layout.written(data, layout.places(rows.codes.reshape(-1, block)))
            return {"data": data.reshape(-1).data}
        halves = [rows.scale] if rows.offset is None else [rows.scale, rows.offset]
        numbers = np.stack([h.ravel() for h in halves], axis=1).astype("<f2")
        data[:, : 2 * len(halves)] = numbers.view(np.uint8)
        codes = rows.codes.reshape(-1, block)
        if self.type.name == "Q8_0":  # -128 as well, which is read though ggml does not write it
            data[:, 2:] = (codes - np.int16(128)).astype(np.int8).view(np.uint8)
        else:
            data = layout.written(data, codes.astype(np.uint8))
        return {"data": data.reshape(-1).data}

    def _byte_scales(self, rows: IntegerRows) -> U8 | None:
        """Scales of doubled codes as blocks have them; None where they have no such."""
        return byte_scales(rows.scale * np.float32(2), FLOATING[self.type.name])

    @property
    def _has_offset(self) -> bool:
        return HALVES[self.type.name][1] > 1

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        return None if self.type.name in HALVES else "its scales are not numbers of 16 bits"

    def rescaled(self, stored: Stored, first: int, factors: F32) -> dict[str, Bytes]:
        count = stored.shape[-1] // self.type.block
        place, halves = HALVES[self.type.name]
        part = slice(place, place + 2 * halves)
        blocks = self._blocks(stored, first * count, (first + len(factors)) * count).copy()
        scales = np.ascontiguousarray(blocks[:, part]).view("<f2")
        scaled = rescaled_numbers(scales, np.repeat(factors, count))
        blocks[:, part] = scaled.view(np.uint8)
        return {"data": blocks.reshape(-1).data}

    def _blocks(self, stored: Stored, first: int, last: int) -> U8:
        """Blocks ``first..last``, one a row."""
        nbytes = self.type.nbytes
        raw = stored.read("data", first * nbytes, (last - first) * nbytes)
        return np.frombuffer(raw, np.uint8).reshape(-1, nbytes)

    def _decoded(self, blocks: U8, stored: Stored) -> F32:
        if self.type.name in GGML_BLOCKS:
            return kernels.ggml_decode(self.type.name, blocks)
        import gguf  # 0.1 s, for types that nothing here writes

        kind = gguf.GGMLQuantizationType[self.type.name]
        try:
            # One row: gguf works through rows in small groups, which is slow when a row is a block.
            with np.errstate(over="ignore", invalid="ignore"):  # Inf and NaN scales are the file's
                found: F32 = gguf.quants.dequantize(blocks.reshape(1, -1), kind)
        except NotImplementedError:
            raise UnsupportedError(
                f"type {self.type.name} cannot be decoded",
                path=stored.path,
                tensor=stored.name,
                code="GGUF-DECODE",
            ) from None
        return found


@dataclass(frozen=True, slots=True)
class GgmlEncoder(Encoder):
    """Blocks of a ggml type.

    Attributes:
        importance: of the input channels, (columns,), or (matrices, columns) for experts.
        rounder: see `Facts`.
    """

    model: Model
    tensor: TensorInfo
    type: GgmlType
    importance: F32 | None = None
    rounder: Rounder | None = None

    @property
    def encoding(self) -> Encoding:
        return GgmlEncoding(self.type)

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        rows, weights = source_rows(self.model, self.tensor, tile), self._importance(tile)
        if weights is not None:
            weights = weights.reshape(-1, self.type.block)
        with finite_weights(self.model, self.tensor):
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
        if self.rounder is None or not finite:
            return done
        return self._compensated(kernels.values(rows), data, self.rounder)

    def _compensated(self, x: F32, data: U8, rounder: Rounder) -> Encoded:
        """Blocks of whole rows (R, C) with other codes than those of ``data``, and with scales and
        minima of groups that suit them; the numbers that groups of a block share stay.
        """
        name = self.type.name
        kind, layout, steps = GGML_BLOCKS[name], CODE_LAYOUTS[name], STEPS.get(name)
        parts = kind.splitter(data)
        shape = (len(x), x.shape[1] // kind.group)
        scale = np.ascontiguousarray(parts.scale).reshape(shape)
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
        values = kernels.ggml_decode(name, data).reshape(x.shape)
        sums = kernels.error_sums(x, values)
        return Encoded({"data": data.reshape(-1).data}, ErrorSums(x.size, *sums))

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
    return GgmlEncoding(GGML_TYPES[scheme.ggml_type])


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
    return GgmlEncoder(model, tensor, kind, importance, facts.rounder)


def _uncompensated(scheme: GgmlScheme, tensor: TensorInfo) -> str | None:
    if scheme.ggml_type in CODE_LAYOUTS:
        return None
    return f"codes of {scheme.ggml_type} are not rounded that way"


def encoding_of(ggml_type: str) -> Encoding:
    """How a tensor of this type lies in a GGUF file: plain numbers are no blocks."""
    if ggml_type in DTYPES:
        return RawEncoding(ggml_type)
    return GgmlEncoding(GGML_TYPES[ggml_type])


CODEC: Codec[GgmlScheme] = Codec(
    *("ggml", _planned, _refuses, _encoder), uncompensated=_uncompensated
)
