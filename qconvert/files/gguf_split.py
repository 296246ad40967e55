"""GGUF in several files, as llama.cpp loads them: ``name-00001-of-00003.gguf`` and so on.

The first file has all keys, each has its own part of the tensors. llama.cpp is given the first and
finds the others by their names. That they belong together is said by the provenance that each of
them has: its first member is the digest of all that was written.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qconvert.errors import UnsupportedError
from qconvert.files.gguf import ARCHITECTURE
from qconvert.files.gguf_writer import (
    FIXED_BYTES,
    GgufTensor,
    GgufValue,
    GgufWriter,
    MetadataValue,
    check_gguf,
    string_key_bytes,
)
from qconvert.files.provenance import PROVENANCE

_SET = '{"set": "'  # how it begins in a file of several; then comes the digest
_UNKNOWN = "0" * 64  # stands for the digest until all is written
MAX_SHARDS = 65_535  # split.count is a uint16; the names have five digits


def plan_shards(tensors: Sequence[GgufTensor], limit: int) -> list[int]:
    """How many tensors go into each file: consecutive ones of at most ``limit`` bytes together.

    A tensor larger than that has a file to itself.

    Raises:
        UnsupportedError: more files than their names can count.
    """
    counts: list[int] = []
    used = 0
    for tensor in tensors:
        if counts and used + tensor.nbytes <= limit:
            counts[-1] += 1
            used += tensor.nbytes
        else:
            counts.append(1)
            used = tensor.nbytes
    if len(counts) > MAX_SHARDS:
        raise UnsupportedError(
            "too many files for one GGUF model",
            found=len(counts),
            wanted=f"at most {MAX_SHARDS}",
            hint="allow larger files",
            code="GGUF-SHARDS",
        )
    return counts


def shard_path(path: Path, number: int, count: int) -> Path:
    """The name of file ``number``, counted from 1, of the model that ``path`` would hold whole."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}.gguf")


def set_of(provenance: str | None) -> str | None:
    """Which set a file belongs to, as its provenance says: the same in all files of a model, and
    another in those of another model. None for files of other programs.
    """
    match = re.match(f'{re.escape(_SET)}([0-9a-f]{{64}})"', provenance or "")
    return match[1] if match else None


class SplitGgufWriter:
    """Writes one model into several files; used as `GgufWriter` is, with one index for all tensors.

    Only one file is open at a time.

    Args:
        paths: where each file is written; what llama.cpp has to find them by is `shard_path`.
        metadata: as of `GgufWriter`; goes into the first file. A provenance is a JSON object.
        tensors: of all files, in order.
        counts: how many of them go into each file.

    Raises:
        UnsupportedError: a tensor, key or value that GGUF cannot hold; nothing was written.
        OSError: a file could not be written.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        metadata: Mapping[str, MetadataValue],
        tensors: Sequence[GgufTensor],
        counts: Sequence[int],
    ) -> None:
        if len(paths) != len(counts) or sum(counts) != len(tensors) or not counts:
            raise ValueError("a path for each file, and a file for each tensor")
        check_gguf(tensors)  # across files too, before a byte is written
        self._paths = tuple(paths)
        self._metadata = dict(metadata)
        self._tensors = tuple(tensors)
        self._counts = tuple(counts)
        self._digest = hashlib.sha256()
        self._first = 0  # index of the current file's first tensor
        self._shard = 0
        self._writer = self._open()

    def begin(self, index: int) -> None:
        """Start the tensor with that index; the one before must be complete."""
        if index == self._first + self._counts[self._shard]:
            self._finish_file()
            self._first = index
            self._shard += 1
            self._writer = self._open()
        self._writer.begin(index - self._first)

    def append(self, data: bytes | memoryview) -> None:
        """Write the next bytes of the tensor that was begun."""
        self._digest.update(data)
        self._writer.append(data)

    def finish(self) -> None:
        """Check that every tensor is complete, close the last file, and mark all as one set."""
        if self._shard + 1 != len(self._counts):
            raise RuntimeError(f"file {self._shard + 2} was not written")
        self._finish_file()
        digest = self._digest.hexdigest().encode()
        for path in self._paths:
            with path.open("r+b") as file:
                file.seek(self._place)
                if file.read(len(digest)) != _UNKNOWN.encode():
                    raise RuntimeError(f"{path.name}: the digest has another place")
                file.seek(self._place)
                file.write(digest)

    def close(self) -> None:
        """Close the current file, complete or not; a second call does nothing."""
        self._writer.close()

    @property
    def _place(self) -> int:
        """Where the digest lies in each file: behind the architecture, which is always first."""
        architecture = self._metadata[ARCHITECTURE]
        text = architecture.value if isinstance(architecture, GgufValue) else architecture
        assert isinstance(text, str)
        before = string_key_bytes(ARCHITECTURE, text) + string_key_bytes(PROVENANCE, _SET)
        return FIXED_BYTES + before

    def _finish_file(self) -> None:
        """Close the current file; its keys are part of the digest too."""
        self._writer.finish()
        with self._paths[self._shard].open("rb") as file:
            self._digest.update(file.read(self._writer.header_size))

    def _open(self) -> GgufWriter:
        mark: dict[str, object] = {"set": _UNKNOWN}
        keys = {ARCHITECTURE: self._metadata[ARCHITECTURE]}
        if not self._shard:
            keys = dict(self._metadata)
            mark |= json.loads(str(keys.pop(PROVENANCE, "{}")))
        first: dict[str, MetadataValue] = {PROVENANCE: json.dumps(mark, ensure_ascii=False)}
        split: dict[str, MetadataValue] = {
            "split.no": GgufValue("UINT16", self._shard),
            "split.count": GgufValue("UINT16", len(self._counts)),
            "split.tensors.count": GgufValue("INT32", len(self._tensors)),
        }
        end = self._first + self._counts[self._shard]
        path = self._paths[self._shard]
        return GgufWriter(path, first | keys | split, self._tensors[self._first : end])
