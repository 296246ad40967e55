"""The bins of `kernels.histogram`: values by the upper 16 bits of their float32 patterns."""

from __future__ import annotations

import functools

import numpy as np

from qconvert.kernels.arithmetic import HISTOGRAM_BINS
from qconvert.kernels.records import F64


@functools.cache
def bin_centres() -> F64:
    """The middle of each histogram bin, read-only; NaN for the patterns of Inf and NaN."""
    keys = np.arange(HISTOGRAM_BINS, dtype=np.uint32)
    finite = keys & 0x7F80 != 0x7F80
    centres = np.full(len(keys), np.nan)
    centres[finite] = ((keys[finite] << 16) | 0x8000).view(np.float32)
    centres.flags.writeable = False
    return centres


@functools.cache
def bin_starts() -> F64:
    """The end of each histogram bin that is nearer to 0, read-only; NaN likewise."""
    keys = np.arange(HISTOGRAM_BINS, dtype=np.uint32)
    finite = keys & 0x7F80 != 0x7F80
    near = np.full(len(keys), np.nan)
    near[finite] = (keys[finite] << 16).view(np.float32)
    near.flags.writeable = False
    return near


def bin_edges() -> tuple[F64, F64]:
    """Smallest and largest end of each histogram bin; NaN for the patterns of Inf and NaN."""
    near = bin_starts()
    width = np.abs(bin_centres() - near) * 2
    negative = np.arange(len(near)) >= len(near) // 2
    return np.where(negative, near - width, near), np.where(negative, near, near + width)
