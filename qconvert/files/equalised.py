"""A model whose channels are rescaled by powers of two, the same function in other numbers.

What one tensor gives out is divided by a factor a channel and what the next ones multiply it with
is multiplied by the same (`qconvert.architectures.equalisation` knows the pairs). A power of two
changes no digit of a weight, so nothing is lost but at the ends of the range of exponents. F16, of
which that range is small, is read as F32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.dequantized import bytes_of
from qconvert.model import DTYPES, Companion, Model, SourceFile, TensorInfo

I8 = NDArray[np.int8]
FLOATS = ("F64", "F32", "F16", "BF16")  # what can be rescaled
MOST = 26  # of an exponent to either side: as many as there are letters
EQUALISATION = "equalisation"  # the member of the provenance
_ALPHABET = "zyxwvutsrqponmlkjihgfedcba0ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_VALUE = {letter: i - MOST for i, letter in enumerate(_ALPHABET)}
_TEXT = re.compile("[0A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Exponents:
    """Exponents e of the factors 2^e of one tensor.

    Attributes:
        rows: each row, of a vector each value, is divided; (rows,). None: none is.
        columns: each column is multiplied; (matrices, columns), for each of as many equal matrices
            as lie below each other in the tensor. None: none is.
        offset: what a norm adds to its weights before it multiplies with them: it is the sum that
            is divided.
    """

    rows: I8 | None = None
    columns: I8 | None = None
    offset: float = 0.0

    def applied(
        self, values: NDArray[np.floating], shape: tuple[int, ...], start: int
    ) -> NDArray[np.floating]:
        """Values from ``start`` on of a flattened tensor of some shape, rescaled."""
        columns = shape[-1] if len(shape) > 1 else 1
        first, last = start // columns, -(-(start + len(values)) // columns)
        rows = np.arange(first, last)
        exponents = np.zeros((last - first, columns), np.int8)
        if self.columns is not None:
            exponents += self.columns[rows // (math.prod(shape[:-1]) // len(self.columns))]
        if self.rows is not None:
            exponents -= self.rows[rows][:, None]
        skipped = start - first * columns
        factors = np.ldexp(values.dtype.type(1), exponents.ravel()[skipped:][: len(values)])
        if not self.offset:
            return values * factors
        wide = (values.astype(np.float64) + self.offset) * factors - self.offset
        return wide.astype(values.dtype)


class EqualisedModel:
    """A `Model` with some tensors rescaled, of another that every tensor has a plain dtype in;
    `close` closes that.

    Attributes:
        source: the other.
        exponents: by the names of the tensors.
    """

    def __init__(self, source: Model, exponents: Mapping[str, Exponents]) -> None:
        self.source = source
        self.exponents = exponents
        self.path: Path = source.path
        self.kind = source.kind
        self.metadata = source.metadata
        self.sources: tuple[SourceFile, ...] = source.sources
        self.companions: tuple[Companion, ...] = source.companions
        self._stored = {t.name: t for t in source.tensors}
        self.tensors = tuple(self.rescaled(t) for t in source.tensors)

    def rescaled(self, tensor: TensorInfo) -> TensorInfo:
        """A tensor of the source as it is here."""
        found = self.exponents.get(tensor.name)
        if found is None or (tensor.dtype != "F16" and not found.offset):
            return tensor
        dtype = "F64" if tensor.dtype == "F64" else "F32"
        return replace(tensor, dtype=dtype, nbytes=DTYPES[dtype].nbytes(tensor.size))

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`."""
        stored = self._stored[tensor.name]
        values = self.source.values(stored, start, stop)
        found = self.exponents.get(tensor.name)
        return values if found is None else found.applied(values, stored.shape, start)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of the tensor as it would be stored."""
        if tensor.name not in self.exponents:
            return self.source.raw(tensor, offset, size)
        dtype = self.rescaled(self._stored[tensor.name]).dtype
        return bytes_of(partial(self.values, tensor), dtype, offset, size)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self.source.check_unchanged()

    def close(self) -> None:
        """Close the source."""
        self.source.close()


# --- what a file says of it -----------------------------------------------------------------------


def noted(model: Model) -> dict[str, Any]:
    """The member of the provenance, of a model that is equalised; else nothing.

    A vector is a text with a letter an exponent: ``0``, ``A`` to ``Z`` for 1 to 26, ``a`` to ``z``
    for -1 to -26. Tensors name theirs by number, for many have the same.
    """
    return noted_exponents(model.exponents) if isinstance(model, EqualisedModel) else {}


def noted_exponents(exponents: Mapping[str, Exponents]) -> dict[str, Any]:
    """The same of a model whose tensors have been rescaled elsewhere."""
    if not exponents:
        return {}
    vectors: dict[str, int] = {}
    tensors = {}
    for name, of_tensor in exponents.items():
        entry: dict[str, int] = {"offset": 1} if of_tensor.offset else {}
        for kind, numbers in (("rows", of_tensor.rows), ("columns", of_tensor.columns)):
            if numbers is not None:
                text = "".join(_ALPHABET[e + MOST] for e in numbers.ravel().tolist())
                entry[kind] = vectors.setdefault(text, len(vectors))
        tensors[name] = entry
    return {EQUALISATION: {"tensors": tensors, "vectors": list(vectors)}}


def read_exponents(provenance: object, path: Path) -> dict[str, Exponents]:
    """Exponents by tensor from the provenance of a file; none where it has none.

    Columns are in one matrix; `fitted` takes them apart.

    Raises:
        FormatError: no such member as `noted` makes.
    """
    if not isinstance(provenance, dict) or EQUALISATION not in provenance:
        return {}

    def wrong(tensor: str | None, found: object, wanted: str) -> FormatError:
        return FormatError(
            "impossible factors of the equalisation in the provenance",
            path=path,
            tensor=tensor,
            found=found,
            wanted=wanted,
            code="EQUALISATION",
        )

    member = provenance[EQUALISATION]
    tensors = member.get("tensors") if isinstance(member, dict) else None
    texts = member.get("vectors") if isinstance(member, dict) else None
    if not isinstance(tensors, dict) or not isinstance(texts, list):
        raise wrong(None, type(member).__name__, "an object of tensors and a list of vectors")
    vectors = []
    for text in texts:
        if not isinstance(text, str) or not _TEXT.fullmatch(text):
            raise wrong(None, text, f"a text of 0, A to Z and a to z: exponents up to {MOST}")
        vectors.append(np.array([_VALUE[letter] for letter in text], np.int8))
    found = {}
    for name, entry in tensors.items():
        if not isinstance(entry, dict) or not entry.keys() <= {"rows", "columns", "offset"}:
            raise wrong(name, entry, "an object of rows, columns and offset")
        for kind, value in entry.items():
            most = 1 if kind == "offset" else len(vectors) - 1
            if type(value) is not int or not 0 <= value <= most:
                raise wrong(name, f"{kind} {value}", f"a whole number up to {most}")
        rows, columns = (
            vectors[entry[kind]] if kind in entry else None for kind in ("rows", "columns")
        )
        whole = None if columns is None else columns[None]
        found[name] = Exponents(rows, whole, float(entry.get("offset", 0)))
    return found


def equalised(model: Model, exponents: Mapping[str, Exponents]) -> Model:
    """The model with its tensors rescaled, which were read from a file; itself without any.

    Raises:
        UnsupportedError: they are not of this model's tensors.
    """
    if not exponents:
        return model
    tensors = {t.name: t for t in model.tensors}
    found = {name: _fitted(model, tensors.get(name), name, e) for name, e in exponents.items()}
    return EqualisedModel(model, found)


def _fitted(model: Model, tensor: TensorInfo | None, name: str, e: Exponents) -> Exponents:
    """Exponents of a tensor, with those of its columns for each matrix."""
    if tensor is not None and tensor.dtype in FLOATS and tensor.shape:
        rows = tensor.size if len(tensor.shape) == 1 else math.prod(tensor.shape[:-1])
        good = e.rows is None or len(e.rows) == rows
        columns = e.columns
        if columns is not None:
            width = tensor.shape[-1]
            matrices = columns.size // max(width, 1)
            good &= len(tensor.shape) > 1 and matrices > 0 and columns.size == matrices * width
            good = good and rows % matrices == 0
            columns = columns.reshape(matrices, width) if good else None
        if good:
            return replace(e, columns=columns)
    sizes = [
        f"{a.size:,} {k}" for a, k in ((e.rows, "rows"), (e.columns, "columns")) if a is not None
    ]
    raise UnsupportedError(
        "the file was equalised by factors of a tensor that the source does not have",
        path=model.path,
        tensor=name,
        found="no such tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}",
        wanted=f"floating numbers with factors of {' and '.join(sizes)}",
        hint="give the model that the file was made from",
        code="EQUALISATION-SOURCE",
    )
