"""Write GGUF files as a stream: the header at once, then each tensor's bytes in order.

Keys and tensor descriptions are encoded by the ``gguf`` package; the profile is formats/gguf.md.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, cast

import gguf
import numpy as np

from qconvert.errors import UnsupportedError
from qconvert.files.gguf import (
    ARCHITECTURE,
    MAX_ARRAY_STRING,
    MAX_ARRAY_VALUES,
    MAX_DIMS,
    MAX_HEADER,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_TENSORS,
    MAX_TEXT_BYTES,
)
from qconvert.ggml_types import GGML_TYPES

MAX_NAME_BYTES = 63  # GGML_MAX_NAME, less the terminating zero
FIXED_BYTES = 4 + 4 + 8 + 8  # magic, version, numbers of tensors and of keys

MetadataScalar = str | int | float | bool

_ALIGNMENT = "general.alignment"


@dataclass(frozen=True, slots=True)
class GgufValue:
    """A metadata value in a stated type, for readers that want exactly that one.

    Attributes:
        type: of the value or of each element: a name of ``gguf.GGUFValueType``, such as
            ``UINT32``.
        value: a scalar, or a sequence, which becomes an array.
    """

    type: str
    value: MetadataScalar | Sequence[MetadataScalar]


MetadataValue = MetadataScalar | Sequence[MetadataScalar] | GgufValue


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to be written.

    Attributes:
        name: at most 63 bytes of UTF-8.
        shape: outermost dimension first.
        ggml_type: a name of `GGML_TYPES`, such as ``F16`` or ``Q4_0``.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, padding not counted."""
        kind = GGML_TYPES[self.ggml_type]
        return math.prod(self.shape) // kind.block * kind.nbytes


def string_key_bytes(key: str, value: str) -> int:
    """What a key and its string take in a file."""
    return 8 + len(key.encode()) + 4 + 8 + len(value.encode())


def check_gguf(tensors: Sequence[GgufTensor]) -> None:
    """Refuse tensors that a GGUF file cannot hold, before a byte is written.

    Raises:
        UnsupportedError: names the first such tensor.
    """
    _check_limit("tensors", len(tensors), MAX_TENSORS)
    names: set[str] = set()
    for tensor in tensors:
        _check_name(tensor)
        if tensor.name in names:
            raise UnsupportedError(
                "GGUF cannot hold two tensors of one name",
                tensor=tensor.name,
                code="GGUF-DUPLICATE-TENSOR",
            )
        names.add(tensor.name)
        _check_type(tensor)
        _check_shape(tensor)


