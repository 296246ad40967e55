"""The page of `calibrate`."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.page.maps import by_layer
from qconvert.page.parts import Cell, Column, Fact, Finding, Page, number, table_of, warned
from qconvert.page.svg import span
from qconvert.report import CalibratedLayer, CalibrateReport

COLUMNS = [
    Column("layer"),
    Column("range", "picture", "what its inputs are clipped to, beside the widest; the mark is 0"),
    Column("low", "number"),
    Column("high", "number"),
    Column("scale", "number", "one step of the 8-bit codes of its input"),
    Column("zero point", "number", "the code that stands for 0"),
    Column("samples", "number", "rows of input that were seen"),
    Column("features", "number", "channels of the input"),
    Column(
        "channel spread",
        "number",
        "largest magnitude of the widest input channel over that of the median one: above 20 or "
        "so one step for all channels is too coarse for most of them",
    ),
]


def calibrate_page(r: CalibrateReport) -> Page:
    """The ranges that were observed."""
    facts = [
        Fact("layers", f"{len(r.layers):,}"),
        Fact("observer", r.observer, "how ranges are taken from what was seen"),
    ]
    if r.tokens is not None and r.chunks is not None:
        facts.append(Fact("text", f"{r.tokens:,} tokens", f"in {r.chunks:,} pieces"))
    least = min((layer.low for layer in r.layers), default=0.0)
    most = max((layer.high for layer in r.layers), default=0.0)

    def row(layer: CalibratedLayer) -> Sequence[Cell]:
        return [
            Cell(layer.name),
            Cell(span(layer.low, layer.high, least, most)),
            number(layer.low),
            number(layer.high),
            number(layer.scale),
            number(layer.zero_point),
            number(layer.samples, 12),
            number(layer.features, 9),
            number(layer.channel_absmax_ratio, 3),
        ]

    return Page(
        command="calibrate",
        title=r.output,
        status="done" if r.status == "pass" else "fail",
        verdict=f"{len(r.layers):,} layers were observed, by {r.observer}",
        findings=[
            *warned(r.warnings),
            *(Finding("note", f"no token reached {name}") for name in r.unreached),
        ],
        facts=facts,
        charts=by_layer(
            "Channel spread by layer and role",
            {layer.name: layer.channel_absmax_ratio for layer in r.layers},
            lambda v: f"{v:.3g} x",
            "The widest input channel over the median one; colours by powers of ten. Where it is "
            "large a few channels set the range for all.",
            logarithmic=True,
        ),
        tables=[table_of("Layers", COLUMNS, r.layers, row, "the first of the model")],
        closing=[Fact("inputs", ", ".join(r.inputs))],
    )
