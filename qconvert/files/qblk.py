"""Reading qblk: the header with every rule that needs no payload, and values on demand.

formats/qblk/SPEC.md; comments cite its rules. `qblk_check` has the rules about the payload.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import (
    BITS,
    BLOCKS,
    GRANULARITIES,
    SCALE_SIZES,
    AffineEncoding,
    Encoding,
    RawEncoding,
)
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.regular import RegularFile
from qconvert.files.strict_json import nesting, outside_strings
from qconvert.geometry import PACK_GROUP
from qconvert.kernels.widen import widen
from qconvert.model import DTYPES, SourceFile, TensorInfo
from qconvert.quantizers.affine import (
    Parameters,
    decode_groups,
    load_codes,
    load_scales,
    load_zero_points,
)

MAGIC = b"\x89QBLK\r\n\n"
MAJOR, MINOR = 1, 0
PREAMBLE = struct.Struct("<8sBBHIQQ32s")
ALIGNMENT = 64
MAX_HEADER = 1 << 26
MAX_DEPTH = 16
MAX_TENSORS = 1_000_000
MAX_FILES = 10_000
MAX_NAME = 1_024
MAX_FILE_NAME = 255
MAX_DIMS = 16
MAX_DIM = 1 << 48
MAX_INTEGER = (1 << 53) - 1
REQUIRED_FEATURES: frozenset[str] = frozenset()
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
class Segment:
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
    segments: tuple[Segment, ...]
    sha256: str
    decision: dict[str, Any]
    error: dict[str, Any]
    activation: dict[str, Any] | None

    def segment(self, kind: str) -> Segment:
        return next(s for s in self.segments if s.kind == kind)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A companion file entry of the header."""

    name: str
    segment: Segment
    sha256: str


