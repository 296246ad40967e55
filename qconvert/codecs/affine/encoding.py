"""How codes with scales and zero points lie in a file, and what they mean: formats/qblk/SPEC.md
sections 3.2 and 4, formats/schemes/SPEC.md sections 2 to 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import (
    Coded,
    Encoding,
    Grain,
    Grid,
    HeaderFields,
    Segment,
    Stored,
    rescaled_numbers,
)
from qconvert.codecs.codes import Codes
from qconvert.codecs.units import centred, exact_scales, regrouped
from qconvert.encoding import BITS, BLOCKS, GRANULARITIES, SCALE_SIZES, AffineEncoding
from qconvert.geometry import PACK_GROUP, Tile, tiles
from qconvert.kernels.arithmetic import (
    SCALE_NUMPY,
    SIGN,
    integer_rows,
    padded_codes,
    stored_zero_points,
    zero_steps,
)
from qconvert.kernels.records import F32, I32, U8, Activations, Bytes, IntegerRows
from qconvert.model import DTYPES

CHECKED_BYTES = 1 << 20  # of the payload that are looked at at once


@dataclass(frozen=True, slots=True)
class _Groups:
    """Codes of some rows with the parameters of their groups.

    Attributes:
        codes: unsigned, (R, C): whole groups, the last one maybe with padding.
        scale: float32 (R, G).
        zero: int32 (R, G), zero steps; zeros when symmetric.
    """

    codes: U8
    scale: F32
    zero: I32


@dataclass(frozen=True)
class Affine(AffineEncoding, Encoding):
    """Codes with a scale, and a zero point unless symmetric, per tensor, channel or block."""

    @property
    def name(self) -> str:
        return self.scheme

    @property
    def multiplies(self) -> bool:
        return True

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        groups = self.groups(shape)
        found = [
            Segment("codes", self.rows(shape) * self.row_codes * self.bits // 8),
            Segment("scales", groups * SCALE_SIZES[self.scale_dtype]),
        ]
        if not self.symmetric:
            packed = -(-groups // PACK_GROUP) * 4 * self.zero_point_bits
            found.append(
                Segment("zero_points", groups)
                if self.bits == 8
                else Segment("zero_points", packed, self.zero_point_bits)
            )
        return tuple(found)

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = {
            "bits": self.bits,
            "granularity": self.granularity,
            "kind": "affine",
            "row_length": self.row_length,
            "scale_dtype": self.scale_dtype,
            "symmetric": self.symmetric,
        }
        if self.block:
            fields["block"] = self.block
        return fields

    def columns(self, shape: tuple[int, ...]) -> int:
        return self.row_length

    # --- reading ---

    def codes(self, stored: Stored) -> Codes:
        part = self._groups(stored, Tile(self.rows(stored.shape), self.row_length, 0, True))
        if self.symmetric:
            zero = np.full(part.scale.shape, 1 << (self.bits - 1), np.float32)
        else:
            zero = part.zero.astype(np.float32) / np.float32(zero_steps(self.bits))
        return Codes(
            np.ascontiguousarray(part.codes[:, : self.row_length]),
            np.ascontiguousarray(part.scale),
            zero,
            self.block or self.row_length,
            self.bits,
        )

    def _groups(self, stored: Stored, tile: Tile) -> _Groups:
        """The codes of a tile; its first column is a multiple of 32 and of the block."""
        first, low = divmod(tile.start, self.row_length)
        count, high, block = tile.rows, low + tile.columns, self.block
        unit = max(block, PACK_GROUP) if self.bits < 8 else (block or 1)
        width = min(-(-(high - low) // unit) * unit, self.row_codes - low)
        place = (first * self.row_codes + low) * self.bits // 8
        packed = stored.read("codes", place, count * width * self.bits // 8)
        codes = kernels.load_codes(packed, self).reshape(count, width)
        if block:
            groups = -(-(high - low) // block)
            codes = codes[:, : groups * block]  # without a half group that is all padding
            begin = first * self.row_groups + low // block
        else:
            groups = 1
            codes = codes[:, : high - low]
            begin = first
        scale, zero = self.parameters(stored, begin, count * groups)
        return _Groups(codes, scale.reshape(count, groups), zero.reshape(count, groups))

    def parameters(self, stored: Stored, begin: int, count: int) -> tuple[F32, I32]:
        """Scales and zero steps of groups ``begin..begin + count``, (count,) each; a tensor scale
        repeated.
        """
        if self.granularity == "tensor":
            scale, zero = self._read_parameters(stored, 0, 1)
            return np.broadcast_to(scale, count), np.broadcast_to(zero, count)
        return self._read_parameters(stored, begin, count)

    def _read_parameters(self, stored: Stored, begin: int, count: int) -> tuple[F32, I32]:
        size = SCALE_SIZES[self.scale_dtype]
        scale = self._scales(stored.read("scales", begin * size, count * size))
        if self.symmetric:
            return scale, np.zeros(count, np.int32)
        if self.bits == 8:
            return scale, self._zeros(stored.read("zero_points", begin, count))
        group = 4 * self.zero_point_bits
        low, high = begin // PACK_GROUP, -(-(begin + count) // PACK_GROUP)
        zero = self._zeros(stored.read("zero_points", low * group, (high - low) * group))
        skip = begin - low * PACK_GROUP
        return scale, zero[skip : skip + count]

    def _scales(self, stored: bytes) -> F32:
        return np.frombuffer(stored, SCALE_NUMPY[self.scale_dtype]).astype(np.float32)

    def _zeros(self, packed: bytes) -> I32:
        """Zero steps, the filling of the last group of 32 included."""
        raw = np.frombuffer(packed, np.uint8)
        if self.bits == 8:
            return (raw ^ SIGN).astype(np.int32)
        return kernels.unpack(raw, self.zero_point_bits).astype(np.int32)

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        part = self._groups(stored, tile)
        length = part.codes.shape[1] // part.scale.shape[1]
        values = kernels.decode(
            part.codes.reshape(-1, length),
            part.scale.ravel(),
            part.zero.ravel(),
            self.bits,
            self.symmetric,
        )
        steps = 1 if self.symmetric else zero_steps(self.bits)
        centre = (1 << (self.bits - 1)) if self.symmetric else 0
        grid = Grid(
            scale=part.scale,
            low=(1 if self.symmetric and self.bits == 8 else 0) - centre,
            high=self.levels * steps - centre,
            code_step=steps,
        )
        return Coded(
            values.reshape(tile.rows, -1)[:, : tile.columns],
            integer_rows(part.codes[:, : tile.columns], part.scale, part.zero, self),
            grid,
        )

    def product(self, stored: Stored, first: int, last: int, a: Activations) -> F32:
        nbytes = self.row_codes * self.bits // 8
        packed = stored.read("codes", first * nbytes, (last - first) * nbytes)
        shape = (last - first, self.row_groups)
        scale, zero = self.parameters(stored, first * self.row_groups, math.prod(shape))
        return kernels.product(packed, scale.reshape(shape), zero.reshape(shape), self, a)

    # --- codes that move ---

    @property
    def grain(self) -> Grain | None:
        return None if self.granularity == "tensor" else Grain("int", self.bits, self.block)

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        if self.symmetric:
            middle = 1 << (self.bits - 1)
            return replace(rows, codes=rows.codes + np.int16(middle), zero=rows.zero + middle)
        steps = zero_steps(self.bits)
        if (rows.zero % steps).any():  # zero points between codes, which others do not have
            return None
        scale = rows.scale * np.float32(steps)
        codes = rows.codes // np.int16(steps)
        return replace(rows, codes=codes, zero=rows.zero // steps, scale=scale)

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        found = regrouped(rows, self.block)
        if found is None or not exact_scales(found, self.scale_dtype):
            return None
        if self.symmetric:
            found = centred(found, self.bits)
            # SPEC.md section 3: eight bits have no code -128, and no scales below 0.
            if self.bits < 8 or found is None:
                return found
            return None if (found.codes == 0).any() or (found.scale < 0).any() else found
        if found.offset is not None or (found.scale < 0).any():
            return None
        fits = found.zero.min() >= 0 and max(found.zero.max(), found.codes.max()) <= self.levels
        return found if fits else None

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        codes = padded_codes(rows.codes.astype(np.uint8), rows.codes.shape[1], self)
        packed = codes if self.bits == 8 else kernels.pack(codes, self.bits)
        scales = rows.scale.astype(SCALE_NUMPY[self.scale_dtype]).tobytes()
        segments: dict[str, Bytes] = {"codes": packed.data, "scales": scales}
        if not self.symmetric:
            zero = rows.zero.ravel() * zero_steps(self.bits)
            segments["zero_points"] = stored_zero_points(zero, self).data
        return segments

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        return "all rows have one scale" if self.granularity == "tensor" else None

    def rescaled(self, stored: Stored, first: int, factors: F32) -> dict[str, Bytes]:
        size = SCALE_SIZES[self.scale_dtype] * self.row_groups
        raw = stored.read("scales", first * size, len(factors) * size)
        scales = np.frombuffer(raw, SCALE_NUMPY[self.scale_dtype]).reshape(len(factors), -1)
        return {"scales": rescaled_numbers(scales, factors).tobytes()}

    # --- rules of the payload ---

    def check(self, stored: Stored) -> None:
        sizes = {segment.kind: segment.size for segment in self.segments(stored.shape)}
        self._check_scales(stored, sizes["scales"])
        if not self.symmetric and self.bits < 8:  # at 8 bits every signed byte is a zero point
            self._check_zero_points(stored, sizes["zero_points"])
        padded = self.row_codes != self.row_length
        if padded or (self.bits == 8 and self.symmetric):
            self._check_codes(stored, padded)

    def _check_scales(self, stored: Stored, size: int) -> None:
        for data in _chunks(stored, "scales", size, CHECKED_BYTES):
            scale = self._scales(data)
            if not np.isfinite(scale).all():
                stored.refuse(20, "a scale is not finite")
            if (not self.symmetric or self.bits == 8) and np.signbit(scale).any():
                stored.refuse(20, "a scale is negative")

    def _check_zero_points(self, stored: Stored, size: int) -> None:
        top = self.levels * zero_steps(self.bits)
        group = 4 * self.zero_point_bits
        left = self.groups(stored.shape)
        for data in _chunks(stored, "zero_points", size, CHECKED_BYTES // group * group):
            zero = self._zeros(data)
            if (zero[:left] > top).any():
                stored.refuse(21, f"a zero point is above {top}")
            if zero[left:].any():
                stored.refuse(23, "padding of the zero points is not 0")
            left -= len(zero)

    def _check_codes(self, stored: Stored, padded: bool) -> None:
        whole, bits = self.row_codes, self.bits
        for tile in tiles(self.rows(stored.shape), whole):
            data = stored.read(
                "codes", tile.start * bits // 8, (tile.stop - tile.start) * bits // 8
            )
            codes = kernels.load_codes(data, self).reshape(tile.rows, tile.columns)
            real = self.row_length - tile.start % whole
            if bits == 8:
                codes = codes ^ SIGN  # back to the stored byte: padding is 0, -128 is 0x80
                if self.symmetric and (codes == 0x80).any():
                    stored.refuse(22, "a symmetric tensor has the code -128")
            if padded and codes[:, max(real, 0) :].any():
                stored.refuse(23, "padding codes are not 0")


def _chunks(stored: Stored, kind: str, size: int, step: int) -> Iterator[bytes]:
    for start in range(0, size, step):
        yield stored.read(kind, start, min(step, size - start))


def parse(fields: HeaderFields) -> Encoding:
    """The encoding that a header describes."""
    encoding = Affine(
        bits=fields.integer("bits"),
        granularity=fields.text("granularity"),
        block=fields.integer("block") if fields.has("block") else 0,
        symmetric=fields.flag("symmetric"),
        scale_dtype=fields.text("scale_dtype"),
        row_length=fields.integer("row_length"),
    )
    blocks = encoding.granularity == "block"
    if (
        encoding.bits not in BITS
        or encoding.granularity not in GRANULARITIES
        or blocks != fields.has("block")
        or (blocks and encoding.block not in BLOCKS)
        or encoding.scale_dtype not in (SCALE_SIZES if blocks else ("F32",))
        or not DTYPES[fields.source_dtype].floating
    ):
        fields.impossible("affine encoding")
    fields.check_row_length(encoding.row_length)
    return encoding
