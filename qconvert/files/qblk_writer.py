"""Writing qblk: segments at their final places while they are made, the header last.

formats/qblk/SPEC.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Encoding, Segment
from qconvert.errors import UnsupportedError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.qblk_header import (
    DTYPES_1_1,
    MAGIC,
    MAJOR,
    MAX_DIM,
    MAX_DIMS,
    MAX_HEADER,
    MAX_INTEGER,
    MAX_NAME,
    MAX_TENSORS,
    NEWER_DTYPES,
    PREAMBLE,
    align,
    canonical,
    tensor_digest,
)
from qconvert.geometry import PACK_GROUP
from qconvert.kernels.records import U8, Bytes
from qconvert.model import TensorInfo
from qconvert.schemes import FAMILIES

SIGNIFICANT_DIGITS = 6
LONGEST_NUMBER = -1.23456789012e-300  # wider than what `rounded`, binary32 and 2^53 leave
DIGEST = "0" * 64
WRITE_BYTES = 1 << 18  # scales and zero points of a tile are a tenth: each write has its price


def rounded(value: object) -> object:
    """Measured numbers in a JSON value to six significant digits, so that the header's size has a
    bound.
    """
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return value


def widest(value: object) -> object:
    """The same JSON value with every number as wide as it can get."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {k: widest(v) for k, v in value.items()}
    return LONGEST_NUMBER


