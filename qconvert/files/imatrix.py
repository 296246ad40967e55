"""Importance matrices of llama.cpp: how much each input channel of a weight matters.

Both forms of the file, and what is refused: formats/imatrix.md. Read from llama.cpp at 0c1e57098:
``tools/imatrix/imatrix.cpp``, ``common/imatrix-loader.cpp``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.gguf import DEFAULT_ALIGNMENT, MAGIC, GgufModel
from qconvert.files.regular import RegularFile
from qconvert.model import TensorInfo

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = (
    "imatrix.datasets",
    "imatrix.chunk_count",
    "imatrix.chunk_size",
)
MAX_NAME_BYTES = 63  # of a tensor in GGUF, suffix included
MAX_NUMBER = (1 << 32) - 1  # of chunks and tokens, which are uint32

MAX_BYTES = 2 << 30  # of a file: twice that of the largest mixture of experts
MAX_ENTRIES = 100_000

_CHECKED_VALUES = 1 << 18  # at a time
_I32 = struct.Struct("<i")
_ENTRY_BYTES = 4 + 1 + 4 + 4 + 4  # of the older form, with one byte of name and one value
_MAX_NAME = 4096
_MAX_PATH = 65536


@dataclass(frozen=True, slots=True)
class ImatrixFit:
    """How an importance matrix and a model's tensors meet.

    Attributes:
        missing: tensors without an entry, which are quantized unweighted.
        unused: entries that belong to none of the tensors.
    """

    missing: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Imatrix:
    """An importance matrix, read and checked.

    Attributes:
        path: the file.
        sha256: of the whole file, in hex.
        datasets: paths of the texts it was computed from, as they were given then.
        chunk_count: chunks of text; None where the older form leaves it out.
        chunk_size: tokens of a chunk; None in the older form.
        weights: GGUF name of a weight -> mean square of each input channel, float32, finite, not
            negative; shape (channels,), or (matrices, channels) for experts. The older form does
            not tell one from the other: it is always flat. A matrix that saw no token has ones.
            Checked when the file is opened, and read when asked for.
    """

    path: Path
    sha256: str
    datasets: tuple[str, ...]
    chunk_count: int | None
    chunk_size: int | None
    weights: Mapping[str, NDArray[np.float32]]

    def find(self, tensor: TensorInfo) -> NDArray[np.float32] | None:
        """The importance of the tensor's input channels; None without an entry.

        Shape (channels,) where channels is the tensor's last dimension, or (matrices, channels)
        for a tensor of more than two dimensions.

        Raises:
            UnsupportedError: the entry has another number of channels or matrices.
        """
        if not self._fits(tensor):
            return None
        shape = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        return self.weights[tensor.name].reshape(shape if len(tensor.shape) > 2 else -1)

    def _fits(self, tensor: TensorInfo) -> bool:
        """Whether there is an entry for the tensor; raises as `find` does."""
        if tensor.name not in self.weights:
            return False
        stored = self.weights.shapes if isinstance(self.weights, StoredWeights) else None
        found = stored[tensor.name] if stored else self.weights[tensor.name].shape
        shape = (math.prod(tensor.shape[:-2]), tensor.shape[-1])
        if math.prod(found) != math.prod(shape) or (len(found) == 2 and found != shape):
            raise UnsupportedError(
                "the importance matrix does not fit the weight",
                path=self.path,
                tensor=tensor.name,
                found=_described(found),
                wanted=_described(shape),
                hint="compute it with llama-imatrix from a GGUF file of this model",
                code="IMATRIX-SHAPE",
            )
        return True

    def check(self, tensors: Sequence[TensorInfo]) -> ImatrixFit:
        """Hold it against the tensors that are to be quantized, before the long work.

        Raises:
            UnsupportedError: an entry does not fit its tensor, or no entry belongs to any.
        """
        found = {t.name for t in tensors if self._fits(t)}
        if tensors and not found:
            raise UnsupportedError(
                "the importance matrix is of another model",
                path=self.path,
                found=f"entries such as '{next(iter(self.weights))}'",
                wanted=f"tensors such as '{tensors[0].name}'",
                hint="compute it with llama-imatrix from a GGUF file of this model",
                code="IMATRIX-MODEL",
            )
        return ImatrixFit(
            missing=tuple(t.name for t in tensors if t.name not in found),
            unused=tuple(name for name in self.weights if name not in found),
        )

    def keys(self) -> dict[str, str | int]:
        """What llama-quantize notes in the metadata of a GGUF file; paths without directories."""
        noted: dict[str, str | int] = {
            "quantize.imatrix.file": self.path.name,
            "quantize.imatrix.entries_count": len(self.weights),
        }
        if self.datasets:
            noted["quantize.imatrix.dataset"] = PureWindowsPath(self.datasets[0]).name
        if self.chunk_count is not None:
            noted["quantize.imatrix.chunks_count"] = self.chunk_count
        return noted


class StoredWeights(Mapping[str, NDArray[np.float32]]):
    """The entries of a file, each read when it is asked for.

    Args:
        shapes: of all entries, by name.
        read: gives one of them.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, ...]], read: Callable[[str], NDArray[np.float32]]
    ) -> None:
        self.shapes = shapes
        self._read = read

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """What an importance matrix holds of one weight.

    Attributes:
        squares: float32 (matrices, channels), sums of squared inputs.
        counts: (matrices,), tokens that were summed.
    """

    squares: NDArray[np.float32]
    counts: NDArray[np.int64]


