"""What `bench` measured, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.report.base import Report, counted


@dataclass
class Measurement:
    """One line of ``bench``.

    Attributes:
        section: what the line can be compared within.
        times: seconds of each run, in order; the runs of all lines of a section took turns.
        seconds: their median.
        rate: the line's own measure per second of the median, in ``unit``.
        gigabytes_per_second: of weights as the source or the packed codes hold them; None where
            that says nothing.
        ratios: speed in relation to other lines of the section, for the same amount of work: above
            1 is faster than the line named.
    """

    section: str
    name: str
    times: list[float]
    seconds: float
    rate: float
    unit: str
    gigabytes_per_second: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class SkippedLine:
    """A line that could not be had here, and why."""

    section: str
    name: str
    reason: str


@dataclass(repr=False)
class BenchReport(Report):
    SCHEMA: ClassVar[str] = "qconvert.bench/1"

    machine: str
    threads: int
    runs: int
    measurements: list[Measurement]
    skipped: list[SkippedLine]

    def _said(self) -> Iterator[str]:
        yield counted(len(self.measurements), "line")
        if self.skipped:
            yield f"{len(self.skipped)} skipped"
        yield self.machine
