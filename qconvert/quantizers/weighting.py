"""How much the weights of each input channel matter: the mean square of the channel.

With it Σ w (x - x')² is the squared error of the layer's output, channels taken as uncorrelated.
formats/schemes/SPEC.md section 5, *Weighted search*.
"""

from __future__ import annotations

import numpy as np

from qconvert.encoding import AffineEncoding
from qconvert.kernels.arithmetic import to_groups
from qconvert.kernels.records import F32, Weighting

# Of the largest weight of a group: a channel that calibration never saw still counts a little, and
# the rounding of the sums in binary32 stays far below the lightest value.
LEAST = np.float32(2.0**-16)


def weighting(mean_square: F32, encoding: AffineEncoding) -> Weighting:
    """Weights for the search of rows that begin where a group begins.

    Args:
        mean_square: (P, c); tensor granularity wants all that share the scale in one row.
    """
    groups, counts = to_groups(np.ascontiguousarray(mean_square, np.float32), encoding.block)
    length = groups.shape[1]
    real = np.full(len(groups), length) if counts is None else counts
    inside = np.arange(length) < real[:, None]
    largest = groups.max(axis=1, keepdims=True)
    one = np.float32(1)
    share = np.where(largest > 0, groups / np.where(largest > 0, largest, one), one)
    weight = np.maximum(share, LEAST)
    ordered = np.sort(np.where(inside, weight, np.float32(np.inf)), axis=1)
    middle = np.take_along_axis(ordered, (real[:, None] - 1) // 2, axis=1)
    reach = np.minimum(np.sqrt(weight / middle), one)
    nothing = np.float32(0)
    return Weighting(
        mean_square, np.where(inside, weight, nothing), np.where(inside, reach, nothing)
    )
