"""Codes as a dense stream of bits, the first in the lowest bits: what compressed-tensors and MLX
pack rows as, in words of 32 bits.
"""

from __future__ import annotations

import numpy as np

from qconvert.kernels.records import U8

WORD = 32


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
        for k in range(each):
            part = codes[:, k::each]
            out[:, : part.shape[1]] |= part << np.uint8(k * bits)
        return out
    single = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    found = np.packbits(single.reshape(rows, columns * bits), axis=1, bitorder="little")
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
    single = np.unpackbits(data, axis=1, count=columns * bits, bitorder="little")
    codes: U8 = np.packbits(single.reshape(rows, columns, bits), axis=2, bitorder="little")
    return codes[:, :, 0]
