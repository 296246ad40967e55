"""The header of a qblk file: every rule that needs no payload.

formats/qblk/SPEC.md sections 1 to 5; comments and codes cite its rules.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np

from qconvert.codecs import codec_named
from qconvert.codecs.codec import Encoding, HeaderFields
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.json_size import json_size, lone_surrogate
from qconvert.files.regular import RegularFile
from qconvert.files.strict_json import MAX_JSON_MEMBERS, beyond_limits, no_collection, repeated
from qconvert.model import DTYPES
from qconvert.schemes import FAMILIES

MAGIC = b"\x89QBLK\r\n\n"
MAJOR = 1
PREAMBLE = struct.Struct("<8sBBHIQQ32s")
ALIGNMENT = 64
SLASH = "%2F"  # in names of companion files, for the / of a path; SPEC.md section 5
MAX_HEADER = 1 << 26
MAX_DEPTH = 16
MAX_TENSORS = 1_000_000
MAX_FILES = 10_000
MAX_KEYS = 2_750_000  # of all objects: what 64 MiB of entries of tensors hold
MAX_NAME = 1_024
MAX_FILE_NAME = 255
MAX_DIMS = 16
MAX_DIM = 1 << 48
MAX_INTEGER = (1 << 53) - 1
DTYPES_1_1 = "dtypes-1.1"  # the feature that these dtypes are under, SPEC.md section 3.1
NEWER_DTYPES = frozenset(d.name for d in DTYPES.values() if d.kind in ("narrow", "complex"))
REQUIRED_FEATURES = {DTYPES_1_1, *(f.feature for f in FAMILIES.values() if f.feature)}
HEADER_KEYS = {
    "files": list,
    "metadata": dict,
    "provenance": dict,
    "required_features": list,
    "tensors": list,
}


def align(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def canonical(value: object) -> bytes:
    """The canonical JSON of QBLK-008."""
    text = json.dumps(
        value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
    )
    return text.encode()


def tensor_digest(
    name: str, shape: tuple[int, ...], dtype: str, encoding: Encoding, segments: list[bytes]
) -> str:
    """QBLK-024, from the SHA-256 of each segment."""
    bound = {
        "encoding": encoding.to_json(),
        "name": name,
        "shape": list(shape),
        "source_dtype": dtype,
    }
    return hashlib.sha256(canonical(bound) + b"\n" + b"".join(segments)).hexdigest()


@dataclass(frozen=True, slots=True)
class Place:
    """A run of bytes of the payload; ``offset`` counts from the start of the file."""

    kind: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor entry of the header."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    encoding: Encoding
    segments: tuple[Place, ...]
    sha256: str
    decision: dict[str, Any]
    error: dict[str, Any]
    activation: dict[str, Any] | None

    def segment(self, kind: str) -> Place:
        return next(s for s in self.segments if s.kind == kind)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A companion file entry of the header."""

    name: str
    segment: Place
    sha256: str


@dataclass(frozen=True, slots=True)
class Header:
    """A header that keeps every rule of SPEC.md sections 1 to 5 that a reader must check."""

    header_end: int
    payload_offset: int
    file_length: int
    metadata: dict[str, str]
    provenance: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    files: tuple[StoredFile, ...]


