"""Which scales and minima the groups of ggml's block types may have in the place of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from qconvert.kernels.records import F32, U8
from qconvert.kernels.reference.ggml.codebooks import with_steps
from qconvert.kernels.reference.ggml.kquants import with_integers


@dataclass(frozen=True, slots=True)
class Steps:
    """Scales, and perhaps minima, of groups that are whole multiples of the numbers of a block.

    Attributes:
        scales: the smallest and the largest multiple.
        minima: the largest, which are taken away; None where there are none.
        written: blocks, (k, nbytes), with other multiples, (k, groups).
    """

    scales: tuple[int, int]
    minima: int | None
    written: Callable[[U8, F32, F32 | None], U8]


def _with_steps(data: U8, steps: F32, minima: F32 | None) -> U8:
    return with_steps(data, steps)


def with_half(data: U8, scale: F32) -> U8:
    """Blocks of one group with another scale, float16 in the first two bytes."""
    data = data.copy()
    data[:, :2] = scale.astype("<f2").reshape(-1, 1).view(np.uint8)
    return data


# One scale a block, float16; the minima of Q4_1 and Q5_1 stay.
HALF_SCALES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
STEPS = {
    "Q2_K": Steps((0, 15), 15, partial(with_integers, "Q2_K")),
    "Q3_K": Steps((-32, 31), None, partial(with_integers, "Q3_K")),
    "Q4_K": Steps((0, 63), 63, partial(with_integers, "Q4_K")),
    "Q5_K": Steps((0, 63), 63, partial(with_integers, "Q5_K")),
    "Q6_K": Steps((-127, 127), None, partial(with_integers, "Q6_K")),
    "IQ4_XS": Steps((-32, 31), None, _with_steps),
}
