"""compressed-tensors, which vLLM, SGLang and transformers load.

The law is formats/exchange/compressed-tensors.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.codec import Codec, Encoder, Facts, Stored
from qconvert.codecs.exchange.bits import WORD, packed_rows, row_bytes, unpacked_rows
from qconvert.codecs.exchange.integers import IntegerLayout, as_codes, integer_encoder, misfit
from qconvert.codecs.exchange.layout import Part
from qconvert.exchange_schemes import CompressedTensorsScheme
from qconvert.kernels.arithmetic import SCALE_NUMPY
from qconvert.kernels.records import I32, U8, Bytes, IntegerRows
from qconvert.model import DTYPES, Model, TensorInfo

PACKED, SCALE = ".weight_packed", ".weight_scale"
ZERO_POINT, SHAPE = ".weight_zero_point", ".weight_shape"


@dataclass(frozen=True)
class PackedIntegers(IntegerLayout):
    """``pack-quantized``: rows of codes in words, scales beside them, and zero points packed along
    the rows' numbers.
    """

    gathers: ClassVar[tuple[str, ...]] = ("zero",)

    @property
    def name(self) -> str:
        unit = f"g{self.group}" if self.group else "channel"
        return f"w{self.width}a16{'' if self.symmetric else '_asym'}_{unit}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        found = [
            Part(PACKED, "I32", (rows, row_bytes(columns, self.width) * 8 // WORD)),
            Part(SCALE, self.scale_dtype, (rows, groups)),
            Part(SHAPE, "I64", (2,)),
        ]
        if not self.symmetric:
            words = row_bytes(rows, self.width) * 8 // WORD
            found.append(Part(ZERO_POINT, "I32", (words, groups)))
        return tuple(found)

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        count, width = rows.stop - rows.start, columns.stop - columns.start
        whole = row_bytes(stored.shape[1], self.width)
        if width == stored.shape[1]:
            data = stored.read(PACKED, rows.start * whole, count * whole)
        else:
            begin = columns.start * self.width // 8
            size = min(row_bytes(width, self.width), whole - begin)
            data = stored.read(PACKED, rows.start * whole + begin, size)
        packed = np.frombuffer(data, np.uint8).reshape(count, -1)
        groups = self.groups(stored.shape[1])
        size = DTYPES[self.scale_dtype].size * groups
        scale = self.scales_from(stored, SCALE, stored.read(SCALE, rows.start * size, count * size))
        group = self.group or stored.shape[1]
        part = slice(columns.start // group, -(-columns.stop // group))
        return IntegerRows(
            codes=unpacked_rows(packed, self.width, width).astype(np.int16),
            zero=self._zeros(stored, rows, groups)[:, part],
            scale=scale.reshape(count, groups)[:, part],
            offset=None,
            group=group,
        )

    def _zeros(self, stored: Stored, rows: slice, groups: int) -> I32:
        """Zero points of some rows, (R, G)."""
        count = rows.stop - rows.start
        if self.symmetric:
            return np.full((count, groups), 1 << (self.width - 1), np.int32)
        first = rows.start * self.width // WORD  # of the words
        size = 4 * (-(-rows.stop * self.width // WORD) - first) * groups
        words = np.frombuffer(stored.read(ZERO_POINT, 4 * first * groups, size), "<u4")
        data = np.ascontiguousarray(words.reshape(-1, groups).T).view(np.uint8)
        single = np.unpackbits(data, axis=1, bitorder="little")
        begin = rows.start * self.width - first * WORD
        single = single[:, begin : begin + count * self.width]
        single = single.reshape(groups, count, self.width)
        zero = np.packbits(single, axis=2, bitorder="little")[:, :, 0]
        return np.ascontiguousarray(zero.T).astype(np.int32)

    def pieces(self, rows: IntegerRows) -> dict[str, Bytes]:
        scales = rows.scale.astype(SCALE_NUMPY[self.scale_dtype])
        return {PACKED: packed_rows(as_codes(rows), self.width).data, SCALE: scales.tobytes()}

    def whole(self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]) -> dict[str, Bytes]:
        found: dict[str, Bytes] = {SHAPE: np.array(shape, "<i8").tobytes()}
        if not self.symmetric:
            zero: U8 = np.ascontiguousarray(rows["zero"].T)
            words = packed_rows(zero, self.width).view("<u4")
            found[ZERO_POINT] = np.ascontiguousarray(words.T).tobytes()
        return found


def layout_of(scheme: CompressedTensorsScheme) -> IntegerLayout:
    """What a scheme writes."""
    return PackedIntegers(scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype)


def _planned(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> IntegerLayout:
    return layout_of(scheme)


def _refuses(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> str | None:
    return misfit(layout_of(scheme), tensor, scheme.name)


def _encoder(
    model: Model, tensor: TensorInfo, scheme: CompressedTensorsScheme, facts: Facts
) -> Encoder:
    return integer_encoder(model, tensor, layout_of(scheme), facts)


CODEC: Codec[CompressedTensorsScheme] = Codec(
    *("compressed-tensors", _planned, _refuses, _encoder),
    uncompensated=lambda scheme, tensor: None,
)
