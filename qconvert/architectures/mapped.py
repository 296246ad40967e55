"""A model under other tensor names, with rows in another order: nothing is read until it is asked.

Every change that GGUF makes to a Hugging Face checkpoint is one of rows (the last dimension of a
tensor): permuted within heads, taken from a fused tensor, or stacked from several. So a mapped
tensor is a list of sources and a function that says where each of its rows lies in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qconvert.model import DTYPES, Model, SourceFile, TensorInfo

Item = TypeVar("Item", bound=np.generic)
Rows = NDArray[np.int64]
# From rows of the mapped tensor to rows of its sources, counted through all of them in order.
Locate = Callable[[Rows], Rows]


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """How a tensor is made.

    Attributes:
        info: name, shape and dtype of what comes out.
        sources: tensors of one shape and dtype; none when ``constant`` is given.
        locate: where its rows are; None when they are those of the sources in their order.
        added: what is added to each value, in binary32; the dtype is then F32.
        constant: the values themselves, binary32 and flat, for a tensor that no file holds.
    """

    info: TensorInfo
    sources: tuple[TensorInfo, ...] = ()
    locate: Locate | None = None
    added: float = 0.0
    constant: NDArray[np.float32] | None = None


def interleaved(head_dim: int) -> Locate:
    """Rows of each head as llama.cpp's adjacent rotary pairs want them.

    transformers turns row ``i`` of a head with row ``i + head_dim / 2``, llama.cpp's ``NORM`` type
    rows ``2 i`` and ``2 i + 1``. So row ``2 i + half`` comes from row ``half * head_dim / 2 + i``.
    """

    def locate(rows: Rows) -> Rows:
        row = rows % head_dim
        return rows - row + row % 2 * (head_dim // 2) + row // 2

    return locate


def window(rows_of_source: int, start: int, stop: int) -> Locate:
    """Rows ``start..stop`` out of each ``rows_of_source``."""

    def locate(rows: Rows) -> Rows:
        block, row = np.divmod(rows, stop - start)
        return block * rows_of_source + start + row

    return locate


def described(name: str, shape: tuple[int, ...], dtype: str) -> TensorInfo:
    """A tensor of a plain dtype."""
    return TensorInfo(name, shape, dtype, math.prod(shape) * DTYPES[dtype].size)


class MappedModel:
    """A `Model` whose tensors are made from those of another; owns neither, `close` closes both.

    Memory of a request is bounded by its own size and two rows.
    """

    def __init__(self, source: Model, tensors: Sequence[MappedTensor]) -> None:
        self.path: Path = source.path
        self.kind = source.kind
        self.metadata = source.metadata
        self.sources: tuple[SourceFile, ...] = source.sources
        self.companions = source.companions
        self.tensors = tuple(t.info for t in tensors)
        self._source = source
        self._made = {t.info.name: t for t in tensors}

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`."""
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"values {start}..{stop} of a tensor of {tensor.size}")
        made = self._made[tensor.name]
        if made.constant is not None:
            return made.constant[start:stop].copy()
        pieces, order = _pieces(made, start, stop)
        found = _assembled([self._source.values(*piece) for piece in pieces], order)
        if made.added:
            return found.astype(np.float32) + np.float32(made.added)
        return found

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of the tensor as it would be stored."""
        if not 0 <= offset <= offset + size <= tensor.nbytes:
            raise ValueError(f"bytes {offset}..{offset + size} of a tensor of {tensor.nbytes}")
        made = self._made[tensor.name]
        width = DTYPES[tensor.dtype].size
        start, stop = offset // width, -(-(offset + size) // width)
        if made.constant is not None or made.added:
            whole = self.values(tensor, start, stop).astype("<f4").tobytes()
        else:
            stored = np.dtype((np.void, width))
            pieces, order = _pieces(made, start, stop)
            parts = [
                np.frombuffer(self._source.raw(part, first * width, (last - first) * width), stored)
                for part, first, last in pieces
            ]
            whole = _assembled(parts, order).tobytes()
        skipped = offset - start * width
        return whole[skipped : skipped + size]

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Close the source."""
        self._source.close()


Piece = tuple[TensorInfo, int, int]  # a source and the range of its values


def _pieces(made: MappedTensor, start: int, stop: int) -> tuple[list[Piece], _Order | None]:
    """What to read for values ``start..stop``, and how to put it in order when it is not."""
    if start == stop:
        return [(made.sources[0], 0, 0)], None
    size = made.sources[0].size
    if made.locate is None:
        return [
            (source, max(start - i * size, 0), min(stop - i * size, size))
            for i, source in enumerate(made.sources)
            if start < (i + 1) * size and i * size < stop
        ], None
    columns = made.info.shape[-1] if len(made.info.shape) > 1 else 1
    first = start // columns
    wanted = made.locate(np.arange(first, -(-stop // columns), dtype=np.int64))
    rows = np.sort(wanted)
    per_source = size // columns
    ends = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % per_source == 0)) + 1
    pieces: list[Piece] = []
    for run in np.split(rows, ends):
        source, row = divmod(int(run[0]), per_source)
        pieces.append((made.sources[source], row * columns, (row + len(run)) * columns))
    skipped = start - first * columns
    order = np.searchsorted(rows, wanted)
    return pieces, _Order(order, columns, skipped, skipped + stop - start)


@dataclass(frozen=True, slots=True)
class _Order:
    """From rows as they were read to the values that were asked for."""

    rows: Rows
    columns: int
    start: int
    stop: int


def _assembled(parts: Sequence[NDArray[Item]], order: _Order | None) -> NDArray[Item]:
    """The parts as one flat array, in the order of the mapped tensor."""
    read = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if order is None:
        return read
    return read.reshape(-1, order.columns)[order.rows].reshape(-1)[order.start : order.stop]