class QblkWriter:
    """Writes tensors one after the other; each segment may grow in pieces.

    Args:
        out: the file.
        header_bound: an upper bound of the header's length in bytes, from `header_bound`.
    """

    def __init__(self, out: AtomicOutput, header_bound: int) -> None:
        self.out = out
        self.payload = align(PREAMBLE.size + header_bound)
        self.end = 0  # of the payload so far
        self.unfinished: int | None = None  # where the tensor begins that is being written
        self.tensors: list[dict[str, Any]] = []
        self.files: list[dict[str, Any]] = []

    def begin(
        self, name: str, shape: tuple[int, ...], source_dtype: str, encoding: Encoding
    ) -> TensorWriter:
        """Lay out the next tensor; one that was begun and not finished gives its place back."""
        if self.unfinished is not None:
            self.end = self.unfinished
        self.unfinished = self.end
        segments = []
        for segment in encoding.segments(shape):
            offset = self._pad()
            segments.append(_SegmentWriter(self, segment, offset))
            self.end = offset + segment.size
        return TensorWriter(self, name, shape, source_dtype, encoding, segments)

    def _pad(self) -> int:
        """The next place for a segment; what lies before it is zeros."""
        offset = align(self.end)
        if offset > self.end:  # written, since an abandoned tensor may have left something there
            self.out.write_at(self.payload + self.end, bytes(offset - self.end))
        return offset

    def add_file(self, name: str, data: bytes) -> None:
        """Carry a companion file; all tensors come first."""
        offset = self._pad()
        self.out.write_at(self.payload + offset, data)
        self.end = offset + len(data)
        self.files.append(
            {
                "name": name,
                "segments": [{"kind": "data", "offset": offset, "size": len(data)}],
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )

    def finish(self, metadata: dict[str, str], provenance: dict[str, Any]) -> int:
        """Write header and preamble.

        Returns:
            Length of the file in bytes.
        """
        features = required_features(
            (t["source_dtype"], t["encoding"]["kind"]) for t in self.tensors
        )
        header = canonical(_header(self.tensors, self.files, metadata, provenance, features))
        assert PREAMBLE.size + len(header) <= self.payload, "header outgrew its bound"
        total = self.payload + self.end
        start = PREAMBLE.pack(
            *(MAGIC, MAJOR, minor_version(features), 0, len(header), self.payload, total),
            bytes(32),
        )[:32]
        digest = hashlib.sha256(start + header).digest()
        self.out.truncate(total)
        self.out.write_at(0, start + digest + header)
        return total


class _SegmentWriter:
    """Takes the bytes of one segment in order; small runs wait until together they are worth a
    write.
    """

    def __init__(self, writer: QblkWriter, segment: Segment, offset: int) -> None:
        self.writer = writer
        self.segment = segment
        self.offset = offset
        self.done = 0
        self.hash = hashlib.sha256()
        self.waiting: list[Bytes] = []
        self.loose: list[U8] = []  # not packed yet

    def append(self, data: Bytes) -> None:
        if not self.segment.width:
            self._append(data)
            return
        self.loose.append(np.frombuffer(data, np.uint8))
        if sum(map(len, self.loose)) >= WRITE_BYTES:
            waiting = np.concatenate(self.loose)
            whole = len(waiting) // PACK_GROUP * PACK_GROUP
            self._append(packed(waiting[:whole], self.segment.width))
            self.loose = [waiting[whole:]]

    def finish(self) -> bytes:
        """Write what is left; the digest of all of it."""
        if any(map(len, self.loose)):
            self._append(packed(np.concatenate(self.loose), self.segment.width))
        self._write()
        assert self.done == self.segment.size, f"{self.segment.kind} is incomplete"
        return self.hash.digest()

    def entry(self) -> dict[str, Any]:
        return {"kind": self.segment.kind, "offset": self.offset, "size": self.segment.size}

    def _append(self, data: Bytes) -> None:
        self.waiting.append(data)
        if sum(map(len, self.waiting)) >= WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        data = self.waiting[0] if len(self.waiting) == 1 else b"".join(self.waiting)
        self.hash.update(data)
        self.writer.out.write_at(self.writer.payload + self.offset + self.done, data)
        self.done += len(data)
        self.waiting = []


def packed(values: U8, width: int) -> bytes:
    """Values of so many bits, 32 at a time; the last 32 are filled up with zeros."""
    padded = np.zeros(-(-len(values) // PACK_GROUP) * PACK_GROUP, np.uint8)
    padded[: len(values)] = values
    return kernels.pack(padded, width).tobytes()


class TensorWriter:
    """Takes the bytes of one tensor, segment by segment in any interleaving, each in order."""

    def __init__(
        self,
        writer: QblkWriter,
        name: str,
        shape: tuple[int, ...],
        source_dtype: str,
        encoding: Encoding,
        segments: Sequence[_SegmentWriter],
    ) -> None:
        self.writer = writer
        self.name = name
        self.shape = shape
        self.source_dtype = source_dtype
        self.encoding = encoding
        self.segments = {s.segment.kind: s for s in segments}

    def append(self, segments: Mapping[str, Bytes]) -> None:
        """Bytes that come next in each of some segments, by their kind."""
        for kind, data in segments.items():
            self.segments[kind].append(data)

    def finish(self, notes: dict[str, Any]) -> None:
        """Close the tensor; ``notes`` are its ``decision``, ``error`` and ``activation``."""
        digests = [segment.finish() for segment in self.segments.values()]
        self.writer.unfinished = None
        sha256 = tensor_digest(self.name, self.shape, self.source_dtype, self.encoding, digests)
        self.writer.tensors.append(
            _tensor_entry(
                self.name,
                self.shape,
                self.source_dtype,
                self.encoding,
                [segment.entry() for segment in self.segments.values()],
                sha256,
                {k: rounded(v) if k != "activation" else v for k, v in notes.items()},
            )
        )


def _tensor_entry(
    name: str,
    shape: tuple[int, ...],
    source_dtype: str,
    encoding: Encoding,
    segments: list[dict[str, Any]],
    sha256: str,
    notes: dict[str, Any],
) -> dict[str, Any]:
    return {
        "encoding": encoding.to_json(),
        "name": name,
        "segments": segments,
        "sha256": sha256,
        "shape": list(shape),
        "source_dtype": source_dtype,
        **notes,
    }


def _header(
    tensors: list[dict[str, Any]],
    files: list[dict[str, Any]],
    metadata: dict[str, str],
    provenance: dict[str, Any],
    features: list[str],
) -> dict[str, Any]:
    return {
        "files": files,
        "metadata": metadata,
        "provenance": provenance,
        "required_features": features,
        "tensors": tensors,
    }


def required_features(tensors: Iterable[tuple[str, str]]) -> list[str]:
    """What a reader has to know for tensors, by the dtype of their source and their family."""
    found = {feature for dtype, family in tensors for feature in _features(dtype, family)}
    return sorted(found)


def _features(dtype: str, family: str) -> Iterator[str]:
    if dtype in NEWER_DTYPES:
        yield DTYPES_1_1
    if feature := FAMILIES[family].feature:
        yield feature


def minor_version(features: Iterable[str]) -> int:
    """The first that has these features, which are named by it: NAME-1.MINOR."""
    return max((int(feature.rpartition(".")[2]) for feature in features), default=0)


def check_qblk(tensors: Sequence[TensorInfo], path: Path) -> None:
    """Refuse what a qblk header cannot say, before anything is written.

    Raises:
        UnsupportedError: a name or shape beyond the limits of SPEC.md, or too many tensors.
    """
    if len(tensors) > MAX_TENSORS:
        raise UnsupportedError("too many tensors for one qblk file", path=path, found=len(tensors))
    for t in tensors:
        if not 1 <= len(t.name.encode()) <= MAX_NAME:
            raise UnsupportedError("name too long", path=path, tensor=t.name, code="QBLK-012")
        if (
            len(t.shape) > MAX_DIMS
            or max(t.shape, default=0) > MAX_DIM
            or math.prod(n or 1 for n in t.shape) > MAX_INTEGER
        ):
            raise UnsupportedError(
                "the shape does not fit into a qblk file",
                path=path,
                tensor=t.name,
                found=f"{len(t.shape)} dimensions: {list(t.shape)[:20]}",
                wanted=f"at most {MAX_DIMS}",
                code="QBLK-013",
            )


def tensor_bound(
    name: str, shape: tuple[int, ...], source_dtype: str, encoding: Encoding, notes: dict[str, Any]
) -> int:
    """Upper bound in bytes of a tensor's header entry; ``notes`` has its longest texts."""
    segments = [
        {"kind": s.kind, "offset": MAX_INTEGER, "size": s.size} for s in encoding.segments(shape)
    ]
    entry = _tensor_entry(
        name,
        shape,
        source_dtype,
        encoding,
        segments,
        DIGEST,
        {k: widest(v) for k, v in notes.items()},
    )
    return len(canonical(entry)) + 1


def header_bound(
    tensor_bounds: Iterable[int],
    files: list[tuple[str, int]],
    metadata: dict[str, str],
    provenance: dict[str, Any],
    features: list[str],
) -> int:
    """Upper bound in bytes of a header.

    Raises:
        UnsupportedError: the header could be longer than the format allows.
    """
    entries = [
        {
            "name": name,
            "segments": [{"kind": "data", "offset": MAX_INTEGER, "size": size}],
            "sha256": DIGEST,
        }
        for name, size in files
    ]
    bound = len(canonical(_header([], entries, metadata, provenance, features)))
    for size in chain((0,), tensor_bounds):
        bound += size
        if bound > MAX_HEADER:
            raise UnsupportedError(
                "too many tensors or too much metadata for one qblk file",
                found=f"more than {MAX_HEADER:,} bytes of header",
                wanted=f"at most {MAX_HEADER:,}",
                hint="write a .gguf file",
            )
    return bound
