"""ggml's block types for weights of three values, TQ1_0 and TQ2_0, in NumPy.

The scale is the largest magnitude and a code the rounded quotient, as in ggml: exact for weights
that are -d, 0 and d for a d of float16, which is what these types are for. Nothing is searched.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import Parts
from qconvert.kernels.reference.ggml.block import GgmlBlock

BLOCK = 256

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# TQ1_0 keeps values as digits of base 3, the first the highest: (values, bytes) of its three runs.
_RUNS = ((160, 32), (80, 16), (16, 4))


def _digits(blocks: F32) -> tuple[U8, U8]:
    """Scales as bytes, (k, 2), and codes + 1, (k, 256); halves round away from 0."""
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    steps = blocks * inverse
    # Inf and NaN come from a scale below 2^-128: 0, as for the other types.
    steps = np.where(np.isfinite(steps), steps, np.float32(0))
    half = np.float32(0.5)
    digits = np.uint8(1) + (steps >= half) - (steps <= -half).astype(np.uint8)
    return scale.astype("<f2").view(np.uint8), digits.astype(np.uint8)


def _encode_tq1(blocks: F32, importance: F32 | None) -> U8:
    scale, digits = _digits(blocks)
    parts, start = [], 0
    for values, count in _RUNS:
        run = digits[:, start : start + values].reshape(len(digits), -1, count).astype(np.uint16)
        number: NDArray[np.uint16] = np.zeros((len(digits), count), np.uint16)
        for place in range(5):
            number = number * np.uint16(3)
            if place < run.shape[1]:
                number += run[:, place]
        # As a fraction of 3^5 in 256ths, rounded up: multiplying by 3 then gives digit by digit.
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
        start += values
    return np.concatenate([*parts, scale], axis=1)


def _encode_tq2(blocks: F32, importance: F32 | None) -> U8:
    scale, digits = _digits(blocks)
    runs = digits.reshape(-1, 2, 4, 32)
    packed = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
    return np.concatenate([packed.reshape(-1, 64), scale], axis=1)


def _tq1_parts(data: U8) -> Parts:
    codes, start = [], 0
    for values, count in _RUNS:
        fraction = data[:, start : start + count]
        for _ in range(values // count):
            codes.append((fraction.astype(np.int16) * 3 >> 8) - 1)
            fraction = fraction * np.uint8(3)  # of 256: the digit that is done falls out
        start += count
    return Parts(np.concatenate(codes, axis=1).astype(np.int16), _scales(data), None)


def _tq2_parts(data: U8) -> Parts:
    packed = data[:, :64].reshape(-1, 2, 32)
    runs = [packed >> shift & 3 for shift in (0, 2, 4, 6)]
    codes = np.stack(runs, axis=2).reshape(-1, BLOCK).astype(np.int16) - 1
    return Parts(codes.astype(np.int16), _scales(data), None)


def _scales(data: U8) -> F32:
    return np.ascontiguousarray(data[:, -2:]).view("<f2").astype(np.float32)


def _decode_tq1(data: U8) -> F32:
    parts = _tq1_parts(data)
    return parts.scale * parts.codes.astype(np.float32)


def _decode_tq2(data: U8) -> F32:
    parts = _tq2_parts(data)
    return parts.scale * parts.codes.astype(np.float32)


TYPES = (
    GgmlBlock("TQ1_0", BLOCK, 54, BLOCK, (-1, 1), _encode_tq1, _decode_tq1, _tq1_parts, _scales),
    # Two bits can say 2, which no encoder writes.
    GgmlBlock("TQ2_0", BLOCK, 66, BLOCK, (-1, 2), _encode_tq2, _decode_tq2, _tq2_parts, _scales),
)
