"""Stored bytes of the plain dtypes, little-endian, as numbers to calculate with."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

_STORED = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
}
# binary32 holds every integer of up to 24 bits; 32 and 64 bits need, or come closest in, binary64.
# Dtypes of a byte, whose values are looked up.
TABLES = ("F8_E4M3", "F8_E5M2")
_WIDE = frozenset({"F64", "I64", "U64", "I32", "U32"})


def widen(raw: bytes, dtype: str) -> NDArray[np.floating]:
    """The values in ``raw``, a whole number of elements of ``dtype`` (a key of `DTYPES`).

    float64 for F64 and integers of 32 and 64 bits (64 bits are rounded to nearest, ties to even),
    float32 and exact for everything else; a BOOL is 1 unless its byte is 0. The result may be a
    read-only view of ``raw``.
    """
    if dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32)
        wide <<= 16  # a BF16 is the upper half of a binary32
        return wide.view(np.float32)
    if dtype in TABLES:
        return table(dtype)[np.frombuffer(raw, np.uint8)]
    if dtype == "BOOL":
        return np.frombuffer(raw, np.uint8).astype(np.bool_).astype(np.float32)
    stored = np.frombuffer(raw, _STORED[dtype])
    if dtype in _WIDE:
        return stored.astype(np.float64, copy=False)
    return stored.astype(np.float32, copy=False)


@functools.cache
def table(dtype: str) -> NDArray[np.float32]:
    """The value of each of the 256 codes: looking up is faster than ml_dtypes' own cast."""
    import ml_dtypes

    number = ml_dtypes.float8_e4m3fn if dtype == "F8_E4M3" else ml_dtypes.float8_e5m2
    codes = np.arange(256, dtype=np.uint8)
    values: NDArray[np.float32] = codes.view(number).astype(np.float32)
    values.flags.writeable = False
    return values
