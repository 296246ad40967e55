"""bitsandbytes, which transformers, peft and unsloth load.

The law is formats/exchange/bnb.md. Codes and scales of 4 bits are those of the codebook family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs import codebook
from qconvert.codecs.codebook import CodebookEncoder, CodebookEncoding, scale_table, table_of
from qconvert.codecs.codec import (
    Codec,
    Coded,
    Encoder,
    Encoding,
    Facts,
    Outcome,
    Read,
    Stored,
    smaller,
)
from qconvert.codecs.exchange.integers import IntegerLayout, StreamRows, integer_encoder
from qconvert.codecs.exchange.layout import Layout, Part, refuse_values
from qconvert.exchange_schemes import BnbScheme
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import SIGN
from qconvert.kernels.records import Bytes, Encoded, IntegerRows
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.schemes import CodebookScheme

# --- 4 bits -------------------------------------------------------------------------------------

CODES, SCALES, TABLE = ".weight", ".weight.absmax", ".weight.quant_map"
SCALES_OF_SCALES, TABLE_OF_SCALES = ".weight.nested_absmax", ".weight.nested_quant_map"
STATE = ".weight.quant_state.bitsandbytes__"  # and the name of the table
# Our segments by what they are called there; the offset of scales is a number of the state.
_KINDS = {"codes": CODES, "scales": SCALES, "scale_scales": SCALES_OF_SCALES}
OFFSET = "scale_offset"
ROOM = 26  # characters of a number in JSON, at most
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class FourBits(Layout):
    """NF4 and FP4.

    Attributes:
        book: name of the table.
        block: values that share a scale.
        double: whether scales are quantized in turn.
        dtype: of the model's numbers, that readers compute in.
        storage: dtype of the tensor of codes.
        state_size: bytes of the state; 0 for what `state` gives.
    """

    book: str
    block: int
    double: bool
    dtype: str
    storage: str = "U8"
    state_size: int = 0

    @property
    def name(self) -> str:
        block = "" if self.block == 64 else f"_block{self.block}"
        return f"bnb_{self.book}{block}{'_dq' if self.double else ''}"

    @property
    def bits(self) -> float:
        return 4

    @property
    def codes_and_scales(self) -> CodebookEncoding:
        """The same as we have it."""
        return CodebookEncoding(self.book, self.block, self.double)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        size, blocks = -(-math.prod(shape) // 2), self.codes_and_scales.blocks(shape)
        found = [
            Part(CODES, self.storage, (size // DTYPES[self.storage].size, 1)),
            Part(SCALES, "U8" if self.double else "F32", (blocks,)),
            Part(TABLE, "F32", (16,)),
            Part(STATE + self.book, "U8", (self._room(shape),)),
        ]
        if self.double:
            count = -(-blocks // codebook.SCALES_BLOCK)
            found.append(Part(SCALES_OF_SCALES, "F32", (count,)))
            found.append(Part(TABLE_OF_SCALES, "F32", (256,)))
        return tuple(found)

    def _room(self, shape: tuple[int, ...]) -> int:
        """Bytes of the state."""
        return self.state_size or len(self.state(shape, 0.0))

    def state(self, shape: tuple[int, ...], offset: float) -> bytes:
        """What bitsandbytes' QuantState says of itself; padded, for the offset is not known when
        its place is planned.
        """
        fields: dict[str, Any] = {
            "quant_type": self.book,
            "blocksize": self.block,
            "dtype": TORCH_NAMES[self.dtype],
            "shape": list(shape),
        }
        if not self.double:
            return json.dumps(fields).encode()
        fields |= {"nested_blocksize": codebook.SCALES_BLOCK, "nested_dtype": "float32"}
        room = len(json.dumps(fields | {"nested_offset": 0})) + ROOM
        return json.dumps(fields | {"nested_offset": offset}).ljust(room).encode()

    def common(self, stored: Stored) -> Stored:
        def read(kind: str, offset: int, size: int) -> bytes:
            if kind == OFFSET:
                state = json.loads(stored.read(STATE + self.book, 0, self._room(stored.shape)))
                return np.float32(state["nested_offset"]).tobytes()
            return stored.read(_KINDS[kind], offset, size)

        return replace(stored, encoding=self.codes_and_scales, read=read)

    def taking(self, stored: Stored) -> Read | None:
        if stored.encoding != self.codes_and_scales:
            return None
        number = 0.0
        if self.double:
            number = float(np.frombuffer(stored.read(OFFSET, 0, 4), "<f4")[0])
        tables = self.tables(stored.shape, number)
        kinds = {theirs: ours for ours, theirs in _KINDS.items()}

        def read(kind: str, offset: int, size: int) -> bytes:
            if kind in tables:
                return tables[kind][offset : offset + size]
            return stored.read(kinds[kind], offset, size)

        return read

    def tables(self, shape: tuple[int, ...], offset: float) -> dict[str, bytes]:
        """What is stored beside codes and scales."""
        found = {
            TABLE: table_of(self.book).astype("<f4").tobytes(),
            STATE + self.book: self.state(shape, offset),
        }
        if self.double:
            found[TABLE_OF_SCALES] = scale_table().astype("<f4").tobytes()
        return found

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        common = self.common(stored)
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            found = common.encoding.coded(common, tile)
        if not kernels.all_finite(found.values.ravel()):
            refuse_values(stored, f"a number of {SCALES} is not finite", "NaN or Inf", "finite")
        return found


@dataclass(frozen=True, slots=True)
class FourBitsEncoder(Encoder):
    """Our own codes and scales under other names.

    Attributes:
        inner: finds them.
    """

    model: Model
    tensor: TensorInfo
    layout: FourBits
    inner: CodebookEncoder

    @property
    def encoding(self) -> Encoding:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        return self.inner.tiles()

    def encode(self, tile: Tile) -> Encoded:
        done = self.inner.encode(tile)
        return replace(done, segments={_KINDS[k]: data for k, data in done.segments.items()})

    def shared(self) -> Mapping[str, Bytes]:
        layout, stored = self.layout, dict(self.inner.shared())
        offset = stored.pop(OFFSET, None)
        number = 0.0 if offset is None else float(np.frombuffer(offset, "<f4")[0])
        found: dict[str, Bytes] = {_KINDS[k]: data for k, data in stored.items()}
        return found | layout.tables(self.tensor.shape, number)

    def outcome(self, seen: Encoded) -> Outcome:
        return self.inner.outcome(seen)


# --- 8 bits -------------------------------------------------------------------------------------

ROW_SCALES, FORMAT = ".SCB", ".weight_format"
STEP = np.float32(7.874015718698502e-3)  # 1/127, as bitsandbytes multiplies by it


@dataclass(frozen=True)
class Int8Rows(IntegerLayout):
    """``int8``: signed codes and the largest magnitude of each row; value = (code · it) · 1/127.

    Attributes:
        marked: whether there is a tensor that says that codes lie row by row.
    """

    marked: bool = True

    @property
    def name(self) -> str:
        return "bnb_int8"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        found = (Part(CODES, "I8", shape), Part(ROW_SCALES, "F32", shape[:1]))
        return (*found, Part(FORMAT, "U8", ())) if self.marked else found

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        codes = self._codes(stored, rows, columns).astype(np.int16) + np.int16(128)
        scale = self._largest(stored, rows) * STEP
        return IntegerRows(codes, np.full_like(scale, 128, np.int32), scale, None, stored.shape[1])

    def _codes(self, stored: Stored, rows: slice, columns: slice) -> NDArray[np.int8]:
        whole, count = stored.shape[1], rows.stop - rows.start
        size = (count - 1) * whole + columns.stop - columns.start
        data = stored.read(CODES, rows.start * whole + columns.start, size)
        return np.frombuffer(data, np.int8).reshape(count, -1)

    def _largest(self, stored: Stored, rows: slice) -> NDArray[np.float32]:
        data = stored.read(ROW_SCALES, 4 * rows.start, 4 * (rows.stop - rows.start))
        return self.scales_from(stored, ROW_SCALES, data)[:, None]

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        first, low = divmod(tile.start, stored.shape[1])
        rows, columns = slice(first, first + tile.rows), slice(low, low + tile.columns)
        values = self._codes(stored, rows, columns).astype(np.float32)
        values *= self._largest(stored, rows)
        values *= STEP
        return replace(super().coded(stored, tile), values=values)

    def laid_stream(self, rows: StreamRows) -> dict[str, Bytes]:
        codes, largest = rows.codes[:, : rows.columns] ^ SIGN, rows.scale / STEP
        return {CODES: codes.data, ROW_SCALES: largest.astype("<f4").tobytes()}

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        return {FORMAT: b"\0"}


# --- the codec ----------------------------------------------------------------------------------


def _planned(scheme: BnbScheme, tensor: TensorInfo) -> FourBits | Int8Rows:
    if scheme.number == "int":
        return Int8Rows(8, 0, True, "F32")
    return FourBits(scheme.number, scheme.group, scheme.double, scheme.scale_dtype)


def _refuses(scheme: BnbScheme, tensor: TensorInfo) -> str | None:
    layout = _planned(scheme, tensor)
    if isinstance(layout, Int8Rows):
        return layout.misfit(tensor, scheme.name)
    if len(tensor.shape) != 2:
        return "no matrix of two dimensions, which is what readers of the format quantize"
    if tensor.size % 2:
        return "an odd number of values, which fills no bytes"
    return smaller(layout, tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: BnbScheme, facts: Facts) -> Encoder:
    layout = _planned(scheme, tensor)
    if isinstance(layout, Int8Rows):
        return integer_encoder(model, tensor, layout, facts)
    ours = CodebookScheme(layout.book, layout.block, layout.double)
    inner = codebook.CODEC.encoder(model, tensor, ours, facts)
    assert isinstance(inner, CodebookEncoder)
    return FourBitsEncoder(model, tensor, layout, inner)


def _passes(scheme: BnbScheme, tensor: TensorInfo) -> bool:
    return scheme.double


CODEC: Codec[BnbScheme] = Codec(
    *("bnb", _planned, _refuses, _encoder),
    passes=_passes,
    uncompensated=lambda scheme, tensor: None,
)
