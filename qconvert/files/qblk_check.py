"""The rules of qblk that need the payload: padding, digests, scales, zero points, codes.

formats/qblk/SPEC.md section 6, the order of a checker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.errors import FormatError
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_header import StoredTensor, tensor_digest
from qconvert.geometry import tiles
from qconvert.kernels.arithmetic import SIGN, zero_steps
from qconvert.quantizers.affine import load_scales, load_zero_points

CHUNK = 1 << 20


def check_payload(model: QblkModel, advance: Callable[[int], None] = lambda _: None) -> None:
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
    for tensor in header.tensors:
        _check_digest(model, tensor, advance)
        if isinstance(tensor.encoding, AffineEncoding):
            _check_scales(model, tensor, tensor.encoding)
            _check_zero_points(model, tensor, tensor.encoding)
            _check_codes(model, tensor, tensor.encoding)
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


def _chunks(model: QblkModel, offset: int, size: int, step: int = CHUNK) -> Iterator[bytes]:
    for start in range(0, size, step):
        yield model.read_at(offset + start, min(step, size - start))


def _zeros(model: QblkModel, rule: int, start: int, stop: int) -> None:
    for data in _chunks(model, start, stop - start):
        if data.strip(b"\0"):
            _refuse(model, rule, f"padding before byte {stop:,} is not 0")


def _check_digest(model: QblkModel, tensor: StoredTensor, advance: Callable[[int], None]) -> None:
    digests = []
    for segment in tensor.segments:
        h = hashlib.sha256()
        for data in _chunks(model, segment.offset, segment.size):
            h.update(data)
            advance(len(data))
        digests.append(h.digest())
    digest = tensor_digest(tensor.name, tensor.shape, tensor.source_dtype, tensor.encoding, digests)
    if digest != tensor.sha256:
        _refuse(model, 24, "the data does not match its digest: the file is damaged", tensor.name)


def _check_scales(model: QblkModel, tensor: StoredTensor, encoding: AffineEncoding) -> None:
    segment = tensor.segment("scales")
    for data in _chunks(model, segment.offset, segment.size):
        scale = load_scales(data, encoding)
        if not np.isfinite(scale).all():
            _refuse(model, 20, "a scale is not finite", tensor.name)
        if (not encoding.symmetric or encoding.bits == 8) and np.signbit(scale).any():
            _refuse(model, 20, "a scale is negative", tensor.name)


def _check_zero_points(model: QblkModel, tensor: StoredTensor, encoding: AffineEncoding) -> None:
    if encoding.symmetric or encoding.bits == 8:  # every signed byte is a zero point
        return
    segment = tensor.segment("zero_points")
    top = encoding.levels * zero_steps(encoding.bits)
    group = 4 * encoding.zero_point_bits
    left = encoding.groups(tensor.shape)
    for data in _chunks(model, segment.offset, segment.size, CHUNK // group * group):
        zero = load_zero_points(data, encoding)
        if (zero[:left] > top).any():
            _refuse(model, 21, f"a zero point is above {top}", tensor.name)
        if zero[left:].any():
            _refuse(model, 23, "padding of the zero points is not 0", tensor.name)
        left -= len(zero)


def _check_codes(model: QblkModel, tensor: StoredTensor, encoding: AffineEncoding) -> None:
    whole = encoding.row_codes
    offset = tensor.segment("codes").offset
    padded = whole != encoding.row_length
    if not padded and not (encoding.bits == 8 and encoding.symmetric):
        return
    for tile in tiles(encoding.rows(tensor.shape), whole):
        bits = encoding.bits
        data = model.read_at(offset + tile.start * bits // 8, (tile.stop - tile.start) * bits // 8)
        codes = kernels.load_codes(data, encoding).reshape(tile.rows, tile.columns)
        real = encoding.row_length - tile.start % whole
        if bits == 8:
            codes = codes ^ SIGN  # back to the stored byte: padding is 0, -128 is 0x80
            if encoding.symmetric and (codes == 0x80).any():
                _refuse(model, 22, "a symmetric tensor has the code -128", tensor.name)
        if padded and codes[:, max(real, 0) :].any():
            _refuse(model, 23, "padding codes are not 0", tensor.name)
