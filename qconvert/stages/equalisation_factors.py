"""Factors of channels between matrices that leave the least quantization error, in closed form.

A channel with inputs x and weights w (a column of what reads it) can be divided by c before and
multiplied by it after. A block of weights is quantized in steps of its largest, so that the error
is about Σ_j E[x_j²] / c_j² times Σ_j w_j² c_j², which by Cauchy and Schwarz is least for
c_j = (E[x_j²] / E_i[w_ij²])^(1/4), up to a factor for all channels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.files.equalised import MOST

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def column_logarithms(squares: F64, weights: F64) -> F64:
    """log2 c of columns, nan where a channel is never active or has no weight.

    Args:
        squares: mean squares of the inputs.
        weights: mean squares of the columns.
    """
    known = (squares > 0) & (weights > 0) & np.isfinite(squares) & np.isfinite(weights)
    found = np.full(squares.shape, np.nan)
    found[known] = (np.log2(squares[known]) - np.log2(weights[known])) / 4
    return found


def channel_logarithms(logarithms: F64, channels: I64, size: int) -> F64:
    """log2 c of channels, (size,): the mean over the columns of each; nan where none is known."""
    known = np.isfinite(logarithms)
    at = channels[known]
    count = np.bincount(at, minlength=size)
    total = np.bincount(at, logarithms[known], minlength=size)
    found: F64 = np.divide(total, count, out=np.full(size, np.nan), where=count > 0)
    return found


def powers_of_two(logarithms: F64, proportion: float) -> NDArray[np.int8]:
    """Exponents of factors c^proportion, as powers of two: of the channel in the middle 0, and 0
    where nothing is known.
    """
    known = np.isfinite(logarithms)
    exponents = np.zeros(len(logarithms), np.int8)
    if known.any():
        centred = (logarithms[known] - np.median(logarithms[known])) * proportion
        exponents[known] = np.clip(np.rint(centred), -MOST, MOST)
    return exponents
