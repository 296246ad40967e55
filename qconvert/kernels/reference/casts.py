"""Casting to another floating dtype: round to nearest, ties to even."""

from __future__ import annotations

from functools import partial

from qconvert.kernels import composed
from qconvert.kernels.arithmetic import cast_values
from qconvert.kernels.records import Encoded, ErrorSums, SourceRows
from qconvert.kernels.reference.statistics import all_finite, error_sums
from qconvert.kernels.reference.widening import widen

values = partial(composed.values, widen, all_finite)


def cast(rows: SourceRows, dtype: str) -> Encoded:
    """Rows as bytes of another dtype, a segment ``data``, and the error of that, infinite where a
    value became Inf.

    Raises:
        FloatingPointError: NaN or Inf among the values, or a float64 beyond float32.
    """
    x = values(rows).ravel()
    stored, back = cast_values(x, dtype)
    return Encoded({"data": stored}, ErrorSums(x.size, *error_sums(x, back)))
