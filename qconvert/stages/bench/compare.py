"""An earlier report of `bench` against this one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qconvert.errors import FormatError
from qconvert.files.strict_json import read_object
from qconvert.quantities import counted
from qconvert.report import BenchReport, Compared, Measurement

MAX_BYTES = 1 << 26  # of a report


def read_earlier(earlier: Path) -> dict[str, Any]:
    """A report of `bench`, as far as `compare` needs it.

    Raises:
        InputError: it cannot be read.
        FormatError: it is no report of `bench`.
    """
    document = read_object(earlier, MAX_BYTES)
    if document.get("schema") != BenchReport.SCHEMA:
        raise FormatError(
            "no report of bench",
            path=earlier,
            found=document.get("schema"),
            wanted=BenchReport.SCHEMA,
            hint="qconvert bench --report FILE writes one",
        )
    return {**document, "lines": dict(_entries(document, earlier))}


def compare(report: BenchReport, document: dict[str, Any], earlier: Path, threshold: float) -> None:
    """Hold a report's lines against those of the same names in an earlier one; the status is
    ``fail`` where one is slower by more than the threshold and by more than the noise.

    Args:
        document: of `read_earlier`.

    Raises:
        FormatError: no line of it is one of these.
    """
    then = document["lines"]
    for now in report.measurements:
        if times := then.get((now.section, now.name)):
            report.compared.append(_compared(now, times, threshold))
    if not report.compared:
        raise FormatError(
            "none of its lines is one of these",
            path=earlier,
            hint="compare runs of the same MODEL, shapes, schemes and rows",
        )
    lacking = len(report.measurements) - len(report.compared)
    if lacking:
        report.warnings.append(
            f"{lacking} of {counted(len(report.measurements), 'line')} cannot be compared: "
            f"{earlier.name} has no such line"
        )
    if document.get("machine") != report.machine or document.get("threads") != report.threads:
        report.warnings.append(
            f"{earlier.name} is of another machine or number of threads: "
            f"{document.get('machine')}, {document.get('threads')} threads"
        )
    if any(c.slower for c in report.compared):
        report.status = "fail"


def _entries(document: dict[str, Any], path: Path) -> list[tuple[tuple[str, str], Sequence[float]]]:
    """Section and name of each line, and the seconds of its runs."""
    lines = document.get("measurements")
    found: list[tuple[tuple[str, str], Sequence[float]]] = []
    for line in lines if isinstance(lines, list) else [None]:
        fields: dict[str, Any] = line if isinstance(line, dict) else {}
        times = fields.get("times")
        if not isinstance(times, list) or not times or not all(_is_time(t) for t in times):
            raise FormatError("a damaged report: a line without times", path=path)
        found.append(((str(fields.get("section")), str(fields.get("name"))), times))
    return found


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


def _compared(now: Measurement, then: Sequence[float], threshold: float) -> Compared:
    ratio = now.seconds / statistics.median(then)
    noise = _spread(now.times) + _spread(then)
    slower = ratio - 1 > max(threshold, noise)
    return Compared(now.section, now.name, ratio, noise, slower)


def _spread(times: Sequence[float]) -> float:
    """Half the range of the runs, in relation to their median."""
    return (max(times) - min(times)) / 2 / statistics.median(times)
