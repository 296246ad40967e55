"""Codes as a dense stream of bits, the first in the lowest bits: what compressed-tensors and MLX
pack rows as, in words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qconvert.kernels.records import U8

WORD = 32
TOGETHER = 8  # codes that fill whole bytes, whatever their bits


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of so many codes, padded to whole words."""
    return -(-columns * bits // WORD) * (WORD // 8)


def packed_rows(codes: U8, bits: int) -> U8:
    """Codes (R, C) below 2^bits as bytes (R, `row_bytes`); what pads the last word is 0."""
    rows, columns = codes.shape
    out = np.zeros((rows, row_bytes(columns, bits)), np.uint8)
    if bits == 8:
        out[:, :columns] = codes
        return out
    if 8 % bits == 0:
        each = 8 // bits
        if columns % each:
            codes = np.pad(codes, ((0, 0), (0, -columns % each)))
        # The codes of a byte lie in one word, each in the low bits of a byte of its own.
        words = np.ascontiguousarray(codes).view(f"<u{each}")
        found = words >> words.dtype.type(8 - bits)
        found |= words
        for k in range(2, each):
            found |= words >> words.dtype.type(k * (8 - bits))
        out[:, : words.shape[1]] = found  # of which the lowest byte is taken
        return out
    groups = -(-columns // TOGETHER)
    wide = np.zeros((rows, groups, TOGETHER), np.uint8)
    wide.reshape(rows, -1)[:, :columns] = codes
    words = wide.view("<u8")
    for low, apart, away in reversed(list(_halves(bits))):
        high = words & (low << apart)
        words &= low
        words |= high >> away
    found = wide[:, :, :bits].reshape(rows, -1)[:, : out.shape[1]]
    out[:, : found.shape[1]] = found
    return out


def unpacked_rows(data: U8, bits: int, columns: int) -> U8:
    """The first ``columns`` codes of each row of bytes (R, n), as `packed_rows` lays them."""
    rows = len(data)
    if bits == 8:
        return np.ascontiguousarray(data[:, :columns])
    if 8 % bits == 0:
        each, mask = 8 // bits, np.uint8((1 << bits) - 1)
        out = np.empty((rows, data.shape[1], each), np.uint8)
        for k in range(each):
            out[:, :, k] = data >> np.uint8(k * bits) & mask
        return np.ascontiguousarray(out.reshape(rows, -1)[:, :columns])
    groups = -(-columns // TOGETHER)
    short = groups * bits - data.shape[1]
    if short > 0:
        data = np.pad(data, ((0, 0), (0, short)))
    wide = np.zeros((rows, groups, TOGETHER), np.uint8)
    wide[:, :, :bits] = data[:, : groups * bits].reshape(rows, groups, bits)
    words = wide.view("<u8")
    for low, apart, away in _halves(bits):
        high = words & (low << apart >> away)
        words &= low
        words |= high << away
    return np.ascontiguousarray(wide.reshape(rows, -1)[:, :columns])


def _halves(bits: int) -> Iterator[tuple[np.uint64, np.uint64, np.uint64]]:
    """How eight codes of a word of 64 bits come apart, until each is a byte: of each part, what is
    its lower half, where the upper one will be, and how far that is from where it is.
    """
    for count in (4, 2, 1):
        width, room = count * bits, count * 8
        low = sum((1 << width) - 1 << at for at in range(0, 64, 2 * room))
        yield np.uint64(low), np.uint64(room), np.uint64(room - width)
