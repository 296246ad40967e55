"""What every layer talks about: dtypes, tensors, and a model as a lazy collection of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHT = ".weight"  # what follows the name of a layer in that of its weight


@dataclass(frozen=True, slots=True)
class DType:
    """An element type as safetensors and qblk name it.

    Attributes:
        name: the name in the file header.
        bits: of a value; below 8 they follow each other, the first in the lowest bits.
        kind: ``float``, ``int``, ``uint``, ``bool``; ``narrow`` for floating types that are kept as
            they are, for their values mean little without scales that lie elsewhere or have no
            place in what we write; ``complex``, which has no order and no statistics.
    """

    name: str
    bits: int
    kind: str

    @property
    def size(self) -> int:
        """Bytes of a value; of types of whole bytes."""
        return self.bits // 8

    @property
    def floating(self) -> bool:
        return self.kind == "float"

    def nbytes(self, values: int) -> int:
        """Bytes of so many values, which end on a byte."""
        return values * self.bits // 8


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("F64", 64, "float"),
        DType("F32", 32, "float"),
        DType("F16", 16, "float"),
        DType("BF16", 16, "float"),
        DType("F8_E4M3", 8, "float"),
        DType("F8_E5M2", 8, "float"),
        DType("I64", 64, "int"),
        DType("I32", 32, "int"),
        DType("I16", 16, "int"),
        DType("I8", 8, "int"),
        DType("U64", 64, "uint"),
        DType("U32", 32, "uint"),
        DType("U16", 16, "uint"),
        DType("U8", 8, "uint"),
        DType("BOOL", 8, "bool"),
        DType("F8_E8M0", 8, "narrow"),
        DType("F8_E4M3FNUZ", 8, "narrow"),
        DType("F8_E5M2FNUZ", 8, "narrow"),
        DType("F6_E2M3", 6, "narrow"),
        DType("F6_E3M2", 6, "narrow"),
        DType("F4", 4, "narrow"),
        DType("C64", 64, "complex"),
    )
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, without its values.

    Attributes:
        name: as in the file.
        shape: outermost dimension first; ``()`` is a single value.
        dtype: a name of `DTYPES`, a ggml type (``Q4_0``) or a scheme (``q4_block64_asym``).
        nbytes: bytes that the tensor occupies in its file, padding between tensors not counted.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether the stored values are plain floating numbers (not ints, not quantized)."""
        return self.dtype in DTYPES and DTYPES[self.dtype].floating

    @property
    def coded(self) -> bool:
        """Whether it is stored as codes of a quantization, and not in a dtype of numbers."""
        return self.dtype not in DTYPES

    @property
    def real(self) -> bool:
        """Whether the values are real numbers."""
        return self.coded or DTYPES[self.dtype].kind != "complex"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a model, as provenance: base name, length and SHA-256 of its header."""

    name: str
    size: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class Companion:
    """A small file that belongs to a model, such as its configuration or tokenizer.

    Attributes:
        name: relative to the model's directory, with ``/``.
        size: in bytes.
        read: gives the bytes; raises an InputError when they are not to be had any more.
    """

    name: str
    size: int
    read: Callable[[], bytes]


class Model(Protocol):
    """A model file or directory, opened: headers are read and checked, values are read on demand.

    ``values`` and ``raw`` may be called from several threads at once.
    """

    path: Path
    kind: str  # "safetensors", "gguf" or "qblk"
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    sources: tuple[SourceFile, ...]
    companions: tuple[Companion, ...]

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor as numbers, shape (stop - start,).

        float32 for every floating or quantized type up to 32 bits and for small integers (exact);
        float64 for F64 and for integers of 32 and 64 bits (the latter rounded); complex64 for a
        tensor that is not `TensorInfo.real`.
        """
        ...

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of the tensor."""
        ...

    def check_unchanged(self) -> None:
        """Raise an InputError if a file is not the one that was opened."""
        ...

    def close(self) -> None: ...


def layer_name(name: str) -> str:
    """The layer of a weight or of an activation array: the name without ``.weight``."""
    return name.removesuffix(WEIGHT)