@dataclass(frozen=True, slots=True)
class Header:
    """A header that keeps every rule of SPEC.md sections 1 to 5 that a reader must check."""

    version: tuple[int, int]
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
        header = self._parse(text)
        self._top_level(header)
        tensors = self._tensors(header["tensors"], payload)
        files = self._files(header["files"], payload)
        self._places(tensors, files, payload, total)
        return Header(
            version=(major, minor),
            header_end=PREAMBLE.size + length,
            payload_offset=payload,
            file_length=total,
            metadata=header["metadata"],
            provenance=header["provenance"],
            tensors=tensors,
            files=files,
        )

    # --- section 2 ---

    def _parse(self, text: bytes) -> dict[str, Any]:
        repeated: list[str] = []

        def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = [k for k, _ in items]
            if keys != sorted(keys):
                raise ValueError("keys are not sorted")
            result = dict(items)
            if len(result) != len(keys):
                repeated.append(next(k for k in keys if keys.count(k) > 1))
            return result

        def integer(digits: str) -> int:
            if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
                raise ValueError("integer too large")
            return int(digits)

        def constant(name: str) -> NoReturn:
            raise ValueError(f"{name} is not JSON")

        try:
            decoded = text.decode("utf-8")
            outside = outside_strings(decoded)
            if nesting(outside) > MAX_DEPTH:
                raise ValueError(f"nested more than {MAX_DEPTH} deep")
            if any(c in outside for c in " \t\r\n"):
                raise ValueError("white space outside strings")
            header = json.loads(
                decoded,
                object_pairs_hook=pairs,
                parse_int=integer,
                parse_constant=constant,
            )
            if not isinstance(header, dict):
                raise ValueError("not an object")
            json.dumps(header, ensure_ascii=False).encode()  # lone surrogates
        except ValueError as e:
            self.refuse(8, f"header is not canonical JSON: {e}")
        if repeated:
            self.refuse(9, f"header has the key '{repeated[0]}' twice")
        return header

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
            self.refuse(10, "a dimension is not an integer", shape)
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
            self.refuse(13, "impossible shape", shape)
        encoding = self._encoding(described, dtype)
        if isinstance(encoding, AffineEncoding):
            self._row_length(encoding, tuple(shape))
        activation = self._activation(entry["activation"]) if "activation" in entry else None
        return StoredTensor(
            name=name,
            shape=tuple(shape),
            source_dtype=dtype,
            encoding=encoding,
            segments=self._segments(entry, encoding.segments(tuple(shape)), payload),
            sha256=sha256,
            decision=entry.get("decision", {}),
            error=entry.get("error", {}),
            activation=activation,
        )

    def _encoding(self, described: dict[str, Any], dtype: str) -> Encoding:
        kind = self._field(described, "kind", str)
        if dtype not in DTYPES:
            self.refuse(14, "unknown source_dtype", dtype, " ".join(DTYPES))
        if kind == "raw":
            return self._raw(described, dtype)
        if kind != "affine":
            self.refuse(14, "unknown encoding", kind, "raw or affine")
        encoding = AffineEncoding(
            bits=self._field(described, "bits", int),
            granularity=self._field(described, "granularity", str),
            block=self._field(described, "block", int) if "block" in described else 0,
            symmetric=self._field(described, "symmetric", bool),
            scale_dtype=self._field(described, "scale_dtype", str),
            row_length=self._field(described, "row_length", int),
        )
        blocks = encoding.granularity == "block"
        if (
            encoding.bits not in BITS
            or encoding.granularity not in GRANULARITIES
            or blocks != ("block" in described)
            or (blocks and encoding.block not in BLOCKS)
            or encoding.scale_dtype not in (SCALE_SIZES if blocks else ("F32",))
            or not DTYPES[dtype].floating
        ):
            self.refuse(14, "impossible affine encoding", json.dumps(described))
        return encoding

    def _raw(self, described: dict[str, Any], dtype: str) -> RawEncoding:
        stored = self._field(described, "dtype", str)
        cast = DTYPES[dtype].floating and stored in ("F32", "F16", "BF16")
        if not (stored == dtype or cast):
            self.refuse(14, "impossible raw encoding", json.dumps(described))
        return RawEncoding(stored)

    def _row_length(self, encoding: AffineEncoding, shape: tuple[int, ...]) -> None:
        products = {math.prod(shape[i:]) for i in range(len(shape))} or {1}
        if 0 in shape or encoding.row_length not in products:
            self.refuse(15, "row length", encoding.row_length, f"a product of trailing {shape}")

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
    ) -> tuple[Segment, ...]:
        found = []
        for item in entry["segments"]:
            found.append(
                Segment(
                    self._field(item, "kind", str),
                    self._field(item, "offset", int),
                    self._field(item, "size", int),
                )
            )
        sizes = tuple((s.kind, s.size) for s in found)
        if sizes != wanted or any(s.size < 0 for s in found):
            self.refuse(17, "segments", sizes, wanted)
        return tuple(Segment(s.kind, s.offset + payload, s.size) for s in found)

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


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Codes of some rows with the parameters of their groups.

    Attributes:
        codes: unsigned, (R, C): whole groups, the last one maybe with padding.
        scale: float32 (R, G).
        zero: int32 (R, G), zero steps; zeros when symmetric.
    """

    codes: NDArray[np.uint8]
    scale: NDArray[np.float32]
    zero: NDArray[np.int32]


class QblkModel:
    """An opened qblk file: the `Model` protocol, and the codes of its quantized tensors."""

    kind = "qblk"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = RegularFile(path)
        try:
            self.header = _HeaderReader(self._file).read()
            head = self._file.read(0, self.header.header_end)
        except BaseException:
            self._file.close()
            raise
        self.stored = {t.name: t for t in self.header.tensors}
        self.tensors = tuple(_info(t) for t in self.header.tensors)
        self.metadata = self.header.metadata
        self.companions: tuple[Path, ...] = ()
        digest = hashlib.sha256(head).hexdigest()
        self.sources: tuple[SourceFile, ...] = (
            SourceFile(path.name, self.header.file_length, digest),
        )

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; all of them, or an error."""
        return self._file.read(offset, size)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes, the segments one after the other without the padding between them."""
        out = b""
        for segment in self.stored[tensor.name].segments:
            take = max(0, min(size - len(out), segment.size - offset))
            if take:
                out += self.read_at(segment.offset + offset, take)
            offset = max(0, offset - segment.size)
        return out

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        stored = self.stored[tensor.name]
        encoding = stored.encoding
        if isinstance(encoding, RawEncoding):
            size = DTYPES[encoding.dtype].size
            return widen(self.raw(tensor, start * size, (stop - start) * size), encoding.dtype)
        if start == stop:
            return np.zeros(0, np.float32)
        columns = encoding.row_length
        first, last = start // columns, (stop - 1) // columns
        if first == last:
            unit = max(encoding.block, PACK_GROUP)
            low = (start - first * columns) // unit * unit
            high = stop - first * columns
            row = self._decode(stored, first, first + 1, low, high)
            return row.ravel()[start - first * columns - low :]
        rows = self._decode(stored, first, last + 1, 0, columns)
        return rows.ravel()[start - first * columns : stop - first * columns]

    def _decode(
        self, stored: StoredTensor, first: int, last: int, low: int, high: int
    ) -> NDArray[np.float32]:
        encoding = stored.encoding
        assert isinstance(encoding, AffineEncoding)
        part = self.rows(stored, first, last, low, high)
        groups = part.codes.reshape(part.scale.size, -1)
        parameters = Parameters(part.scale.ravel(), part.zero.ravel())
        values = decode_groups(groups, parameters, encoding)
        return values.reshape(last - first, -1)[:, : high - low]

    def rows(self, stored: StoredTensor, first: int, last: int, low: int, high: int) -> StoredRows:
        """Codes of rows ``first..last`` and columns ``low..high``.

        ``low`` is a multiple of 32 and of the block; a part of the columns is only taken of one
        row.
        """
        encoding = stored.encoding
        assert isinstance(encoding, AffineEncoding)
        count = last - first
        block = encoding.block
        unit = max(block, PACK_GROUP) if encoding.bits < 8 else (block or 1)
        width = min(-(-(high - low) // unit) * unit, encoding.row_codes - low)
        place = (first * encoding.row_codes + low) * encoding.bits // 8
        packed = self.read_at(
            stored.segment("codes").offset + place, count * width * encoding.bits // 8
        )
        codes = load_codes(packed, encoding).reshape(count, width)
        if block:
            groups = -(-(high - low) // block)
            codes = codes[:, : groups * block]  # without a half group that is all padding
            begin = first * encoding.row_groups + low // block
        else:
            groups = 1
            codes = codes[:, : high - low]
            begin = 0 if encoding.granularity == "tensor" else first
        wanted = 1 if encoding.granularity == "tensor" else count * groups
        scale, zero = self._parameters(stored, encoding, begin, wanted)
        shape = (count, groups)
        if wanted == 1:
            return StoredRows(codes, np.broadcast_to(scale, shape), np.broadcast_to(zero, shape))
        return StoredRows(codes, scale.reshape(shape), zero.reshape(shape))

    def _parameters(
        self, stored: StoredTensor, encoding: AffineEncoding, begin: int, count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        size = SCALE_SIZES[encoding.scale_dtype]
        raw = self.read_at(stored.segment("scales").offset + begin * size, count * size)
        scale = load_scales(raw, encoding)
        if encoding.symmetric:
            return scale, np.zeros(count, np.int32)
        segment = stored.segment("zero_points")
        if encoding.bits == 8:
            return scale, load_zero_points(self.read_at(segment.offset + begin, count), encoding)
        group = 4 * encoding.zero_point_bits
        low, high = begin // PACK_GROUP, -(-(begin + count) // PACK_GROUP)
        packed = self.read_at(segment.offset + low * group, (high - low) * group)
        zero = load_zero_points(packed, encoding)
        skip = begin - low * PACK_GROUP
        return scale, zero[skip : skip + count]

    def companion(self, file: StoredFile) -> bytes:
        return self.read_at(file.segment.offset, file.segment.size)

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def _info(stored: StoredTensor) -> TensorInfo:
    encoding = stored.encoding
    dtype = encoding.dtype if isinstance(encoding, RawEncoding) else encoding.scheme
    return TensorInfo(stored.name, stored.shape, dtype, sum(s.size for s in stored.segments))


def open_qblk(path: Path) -> QblkModel:
    """Open a qblk file.

    Raises:
        InputError: it cannot be opened.
        FormatError: it breaks a rule that needs no payload; ``code`` names the rule.
        UnsupportedError: its version or a feature that it requires is unknown.
    """
    return QblkModel(path)
