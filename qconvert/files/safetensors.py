"""safetensors: one file, or a directory of shards with an index. Profile: formats/safetensors.md.

The header is parsed here rather than by the safetensors package, which maps the file (a truncation
is then a crash), takes the last of two equal names, and has no NumPy type for BF16 and F8.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.codecs.raw import RawEncoding
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.regular import RegularFile
from qconvert.files.shards import INDEX, MAX_JSON_BYTES, ModelFiles, model_files, refuse_foreign
from qconvert.files.strict_json import strict_json
from qconvert.model import DTYPES, SourceFile, TensorInfo

LENGTH_BYTES = 8  # the header's length, u64 little-endian, comes before it
METADATA = "__metadata__"
MAX_NAME_BYTES = 1024  # QBLK-012: a model that can be read can be written
MAX_DIMS = 64
MAX_TENSORS = 250_000  # several times what is in use; `strict_json` has room for their header
MAX_HEADERS = 200_000_000  # bytes of all files of a model
MAX_DIGITS = 4300  # of an integer in the header: all that Python reads
HASHED_BYTES = 1 << 20  # at a time
MAX_DIM = (1 << 64) - 1  # what safetensors itself can hold

_INTEGER = frozenset({int})
_KEYS = frozenset({"dtype", "shape", "data_offsets"})


class _Placed(NamedTuple):
    """A tensor and where its bytes begin and end, counted from the end of the header."""

    begin: int
    end: int
    name: str
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class _Header:
    """A checked header: tensors in file order, and where their data starts in the file."""

    placed: tuple[_Placed, ...]
    metadata: dict[str, str]
    data_start: int
    sha256: str


class SafetensorsModel:
    """A `Model` in one or more safetensors files; a context manager.

    Use `open_safetensors` to make one.

    Attributes:
        notes, warnings: of a directory with several files of weights: which were taken.
    """

    kind = "safetensors"

    def __init__(self, path: Path, files: ModelFiles) -> None:
        self.path = path
        self.companions = files.companions
        self.notes, self.warnings = files.notes, files.warnings
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[RegularFile, int]] = {}
        self._files: list[RegularFile] = []
        tensors: list[TensorInfo] = []
        sources: list[SourceFile] = []
        header_bytes = 0
        with ExitStack() as closing:  # a refusal closes the files opened so far
            for shard in files.shards:
                file = RegularFile(shard)
                closing.callback(file.close)
                header = _read_header(file)
                self._files.append(file)
                self._place(file, header)
                tensors += (p.info for p in header.placed)
                header_bytes += header.data_start
                _check_total(len(tensors), header_bytes, file)
                sources.append(SourceFile(shard.name, file.size, header.sha256))
                for key, value in header.metadata.items():
                    self.metadata.setdefault(key, value)
            if files.weight_map is not None:
                self._check_index(files.weight_map)
            closing.pop_all()
        self.tensors = tuple(tensors)
        self.sources = tuple(sources)

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Values ``start..stop`` of the flattened tensor as numbers; see `Model.values`.

        Raises:
            FormatError: the file has become shorter since it was opened.
            MachineError: the operating system cannot read it.
        """
        return self.stored(tensor).values(start, stop)

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in its file."""

        def read(kind: str, offset: int, size: int) -> bytes:
            return self.raw(tensor, offset, size)

        path = self._places[tensor.name][0].path
        return Stored(tensor.name, tensor.shape, RawEncoding(tensor.dtype), read, path)

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        return "structure; safetensors has no digests"

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of the tensor; raises as `values` does."""
        if not 0 <= offset <= offset + size <= tensor.nbytes:
            raise ValueError(f"bytes {offset}..{offset + size} of a tensor of {tensor.nbytes}")
        file, begin = self._places[tensor.name]
        return file.read(begin + offset, size)

    def sha256(self) -> str:
        """Of all bytes of the files, one after the other; read again."""
        digest = hashlib.sha256()
        for file in self._files:
            for start in range(0, file.size, HASHED_BYTES):
                digest.update(file.read(start, min(HASHED_BYTES, file.size - start)))
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened.

        Raises:
            InputError: the size or the time of modification of a file differs.
        """
        for file in self._files:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; may be called again."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _place(self, file: RegularFile, header: _Header) -> None:
        for placed in header.placed:
            name = placed.name
            if name in self._places:
                raise FormatError(
                    f"tensor is in {self._places[name][0].path.name} as well",
                    path=file.path,
                    tensor=name,
                    hint="remove the shards of another version of the model",
                    code="ST-TWO-SHARDS",
                )
            self._places[name] = (file, header.data_start + placed.begin)

    def _check_index(self, weight_map: dict[str, str]) -> None:
        """Refuse an index that does not say of each tensor where it is."""
        for name in sorted(weight_map.keys() | self._places.keys()):
            found = self._places[name][0].path.name if name in self._places else None
            wanted = weight_map.get(name)
            if found != wanted:
                raise FormatError(
                    "index and shards do not agree on where the tensor is",
                    path=self.path / INDEX,
                    tensor=name[:80],
                    found=found or "in no shard",
                    wanted=wanted or "in no shard",
                    hint="index and shards are of different versions: download them again",
                    code="ST-INDEX-ABSENT" if wanted else "ST-INDEX-EXTRA",
                )


def open_safetensors(path: Path) -> SafetensorsModel:
    """Open a safetensors file, or a directory of them, and check all headers.

    Raises:
        InputError: the files cannot be opened or do not make up one model.
        FormatError: a file breaks a rule of formats/safetensors.md, or is something else.
        UnsupportedError: a tensor has a dtype that we do not read.
        MachineError: the operating system cannot open or read a file.
    """
    return SafetensorsModel(path, model_files(path))


def _read_header(file: RegularFile) -> _Header:
    """Read and check the header of ``file``; nothing is allocated by a number not yet checked."""
    start = file.read(0, min(64, file.size))
    if len(start) < LENGTH_BYTES:
        raise FormatError(
            "file is too short for safetensors",
            path=file.path,
            found=f"{file.size} bytes",
            wanted=f"at least {LENGTH_BYTES}",
            hint="download the file again",
            code="ST-SHORT",
        )
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    _check_header_length(file, length, start)
    data = file.read(LENGTH_BYTES, length)
    digest = hashlib.sha256(start[:LENGTH_BYTES])
    digest.update(data)
    fields = strict_json(data, file.path, digits=MAX_DIGITS, of_tensors=True)
    del data
    metadata = _metadata(fields.pop(METADATA, {}), file.path)  # an object: it starts with a brace
    _check_total(len(fields), length, file)
    data_start = LENGTH_BYTES + length
    placed = [_tensor(name, entry, file.path) for name, entry in fields.items()]
    _check_coverage(placed, file, data_start)
    placed.sort(key=itemgetter(0, 2))  # begin and name
    return _Header(tuple(placed), metadata, data_start, digest.hexdigest())


def _check_total(tensors: int, header_bytes: int, file: RegularFile) -> None:
    """Bound what the headers of all files up to this one take in memory."""
    for what, found, most in (
        ("tensors", tensors, MAX_TENSORS),
        ("bytes of header", header_bytes, MAX_HEADERS),
    ):
        if found > most:
            raise FormatError(
                f"too many {what}",
                path=file.path,
                found=f"{found:,}",
                wanted=f"at most {most:,} in all files of a model",
                code="ST-COUNT",
            )


def _check_header_length(file: RegularFile, length: int, start: bytes) -> None:
    """Refuse a header that cannot be one, if possible by the name of what the file is instead.

    What it is comes second, for a length may look like the start of a pickle.
    """
    room = file.size - LENGTH_BYTES
    brace = start[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{"
    if brace and 0 < length <= min(room, MAX_JSON_BYTES):
        return
    refuse_foreign(file.path, start)
    if (
        len(start) > LENGTH_BYTES
        and start.isascii()
        and start.decode().replace("\n", "").isprintable()
    ):
        raise FormatError(
            "not safetensors",
            path=file.path,
            found="a text file",
            hint="pass a .safetensors, .gguf or .qblk file, or a model directory",
            code="ST-FOREIGN",
        )
    if length == 0:
        message, code = "header is empty", "ST-HEADER-EMPTY"
    elif length > MAX_JSON_BYTES:
        message, code = "header is too long", "ST-HEADER-LIMIT"
    elif length > room:
        message, code = "header reaches beyond the file", "ST-HEADER-BEYOND"
    else:
        message, code = "header does not start with '{'", "ST-HEADER-START"
    raise FormatError(
        message,
        path=file.path,
        found=f"a length of {length} bytes in a file of {file.size}",
        wanted=f"a JSON object of at most {MAX_JSON_BYTES} bytes within the file",
        hint="the file is damaged, cut off or not safetensors: download it again",
        code=code,
    )


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FormatError(
            f"{METADATA} is not an object of strings",
            path=path,
            found=reprlib.repr(value),
            code="ST-METADATA",
        )
    return value


def _tensor(name: str, entry: Any, path: Path) -> _Placed:
    """One entry of the header, checked in itself."""
    length = len(name) if name.isascii() else len(name.encode())
    if not 1 <= length <= MAX_NAME_BYTES or "\0" in name:
        wanted = f"1 to {MAX_NAME_BYTES} bytes without U+0000"
        message = "tensor name is empty, too long or has a NUL"
        raise _refusal(name, path, message, "ST-NAME", name, wanted)
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        wanted = "an object with dtype, shape and data_offsets"
        message = "entry has not the keys of a tensor"
        raise _refusal(name, path, message, "ST-ENTRY", entry, wanted)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _refusal(name, path, "dtype is not a string", "ST-ENTRY", dtype, "a string")
    kind = DTYPES.get(dtype)
    if kind is None:
        raise UnsupportedError(
            "dtype is not one that we read",
            path=path,
            tensor=name,
            found=reprlib.repr(dtype),
            wanted=" ".join(DTYPES),
            hint="save the tensor in one of these",
            code="ST-DTYPE",
        )
    if not _counts(shape) or len(shape) > MAX_DIMS or max(shape, default=0) > MAX_DIM:
        wanted = f"at most {MAX_DIMS} integers from 0 to 2^64 - 1"
        raise _refusal(name, path, "shape is not a list of sizes", "ST-SHAPE", shape, wanted)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        wanted = "two integers, begin and end, with 0 <= begin <= end"
        message = "data_offsets are not a begin and an end"
        raise _refusal(name, path, message, "ST-OFFSETS", offsets, wanted)
    begin, end = offsets
    bits = math.prod(shape) * kind.bits
    if 8 * (end - begin) != bits:
        size = reprlib.repr(bits // 8) + (" and a part of one" if bits % 8 else "")
        wanted = f"{size} bytes for {reprlib.repr(shape)} of {dtype}"
        message = "data_offsets do not fit shape and dtype"
        raise _refusal(name, path, message, "ST-SIZE", end - begin, wanted)
    return _Placed(begin, end, name, TensorInfo(name, tuple(shape), dtype, end - begin))


def _refusal(
    name: str, path: Path, message: str, code: str, found: object, wanted: str
) -> FormatError:
    return FormatError(
        message,
        path=path,
        tensor=name,
        found=reprlib.repr(found),  # it may be megabytes
        wanted=wanted,
        hint="the file is damaged or was written wrongly: download or save it again",
        code=code,
    )


def _counts(value: Any) -> bool:
    # type() rather than isinstance(): true is no size.
    return (
        isinstance(value, list)
        and _INTEGER.issuperset(map(type, value))
        and min(value, default=0) >= 0
    )


def _check_coverage(placed: list[_Placed], file: RegularFile, data_start: int) -> None:
    """Refuse data that is not covered exactly once, from the header to the end of the file."""
    data_size = file.size - data_start
    cursor = 0
    for p in sorted(placed):
        if p.begin != cursor:
            overlap = p.begin < cursor
            raise FormatError(
                "data overlaps another tensor's" if overlap else "unused bytes before the data",
                path=file.path,
                tensor=p.name,
                found=f"begin {reprlib.repr(p.begin)}",
                wanted=f"begin {cursor}",
                hint="the file was written wrongly: save it again",
                code="ST-OVERLAP" if overlap else "ST-HOLE",
            )
        if p.end > data_size:
            raise FormatError(
                "data reaches beyond the file",
                path=file.path,
                tensor=p.name,
                found=f"{file.size} bytes",
                wanted=f"at least {reprlib.repr(data_start + p.end)}",
                hint="the file is cut off: download it again",
                code="ST-BEYOND",
            )
        cursor = p.end
    if cursor != data_size:
        raise FormatError(
            "bytes after the last tensor",
            path=file.path,
            found=f"{file.size} bytes",
            wanted=f"{data_start + cursor}",
            hint="the file was written wrongly: save it again",
            code="ST-TRAILING",
        )
