"""Codes of a table of 16 numbers with a scale a block, NF4 and FP4 as bitsandbytes has them:
formats/schemes/SPEC.md section 10, formats/qblk/SPEC.md section 3.2.

A block's scale is its largest magnitude. Blocks run over the flattened tensor, as there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import (
    Codec,
    Coded,
    Encoder,
    Encoding,
    Facts,
    HeaderFields,
    Outcome,
    Segment,
    Stored,
    rescaled_numbers,
    smaller,
)
from qconvert.codecs.codes import Codes
from qconvert.codecs.compensation import Rounder, values_at_once
from qconvert.codecs.source import RUN_VALUES, rows_of
from qconvert.geometry import Tile, tiles
from qconvert.kernels.arithmetic import lane_sum, nearest_entries, table_codes, to_groups
from qconvert.kernels.records import F32, U8, Bytes, CodeGrid, Encoded, ErrorSums
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.schemes import CODEBOOK_BLOCKS, CODEBOOKS, CodebookScheme

_LITTLE = np.dtype("<f4")
SCALES_BLOCK = 256  # scales that are quantized with one scale of theirs
CHECKED_SCALES = 1 << 18  # looked at at once


@cache
def table_of(book: str) -> F32:
    """The numbers of a table, (16,)."""
    return np.array(CODEBOOKS[book], np.float32)


@cache
def scale_table() -> F32:
    """What an 8-bit scale counts for, ascending, (256,): 1, 0, and seven decades with 2^k numbers
    either side in the k-th. Dettmers, 8-bit Approximations for Parallelism in Deep Learning (2016).
    """
    found = [np.zeros(1), np.ones(1)]
    first, last = np.float32(0.1), np.float32(1)
    for decade in range(7):
        count = 1 << decade
        step = np.float64((last - first) / np.float32(count))
        k = np.arange(count + 1)  # counted from the nearer end
        ends = np.where(2 * k < count + 1, first + step * k, last - step * (count - k))
        if count == 1:
            ends = np.array([first, last])
        ends = ends.astype(np.float32)
        middle = (ends[:-1] + ends[1:]) / np.float32(2)
        numbers = np.float32(10.0 ** (decade - 6)) * middle
        found += [numbers, -numbers]
    table = np.sort(np.concatenate(found)).astype(np.float32)
    table.setflags(write=False)
    return table


@dataclass(frozen=True, slots=True)
class CodebookEncoding(Encoding):
    """Codes of 4 bits, two a byte, and a scale for every ``block`` values of the flattened tensor.

    Attributes:
        book: a name of `CODEBOOKS`.
        double: whether scales are quantized in turn.
    """

    book: str
    block: int
    double: bool

    @property
    def name(self) -> str:
        return CodebookScheme(self.book, self.block, self.double).name

    @property
    def bits(self) -> float:
        return 4

    def blocks(self, shape: tuple[int, ...]) -> int:
        """Blocks of a tensor, the last perhaps shorter."""
        return -(-math.prod(shape) // self.block)

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        codes, blocks = Segment("codes", -(-math.prod(shape) // 2)), self.blocks(shape)
        if not self.double:
            return codes, Segment("scales", 4 * blocks)
        of_scales = Segment("scale_scales", 4 * -(-blocks // SCALES_BLOCK))
        return codes, Segment("scales", blocks), of_scales, Segment("scale_offset", 4)

    def to_json(self) -> dict[str, object]:
        return {
            "block": self.block,
            "kind": "codebook",
            "scale_dtype": "U8" if self.double else "F32",
            "table": self.book,
        }

    # --- reading ---

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        first, last = tile.start // self.block, -(-tile.stop // self.block)
        begin, end = first * self.block, min(last * self.block, math.prod(stored.shape))
        values = kernels.codebook_decode(
            self._packed(stored, begin, end),
            end - begin,
            self._scales(stored, first, last),
            table_of(self.book),
            self.block,
        )
        kept = values[tile.start - begin : tile.stop - begin]
        return Coded(kept.reshape(tile.rows, tile.columns))

    def codes(self, stored: Stored) -> Codes:
        count, columns = math.prod(stored.shape), self.columns(stored.shape)
        if columns % self.block:
            columns = count  # blocks cross rows
        packed = self._packed(stored, 0, count)
        codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()[:count]
        scales = self._scales(stored, 0, self.blocks(stored.shape)).reshape(count // columns, -1)
        return Codes(
            *(codes.reshape(-1, columns), scales, np.zeros_like(scales), self.block, 4),
            table_of(self.book),
        )

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        if self.double:
            return "its scales are quantized in turn"
        if self.columns(shape) % self.block:
            return "its blocks cross rows"
        return None

    def rescaled(self, stored: Stored, first: int, factors: F32) -> dict[str, Bytes]:
        size = 4 * self.columns(stored.shape) // self.block
        raw = stored.read("scales", first * size, len(factors) * size)
        scales = np.frombuffer(raw, _LITTLE).reshape(len(factors), -1)
        return {"scales": rescaled_numbers(scales, factors).tobytes()}

    def _packed(self, stored: Stored, begin: int, end: int) -> U8:
        """The bytes of values ``begin..end`` of the flattened tensor; ``begin`` is even."""
        size = -(-end // 2) - begin // 2
        return np.frombuffer(stored.read("codes", begin // 2, size), np.uint8)

    def _scales(self, stored: Stored, first: int, last: int) -> F32:
        """Of blocks ``first..last``."""
        if not self.double:
            data = stored.read("scales", 4 * first, 4 * (last - first))
            return np.frombuffer(data, _LITTLE).astype(np.float32)
        codes = np.frombuffer(stored.read("scales", first, last - first), np.uint8)
        low, high = first // SCALES_BLOCK, -(-last // SCALES_BLOCK)
        wide = np.frombuffer(stored.read("scale_scales", 4 * low, 4 * (high - low)), _LITTLE)
        offset = np.frombuffer(stored.read("scale_offset", 0, 4), _LITTLE)
        each = wide[np.arange(first, last) // SCALES_BLOCK - low]
        return _scales_of(codes, each.astype(np.float32), offset.astype(np.float32))

    def check(self, stored: Stored) -> None:
        """Hold the payload against QBLK-020 and QBLK-023."""
        for kind, size in ((s.kind, s.size) for s in self.segments(stored.shape)):
            if kind != "codes" and not (kind == "scales" and self.double):
                self._check_numbers(stored, kind, size)
        count = math.prod(stored.shape)
        if count % 2 and stored.read("codes", count // 2, 1)[0] & 15:
            stored.refuse(23, "the half byte behind the last code is not 0")

    def _check_numbers(self, stored: Stored, kind: str, size: int) -> None:
        for start in range(0, size, 4 * CHECKED_SCALES):
            data = stored.read(kind, start, min(4 * CHECKED_SCALES, size - start))
            scales = np.frombuffer(data, _LITTLE)
            if not np.isfinite(scales).all():
                stored.refuse(20, f"a number of {kind} is not finite")
            if kind != "scale_offset" and np.signbit(scales).any():
                stored.refuse(20, f"a number of {kind} is negative")


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CodebookEncoder(Encoder):
    """The nearest entry of the table for every value.

    Attributes:
        scales: of all blocks, with which codes are made; None where a tile finds its own.
        stored: the bytes of scales that were quantized, by the kind of segment.
        rounder: see `Facts`.
    """

    model: Model
    tensor: TensorInfo
    code: CodebookEncoding
    scales: F32 | None
    stored: Mapping[str, Bytes]
    rounder: Rounder | None = None

    @property
    def encoding(self) -> CodebookEncoding:
        return self.code

    def tiles(self) -> Iterator[Tile]:
        if self.rounder is None:
            return tiles(1, self.tensor.size, RUN_VALUES)
        columns = self.tensor.shape[-1]
        whole = math.lcm(columns, self.code.block)  # rows that end where a block does
        most = values_at_once(self.rounder, self.tensor, max(RUN_VALUES // whole, 1) * whole)
        return tiles(self.tensor.size // columns, columns, most)

    def encode(self, tile: Tile) -> Encoded:
        rows = rows_of(self.model, self.tensor, tile)
        x = rows.ravel()
        block, table = self.code.block, table_of(self.code.book)
        if self.scales is None:
            scale = _magnitudes(x, block)
            segments: dict[str, Bytes] = {"scales": scale.astype(_LITTLE).tobytes()}
        else:
            first = tile.start // block
            scale, segments = self.scales[first : first + -(-len(x) // block)], {}
        codes = kernels.codebook_encode(x, scale, table, block)
        if self.rounder:
            codes, scale = self._compensated(rows, codes, scale, self.rounder)
            if self.scales is None:
                segments["scales"] = scale.astype(_LITTLE).tobytes()
        values = kernels.codebook_decode(codes, len(x), scale, table, block)
        error = ErrorSums(len(x), *kernels.error_sums(x, values))
        return Encoded({"codes": codes.data, **segments}, error)

    def _compensated(self, rows: F32, packed: U8, scale: F32, rounder: Rounder) -> tuple[U8, F32]:
        """Other codes for whole rows (R, C) than the nearest, packed like these, and scales: others
        where each is of one row and stored by itself.
        """
        columns, table = rows.shape[1], table_of(self.code.book)
        length = math.gcd(columns, self.code.block)  # of what lies in one row and one block
        groups = np.repeat(scale, self.code.block // length)[: rows.size // length]
        groups = groups.reshape(len(rows), -1)
        _, entries = nearest_entries(table)  # codes by their place among the levels
        places = np.zeros(len(table), np.uint8)
        places[entries] = np.arange(len(entries))
        nothing = np.zeros_like(groups)
        grid = CodeGrid(table[entries], groups, nothing, nothing, length)
        codes = np.stack([packed >> 4, packed & 15], axis=1).ravel()[: rows.size]
        own = "F32" if length == self.code.block and self.scales is None else None
        placed, grid = rounder.codes(rows, places[codes].reshape(rows.shape), grid, own)
        codes = entries[placed].ravel()
        padded = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)])
        return padded[0::2] << 4 | padded[1::2], grid.scale.ravel() if own else scale

    def shared(self) -> Mapping[str, Bytes]:
        return self.stored

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(seen.error, self.rounder.note() if self.rounder else None)


def _magnitudes(x: F32, block: int) -> F32:
    """The largest magnitude of each block of a run of values."""
    groups, counts = to_groups(x[None, :], block)
    return kernels.extent(groups, counts).magnitude


def _scales_of(codes: U8, wide: F32, offset: F32 | np.float32) -> F32:
    """Scales (K,) from their codes (K,) and the scale of each of these (K,)."""
    with np.errstate(over="ignore", invalid="ignore"):  # `check` finds what is not finite
        scales: F32 = scale_table()[codes] * wide + offset
    return scales


def _quantized(scales: F32) -> tuple[F32, dict[str, Bytes]]:
    """Scales as 8-bit codes of `scale_table`, after their mean is taken away: what they become, and
    the bytes.
    """
    offset = np.float32(lane_sum(scales.astype(np.float64)) / len(scales))
    left = scales - offset
    wide = _magnitudes(left, SCALES_BLOCK)
    each = np.repeat(wide, SCALES_BLOCK)[: len(left)]
    codes = table_codes(left, each, scale_table())
    return _scales_of(codes, each, offset), {
        "scales": codes.tobytes(),
        "scale_scales": wide.astype(_LITTLE).tobytes(),
        "scale_offset": offset.astype(_LITTLE).tobytes(),
    }


def _planned(scheme: CodebookScheme, tensor: TensorInfo) -> CodebookEncoding:
    return CodebookEncoding(scheme.book, scheme.block, scheme.double)


def _refuses(scheme: CodebookScheme, tensor: TensorInfo) -> str | None:
    return smaller(_planned(scheme, tensor), tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: CodebookScheme, facts: Facts) -> Encoder:
    """Raises a WeightError on NaN and Inf, where all of the tensor is looked at first."""
    encoding = _planned(scheme, tensor)
    if not scheme.double:
        return CodebookEncoder(model, tensor, encoding, None, {}, facts.rounder)

    def magnitudes(tile: Tile) -> F32:
        return _magnitudes(rows_of(model, tensor, tile).ravel(), scheme.block)

    found = facts.mapper(magnitudes, tiles(1, tensor.size, RUN_VALUES))
    scales, stored = _quantized(np.concatenate(list(found)))
    return CodebookEncoder(model, tensor, encoding, scales, stored, facts.rounder)


def _parse(fields: HeaderFields) -> Encoding:
    book, scale_dtype = fields.text("table"), fields.text("scale_dtype")
    block = fields.integer("block")
    if (
        book not in CODEBOOKS
        or block not in CODEBOOK_BLOCKS
        or scale_dtype not in ("F32", "U8")
        or not DTYPES[fields.source_dtype].floating
    ):
        fields.impossible("codebook encoding")
    if 0 in fields.shape:
        fields.refuse(15, "a codebook encoding of an empty tensor")
    return CodebookEncoding(book, block, scale_dtype == "U8")


def _passes(scheme: CodebookScheme, tensor: TensorInfo) -> bool:
    return scheme.double


CODEC: Codec[CodebookScheme] = Codec(
    *("codebook", _planned, _refuses, _encoder, _parse, _passes),
    uncompensated=lambda scheme, tensor: None,
)
