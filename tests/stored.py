"""Tensors in memory as a container would have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Encoding, Stored
from qconvert.encoding import AffineEncoding
from qconvert.files import OpenModel
from qconvert.files.qblk_writer import packed
from qconvert.kernels.records import Bytes


def affine(numbers: AffineEncoding) -> Affine:
    """The encoding of these numbers."""
    return Affine(**{f.name: getattr(numbers, f.name) for f in fields(numbers)})


def in_file(
    encoding: Encoding, shape: tuple[int, ...], segments: Mapping[str, Bytes]
) -> dict[str, bytes]:
    """Bytes of an encoded tensor as a file has them, where an encoder gives a byte a zero point."""
    found = {}
    for segment in encoding.segments(shape):
        data = bytes(segments[segment.kind])
        if segment.width:
            data = packed(np.frombuffer(data, np.uint8), segment.width)
        assert len(data) == segment.size
        found[segment.kind] = data
    return found


def in_memory(encoding: Encoding, shape: tuple[int, ...], segments: Mapping[str, bytes]) -> Stored:
    """A tensor of these bytes, as a file has them."""

    def read(kind: str, offset: int, size: int) -> bytes:
        return segments[kind][offset : offset + size]

    return Stored("w", shape, encoding, read, Path("memory"))


def named(model: OpenModel, name: str) -> Stored:
    """A tensor of an open file."""
    return model.stored(next(t for t in model.tensors if t.name == name))