def read_imatrix(path: Path) -> Imatrix:
    """Read and check an importance matrix in either form.

    Raises:
        InputError: no such file, or not a regular file.
        FormatError: not an importance matrix, or a damaged one.
        MachineError: the operating system cannot read it.
    """
    file = RegularFile(path)  # open for as long as entries may be read
    if file.size > MAX_BYTES:
        raise FormatError(
            "the file is too large for an importance matrix",
            path=path,
            found=f"{file.size:,} bytes",
            wanted=f"at most {MAX_BYTES:,}",
            code="IMATRIX-FORMAT",
        )
    if file.read(0, min(len(MAGIC), file.size)) == MAGIC:
        imatrix = _read_gguf(GgufModel(path, file), file)
    else:
        imatrix = _read_older(file)
    file.check_unchanged()
    return imatrix


def imatrix_bytes(
    weights: Mapping[str, ChannelSums],
    *,
    datasets: Iterable[str],
    chunk_count: int,
    chunk_size: int,
) -> bytes:
    """An importance matrix in the GGUF form, byte for byte as llama-imatrix writes it.

    Args:
        weights: GGUF name of a weight -> its sums; written in the order of the names.
        datasets: names of what it was computed from.
        chunk_count: how many chunks were seen.
        chunk_size: tokens of a chunk.

    Raises:
        UnsupportedError: a name too long for GGUF, or a number too large.
    """
    for what, number in (("chunks", chunk_count), ("tokens of a chunk", chunk_size)):
        if number > MAX_NUMBER:
            raise UnsupportedError(
                f"too many {what} for an importance matrix",
                found=f"{number:,}",
                wanted=f"at most {MAX_NUMBER:,}",
                code="GGUF-VALUE",
            )
    arrays: list[tuple[bytes, NDArray[np.float32]]] = []
    for name in sorted(weights, key=str.encode):
        sums = weights[name]
        counts = sums.counts.astype("<f4").reshape(-1, 1)
        for suffix, values in ((SUMS, sums.squares.astype("<f4")), (COUNTS, counts)):
            encoded = (name + suffix).encode()
            if len(encoded) > MAX_NAME_BYTES:
                raise UnsupportedError(
                    "the name is too long for an importance matrix",
                    tensor=name,
                    found=f"{len(encoded)} bytes with '{suffix}'",
                    wanted=f"at most {MAX_NAME_BYTES}",
                    code="GGUF-NAME",
                )
            arrays.append((encoded, values))
    texts = [text.encode() for text in datasets]
    header = [
        struct.pack("<4sIQQ", MAGIC, 3, len(arrays), 4),
        _text(b"general.type") + _I32.pack(8) + _text(b"imatrix"),
        _text(DATASETS.encode()) + struct.pack("<IIQ", 9, 8, len(texts)),
        *map(_text, texts),
        _text(CHUNK_COUNT.encode()) + struct.pack("<II", 4, chunk_count),
        _text(CHUNK_SIZE.encode()) + struct.pack("<II", 4, chunk_size),
    ]
    offset = 0
    data = []
    for encoded, values in arrays:
        # ggml counts the dimensions up to the last that is not 1, innermost first.
        dims = values.shape[::-1] if values.shape[0] > 1 else values.shape[1:]
        header.append(_text(encoded) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        header.append(struct.pack("<IQ", 0, offset))
        data.append(_padded(values.tobytes()))
        offset += len(data[-1])
    return _padded(b"".join(header)) + b"".join(data)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _padded(value: bytes) -> bytes:
    return value + bytes(-len(value) % DEFAULT_ALIGNMENT)


def _described(shape: tuple[int, ...]) -> str:
    matrices = f"{shape[0]:,} matrices of " if len(shape) == 2 and shape[0] != 1 else ""
    return f"{matrices}{shape[-1]:,} channels"


# --- the GGUF form --------------------------------------------------------------------------------


def _read_gguf(model: GgufModel, file: RegularFile) -> Imatrix:
    path = model.path
    tensors = {t.name: t for t in model.tensors}
    names = sorted({n.removesuffix(s) for n in tensors for s in (SUMS, COUNTS) if n.endswith(s)})
    if not names:
        raise FormatError(
            "a GGUF file, but not an importance matrix",
            path=path,
            hint="llama-imatrix makes one",
            code="IMATRIX-FORMAT",
        )
    _check_entries(len(names), path)
    datasets = model.strings(DATASETS)
    if datasets is None:
        raise _lacks(path, DATASETS, "an array of strings")
    chunk_count, chunk_size = _number(model, CHUNK_COUNT), _number(model, CHUNK_SIZE)
    entries = {name: _entry(model, tensors, name) for name in names}
    return Imatrix(
        path=path,
        sha256=file.sha256(),
        datasets=datasets,
        chunk_count=chunk_count,
        chunk_size=chunk_size,
        weights=StoredWeights(
            {name: entry.shape for name, entry in entries.items()},
            lambda name: entries[name].mean_squares(model),
        ),
    )


def _check_entries(found: int, path: Path) -> None:
    if found > MAX_ENTRIES:
        raise FormatError(
            "too many entries for an importance matrix",
            path=path,
            found=f"{found:,}",
            wanted=f"at most {MAX_ENTRIES:,}",
            code="IMATRIX-FORMAT",
        )


def _lacks(path: Path, key: str, wanted: str) -> FormatError:
    return FormatError(
        f"the importance matrix lacks the key '{key}'",
        path=path,
        wanted=wanted,
        code="IMATRIX-METADATA",
    )


def _number(model: GgufModel, key: str) -> int:
    value = model.value(key)[1] if key in model.metadata else None
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise _lacks(model.path, key, f"a whole number up to {MAX_NUMBER:,}")
    return value


@dataclass(frozen=True, slots=True)
class _Entry:
    """The sums of a weight and their counts, float32 (matrices,), both checked."""

    sums: TensorInfo
    counts: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, ...]:
        channels = self.sums.size // self.counts.size
        return (channels,) if self.counts.size == 1 else (self.counts.size, channels)

    def mean_squares(self, model: GgufModel) -> NDArray[np.float32]:
        """in_sum2 / counts, of `shape`."""
        sums = model.values(self.sums, 0, self.sums.size).astype(np.float32, copy=False)
        table = sums.reshape(self.counts.size, -1)
        counts = self.counts[:, None]
        means = np.where(counts > 0, table / np.maximum(counts, 1), np.float32(1))
        return means.reshape(self.shape)


