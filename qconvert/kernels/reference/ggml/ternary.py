"""ggml's block types for weights of three values, TQ1_0, TQ2_0, Q2_0, and of two, Q1_0, in NumPy.

The scale is the largest magnitude and a code the rounded quotient, as in ggml: exact for weights
that are -d, 0 and d for a d of float16, which is what these types are for; of Q1_0 the mean
magnitude and the sign, exact for -d and d. Nothing is searched.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import Parts
from qconvert.kernels.reference.ggml.block import GgmlBlock

BLOCK = 256
BLOCK_OF_THREE, BLOCK_OF_TWO = 64, 128  # of Q2_0 and Q1_0, whose blocks begin with their scale

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# TQ1_0 keeps values as digits of base 3, the first the highest: (values, bytes) of its three runs.
_RUNS = ((160, 32), (80, 16), (16, 4))


def _digits(blocks: F32) -> tuple[U8, U8]:
    """Scales as bytes, (k, 2), and codes + 1, as blocks; halves round away from 0."""
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


def _encode_q2_0(blocks: F32, importance: F32 | None) -> U8:
    scale, digits = _digits(blocks)
    runs = digits.reshape(len(digits), -1, 4)
    packed = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
    return np.concatenate([scale, packed], axis=1)


def _encode_q1_0(blocks: F32, importance: F32 | None) -> U8:
    total = np.zeros((len(blocks), 1), np.float32)
    for column in np.abs(blocks).T:  # one after the other, which decides how the sum is rounded
        total[:, 0] += column
    scale = (total / np.float32(BLOCK_OF_TWO)).astype("<f2").view(np.uint8)
    return np.concatenate([scale, np.packbits(blocks >= 0, axis=1, bitorder="little")], axis=1)


def _q2_0_parts(data: U8) -> Parts:
    codes = data[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    return Parts(codes.reshape(len(data), -1).astype(np.int16) - np.int16(1), _first(data), None)


def _q1_0_parts(data: U8) -> Parts:
    bits = np.unpackbits(data[:, 2:], axis=1, bitorder="little")
    return Parts(bits.astype(np.int16) * np.int16(2) - np.int16(1), _first(data), None)


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


def _first(data: U8) -> F32:
    """Scales where they come first."""
    return np.ascontiguousarray(data[:, :2]).view("<f2").astype(np.float32)


def _decode_q2_0(data: U8) -> F32:
    parts = _q2_0_parts(data)
    return parts.scale * parts.codes.astype(np.float32)


def _decode_q1_0(data: U8) -> F32:
    parts = _q1_0_parts(data)
    return parts.scale * parts.codes.astype(np.float32)


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
    GgmlBlock(
        *("Q2_0", BLOCK_OF_THREE, 18, BLOCK_OF_THREE, (-1, 2)),
        *(_encode_q2_0, _decode_q2_0, _q2_0_parts, _first),
    ),
    GgmlBlock(
        *("Q1_0", BLOCK_OF_TWO, 18, BLOCK_OF_TWO, (-1, 1)),
        *(_encode_q1_0, _decode_q1_0, _q1_0_parts, _first),
        gap=2,
    ),
)
