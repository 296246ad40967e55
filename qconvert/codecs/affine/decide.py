"""Symmetric or asymmetric, decided per tensor from measured statistics, with the losing option on
record.

An asymmetric grid pays for its zero points: 6.02 dB for each bit per weight, what a bit buys in a
finer grid. It is chosen when it gains more. The gain is first predicted from the ranges of the
groups; where the prediction is close to the cost, both options are tried on a sample and the
measurement decides. The sample is always measured and recorded, so the rule can be held against it.

Where the mean squares of the input channels are known, what counts is the error of the layer's
output, and the ranges say little about that: the sample, measured with these weights, decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.affine.weighting import weighting
from qconvert.kernels.arithmetic import to_groups
from qconvert.kernels.records import GroupStatistics, Moments
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod

F32 = NDArray[np.float32]

DB_PER_BIT = 6.02  # 20 log10(2)
# A prediction is trusted when it is this far from the cost: clipping moves the gain by up to 2 dB.
CLEAR_MARGIN_DB = 3.0
# Values of a sample, and columns taken of a row (a multiple of every block). Blocks are many in any
# part of a tensor; a channel wants whole rows, a tensor scale as much of the tensor as is cheap.
SAMPLES = {"block": (1 << 16, 1 << 10), "channel": (1 << 16, 1 << 14), "tensor": (1 << 18, 1 << 14)}
READ_WHOLE = (
    1 << 16
)  # values of a tensor that is read at once: each part would be a read of its own


@dataclass(frozen=True, slots=True)
class Measured:
    """SQNR in dB of one option on the sample; None when nothing is lost.

    Attributes:
        weighted_db: with the mean squares of the input channels; None without them too.
    """

    plain_db: float | None
    weighted_db: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """The choice for one tensor and what it rests on.

    Attributes:
        symmetric: the choice.
        rule: the rule that fired: ``requested``, ``one-sided``, ``step-ratio``, ``sample`` or
            ``weighted-sample``.
        predicted_db: gain of an asymmetric grid as predicted from group ranges.
        cost_db: what its zero points cost, at 6.02 dB per bit per weight.
        symmetric_db, asymmetric_db: SQNR of both options on the sample; None when lossless.
        weighted: whether the mean squares of the input channels were known.
        weighted_symmetric_db, weighted_asymmetric_db: SQNR with them, likewise.
        scale_dtype: dtype of the scales.
    """

    symmetric: bool
    rule: str
    predicted_db: float
    cost_db: float
    symmetric_db: float | None
    asymmetric_db: float | None
    scale_dtype: str
    weighted: bool = False
    weighted_symmetric_db: float | None = None
    weighted_asymmetric_db: float | None = None

    def settled(self, encoding: Affine) -> Affine:
        """The encoding as it was decided."""
        return replace(encoding, symmetric=self.symmetric, scale_dtype=self.scale_dtype)


class Sample:
    """Rows of a tensor on which both options are measured, once for each type of scale.

    Args:
        rows: (R, c) float32, finite.
        encoding: the tensor's, with either symmetry.
        mean_square: of the input channel of each value, (R, c), where known.
    """

    def __init__(
        self,
        rows: F32,
        encoding: Affine,
        method: RangeMethod,
        mean_square: F32 | None = None,
    ) -> None:
        self.rows = rows
        self.encoding = encoding
        self.method = method
        self.mean_square = mean_square
        self._measured: dict[str, tuple[Measured, Measured]] = {}

    def sqnr(self, scale_dtype: str) -> tuple[Measured, Measured]:
        """The symmetric and the asymmetric option."""
        if scale_dtype not in self._measured:
            symmetric, asymmetric = (
                sample_sqnr(
                    self.rows,
                    replace(self.encoding, symmetric=s, scale_dtype=scale_dtype),
                    self.method,
                    self.mean_square,
                )
                for s in (True, False)
            )
            self._measured[scale_dtype] = symmetric, asymmetric
        return self._measured[scale_dtype]

    def guess(self, requested: bool | None) -> Decision:
        """The decision for the tensor, were the rest of it like the sample."""
        groups = kernels.observe_groups(self.rows, self.encoding, self.method.name == "mse")
        moments = kernels.moments(self.rows.ravel())
        return decide(moments, groups, requested, self)


def decide(
    moments: Moments, groups: GroupStatistics, requested: bool | None, sample: Sample
) -> Decision:
    """Choose for one tensor.

    Args:
        moments, groups: of the whole tensor.
        requested: symmetric (True) or asymmetric (False) when the scheme says so.
    """
    encoding = sample.encoding
    scale_dtype = choose_scale_dtype(groups, encoding)
    cost = DB_PER_BIT * zero_point_cost(encoding)
    predicted = groups.step_ratio_db
    sym, asym = sample.sqnr(scale_dtype)
    weighted = sample.mean_square is not None
    if requested is not None:
        symmetric, rule = requested, "requested"
    elif abs(moments.asymmetry) == 1.0:
        symmetric, rule = False, "one-sided"
    elif weighted:
        symmetric = _gain(sym.weighted_db, asym.weighted_db) <= cost
        rule = "weighted-sample"
    elif abs(predicted - cost) > CLEAR_MARGIN_DB:
        symmetric, rule = predicted < cost, "step-ratio"
    else:
        symmetric, rule = _gain(sym.plain_db, asym.plain_db) <= cost, "sample"
    return Decision(
        symmetric=symmetric,
        rule=rule,
        predicted_db=predicted,
        cost_db=cost,
        symmetric_db=sym.plain_db,
        asymmetric_db=asym.plain_db,
        scale_dtype=scale_dtype,
        weighted=weighted,
        weighted_symmetric_db=sym.weighted_db,
        weighted_asymmetric_db=asym.weighted_db,
    )


def _gain(symmetric_db: float | None, asymmetric_db: float | None) -> float:
    """Difference in dB where None means that nothing was lost."""
    if asymmetric_db is None:
        return 0.0 if symmetric_db is None else float("inf")
    return float("-inf") if symmetric_db is None else asymmetric_db - symmetric_db


def zero_point_cost(encoding: Affine) -> float:
    """Bits per weight that zero points add: for a channel by its row, nothing for a tensor."""
    if encoding.granularity == "tensor":
        return 0.0
    return encoding.zero_point_bits / (encoding.block or encoding.row_length)


def choose_scale_dtype(groups: GroupStatistics, encoding: Affine) -> str:
    """Dtype of the scales: formats/schemes/SPEC.md section 5, last paragraph."""
    if not encoding.block or groups.largest == 0:
        return encoding.scale_dtype
    least = groups.smallest / encoding.levels
    if least >= 2.0 ** (encoding.bits - 22) and groups.largest <= 32768:
        return "F16"
    return "BF16" if encoding.bits <= 6 and least >= 2.0**-100 else "F32"


def sample_sqnr(
    rows: F32, encoding: Affine, method: RangeMethod, mean_square: F32 | None
) -> Measured:
    """What sample rows, with ``mean_square`` of the same shape, keep under an encoding."""
    shape = (1, -1) if encoding.granularity == "tensor" else rows.shape
    rows = rows.reshape(shape)
    weights = None
    if mean_square is not None:
        mean_square = mean_square.reshape(shape)
        weights = weighting(mean_square, encoding)
    groups, counts = to_groups(rows, encoding.block)
    parameters = kernels.fit(groups, encoding, method, counts, weights)
    error = kernels.encode_rows(rows, encoding, parameters, mean_square).error
    return Measured(error.sqnr_db, error.weighted_sqnr_db)


def sample_places(tensor: TensorInfo, encoding: Affine) -> tuple[list[int], int]:
    """Where the parts of a sample begin in the flattened tensor, and their width: `SAMPLES`."""
    values, strip = SAMPLES[encoding.granularity]
    columns = encoding.row_length
    rows = tensor.size // columns
    width = min(columns, strip)
    count = min(rows, max(1, values // width))
    strips = columns // width
    starts = [(i * rows // count) * columns + (i % strips) * width for i in range(count)]
    return starts, width


def sample_rows(model: Model, tensor: TensorInfo, encoding: Affine) -> F32:
    """Parts of evenly spaced rows, (R, c) float32."""
    starts, width = sample_places(tensor, encoding)
    with np.errstate(over="ignore"):  # float64 beyond float32: refused when all of it is read
        if tensor.size <= READ_WHOLE:
            whole = model.values(tensor, 0, tensor.size).astype(np.float32, copy=False)
            return whole[np.array(starts)[:, None] + np.arange(width)]
        parts = [model.values(tensor, s, s + width).astype(np.float32) for s in starts]
    return np.stack(parts)


def sample_weights(mean_square: F32 | None, tensor: TensorInfo, encoding: Affine) -> F32 | None:
    """Mean squares of the input channels of `sample_rows`, (R, c), from those of all (columns,)."""
    if mean_square is None:
        return None
    starts, width = sample_places(tensor, encoding)
    columns = np.array(starts)[:, None] % encoding.row_length + np.arange(width)
    return mean_square[columns]


def decision_notes(
    decision: Decision, moments: Moments, outlier_share: float, method: RangeMethod
) -> dict[str, Any]:
    """The decision as it goes into reports and the container.

    Args:
        outlier_share: share of the weights outside `outlier_bounds` of the sample.
    """
    sample = {
        "symmetric_db": decision.symmetric_db,
        "asymmetric_db": decision.asymmetric_db,
        "weighted_symmetric_db": decision.weighted_symmetric_db,
        "weighted_asymmetric_db": decision.weighted_asymmetric_db,
    }
    figures = {
        "asymmetry": moments.asymmetry,
        "skewness": moments.skewness,
        "kurtosis": moments.kurtosis,
        "outlier_share": outlier_share,
    }
    return {
        "rule": decision.rule,
        "symmetric": decision.symmetric,
        "range": method.describe(),
        "cost_db": decision.cost_db,
        "predicted_db": decision.predicted_db,
        "sample": {k: v for k, v in sample.items() if v is not None and math.isfinite(v)},
        "statistics": {k: v for k, v in figures.items() if v is not None},
    }
