"""Stored bytes of the plain dtypes, little-endian, as numbers to calculate with."""

from __future__ import annotations

import functools
from typing import Any

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
_WIDE = frozenset({"F64", "I64", "U64", "I32", "U32"})
# Types of a byte or less, all of whose values are looked up: their names in ml_dtypes.
_LOOKED_UP = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F6_E2M3": "float6_e2m3fn",
    "F6_E3M2": "float6_e3m2fn",
    "F4": "float4_e2m1fn",
}
BYTES = tuple(dtype for dtype in _LOOKED_UP if dtype.startswith("F8"))  # a code is a byte


def widen(raw: bytes, dtype: str) -> NDArray[Any]:
    """The values in ``raw``, a whole number of elements of ``dtype`` (a key of `DTYPES`), of 6 bits
    a multiple of four.

    float64 for F64 and integers of 32 and 64 bits (64 bits are rounded to nearest, ties to even),
    complex64 for C64, float32 and exact for everything else; a BOOL is 1 unless its byte is 0. The
    result may be a read-only view of ``raw``.
    """
    if dtype == "BF16":
        wide = np.frombuffer(raw, "<u2").astype(np.uint32)
        wide <<= 16  # a BF16 is the upper half of a binary32
        return wide.view(np.float32)
    if dtype in _LOOKED_UP:
        return table(dtype)[_codes(np.frombuffer(raw, np.uint8), dtype)]
    if dtype == "C64":
        return np.frombuffer(raw, "<c8")
    if dtype == "BOOL":
        return np.frombuffer(raw, np.uint8).astype(np.bool_).astype(np.float32)
    stored = np.frombuffer(raw, _STORED[dtype])
    if dtype in _WIDE:
        return stored.astype(np.float64, copy=False)
    return stored.astype(np.float32, copy=False)


def _codes(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.uint8]:
    """The codes of the values, one a byte; they are packed from the lowest bits on."""
    if dtype == "F4":
        return np.stack((raw & 15, raw >> 4), axis=1).reshape(-1)
    if not dtype.startswith("F6"):
        return raw
    a, b, c = raw.reshape(-1, 3).T  # 4 values in 24 bits
    parts = a & 63, a >> 6 | (b & 15) << 2, b >> 4 | (c & 3) << 4, c >> 2
    return np.stack(parts, axis=1).reshape(-1)


@functools.cache
def table(dtype: str) -> NDArray[np.float32]:
    """The value of each code of a type of at most 8 bits: looking up is faster than ml_dtypes' own
    cast.
    """
    import ml_dtypes

    number = getattr(ml_dtypes, _LOOKED_UP[dtype])
    codes = np.arange(1 << {"F4": 4, "F6": 6}.get(dtype[:2], 8), dtype=np.uint8)
    values: NDArray[np.float32] = codes.view(number).astype(np.float32)
    values.flags.writeable = False
    return values
