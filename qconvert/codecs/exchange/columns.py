"""Weights that are stored column by column, (in, out): what GPTQ and AWQ share.

Rows of a weight lie far apart then. Those of a band are read and turned over once, and kept for the
tiles that follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.codecs.exchange.integers import IntegerLayout
from qconvert.codecs.exchange.layout import Part
from qconvert.kernels.arithmetic import SCALE_NUMPY, WORD, stream_bytes
from qconvert.kernels.records import F32, I32, U8, Bytes, IntegerRows

CODES, ZEROS, SCALES = ".qweight", ".qzeros", ".scales"
BAND_VALUES = 1 << 23  # of a band, a byte each while it is kept
KEPT = 4  # bands: neighbouring tiles, which threads work on, are of one or two
STRIP = 64  # rows that are turned at once: of 16 to 256 the fastest, ten times all at once
U32 = NDArray[np.uint32]
WORDS = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Band:
    """Some rows of a weight: codes (R, C), scales and zero points (R, G)."""

    codes: U8
    scale: F32
    zero: I32


class Bands:
    """The bands that were read last, of all weights of a checkpoint."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], Band] = OrderedDict()

    def get(self, name: str, first: int, read: Callable[[], Band]) -> Band:
        """The band of a weight that begins at row ``first``."""
        with self._lock:  # or others that want it would read it too
            if (name, first) not in self._kept:
                while len(self._kept) >= KEPT:
                    self._kept.popitem(last=False)
                self._kept[name, first] = read()
            self._kept.move_to_end((name, first))
            return self._kept[name, first]


@dataclass(frozen=True)
class ColumnGroups(IntegerLayout):
    """Codes in words, zero points in words along the rows, and scales, all of them turned over.

    Attributes:
        bands: of the checkpoint.
    """

    bands: Bands = field(default_factory=Bands, compare=False, repr=False)

    gathers: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero")

    @property
    def unit(self) -> str:
        """What shares a scale, as names have it."""
        return f"g{self.group}" if self.group else "channel"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        words = stream_bytes(rows, self.width) * 8 // WORD
        return (
            Part(CODES, "I32", self.words_shape(rows, columns)),
            Part(ZEROS, "I32", (groups, words)),
            Part(SCALES, self.scale_dtype, (groups, rows)),
        )

    @abstractmethod
    def words_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the codes of a weight."""

    @abstractmethod
    def read_codes(self, stored: Stored, rows: slice) -> U8:
        """Codes of some rows, (R, C); the first of them is a multiple of 32."""

    @abstractmethod
    def zero_points(self, words: U32, count: int) -> U8:
        """Zero points (G, count) from their words (G, W)."""

    @abstractmethod
    def code_words(self, packed: U8, columns: int) -> U32:
        """Words of codes of rows, packed as `kernels.pack_stream` does it; `turned`, they are those
        that are stored.
        """

    @abstractmethod
    def zero_words(self, zero: U8) -> U32:
        """Zero points (G, R) as they are stored."""

    def integers(self, stored: Stored, rows: slice, columns: slice) -> IntegerRows:
        found = self.rows(stored, rows)
        group = self.group or stored.shape[1]
        part = slice(columns.start // group, -(-columns.stop // group))
        codes = found.codes[:, columns].astype(np.int16)
        return IntegerRows(codes, found.zero[:, part], found.scale[:, part], None, group)

    def rows(self, stored: Stored, rows: slice) -> Band:
        """What is stored of some rows."""
        step = max(BAND_VALUES // stored.shape[1] // WORD, 1) * WORD
        found = []
        for first in range(rows.start // step * step, rows.stop, step):
            read = partial(self._band, stored, slice(first, min(first + step, stored.shape[0])))
            band = self.bands.get(stored.name, first, read)
            part = slice(max(rows.start - first, 0), rows.stop - first)
            found.append(Band(band.codes[part], band.scale[part], band.zero[part]))
        if len(found) == 1:
            return found[0]
        return Band(*(np.concatenate([getattr(b, k) for b in found]) for k in Band.__slots__))

    def _band(self, stored: Stored, rows: slice) -> Band:
        count, groups = rows.stop - rows.start, self.groups(stored.shape[1])
        words = stream_bytes(stored.shape[0], self.width) * 8 // WORD
        some = slice(rows.start * self.width // WORD, -(-rows.stop * self.width // WORD))
        zero = self.zero_points(columns_of(stored, ZEROS, (groups, words), some, WORDS), count)
        dtype, shape = np.dtype(SCALE_NUMPY[self.scale_dtype]), (groups, stored.shape[0])
        data = columns_of(stored, SCALES, shape, rows, dtype).T.tobytes()
        return Band(
            self.read_codes(stored, rows),
            self.scales_from(stored, SCALES, data).reshape(count, groups),
            np.ascontiguousarray(zero.T).astype(np.int32),
        )

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        zero = self.zero_words(turned(rows["zero"]))
        return {
            CODES: turned(self.code_words(rows["codes"], shape[1])).data,
            ZEROS: zero.tobytes(),
            SCALES: turned(rows["scale"]).tobytes(),
        }


def turned(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows (R, n) as columns, (n, R): a strip at a time, whose lines stay in a core's cache."""
    out = np.empty(rows.shape[::-1], rows.dtype)
    for first in range(0, len(rows), STRIP):
        out[:, first : first + STRIP] = rows[first : first + STRIP].T
    return out


def columns_of(
    stored: Stored, kind: str, shape: tuple[int, int], some: slice, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Some columns of a part of this shape, (shape[0], some)."""
    count, size = some.stop - some.start, dtype.itemsize
    if count == shape[1]:
        return np.frombuffer(stored.read(kind, 0, shape[0] * count * size), dtype).reshape(shape)
    found = np.empty((shape[0], count), dtype)
    for i in range(shape[0]):
        place = (i * shape[1] + some.start) * size
        found[i] = np.frombuffer(stored.read(kind, place, count * size), dtype)
    return found
