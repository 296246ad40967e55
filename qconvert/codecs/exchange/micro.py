"""Small floating numbers with a byte of scale for a group of columns: MXFP4, MXFP6 and MXFP8 (OCP
Microscaling Formats 1.0), and NVFP4, whose tensors have a scale of their own besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.codec import Coded, Grain, Read, Stored
from qconvert.codecs.exchange.floats import LARGEST as LARGEST_E4M3
from qconvert.codecs.exchange.layout import (
    Layout,
    Part,
    check_finite,
    furthest,
    refuse_values,
    ungrouped,
)
from qconvert.codecs.units import byte_scales, nearest_bytes, reciprocal, regrouped
from qconvert.geometry import Tile
from qconvert.kernels.records import F32, U8, Bytes, IntegerRows
from qconvert.kernels.reference.ggml.codebooks import E2M1
from qconvert.model import DTYPES

T = TypeVar("T", bound=np.generic)

FP4, FP6, FP8 = "F4", "F6_E2M3", "F8_E4M3"  # of `qconvert.model.DTYPES`
POWERS = "F8_E8M0"
MX_GROUP, NV_GROUP = 32, 16
COMMON_CODES, COMMON_SCALES = ".codes", ".scales"  # what they are called between formats
BLOCKS, SCALES = "_blocks", "_scales"  # ends of the names of gpt-oss
LARGEST = np.float32(6) * LARGEST_E4M3  # a number of E2M1 times a scale of E4M3, at most
CLOSE = 2.0**-22  # by what part scales may change where a factor becomes a divisor
PIECE = 256  # a run of columns begins at a multiple of it: whole bytes of all numbers, and groups

# The two numbers of a byte of FP4, the one in the lower bits first.
_PAIRS = kernels.widen(bytes(range(256)), FP4).astype(np.float32).reshape(256, 2)
_UNSIGNED_PAIRS = _PAIRS + np.float32(0)  # -0 as 0
LARGEST_CODE = int(E2M1.max())  # doubled
_CODE_OF = np.zeros(2 * LARGEST_CODE + 1, np.uint8)  # of doubled codes, from the least on
_CODE_OF[E2M1[::-1] + LARGEST_CODE] = np.arange(15, -1, -1)  # and 0, not -0, in the middle
_INTEGER_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=1)


@dataclass(frozen=True, slots=True)
class Overall:
    """The scale of a whole tensor.

    Attributes:
        suffix: of its name.
        dimensions: of the tensor of this one number.
        divides: whether scales of groups are divided by it; or else multiplied.
    """

    suffix: str
    dimensions: int
    divides: bool


@dataclass(frozen=True)
class Micro(Layout):
    """Rows of small numbers, packed from the lowest bits on, and a scale for each group.

    Attributes:
        number: what codes are: `FP4`, `FP6` or `FP8`.
        packed, scales: suffix and dtype of the tensors of codes and of scales.
        group: columns that share a scale: 16 of NVFP4, whose scales are E4M3, or 32 with powers of
            two.
        overall: None where there is no scale of the tensor.
        signed_zero: whether the code of -0 is that, and not 0.
        input_scale: suffix of the scale of inputs, which readers make such numbers; empty where
            they do not.
        divides: scales that are moved here: the scale of the tensor, as a divisor.
    """

    number: str
    packed: tuple[str, str]
    scales: tuple[str, str]
    group: int
    overall: Overall | None = None
    signed_zero: bool = True
    input_scale: str = ""
    divides: float = 1.0

    @property
    def name(self) -> str:
        return f"{'mx' if self.scale_number == POWERS else 'nv'}fp{self.bits}"

    @property
    def bits(self) -> int:
        return DTYPES[self.number].bits

    @property
    def scale_number(self) -> str:
        """What bytes of scales are."""
        return FP8 if self.group == NV_GROUP else POWERS

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group)

    def uneven(self, shape: tuple[int, ...]) -> str | None:
        return ungrouped(shape[-1], self.group)

    def row_bytes(self, columns: int) -> int:
        """Of the codes of a row."""
        return columns * self.bits // 8

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        wide = columns if self.packed[1] == self.number else self.row_bytes(columns)
        found = [
            Part(*self.packed, (rows, wide)),
            Part(*self.scales, (rows, self.groups(columns))),
        ]
        if self.overall is not None:
            found.append(Part(self.overall.suffix, "F32", (1,) * self.overall.dimensions))
        if self.static:
            found.append(Part(self.input_scale, "F32", (1,)))
        return tuple(found)

    @property
    def static(self) -> bool:
        return bool(self.input_scale)

    def static_input(self, scale: float, zero_point: int) -> dict[str, Bytes]:
        """See `Layout.static_input`: a divisor of scales of groups, as that of the weights is."""
        largest = furthest(scale, zero_point)
        number = divisor_of(np.float32(largest))
        return {self.input_scale: number.astype("<f4").tobytes()}

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        values = self.decoded(stored, tile)
        if self.number != FP4:
            return Coded(values)
        codes = looked_up(_INTEGER_PAIRS, self._bytes(stored, tile))
        scale = self._scales(stored, tile)
        integers = IntegerRows(
            codes=codes[:, : tile.columns],
            zero=np.zeros(scale.shape, np.int32),
            scale=scale / np.float32(2),  # of doubled codes, which are integers
            offset=None,
            group=self.group,
        )
        return Coded(values, integers)

    def decoded(self, stored: Stored, tile: Tile) -> F32:
        raw = self._bytes(stored, tile)
        if self.number == FP4:
            pairs = _PAIRS if self.signed_zero else _UNSIGNED_PAIRS
            codes = looked_up(pairs, raw)
        else:
            codes = kernels.widen(raw.tobytes(), self.number).reshape(tile.rows, -1)
            if self.number == FP8 and not np.isfinite(codes).all():
                refuse_values(stored, f"a code of {self.packed[0]} is none", "NaN", "finite codes")
        return scaled(codes[:, : tile.columns], self._scales(stored, tile), self.group)

    def _bytes(self, stored: Stored, tile: Tile) -> U8:
        """Codes of a tile, (R, bytes)."""
        columns = stored.shape[-1]
        first, low = divmod(tile.start, columns)
        whole, begin = self.row_bytes(columns), self.row_bytes(low)
        size = whole * tile.rows
        if tile.columns != columns:
            size = min(self.row_bytes(-(-tile.columns // PIECE) * PIECE), whole - begin)
        raw = stored.read(self.packed[0], first * whole + begin, size)
        return np.frombuffer(raw, np.uint8).reshape(tile.rows, -1)

    def _scales(self, stored: Stored, tile: Tile) -> F32:
        """Of the groups of a tile, that of the tensor applied, (R, G)."""
        first, low = divmod(tile.start, stored.shape[-1])
        groups = self.groups(stored.shape[-1])
        raw = stored.read(self.scales[0], first * groups, tile.rows * groups)
        scale = kernels.widen(raw, self.scale_number).reshape(tile.rows, groups)
        if not np.isfinite(scale).all():
            what = f"a number of {self.scales[0]} is not finite"
            refuse_values(stored, what, "NaN", "finite scales")
        begin = low // self.group
        return self._applied(stored, scale[:, begin : begin + self.groups(tile.columns)])

    def _applied(self, stored: Stored, scale: F32) -> F32:
        if self.overall is None:
            return scale
        overall = np.frombuffer(stored.read(self.overall.suffix, 0, 4), "<f4")
        with np.errstate(all="ignore"):  # 0 and others that `check` refuses
            found: F32 = scale / overall if self.overall.divides else scale * overall
        return found

    # --- bytes that are those of another encoding ---

    def _common(self) -> Micro:
        """The same bytes under names that all formats share; a scale of the tensor is a factor in
        some and a divisor in others.
        """
        return Micro(self.number, (COMMON_CODES, "U8"), (COMMON_SCALES, "U8"), self.group)

    def common(self, stored: Stored) -> Stored:
        if self.overall is not None:
            return stored
        kinds = {COMMON_CODES: self.packed[0], COMMON_SCALES: self.scales[0]}
        read = partial(_renamed, stored.read, kinds)
        return replace(stored, encoding=self._common(), read=read)

    def taking(self, stored: Stored) -> Read | None:
        if self.overall is not None or stored.encoding != self._common():
            return super().taking(stored)
        kinds = {self.packed[0]: COMMON_CODES, self.scales[0]: COMMON_SCALES}
        return partial(_renamed, stored.read, kinds)

    # --- codes that move to another encoding ---

    @property
    def grain(self) -> Grain | None:
        return Grain("e2m1", 4, self.group) if self.number == FP4 else None

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        return rows  # where -0 is 0

    def divisor(self, stored: Stored) -> float:
        if self.overall is None:
            return 1.0
        found = np.frombuffer(stored.read(self.overall.suffix, 0, 4), "<f4")[0]
        return float(found) if self.overall.divides else float(reciprocal(found))

    def multiplied(self, stored: Stored) -> float | None:
        if self.overall is None or self.overall.divides:
            return None
        return float(np.frombuffer(stored.read(self.overall.suffix, 0, 4), "<f4")[0])

    def divided(self, divisor: float, factor: float | None = None) -> Micro | None:
        return None if self.overall is None else replace(self, divides=divisor)

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        """See `Encoding.held`; scales may be a few units in the last place off that are divided."""
        found = regrouped(rows, self.group)
        if found is None:
            return None
        scale = found.scale * np.float32(2)  # of codes that are not doubled
        if self.overall is None:
            return found if byte_scales(scale, self.scale_number) is not None else None
        stored: F32 = kernels.widen(self._divided(scale).tobytes(), FP8).reshape(scale.shape)
        each = stored / np.float32(self.divides)
        close = np.abs(each - scale) <= scale * np.float32(CLOSE)
        return replace(found, scale=each / np.float32(2)) if close.all() else None

    def _divided(self, scale: F32) -> U8:
        with np.errstate(over="ignore", invalid="ignore"):
            return nearest_bytes(scale * np.float32(self.divides), FP8)

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        scale = rows.scale * np.float32(2)
        if self.overall is None:
            scales = byte_scales(scale, self.scale_number)
            assert scales is not None  # or they would not have been held
        else:
            scales = self._divided(scale)
        codes = _CODE_OF[rows.codes + LARGEST_CODE]
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return {self.packed[0]: packed.tobytes(), self.scales[0]: scales.tobytes()}

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        if self.overall is None:
            return {}
        assert self.overall.divides  # only such are written
        return {self.overall.suffix: np.float32(self.divides).astype("<f4").tobytes()}

    def check(self, stored: Stored) -> None:
        count = math.prod(stored.shape[:-1]) * self.groups(stored.shape[-1])
        check_finite(stored, self.scales[0], self.scale_number, count)
        if self.number == FP8:
            check_finite(stored, self.packed[0], FP8, math.prod(stored.shape))
        if self.overall is not None:
            found = float(np.frombuffer(stored.read(self.overall.suffix, 0, 4), "<f4")[0])
            if not 0 < found < math.inf:
                what = f"the number of {self.overall.suffix}"
                refuse_values(stored, f"{what} scales nothing", found, "a positive one")


def _renamed(read: Read, kinds: Mapping[str, str], kind: str, offset: int, size: int) -> bytes:
    return read(kinds[kind], offset, size)


def divisor_of(largest: np.float32) -> np.float32:
    """The scale of a tensor with which the largest group has that at the end of E4M3's range; 1 of
    nothing but zeros.
    """
    if not largest:
        return np.float32(1)
    with np.errstate(over="ignore"):
        return np.float32(min(LARGEST / largest, np.finfo(np.float32).max))


def looked_up(pairs: NDArray[T], raw: U8) -> NDArray[T]:
    """The two numbers of each byte (R, n), (R, 2n): a pair is taken as one number, which is eight
    times as fast as an array of two.
    """
    whole = pairs.view(f"u{2 * pairs.itemsize}")[:, 0]
    return whole[raw].view(pairs.dtype)


def scaled(codes: F32, scale: F32, group: int) -> F32:
    """Numbers (R, C) times the scales of their groups (R, G); the last group may be short."""
    rows, columns = codes.shape
    with np.errstate(over="ignore", invalid="ignore"):
        if columns % group:
            return codes * np.repeat(scale, group, axis=1)[:, :columns]
        return (codes.reshape(rows, -1, group) * scale[:, :, None]).reshape(rows, columns)


@dataclass(frozen=True)
class Experts(Layout):
    """MXFP4 of gpt-oss: weights of experts, (experts, in, out) in the model, whose codes lie along
    the inputs: blocks (experts, out, in / 32, 16) and scales (experts, out, in / 32).
    """

    @property
    def name(self) -> str:
        return "mxfp4_experts"

    @property
    def bits(self) -> float:
        return 4

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        experts, inputs, outputs = shape
        grid = (experts, outputs, inputs // MX_GROUP)
        return Part(BLOCKS, "U8", (*grid, MX_GROUP // 2)), Part(SCALES, "U8", grid)

    def turned(self, stored: Stored) -> Stored:
        experts, inputs, outputs = stored.shape
        rows = Micro(FP4, (BLOCKS, "U8"), (SCALES, "U8"), MX_GROUP)
        return replace(stored, shape=(experts, outputs, inputs), encoding=rows)

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        _, inputs, outputs = stored.shape
        first, low = divmod(tile.start, outputs)
        found = []
        row, last = first, first + tile.rows
        while row < last:
            expert, begin = divmod(row, inputs)
            end = min(inputs, begin + last - row)
            found.append(self._columns(stored, expert, begin, end)[:, low : low + tile.columns])
            row += end - begin
        return Coded(np.concatenate(found))

    def _columns(self, stored: Stored, expert: int, begin: int, end: int) -> F32:
        """Inputs ``begin..end`` of an expert, (inputs, out)."""
        _, inputs, outputs = stored.shape
        first, last = begin // MX_GROUP, -(-end // MX_GROUP)  # groups
        size, groups = outputs * inputs // 2, inputs // MX_GROUP
        raw = np.frombuffer(stored.read(BLOCKS, expert * size, size), np.uint8)
        part = raw.reshape(outputs, groups, -1)[:, first:last].reshape(outputs, -1)
        codes = looked_up(_PAIRS, part)
        data = stored.read(SCALES, expert * outputs * groups, outputs * groups)
        scale = kernels.widen(data, POWERS).reshape(outputs, groups)[:, first:last]
        skipped = first * MX_GROUP
        return scaled(codes, scale, MX_GROUP)[:, begin - skipped : end - skipped].T

    def check(self, stored: Stored) -> None:
        experts, inputs, outputs = stored.shape
        check_finite(stored, SCALES, POWERS, experts * outputs * (inputs // MX_GROUP))
