"""Rows of weights to rows of stored codes, and casts."""

from __future__ import annotations

import numpy as np

from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import (
    SCALE_NUMPY,
    padded_codes,
    stored_zero_points,
    to_groups,
    weighted_error_sums,
)
from qconvert.kernels.records import F32, U8, Bytes, Encoded, ErrorSums, Parameters
from qconvert.kernels.reference.codes import decode, encode, pack
from qconvert.kernels.reference.statistics import error_sums


def encode_rows(
    x: F32, encoding: AffineEncoding, parameters: Parameters, mean_square: F32 | None = None
) -> Encoded:
    """Encode rows (R, c) with the parameters of their groups: codes, scales and zero points.

    ``c`` is the row length, or a run of columns of one row that starts at a multiple of 256. A
    single set of parameters serves all groups (tensor granularity, or a run of a channel).

    Args:
        mean_square: weights of the error, (P, c); row r has those of r mod P.
    """
    groups, counts = to_groups(x, encoding.block)
    scale = np.broadcast_to(parameters.scale, len(groups))
    zero = np.broadcast_to(parameters.zero, len(groups))
    codes, clipped = encode(groups, scale, zero, encoding.bits, encoding.symmetric)
    decoded = decode(codes, scale, zero, encoding.bits, encoding.symmetric)
    rows, columns = x.shape
    decoded = decoded.reshape(rows, -1)[:, :columns]
    signal, noise, worst = error_sums(x, decoded)
    weighted = 0.0, 0.0
    if mean_square is not None:
        weighted = weighted_error_sums(x, decoded, mean_square)
    if counts is not None:
        codes[np.arange(codes.shape[1]) >= counts[:, None]] = 0  # not clipped: a zero is in range
    segments: dict[str, Bytes] = {
        "codes": _stored(codes.reshape(rows, -1), columns, encoding),
        "scales": parameters.scale.astype(SCALE_NUMPY[encoding.scale_dtype]).tobytes(),
    }
    if not encoding.symmetric:
        segments["zero_points"] = stored_zero_points(parameters.zero, encoding).data
    return Encoded(segments, ErrorSums(x.size, signal, noise, worst, clipped, *weighted))


def _stored(codes: U8, columns: int, encoding: AffineEncoding) -> bytes:
    """Rows of unsigned codes as in the file, padded to whole blocks and groups of 32."""
    padded = padded_codes(codes, columns, encoding)
    return (padded if encoding.bits == 8 else pack(padded, encoding.bits)).tobytes()
