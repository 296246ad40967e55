"""Lines that are timed in turn, and what becomes of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from qconvert import kernels
from qconvert.progress import Progress
from qconvert.report import BenchReport, Measurement, SkippedLine


@dataclass(frozen=True, slots=True)
class Line:
    """One thing to time.

    Attributes:
        amount: of ``unit`` in a run.
        nbytes: bytes of weights, as the source or the packed codes hold them, that a run goes
            through; 0 where that says nothing.
        share: of what the section is about that a run does; slow lines do less.
        against: lines of the section to give the speed in relation to; absent ones are left out.
        kernels: those to run, as `kernels.running` names them; None for the chosen ones.
        after: what to do after each run, untimed.
    """

    name: str
    work: Callable[[], object]
    amount: float
    unit: str
    nbytes: float = 0
    share: float = 1
    against: tuple[str, ...] = ()
    kernels: str | None = None
    after: Callable[[], object] | None = None

    def run(self, clock: Callable[[], float]) -> float:
        """Seconds of one run."""
        with kernels.running(self.kernels) if self.kernels else nullcontext():
            begin = clock()
            self.work()
            seconds = clock() - begin
        if self.after:
            self.after()
        return seconds


@dataclass(slots=True)
class Section:
    """Lines that can be compared with each other, and those that cannot be had.

    Attributes:
        conclude: what is done with their measurements, for the report; None: nothing more.
        rest: seconds to wait before each run, for libraries whose threads spin after their work.
    """

    name: str
    lines: list[Line] = field(default_factory=list)
    skipped: list[SkippedLine] = field(default_factory=list)
    rest: float = 0
    conclude: Callable[[list[Measurement], BenchReport], None] | None = None

    def skip(self, name: str, reason: str) -> None:
        """Name a line that cannot be had; once, however often it would be there."""
        line = SkippedLine(self.name, name, reason)
        if line not in self.skipped:
            self.skipped.append(line)


def measure(
    section: Section,
    runs: int,
    progress: Progress,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Measurement]:
    """Time the lines in rounds, so that all meet the machine in the same moods.

    A ratio is the median of those within each round: what slows the machine for longer than a round
    slows both lines of it.
    """
    times: dict[str, list[float]] = {line.name: [] for line in section.lines}
    for line in section.lines:
        line.run(clock)  # first touch
    for _ in range(runs):
        for line in section.lines:
            time.sleep(section.rest)
            times[line.name].append(line.run(clock))
            progress.advance(1, line.name)
    whole = {line.name: [t / line.share for t in times[line.name]] for line in section.lines}
    return [_measurement(section.name, line, times[line.name], whole) for line in section.lines]


def _measurement(
    section: str, line: Line, times: list[float], whole: dict[str, list[float]]
) -> Measurement:
    seconds = statistics.median(times)
    own = whole[line.name]
    return Measurement(
        section=section,
        name=line.name,
        times=times,
        seconds=seconds,
        rate=line.amount / seconds,
        unit=line.unit,
        gigabytes_per_second=line.nbytes / seconds / 1e9 if line.nbytes else None,
        ratios={
            name: statistics.median(r / t for r, t in zip(whole[name], own, strict=True))
            for name in line.against
            if name in whole
        },
    )
