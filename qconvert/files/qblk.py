"""Reading qblk: what is stored, on demand.

formats/qblk/SPEC.md; `qblk_header` has the rules of the header, `qblk_check` those of the payload.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qconvert.codecs.codec import NEAREST, Stored
from qconvert.files.qblk_check import check_payload
from qconvert.files.qblk_header import SLASH, StoredFile, StoredTensor, read_header
from qconvert.files.regular import RegularFile
from qconvert.files.shards import MAX_COMPANION_BYTES, companion_too_large
from qconvert.model import Companion, SourceFile, TensorInfo


class QblkModel:
    """An opened qblk file: an `OpenModel`."""

    kind = "qblk"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RegularFile(path)
        try:
            self.header = read_header(self._file)
            head = self._file.read(0, self.header.header_end)
        except BaseException:
            self._file.close()
            raise
        self._entries = {t.name: t for t in self.header.tensors}
        self.tensors = tuple(_info(t) for t in self.header.tensors)
        self.metadata = self.header.metadata
        self.companions = tuple(
            Companion(f.name.replace(SLASH, "/"), f.segment.size, partial(self._companion, f))
            for f in self.header.files
        )
        digest = hashlib.sha256(head).hexdigest()
        self.sources: tuple[SourceFile, ...] = (
            SourceFile(path.name, self.header.file_length, digest),
        )

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; all of them, or an error."""
        return self._file.read(offset, size)

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in the file."""
        entry = self._entries[tensor.name]
        return Stored(
            name=entry.name,
            shape=entry.shape,
            encoding=entry.encoding,
            read=partial(self._read, entry),
            path=self.path,
            source_dtype=entry.source_dtype,
            activation=entry.activation,
            error=entry.error,
            rounding=str(entry.decision.get("rounding", NEAREST)),
        )

    def _read(self, entry: StoredTensor, kind: str, offset: int, size: int) -> bytes:
        return self.read_at(entry.segment(kind).offset + offset, size)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes, the segments one after the other without the padding between them."""
        out = b""
        for segment in self._entries[tensor.name].segments:
            take = max(0, min(size - len(out), segment.size - offset))
            if take:
                out += self.read_at(segment.offset + offset, take)
            offset = max(0, offset - segment.size)
        return out

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """See `Model.values`."""
        return self.stored(tensor).values(start, stop)

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        check_payload(self, advance)
        return f"every rule of qblk 1.2 and the digests of {len(self.tensors)} tensors"

    def _companion(self, file: StoredFile) -> bytes:
        """The bytes of a companion file.

        Raises:
            UnsupportedError: it is too large to be had in memory.
        """
        if file.segment.size > MAX_COMPANION_BYTES:
            raise companion_too_large(self.path, file.name, file.segment.size)
        return self.read_at(file.segment.offset, file.segment.size)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def _info(entry: StoredTensor) -> TensorInfo:
    size = sum(s.size for s in entry.segments)
    return TensorInfo(entry.name, entry.shape, entry.encoding.name, size)


def open_qblk(path: Path) -> QblkModel:
    """Open a qblk file.

    Raises:
        InputError: it cannot be opened.
        FormatError: it breaks a rule that needs no payload; ``code`` names the rule.
        UnsupportedError: its version or a feature that it requires is unknown.
    """
    return QblkModel(path)