def _entry(model: GgufModel, tensors: Mapping[str, TensorInfo], name: str) -> _Entry:
    found = []
    for suffix in (SUMS, COUNTS):
        tensor = tensors.get(name + suffix)
        if tensor is None or tensor.dtype != "F32" or not tensor.size:
            raise FormatError(
                f"bad values '{suffix}'",
                path=model.path,
                tensor=name,
                found="none" if tensor is None else f"{tensor.size} of type {tensor.dtype}",
                wanted="F32",
                code="IMATRIX-VALUES",
            )
        found.append(tensor)
    sums, counts = found
    if sums.size % counts.size:
        raise _uncounted(model.path, name, sums, counts)
    for tensor in found:
        for start in range(0, tensor.size, _CHECKED_VALUES):
            stop = min(start + _CHECKED_VALUES, tensor.size)
            values = model.values(tensor, start, stop).astype(np.float32, copy=False)
            _check(values, model.path, name, start)
            if tensor is counts and (values % 1).any():
                raise _uncounted(model.path, name, sums, counts)
    numbers = model.values(counts, 0, counts.size).astype(np.float32, copy=False)
    return _Entry(sums, numbers)


def _uncounted(path: Path, name: str, sums: TensorInfo, counts: TensorInfo) -> FormatError:
    return FormatError(
        "the counts do not belong to the sums",
        path=path,
        tensor=name,
        found=f"{counts.size} counts for {sums.size} sums",
        wanted="a whole number of tokens for each matrix",
        code="IMATRIX-COUNTS",
    )


