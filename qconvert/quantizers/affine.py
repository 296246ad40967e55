"""Affine quantization: rows of weights to codes, scales and zero points, and back.

formats/schemes/SPEC.md; `fitting` chooses the parameters, the kernels make the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.geometry import PACK_GROUP

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

SIGN = np.uint8(0x80)  # flips a byte between offset 128 and two's complement

SCALE_NUMPY: dict[str, np.dtype[np.generic]] = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
}
# Smallest positive number of each dtype, a subnormal one.
SMALLEST_SCALE = {"F16": 2.0**-24, "BF16": 2.0**-133, "F32": 2.0**-149}


@dataclass(frozen=True, slots=True)
class Parameters:
    """Scale and zero point of each group, as stored.

    Attributes:
        scale: float32 (G,), already rounded to the scale dtype.
        zero: int32 (G,), zero steps (quarters of a code below 8 bits); zeros when symmetric.
    """

    scale: F32
    zero: I32


@dataclass(frozen=True, slots=True)
class ErrorSums:
    """What quantization did to a run of values: sums that add up over a tensor."""

    count: int = 0
    signal: float = 0.0  # Σx²
    noise: float = 0.0  # Σ(x - x')²
    worst: float = 0.0  # max |x - x'|
    clipped: int = 0
    weighted_signal: float = 0.0  # Σwx², 0 without weights
    weighted_noise: float = 0.0  # Σw(x - x')²

    def __add__(self, other: ErrorSums) -> ErrorSums:
        return ErrorSums(
            self.count + other.count,
            self.signal + other.signal,
            self.noise + other.noise,
            max(self.worst, other.worst),
            self.clipped + other.clipped,
            self.weighted_signal + other.weighted_signal,
            self.weighted_noise + other.weighted_noise,
        )

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(Σx² / Σ(x - x')²) in dB; None when nothing was lost."""
        return _decibels(self.signal, self.noise)

    @property
    def weighted_sqnr_db(self) -> float | None:
        """The same with weights: SQNR of the layer's output; None without weights too."""
        return _decibels(self.weighted_signal, self.weighted_noise)

    @property
    def nmse(self) -> float:
        """Σ(x - x')² / Σx²; infinite when zeros did not stay zeros."""
        if self.signal == 0:
            return float("inf") if self.noise else 0.0
        return self.noise / self.signal


