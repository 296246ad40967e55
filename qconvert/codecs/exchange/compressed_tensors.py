"""compressed-tensors, which vLLM, SGLang and transformers load.

The law is formats/exchange/compressed-tensors.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.codec import Codec, Encoder, Facts, Stored
from qconvert.codecs.exchange.floats import WEIGHT, Float8, float8_encoder
from qconvert.codecs.exchange.integers import IntegerLayout, StreamRows, integer_encoder
from qconvert.codecs.exchange.layout import Layout, Part, check_finite
from qconvert.codecs.exchange.micro import FP4, FP6, FP8, MX_GROUP, NV_GROUP, Micro, Overall
from qconvert.codecs.exchange.micro_encoder import micro_encoder
from qconvert.exchange_schemes import NOT_ROUNDED, CompressedTensorsScheme
from qconvert.kernels.arithmetic import SCALE_NUMPY, SIGN, WORD, stream_bytes
from qconvert.kernels.records import I32, U8, Bytes, IntegerRows
from qconvert.model import Model, TensorInfo

PACKED, SCALE = ".weight_packed", ".weight_scale"
ZERO_POINT, SHAPE = ".weight_zero_point", ".weight_shape"
INPUT_SCALE, INPUT_ZERO_POINT = ".input_scale", ".input_zero_point"
MIDDLE = 128  # of unsigned bytes
GLOBAL, INPUT_GLOBAL = ".weight_global_scale", ".input_global_scale"

# Small floating numbers, by the ``format`` that configurations have for them.
MICRO = {
    "nvfp4-pack-quantized": Micro(
        *(FP4, (PACKED, "U8"), (SCALE, FP8), NV_GROUP), Overall(GLOBAL, 1, divides=True)
    ),
    "mxfp4-pack-quantized": Micro(FP4, (PACKED, "U8"), (SCALE, "U8"), MX_GROUP),
    "mxfp6-pack-quantized": Micro(FP6, (PACKED, "U8"), (SCALE, "U8"), MX_GROUP),
    "mxfp8-quantized": Micro(FP8, (WEIGHT, FP8), (SCALE, "U8"), MX_GROUP),
}
PACKED_ZEROS = (
    "zero points of asymmetric schemes load in vLLM, but by default not in transformers 5.24 with "
    "compressed-tensors 0.20, which wants them unpacked: load with "
    "CompressedTensorsConfig(dequantize=True), or choose a symmetric scheme"
)


@dataclass(frozen=True)
class PackedIntegers(IntegerLayout):
    """``pack-quantized``: rows of codes in words, scales beside them, and zero points packed along
    the rows' numbers.
    """

    gathers: ClassVar[tuple[str, ...]] = ("zero",)

    @property
    def caution(self) -> str:
        return "" if self.symmetric else PACKED_ZEROS

    @property
    def name(self) -> str:
        unit = f"g{self.group}" if self.group else "channel"
        unit = "tensor" if self.shared else unit
        return f"w{self.width}a16{'' if self.symmetric else '_asym'}_{unit}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        found = [
            Part(PACKED, "I32", (rows, stream_bytes(columns, self.width) * 8 // WORD)),
            Part(SCALE, self.scale_dtype, (1,) if self.shared else (rows, groups)),
            Part(SHAPE, "I64", (2,)),
        ]
        if not self.symmetric:
            words = stream_bytes(rows, self.width) * 8 // WORD
            found.append(Part(ZERO_POINT, "I32", (words, groups)))
        return tuple(found)

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        count, width = rows.stop - rows.start, columns.stop - columns.start
        whole = stream_bytes(stored.shape[1], self.width)
        if width == stored.shape[1]:
            data = stored.read(PACKED, rows.start * whole, count * whole)
        else:
            begin = columns.start * self.width // 8
            size = min(stream_bytes(width, self.width), whole - begin)
            data = stored.read(PACKED, rows.start * whole + begin, size)
        packed = np.frombuffer(data, np.uint8).reshape(count, -1)
        group = self.group or stored.shape[1]
        part = slice(columns.start // group, -(-columns.stop // group))
        return IntegerRows(
            codes=kernels.unpack_stream(packed, self.width, width).astype(np.int16),
            zero=self._zeros(stored, rows, self.groups(stored.shape[1]))[:, part],
            scale=self.scales(stored, SCALE, rows)[:, part],
            offset=None,
            group=group,
        )

    def check(self, stored: Stored) -> None:
        count = 1 if self.shared else stored.shape[0] * self.groups(stored.shape[1])
        check_finite(stored, SCALE, self.scale_dtype, count)

    def _zeros(self, stored: Stored, rows: slice, groups: int) -> I32:
        """Zero points of some rows, (R, G)."""
        count = rows.stop - rows.start
        if self.symmetric:
            return np.full((count, groups), 1 << (self.width - 1), np.int32)
        begin = rows.start // WORD * WORD  # where codes begin with a word
        first = begin * self.width // WORD  # of the words
        size = 4 * (-(-rows.stop * self.width // WORD) - first) * groups
        words = np.frombuffer(stored.read(ZERO_POINT, 4 * first * groups, size), "<u4")
        data = np.ascontiguousarray(words.reshape(-1, groups).T).view(np.uint8)
        zero = kernels.unpack_stream(data, self.width, rows.stop - begin)[:, rows.start - begin :]
        return np.ascontiguousarray(zero.T).astype(np.int32)

    def laid_stream(self, rows: StreamRows) -> dict[str, Bytes]:
        return {PACKED: rows.codes.data, SCALE: rows.scale.tobytes()}

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        found: dict[str, Bytes] = {SHAPE: np.array(shape, "<i8").tobytes()}
        if not self.symmetric:
            zero: U8 = np.ascontiguousarray(rows["zero"].T)
            words = kernels.pack_stream(zero, self.width).view("<u4")
            found[ZERO_POINT] = np.ascontiguousarray(words.T).tobytes()
        return found


@dataclass(frozen=True)
class PlainIntegers(IntegerLayout):
    """``int-quantized``: signed bytes with a scale a row, for products with bytes."""

    static: bool = False

    @property
    def name(self) -> str:
        unit = f"g{self.group}" if self.group else "tensor" if self.shared else "channel"
        static = "_static" if self.static else ""
        return f"w8a8{static}{'' if self.symmetric else '_asym'}_{unit}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        numbers = (1,) if self.shared else (shape[0], self.groups(shape[1]))
        found = [Part(WEIGHT, "I8", shape), Part(SCALE, self.scale_dtype, numbers)]
        if not self.symmetric:
            found.append(Part(ZERO_POINT, "I8", numbers))
        if self.static:
            found.append(Part(INPUT_SCALE, self.scale_dtype, (1,)))
            found.append(Part(INPUT_ZERO_POINT, "I8", (1,)))
        return tuple(found)

    def static_input(self, scale: float, zero_point: int) -> dict[str, Bytes]:
        return {
            INPUT_SCALE: np.float32(scale).astype(SCALE_NUMPY[self.scale_dtype]).tobytes(),
            INPUT_ZERO_POINT: np.int8(zero_point).tobytes(),
        }

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        count, width = rows.stop - rows.start, columns.stop - columns.start
        begin = rows.start * stored.shape[1] + columns.start  # of whole rows, or of a part of one
        raw = stored.read(WEIGHT, begin, count * width)
        codes = np.frombuffer(raw, np.int8).reshape(count, width).astype(np.int16)
        group = self.group or stored.shape[1]
        part = slice(columns.start // group, -(-columns.stop // group))
        return IntegerRows(
            codes=codes + np.int16(MIDDLE),
            zero=self._zeros(stored, rows)[:, part],
            scale=self.scales(stored, SCALE, rows)[:, part],
            offset=None,
            group=group,
        )

    def _zeros(self, stored: Stored, rows: slice) -> I32:
        groups, count = self.groups(stored.shape[1]), rows.stop - rows.start
        if self.symmetric:
            return np.full((count, groups), MIDDLE, np.int32)
        begin, size = (0, groups) if self.shared else (rows.start * groups, count * groups)
        zero = np.frombuffer(stored.read(ZERO_POINT, begin, size), np.int8).astype(np.int32)
        return np.broadcast_to(zero.reshape(-1, groups) + MIDDLE, (count, groups))

    def laid_stream(self, rows: StreamRows) -> dict[str, Bytes]:
        codes = rows.codes[:, : rows.columns] ^ SIGN
        found: dict[str, Bytes] = {WEIGHT: codes.data, SCALE: rows.scale.tobytes()}
        if not self.symmetric:
            found[ZERO_POINT] = (rows.zero ^ SIGN).data
        return found

    def check(self, stored: Stored) -> None:
        count = 1 if self.shared else stored.shape[0] * self.groups(stored.shape[1])
        check_finite(stored, SCALE, self.scale_dtype, count)


def integer_layout(scheme: CompressedTensorsScheme) -> IntegerLayout | None:
    """What a scheme of integers writes; None of another number."""
    if scheme.number != "int":
        return None
    how = scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype
    if scheme.activations:
        return PlainIntegers(*how, static=scheme.activations == "static")
    return PackedIntegers(*how)


def float8_layout(scheme: CompressedTensorsScheme) -> Float8:
    """What a scheme of eight floating bits writes."""
    block = (scheme.group, scheme.group) if scheme.group else (0 if scheme.whole else 1, 0)
    inputs, dimensions = scheme.activations, 1 if scheme.whole else 2
    return Float8(SCALE, scheme.scale_dtype, block, dimensions, inputs, inputs == "static")


def micro_layout(scheme: CompressedTensorsScheme) -> Micro:
    """What a scheme of small floating numbers writes."""
    static = INPUT_GLOBAL if scheme.activations == "static" else ""
    return replace(MICRO[scheme.micro], input_scale=static)


def _planned(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> Layout:
    if scheme.micro:
        return micro_layout(scheme)
    return integer_layout(scheme) or float8_layout(scheme)


def _refuses(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> str | None:
    return _planned(scheme, tensor).misfit(tensor, scheme.name)


def _encoder(
    model: Model, tensor: TensorInfo, scheme: CompressedTensorsScheme, facts: Facts
) -> Encoder:
    if scheme.micro:
        return micro_encoder(model, tensor, micro_layout(scheme), facts, scheme.parts)
    integers = integer_layout(scheme)
    if integers is not None:
        return integer_encoder(model, tensor, integers, facts)
    return float8_encoder(model, tensor, float8_layout(scheme), facts, scheme.parts)


def _passes(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> bool:
    """Whether there is a scale of the tensor, for which all of it is read."""
    return scheme.whole or (bool(scheme.micro) and MICRO[scheme.micro].overall is not None)


def _uncompensated(scheme: CompressedTensorsScheme, tensor: TensorInfo) -> str | None:
    return None if scheme.number == "int" else NOT_ROUNDED


CODEC: Codec[CompressedTensorsScheme] = Codec(
    *("compressed-tensors", _planned, _refuses, _encoder),
    passes=_passes,
    uncompensated=_uncompensated,
)
