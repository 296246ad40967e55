"""What `inspect` found, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report


@dataclass(slots=True)
class TensorSummary:
    """A row of ``inspect``; numbers are None where they make no sense."""

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


@dataclass
class Histogram:
    """Counts of values in bins of equal width between ``low`` and ``high``."""

    low: float
    high: float
    counts: list[int]


@dataclass
class CurvePoint:
    """The best mix of schemes of at most so many bits.

    Attributes:
        bits: per weight, over the whole file.
        nbytes: of the file, at most.
        kl: predicted divergence of next tokens, in nats.
        schemes: how many tensors take each.
    """

    bits: float
    nbytes: int
    kl: float
    schemes: dict[str, int]


@dataclass
class SizeCurve:
    """What files of all sizes are predicted to lose.

    Attributes:
        presets: bits per weight of each in this container.
        smallest: the bits of the first point that loses at most so many nats; None where none does.
        without: tensors whose sensitivity the calibration has not got.
    """

    container: str
    points: list[CurvePoint]
    presets: dict[str, float]
    smallest: dict[str, float | None]
    without: list[str]


@dataclass(repr=False)
class InspectReport(Report):
    """Result of ``inspect``; ``curve`` where it was asked for."""

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

    def _said(self) -> Iterator[str]:
        shown, total = len(self.tensors), counted(self.total_tensors, "tensor")
        yield f"{self.path!r} ({self.kind})"
        yield total if shown == self.total_tensors else f"{shown:,} of {total}"
