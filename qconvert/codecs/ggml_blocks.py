"""How tensors lie in a GGUF file: numbers, ggml's blocks of rows, and NVFP4 with a scale of the
tensor beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.codec import Coded, Encoding, Grain, Grid, Segment, Stored, rescaled_numbers
from qconvert.codecs.raw import RawEncoding
from qconvert.codecs.units import (
    byte_scales,
    centred,
    exact_scales,
    nearest_bytes,
    reciprocal,
    regrouped,
    values_of,
    with_offset,
)
from qconvert.errors import UnsupportedError
from qconvert.geometry import Tile
from qconvert.ggml_types import GGML_TYPES, GgmlType
from qconvert.kernels.records import F32, U8, Bytes, IntegerRows
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.kernels.reference.ggml.codes import CODE_LAYOUTS
from qconvert.model import DTYPES

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


# --- NVFP4 with a scale of the tensor -------------------------------------------------------------

SCALED = "NVFP4_SCALED"  # as a dtype: blocks, and behind them the scale
FACTOR = "factor"  # its segment
FACTOR_BYTES = 4
CLOSE = 2.0**-22  # by what part scales may change where a divisor becomes a factor


@dataclass(frozen=True, slots=True)
class ScaledBlocks(Encoding):
    """Blocks of NVFP4 whose values are all multiplied by one number more, an F32 tensor of its own
    in the file: (2 code) · (scale · factor / 2), rounded to binary32 twice.

    Attributes:
        factor: that scales which are moved here are divided by.
    """

    factor: float = 1.0

    @property
    def name(self) -> str:
        return SCALED

    @property
    def bits(self) -> float:
        return _NVFP4.bits

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return (*_NVFP4.segments(shape), Segment(FACTOR, FACTOR_BYTES))

    def to_json(self) -> dict[str, object]:
        return _NVFP4.to_json()

    def values(self, stored: Stored, start: int, stop: int) -> NDArray[Any]:
        if start == stop:
            return np.empty(0, np.float32)
        block = _NVFP4.type.block
        first, last = start // block, -(-stop // block)
        tile = Tile(last - first, block, first * block, True)
        values = self.coded(stored, tile).values.ravel()
        return values[start - tile.start : stop - tile.start]

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        found = _NVFP4.coded(stored, tile)
        if found.integers is None or found.grid is None:  # a run that ends inside a block
            values = self.values(stored, tile.start, tile.stop)
            return Coded(values.reshape(tile.rows, tile.columns))
        factor = self._factor(stored)
        with np.errstate(over="ignore"):
            integers = replace(found.integers, scale=found.integers.scale * factor)
            grid = replace(found.grid, scale=found.grid.scale * factor)
        return Coded(values_of(integers), integers, grid)

    def _factor(self, stored: Stored) -> np.float32:
        found: np.float32 = np.frombuffer(stored.read(FACTOR, 0, FACTOR_BYTES), "<f4")[0]
        return found

    @property
    def grain(self) -> Grain | None:
        return _NVFP4.grain

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        return rows

    def divisor(self, stored: Stored) -> float:
        return float(reciprocal(self._factor(stored)))

    def multiplied(self, stored: Stored) -> float | None:
        return float(self._factor(stored))

    def divided(self, divisor: float, factor: float | None = None) -> ScaledBlocks | None:
        if factor is None:
            # Eight times it has to be eight divided by the other: no other number could do.
            factor = float(np.float32(1) / np.float32(divisor))
        usable = 0 < factor < math.inf
        return ScaledBlocks(factor) if usable else None

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        """See `Encoding.held`; scales may be a few units in the last place off."""
        found = regrouped(rows, GGML_BLOCKS[_NVFP4.name].group)
        if found is None or np.signbit(found.scale).any():
            return None
        scale = self._own(found.scale) * np.float32(self.factor)
        close = np.abs(scale - found.scale) <= found.scale * np.float32(CLOSE)
        return replace(found, scale=scale) if close.all() else None

    def _own(self, scale: F32) -> F32:
        """Scales of doubled codes as blocks have them: the nearest to these without the factor."""
        with np.errstate(over="ignore", invalid="ignore"):
            data = nearest_bytes(scale * np.float32(2) / np.float32(self.factor), _E4M3)
        found: F32 = kernels.widen(data.tobytes(), _E4M3).reshape(scale.shape)
        return found / np.float32(2)

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        return _NVFP4.laid(replace(rows, scale=self._own(rows.scale)))

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        return {FACTOR: np.float32(self.factor).astype("<f4").tobytes()}

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        return _NVFP4.unscalable(shape)


_NVFP4 = GgmlEncoding(GGML_TYPES["NVFP4"])
_E4M3 = FLOATING[_NVFP4.name]


def scaled_values(blocks: U8, factor: np.float32) -> F32:
    """What blocks of NVFP4 (n, bytes) are worth with a scale of the tensor, (n, 64)."""
    kind = GGML_BLOCKS[_NVFP4.name]
    parts = kind.splitter(blocks)
    scale = parts.scale.reshape(len(blocks), -1) * factor
    codes = parts.codes.reshape(len(blocks), -1)
    return values_of(IntegerRows(codes, np.zeros(scale.shape, np.int32), scale, None, kind.group))


def encoding_of(dtype: str) -> Encoding:
    """How a tensor of this type lies in a GGUF file: plain numbers are no blocks."""
    if dtype in DTYPES:
        return RawEncoding(dtype)
    return ScaledBlocks() if dtype == SCALED else GgmlEncoding(GGML_TYPES[dtype])


def segment_start(kind: str, nbytes: int) -> int:
    """Where a segment begins in a tensor of so many bytes: the scale lies behind the blocks."""
    return nbytes - FACTOR_BYTES if kind == FACTOR else 0


def type_of(dtype: str) -> str:
    """The type by which the file lists it."""
    return _NVFP4.name if dtype == SCALED else dtype
