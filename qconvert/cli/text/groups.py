"""Tensors of a layer or a role in a line, with small bars over depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import number, table_lines, wrapped
from qconvert.cli.text.signs import signs
from qconvert.quantities import size
from qconvert.report import TensorGroup

DEPTH = "over depth: from the first layer to the last, each row on a scale of its own"
DEPTH_MOST = 16  # bars; of more layers several share one

Ends = Callable[[Sequence[float]], float]


def group_lines(by: str, groups: Sequence[TensorGroup]) -> Iterator[str]:
    """A table of groups; of roles with bars from the first layer to the last."""
    deep = by == "role" and any(len(g.tensors) > 1 for g in groups)

    def row(g: TensorGroup) -> Sequence[str]:
        figures = ((g.std, max), (g.kurtosis, max), (g.sqnr_db, min))
        cells = [g.name, f"{len(g.tensors):,}", f"{g.values:,}", size(g.nbytes)]
        for found, worst in figures:
            known = [f for f in found if f is not None]
            cells.append(number(worst(known) if known else None, 3))
            cells += [sparkline(found, worst)] if deep else []
        return cells

    columns = [
        Column(by, "left"),
        Column("tensors", "right", keep=6),
        Column("values", "right", keep=1),
        Column("size", "right", keep=3),
    ]
    for name, worst, keep in (("std", "most", 2), ("kurtosis", "most", 8), ("SQNR dB", "least", 7)):
        columns.append(Column(f"{worst} {name}", "right", keep, quiet=True))
        if deep:
            columns.append(Column("over depth", "left", keep, quiet=True))
    yield from table_lines(columns, groups, row)
    if deep:
        yield "\n" + wrapped(DEPTH) + "\n"


def sparkline(figures: Sequence[float | None], worst: Ends) -> str:
    """A small bar for each figure, ``worst`` of some where they are many; a blank for none."""
    if len(figures) < 2:
        return ""
    count = min(len(figures), DEPTH_MOST)
    parts = [
        figures[i * len(figures) // count : (i + 1) * len(figures) // count] for i in range(count)
    ]
    known = [[f for f in part if f is not None] for part in parts]
    found = [worst(part) if part else None for part in known]
    ends = [f for f in found if f is not None]
    if not ends:
        return ""
    low, high = min(ends), max(ends)
    heights = signs().heights

    def height(f: float | None) -> str:
        if f is None:
            return " "
        share = (f - low) / (high - low) if high > low else 0.5
        return heights[min(int(share * len(heights)), len(heights) - 1)]

    return "".join(map(height, found))
