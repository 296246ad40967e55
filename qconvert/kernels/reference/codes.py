"""Codes of values and back, and how they are packed."""

from __future__ import annotations

import numpy as np

from qconvert.kernels.arithmetic import real_zero
from qconvert.kernels.records import F32, I32, U8

# --- codes ----------------------------------------------------------------------------------------


@np.errstate(over="ignore")  # a quotient beyond binary32 is clipped like any other
def encode(x: F32, scale: F32, zero: I32, bits: int, symmetric: bool) -> tuple[U8, int]:
    """Codes of (G, L) values and how many values were clipped, section 2.

    Args:
        scale: (G,) as stored; 0 only where the group is all zeros.
        zero: (G,) zero steps; ignored when symmetric.

    Returns:
        Unsigned codes (G, L), and the number of values whose rounded quotient lay outside the
        codes.
    """
    divisor = np.where(scale == 0, np.float32(1), scale)[:, None]
    u = x / divisor
    top = (1 << bits) - 1
    if symmetric:
        centre = 1 << (bits - 1)
        low = 1 if bits == 8 else 0
        np.rint(u, out=u)
        u += np.float32(centre)
    else:
        low = 0
        u += real_zero(zero, bits)[:, None]
        np.rint(u, out=u)
    clipped = int(np.count_nonzero((u < low) | (u > top)))
    np.clip(u, low, top, out=u)
    return u.astype(np.uint8), clipped


@np.errstate(over="ignore", invalid="ignore")  # a scale near the end of the range may overflow
def decode(codes: U8, scale: F32, zero: I32, bits: int, symmetric: bool) -> F32:
    """Values of (G, L) codes, section 2."""
    if symmetric:
        k = codes.astype(np.float32) - np.float32(1 << (bits - 1))
    else:
        k = codes.astype(np.float32) - real_zero(zero, bits)[:, None]
    k *= scale[:, None]
    return k


# --- packing --------------------------------------------------------------------------------------


def planes(width: int) -> tuple[int, ...]:
    """Bits of each plane of a packed group, section 4: powers of two, the largest first."""
    return tuple(p for p in (8, 4, 2, 1) if width & p)


def pack(values: U8, width: int) -> U8:
    """Pack values of ``width`` bits; their number must be a multiple of 32."""
    groups = values.reshape(-1, 32)
    out = []
    for p in planes(width):
        count = 4 * p  # bytes of this plane
        part = (groups & ((1 << p) - 1)).reshape(-1, 8 // p, count)
        plane = part[:, 0].copy()
        for k in range(1, 8 // p):
            plane |= part[:, k] << (p * k)
        out.append(plane)
        groups = np.right_shift(groups, p, dtype=np.uint8)
    return np.concatenate(out, axis=1).ravel()


def unpack(packed: U8, width: int) -> U8:
    """The inverse of `pack`."""
    groups = packed.reshape(-1, 4 * width)
    values = np.zeros((len(groups), 32), np.uint8)
    start = low = 0
    for p in planes(width):
        plane = groups[:, start : start + 4 * p]
        part = np.concatenate([plane >> (p * k) for k in range(8 // p)], axis=1)
        values |= (part & ((1 << p) - 1)) << low
        start += 4 * p
        low += p
    return values.ravel()
