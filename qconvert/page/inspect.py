"""The page of `inspect`."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.page.maps import by_layer
from qconvert.page.parts import (
    ROWS_SHOWN,
    Cell,
    Chart,
    Column,
    Fact,
    Page,
    Table,
    number,
    warned,
)
from qconvert.page.svg import curve, histogram
from qconvert.quantities import shape_text, size
from qconvert.report import InspectReport, SizeCurve, TensorSummary

COLUMNS = [
    Column("tensor"),
    Column("distribution", "picture", "counts of values, heights by their square root"),
    Column("shape"),
    Column("dtype"),
    Column("size", "number"),
    Column("min", "number"),
    Column("max", "number"),
    Column("std", "number", "standard deviation of the values"),
    Column("kurtosis", "number", "weight of the tails: 3 for a Gaussian, more with outliers"),
    Column("outliers", "number", "share of values beyond four standard deviations, in percent"),
    Column("zeros", "number", "values that are exactly 0"),
    Column("suggested", "text", "scheme that suits the tensor, by a sample of its rows"),
    Column("why", "long"),
]


def inspect_page(r: InspectReport) -> Page:
    """What is in a file and how it is distributed."""
    charts: list[Chart] = []
    if r.curve:
        charts += _curve(r.curve)
    if r.statistics:
        charts += by_layer(
            "Kurtosis by layer and role",
            {t.name: t.kurtosis for t in r.tensors},
            lambda v: f"{v:.4g}",
            "How heavy the tails of the values are: 3 for a Gaussian, hundreds where a few "
            "outliers set the scale for all. The scale of colours goes by powers of ten.",
            logarithmic=True,
        )
        charts += by_layer(
            "Largest magnitude by layer and role",
            {t.name: t.absmax for t in r.tensors},
            lambda v: f"{v:.4g}",
            "The largest absolute value of each tensor; colours by powers of ten.",
            logarithmic=True,
        )
    facts = [
        Fact("tensors", f"{r.total_tensors:,}", f"{len(r.tensors):,} of them here"),
        Fact("values", f"{r.total_values:,}"),
        Fact("size", size(r.total_bytes)),
        Fact("format", r.kind),
    ]
    return Page(
        command="inspect",
        title=r.path,
        status="done",
        verdict=f"{len(r.tensors):,} of {r.total_tensors:,} tensors, {size(r.total_bytes)}",
        findings=warned(r.warnings),
        facts=facts,
        charts=charts,
        tables=[_tensors(r)] if r.tensors else [],
        closing=[Fact(key, value) for key, value in list(r.metadata.items())[:60]],
    )


def _curve(c: SizeCurve) -> list[Chart]:
    points = [(p.bits, p.kl) for p in c.points]
    if not (drawn := curve(points, "bits per weight", "predicted KL in nats")):
        return []
    caption = (
        f"What the best {c.container} file of each size is predicted to lose: the divergence (KL) "
        "of the next token's distribution from the original's, in nats; below 0.01 is hard to tell "
        "from the original in use."
    )
    return [Chart("Size against loss", drawn, caption)]


def _tensors(r: InspectReport) -> Table:
    rows = [_row(t) for t in r.tensors[:ROWS_SHOWN]]
    told = "the first of the file"
    if r.statistics:
        return Table("Tensors", COLUMNS, rows, len(r.tensors), told)
    kept = [i for i, c in enumerate(COLUMNS) if c.heading in ("tensor", "shape", "dtype", "size")]
    some = [[row[i] for i in kept] for row in rows]
    return Table("Tensors", [COLUMNS[i] for i in kept], some, len(r.tensors), told)


def _row(t: TensorSummary) -> Sequence[Cell]:
    drawn = Cell("")
    if t.histogram:
        h = t.histogram
        marks = [(0.0, "zero")]
        if t.mean is not None and t.std:
            for k in (-4, 4):
                marks.append((t.mean + k * t.std, f"{abs(k)} standard deviations"))
        drawn = Cell(histogram(h.counts, h.low, h.high, marks=marks))
    share = None if t.outlier_share is None else 100 * t.outlier_share
    return [
        Cell(t.name),
        drawn,
        Cell(shape_text(t.shape)),
        Cell(t.dtype),
        Cell(size(t.nbytes), t.nbytes),
        *(number(v, 3) for v in (t.minimum, t.maximum, t.std, t.kurtosis)),
        number(share, 3),
        number(t.zeros, 6),
        Cell(t.suggestion or "–"),
        Cell(t.suggestion_reason or "–"),
    ]
