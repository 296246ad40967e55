"""A tensor of a file once more, with the codes that it has and other scales of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Encoder, Encoding, Outcome, Stored
from qconvert.codecs.source import RUN_VALUES, rows_of
from qconvert.geometry import Tile, tiles
from qconvert.kernels.arithmetic import weighted_error_sums
from qconvert.kernels.records import F32, Bytes, Encoded, ErrorSums
from qconvert.model import Model, TensorInfo

TUNED = "tuned"  # how codes that were the nearest stand to scales that were not theirs
PROVENANCE_KEY = "finetune"  # what was tuned and how, in the provenance of a file
TRAINED = "trained"  # there: that tensors are others than the source's, which were trained


def tuned_tensors(provenance: object) -> frozenset[str]:
    """Names of the tensors whose scales were tuned, as the provenance of a file lists them; none
    where it is no such object.
    """
    noted = provenance.get(PROVENANCE_KEY) if isinstance(provenance, dict) else None
    names = noted.get("tensors") if isinstance(noted, dict) else None
    return frozenset(n for n in names if isinstance(n, str)) if isinstance(names, list) else _NONE


def were_trained(provenance: object) -> bool:
    """Whether the provenance of a file says that the model was trained on its way from the source
    into the file.
    """
    noted = provenance.get(PROVENANCE_KEY) if isinstance(provenance, dict) else None
    return isinstance(noted, dict) and TRAINED in noted


_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RescaledEncoder(Encoder):
    """Codes as they are stored, with every row's scales times its factor.

    Attributes:
        model, tensor: the source, which errors are measured against.
        stored: the tensor as it was written first.
        factors: float32 (rows,); None for a copy.
        said: of the tensor when it was written first.
        mean_square: of the input channels, (columns,), where errors are weighted by it.
    """

    model: Model
    tensor: TensorInfo
    stored: Stored
    factors: F32 | None
    said: Outcome
    mean_square: F32 | None = None

    @property
    def encoding(self) -> Encoding:
        return self.stored.encoding

    def tiles(self) -> Iterator[Tile]:
        columns = self.encoding.columns(self.tensor.shape)
        return tiles(self.tensor.size // columns, columns, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        x, stored = rows_of(self.model, self.tensor, tile), self.stored
        changed: dict[str, Bytes] = {}
        columns = self.encoding.columns(self.tensor.shape)
        first, column = divmod(tile.start, columns)
        if self.factors is not None:
            changed = self.encoding.rescaled(stored, first, self.factors[first : first + tile.rows])
            stored = replace(stored, read=partial(_read, stored, changed, first, tile.rows))
        values = self.encoding.coded(stored, tile).values
        error = ErrorSums(x.size, *kernels.error_sums(x, values))
        if self.mean_square is not None:
            weights = self.mean_square[None, column : column + tile.columns]
            signal, noise = weighted_error_sums(x, values, weights)
            error = replace(error, weighted_signal=signal, weighted_noise=noise)
        return Encoded(changed, error)

    def shared(self) -> Mapping[str, Bytes]:
        """What stays, as an encoder gives it: of packed values a byte each."""
        changed: Mapping[str, Bytes] = {}
        if self.factors is not None:
            changed = self.encoding.rescaled(self.stored, 0, self.factors[:1])
        found: dict[str, Bytes] = {}
        for segment in self.encoding.segments(self.tensor.shape):
            if segment.kind not in changed:
                data = self.stored.read(segment.kind, 0, segment.size)
                if segment.width:
                    values = kernels.unpack(np.frombuffer(data, np.uint8), segment.width)
                    data = values.tobytes()
                found[segment.kind] = data
        return found

    def outcome(self, seen: Encoded) -> Outcome:
        return replace(self.said, error=seen.error)


def _read(
    stored: Stored, changed: Mapping[str, Any], first: int, rows: int, kind: str, start: int,
    size: int,
) -> bytes:  # fmt: skip
    """As `Stored.read`, with other bytes of some rows in segments that changed."""
    if kind not in changed:
        return stored.read(kind, start, size)
    begin = start - first * (len(changed[kind]) // rows)
    return bytes(changed[kind][begin : begin + size])