def _check(values: NDArray[np.float32], path: Path, name: str, start: int) -> None:
    """Refuse values that are not finite or below zero; ``start`` is the place of the first."""
    good = np.isfinite(values) & (values >= 0)
    if not good.all():
        bad = int(np.argmin(good))
        raise FormatError(
            f"value {start + bad} of the importance matrix is impossible",
            path=path,
            tensor=name,
            found=values[bad],
            wanted="a finite number, 0 or more",
            code="IMATRIX-VALUES",
        )


# --- the older form -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _OlderEntry:
    """Where the values of a weight lie, and what they are divided by."""

    offset: int
    size: int
    calls: int


def _read_older(file: RegularFile) -> Imatrix:
    reader = _OlderReader(file)
    entries = reader.entries()
    chunk_count, datasets = reader.provenance()

    def read(name: str) -> NDArray[np.float32]:
        entry = entries[name]
        values = _older_values(file, entry, 0, entry.size)
        return values / np.float32(entry.calls) if entry.calls else values

    return Imatrix(
        path=file.path,
        sha256=file.sha256(),
        datasets=datasets,
        chunk_count=chunk_count,
        chunk_size=None,
        weights=StoredWeights({name: (entry.size,) for name, entry in entries.items()}, read),
    )


def _older_values(
    file: RegularFile, entry: _OlderEntry, start: int, stop: int
) -> NDArray[np.float32]:
    data = file.read(entry.offset + 4 * start, 4 * (stop - start))
    return np.frombuffer(data, "<f4").astype(np.float32)


class _OlderReader:
    """Reads the form without a magic from front to back; every count is held to the file's size."""

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        self._position = 0

    def entries(self) -> dict[str, _OlderEntry]:
        """Every entry, with values that have been looked at."""
        count = self._int("entries", 1, (self._file.size - _I32.size) // _ENTRY_BYTES)
        _check_entries(count, self._file.path)
        entries: dict[str, _OlderEntry] = {}
        for _ in range(count):
            name = self._string("a name", _MAX_NAME)
            if name in entries or not name:
                raise self._broken("an entry without a name of its own", found=repr(name))
            calls = self._int(f"calls of '{name}'", 0, (1 << 31) - 1)
            size = self._int(f"values of '{name}'", 1, self._left // 4 - 1)
            entries[name] = entry = _OlderEntry(self._position, size, calls)
            self._position += 4 * size
            for start in range(0, size, _CHECKED_VALUES):
                stop = min(start + _CHECKED_VALUES, size)
                values = _older_values(self._file, entry, start, stop)
                _check(values, self._file.path, name, start)
        return entries

    def provenance(self) -> tuple[int | None, tuple[str, ...]]:
        """Chunks and datasets, which early files lack."""
        if not self._left:
            return None, ()
        chunks = self._int("chunks", 0, (1 << 31) - 1)
        path = self._string("the path of the text", _MAX_PATH) if self._left else ""
        if self._left:
            raise self._broken("bytes after the end", found=f"{self._left:,} bytes", wanted="none")
        return chunks, (path,) if path else ()

    @property
    def _left(self) -> int:
        return self._file.size - self._position

    def _int(self, what: str, low: int, high: int) -> int:
        if self._left < _I32.size:
            raise self._broken("the file ends too early", wanted=f"the number of {what}")
        value: int = _I32.unpack(self._take(_I32.size))[0]
        if not low <= value <= high:
            raise self._broken(
                f"impossible number of {what}", found=value, wanted=f"{low} to {high}"
            )
        return value

    def _string(self, what: str, most: int) -> str:
        length = self._int(f"bytes of {what}", 0, min(most, self._left - _I32.size))
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._broken(f"{what} is not UTF-8") from None

    def _take(self, size: int) -> bytes:
        self._position += size
        return self._file.read(self._position - size, size)

    def _broken(self, message: str, *, found: object = None, wanted: object = None) -> FormatError:
        return FormatError(
            message,
            path=self._file.path,
            found=found,
            wanted=wanted,
            hint="the file is no importance matrix of llama.cpp, or it is damaged",
            code="IMATRIX-FORMAT",
        )
