"""The page of `inspect`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qconvert.page.maps import by_layer
from qconvert.page.parts import (
    Cell,
    Chart,
    Column,
    Fact,
    Finding,
    Page,
    Table,
    decibels,
    number,
    table_of,
    warned,
)
from qconvert.page.svg import curve, histogram
from qconvert.quantities import shape_text, size
from qconvert.report import (
    ComparedTensor,
    Comparison,
    InputLayer,
    InputsView,
    InspectReport,
    SizeCurve,
    TensorSummary,
)

COLUMNS = [
    Column("tensor"),
    Column(
        "distribution",
        "picture",
        "counts of values, heights by their square root; marks are 0, the ends of the grid of the "
        "suggested scheme, and the first and last percent of the values",
    ),
    Column("shape"),
    Column("dtype"),
    Column("size", "number"),
    Column("min", "number"),
    Column("max", "number"),
    Column("std", "number", "standard deviation of the values"),
    Column("kurtosis", "number", "weight of the tails: 3 for a Gaussian, more with outliers"),
    Column("crest", "number", "largest magnitude by the root mean square"),
    Column("channel", "number", "widest row or column by the median one"),
    Column("SQNR dB", "number", "what a sample keeps under the suggested scheme"),
    Column("outliers", "number", "share of values beyond four standard deviations, in percent"),
    Column("zeros", "number", "values that are exactly 0"),
    Column("suggested", "text", "scheme that suits the tensor, by a sample of its rows"),
    Column("why", "long"),
]
COMPARED = [
    Column("tensor"),
    Column("type"),
    Column("type there", "text", "in the other file"),
    Column("bytes", "number"),
    Column("bytes there", "number", "in the other file"),
    Column("SQNR dB", "number", "power of the values over that of what is different there"),
    Column("differing", "number", "values that are not the same"),
    Column("max error", "number", "the largest difference"),
]
INPUTS = [
    Column("layer"),
    Column("rank", "number", "by the mean square of its inputs, the largest first"),
    Column("mean square", "number", "of its inputs: how much errors of its weights matter"),
    Column("channel spread", "number", "the largest channel by the median one"),
    Column("low", "number"),
    Column("high", "number"),
    Column("features", "number", "input channels"),
    Column("hottest channels", "long"),
]


def inspect_page(r: InspectReport) -> Page:
    """What is in a file and how it is distributed."""
    charts: list[Chart] = []
    if r.curve:
        charts += _curve(r.curve)
    weights = [t for t in r.tensors if not t.dtype.startswith(("I", "U", "BOOL"))]
    if r.statistics:
        charts += by_layer(
            "Kurtosis by layer and role",
            {t.name: t.kurtosis for t in weights},
            lambda v: f"{v:.4g}",
            "How heavy the tails of the values are: 3 for a Gaussian, hundreds where a few "
            "outliers set the scale for all. The scale of colours goes by powers of ten.",
            logarithmic=True,
        )
        charts += by_layer(
            "Largest magnitude by layer and role",
            {t.name: t.absmax for t in weights},
            lambda v: f"{v:.4g}",
            "The largest absolute value of each tensor; colours by powers of ten.",
            logarithmic=True,
        )
    shown = "" if len(r.tensors) == r.total_tensors else f"{len(r.tensors):,} of them here"
    facts = [
        Fact("tensors", f"{r.total_tensors:,}", shown),
        Fact("values", f"{r.total_values:,}"),
        Fact("size", size(r.total_bytes)),
        Fact("format", r.kind),
    ]
    return Page(
        command="inspect",
        title=r.path,
        status="done",
        verdict=f"{len(r.tensors):,} of {r.total_tensors:,} tensors, {size(r.total_bytes)}",
        findings=[*warned(r.warnings), *_findings(r), *(Finding("note", n) for n in r.notes)],
        facts=facts,
        charts=charts,
        tables=_tables(r),
        closing=[Fact(key, value) for key, value in r.facts.items()],
    )


def _findings(r: InspectReport) -> list[Finding]:
    if r.findings is None:
        told = "What stands out is not looked for in codes: qconvert verify judges them."
        return [Finding("note", told)]
    if r.statistics and not r.findings:
        return [Finding("good", "No tensor stands out by outliers, tails or dead channels.")]
    return [Finding("note", f"{f.message}. Try: {f.advice}") for f in r.findings]


def _tables(r: InspectReport) -> list[Table]:
    tables = [_tensors(r)] if r.tensors else []
    if r.comparison:
        tables += [_compared(r.comparison)]
    if r.inputs:
        tables += [_inputs(r.inputs)]
    return tables


def _compared(c: Comparison) -> Table:
    worst = sorted(c.tensors, key=lambda t: (t.equal, math.inf if t.sqnr_db is None else t.sqnr_db))

    def row(t: ComparedTensor) -> Sequence[Cell]:
        return [
            Cell(t.name),
            Cell(t.a_dtype),
            Cell(t.b_dtype),
            Cell(size(t.a_bytes), t.a_bytes),
            Cell(size(t.b_bytes), t.b_bytes),
            decibels(t.sqnr_db, measured=t.comparable),
            number(t.differing, 12),
            number(t.max_error, 3),
        ]

    return table_of(f"Against {c.path}", COMPARED, worst, row, "those that differ most")


def _inputs(view: InputsView) -> Table:
    def row(layer: InputLayer) -> Sequence[Cell]:
        return [
            Cell(layer.name),
            number(layer.rank, 9),
            number(layer.mean_square, 4),
            number(layer.spread, 3),
            number(layer.low),
            number(layer.high),
            number(layer.features, 9),
            Cell(", ".join(map(str, layer.hottest))),
        ]

    return table_of("Inputs of layers", INPUTS, view.layers, row, "the first of the file")


def _curve(c: SizeCurve) -> list[Chart]:
    points = [(p.bits, p.kl) for p in c.points if p.kl is not None]
    if not (drawn := curve(points, "bits per weight", "predicted KL in nats")):
        return []
    caption = (
        f"What the best {c.container} file of each size is predicted to lose: the divergence (KL) "
        "of the next token's distribution from the original's, in nats; below 0.01 is hard to tell "
        "from the original in use."
    )
    return [Chart("Size against loss", drawn, caption)]


def _tensors(r: InspectReport) -> Table:
    told = "the first of the file"
    if r.statistics:
        return table_of("Tensors", COLUMNS, r.tensors, _row, told)
    heads = [c for c in COLUMNS if c.heading in ("tensor", "shape", "dtype", "size")]
    return table_of("Tensors", heads, r.tensors, _head, told)


def _head(t: TensorSummary) -> Sequence[Cell]:
    """What a header says of a tensor."""
    return [
        Cell(t.name),
        Cell(shape_text(t.shape)),
        Cell(t.dtype),
        Cell(size(t.nbytes), t.nbytes),
    ]


def _row(t: TensorSummary) -> Sequence[Cell]:
    name, *head = _head(t)
    drawn = Cell("")
    if t.histogram:
        h = t.histogram
        marks = [(0.0, "zero")]
        if h.grid:
            ends = ((h.grid.low, "low"), (h.grid.high, "high"))
            marks += [(end, f"{which} end of the grid of {h.grid.scheme}") for end, which in ends]
        for percent, value in (t.percentiles or {}).items():
            if percent in ("1", "99"):
                marks.append((value, f"{percent} % of the values are below"))
        drawn = Cell(histogram(h.counts, h.low, h.high, marks=marks))
    share = None if t.outlier_share is None else 100 * t.outlier_share
    return [
        name,
        drawn,
        *head,
        *(number(v, 3) for v in (t.minimum, t.maximum, t.std, t.kurtosis)),
        *(number(v, 3) for v in (t.crest, t.widest_ratio, t.sqnr_db)),
        number(share, 3),
        number(t.zeros, 6),
        Cell(t.suggestion or "–"),
        Cell(t.suggestion_reason or "–"),
    ]
