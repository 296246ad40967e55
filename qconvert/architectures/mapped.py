"""A model under other tensor names, with rows in another order: nothing is read until it is asked.

Most changes that GGUF makes to a Hugging Face checkpoint are of rows (the last dimension of a
tensor): permuted within heads, taken from a fused tensor, or stacked from several. So a mapped
tensor is a list of sources and a function that says where each of its rows lies in them. Where rows
themselves are cut up (a transposed matrix, permuted columns), the function is one of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.model import DTYPES, Model, SourceFile, TensorInfo

Rows = NDArray[np.int64]
# From rows of the mapped tensor to rows of its sources, counted through all of them in order.
Locate = Callable[[Rows], Rows]


@dataclass(frozen=True, slots=True)
class Order:
    """Values in another order.

    Attributes:
        there: from places of the flat mapped tensor to those in its sources, one after the other.
        back: the way back; -1 for values of the sources that the tensor does not have.
    """

    there: Locate
    back: Locate


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to each value, in binary32, and the way back."""

    there: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    back: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def strided(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Order:
    """Values of an array that lie at even distances along each of its dimensions.

    Args:
        shape: of the mapped tensor, dimensions split as needed.
        strides: from one value to the next in the source, along each of them. Each is a multiple of
            the next smaller one, and no less than what the dimension of that one spans.
        offset: of the first value in the source.
    """

    def there(places: Rows) -> Rows:
        found = np.full(len(places), offset, np.int64)
        for length, stride in zip(reversed(shape), reversed(strides), strict=True):
            places, index = np.divmod(places, length)
            found += index * stride
        return found

    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]  # in the mapped tensor

    def back(places: Rows) -> Rows:
        rest = places - offset
        found = np.zeros(len(places), np.int64)
        inside = rest >= 0
        for stride, length, step in sorted(zip(strides, shape, steps, strict=True), reverse=True):
            index, rest = np.divmod(rest, stride)
            inside &= index < length
            found += index * step
        return np.where(inside & (rest == 0), found, -1)

    return Order(there, back)


# A recurrent layer's decay: checkpoints have the logarithm of its size.
NEGATED_EXP = Change(lambda x: -np.exp(x), lambda x: np.log(-x))


