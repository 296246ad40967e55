"""Tensors of `inspect` as CSV (RFC 4180), for spreadsheets: everything but histograms."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import fields

from qconvert.cli.text.pieces import CELL_MOST
from qconvert.errors import printable
from qconvert.report import ChannelSummary, InputLayer, InspectReport, TensorSummary
from qconvert.report.base import finite
from qconvert.report.inspect import PERCENTILES

FLAT = [f.name for f in fields(TensorSummary)]
FLAT = [
    n for n in FLAT if n not in ("name", "shape", "histogram", "percentiles", "rows", "columns")
]
CHANNEL = [f.name for f in fields(ChannelSummary)]


def inspect_csv(r: InspectReport) -> Iterator[str]:
    """A line of names, and one for each tensor, or layer of a calibration; what is not known is
    empty.
    """
    if r.inputs:
        names = [f.name for f in fields(InputLayer)]
        yield _line([*names])
        for layer in r.inputs.layers:
            cells = {name: getattr(layer, name) for name in names}
            yield _line(list((cells | {"hottest": " ".join(map(str, layer.hottest))}).values()))
        return
    yield _line(
        [
            *("name", "shape", *FLAT),
            *(f"p{p}" for p in PERCENTILES),
            *(f"{side}_{name}" for side in ("rows", "columns") for name in CHANNEL),
        ]
    )
    for t in r.tensors:
        percentiles = t.percentiles or {}
        yield _line(
            [
                t.name,
                "x".join(map(str, t.shape)),
                *(getattr(t, name) for name in FLAT),
                *(percentiles.get(p) for p in PERCENTILES),
                *(getattr(c, name) if c else None for c in (t.rows, t.columns) for name in CHANNEL),
            ]
        )


def _line(cells: list[object]) -> str:
    """Text without control characters: a name from a file must not drive a terminal."""
    written = io.StringIO()
    shown = [printable(c, CELL_MOST) if isinstance(c, str) else finite(c) for c in cells]
    csv.writer(written).writerow(shown)
    return written.getvalue()
