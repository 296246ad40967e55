"""Rows of weights to stored rows in one go: ranges, codes, and what a decision has to know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.geometry import PACK_GROUP
from qconvert.quantizers.affine import EncodedRows, ErrorSums, encode_rows, to_groups
from qconvert.quantizers.fitting import fit
from qconvert.quantizers.groups import GroupStatistics, observe_groups
from qconvert.quantizers.weighting import Weighting
from qconvert.ranges import SEARCH_GRIDS, RangeMethod

F32 = NDArray[np.float32]
Bounds = tuple[float, float]  # low, high
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as stored and the figures of one pass over them.

    Attributes:
        groups: ranges of the groups.
        outside: values outside the bounds.
    """

    rows: EncodedRows
    groups: GroupStatistics
    outside: int


def quantize_rows(
    x: F32,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: Bounds,
    weights: Weighting | None = None,
) -> QuantizedRows:
    """Quantize finite rows (R, c) whose groups have scales of their own.

    Args:
        bounds: values below the first or above the second number are counted.
        weights: of the values, for the search and for a weighted error.
    """
    low, high = np.clip(bounds, -LARGEST, LARGEST).astype(np.float32)
    full = encoding.block and x.shape[1] % max(encoding.block, PACK_GROUP) == 0
    if kernels.fused is not None and full and method.name in ("minmax", "mse"):
        grid = SEARCH_GRIDS[encoding.bits] if method.name == "mse" else None
        found = kernels.fused.quantize_blocks(
            x.reshape(-1, encoding.block),
            *(encoding.bits, encoding.symmetric, encoding.scale_dtype, grid),
            (float(low), float(high)),
            None if weights is None else _of_blocks(weights, encoding.block),
        )
        error = ErrorSums(x.size, *found.errors)
        rows = EncodedRows(found.codes, found.scales, found.zeros, error)
        return QuantizedRows(rows, GroupStatistics(*found.groups), found.outside)
    groups, counts = to_groups(x, encoding)
    return QuantizedRows(
        encode_rows(
            x,
            encoding,
            fit(groups, encoding, method, counts, weights),
            None if weights is None else weights.mean_square,
        ),
        observe_groups(x, encoding, method.name == "mse"),
        int(np.count_nonzero((x < low) | (x > high))),
    )


def _of_blocks(weights: Weighting, block: int) -> tuple[F32, F32, F32]:
    return weights.weight, weights.reach, weights.mean_square.reshape(-1, block)
