"""A calibration or an importance matrix, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import number, table_lines, wrapped
from qconvert.errors import printable
from qconvert.quantities import counted
from qconvert.report import InputLayer, InputsView

EXPLAINED = (
    "spread is the largest channel by the median one; hottest names the largest channels; mean "
    "square is that of all inputs, which says how much errors of the layer's weights matter, and "
    "rank orders the layers by it"
)


def inputs_lines(view: InputsView) -> Iterator[str]:
    for label, text in view.facts.items():
        yield wrapped(f"{label:<13} {printable(text)}", " " * 14) + "\n"
    yield "\n"
    yield from table_lines(COLUMNS, view.layers, _row)
    yield "\n" + wrapped(EXPLAINED) + "\n"
    shown, total = len(view.layers), counted(view.total_layers, "layer")
    yield f"{total}\n" if shown == view.total_layers else f"{shown:,} of {total} shown\n"


COLUMNS = [
    Column("layer", "left"),
    Column("rank", "right", keep=8),
    Column("mean square", "right", keep=6),
    Column("spread", "right", keep=9),
    Column("hottest", "left", keep=7),
    Column("low", "right", keep=4, quiet=True),
    Column("high", "right", keep=4, quiet=True),
    Column("scale", "right", keep=3, quiet=True),
    Column("zero point", "right", keep=3, quiet=True),
    Column("features", "right", keep=2),
    Column("samples", "right", keep=1, quiet=True),
]


def _row(layer: InputLayer) -> Sequence[str]:
    return (
        layer.name,
        str(layer.rank),
        number(layer.mean_square, 3),
        "-" if layer.spread is None else f"{layer.spread:.3g}x",
        " ".join(map(str, layer.hottest)),
        *(number(v, 3) for v in (layer.low, layer.high, layer.scale)),
        "-" if layer.zero_point is None else str(layer.zero_point),
        f"{layer.features:,}",
        "-" if layer.samples is None else f"{layer.samples:,}",
    )
