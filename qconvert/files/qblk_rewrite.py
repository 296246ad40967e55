"""A qblk file once more, with other bytes in some segments and all others as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from qconvert.codecs.codec import Encoding
from qconvert.codecs.rescaled import TUNED
from qconvert.files.atomic import AtomicOutput
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_header import PREAMBLE, StoredTensor, align, canonical, tensor_digest
from qconvert.kernels.records import Bytes

COPIED = 1 << 22  # bytes at once

Changed = Mapping[str, Mapping[str, Bytes]]  # by tensor and kind of segment


def write_changed(
    model: QblkModel, out: AtomicOutput, changed: Changed, provenance: Mapping[str, Any]
) -> int:
    """Write a file whose codes, names, shapes and companion files are those of another.

    A tensor that changed says that its scales were tuned and no longer how far it is from its
    source. The file is as long as it was, unless its provenance has no room in the header's place.

    Args:
        changed: bytes of whole segments, as long as they were.
        provenance: of the new file.

    Returns:
        Length of the file in bytes.
    """
    header = model.header
    text = model.read_at(PREAMBLE.size, header.header_end - PREAMBLE.size)
    fields = json.loads(text)
    stored = {t.name: t for t in header.tensors}
    for entry in fields["tensors"]:
        parts = changed.get(entry["name"])
        if parts is None:
            continue
        tensor = stored[entry["name"]]
        entry["sha256"] = _digest(model, tensor, parts)
        entry.pop("error", None)
        entry["decision"] = {"rounding": TUNED} | entry.get("decision", {})  # unless it was another
    fields["provenance"] = dict(provenance)
    text = canonical(fields)
    payload = max(header.payload_offset, align(PREAMBLE.size + len(text)))
    total = payload + header.file_length - header.payload_offset
    magic, major, minor, *_ = PREAMBLE.unpack(model.read_at(0, PREAMBLE.size))
    start = PREAMBLE.pack(magic, major, minor, 0, len(text), payload, total, bytes(32))[:32]
    out.write_at(0, start + hashlib.sha256(start + text).digest() + text)
    moved = payload - header.payload_offset
    for offset in range(header.payload_offset, header.file_length, COPIED):
        data = model.read_at(offset, min(COPIED, header.file_length - offset))
        out.write_at(offset + moved, data)
    for name, parts in changed.items():
        for kind, part in parts.items():
            place = stored[name].segment(kind)
            assert memoryview(part).nbytes == place.size
            out.write_at(place.offset + moved, bytes(part))
    out.truncate(total)
    return total


def _digest(model: QblkModel, tensor: StoredTensor, parts: Mapping[str, Bytes]) -> str:
    def pieces(kind: str, offset: int, size: int) -> Iterator[Bytes]:
        if kind in parts:
            yield parts[kind]
            return
        for at in range(0, size, COPIED):
            yield model.read_at(offset + at, min(COPIED, size - at))

    digests = []
    for segment in tensor.segments:
        digest = hashlib.sha256()
        for piece in pieces(segment.kind, segment.offset, segment.size):
            digest.update(piece)
        digests.append(digest.digest())
    encoding: Encoding = tensor.encoding
    return tensor_digest(tensor.name, tensor.shape, tensor.source_dtype, encoding, digests)