def _decibels(signal: float, noise: float) -> float | None:
    if noise == 0:
        return None
    if signal == 0:
        return float("-inf")
    return float(10 * (np.log10(signal) - np.log10(noise)))


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Encoded rows of a tensor.

    Attributes:
        codes: packed, ready for the file, as unsigned bytes.
        scales: bytes in the scale dtype.
        zero: zero points as stored, one byte each and not yet packed (packing runs over the whole
            tensor).
        error: measured against the values given.
    """

    codes: bytes | memoryview
    scales: bytes | memoryview
    zero: U8
    error: ErrorSums


def round_scale(scale: F32, dtype: str, magnitude: F32) -> F32:
    """Scales as stored; that of a group whose ``magnitude`` is not 0 never becomes 0."""
    stored = scale.astype(SCALE_NUMPY[dtype]).astype(np.float32)
    smallest = np.float32(SMALLEST_SCALE[dtype])
    lost = (stored == 0) & (magnitude > 0)
    return np.where(lost, np.copysign(smallest, scale), stored)


def to_groups(x: F32, encoding: AffineEncoding) -> tuple[F32, I32 | None]:
    """Rows (R, c) as groups (G, L), the last block of each row padded with zeros.

    Returns:
        The groups, and the number of real values of each, or None when all are full.
    """
    block = encoding.block
    rows, columns = x.shape
    if not block:
        return x, None
    per_row = -(-columns // block)
    if columns % block == 0:
        return x.reshape(-1, block), None
    padded = np.zeros((rows, per_row * block), np.float32)
    padded[:, :columns] = x
    counts = np.full((rows, per_row), block, np.int32)
    counts[:, -1] = columns - (per_row - 1) * block
    return padded.reshape(-1, block), counts.ravel()


def encode_rows(
    x: F32, encoding: AffineEncoding, parameters: Parameters, mean_square: F32 | None = None
) -> EncodedRows:
    """Encode rows (R, c) with the parameters of their groups.

    ``c`` is the row length, or a run of columns of one row that starts at a multiple of 256. A
    single set of parameters serves all groups (tensor granularity, or a run of a channel).

    Args:
        mean_square: weights of the error, (P, c); row r has those of r mod P.
    """
    bits, symmetric = encoding.bits, encoding.symmetric
    if kernels.fused is not None:
        codes, *error = kernels.fused.encode_rows(
            *(x, parameters.scale, parameters.zero, bits, symmetric, encoding.block, mean_square)
        )
    else:
        codes, *error = _encode_rows(x, encoding, parameters, mean_square)
    return EncodedRows(
        codes=codes,
        scales=parameters.scale.astype(SCALE_NUMPY[encoding.scale_dtype]).tobytes(),
        zero=stored_zero_points(parameters.zero, encoding),
        error=ErrorSums(x.size, *error),
    )


def _encode_rows(
    x: F32, encoding: AffineEncoding, parameters: Parameters, mean_square: F32 | None
) -> tuple[bytes, float, float, float, int, float, float]:
    """Stored codes and the fields of ``ErrorSums`` but the first."""
    groups, counts = to_groups(x, encoding)
    scale = np.broadcast_to(parameters.scale, len(groups))
    zero = np.broadcast_to(parameters.zero, len(groups))
    codes, clipped = kernels.encode(groups, scale, zero, encoding.bits, encoding.symmetric)
    decoded = kernels.decode(codes, scale, zero, encoding.bits, encoding.symmetric)
    rows, columns = x.shape
    decoded = decoded.reshape(rows, -1)[:, :columns]
    signal, noise, worst = kernels.error_sums(x, decoded)
    weighted = 0.0, 0.0
    if mean_square is not None:
        weighted = kernels.weighted_error_sums(x, decoded, mean_square)
    if counts is not None:
        codes[np.arange(codes.shape[1]) >= counts[:, None]] = 0  # not clipped: a zero is in range
    stored = _store_codes(codes.reshape(rows, -1), columns, encoding)
    return stored, signal, noise, worst, clipped, *weighted


def _store_codes(codes: U8, columns: int, encoding: AffineEncoding) -> bytes:
    if encoding.bits == 8:
        stored = codes ^ SIGN
        stored[:, columns:] = 0
        return stored.tobytes()
    unit = max(encoding.block, PACK_GROUP)
    width = -(-columns // unit) * unit
    if width != codes.shape[1]:
        wide = np.zeros((len(codes), width), np.uint8)
        wide[:, : codes.shape[1]] = codes
        codes = wide
    return kernels.pack(codes.ravel(), encoding.bits).tobytes()


def stored_zero_points(zero: I32, encoding: AffineEncoding) -> U8:
    """Zero steps as stored, one byte each; none when symmetric."""
    if encoding.symmetric:
        return np.zeros(0, np.uint8)
    stored = zero.astype(np.uint8)
    return stored ^ SIGN if encoding.bits == 8 else stored


def pack_zero_points(zero: U8, encoding: AffineEncoding) -> bytes:
    """Pack stored zero points; the last group of 32 is filled up with zeros."""
    if encoding.bits == 8:
        return zero.tobytes()
    padded = np.zeros(-(-len(zero) // PACK_GROUP) * PACK_GROUP, np.uint8)
    padded[: len(zero)] = zero
    return kernels.pack(padded, encoding.zero_point_bits).tobytes()


def load_codes(packed: bytes, encoding: AffineEncoding) -> U8:
    """Stored codes as unsigned codes, padding included, flat."""
    raw = np.frombuffer(packed, np.uint8)
    return raw ^ SIGN if encoding.bits == 8 else kernels.unpack(raw, encoding.bits)


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
