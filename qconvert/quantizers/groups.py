"""What the groups of a tensor are like: the ranges that blocks or rows would share a scale over.

Tiles are observed in any number and added up; adding in tile order gives the same bits for any
number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.quantizers.affine import to_groups


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """Ranges of the groups (blocks or rows) that would share a scale.

    Attributes:
        symmetric_power: Σ over groups of the squared step that a symmetric grid needs, in units of
            the value.
        asymmetric_power: the same for an asymmetric grid.
        smallest, largest: smallest and largest magnitude of a group that is not all zeros; inf and
            0 if none.
    """

    symmetric_power: float
    asymmetric_power: float
    smallest: float
    largest: float

    def __add__(self, other: GroupStatistics) -> GroupStatistics:
        return GroupStatistics(
            self.symmetric_power + other.symmetric_power,
            self.asymmetric_power + other.asymmetric_power,
            min(self.smallest, other.smallest),
            max(self.largest, other.largest),
        )

    @property
    def step_ratio_db(self) -> float:
        """How much finer the asymmetric grid is, in dB of noise: 10 log10 of the ratio of
        powers.
        """
        if self.asymmetric_power <= 0:
            return 0.0
        return 10 * math.log10(self.symmetric_power / self.asymmetric_power)


EMPTY_GROUPS = GroupStatistics(0.0, 0.0, math.inf, 0.0)


def observe_groups(
    rows: NDArray[np.float32], encoding: AffineEncoding, search: bool
) -> GroupStatistics:
    """Group ranges of rows (R, c), for the granularity and width of ``encoding``.

    Args:
        search: whether the symmetric grid may use its extra code on either side (the mse method
            below 8 bits).
    """
    groups, _ = to_groups(rows, encoding)
    low, high, _ = kernels.extrema(groups)
    down = np.maximum(-low.astype(np.float64), 0)
    up = np.maximum(high.astype(np.float64), 0)
    magnitude = np.maximum(down, up)
    top = (1 << (encoding.bits - 1)) - 1
    if search and encoding.bits < 8:
        either = np.minimum(
            np.maximum(down / (top + 1), up / top), np.maximum(up / (top + 1), down / top)
        )
    else:
        either = magnitude / top
    asymmetric = (down + up) / encoding.levels
    present = magnitude[magnitude > 0]
    return GroupStatistics(
        symmetric_power=kernels.lane_sum(either * either),
        asymmetric_power=kernels.lane_sum(asymmetric * asymmetric),
        smallest=float(present.min()) if len(present) else math.inf,
        largest=float(present.max()) if len(present) else 0.0,
    )
