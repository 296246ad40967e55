"""Codes of a table of numbers: formats/schemes/SPEC.md section 10."""

from __future__ import annotations

import numpy as np

from qconvert.kernels.arithmetic import table_codes
from qconvert.kernels.records import F32, U8


def codebook_encode(x: F32, scale: F32, table: F32, block: int) -> U8:
    """Indices of the entries nearest to x / scale, two a byte with the first in the upper half,
    (ceil(n / 2),).

    Args:
        x: finite, (n,).
        scale: of every ``block`` values, (ceil(n / block),); below 0 and at 0 as well.
        table: (16,); of equal entries the first is taken.
        block: values that share a scale: an even number, at most 256.
    """
    codes = table_codes(x, np.repeat(scale, block)[: len(x)], table)
    padded = np.concatenate([codes, np.zeros(len(x) % 2, np.uint8)])
    packed: U8 = padded[0::2] << 4 | padded[1::2]
    return packed


def codebook_decode(data: U8, count: int, scale: F32, table: F32, block: int) -> F32:
    """Values table[code] * scale, (n,), of the codes that `codebook_encode` gives."""
    codes = np.stack([data >> 4, data & 15], axis=1).ravel()[:count]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):  # a file may hold any scale
        values: F32 = table[codes] * np.repeat(scale, block)[:count]
    return values
