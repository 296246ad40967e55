"""AWQ in the layout of AutoAWQ's GEMM, which vLLM, SGLang and transformers with GPTQModel load.

The law is formats/exchange/awq.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Codec, Encoder, Facts, Stored
from qconvert.codecs.exchange.columns import CODES, U32, WORDS, ColumnGroups, columns_of
from qconvert.codecs.exchange.integers import integer_encoder
from qconvert.exchange_schemes import AwqScheme
from qconvert.kernels.records import U8
from qconvert.model import Model, TensorInfo

# Which of eight rows lies in each four bits of a word, from the lowest on.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
IN_WORD = len(ORDER)
AT_ONCE = 16 * IN_WORD  # rows that are packed at once


def _in_words(codes: U8) -> U32:
    """Codes (R, n), R a multiple of 8, in words (R / 8, n)."""
    rows = codes.reshape(-1, IN_WORD, codes.shape[1])
    words = np.zeros((len(rows), codes.shape[1]), np.uint32)
    for place, k in enumerate(ORDER):
        words |= rows[:, k].astype(np.uint32) << np.uint32(4 * place)
    return words


def _of_words(words: U32) -> U8:
    """Codes (R, n) in words (n, R / 8)."""
    rows = np.ascontiguousarray(words.T)
    codes = np.empty((len(rows), IN_WORD, rows.shape[1]), np.uint8)
    for place, k in enumerate(ORDER):
        codes[:, k] = rows >> np.uint32(4 * place) & np.uint32(15)
    return codes.reshape(-1, rows.shape[1])


@dataclass(frozen=True)
class Awq(ColumnGroups):
    """Codes in words along the rows."""

    @property
    def name(self) -> str:
        return f"awq_4bit_{self.unit}{'_sym' if self.symmetric else ''}"

    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return columns, rows // IN_WORD

    def read_codes(self, stored: Stored, rows: slice) -> U8:
        shape = self.words_shape(*stored.shape)
        some = slice(rows.start // IN_WORD, rows.stop // IN_WORD)
        words = columns_of(stored, CODES, shape, some, WORDS)
        return _of_words(words)

    def zero_points(self, words: U32, count: int) -> U8:
        return _of_words(words).T

    def code_words(self, packed: U8, columns: int) -> U32:
        words = np.empty((len(packed) // IN_WORD, columns), np.uint32)
        for first in range(0, len(packed), AT_ONCE):
            some = kernels.unpack_stream(packed[first : first + AT_ONCE], self.width, columns)
            words[first // IN_WORD : (first + AT_ONCE) // IN_WORD] = _in_words(some)
        return words

    def zero_words(self, zero: U8) -> U32:
        return _in_words(zero.T).T


def _planned(scheme: AwqScheme, tensor: TensorInfo) -> Awq:
    return Awq(scheme.bits, scheme.group, scheme.symmetric, scheme.scale_dtype)


def _refuses(scheme: AwqScheme, tensor: TensorInfo) -> str | None:
    if len(tensor.shape) == 2 and tensor.shape[0] % IN_WORD:
        return f"its rows do not divide into words of {IN_WORD}"
    return _planned(scheme, tensor).misfit(tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: AwqScheme, facts: Facts) -> Encoder:
    return integer_encoder(model, tensor, _planned(scheme, tensor), facts)


CODEC: Codec[AwqScheme] = Codec(
    *("awq", _planned, _refuses, _encoder),
    uncompensated=lambda scheme, tensor: None,
)
