"""Codes as a dense stream of bits, the first in the lowest bits: what compressed-tensors, MLX and
GPTQ pack rows as, in words of 32 bits.
"""

from __future__ import annotations

import numpy as np

from qconvert.kernels.arithmetic import stream_bytes
from qconvert.kernels.records import U8


def pack_stream(codes: U8, bits: int) -> U8:
    """Codes (R, C) below 2^bits, of 2 to 8 bits, as bytes (R, `stream_bytes`); what pads the last
    word is 0.
    """
    rows, columns = codes.shape
    single = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    out = np.zeros((rows, stream_bytes(columns, bits)), np.uint8)
    found = np.packbits(single.reshape(rows, columns * bits), axis=1, bitorder="little")
    out[:, : found.shape[1]] = found
    return out


def unpack_stream(data: U8, bits: int, columns: int) -> U8:
    """The first ``columns`` codes of each row of bytes (R, n), as `pack_stream` lays them."""
    single = np.unpackbits(data, axis=1, count=columns * bits, bitorder="little")
    codes = np.packbits(single.reshape(len(data), columns, bits), axis=2, bitorder="little")
    return codes[:, :, 0]
