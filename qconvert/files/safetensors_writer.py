"""Writing safetensors: a directory of shards with an index, tensors filled in any order.

Shapes are known beforehand, so headers come first and every byte has its place from the start. As
the library itself does, a shard has its widest numbers first, so that all of them are aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qconvert.files.atomic import machine_errors
from qconvert.files.shards import INDEX, WEIGHTS
from qconvert.kernels.records import Bytes
from qconvert.model import DTYPES

ALIGNMENT = 8  # of a header's end: the library pads it with spaces
METADATA = "__metadata__"
# Of arrays, as NumPy calls them.
CODES = {"F32": "<f4", "F64": "<f8", "U16": "<u2", "U32": "<u4", "I64": "<i8", "BOOL": "|b1"}
_NAMES = {np.dtype(code): name for name, code in CODES.items()}
PART_BYTES = 1 << 24  # of a file that is written at once


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: name, a dtype of `DTYPES`, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return DTYPES[self.dtype].nbytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class _Place:
    file: BinaryIO
    begin: int
    size: int


def planned_shards(groups: Sequence[Sequence[Entry]], most: int) -> list[list[Entry]]:
    """Tensors by shards of at most ``most`` bytes; those of a group stay together, which alone may
    be more.
    """
    found: list[list[Entry]] = [[]]
    filled = 0
    for group in groups:
        size = sum(e.size for e in group)
        if found[-1] and filled + size > most:
            found.append([])
            filled = 0
        found[-1] += group
        filled += size
    return found


def array_parts(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """One file of arrays, piece by piece, of dtypes of `CODES`."""
    header: dict[str, object] = {METADATA: dict(metadata)}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # aligned
    at = 0
    for name in names:
        a = arrays[name]
        place = [at, at + a.nbytes]
        header[name] = {"dtype": _NAMES[a.dtype], "shape": list(a.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = arrays[name].reshape(-1)
        step = PART_BYTES // flat.itemsize
        for first in range(0, len(flat), step):
            part = flat[first : first + step]
            yield part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes()


class SafetensorsWriter:
    """Shards in a directory; every tensor is filled from its start by `append`.

    Args:
        directory: exists.
        shards: see `planned_shards`.
        metadata: of every shard's header.
    """

    def __init__(
        self, directory: Path, shards: Sequence[Sequence[Entry]], metadata: Mapping[str, str]
    ) -> None:
        self._directory = directory
        self._files: list[BinaryIO] = []
        self._places: dict[str, _Place] = {}
        self._filled: dict[str, int] = {}
        self._weight_map: dict[str, str] = {}
        self._size = sum(e.size for shard in shards for e in shard)
        with machine_errors(directory):
            for i, shard in enumerate(shards, 1):
                name = WEIGHTS
                if len(shards) > 1:
                    name = f"model-{i:05}-of-{len(shards):05}.safetensors"
                self._begin(name, shard, metadata)

    def _begin(self, name: str, shard: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        ordered = sorted(shard, key=lambda e: (-DTYPES[e.dtype].bits, e.name))
        header: dict[str, object] = {METADATA: dict(metadata)}
        at = 0
        for e in ordered:
            header[e.name] = {
                "dtype": e.dtype,
                "shape": list(e.shape),
                "data_offsets": [at, at + e.size],
            }
            at += e.size
            self._weight_map[e.name] = name
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        file = (self._directory / name).open("xb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        begin = 8 + len(text)
        for e in ordered:
            self._places[e.name] = _Place(file, begin, e.size)
            self._filled[e.name] = 0
            begin += e.size
        file.truncate(begin)

    def append(self, name: str, data: Bytes) -> None:
        """Bytes of a tensor that come next."""
        place, filled = self._places[name], self._filled[name]
        size = memoryview(data).nbytes
        if filled + size > place.size:
            raise ValueError(f"{filled + size} bytes of '{name}', which has {place.size}")
        with machine_errors(self._directory):
            place.file.seek(place.begin + filled)
            place.file.write(data)
        self._filled[name] = filled + size

    def finish(self) -> int:
        """Complete the shards, and write the index of several; bytes of all these files."""
        short = [n for n, filled in self._filled.items() if filled != self._places[n].size]
        if short:
            raise ValueError(f"'{short[0]}' and {len(short) - 1} more are not complete")
        self.close()
        names = sorted({*self._weight_map.values()})
        with machine_errors(self._directory):
            if len(names) > 1:
                index = {
                    "metadata": {"total_size": self._size},
                    "weight_map": dict(sorted(self._weight_map.items())),
                }
                text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
                (self._directory / INDEX).write_text(text, "utf-8")
                names.append(INDEX)
            return sum((self._directory / name).stat().st_size for name in names)

    def close(self) -> None:
        """Close the files, finished or not; may be called again."""
        with machine_errors(self._directory):
            for file in self._files:
                file.close()
