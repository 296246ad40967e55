"""Rows of weights to rows of codes in one go: moments, ranges, codes, and what a decision has to
know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.geometry import PACK_GROUP
from qconvert.kernels import Moments
from qconvert.quantizers.affine import EncodedRows, ErrorSums, encode_rows, to_groups
from qconvert.quantizers.fitting import fit
from qconvert.quantizers.groups import GroupStatistics, observe_groups
from qconvert.quantizers.rows import StoredRows
from qconvert.quantizers.weighting import Weighting
from qconvert.ranges import RangeMethod, search_grid

if TYPE_CHECKING:
    from qconvert.kernels.compiled import QuantizedGroups

F32 = NDArray[np.float32]
Bounds = tuple[float, float]  # low, high
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows as stored and the figures of one pass over them.

    Attributes:
        moments: of the values.
        groups: ranges of the groups.
        outside: values outside the bounds.
    """

    rows: EncodedRows
    moments: Moments
    groups: GroupStatistics
    outside: int


def quantize_rows(
    stored: StoredRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: Bounds,
    weights: Weighting | None = None,
) -> QuantizedRows:
    """Quantize rows (R, c) whose groups have scales of their own.

    Args:
        bounds: values below the first or above the second number are counted; moments are taken
            about their middle.
        weights: of the values, for the search and for a weighted error.

    Raises:
        FloatingPointError: NaN or Inf, or a float64 beyond float32.
    """
    low, high = (float(b) for b in np.clip(bounds, -LARGEST, LARGEST).astype(np.float32))
    pivot = float(np.float32(low / 2 + high / 2))
    native = _native(stored, encoding, method, (low, high), pivot, weights)
    if native is not None:
        moments = Moments.about(stored.size, native.extremes, pivot, native.powers)
        error = ErrorSums(stored.size, *native.errors)
        rows = EncodedRows(native.codes, native.scales, native.zeros, error)
        ranges, outside = GroupStatistics(*native.groups), native.outside
    else:
        x = stored.values()
        extremes = float(x.min()), float(x.max())
        moments = Moments.about(x.size, extremes, pivot, kernels.power_sums(x.ravel(), pivot))
        groups, counts = to_groups(x, encoding)
        parameters = fit(groups, encoding, method, counts, weights)
        mean_square = None if weights is None else weights.mean_square
        rows = encode_rows(x, encoding, parameters, mean_square)
        ranges = observe_groups(x, encoding, method.name == "mse")
        outside = int(np.count_nonzero((x < low) | (x > high)))
    rows = replace(rows, error=replace(rows.error, signal=moments.square_sum))
    return QuantizedRows(rows, moments, ranges, outside)


def _native(
    stored: StoredRows,
    encoding: AffineEncoding,
    method: RangeMethod,
    bounds: Bounds,
    pivot: float,
    weights: Weighting | None,
) -> QuantizedGroups | None:
    """The whole pass in native code; None where there is none, or none for such groups."""
    if kernels.fused is None:
        return None
    bits, symmetric = encoding.bits, encoding.symmetric
    searches = method.name == "mse"
    if not encoding.block:
        parameters = None
        if method.name != "minmax":
            p = fit(stored.values(), encoding, method, None, weights)
            parameters = p.scale, p.zero
        rows: QuantizedGroups = kernels.fused.quantize_channels(
            *(*stored.readable(), stored.shape, bits, symmetric),
            *(searches and bits < 8, bounds, pivot, parameters),
            None if weights is None else weights.mean_square,
        )
        return rows
    full = stored.shape[1] % max(encoding.block, PACK_GROUP) == 0
    if not full or method.name == "percentile":
        return None
    blocks: QuantizedGroups = kernels.fused.quantize_blocks(
        *(*stored.readable(), encoding.block, bits, symmetric, encoding.scale_dtype),
        *(search_grid(bits, symmetric) if searches else None, bounds, pivot),
        None if weights is None else _of_blocks(weights, encoding.block),
    )
    return blocks


def _of_blocks(weights: Weighting, block: int) -> tuple[F32, F32, F32]:
    return weights.weight, weights.reach, weights.mean_square.reshape(-1, block)
