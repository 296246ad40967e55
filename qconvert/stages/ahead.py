"""Tensors that are encoded before the file is written, because others depend on what they become.

Their bytes wait in a scratch file for the conversion, which takes them as it takes those of an
encoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import REPAIRED, Encoder, Encoding, Outcome
from qconvert.codecs.source import rows_of
from qconvert.files.scratch import Scratch
from qconvert.geometry import Tile, row_length, tiles
from qconvert.kernels.arithmetic import weighted_error_sums
from qconvert.kernels.records import F32, Bytes, Encoded, ErrorSums
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.stages.sensitivities import as_stored

Place = tuple[int, int]  # in the scratch file: offset and size


@dataclass(frozen=True, slots=True)
class ReadyEncoder(Encoder):
    """The encoder of a tensor that is encoded.

    Attributes:
        code: what the bytes mean.
        pieces: tiles, and where the bytes of their segments lie.
        common: see `Encoder.shared`.
        result: see `Encoder.outcome`.
    """

    model: Model
    tensor: TensorInfo
    code: Encoding
    scratch: Scratch
    pieces: Mapping[Tile, Mapping[str, Place]]
    common: Mapping[str, Bytes]
    result: Outcome

    @property
    def encoding(self) -> Encoding:
        return self.code

    def tiles(self) -> Iterator[Tile]:
        return iter(self.pieces)

    def encode(self, tile: Tile) -> Encoded:
        places = self.pieces[tile].items()
        return Encoded({kind: self.scratch.read(*place) for kind, place in places})

    def shared(self) -> Mapping[str, Bytes]:
        return self.common

    def outcome(self, seen: Encoded) -> Outcome:
        return self.result


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is known before the conversion begins.

    Attributes:
        encoders: of tensors that are encoded, by their names.
        repaired: names of those that stand for other weights than their own.
        provenance: what there is to record.
        notes, warnings: for the report.
    """

    encoders: dict[str, Encoder] = field(default_factory=dict)
    repaired: frozenset[str] = frozenset()
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def encoded_ahead(
    encoder: Encoder,
    model: Model,
    tensor: TensorInfo,
    mean_square: F32 | None,
    scratch: Scratch,
    mapper: Mapper,
    *,
    repaired: bool,
) -> tuple[ReadyEncoder, F32]:
    """Encode a tensor, and decode it again.

    Args:
        encoder: of the tensor.
        model, tensor: the weights that errors are reported against.
        mean_square: of the input channels, (columns,), where the encoder weighs by them.
        repaired: whether the encoder was given other values than the tensor's.

    Returns:
        What the conversion takes, and the decoded values in the shape of the tensor.

    Raises:
        WeightError: see `Encoder.encode`.
    """
    parts, seen = _run(encoder, mapper)
    settled = encoder.settled(seen)
    if settled.encoding != encoder.encoding:
        parts, seen = _run(settled, mapper)
    outcome, shared, encoding = settled.outcome(seen), settled.shared(), settled.encoding
    segments = [done.segments for _, done in parts]
    stored = as_stored(tensor, encoding, [*segments, shared], model.path)
    columns = row_length(tensor.shape)
    weights = mean_square if outcome.weighted else None

    def decoded(tile: Tile) -> tuple[F32, ErrorSums]:
        x, values = rows_of(model, tensor, tile), encoding.coded(stored, tile).values
        error = ErrorSums(x.size, *kernels.error_sums(x, values))
        if weights is not None:
            column = tile.start % columns
            part = weights[None, column : column + tile.columns]
            weighted = weighted_error_sums(x, values, part)
            error = replace(error, weighted_signal=weighted[0], weighted_noise=weighted[1])
        return values, error

    error, values = ErrorSums(), np.empty(tensor.size, np.float32)
    cut = list(tiles(tensor.size // columns, columns))
    for tile, (found, more) in zip(cut, mapper(decoded, cut), strict=True):
        values[tile.start : tile.stop] = found.ravel()
        error += more
    if outcome.error is not None:
        outcome = replace(outcome, error=replace(error, clipped=outcome.error.clipped))
    if repaired:
        outcome = replace(outcome, decision={**(outcome.decision or {}), "rounding": REPAIRED})
    pieces = {
        tile: {kind: _kept(scratch, data) for kind, data in done.segments.items()}
        for tile, done in parts
    }
    ready = ReadyEncoder(model, tensor, encoding, scratch, pieces, shared, outcome)
    return ready, values.reshape(tensor.shape)


def _kept(scratch: Scratch, data: Bytes) -> Place:
    return scratch.append(data), memoryview(data).nbytes


def _run(encoder: Encoder, mapper: Mapper) -> tuple[list[tuple[Tile, Encoded]], Encoded]:
    """All tiles of a tensor, and what was seen of it."""
    cut = list(encoder.tiles())
    parts = list(zip(cut, mapper(encoder.encode, cut), strict=True))
    seen = Encoded()
    for _, done in parts:
        seen += done
    return parts, seen
