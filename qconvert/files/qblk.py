"""Reading qblk: values and codes on demand.

formats/qblk/SPEC.md; `qblk_header` has the rules of the header, `qblk_check` those of the payload.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import SCALE_SIZES, AffineEncoding, RawEncoding
from qconvert.files.plain import plain_values
from qconvert.files.qblk_header import SLASH, StoredFile, StoredTensor, read_header
from qconvert.files.regular import RegularFile
from qconvert.files.shards import MAX_COMPANION_BYTES, companion_too_large
from qconvert.geometry import PACK_GROUP
from qconvert.kernels.records import Parameters
from qconvert.model import Companion, SourceFile, TensorInfo
from qconvert.quantizers.affine import (
    decode_groups,
    load_scales,
    load_zero_points,
)


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
            self.header = read_header(self._file)
            head = self._file.read(0, self.header.header_end)
        except BaseException:
            self._file.close()
            raise
        self.stored = {t.name: t for t in self.header.tensors}
        self.tensors = tuple(_info(t) for t in self.header.tensors)
        self.metadata = self.header.metadata
        self.companions = tuple(
            Companion(f.name.replace(SLASH, "/"), f.segment.size, partial(self.companion, f))
            for f in self.header.files
        )
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
            read = partial(self.raw, tensor)
            return plain_values(read, encoding.dtype, tensor.size, start, stop)
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
        codes = kernels.load_codes(packed, encoding).reshape(count, width)
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
