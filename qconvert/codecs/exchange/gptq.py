"""GPTQ, which vLLM, SGLang, transformers with GPTQModel, and llama.cpp's converter load.

The law is formats/exchange/gptq.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.codec import Codec, Coded, Encoder, Facts, Grain, Stored
from qconvert.codecs.exchange.columns import (
    CODES,
    U32,
    WORDS,
    ZEROS,
    Band,
    ColumnGroups,
    columns_of,
)
from qconvert.codecs.exchange.integers import integer_encoder
from qconvert.codecs.exchange.layout import Part, refuse_values
from qconvert.exchange_schemes import GptqScheme
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import WORD, stream_bytes
from qconvert.kernels.records import U8, Bytes
from qconvert.model import Model, TensorInfo

ORDER = ".g_idx"
UNIT = 32  # that rows and columns are multiples of: words of codes and of zero points


@dataclass(frozen=True)
class Gptq(ColumnGroups):
    """Codes in words along the columns.

    Attributes:
        less_one: whether zero points are stored less one, as version 1 has them.
        indexed: whether there is a tensor that says which group each column belongs to.
        order: that tensor, int32 (C,), where groups are no runs of columns.
    """

    less_one: bool = True
    indexed: bool = True
    order: bytes = field(default=b"", repr=False)

    @property
    def grain(self) -> Grain | None:
        return None if self.order else super().grain  # others have groups of neighbours

    @property
    def immovable(self) -> str:
        return "its g_idx has groups of columns that are no neighbours" if self.order else ""

    @property
    def name(self) -> str:
        asym = "" if self.symmetric else "_asym"
        return f"gptq_{self.width}bit{asym}_{self.unit}{'_act_order' if self.order else ''}"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        found = super().parts(shape)
        return (*found, Part(ORDER, "I32", shape[1:])) if self.indexed else found

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return stream_bytes(columns, self.width) * 8 // WORD, rows

    def read_codes(self, stored: Stored, rows: slice) -> U8:
        shape = self.words_shape(*stored.shape)
        words = columns_of(stored, CODES, shape, rows, WORDS)
        data = np.ascontiguousarray(words.T).view(np.uint8)
        return kernels.unpack_stream(data, self.width, stored.shape[1])

    def zero_points(self, words: U32, count: int) -> U8:
        crossing = WORD % self.width != 0
        if self.less_one and not crossing:
            words = words + self._ones
        found = kernels.unpack_stream(np.ascontiguousarray(words).view(np.uint8), self.width, count)
        if self.less_one and crossing:
            found = (found + np.uint8(1)) & np.uint8((1 << self.width) - 1)
        return found

    @property
    def _ones(self) -> np.uint32:
        """1 for each zero point of a word: added to it, it carries within it, as in GPTQModel."""
        ones = kernels.pack_stream(np.ones((1, WORD // self.width), np.uint8), self.width)
        return np.uint32(ones.view("<u4")[0, 0])

    def code_words(self, packed: U8, columns: int) -> U32:
        words: U32 = packed.view(WORDS)
        return words

    def zero_words(self, zero: U8) -> U32:
        words: U32 = kernels.pack_stream(zero, self.width).view("<u4")
        return words - self._ones if self.less_one else words

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        columns = shape[1]
        order = (np.arange(columns) // (self.group or columns)).astype("<i4")
        return {**super().laid_together(shape, rows), ORDER: order.tobytes()}

    def rows(self, stored: Stored, rows: slice) -> Band:
        found = super().rows(stored, rows)
        middle = 1 << (self.width - 1)
        if self.symmetric and (found.zero != middle).any():
            other = int(found.zero[found.zero != middle][0])
            refuse_values(
                stored, f"a zero point of {ZEROS} in a symmetric weight", other, str(middle)
            )
        return found

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        if not self.order:
            return super().coded(stored, tile)
        first, low = divmod(tile.start, stored.shape[1])
        found = self.rows(stored, slice(first, first + tile.rows))
        columns = slice(low, low + tile.columns)
        group = np.frombuffer(self.order, "<i4")[columns]
        values = found.codes[:, columns].astype(np.float32)
        values -= found.zero.astype(np.float32)[:, group]
        values *= found.scale[:, group]
        return Coded(values)


def _planned(scheme: GptqScheme, tensor: TensorInfo) -> Gptq:
    return Gptq(scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype)


def _refuses(scheme: GptqScheme, tensor: TensorInfo) -> str | None:
    if len(tensor.shape) == 2 and any(n % UNIT for n in tensor.shape):
        return f"its rows and columns do not divide into words of {UNIT}"
    return _planned(scheme, tensor).misfit(tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: GptqScheme, facts: Facts) -> Encoder:
    return integer_encoder(model, tensor, _planned(scheme, tensor), facts)


CODEC: Codec[GptqScheme] = Codec(
    *("gptq", _planned, _refuses, _encoder),
    uncompensated=lambda scheme, tensor: None,
)