class _HeaderReader:
    """Checks rule after rule, in the order of SPEC.md section 6."""

    def __init__(self, file: RegularFile) -> None:
        self.path = file.path
        self.file = file
        self.tensor: str | None = None
        self.lone_surrogate = False
        self.dtypes = DTYPES.keys() - NEWER_DTYPES
        self.families: list[str] = []

    def refuse(
        self, rule: int, message: str, found: object = None, wanted: object = None
    ) -> NoReturn:
        raise FormatError(
            message,
            path=self.path,
            tensor=self.tensor,
            found=found,
            wanted=wanted,
            code=f"QBLK-{rule:03}",
        )

    def read(self) -> Header:
        size = self.file.size
        head = self.file.read(0, min(PREAMBLE.size, size))
        if len(head) < PREAMBLE.size or head[:8] != MAGIC:
            self.refuse(1, "not a qblk file, or damaged by a text-mode transfer")
        _, major, minor, reserved, length, payload, total, digest = PREAMBLE.unpack(head)
        if major != MAJOR:
            raise UnsupportedError(
                "a version of qblk that this qconvert does not know",
                path=self.path,
                found=f"{major}.{minor}",
                wanted=f"{MAJOR}.x",
                hint="use a newer qconvert",
                code="QBLK-002",
            )
        if reserved:
            self.refuse(3, "reserved bytes of the preamble are not 0", reserved, 0)
        if total != size:
            self.refuse(4, "length of the file", f"{size:,} bytes", f"{total:,}")
        if (
            not 2 <= length <= MAX_HEADER
            or payload % ALIGNMENT
            or payload < PREAMBLE.size + length
            or payload > total
        ):
            self.refuse(5, "impossible header length or payload offset", f"{length}, {payload}")
        text = self.file.read(PREAMBLE.size, length)
        if hashlib.sha256(head[:32] + text).digest() != digest:
            self.refuse(6, "the header does not match its digest: the file is damaged")
        decoded = self._text(text)
        del text  # of up to 64 MiB, while as many pairs as it may have are made
        header = self._parse(decoded)
        self._top_level(header)
        tensors = self._tensors(header["tensors"], payload)
        files = self._files(header["files"], payload)
        self._places(tensors, files, payload, total)
        return Header(
            header_end=PREAMBLE.size + length,
            payload_offset=payload,
            file_length=total,
            metadata=header["metadata"],
            provenance=header["provenance"],
            tensors=tensors,
            files=files,
        )

    # --- section 2 ---

    def _text(self, data: bytes) -> str:
        """The header as text, measured: nothing that recurses has seen it."""
        size = json_size(data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            self.refuse(8, f"header is not canonical JSON: {e}")
        if size.depth > MAX_DEPTH:
            self.refuse(8, f"header is not canonical JSON: nested more than {MAX_DEPTH} deep")
        if size.spaces:
            self.refuse(8, "header is not canonical JSON: white space outside strings")
        if beyond := beyond_limits(size, MAX_KEYS):
            self._beyond(*beyond)
        self.lone_surrogate = lone_surrogate(data) is not None
        return text

    def _parse(self, text: str) -> dict[str, Any]:
        twice: list[str] = []

        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(items) > MAX_JSON_MEMBERS:
                self._beyond("an object of too many members", len(items), MAX_JSON_MEMBERS)
            if any(a > b for (a, _), (b, _) in pairwise(items)):
                raise ValueError("keys are not sorted")
            result = dict(items)
            if len(result) != len(items):
                twice.append(repeated(items))
            return result

        def integer(digits: str) -> int:
            if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
                raise ValueError("integer too large")
            return int(digits)

        def constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not JSON")

        try:
            with no_collection():
                header = json.loads(
                    text, object_pairs_hook=pairs, parse_int=integer, parse_constant=constant
                )
            if not isinstance(header, dict):
                raise ValueError("not an object")
            if self.lone_surrogate:
                raise ValueError("lone surrogate")
        except ValueError as e:
            self.refuse(8, f"header is not canonical JSON: {e}")
        if twice:
            self.refuse(9, f"header has the key '{twice[0]}' twice")
        return header

    def _beyond(self, what: str, found: int, most: int) -> NoReturn:
        """Refuse what SPEC.md section 2.2 lets a reader refuse."""
        raise UnsupportedError(
            f"header is {what}",
            path=self.path,
            found=f"{found:,}",
            wanted=f"at most {most:,}",
            code="QBLK-LIMIT",
        )

    def _field(self, entry: Any, key: str, kind: type) -> Any:
        """A required key of the right type; bool is not a number."""
        if not isinstance(entry, dict) or key not in entry:
            self.refuse(10, f"header lacks the key '{key}'")
        value = entry[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(10, f"type of '{key}'", type(value).__name__, kind.__name__)
        return value

    def _top_level(self, header: dict[str, Any]) -> None:
        for key, kind in HEADER_KEYS.items():
            self._field(header, key, kind)
        if not all(isinstance(v, str) for v in header["metadata"].values()):
            self.refuse(10, "a metadata value is not a string")
        if not all(isinstance(v, str) for v in header["required_features"]):
            self.refuse(10, "a required feature is not a string")
        for key, limit in (("tensors", MAX_TENSORS), ("files", MAX_FILES)):
            if len(header[key]) > limit:
                self.refuse(10, f"number of {key}", len(header[key]), f"at most {limit:,}")
        if DTYPES_1_1 in header["required_features"]:
            self.dtypes |= NEWER_DTYPES
        known = {None, *header["required_features"]}
        self.families = [n for n, f in FAMILIES.items() if f.described and f.feature in known]
        for feature in header["required_features"]:
            if feature not in REQUIRED_FEATURES:
                raise UnsupportedError(
                    f"the file requires the feature '{feature}', which this qconvert does not know",
                    path=self.path,
                    hint="use a newer qconvert",
                    code="QBLK-011",
                )

    # --- sections 3 and 4 ---

    def _tensors(self, entries: list[Any], payload: int) -> tuple[StoredTensor, ...]:
        seen: set[str] = set()
        tensors = []
        for entry in entries:
            tensors.append(self._one_tensor(entry, seen, payload))
            self.tensor = None
        return tuple(tensors)

    def _one_tensor(self, entry: Any, seen: set[str], payload: int) -> StoredTensor:
        name = self._field(entry, "name", str)
        self.tensor = name
        shape = self._field(entry, "shape", list)
        dtype = self._field(entry, "source_dtype", str)
        described = self._field(entry, "encoding", dict)
        self._field(entry, "segments", list)
        sha256 = self._field(entry, "sha256", str)
        for key in ("decision", "error", "activation"):
            if key in entry:
                self._field(entry, key, dict)
        if any(not isinstance(n, int) or isinstance(n, bool) for n in shape):
            self.refuse(10, "a dimension is not an integer", shape[: MAX_DIMS + 1])
        if not 1 <= len(name.encode()) <= MAX_NAME or "\0" in name:
            self.refuse(12, "impossible tensor name")
        if name in seen:
            self.refuse(12, "two tensors have this name")
        seen.add(name)
        if (
            len(shape) > MAX_DIMS
            or any(not 0 <= n <= MAX_DIM for n in shape)
            or math.prod(n or 1 for n in shape) > MAX_INTEGER
        ):
            self.refuse(13, f"impossible shape of {len(shape):,}", shape[: MAX_DIMS + 1])
        encoding = self._encoding(described, dtype, tuple(shape))
        activation = self._activation(entry["activation"]) if "activation" in entry else None
        if math.prod(shape) * DTYPES[dtype].bits % 8:
            self.refuse(17, f"{math.prod(shape):,} values of {dtype} do not end on a byte")
        return StoredTensor(
            name=name,
            shape=tuple(shape),
            source_dtype=dtype,
            encoding=encoding,
            segments=self._segments(entry, _wanted(encoding, tuple(shape)), payload),
            sha256=sha256,
            decision=entry.get("decision", {}),
            error=entry.get("error", {}),
            activation=activation,
        )

    def _encoding(self, described: dict[str, Any], dtype: str, shape: tuple[int, ...]) -> Encoding:
        kind = self._field(described, "kind", str)
        if dtype not in self.dtypes:
            self.refuse(14, "unknown source_dtype", dtype, " ".join(sorted(self.dtypes)))
        parse = codec_named(kind).parse if kind in self.families else None
        if parse is None:
            self.refuse(14, "unknown encoding", kind, " or ".join(self.families))
        return parse(HeaderFields(described, dtype, shape, self._field, self.refuse))

    def _activation(self, entry: dict[str, Any]) -> dict[str, Any]:
        self._field(entry, "observer", str)
        self._field(entry, "samples", int)
        self._field(entry, "zero_point", int)
        scale = entry.get("scale")
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            self.refuse(10, "type of 'scale'", type(scale).__name__, "number")
        with np.errstate(over="ignore"):
            narrow = np.float32(scale)
        if not np.isfinite(narrow) or narrow <= 0:
            self.refuse(16, "activation scale", scale, "a binary32 number above 0")
        if not -128 <= entry["zero_point"] <= 127:
            self.refuse(16, "activation zero point", entry["zero_point"], "-128..127")
        return entry

    def _segments(
        self, entry: dict[str, Any], wanted: tuple[tuple[str, int], ...], payload: int
    ) -> tuple[Place, ...]:
        found = []
        for item in entry["segments"]:
            found.append(
                Place(
                    self._field(item, "kind", str),
                    self._field(item, "offset", int),
                    self._field(item, "size", int),
                )
            )
        sizes = tuple((s.kind, s.size) for s in found)
        if sizes != wanted or any(s.size < 0 for s in found):
            self.refuse(17, f"{len(sizes):,} segments", sizes[: len(wanted) + 1], wanted)
        return tuple(Place(s.kind, s.offset + payload, s.size) for s in found)

    # --- section 5 ---

    def _files(self, entries: list[Any], payload: int) -> tuple[StoredFile, ...]:
        seen: set[str] = set()
        files = []
        for entry in entries:
            name = self._field(entry, "name", str)
            self._field(entry, "segments", list)
            sha256 = self._field(entry, "sha256", str)
            if (
                not 1 <= len(name.encode()) <= MAX_FILE_NAME
                or name in seen
                or name in (".", "..")
                or any(c in "/\\:" or c < " " for c in name)
            ):
                self.refuse(25, f"impossible or repeated file name '{name}'")
            seen.add(name)
            items = entry["segments"]
            if len(items) != 1 or not isinstance(items[0], dict) or items[0].get("kind") != "data":
                self.refuse(25, f"segments of file '{name}'", wanted="one of kind data")
            size = self._field(items[0], "size", int)
            segments = self._segments(entry, (("data", size),), payload)
            files.append(StoredFile(name, segments[0], sha256))
        return tuple(files)

    def _places(
        self,
        tensors: tuple[StoredTensor, ...],
        files: tuple[StoredFile, ...],
        payload: int,
        total: int,
    ) -> None:
        """QBLK-018: no holes, no overlaps, nothing behind the end."""
        end = payload
        owners = [(t.name, t.segments) for t in tensors]
        owners += [(f.name, (f.segment,)) for f in files]
        for name, segments in owners:
            for segment in segments:
                if segment.offset != align(end):
                    self.tensor = name
                    self.refuse(
                        18,
                        f"place of {segment.kind}",
                        segment.offset - payload,
                        align(end) - payload,
                    )
                end = segment.offset + segment.size
        if end != total:
            self.refuse(18, "end of the last segment", end, total)


def _wanted(encoding: Encoding, shape: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Kind and size of the segments that a tensor should have."""
    return tuple((s.kind, s.size) for s in encoding.segments(shape))


def read_header(file: RegularFile) -> Header:
    """Read and check the header of an opened file.

    Raises:
        FormatError: a rule is broken; ``code`` names it.
        UnsupportedError: the version or a required feature is unknown.
    """
    return _HeaderReader(file).read()
