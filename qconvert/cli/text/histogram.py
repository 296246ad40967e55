"""A histogram as lines: counts with bars, a scale in standard deviations, and marks."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qconvert.cli.text.fitting import text_width
from qconvert.cli.text.pieces import bar, number, wrapped
from qconvert.cli.text.signs import signs
from qconvert.errors import printable
from qconvert.quantities import shape_text
from qconvert.report import Histogram, TensorSummary

FOLDED = 3  # empty bins in a row that become one line
BOTH_BARS = 96  # columns from which there are two
BAR_MOST, BAR_LEAST = 30, 8
MARKS_MOST = 18
GAP = 2


def histogram_text(t: TensorSummary, h: Histogram) -> str:
    """Counts per bin with bars: linear where there is room, and logarithmic."""
    return "".join(_lines(t, h))


def _lines(t: TensorSummary, h: Histogram) -> Iterator[str]:
    step = h.high / len(h.counts) - h.low / len(h.counts)
    starts = [h.low + i * step for i in range(len(h.counts))]
    marks = [_marks(t, h, i) for i in range(len(h.counts))]
    top = max(h.counts) or 1
    figures = max(9, *(len(f"{c:,}") for c in h.counts))
    width = text_width()
    room = width - 12 - 8 - figures - min(max(map(len, marks)), MARKS_MOST) - 3 * GAP
    both = width >= BOTH_BARS
    length = max(min(room // 2 - GAP if both else room - GAP, BAR_MOST), BAR_LEAST)
    yield wrapped(f"{printable(t.name)}  {shape_text(t.shape)} {t.dtype}") + "\n"
    bars = [f"{'linear':<{length}}"] if both else []
    head = [f"{'from':>12}", f"{'in std':>8}", f"{'count':>{figures}}", *bars]
    yield (" " * GAP).join([*head, f"{'logarithmic'[:length]:<{length}}"]).rstrip() + "\n"
    for i, stop in _stretches(h.counts, marks):
        if stop > i + 1:
            yield f"{signs().cut:>12}  {stop - i} empty bins\n"
            continue
        count = h.counts[i]
        shares = [count / top] if both else []
        shares.append(math.log1p(count) / math.log1p(top))
        drawn = [f"{bar(share, length):<{length}}" for share in shares]
        cells = [f"{starts[i]:>12.4g}", _deviations(t, starts[i]), f"{count:>{figures},}", *drawn]
        yield (" " * GAP).join([*cells, marks[i][:MARKS_MOST]]).rstrip() + "\n"
    yield f"{h.high:>12.4g}  {_deviations(t, h.high)}\n"
    if t.percentiles:
        yield wrapped("p1 and so on mark the bins of percentiles") + "\n"
    if h.grid:
        yield wrapped(_grid_legend(h)) + "\n"


def _grid_legend(h: Histogram) -> str:
    g = h.grid
    assert g
    return (
        f"[ ] ends of the grid of the median group of a sample as {g.scheme}, "
        f"{number(g.low, 3)} to {number(g.high, 3)}; ( ) of the widest, "
        f"{number(g.widest_low, 3)} to {number(g.widest_high, 3)}: weights beyond the end of their "
        "group's grid are clipped"
    )


def _stretches(counts: list[int], marks: list[str]) -> Iterator[tuple[int, int]]:
    """Bins that make a line: one by one, or many where they are empty and have no marks."""
    i = 0
    while i < len(counts):
        stop = i
        while stop < len(counts) and not counts[stop] and not marks[stop]:
            stop += 1
        if stop - i < FOLDED:
            stop = i + 1
        yield i, stop
        i = stop


def _deviations(t: TensorSummary, value: float) -> str:
    if not t.std or t.mean is None:
        return f"{'-':>8}"
    return f"{(value - t.mean) / t.std:>+8.1f}"


def _marks(t: TensorSummary, h: Histogram, i: int) -> str:
    """What lies in a bin: percentiles, and ends of grids."""
    names = [f"p{p}" for p, v in (t.percentiles or {}).items() if _bin(h, v) == i]
    told = [f"{names[0]}..{names[-1]}"] if len(names) > 2 else names
    if g := h.grid:
        ends = zip("[](", (g.low, g.high, g.widest_low), strict=True)
        told += [sign for sign, v in (*ends, (")", g.widest_high)) if _bin(h, v) == i]
    return " ".join(told)


def _bin(h: Histogram, value: float) -> int:
    """The bin of a value; what lies beyond the ends is in the first or last."""
    half = h.high / 2 - h.low / 2
    share = (value / 2 - h.low / 2) / half if half > 0 else 0.5
    return min(max(int(share * len(h.counts)), 0), len(h.counts) - 1)
