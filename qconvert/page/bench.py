"""The page of `bench`."""

from __future__ import annotations

from qconvert.page.parts import Cell, Chart, Column, Fact, Finding, Page, Table, number, warned
from qconvert.page.svg import bars
from qconvert.report import BenchReport, Measurement

COLUMNS = [
    Column("line"),
    Column("median ms", "number", "of all runs"),
    Column("least ms", "number"),
    Column("rate", "number", "work a second, in the unit beside it"),
    Column("unit"),
    Column("GB/s", "number", "of weights, as the source or the codes hold them"),
    Column("speed", "long", "against other lines of the section, for the same work"),
]


def bench_page(r: BenchReport) -> Page:
    """How fast what is here."""
    sections = list(dict.fromkeys(m.section for m in r.measurements))
    charts, tables = [], []
    for section in sections:
        lines = [m for m in r.measurements if m.section == section]
        units = {m.unit for m in lines}
        for unit in sorted(units):
            rows = [(m.name, m.rate, f"{m.rate:.4g}") for m in lines if m.unit == unit]
            caption = f"{unit}: longer is faster. Medians of {r.runs} runs that took turns."
            charts.append(Chart(f"{section}, {unit}", bars(rows, section), caption))
        tables.append(Table(section, COLUMNS, [_row(m) for m in lines], len(lines)))
    return Page(
        command="bench",
        title=r.machine,
        status="done",
        verdict=f"{len(r.measurements)} lines, {r.threads} threads, medians of {r.runs} runs",
        findings=[
            *warned(r.warnings),
            *(Finding("note", f"{s.name} was skipped: {s.reason}") for s in r.skipped),
        ],
        facts=[Fact("threads", str(r.threads)), Fact("runs", str(r.runs))],
        charts=charts,
        tables=tables,
        closing=[Fact("machine", r.machine)],
    )


def _row(m: Measurement) -> list[Cell]:
    told = "; ".join(f"{ratio:.3g} x {name}" for name, ratio in m.ratios.items())
    return [
        Cell(m.name),
        number(1000 * m.seconds),
        number(1000 * min(m.times)),
        number(m.rate),
        Cell(m.unit),
        number(m.gigabytes_per_second, 3),
        Cell(told or "–"),
    ]
