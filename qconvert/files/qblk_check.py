"""The rules of qblk that need the payload: padding, digests, and those of each encoding.

formats/qblk/SPEC.md section 6, the order of a checker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from qconvert.errors import FormatError
from qconvert.files.qblk_header import StoredTensor, tensor_digest

if TYPE_CHECKING:
    from qconvert.files.qblk import QblkModel

CHUNK = 1 << 20


def check_payload(model: QblkModel, advance: Callable[[int], None]) -> None:
    """Check every rule about the payload.

    Args:
        advance: called with numbers of bytes as they are checked.

    Raises:
        FormatError: a rule is broken; ``code`` names it.
    """
    header = model.header
    _zeros(model, 7, header.header_end, header.payload_offset)
    end = header.payload_offset
    for segment in [s for t in header.tensors for s in t.segments] + [
        f.segment for f in header.files
    ]:
        _zeros(model, 19, end, segment.offset)
        end = segment.offset + segment.size
    for tensor, entry in zip(model.tensors, header.tensors, strict=True):
        _check_digest(model, entry, advance)
        entry.encoding.check(model.stored(tensor))
    for file in header.files:
        found = hashlib.sha256()
        for data in _chunks(model, file.segment.offset, file.segment.size):
            found.update(data)
            advance(len(data))
        if found.hexdigest() != file.sha256:
            _refuse(model, 26, f"companion file '{file.name}' does not match its digest")
    model.check_unchanged()


def _refuse(model: QblkModel, rule: int, message: str, tensor: str | None = None) -> NoReturn:
    raise FormatError(message, path=model.path, tensor=tensor, code=f"QBLK-{rule:03}")


def _chunks(model: QblkModel, offset: int, size: int) -> Iterator[bytes]:
    for start in range(0, size, CHUNK):
        yield model.read_at(offset + start, min(CHUNK, size - start))


def _zeros(model: QblkModel, rule: int, start: int, stop: int) -> None:
    for data in _chunks(model, start, stop - start):
        if data.strip(b"\0"):
            _refuse(model, rule, f"padding before byte {stop:,} is not 0")


def _check_digest(model: QblkModel, entry: StoredTensor, advance: Callable[[int], None]) -> None:
    digests = []
    for segment in entry.segments:
        h = hashlib.sha256()
        for data in _chunks(model, segment.offset, segment.size):
            h.update(data)
            advance(len(data))
        digests.append(h.digest())
    digest = tensor_digest(entry.name, entry.shape, entry.source_dtype, entry.encoding, digests)
    if digest != entry.sha256:
        _refuse(model, 24, "the data does not match its digest: the file is damaged", entry.name)
