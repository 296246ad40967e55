"""ggml's block types of 32 values: the definition of their bytes, in NumPy.

A block is little-endian: the scale as float16, for the ``_1`` types the smallest value as float16,
for the 5-bit types the 32 fifth bits, then the codes (two to a byte, value j with value j + 16).
The rounding is that of ``quantize_row_*_ref`` in ggml-quants.c, which divides by the scale *before*
it is rounded to float16. Under an importance, which ggml searches for too, `small_search` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import Parts
from qconvert.kernels.reference.ggml import small_search
from qconvert.kernels.reference.ggml.block import GgmlBlock

BLOCK = 32

# Values (k, 32) and bits of a code -> scale and perhaps minimum (k, 1 or 2), codes (k, 32).
_Quantizer = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.uint8]]]
# The same under an importance, with numbers as stored.
_Searcher = Callable[
    [NDArray[np.float32], NDArray[np.float32], int],
    tuple[NDArray[np.float16], NDArray[np.uint8]],
]


def _encode(
    quantizer: _Quantizer,
    searcher: _Searcher | None,
    bits: int,
    blocks: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
) -> NDArray[np.uint8]:
    scales: NDArray[np.floating[Any]]
    if searcher is None or importance is None:
        scales, codes = quantizer(blocks, bits)
    else:
        scales, codes = searcher(blocks, importance, bits)
    head = scales.astype("<f2").view(np.uint8)  # (k, 2) or (k, 4)
    return np.concatenate([head, *_packed(codes, bits)], axis=1)


def _decode(bits: int, centred: bool, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    scales = _scales(centred, data)
    values = scales[:, :1] * _unpacked(bits, centred, data).astype(np.float32)
    # Nothing is added for centred codes: + 0 would turn -0 into 0.
    return values if centred else values + scales[:, 1:]


def _split(bits: int, centred: bool, data: NDArray[np.uint8]) -> Parts:
    scales = _scales(centred, data)
    codes = _unpacked(bits, centred, data)
    return Parts(codes, scales[:, :1], None if centred else scales[:, 1:])


def _centred(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale such that the value furthest from 0, of either sign, gets the lowest code."""
    half = 1 << (bits - 1)
    scale = _pick(blocks, np.abs(blocks).argmax(axis=1)) / np.float32(-half)
    steps = blocks * _inverse(scale)
    steps += np.float32(half + 0.5)
    return scale, _codes(np.trunc(steps, out=steps), bits)


def _from_minimum(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale and minimum such that the codes span the block's range."""
    # Not min and max: of -0 and 0 they return either, by processor; ggml takes the first.
    low = _pick(blocks, blocks.argmin(axis=1))
    high = _pick(blocks, blocks.argmax(axis=1))
    scale = (high - low) / np.float32((1 << bits) - 1)
    steps = (blocks - low) * _inverse(scale) + np.float32(0.5)
    return np.concatenate([scale, low], axis=1), _codes(np.trunc(steps), bits)


def _signed_bytes(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scale such that the largest magnitude gets code 127 or -127; halves round away from 0."""
    top = np.float32((1 << (bits - 1)) - 1)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / top
    steps = blocks * _inverse(scale)
    whole = np.trunc(steps)
    rounded = whole + np.copysign(np.abs(steps - whole) >= np.float32(0.5), steps)
    return scale, np.where(np.isfinite(rounded), rounded, 0).astype(np.int8).view(np.uint8)


def _pick(blocks: NDArray[np.float32], index: NDArray[np.intp]) -> NDArray[np.float32]:
    """The value of each block at its index, shape (k, 1)."""
    return np.take_along_axis(blocks, index[:, None], axis=1)


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 for 0; Inf below 2^-128."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _codes(steps: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    # Inf and NaN come from a scale whose inverse, or a range whose width, overflows. ggml leaves
    # the code to the processor; 0 is what x86-64 gives.
    finite = np.where(np.isfinite(steps), steps, np.float32(0))
    return np.minimum(finite, np.float32((1 << bits) - 1)).astype(np.uint8)


def _packed(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """The parts of (k, 32) codes as a block stores them."""
    if bits == 8:
        return [codes]
    nibbles = (codes[:, :16] & np.uint8(0x0F)) | (codes[:, 16:] << np.uint8(4))
    if bits == 4:
        return [nibbles]
    return [np.packbits(codes >> np.uint8(4), axis=1, bitorder="little"), nibbles]


def _scales(centred: bool, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scale and, unless centred, minimum of each block, shape (k, 1 or 2)."""
    head = np.ascontiguousarray(data[:, : 2 if centred else 4])
    return head.view("<f2").astype(np.float32)


def _unpacked(bits: int, centred: bool, data: NDArray[np.uint8]) -> NDArray[np.int16]:
    """Codes of each block, shape (k, 32), signed where the type's are."""
    body = data[:, 2 if centred else 4 :]
    if bits == 8:
        return body.view(np.int8).astype(np.int16)
    nibbles = body[:, -16:]
    codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=1).astype(np.int16)
    if bits == 5:
        codes |= np.unpackbits(body[:, :4], axis=1, bitorder="little").astype(np.int16) << 4
    return codes - (1 << (bits - 1)) if centred else codes


def _block(
    name: str,
    nbytes: int,
    bits: int,
    centred: bool,
    quantizer: _Quantizer,
    searcher: _Searcher | None = None,
) -> GgmlBlock:
    low = -(1 << (bits - 1)) if centred else 0
    return GgmlBlock(
        name=name,
        block=BLOCK,
        nbytes=nbytes,
        group=BLOCK,
        codes=(low, low + (1 << bits) - 1),
        encoder=partial(_encode, quantizer, searcher, bits),
        decoder=partial(_decode, bits, centred),
        splitter=partial(_split, bits, centred),
        scales=partial(_scales, centred),
    )


TYPES = (
    _block("Q4_0", 18, 4, True, _centred, small_search.centred),
    _block("Q4_1", 20, 4, False, _from_minimum, small_search.from_minimum),
    _block("Q5_0", 22, 5, True, _centred, small_search.centred),
    _block("Q5_1", 24, 5, False, _from_minimum, small_search.from_minimum),
    _block("Q8_0", 34, 8, True, _signed_bytes),
)
