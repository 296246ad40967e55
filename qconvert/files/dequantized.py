"""A model whose quantized tensors are seen as what they decode to."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.arithmetic import cast_values
from qconvert.kernels.records import Bytes
from qconvert.model import DTYPES, Companion, Model, SourceFile, TensorInfo

DECODED = "F32"
_PLAIN = {"F64": "<f8", "F32": "<f4"}


class DequantizedModel:
    """A `Model` whose tensors of other types than ``kept`` are F32; `close` closes the source."""

    def __init__(self, source: Model, kept: Collection[str] = DTYPES) -> None:
        self.path: Path = source.path
        self.kind = source.kind
        self.metadata = source.metadata
        self.sources: tuple[SourceFile, ...] = source.sources
        self.companions: tuple[Companion, ...] = source.companions
        self._source = source
        self._stored = {t.name: t for t in source.tensors}
        self.tensors = tuple(t if t.dtype in kept else _decoded(t) for t in source.tensors)

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`."""
        return self._source.values(self._stored.get(tensor.name, tensor), start, stop)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of the tensor as F32 would be stored.

        Of a tensor of the source, with the type that it has there, the bytes that are there.
        """
        if tensor.dtype == self._stored.get(tensor.name, tensor).dtype:
            return self._source.raw(tensor, offset, size)
        return bytes_of(partial(self.values, tensor), DECODED, offset, size)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def bytes_of(
    values: Callable[[int, int], NDArray[np.floating]], dtype: str, offset: int, size: int
) -> bytes:
    """Bytes ``offset..offset+size`` of a tensor as it would be stored in a dtype.

    Args:
        values: gives those from one place of the flattened tensor to another.
    """
    width = DTYPES[dtype].size
    start = offset // width
    found = values(start, -(-(offset + size) // width))
    skipped = offset - start * width
    if dtype in _PLAIN:
        data: Bytes = found.astype(_PLAIN[dtype], copy=False).tobytes()
    else:
        data = cast_values(found, dtype)[0]
    return bytes(data[skipped : skipped + size])


def dequantized(model: Model) -> Model:
    """The model with every tensor in a plain dtype: itself where that is so."""
    plain = all(t.dtype in DTYPES for t in model.tensors)
    return model if plain else DequantizedModel(model)


def _decoded(tensor: TensorInfo) -> TensorInfo:
    return replace(tensor, dtype=DECODED, nbytes=tensor.size * DTYPES[DECODED].size)
