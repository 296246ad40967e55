"""What `inspect` found, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report

PERCENTILES = ("0.1", "1", "5", "25", "50", "75", "95", "99", "99.9")


@dataclass(slots=True)
class ChannelSummary:
    """Rows (outputs) or columns (inputs) of a matrix, held against their median.

    Attributes:
        count: how many there are.
        dead: how many have hardly anything left.
        widest: index of the one with the largest magnitude.
        absmax_ratio: that magnitude by the median channel's; None where that is 0.
        loudest: index of the one with the largest root mean square, its largest value left out, so
            that one outlier does not make a channel of outliers.
        rms_ratio: that root mean square by the median channel's; None where that is 0.
    """

    count: int
    dead: int
    widest: int
    absmax_ratio: float | None
    loudest: int
    rms_ratio: float | None


@dataclass(slots=True)
class TensorSummary:
    """A row of ``inspect``; numbers are None where they make no sense.

    Attributes:
        crest: largest magnitude by the root mean square.
        near_zero_share: values that are 0 with 8 bits and one scale for the tensor.
        percentiles: by the names in `PERCENTILES`; exact for BF16 and 8-bit floats, else
            within 0.4 % of themselves.
        rows, columns: outputs and inputs, of matrices.
        blocks, constant_blocks: runs of 32 values of a row, and those of them that are all alike.
        rule: by which symmetric or asymmetric was decided.
        sqnr_db: what a sample keeps under the scheme that was asked for; None for all of it.
        gain_db, cost_db: what zero points gain on the sample, and what they cost.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    std: float | None = None
    absmax: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    outlier_share: float | None = None
    zeros: int | None = None
    nonfinite: int | None = None
    suggestion: str | None = None
    suggestion_reason: str | None = None
    histogram: Histogram | None = None
    crest: float | None = None
    near_zero_share: float | None = None
    percentiles: dict[str, float] | None = None
    rows: ChannelSummary | None = None
    columns: ChannelSummary | None = None
    blocks: int | None = None
    constant_blocks: int | None = None
    rule: str | None = None
    sqnr_db: float | None = None
    gain_db: float | None = None
    cost_db: float | None = None

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def widest_ratio(self) -> float | None:
        """Largest magnitude of a row or column by that of the median one."""
        found = [c.absmax_ratio for c in (self.rows, self.columns) if c and c.absmax_ratio]
        return max(found, default=None)


@dataclass(slots=True)
class TypeTally:
    """Tensors of a type, and their bytes."""

    tensors: int
    nbytes: int


@dataclass
class InputLayer:
    """What is known of the inputs of a layer.

    Attributes:
        features: input channels.
        spread: the largest channel's magnitude by the median one's; of an importance matrix by
            root mean squares, for it has no magnitudes.
        hottest: indices of the largest channels, the largest first; those of experts that share an
            entry are numbered through.
        mean_square: of all inputs: how much an error of the layer's weights matters on average.
        rank: of the layer by that, from 1.
        samples, low, high, scale, zero_point: of a calibration.
    """

    name: str
    features: int
    spread: float | None
    hottest: list[int]
    mean_square: float
    rank: int = 0
    samples: int | None = None
    low: float | None = None
    high: float | None = None
    scale: float | None = None
    zero_point: int | None = None


@dataclass
class InputsView:
    """A calibration, or an importance matrix of llama.cpp.

    Attributes:
        kind: ``calibration`` or ``imatrix``.
        facts: what the file says of itself.
        layers: those that were asked for.
        total_layers: in the file.
    """

    kind: str
    facts: dict[str, str]
    layers: list[InputLayer]
    total_layers: int


@dataclass(slots=True)
class ComparedTensor:
    """A tensor of both files.

    Attributes:
        comparable: whether its values were compared: they are numbers, and shapes are alike.
        equal: whether all values are the same.
        differing: how many are not.
        sqnr_db: of what the other file has, against the first; None where nothing was lost.
        max_error: the largest difference.
    """

    name: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    a_dtype: str
    b_dtype: str
    a_bytes: int
    b_bytes: int
    comparable: bool
    equal: bool
    differing: int | None
    sqnr_db: float | None
    max_error: float | None


@dataclass
class ComparedGroup:
    """Tensors of a layer or a role in both files.

    Attributes:
        equal: how many have the same values.
        types: changes, as ``BF16 -> q4_block64_sym``.
        sqnr_db: over all of them; None where nothing was lost.
        worst_sqnr_db: of one of them.
    """

    name: str
    tensors: int
    equal: int
    a_bytes: int
    b_bytes: int
    types: list[str]
    sqnr_db: float | None
    worst_sqnr_db: float | None


