"""Scales, zero points and codes of affine encodings as they are stored: formats/schemes/SPEC.md."""

from __future__ import annotations

import numpy as np

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.geometry import PACK_GROUP
from qconvert.kernels.arithmetic import SCALE_NUMPY, SIGN
from qconvert.kernels.records import F32, I32, U8, Parameters


def pack_zero_points(zero: U8, encoding: AffineEncoding) -> bytes:
    """Pack stored zero points; the last group of 32 is filled up with zeros."""
    if encoding.bits == 8:
        return zero.tobytes()
    padded = np.zeros(-(-len(zero) // PACK_GROUP) * PACK_GROUP, np.uint8)
    padded[: len(zero)] = zero
    return kernels.pack(padded, encoding.zero_point_bits).tobytes()


def load_scales(stored: bytes, encoding: AffineEncoding) -> F32:
    return np.frombuffer(stored, SCALE_NUMPY[encoding.scale_dtype]).astype(np.float32)


def load_zero_points(packed: bytes, encoding: AffineEncoding) -> I32:
    """Stored zero points in zero steps, the filling of the last group included."""
    raw = np.frombuffer(packed, np.uint8)
    if encoding.bits == 8:
        return (raw ^ SIGN).astype(np.int32)
    return kernels.unpack(raw, encoding.zero_point_bits).astype(np.int32)


def decode_groups(codes: U8, parameters: Parameters, encoding: AffineEncoding) -> F32:
    """Values of unsigned codes (G, L)."""
    return kernels.decode(
        codes, parameters.scale, parameters.zero, encoding.bits, encoding.symmetric
    )