@dataclass(frozen=True, slots=True)
class Factors:
    """What values are multiplied by, in binary32.

    Attributes:
        of_rows: one number for all rows, or one for each.
        divided: whether they are divided by it instead, on the way back.
    """

    of_rows: NDArray[np.float32]
    divided: bool = False

    def applied(self, values: NDArray[np.float32], start: int, columns: int) -> NDArray[np.float32]:
        """Values from ``start`` on, of rows with so many columns."""
        factors = self.of_rows
        if len(factors) > 1:
            factors = factors[np.arange(start, start + len(values)) // columns]
        return values / factors if self.divided else values * factors


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """How a tensor is made.

    Attributes:
        info: name, shape and dtype of what comes out.
        sources: tensors of one shape and dtype; none when ``constant`` is given.
        locate: where its rows are; None when they are those of the sources in their order.
        order: where its values are, instead.
        added: what is added to each value, in binary32; the dtype is then F32.
        turned: where its rows are in the sources with their last two dimensions exchanged, in which
            some checkpoints hold them; what ``order`` says of values, said of rows.
        change: what is done to each value, likewise.
        factors: what its rows are multiplied by, likewise.
        cut: whether it does without rows of its sources that nothing is computed with: on the way
            back they are zero.
        constant: the values themselves, binary32 and flat, for a tensor that no file holds.
    """

    info: TensorInfo
    sources: tuple[TensorInfo, ...] = ()
    locate: Locate | None = None
    order: Order | None = None
    turned: Locate | None = None
    added: float = 0.0
    change: Change | None = None
    factors: Factors | None = None
    cut: bool = False
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
    return TensorInfo(name, shape, dtype, DTYPES[dtype].nbytes(math.prod(shape)))


def inverted(
    tensors: Sequence[MappedTensor], dtypes: Mapping[str, str] = MappingProxyType({})
) -> list[MappedTensor]:
    """The way back: every source as it is made from the tensors that were made from it.

    All are F32, as a GGUF file's tensors are once they are decoded, but for those whose parts have
    another dtype by their names. What was added is taken away in binary32: the same bits where the
    sum was exact.
    """
    made: dict[str, list[tuple[MappedTensor, int]]] = {}
    infos: dict[str, TensorInfo] = {}
    for tensor in tensors:
        for i, source in enumerate(tensor.sources):
            made.setdefault(source.name, []).append((tensor, i))
            infos[source.name] = source
    return [_inverted(infos[name], parts, dtypes) for name, parts in made.items()]


def _inverted(
    source: TensorInfo, parts: list[tuple[MappedTensor, int]], dtypes: Mapping[str, str]
) -> MappedTensor:
    """A source from tensors that it is so-manieth source of."""
    first = parts[0][0]
    if first.locate is None and first.order is None and len(first.sources) == 1:
        parts = parts[:1]  # what has it whole; others have copies
    kinds = {dtypes.get(t.info.name, "F32") for t, _ in parts}
    plain = len(kinds) > 1 or first.added or first.change or first.factors
    dtype = "F32" if plain else kinds.pop()
    made = MappedTensor(
        described(source.name, source.shape, dtype),
        tuple(described(t.info.name, t.info.shape, dtype) for t, _ in parts),
        added=-first.added,
        change=first.change and Change(first.change.back, first.change.there),
        factors=first.factors and Factors(first.factors.of_rows, divided=True),
    )
    if any(t.order for t, _ in parts):
        return replace(made, order=_back(source, parts))
    if first.locate is None and len(parts) == len(first.sources) == 1:
        return made
    if first.factors and len(first.factors.of_rows) > 1:
        raise ValueError(f"rows of '{source.name}' have factors and another order")
    count = _rows(source)
    origin = np.full(count, -1, np.int64)  # of each row, through all tensors in order
    before = 0
    for tensor, i in parts:
        rows = np.arange(_rows(tensor.info), dtype=np.int64)
        there = (rows if tensor.locate is None else tensor.locate(rows)) - i * count
        inside = (there >= 0) & (there < count)
        origin[there[inside]] = before + rows[inside]
        before += len(rows)
    if (origin < 0).any() and not any(t.cut for t, _ in parts):
        raise ValueError(f"rows of '{source.name}' are in no tensor")
    in_order = np.array_equal(origin, np.arange(before))
    return made if in_order else replace(made, locate=origin.__getitem__)


def _back(source: TensorInfo, parts: list[tuple[MappedTensor, int]]) -> Order:
    """Where values of a source are in the tensors that have them, all of these one after another.

    A tensor that is stacked from this source and others has the source's values at its place.
    """

    def there(places: Rows) -> Rows:
        found = np.full(len(places), -1, np.int64)
        before = 0
        for tensor, i in parts:
            assert tensor.order is not None
            at = tensor.order.back(places + i * source.size)
            found[at >= 0] = before + at[at >= 0]
            before += tensor.info.size
        if (found < 0).any():
            raise ValueError(f"values of '{source.name}' are in no tensor")
        return found

    return Order(there, there)


def _rows(tensor: TensorInfo) -> int:
    """Rows as `Locate` counts them: of one dimension, every value is one."""
    return tensor.size // _columns(tensor)


def _columns(tensor: TensorInfo) -> int:
    """Values of such a row."""
    return tensor.shape[-1] if len(tensor.shape) > 1 else 1


class MappedModel:
    """A `Model` whose tensors are made from those of another, which it closes when it is closed.

    A request takes memory for what is asked and for two rows; where rows are cut up, for the part
    of the sources that it comes from: of a transposed stack of experts, one expert's matrix.
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

    def origin(self, name: str) -> str | None:
        """The tensor of the source whose rows a tensor has; None where it has those of several, or
        of none, or where rows are cut up.
        """
        if self._made[name].order is not None:
            return None
        sources = {source.name for source in self._made[name].sources}
        return sources.pop() if len(sources) == 1 else None

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`."""
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"values {start}..{stop} of a tensor of {tensor.size}")
        made = self._made[tensor.name]
        if made.constant is not None:
            return made.constant[start:stop].copy()
        found = kernels.widen(self._stored(made, start, stop), made.sources[0].dtype)
        if made.change:
            found = made.change.there(found.astype(np.float32))
        if made.factors:
            found = found.astype(np.float32)
            found = made.factors.applied(found, start, _columns(made.info))
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
        if made.constant is not None or made.added or made.change or made.factors:
            whole = self.values(tensor, start, stop).astype("<f4").tobytes()
        else:
            whole = self._stored(made, start, stop)
        skipped = offset - start * width
        return whole[skipped : skipped + size]

    def made(self, tensor: TensorInfo) -> MappedTensor:
        """How a tensor is made."""
        return self._made[tensor.name]

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Close the source."""
        self._source.close()

    def _stored(self, made: MappedTensor, start: int, stop: int) -> bytes:
        """Values ``start..stop`` in the dtype of the sources, in the order of the mapped tensor."""
        width = DTYPES[made.sources[0].dtype].size
        if made.order is not None:
            wanted = made.order.there(np.arange(start, stop, dtype=np.int64))
            return self._gathered(made, wanted, 1, _NEAR // width).tobytes()
        if made.locate is None:
            parts, before = [], 0
            for source in made.sources:
                first, last = max(start - before, 0), min(stop - before, source.size)
                if first < last:
                    parts.append(self._source.raw(source, first * width, (last - first) * width))
                before += source.size
            return b"".join(parts)
        columns = _columns(made.info)
        first_row = start // columns
        wanted = made.locate(np.arange(first_row, -(-stop // columns), dtype=np.int64))
        found = self._gathered(made, wanted, columns, 0)
        skipped = (start - first_row * columns) * width
        return found.view(np.uint8)[skipped : skipped + (stop - start) * width].tobytes()

    def _gathered(
        self, made: MappedTensor, wanted: Rows, columns: int, near: int
    ) -> NDArray[np.void]:
        """Rows of so many values out of the sources; rows between may be read that are so few.

        A row below 0 is one of zeros.
        """
        row = np.dtype((np.void, columns * DTYPES[made.sources[0].dtype].size))
        ends = np.cumsum([source.size // columns for source in made.sources])
        found = np.zeros(len(wanted), row)
        order = np.argsort(wanted)
        order = order[wanted[order] >= 0]
        rows = wanted[order]
        for begin, end in _runs(rows, ends, near):
            index = int(np.searchsorted(ends, rows[begin], "right"))
            first = int(ends[index - 1]) if index else 0
            low, high = int(rows[begin]), int(rows[end - 1]) + 1
            offset, nbytes = (low - first) * row.itemsize, (high - low) * row.itemsize
            data = np.frombuffer(self._source.raw(made.sources[index], offset, nbytes), row)
            if (np.diff(rows[begin:end]) != 1).any():  # else they need no copy
                data = data[rows[begin:end] - low]
            found[order[begin:end]] = data
        return found


# Bytes that it takes less time to read than to begin another read.
_NEAR = 1 << 16


def _runs(rows: Rows, ends: Rows, near: int) -> Iterator[tuple[int, int]]:
    """Where sorted rows lie near one another within one source: beginnings and ends.

    Args:
        rows: sorted.
        ends: number of rows up to the end of each source.
        near: how many rows may lie between two that are read together.
    """
    apart = (np.diff(rows) > near + 1) | (np.diff(np.searchsorted(ends, rows, "right")) != 0)
    breaks = np.flatnonzero(apart) + 1
    bounds = [0, *breaks.tolist(), len(rows)]
    return pairwise(bounds) if len(rows) else iter(())
