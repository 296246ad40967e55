"""How much the weights of each input channel matter: the mean square of the channel.

With it Σ w (x - x')² is the squared error of the layer's output, channels taken as uncorrelated.
formats/schemes/SPEC.md section 5, *Weighted search*.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import AffineEncoding
from qconvert.quantizers.affine import to_groups

F32 = NDArray[np.float32]

# Of the largest weight of a group: a channel that calibration never saw still counts a little, and
# the rounding of the sums in binary32 stays far below the lightest value.
LEAST = np.float32(2.0**-16)


@dataclass(frozen=True, slots=True)
class Weighting:
    """Weights of rows (R, c); row r has weights p = r mod P, group g has weights g mod Q.

    Attributes:
        mean_square: of the input channels, (P, c), finite and not negative: what errors are
            measured with.
        weight: of the values of each group, (Q, L), 2^-16 to 1, 0 for padding: what the search has.
        reach: what a value counts for in the range that is searched, (Q, L), at most 1.
    """

    mean_square: F32
    weight: F32
    reach: F32

    def columns(self, start: int, count: int) -> Weighting:
        """Of a run of columns, where a row is one group or part of one."""
        part = np.s_[:, start : start + count]
        return Weighting(self.mean_square[part], self.weight[part], self.reach[part])

    def blocks(self, start: int, count: int, block: int) -> Weighting:
        """Of a run of columns of one row, from the first of a block on."""
        groups = np.s_[start // block : -(-(start + count) // block)]
        mean_square = self.mean_square[:, start : start + count]
        return Weighting(mean_square, self.weight[groups], self.reach[groups])

    def repeated(self, rows: int) -> Weighting:
        """Of ``rows`` rows in one: for a scale that they share."""
        return Weighting(*(np.tile(a, rows) for a in (self.mean_square, self.weight, self.reach)))

    def groups(self, first: int, count: int) -> tuple[F32, F32]:
        """``weight`` and ``reach`` of groups one by one, (count, L) each."""
        rows = np.arange(first, first + count) % len(self.weight)
        return self.weight[rows], self.reach[rows]


def weighting(mean_square: F32, encoding: AffineEncoding) -> Weighting:
    """Weights for the search of rows that begin where a group begins.

    Args:
        mean_square: (P, c); tensor granularity wants all that share the scale in one row.
    """
    groups, counts = to_groups(np.ascontiguousarray(mean_square, np.float32), encoding)
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
