"""The page of `verify`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qconvert.page.maps import DECIBELS_SPAN, by_layer
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
from qconvert.page.svg import histogram
from qconvert.quantities import figure
from qconvert.report import Check, VerifiedTensor, VerifyReport

CHECKS = [
    Column("check"),
    Column("result", "text", "pass, fail, or skip with the reason"),
    Column("found", "number"),
    Column("limit", "number"),
    Column("tensor"),
    Column("what was checked", "long"),
]
TENSORS = [
    Column("tensor"),
    Column("before and after", "picture", "a sample: weights in grey, stored values as a line"),
    Column("stored"),
    Column("SQNR dB", "number", "power of the weights over that of their error"),
    Column("NMSE", "number", "mean squared error over the mean square of the weights"),
    Column("max error", "number", "in units of the weights"),
    Column("in steps", "number", "largest error of a value that was not clipped; 0.5 at most"),
    Column(
        "product dB",
        "number",
        "SQNR of the layer's product with 8-bit inputs, or of floats where codes have none",
    ),
    Column("inputs", "text", "of that product"),
    Column("fails", "text", "checks that the tensor fails"),
]

OUTLIERS_SHOWN = 10


def verify_page(r: VerifyReport) -> Page:
    """What was checked and what every tensor has lost."""
    return Page(
        command="verify",
        title=r.path,
        status=r.status,
        verdict=r.headline,
        findings=_findings(r),
        facts=_facts(r),
        charts=_charts(r),
        tables=[_checks(r), *([_tensors(r)] if r.tensors else [])],
        closing=[Fact("source", r.against or "none was given")],
    )


def _findings(r: VerifyReport) -> list[Finding]:
    failing = [Finding("bad", _failed(c)) for c in r.failed]
    outliers = [Finding("note", str(o)) for o in r.outliers[:OUTLIERS_SHOWN]]
    options = r.mending(sorted(r.tensors, key=_badness))
    mend = Finding("note", "To mend it, quantize again with", options)
    return [*failing, *warned(r.warnings), *outliers, *([mend] if options else ())]


def _failed(c: Check) -> str:
    figures = ""
    if c.worst is not None and c.limit is not None:
        figures = f": {figure(c.worst)} (limit {figure(c.limit)})"
    where = f", in {c.tensor}" if c.tensor else ""
    return f"{c.id}: {c.detail}{figures}{where}"


def _facts(r: VerifyReport) -> list[Fact]:
    lossy = [t.sqnr_db for t in r.tensors if t.sqnr_db is not None]
    facts = [Fact("tensors measured", f"{len(r.tensors):,}")]
    if r.sqnr_db is not None and lossy:
        facts.append(Fact("SQNR", f"{r.sqnr_db:.2f} dB", f"the poorest tensor {min(lossy):.2f} dB"))
    if q := r.token_quality:
        facts.append(
            Fact(
                "perplexity",
                f"{100 * q.perplexity_increase:+.2f} % ± {100 * q.perplexity_increase_error:.2f}",
                f"{q.source_perplexity:.4f} became {q.perplexity:.4f}, {q.tokens:,} tokens",
            )
        )
        facts.append(
            Fact("divergence (KL)", f"{q.kl_mean:.3g} nats", f"± {q.kl_mean_error:.1g}, a token")
        )
        facts.append(Fact("same likeliest token", f"{100 * q.same_top:.2f} %"))
    if e := r.embedding_quality:
        told = f"the smallest {e.cosine_min:.5f}, {e.sentences:,} sentences"
        facts.append(Fact("cosine of embeddings", f"{e.cosine_mean:.5f}", told))
    return facts


def _charts(r: VerifyReport) -> list[Chart]:
    return [
        *by_layer(
            "SQNR by layer and role",
            {t.name: t.sqnr_db for t in r.tensors},
            lambda v: f"{v:.2f} dB",
            "Power of the weights over that of their error. A bit more is worth 6 dB; below 6 dB "
            "little is left of a tensor.",
            least_span=DECIBELS_SPAN,
        ),
        *by_layer(
            "SQNR of the products by layer and role",
            {t.name: t.output_sqnr_db for t in r.tensors},
            lambda v: f"{v:.2f} dB",
            "The same for what each layer gives out, with inputs as the table of tensors says.",
            least_span=DECIBELS_SPAN,
        ),
    ]


def _checks(r: VerifyReport) -> Table:
    order = {"fail": 0, "skip": 1, "pass": 2}

    def row(c: Check) -> Sequence[Cell]:
        return [
            Cell(c.id),
            Cell(c.status, order[c.status]),
            number(c.worst),
            number(c.limit),
            Cell(c.tensor or "–"),
            Cell(c.detail),
        ]

    gravest_first = sorted(r.checks, key=lambda c: order[c.status])
    return table_of("Checks", CHECKS, gravest_first, row, "those that fail, then those skipped")


def _tensors(r: VerifyReport) -> Table:
    worst = sorted(r.tensors, key=_badness)
    told = "those that fail, then those with the lowest SQNR"
    return table_of("Tensors", TENSORS, worst, _row, told)


def _badness(t: VerifiedTensor) -> tuple[bool, float]:
    return not t.fails, math.inf if t.sqnr_db is None else t.sqnr_db


def _row(t: VerifiedTensor) -> Sequence[Cell]:
    drawn = Cell("")
    if h := t.histogram:
        few = len(h.grid) > 2
        told = (
            "a value that codes stand for" if few else "end of the grid: what is beyond is clipped"
        )
        marks = [(value, told) for value in h.grid]
        drawn = Cell(histogram(h.before, h.low, h.high, h.after, marks))
    return [
        Cell(t.name),
        drawn,
        Cell(t.stored),
        decibels(t.sqnr_db, measured=t.max_error is not None),
        number(t.nmse, 3),
        number(t.max_error, 3),
        number(t.worst_step, 3),
        number(t.output_sqnr_db),
        Cell(", ".join(part for part in (t.inputs, t.activations) if part) or "–"),
        Cell(", ".join(t.fails) or "–"),
    ]
