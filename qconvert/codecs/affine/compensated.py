"""Other codes than the nearest for rows that were encoded, with the same zero points, and with
scales that suit them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.compensation import Rounder, weighted_noise
from qconvert.kernels.arithmetic import (
    SCALE_NUMPY,
    SIGN,
    padded_codes,
    real_zero,
    to_groups,
)
from qconvert.kernels.records import F32, I32, U8, Bytes, CodeGrid, Encoded, Parameters


def stored_parameters(segments: dict[str, Bytes], encoding: Affine) -> Parameters:
    """Scales and zero points of the groups of a tile from what is stored of them."""
    scale = np.frombuffer(segments["scales"], SCALE_NUMPY[encoding.scale_dtype]).astype(np.float32)
    if encoding.symmetric:
        return Parameters(scale, np.zeros(len(scale), np.int32))
    zero = np.frombuffer(segments["zero_points"], np.uint8)
    return Parameters(scale, (zero ^ SIGN if encoding.bits == 8 else zero).astype(np.int32))


def compensated(
    x: F32,
    done: Encoded,
    p: Parameters,
    encoding: Affine,
    rounder: Rounder,
    mean_square: F32 | None,
) -> Encoded:
    """Whole rows x (R, C) that were encoded as ``done`` with parameters ``p``, one a group or one
    for all, which then keep their scale; the error is that of the codes that come out.

    Args:
        mean_square: weights of the error, (1, C).
    """
    rows, columns = x.shape
    shape = (rows, encoding.row_groups)
    scale = np.broadcast_to(p.scale, rows * shape[1]).reshape(shape)
    zero = np.broadcast_to(p.zero, rows * shape[1]).reshape(shape)
    least = 1 if encoding.symmetric and encoding.bits == 8 else 0
    levels = np.arange(least, encoding.levels + 1, dtype=np.float32)
    centre = np.full(shape, 1 << (encoding.bits - 1), np.float32)
    grid = CodeGrid(
        *(levels, scale, centre if encoding.symmetric else real_zero(zero, encoding.bits)),
        *(np.zeros(shape, np.float32), encoding.block or columns),
    )
    before = kernels.load_codes(bytes(done.segments["codes"]), encoding)
    before = before.reshape(rows, -1)[:, :columns] - np.uint8(least)
    own = encoding.scale_dtype if encoding.block else None
    codes, grid = rounder.codes(x, before, grid, own)
    scale = grid.scale
    codes += np.uint8(least)
    padded = padded_codes(codes, columns, encoding)
    packed = padded if encoding.bits == 8 else kernels.pack(padded, encoding.bits)
    segments = {**done.segments, "codes": packed.data}
    if own:
        segments["scales"] = scale.astype(SCALE_NUMPY[own]).tobytes()
    decoded = _decoded(codes, scale, zero, encoding)
    _, noise, worst = kernels.error_sums(x, decoded)
    error = replace(done.error, noise=noise, worst=worst)
    if mean_square is not None:
        error = replace(error, weighted_noise=weighted_noise(x, decoded, mean_square))
    return replace(done, segments=segments, error=error)


def _decoded(codes: U8, scale: F32, zero: I32, encoding: Affine) -> F32:
    """What codes (R, C) decode to."""
    rows, columns = codes.shape
    groups, _ = to_groups(codes.astype(np.float32), encoding.block)
    values = kernels.decode(
        *(groups.astype(np.uint8), scale.ravel(), zero.ravel()), encoding.bits, encoding.symmetric
    )
    return values.reshape(rows, -1)[:, :columns]
