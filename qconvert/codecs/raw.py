"""Plain numbers: tensors kept bit for bit, and casts to another floating dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
)
from qconvert.codecs.rescaled import TUNED
from qconvert.codecs.source import (
    RUN_VALUES,
    finite_weights,
    largest_weight,
    source_rows,
    tiles_of,
)
from qconvert.errors import WeightError
from qconvert.geometry import Tile
from qconvert.kernels.records import Encoded
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.schemes import CastScheme

KEPT_BYTES = 1 << 22  # of a kept tensor that are copied at once
UNIT = 4  # values of less than 8 bits that begin and end on a byte


@dataclass(frozen=True, slots=True)
class RawEncoding(Encoding):
    """Values stored as they are, or cast to ``dtype``."""

    dtype: str

    @property
    def name(self) -> str:
        return self.dtype

    @property
    def bits(self) -> float:
        return DTYPES[self.dtype].bits

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return (Segment("data", DTYPES[self.dtype].nbytes(math.prod(shape))),)

    def to_json(self) -> dict[str, object]:
        return {"dtype": self.dtype, "kind": "raw"}

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        values = self.values(stored, tile.start, tile.stop)
        with np.errstate(over="ignore"):  # float64 beyond float32
            return Coded(values.astype(np.float32).reshape(tile.rows, tile.columns))

    def values(self, stored: Stored, start: int, stop: int) -> NDArray[Any]:
        dtype = DTYPES[self.dtype]
        unit = 1 if dtype.bits >= 8 else UNIT
        first, last = start // unit * unit, min(-(-stop // unit) * unit, math.prod(stored.shape))
        offset = dtype.nbytes(first)
        raw = stored.read("data", offset, dtype.nbytes(last) - offset)
        return kernels.widen(raw, self.dtype)[start - first : stop - first]


@dataclass(frozen=True, slots=True)
class KeptEncoder(Encoder):
    """Bytes as they are; a tile is a run of them.

    Attributes:
        as_it_is: what they mean.
    """

    model: Model
    tensor: TensorInfo
    as_it_is: Encoding

    @property
    def encoding(self) -> Encoding:
        return self.as_it_is

    def tiles(self) -> Iterator[Tile]:
        size = self.tensor.nbytes
        for start in range(0, max(size, 1), KEPT_BYTES):
            yield Tile(1, min(KEPT_BYTES, size - start), start, start + KEPT_BYTES >= size)

    def encode(self, tile: Tile) -> Encoded:
        data = self.model.raw(self.tensor, tile.start, tile.columns)
        nonfinite = 0
        if self.tensor.floating:
            values = kernels.widen(data, self.tensor.dtype)
            nonfinite = int(len(values) - np.count_nonzero(np.isfinite(values)))
        return Encoded({"data": data}, nonfinite=nonfinite)

    def outcome(self, seen: Encoded) -> Outcome:
        if not seen.nonfinite:
            return Outcome(None)
        warning = f"kept tensor '{self.tensor.name}' has {seen.nonfinite:,} NaN or Inf values"
        return Outcome(None, warning=warning)


@dataclass(frozen=True, slots=True)
class GainsEncoder(KeptEncoder):
    """Other bytes in place of those of a kept tensor.

    Attributes:
        data: all of them.
    """

    data: bytes

    def encode(self, tile: Tile) -> Encoded:
        return Encoded({"data": self.data[tile.start : tile.start + tile.columns]})

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(None, {"rounding": TUNED})


@dataclass(frozen=True, slots=True)
class CastEncoder(Encoder):
    """Another floating dtype."""

    model: Model
    tensor: TensorInfo
    dtype: str

    @property
    def encoding(self) -> Encoding:
        return RawEncoding(self.dtype)

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        rows = source_rows(self.model, self.tensor, tile)
        with finite_weights(self.model, self.tensor):
            done = kernels.cast(rows, self.dtype)
        if not math.isfinite(done.error.noise):
            raise WeightError(
                f"a weight does not fit {self.dtype}",
                path=self.model.path,
                tensor=self.tensor.name,
                found=f"{largest_weight(self.model, self.tensor, tile):g}",
                hint=self._hint(),
            )
        return done

    def _hint(self) -> str:
        kept = f"keep the tensor with --keep '{self.tensor.name}'"
        if self.dtype != "F16":  # no dtype reaches further
            return kept
        return f"{kept}, or take bf16: --tensor-scheme '{self.tensor.name}=bf16'"


def _planned(scheme: CastScheme, tensor: TensorInfo) -> Encoding:
    return RawEncoding(scheme.dtype)


def _refuses(scheme: CastScheme, tensor: TensorInfo) -> str | None:
    return f"is {tensor.dtype} already" if scheme.dtype == tensor.dtype else None


def _encoder(model: Model, tensor: TensorInfo, scheme: CastScheme, facts: Facts) -> Encoder:
    return CastEncoder(model, tensor, scheme.dtype)


def _parse(fields: HeaderFields) -> Encoding:
    stored = fields.text("dtype")
    source = DTYPES[fields.source_dtype]
    cast = source.floating and stored in ("F32", "F16", "BF16")
    if not (stored == source.name or cast):
        fields.impossible("raw encoding")
    return RawEncoding(stored)


CODEC: Codec[CastScheme] = Codec("raw", _planned, _refuses, _encoder, _parse)
