"""Rounding that makes up for its own errors, by what they cost the output of a layer.

A family takes part by saying where its codes stand (`CodeGrid`) and by taking other codes than the
nearest; scales change with them where a family stores each by itself, zero points never do.
formats/schemes/SPEC.md section 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.kernels.records import F32, F64, U8, CodeGrid, Factors

COMPENSATED = "compensated"
DAMPING = 0.01  # of the mean diagonal, added to every element of it
PASSES = 4  # over all columns at most, in which single codes are changed; two to four do
# Columns whose factors may be prepared: 36 bytes of memory for each of their pairs, 39 GB.
MOST_COLUMNS = 1 << 15
LONGEST_RESCALED = 256  # columns of a group whose scale is chosen anew
LARGEST = np.float32(2.0**96)  # weights beyond: products with their errors could overflow


def prepared(
    gram: F64, damping: float = DAMPING, dtype: type[np.floating[Any]] = np.float32
) -> Factors:
    """The factors of a Gram matrix H (C, C), scaled to a mean diagonal of 1.

    Takes 36 bytes of memory for each element, that of ``gram`` included, and leaves 8.

    Raises:
        ValueError: NaN or Inf, nothing but zeros, or no sum of squares: not positive definite even
            when damped.
    """
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if not np.isfinite(gram).all():
        raise ValueError("NaN or Inf")
    if not mean > 0:
        raise ValueError("no input that is not 0")
    order = np.argsort(-diagonal, kind="stable")
    h = gram / mean
    h[np.diag_indices_from(h)] += damping
    narrow = h.astype(dtype)
    h = h[np.ix_(order, order)]
    try:
        # H = U D Uᵀ with U upper triangular is the Cholesky factor of H upside down.
        upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as e:
        raise ValueError("it is not positive definite, damped as it is") from e
    del h
    feedback = (upper / upper.diagonal()).astype(dtype)
    feedback[np.diag_indices_from(feedback)] = 0
    return Factors(order, narrow, feedback)


@dataclass(frozen=True, slots=True)
class Rounder:
    """Chooses the codes of one tensor.

    Attributes:
        factors: of its layer, prepared when they are first wanted.
        damping: for the record.
    """

    factors: Callable[[], Factors]
    damping: float = DAMPING

    def codes(
        self, x: F32, codes: U8, grid: CodeGrid, scale_dtype: str | None = None
    ) -> tuple[U8, F32]:
        """Other codes for whole rows x (R, C), places in the levels of ``grid``, than those that
        are nearest, and the scales of groups (R, G). Rows with weights beyond 2^96 keep theirs.

        Args:
            scale_dtype: of scales that may change; those of groups of more than 256 stay.
        """
        beyond = np.abs(x).max(axis=1, initial=0) >= LARGEST
        given = grid
        if beyond.any():
            numbers = (x, grid.scale, grid.zero, grid.offset)
            x, scale, zero, offset = (np.where(beyond[:, None], np.float32(0), a) for a in numbers)
            given = CodeGrid(grid.levels, scale, zero, offset, grid.length)
        if grid.length > LONGEST_RESCALED:
            scale_dtype = None
        found, scale = kernels.compensate(x, codes, given, self.factors(), PASSES, scale_dtype)
        found[beyond], scale[beyond] = codes[beyond], grid.scale[beyond]
        return found, scale

    def note(self) -> dict[str, Any]:
        """As reports and headers have it, in the ``decision`` of a tensor."""
        return {"rounding": COMPENSATED, "damping": self.damping}