class GgufWriter:
    """Writes one GGUF file, version 3, little-endian, with an alignment of 32 bytes.

    For each tensor in the order given call `begin`, then `append` until it is complete; at the end
    `finish`. On an error call `close`; what was written so far is then no valid file.

    Args:
        path: the file, replaced if it exists.
        metadata: keys in the order in which they are written. Integers become uint32, or the first
            of int32, uint64 and int64 that holds them; floats become float32; a sequence becomes an
            array of one type, found in the same way. `GgufValue` states the type. The key
            ``general.alignment`` is left out: it describes another file's layout, not the model.
        tensors: in the order in which they are written.

    Raises:
        UnsupportedError: a tensor, key or value that GGUF cannot hold; nothing was written.
        OSError: the file could not be written.

    Attributes:
        header_size: bytes before the first tensor.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, MetadataValue],
        tensors: Sequence[GgufTensor],
    ) -> None:
        check_gguf(tensors)
        _check_limit("keys", len(metadata), MAX_KEYS)
        values = {key: _checked(key, value) for key, value in metadata.items()}
        _check_sizes(values)
        stated = values.get(ARCHITECTURE)
        architecture = stated.value if stated else None
        if not isinstance(architecture, str) or not architecture:
            raise UnsupportedError(f"GGUF needs the key '{ARCHITECTURE}'", code="GGUF-ARCHITECTURE")
        self._tensors = tuple(tensors)
        self._current = -1
        self._missing = 0  # bytes that the current tensor still needs
        self._writer = gguf.GGUFWriter(path, architecture)
        for key, stated in values.items():
            if key in (ARCHITECTURE, _ALIGNMENT):
                continue
            kind = gguf.GGUFValueType[stated.type]
            if _is_sequence(stated.value):
                self._writer.add_key_value(key, stated.value, gguf.GGUFValueType.ARRAY, kind)
            else:
                self._writer.add_key_value(key, stated.value, kind)
        for tensor in self._tensors:
            self._writer.add_tensor_info(
                tensor.name,
                tensor.shape,
                np.dtype(np.float32),  # not uint8, which would make the shape one of bytes
                tensor.nbytes,
                # Our own number, for the package may not know the type yet.
                raw_dtype=cast(gguf.GGMLQuantizationType, GGML_TYPES[tensor.ggml_type].number),
            )
        self._write_header()

    def begin(self, index: int) -> None:
        """Start the tensor with that index; the one before must be complete."""
        self._check_complete()
        if index != self._current + 1 or index >= len(self._tensors):
            raise RuntimeError(f"tensor {index} does not follow tensor {self._current}")
        self._current = index
        self._missing = self._tensors[index].nbytes

    def append(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the tensor that was begun."""
        if len(data) > self._missing:
            raise RuntimeError(f"{len(data) - self._missing} bytes too many for a tensor")
        self._out.write(data)
        self._missing -= len(data)
        if not self._missing:
            self._pad()

    def finish(self) -> None:
        """Check that every tensor is complete and close the file."""
        self._check_complete()
        if self._current + 1 != len(self._tensors):
            raise RuntimeError(f"tensor {self._current + 1} was not written")
        self.close()

    def close(self) -> None:
        """Close the file, complete or not; a second call does nothing."""
        self._writer.close()

    def _write_header(self) -> None:
        try:
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
            self._out = self._writer.fout[0]
            self._pad()
            self.header_size = self._out.tell()
            _check_limit("bytes of header", self.header_size, MAX_HEADER)
        except BaseException:
            self.close()
            raise

    def _pad(self) -> None:
        """Zeros up to the next multiple of the alignment; none when the file ends there already."""
        self._writer.write_padding(self._out, self._out.tell())

    def _check_complete(self) -> None:
        if self._missing:
            raise RuntimeError(f"tensor {self._current} lacks {self._missing} bytes")


def _check_sizes(values: Mapping[str, GgufValue]) -> None:
    """Refuse metadata that our reader would refuse."""
    text = array_values = longest = 0
    for key, stated in values.items():
        text += string_key_bytes(key, "")
        longest = max(longest, len(key.encode()))
        if _is_sequence(stated.value):
            array_values += len(stated.value)
            strings = (s for s in stated.value if isinstance(s, str))
            most = max((len(s.encode()) for s in strings), default=0)
            _check_limit(f"bytes of a string in '{key}'", most, MAX_ARRAY_STRING)
        elif isinstance(stated.value, str):
            text += len(stated.value.encode())
    _check_limit("bytes of a key", longest, MAX_KEY_BYTES)
    _check_limit("bytes of keys and their values", text, MAX_TEXT_BYTES)
    _check_limit("values in arrays", array_values, MAX_ARRAY_VALUES)


def _check_limit(what: str, found: int, most: int) -> None:
    if found > most:
        raise UnsupportedError(
            f"too many {what} for a GGUF file",
            found=f"{found:,}",
            wanted=f"at most {most:,}",
            code="GGUF-LIMIT",
        )


def _check_name(tensor: GgufTensor) -> None:
    length = _utf8_length(tensor.name)
    if length is None or not 0 < length <= MAX_NAME_BYTES or "\0" in tensor.name:
        raise UnsupportedError(
            "GGUF cannot hold this name",
            tensor=tensor.name,
            found="no UTF-8" if length is None else f"{length} bytes",
            wanted=f"1 to {MAX_NAME_BYTES} bytes of UTF-8 without a zero",
            code="GGUF-NAME",
        )


