"""The Fisher information of a matrix, as sums over tokens without rounding.

With labels sampled from the model itself, the mean divergence of its next tokens from those of the
same model with other weights w' is, to second order, 1/2 Σ D_ij (w_ij - w'_ij)². For a matrix that
multiplies, D_ij = E[g_i² x_j²], x a row of its input and g the gradient of the summed NLL of the
labels by its output; for one whose rows are looked up, x is 1 at the token's row. Only the sums of
D over rows and over columns are kept, and D is taken for their product: x hardly changes in length
from token to token, for it comes out of a norm. For error-compensated rounding there are
E[|g|² x x'] and E[g g'].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.exact import LIMBS, ExactSum
from qconvert.calibration.gram import GramMatrix

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]

PREFIX = "fisher."
PRODUCT, LOOKUP = USES = ("product", "lookup")
CHANNEL_BYTES = 8 * LIMBS
MOST_OUTPUTS = 1 << 14  # of a matrix of gradients, which then takes 2 GiB; heads may have more


class UseStatistics:
    """What is summed of one use of a matrix: within a window in float64, over windows exactly.

    Args:
        rows, columns: of the matrix: outputs and inputs, or tokens and width.
        grams: whether to keep the matrices of second moments too.

    Attributes:
        rows, columns: sums of D over the columns, and over the rows, of all tokens.
        input: of |g|² x x'; for a table that is looked up, of g g'.
        output: of g g', of no table, and of no matrix with more than `MOST_OUTPUTS` rows.
    """

    def __init__(self, use: str, rows: int, columns: int, *, grams: bool) -> None:
        self.use = use
        self.shape = rows, columns
        self.rows, self.columns = ExactSum(rows), ExactSum(columns)
        self.input = GramMatrix(columns) if grams else None
        wanted = grams and use == PRODUCT and rows <= MOST_OUTPUTS
        self.output = GramMatrix(rows) if wanted else None

    @staticmethod
    def size(rows: int, columns: int, *, grams: bool) -> int:
        """Bytes that it takes at most."""
        size = CHANNEL_BYTES * (rows + columns)
        if grams:
            size += GramMatrix.size(columns)
            size += GramMatrix.size(rows) if rows <= MOST_OUTPUTS else 0
        return size

    def update(self, x: F32, g: F32) -> None:
        """Add the tokens of a window.

        Args:
            x: input rows, (T, columns), finite.
            g: gradients by the output, (T, rows), finite.

        Raises:
            OverflowError: beyond what a Gram matrix holds.
        """
        wide, gradients = x.astype(np.float64), g.astype(np.float64)
        length, slope = np.sum(wide**2, axis=1), np.sum(gradients**2, axis=1)
        self.rows.add(length @ gradients**2)
        self.columns.add(slope @ wide**2)
        if self.input is not None:
            self.input.update((wide * np.sqrt(slope)[:, None]).astype(np.float32))
        if self.output is not None:
            self.output.update(g)

    def update_lookup(self, ids: I64, g: F32) -> None:
        """Add the tokens of a window.

        Args:
            ids: rows that were looked up, (T,).
            g: gradients by what was found there, (T, columns), finite.

        Raises:
            OverflowError: beyond what a Gram matrix holds.
        """
        squares = g.astype(np.float64) ** 2
        found = np.bincount(ids, squares.sum(axis=1), minlength=self.shape[0])
        self.rows.add(found.astype(np.float64, copy=False))
        self.columns.add(squares.sum(axis=0))
        if self.input is not None:
            self.input.update(g)

    def merge(self, other: UseStatistics) -> None:
        """Add what another one has seen.

        Raises:
            ValueError: of another shape, or with other matrices of second moments.
        """
        if self.shape != other.shape or (self.input is None) != (other.input is None):
            raise ValueError("Fisher information of different matrices")
        self.rows.merge(other.rows)
        self.columns.merge(other.columns)
        for mine, theirs in ((self.input, other.input), (self.output, other.output)):
            if mine is not None and theirs is not None:
                mine.merge(theirs)

    def arrays(self) -> Arrays:
        """Its state, under the names of the file."""
        at = f"{PREFIX}{self.use}."
        (rows, first), (columns, begin) = self.rows.packed(), self.columns.packed()
        found: Arrays = {
            f"{at}rows": rows,
            f"{at}columns": columns,
            f"{at}first": np.array([first, begin], np.int64),
        }
        for kind, gram in (("input", self.input), ("output", self.output)):
            if gram is not None:
                found[f"{at}{kind}.gram.high"], found[f"{at}{kind}.gram.low"] = gram.packed()
        return found

    @classmethod
    def restored(
        cls, use: str, arrays: Mapping[str, NDArray[Any]], rows: int, columns: int
    ) -> UseStatistics:
        """The inverse of `arrays`.

        Raises:
            KeyError, ValueError, TypeError: arrays that nothing here has made.
        """
        at = f"{PREFIX}{use}."
        found = cls(use, rows, columns, grams=False)
        first, begin = arrays[f"{at}first"].tolist()
        found.rows = ExactSum.unpacked(arrays[f"{at}rows"], first)
        found.columns = ExactSum.unpacked(arrays[f"{at}columns"], begin)
        if (found.rows.limbs.shape[1], found.columns.limbs.shape[1]) != (rows, columns):
            raise ValueError("sums of a Fisher information")
        for kind, features in (("input", columns), ("output", rows)):
            high = arrays.get(f"{at}{kind}.gram.high")
            if high is not None:
                gram = GramMatrix.unpacked(high, arrays[f"{at}{kind}.gram.low"], features)
                setattr(found, kind, gram)
        return found


class FisherStatistics:
    """Of one matrix in each of its uses: a tied one both multiplies and is looked up.

    Args:
        rows, columns: of the matrix.
        grams: see `UseStatistics`.
    """

    def __init__(self, rows: int, columns: int, *, grams: bool) -> None:
        self.shape = rows, columns
        self.grams = grams
        self.uses: dict[str, UseStatistics] = {}

    def of(self, use: str) -> UseStatistics:
        """The statistics of a use, begun if need be."""
        if use not in self.uses:
            self.uses[use] = UseStatistics(use, *self.shape, grams=self.grams)
        return self.uses[use]

    def merge(self, other: FisherStatistics) -> None:
        """Add what another one has seen; see `UseStatistics.merge`."""
        if self.shape != other.shape:
            raise ValueError("Fisher information of different matrices")
        for use, theirs in other.uses.items():
            if use in self.uses:
                self.uses[use].merge(theirs)
            else:
                self.uses[use] = theirs

    def finished(self) -> FinishedFisher:
        """In the form of the file."""
        arrays: Arrays = {}
        for use in sorted(self.uses):
            arrays |= self.uses[use].arrays()
        return FinishedFisher(self.shape, arrays)


@dataclass(frozen=True, slots=True)
class FinishedFisher:
    """The Fisher information of a matrix in the form of the file.

    Attributes:
        shape: (rows, columns).
    """

    shape: tuple[int, int]
    arrays: Arrays

    @property
    def has_grams(self) -> bool:
        return any(is_gram(kind) for kind in self.arrays)

    def restored(self) -> FisherStatistics:
        """The inverse of `FisherStatistics.finished`; see `UseStatistics.restored`."""
        found = FisherStatistics(*self.shape, grams=self.has_grams)
        for use in USES:
            if f"{PREFIX}{use}.first" in self.arrays:
                found.uses[use] = UseStatistics.restored(use, self.arrays, *self.shape)
        if not found.uses:
            raise ValueError("no use of a matrix")
        return found


def is_gram(kind: str) -> bool:
    """Whether an array of this name, that of its layer left out, is a part of a Gram matrix."""
    return kind.endswith(("gram.high", "gram.low"))


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """D of a tensor, the mean over tokens in nats, as a sum over its uses of products.

    D_ij = Σ_u rows[u, i] · columns[u, matrix[i], j].

    Attributes:
        rows: (uses, R), R all rows of the tensor, those of stacked matrices one after the other.
        matrix: (R,): which of the stacked matrices a row is of; 0 where there is one.
        columns: (uses, matrices, C).
    """

    rows: F64
    matrix: I64
    columns: F64

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.shape[1], self.columns.shape[2]

    def array(self, first: int = 0, last: int | None = None) -> F64:
        """Rows ``first..last`` of D, (rows, C)."""
        part = slice(first, last)
        found: F64 = np.einsum("ui,uij->ij", self.rows[:, part], self.columns[:, self.matrix[part]])
        return found

    def divergence(self, first: int, column: int, squares: F64) -> float:
        """1/2 Σ D d², in nats, of a tile that begins at a row and a column.

        Args:
            squares: d², (rows, columns).
        """
        rows, width = squares.shape
        of = self.matrix[first : first + rows]
        total = 0.0
        for matrix in np.unique(of):
            chosen = of == matrix
            columns = self.columns[:, matrix, column : column + width]
            within = squares[chosen] @ columns.T
            total += float(np.sum(self.rows[:, first : first + rows][:, chosen].T * within))
        return total / 2

    def transposed(self) -> Sensitivity:
        """Of the transposed tensor, of a single matrix."""
        return Sensitivity(
            self.columns[:, 0],
            np.zeros(self.columns.shape[2], np.int64),
            self.rows[:, None],
        )

    def taken(self, rows: I64) -> Sensitivity:
        """Of these rows, in this order."""
        return Sensitivity(self.rows[:, rows], self.matrix[rows], self.columns)


def stacked(parts: list[Sensitivity]) -> Sensitivity:
    """Of tensors that lie below each other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(p.columns.shape[1] for p in parts)])
    return Sensitivity(
        np.concatenate([p.rows for p in parts], axis=1),
        np.concatenate([p.matrix + at for p, at in zip(parts, starts, strict=False)]),
        np.concatenate([p.columns for p in parts], axis=1),
    )


def sensitivity_of(statistics: list[FisherStatistics], tokens: int) -> Sensitivity:
    """The mean of D over some matrices, and over tokens; of one matrix, its D."""
    shape = statistics[0].shape
    rows, columns = np.zeros((2, shape[0])), np.zeros((2, shape[1]))
    for u, use in enumerate(USES):
        found = [s.uses[use] for s in statistics if use in s.uses]
        for one in found:
            rows[u] += one.rows.values() / (tokens * len(statistics))
            columns[u] += one.columns.values()
        total = columns[u].sum()
        columns[u] /= total if total > 0 else 1.0
    return Sensitivity(rows, np.zeros(shape[0], np.int64), columns[:, None])
