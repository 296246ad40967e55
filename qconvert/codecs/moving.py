"""Codes and scales that move from one encoding to another and stay the same numbers.

What moves are rows as `Encoding.movable` gives them: unsigned codes with whole zero points. An
encoding that can take some puts them into its own units with `Encoding.held`, or finds that it
cannot, and lays them down with `Encoding.laid`. Where even the bytes are the same, which
`Encoding.taking` says, they are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import NEAREST, Codec, Encoder, Encoding, Facts, Outcome, Stored
from qconvert.codecs.gathered import Gathered
from qconvert.codecs.units import values_of
from qconvert.exchange_schemes import ExchangeScheme
from qconvert.geometry import Tile, row_length, tiles
from qconvert.kernels.records import Bytes, Encoded, ErrorSums, IntegerRows
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod

MOVED = "moved"
Rows = Callable[[int, int], IntegerRows | None]
MOVED_VALUES = 1 << 20  # of a tile: rows of codes take twelve bytes a value while they are moved


@dataclass(frozen=True, slots=True)
class MovedScheme:
    """Codes of a quantized source in another encoding, the same numbers; made for one tensor, and
    never named by a user.

    Attributes:
        encoding: that they move to.
        source: the tensor as it is stored, seen as one of that encoding, whose bytes are copied; or
            gives rows ``first..last`` of the source, which are `Encoding.movable`.
        like: what quantizing to that encoding would be called, where a directory has to say it.
        exact: whether values are the same, too: not where a factor becomes a divisor.
    """

    family: ClassVar[str] = MOVED
    for_vectors: ClassVar[bool] = False
    default_range: ClassVar[RangeMethod | None] = None
    encoding: Encoding
    source: Stored | Rows
    like: ExchangeScheme | None = None
    exact: bool = True

    @property
    def name(self) -> str:
        return self.encoding.name.lower()

    def at_least(self, bits: int) -> MovedScheme:
        """This scheme: what moves stays as it is."""
        return self


@dataclass(frozen=True, slots=True)
class MovedEncoder(Encoder):
    """Codes of a quantized source in another encoding, which `Encoding.held` was asked about.

    Attributes:
        rows: gives rows ``first..last`` of the tensor as they are in the source.
        exact: see `MovedScheme`.
        gathered: of all rows, what the encoding lays down together.
    """

    model: Model
    tensor: TensorInfo
    moved: Encoding
    rows: Rows
    exact: bool
    gathered: Gathered

    @property
    def encoding(self) -> Encoding:
        return self.moved

    def tiles(self) -> Iterator[Tile]:
        columns = self.tensor.shape[-1]
        return tiles(self.tensor.size // columns, columns, max(MOVED_VALUES, columns))

    def encode(self, tile: Tile) -> Encoded:
        first = tile.start // tile.columns
        source = self.rows(first, first + tile.rows)
        rows = None if source is None else self.moved.held(source)
        assert source is not None  # or it would not have been planned so
        assert rows is not None
        self.gathered.add(first, self.moved.gathered(rows))
        values = values_of(source)
        if self.exact:
            sums = ErrorSums(values.size, float(np.square(values, dtype=np.float64).sum()))
        else:
            sums = ErrorSums(values.size, *kernels.error_sums(values, values_of(rows)))
        return Encoded(self.moved.laid(rows), sums)

    def shared(self) -> dict[str, Bytes]:
        return self.moved.laid_together(self.tensor.shape, self.gathered.arrays)

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(seen.error, {"rule": MOVED})


@dataclass(frozen=True, slots=True)
class CopiedEncoder(Encoder):
    """The bytes of a quantized source, whatever they are called there.

    Attributes:
        stored: the tensor as one of the encoding that it gets.
    """

    model: Model
    tensor: TensorInfo
    stored: Stored

    @property
    def encoding(self) -> Encoding:
        return self.stored.encoding

    def tiles(self) -> Iterator[Tile]:
        columns = self.encoding.columns(self.tensor.shape)
        return tiles(self.tensor.size // columns, columns, max(MOVED_VALUES, columns))

    def encode(self, tile: Tile) -> Encoded:
        segments: dict[str, Bytes] = {}
        for segment in self.encoding.segments(self.tensor.shape):
            # A tile's share of every segment: bytes follow each other, wherever they are cut.
            unit = 4 * segment.width or 1
            whole = segment.size // unit
            begin, end = (whole * at // self.tensor.size * unit for at in (tile.start, tile.stop))
            data = self.stored.read(segment.kind, begin, end - begin)
            if segment.width:  # which the writer packs again
                data = kernels.unpack(np.frombuffer(data, np.uint8), segment.width).tobytes()
            segments[segment.kind] = data
        values = self.encoding.decoded(self.stored, tile)
        return Encoded(
            segments, ErrorSums(values.size, float(np.square(values, dtype=np.float64).sum()))
        )

    def outcome(self, seen: Encoded) -> Outcome:
        decision = {"rule": MOVED}
        if self.stored.rounding != NEAREST:
            decision["rounding"] = self.stored.rounding
        return Outcome(seen.error, decision)


def _encoder(model: Model, tensor: TensorInfo, scheme: MovedScheme, facts: Facts) -> Encoder:
    if isinstance(scheme.source, Stored):
        return CopiedEncoder(model, tensor, scheme.source)
    gathered = Gathered(tensor.size // row_length(tensor.shape))
    return MovedEncoder(model, tensor, scheme.encoding, scheme.source, scheme.exact, gathered)


CODEC: Codec[MovedScheme] = Codec(
    "moved", lambda scheme, tensor: scheme.encoding, lambda scheme, tensor: None, _encoder
)