def _check_type(tensor: GgufTensor) -> None:
    if tensor.ggml_type not in GGML_TYPES:
        raise UnsupportedError(
            f"GGUF has no type {tensor.ggml_type}",
            tensor=tensor.name,
            hint="write a .qblk file, which keeps every type",
            code="GGUF-DTYPE",
        )


def _check_shape(tensor: GgufTensor) -> None:
    if len(tensor.shape) > MAX_DIMS:
        raise UnsupportedError(
            "too many dimensions for GGUF",
            tensor=tensor.name,
            found=len(tensor.shape),
            wanted=f"at most {MAX_DIMS}",
            code="GGUF-DIMS",
        )
    if 0 in tensor.shape:
        raise UnsupportedError(
            "GGUF cannot hold an empty tensor",
            tensor=tensor.name,
            found=list(tensor.shape),
            code="GGUF-EMPTY",
        )
    row = tensor.shape[-1] if tensor.shape else 1
    block = GGML_TYPES[tensor.ggml_type].block
    if row % block:
        raise UnsupportedError(
            f"rows do not divide into blocks of {tensor.ggml_type}",
            tensor=tensor.name,
            found=f"{row} values",
            wanted=f"a multiple of {block}",
            code="GGUF-BLOCK",
        )


# Integer types with their ranges, those that a value without a stated type can take first.
_INTEGERS = {
    "UINT32": (0, (1 << 32) - 1),
    "INT32": (-(1 << 31), (1 << 31) - 1),
    "UINT64": (0, (1 << 64) - 1),
    "INT64": (-(1 << 63), (1 << 63) - 1),
    "UINT8": (0, (1 << 8) - 1),
    "INT8": (-(1 << 7), (1 << 7) - 1),
    "UINT16": (0, (1 << 16) - 1),
    "INT16": (-(1 << 15), (1 << 15) - 1),
}
_UNSTATED = ("BOOL", "UINT32", "INT32", "UINT64", "INT64", "STRING", "FLOAT32")


def _checked(key: str, value: MetadataValue) -> GgufValue:
    """The value with the GGUF type it is written in."""
    if not _utf8_length(key):
        raise UnsupportedError("GGUF cannot hold this key", found=repr(key), code="GGUF-KEY")
    kinds: Sequence[str] = _UNSTATED
    if isinstance(value, GgufValue):
        kinds, value = (value.type,), value.value
    elements = value if _is_sequence(value) else (value,)
    for kind in kinds:
        if elements and all(_holds(kind, element) for element in elements):
            return GgufValue(kind, value)
    stated = f"a value of type {kinds[0]}" if len(kinds) == 1 else None
    raise UnsupportedError(
        f"GGUF cannot hold the value of key '{key}'",
        found=reprlib.repr(value),
        wanted=stated,
        code="GGUF-VALUE",
    )


def _is_sequence(value: object) -> TypeGuard[Sequence[MetadataScalar]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _holds(kind: str, value: object) -> bool:
    """Whether a value of that type is written as it is, a float rounded to its type."""
    if kind == "STRING":
        return isinstance(value, str) and _utf8_length(value) is not None
    if kind == "BOOL":
        return isinstance(value, bool)
    if kind == "FLOAT32":
        return isinstance(value, float) and _fits_float32(value)
    if kind == "FLOAT64":
        return isinstance(value, float)
    low, high = _INTEGERS[kind]
    return type(value) is int and low <= value <= high


def _fits_float32(value: float) -> bool:
    try:
        struct.pack("<f", value)
    except OverflowError:
        return False
    return True


def _utf8_length(text: str) -> int | None:
    """Bytes of ``text`` in UTF-8; None for a lone surrogate, which JSON lets through."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None
