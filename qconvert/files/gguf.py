"""Read GGUF files. The profile, and the reasons for its limits: formats/gguf.md.

The header has a reader of our own because the ``gguf`` package trusts the file: it maps it, follows
its counts and offsets unchecked, and dies with the process when the file shrinks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.gguf_scaled import ScaledTensors
from qconvert.files.provenance import PROVENANCE, NotedRoundings
from qconvert.files.regular import RegularFile
from qconvert.ggml_types import GGML_TYPES, GgmlType
from qconvert.model import Companion, SourceFile, TensorInfo

ARCHITECTURE = "general.architecture"
KIND, ADAPTER = "general.type", "adapter"  # of a file that is no model by itself
PROJECTOR_FILE = "mmproj"  # another one: what makes tokens of images
RAW = "raw"  # the architecture of a file of ours that nobody is to run
MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 65536
MAX_DIMS = 4
MAX_VALUES = (1 << 63) - 1
# Several times what is in use; they bound the time and memory that a hostile header can ask for.
MAX_HEADER = 64 << 20
MAX_TENSORS = 250_000
MAX_KEYS = 100_000
MAX_KEY_BYTES = 65_535  # the format's own
MAX_NAME_BYTES = 1024  # of a tensor; QBLK-012
MAX_TEXT_BYTES = 16 << 20  # of all keys and their values together, but for arrays
MAX_ARRAY_VALUES = 2_000_000  # of all arrays together
MAX_ARRAY_STRING = 1 << 20  # bytes

# A number that two llama.cpps give to two types.
_OTHER_Q2_0 = (
    "Q2_0 is read in blocks of 64, as llama.cpp has it; a file of PrismML's has blocks of 128 "
    "under the same number: convert the model that it was made from"
)
_CHUNK = 1 << 20
_ALIGNMENT_KEY = "general.alignment"

# What a key or a tensor description takes at least: bounds the counts before anything is built.
_KEY_BYTES = 8 + 4 + 1
_INFO_BYTES = 8 + 4 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9


def _float32(value: float) -> str:
    return str(np.float32(value))  # the shortest text that gives the same float32


_SCALARS: dict[int, tuple[struct.Struct, Callable[..., str]]] = {
    0: (struct.Struct("<B"), str),
    1: (struct.Struct("<b"), str),
    2: (struct.Struct("<H"), str),
    3: (struct.Struct("<h"), str),
    _UINT32: (_U32, str),
    5: (struct.Struct("<i"), str),
    6: (struct.Struct("<f"), _float32),
    _BOOL: (struct.Struct("<B"), lambda value: "true" if value else "false"),
    10: (_U64, str),
    11: (struct.Struct("<q"), str),
    12: (struct.Struct("<d"), repr),
}


_BY_NUMBER = {t.number: t for t in GGML_TYPES.values()}


class GgufModel:
    """A GGUF file, opened: implements `qconvert.model.Model`.

    ``metadata`` holds numbers and strings as text, and of an array how many values it has;
    ``listed`` are the tensors as the header has them, of which some are seen together.
    """

    kind = "gguf"
    companions: tuple[Companion, ...] = ()

    def __init__(self, path: Path, file: RegularFile) -> None:
        header = _Header(file)
        self.path = path
        self.metadata = header.metadata
        self.listed = tuple(tensor for tensor, _ in header.tensors)
        self.sources: tuple[SourceFile, ...] = (
            SourceFile(path.name, file.size, file.sha256(header.data_start)),
        )
        self._file = file
        self._header = header
        self._roundings = NotedRoundings(self.metadata.get(PROVENANCE))
        self._starts = {
            tensor.name: header.data_start + offset for tensor, offset in header.tensors
        }
        self._scaled = ScaledTensors(self.listed, self.listed_raw, path)
        self.tensors = self._scaled.tensors

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Values ``start..stop`` of the flattened tensor, see `qconvert.model.Model.values`.

        Raises:
            FormatError: the file has become shorter since it was opened.
            UnsupportedError: a block type that nothing here can decode.
        """
        if not 0 <= start <= stop <= tensor.size:
            raise ValueError(f"values {start}..{stop} of a tensor of {tensor.size}")
        return self.stored(tensor).values(start, stop)

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in the file."""
        return self._scaled.stored(tensor, self.rounding(tensor))

    def rounding(self, tensor: TensorInfo) -> str:
        """How the codes of a tensor were chosen, as far as the file's provenance says."""
        return self._roundings.of(tensor.name)

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        return "structure; GGUF has no digests"

    def value(self, key: str) -> tuple[str, Any]:
        """The type and value of a key in the metadata, read again from the file.

        Returns:
            The name in ``gguf.GGUFValueType`` and the value; of an array the type of its elements,
            and a list of them.

        Raises:
            KeyError: there is no such key.
            FormatError: a string is not UTF-8, or the file has become shorter.
        """
        return self._header.value(key)

    def strings(self, key: str) -> tuple[str, ...] | None:
        """The values of an array of strings in the metadata; None if ``key`` is no such array.

        Raises:
            FormatError: a string is not UTF-8, or the file has become shorter.
        """
        if key not in self.metadata:
            return None
        kind, value = self.value(key)
        return tuple(value) if kind == "STRING" and isinstance(value, list) else None

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of the tensor; see `listed_raw`."""
        return self._scaled.raw(tensor, offset, size)

    def listed_raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of a tensor as it is listed.

        Raises:
            FormatError: the file has become shorter since it was opened.
        """
        if not 0 <= offset <= offset + size <= tensor.nbytes:
            raise ValueError(f"bytes {offset}..{offset + size} of a tensor of {tensor.nbytes}")
        return self._file.read(self._starts[tensor.name] + offset, size)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            InputError: its size or its time of modification differs.
        """
        self._file.check_unchanged()

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()


def open_gguf(path: Path) -> GgufModel:
    """Open a GGUF file, reading and checking everything before the tensor data.

    Raises:
        InputError: no such file, not a regular file, or no permission.
        MachineError: the operating system cannot read it.
        FormatError: the file breaks a rule of the format.
        UnsupportedError: big-endian, or a version or tensor type unknown to us.
    """
    file = RegularFile(path)
    try:
        return GgufModel(path, file)
    except BaseException:
        file.close()
        raise


class _Header:
    """Everything before the tensor data, read from front to back and checked.

    Attributes:
        metadata: key -> text.
        tensors: each tensor with the offset of its bytes in the tensor data.
        data_start: where the tensor data begins in the file.
    """

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0
        self._reading: str | None = None  # the key or tensor under way, for messages
        self._text_bytes = self._array_values = 0
        self._check_version()
        tensor_count = self._count("tensors", _INFO_BYTES, MAX_TENSORS)
        key_count = self._count("keys", _KEY_BYTES, MAX_KEYS)
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}  # of each value: its type and offset
        self._alignment = DEFAULT_ALIGNMENT
        for _ in range(key_count):
            self._read_key()
        self.tensors: list[tuple[TensorInfo, int]] = []
        self._read_tensors(tensor_count)
        # A file without tensors may end before the padding.
        self.data_start = min(
            -(-self._position // self._alignment) * self._alignment, self._file.size
        )
        self._check_places()
        self._buffer = b""  # the header may be asked for strings later

    def value(self, key: str) -> tuple[str, Any]:
        """See `GgufModel.value`."""
        kind, self._position = self._places[key]
        count = None
        if kind == _ARRAY:
            kind, count = self._u32(), self._u64()

        name = gguf.GGUFValueType(kind).name
        if kind == _STRING:
            what = f"string in '{key}'"
            if count is None:
                return name, self._string(what, MAX_TEXT_BYTES)
            return name, [self._string(what, MAX_ARRAY_STRING) for _ in range(count)]
        layout = _SCALARS[kind][0]
        data = self._take(layout.size * (1 if count is None else count))
        values = np.frombuffer(data, layout.format).tolist()
        if kind == _BOOL:
            values = [bool(v) for v in values]
        return name, values[0] if count is None else values

    def _check_version(self) -> None:
        magic = self._take(4)
        if magic != MAGIC:
            raise self._broken("not a GGUF file", "GGUF-MAGIC", found=magic.hex(" "))
        version = self._u32()
        if version in VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise UnsupportedError(
                "a big-endian GGUF file",
                path=self._file.path,
                hint="convert it with gguf-convert-endian from the gguf package",
                code="GGUF-ENDIAN",
            )
        raise UnsupportedError(
            "unknown GGUF version",
            path=self._file.path,
            found=version,
            wanted="2 or 3",
            code="GGUF-VERSION",
        )

    def _read_key(self) -> None:
        start = self._position
        key = self._string("key", MAX_KEY_BYTES)
        if not key:
            raise self._broken("a key is empty", "GGUF-KEY")
        self._reading = f"key '{key}'"
        if key in self.metadata:
            raise self._broken(f"key '{key}' appears twice", "GGUF-DUPLICATE-KEY")
        kind = self._u32()
        self._places[key] = kind, self._position
        if kind == _STRING:
            self.metadata[key] = self._string(f"value of '{key}'", MAX_TEXT_BYTES)
            self._count_text(self._position - start)
        elif kind == _ARRAY:
            self._count_text(self._position - start)
            self.metadata[key] = f"[{self._skip_array(key)} values]"
        elif kind in _SCALARS:
            self.metadata[key] = self._scalar(key, kind)
            self._count_text(self._position - start)
        else:
            raise self._broken(f"key '{key}' has an unknown type", "GGUF-VALUE-TYPE", found=kind)
        if key == _ALIGNMENT_KEY:
            self._set_alignment(kind)
        self._reading = None

    def _count_text(self, size: int) -> None:
        """Bound what keys and their values, but for arrays, take in memory."""
        self._text_bytes += size
        if self._text_bytes > MAX_TEXT_BYTES:
            raise self._broken(
                "keys and their values are too long together",
                "GGUF-STRING",
                found=f"{self._text_bytes:,} bytes",
                wanted=f"at most {MAX_TEXT_BYTES:,}",
            )

    def _scalar(self, key: str, kind: int) -> str:
        layout, text = _SCALARS[kind]
        (value,) = layout.unpack(self._take(layout.size))
        if kind == _BOOL and value > 1:
            raise self._broken(
                f"key '{key}' is no truth value", "GGUF-BOOL", found=value, wanted="0 or 1"
            )
        return text(value)

    def _skip_array(self, key: str) -> int:
        """Pass over an array; its number of values."""
        kind = self._u32()
        if kind == _ARRAY:
            raise self._broken(f"key '{key}' is an array of arrays", "GGUF-NESTED-ARRAY")
        if kind == _STRING:
            count = self._count(f"strings in '{key}'", _U64.size, MAX_ARRAY_VALUES)
            self._skip_strings(count)
        elif kind in _SCALARS:
            size = _SCALARS[kind][0].size
            count = self._count(f"values in '{key}'", size)
            self._skip(count * size)
        else:
            raise self._broken(
                f"key '{key}' is an array of an unknown type", "GGUF-VALUE-TYPE", found=kind
            )
        self._array_values += count
        if self._array_values > MAX_ARRAY_VALUES:
            raise self._broken(
                "too many values in arrays",
                "GGUF-COUNT",
                found=f"{self._array_values:,}",
                wanted=f"at most {MAX_ARRAY_VALUES:,} in all arrays together",
            )
        return count

    def _skip_strings(self, count: int) -> None:
        """Pass over strings; tokenizers have hundreds of thousands."""
        for _ in range(count):
            at = self._position - self._buffer_start
            if at + _U64.size > len(self._buffer):
                size = self._u64()
            else:
                (size,) = _U64.unpack_from(self._buffer, at)
                self._position += _U64.size
            self._check_length("a string", size, MAX_ARRAY_STRING)
            self._skip(size)

    def _set_alignment(self, kind: int) -> None:
        text = self.metadata[_ALIGNMENT_KEY]
        value = int(text) if kind == _UINT32 else 0
        if not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            raise self._broken(
                "bad alignment",
                "GGUF-ALIGNMENT",
                found=text,
                wanted=f"a power of two up to {MAX_ALIGNMENT} as uint32",
            )
        self._alignment = value

    def _read_tensors(self, count: int) -> None:
        names: set[str] = set()
        for _ in range(count):
            self._reading = f"tensor {len(self.tensors) + 1:,} of {count:,}"
            name = self._string("tensor name", MAX_NAME_BYTES)
            if name in names:
                raise self._broken("the name appears twice", "GGUF-DUPLICATE-TENSOR", tensor=name)
            names.add(name)
            shape = self._shape(name)
            storage = self._storage(name, shape)
            nbytes = math.prod(shape) // storage.block * storage.nbytes
            offset = self._u64()
            if offset % self._alignment:
                raise self._broken(
                    "bad offset",
                    "GGUF-OFFSET",
                    tensor=name,
                    found=offset,
                    wanted=f"a multiple of {self._alignment}",
                )
            self.tensors.append((TensorInfo(name, shape, storage.name, nbytes), offset))
        self._reading = None

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape, outermost dimension first; GGUF begins with the innermost."""
        dims = self._u32()
        if dims > MAX_DIMS:
            raise self._broken(
                "too many dimensions",
                "GGUF-DIMS",
                tensor=name,
                found=dims,
                wanted=f"at most {MAX_DIMS}",
            )
        shape = tuple(self._u64() for _ in range(dims))[::-1]
        # A 0 counts as 1, so that an empty tensor's other dimensions are bounded too.
        if math.prod(max(d, 1) for d in shape) > MAX_VALUES:
            raise self._broken("the shape overflows", "GGUF-SHAPE", tensor=name, found=shape)
        return shape

    def _storage(self, name: str, shape: tuple[int, ...]) -> GgmlType:
        number = self._u32()
        storage = _BY_NUMBER.get(number)
        if storage is None:
            raise UnsupportedError(
                f"tensor type {number} is not known",
                path=self._file.path,
                tensor=name,
                hint="a newer qconvert may know it",
                code="GGUF-TYPE",
            )
        row = shape[-1] if shape else 1
        if row % storage.block:
            raise self._broken(
                f"a row of {storage.name} is not a whole number of blocks",
                "GGUF-BLOCK",
                tensor=name,
                found=row,
                wanted=f"a multiple of {storage.block}",
            )
        return storage

    def _check_places(self) -> None:
        """Refuse tensors that leave the file or share bytes."""
        available = self._file.size - self.data_start
        hint = _OTHER_Q2_0 if any(t.dtype == "Q2_0" for t, _ in self.tensors) else None
        for tensor, offset in self.tensors:
            if offset + tensor.nbytes > available:
                raise self._broken(
                    "the tensor leaves the file",
                    "GGUF-BOUNDS",
                    tensor=tensor.name,
                    found=f"bytes {offset} to {offset + tensor.nbytes}",
                    wanted=f"at most {available} bytes of tensor data",
                    hint=hint,
                )
        ordered = sorted((o, o + t.nbytes, t.name) for t, o in self.tensors if t.nbytes)
        for (_, end, before), (start, _, name) in pairwise(ordered):
            if start < end:
                raise self._broken(
                    f"shares bytes with tensor '{before}'",
                    "GGUF-OVERLAP",
                    tensor=name,
                    found=start,
                    wanted=f"at least {end}",
                    hint=hint,
                )

    def _count(self, what: str, size: int, limit: int = MAX_HEADER) -> int:
        """A count, at most ``limit``, of things that take at least ``size`` bytes each."""
        count = self._u64()
        most = min(limit, (self._file.size - self._position) // size)
        if count > most:
            raise self._broken(
                f"too many {what}",
                "GGUF-COUNT",
                found=count,
                wanted=f"at most {most}",
                hint="the file is damaged or cut off: download it again",
            )
        return count

    def _string(self, what: str, most: int) -> str:
        size = self._u64()
        self._check_length(f"a {what}", size, most)
        try:
            return self._take(size).decode()
        except UnicodeDecodeError:
            raise self._broken(f"a {what} is not UTF-8", "GGUF-UTF8") from None

    def _u32(self) -> int:
        number: int = _U32.unpack(self._take(4))[0]
        return number

    def _u64(self) -> int:
        number: int = _U64.unpack(self._take(8))[0]
        return number

    def _take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        position = self._position
        self._skip(size)
        start = position - self._buffer_start
        if start < 0 or start + size > len(self._buffer):  # < 0: a value asked for later
            wanted = min(max(size, _CHUNK), self._file.size - position)
            self._buffer = self._file.read(position, wanted)
            self._buffer_start, start = position, 0
        return self._buffer[start : start + size]

    def _check_length(self, what: str, found: int, most: int) -> None:
        """Refuse a string above its limit; one that the file does not hold is another fault."""
        if found > most and self._position + found <= self._file.size:
            raise self._broken(
                f"{what} is too long",
                "GGUF-STRING",
                found=f"{found:,} bytes",
                wanted=f"at most {most:,}",
            )

    def _skip(self, size: int) -> None:
        end = self._position + size
        if end > self._file.size:
            raise self._broken(
                "the file ends inside its header"
                + (f", in {self._reading}" if self._reading else ""),
                "GGUF-TRUNCATED",
                found=f"{self._file.size} bytes",
                wanted=f"at least {end}",
            )
        if end > MAX_HEADER:
            raise self._broken(
                "the header is too long",
                "GGUF-HEADER-SIZE",
                found=f"at least {end} bytes",
                wanted=f"at most {MAX_HEADER}",
            )
        self._position = end

    def _broken(
        self,
        message: str,
        code: str,
        *,
        tensor: str | None = None,
        found: object = None,
        wanted: object = None,
        hint: str | None = None,
    ) -> FormatError:
        return FormatError(
            message,
            path=self._file.path,
            tensor=tensor,
            found=found,
            wanted=wanted,
            hint=hint,
            code=code,
        )
