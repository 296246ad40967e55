"""Rounding that makes up for its own errors, by what they cost the output of a layer.

A family takes part by saying where its codes stand (`CodeGrid`) and by taking other codes than the
nearest; scales change with them where a family stores each by itself, zero points never do. Where
it is known what outputs have to do with each other, rows make up for each other's errors too: then
a tensor is a single tile, all of its rows. formats/schemes/SPEC.md section 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.kernels.arithmetic import weighted_error_sums
from qconvert.kernels.records import F32, F64, U8, CodeGrid, Factors
from qconvert.mapper import Mapper
from qconvert.model import TensorInfo

COMPENSATED = "compensated"
DAMPING = 0.01  # of the mean diagonal, added to every element of it
PASSES = 4  # over all columns at most, in which single codes are changed; two to four do
# Columns whose factors may be prepared: 36 bytes of memory for each of their pairs, 39 GB.
MOST_COLUMNS = 1 << 15
LONGEST_RESCALED = 256  # columns of a group whose scale is chosen anew
LARGEST = np.float32(2.0**96)  # weights beyond: products with their errors could overflow
ROW_DAMPING = 0.1  # of the mean diagonal of what rows have to do with each other
ROW_PASSES = 2  # over all columns at most, for each run of rows; more gain a hundredth
LARGEST_SWEPT = np.float32(2.0**64)  # products with both factors
_FOUND = ("scale", "offset")  # of a grid, by group
AT_ONCE = 1 << 20  # weights of a whole matrix whose rows are rounded by one thread at a time


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


def shares_of(
    output: F64, damping: float = ROW_DAMPING, dtype: type[np.floating[Any]] = np.float32
) -> NDArray[Any]:
    """What the error of a row is to the target of another: O_ik / O_ii of a damped O, (R, R).

    Takes 12 bytes of memory for each element, those of ``output`` included, and leaves 4.

    Raises:
        ValueError: NaN or Inf, or a diagonal below 0.
    """
    diagonal = output.diagonal()
    if not np.isfinite(output).all() or (diagonal < 0).any():
        raise ValueError("NaN or Inf, or a square below 0")
    mean = float(diagonal.mean())
    if mean == 0:  # and so is all of it: errors of rows have nothing to do with each other
        return np.eye(len(output), dtype=dtype)
    found = np.empty(output.shape, dtype)
    np.divide(output, (diagonal + damping * mean)[:, None], out=found, casting="same_kind")
    found[np.diag_indices_from(found)] = 1
    return found


@dataclass(frozen=True, slots=True)
class Rounder:
    """Chooses the codes of one tensor.

    Attributes:
        factors: of its layer, prepared when they are first wanted.
        damping: for the record.
        shares: of rows in each other's errors, see `shares_of`; None where each row is rounded by
            itself.
        mapper: runs work on parts of a whole matrix.
    """

    factors: Callable[[], Factors]
    damping: float = DAMPING
    shares: Callable[[], F32] | None = None
    mapper: Mapper = map

    def codes(
        self, x: F32, codes: U8, grid: CodeGrid, scale_dtype: str | None = None
    ) -> tuple[U8, CodeGrid]:
        """Other codes for whole rows x (R, C), places in the levels of ``grid``, than those that
        are nearest, and the grid with other scales and offsets. Rows with weights beyond 2^96 keep
        theirs.

        Args:
            x: all rows of the tensor where they make up for each other's errors.
            scale_dtype: of scales that may change; those of groups of more than 256 stay.
        """
        factors = self.factors()
        if self.shares is None:
            return _by_rows(x, codes, grid, factors, scale_dtype)
        step = max(AT_ONCE // max(x.shape[1], 1), 1)
        runs = [slice(first, first + step) for first in range(0, len(x), step)]

        def part(run: slice) -> tuple[U8, CodeGrid]:
            return _by_rows(x[run], codes[run], _rows_of(grid, run), factors, scale_dtype)

        done = list(self.mapper(part, runs))
        found = np.concatenate([c for c, _ in done])
        scale, offset = (np.concatenate([getattr(g, k) for _, g in done]) for k in _FOUND)
        grid = replace(grid, scale=scale, offset=offset)
        return _swept(x, found, grid, factors, self.shares(), self.mapper), grid

    def note(self) -> dict[str, Any]:
        """As reports and headers have it, in the ``decision`` of a tensor."""
        rows = {} if self.shares is None else {"row_damping": ROW_DAMPING}
        return {"rounding": COMPENSATED, "damping": self.damping, **rows}


def _by_rows(
    x: F32, codes: U8, grid: CodeGrid, factors: Factors, scale_dtype: str | None
) -> tuple[U8, CodeGrid]:
    """See `Rounder.codes`, each row by itself."""
    beyond, x, given = _without(x, grid, LARGEST)
    if grid.length > LONGEST_RESCALED:
        scale_dtype = None
    found, scale, offset = kernels.compensate(x, codes, given, factors, PASSES, scale_dtype)
    found[beyond], scale[beyond] = codes[beyond], grid.scale[beyond]
    offset[beyond] = grid.offset[beyond]
    return found, replace(grid, scale=scale, offset=offset)


def _swept(x: F32, codes: U8, grid: CodeGrid, factors: Factors, shares: F32, mapper: Mapper) -> U8:
    """Codes of all rows that make up for each other's errors; rows with weights beyond 2^64 keep
    theirs, and nothing makes up for them.
    """
    beyond, x, given = _without(x, grid, LARGEST_SWEPT)
    found: U8 = kernels.sweep_rows(x, codes, given, factors.gram, shares, ROW_PASSES, mapper)
    found[beyond] = codes[beyond]
    return found


def weighted_noise(x: F32, decoded: F32, mean_square: F32) -> float:
    """Σ w (x - x')² of rows (R, C), with the same weights (1, C) for all; some rows at a time."""
    step = max(AT_ONCE // max(x.shape[1], 1), 1)
    runs = [slice(first, first + step) for first in range(0, len(x), step)]
    return sum(weighted_error_sums(x[r], decoded[r], mean_square)[1] for r in runs)


def values_at_once(rounder: Rounder | None, tensor: TensorInfo, most: int) -> int:
    """Values of a tile, which are ``most`` unless rows make up for each other's errors."""
    return max(most, tensor.size) if rounder and rounder.shares else most


def _rows_of(grid: CodeGrid, rows: slice) -> CodeGrid:
    """The grid of some rows."""
    scales, offsets = (m and replace(m, unit=m.unit[rows]) for m in (grid.scales, grid.offsets))
    numbers = grid.scale[rows], grid.zero[rows], grid.offset[rows]
    return CodeGrid(grid.levels, *numbers, grid.length, scales, offsets)


def _without(
    x: F32, grid: CodeGrid, largest: np.float32
) -> tuple[NDArray[np.bool_], F32, CodeGrid]:
    """Which rows have weights that large, and weights and a grid with zeros instead: codes stay."""
    beyond = np.abs(x).max(axis=1, initial=0) >= largest
    if not beyond.any():
        return beyond, x, grid
    numbers = (x, grid.scale, grid.zero, grid.offset)
    x, scale, zero, offset = (np.where(beyond[:, None], np.float32(0), a) for a in numbers)
    return beyond, x, replace(grid, scale=scale, zero=zero, offset=offset)