@dataclass
class Comparison:
    """Another file, held against the one that was inspected.

    Attributes:
        only_a, only_b: names of tensors that the other has not, and that only it has.
        sqnr_db: over all tensors of both; None where nothing was lost.
        facts, metadata: what differs, as both have it; None where one has it not.
        notes: how both were brought to the same names, and what could not be compared.
    """

    path: str
    kind: str
    only_a: list[str]
    only_b: list[str]
    tensors: list[ComparedTensor]
    roles: list[ComparedGroup]
    layers: list[ComparedGroup]
    a_bytes: int
    b_bytes: int
    sqnr_db: float | None
    facts: dict[str, list[str | None]]
    metadata: dict[str, list[str | None]]
    notes: list[str]


@dataclass
class TensorGroup:
    """Tensors of a layer or a role; figures in the order of their layers, as of `TensorSummary`."""

    name: str
    tensors: list[str]
    values: int
    nbytes: int
    std: list[float | None]
    kurtosis: list[float | None]
    sqnr_db: list[float | None]


@dataclass
class Finding:
    """What stands out in some tensors.

    Attributes:
        kind: a stable name.
        tensors: their names, the worst first.
        figures: what was measured of each, in the same order.
        message: a sentence for people.
        advice: what to do about it.
    """

    kind: str
    tensors: list[str]
    figures: list[float]
    message: str
    advice: str


@dataclass
class GridEnds:
    """Where the grids of a scheme end, on a sample: weights beyond are clipped.

    Attributes:
        low, high: of half of the groups, at least so far.
        widest_low, widest_high: of the widest grids.
    """

    scheme: str
    low: float
    high: float
    widest_low: float
    widest_high: float


@dataclass
class Histogram:
    """Counts of values in bins of equal width between ``low`` and ``high``.

    Attributes:
        grid: of the scheme that is suggested, where it is one with scales.
    """

    low: float
    high: float
    counts: list[int]
    grid: GridEnds | None = None


@dataclass
class CurvePoint:
    """The best mix of schemes of at most so many bits.

    Attributes:
        bits: per weight, over the whole file.
        nbytes: of the file, at most.
        kl: predicted divergence of next tokens, in nats; None without a calibration.
        sqnr_db: of the weights that have a choice; None where nothing is lost.
        schemes: how many tensors take each.
    """

    bits: float
    nbytes: int
    kl: float | None
    sqnr_db: float | None
    schemes: dict[str, int]


@dataclass
class SchemePoint:
    """One scheme for all tensors that have a choice.

    Attributes:
        nbytes, kl, sqnr_db: as of `CurvePoint`.
        others: tensors that cannot take it, and have the next larger one.
    """

    scheme: str
    nbytes: int
    kl: float | None
    sqnr_db: float | None
    others: int


@dataclass
class SizeCurve:
    """What files of all sizes are predicted to lose.

    Attributes:
        uniform: one scheme for all tensors, the smallest file first.
        presets: of each what it comes to in this container.
        smallest: the bits of the first point that loses at most so many nats; None where none does.
        without: tensors whose sensitivity the calibration has not got.
    """

    container: str
    points: list[CurvePoint]
    uniform: list[SchemePoint]
    presets: dict[str, CurvePoint]
    smallest: dict[str, float | None]
    without: list[str]


@dataclass(repr=False)
class InspectReport(Report):
    """Result of ``inspect``; ``curve`` where it was asked for.

    Attributes:
        scheme: that was asked for, of which ``sqnr_db`` and suggestions speak.
        findings: what stands out, where statistics were taken; None where nobody looked, since
            there are codes among the tensors, of which `verify` is the judge.
        facts: what the file says of itself, by what people call it.
        types: how many tensors there are of each, the most bytes first.
        inputs: of a calibration or an importance matrix, which are shown in place of tensors.
        comparison: with another file, where one was given.
        by, groups: tensors of a ``layer`` or ``role`` together, where that was asked for.
    """

    SCHEMA: ClassVar[str] = "qconvert.inspect/1"

    path: str
    kind: str
    metadata: dict[str, str]
    tensors: list[TensorSummary]
    total_tensors: int
    total_values: int
    total_bytes: int
    statistics: bool
    notes: list[str] = field(default_factory=list)
    curve: SizeCurve | None = None
    scheme: str | None = None
    findings: list[Finding] | None = field(default_factory=list)
    by: str | None = None
    groups: list[TensorGroup] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    types: dict[str, TypeTally] = field(default_factory=dict)
    inputs: InputsView | None = None
    comparison: Comparison | None = None

    def _said(self) -> Iterator[str]:
        shown, total = len(self.tensors), counted(self.total_tensors, "tensor")
        yield f"{self.path!r} ({self.kind})"
        yield total if shown == self.total_tensors else f"{shown:,} of {total}"
