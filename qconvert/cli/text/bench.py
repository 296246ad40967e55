"""What `bench` measured, for people."""

from __future__ import annotations

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import duration, number, table
from qconvert.errors import printable
from qconvert.report import BenchReport


def bench_text(r: BenchReport) -> str:
    parts = [f"{r.machine}; {r.threads} threads, medians of {r.runs} runs that took turns\n"]
    sections = dict.fromkeys([m.section for m in r.measurements] + [s.section for s in r.skipped])
    for section in sections:
        rows = []
        for m in (m for m in r.measurements if m.section == section):
            figures = (f"{1000 * m.seconds:.4g} ms", f"{m.rate:.4g} {m.unit}")
            head = (m.name, *figures, number(m.gigabytes_per_second, 3))
            ratios = [(f"{number(x, 3)} x", name) for name, x in m.ratios.items()] or [("", "")]
            rows += [(*(head if i == 0 else ("",) * 4), *x) for i, x in enumerate(ratios)]
        columns = [
            Column(section, "left"),
            Column("median", "right", keep=8),
            Column("rate", "right", keep=4),
            Column("GB/s", "right", keep=3),
            Column("speed", "right", keep=7),
            Column("of", "left", keep=6),
        ]
        parts.append("\n" + table(columns, rows))
        parts += [
            f"skipped    {printable(s.name)}: {printable(s.reason)}\n"
            for s in r.skipped
            if s.section == section
        ]
    return "".join(parts) + f"\nkernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
