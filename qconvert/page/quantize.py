"""The page of `quantize`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

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
from qconvert.page.svg import bars
from qconvert.quantities import shape_text, size
from qconvert.report import QuantizedTensor, QuantizeReport

COLUMNS = [
    Column("tensor"),
    Column("shape"),
    Column("from"),
    Column("to", "text", "scheme or type it is stored as"),
    Column("size", "number", "bytes in the file"),
    Column("bits", "number", "bits per weight with all scales"),
    Column("SQNR dB", "number", "power of the weights over that of their error; 6 dB are a bit"),
    Column("symmetric dB", "number", "SQNR of a sample with zero point 0"),
    Column("asymmetric dB", "number", "SQNR of a sample with zero points of its own"),
    Column("cost dB", "number", "what the room of zero points is worth, at 6 dB a bit"),
    Column("max error", "number"),
    Column("clipped", "number", "values beyond the ends of the grid"),
    Column("rounding", "text", "nearest, or compensated: each code makes up for errors before it"),
    Column("why", "long"),
]


def quantize_page(r: QuantizeReport) -> Page:
    """What became of each tensor, and by which decision."""
    quantized = [t for t in r.tensors if t.quantized]
    share = 100 * r.output_bytes / r.source_bytes if r.source_bytes else 0.0
    written = "" if r.written else "; nothing was written"
    facts = [
        Fact("size", size(r.output_bytes), f"{share:.1f} % of {size(r.source_bytes)}"),
        Fact("bits per weight", _plain(r.model_bits_per_weight), "over the whole model"),
        Fact("tensors quantized", f"{len(quantized):,}", f"of {len(r.tensors):,}"),
        Fact("scheme", r.scheme, f"as {r.container}"),
    ]
    if not r.dry_run and r.sqnr_db is not None:
        told = "power of all quantized weights over that of their errors"
        facts.append(Fact("SQNR", f"{r.sqnr_db:.2f} dB", told))
    if r.prediction and r.prediction.kl is not None:
        basis = f"KL divergence by {r.prediction.basis}"
        facts.append(Fact("predicted loss", f"{r.prediction.kl:.3g} nats", basis))
    return Page(
        command="quantize",
        title=r.output,
        status="done" if r.status == "pass" else "fail",
        verdict=f"{r.source} as {r.scheme}: {size(r.source_bytes)} became "
        f"{size(r.output_bytes)}{written}",
        findings=[*warned(r.warnings), *(Finding("note", note) for note in r.notes)],
        facts=facts,
        charts=_charts(r),
        tables=[_tensors(r)] if r.tensors else [],
        closing=[
            Fact("source", r.source),
            Fact("ranges by", r.range),
            Fact("calibration", r.calibration or "none"),
        ],
    )


def _charts(r: QuantizeReport) -> list[Chart]:
    amounts: Counter[str] = Counter()
    for t in r.tensors:
        amounts[t.stored] += t.nbytes
    shares = [(name, float(n), size(n)) for name, n in amounts.most_common(20)]
    charts = [Chart("Bytes by type", bars(shares, "bytes by type"), "What the file is made of.")]
    charts += by_layer(
        "SQNR by layer and role",
        {t.name: t.sqnr_db for t in r.tensors if t.quantized},
        lambda v: f"{v:.2f} dB",
        "Power of the weights over that of their error. A bit more is worth 6 dB; below 6 dB "
        "little is left of a tensor.",
        least_span=DECIBELS_SPAN,
    )
    charts += by_layer(
        "Bits by layer and role",
        {t.name: t.bits_per_weight for t in r.tensors if t.quantized},
        lambda v: f"{v:.4g} bits",
        "Bits per weight, with scales and zero points.",
    )
    return charts


def _tensors(r: QuantizeReport) -> Table:
    """The largest losses first, as these are what a reader looks for."""
    worst = sorted(r.tensors, key=lambda t: (t.sqnr_db is None, t.sqnr_db or 0.0))
    return table_of("Tensors", COLUMNS, worst, _row, "those with the lowest SQNR")


def _row(t: QuantizedTensor) -> Sequence[Cell]:
    decision: dict[str, Any] = t.decision or {}
    sample = decision.get("sample") or {}
    figures = (sample.get("symmetric_db"), sample.get("asymmetric_db"), decision.get("cost_db"))
    return [
        Cell(t.name),
        Cell(shape_text(t.shape)),
        Cell(t.source_dtype),
        Cell(t.stored),
        Cell(size(t.nbytes), t.nbytes),
        number(t.bits_per_weight),
        decibels(t.sqnr_db, measured=t.max_error is not None),
        *(number(v) for v in figures),
        number(t.max_error, 3),
        number(t.clipped, 7),
        Cell(t.rounding or "–"),
        Cell(t.reason),
    ]


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
