"""What `inspect` found, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

from qconvert.cli.text.comparison import comparison_lines
from qconvert.cli.text.fitting import Column
from qconvert.cli.text.groups import group_lines
from qconvert.cli.text.histogram import histogram_text
from qconvert.cli.text.inputs import inputs_lines
from qconvert.cli.text.pieces import LABEL, bar, number, table_lines, wrapped
from qconvert.errors import printable
from qconvert.quantities import counted, duration, shape_text, size
from qconvert.report import CurvePoint, InspectReport, SchemePoint, SizeCurve, TensorSummary

CURVE_BAR = 16  # characters
NOTHING_FOUND = (
    "nothing stands out: no outliers, heavy tails, dead channels, constant blocks, NaN or Inf"
)
NOT_LOOKED = "what stands out is not looked for in codes: qconvert verify judges a quantized file"


def inspect_text(r: InspectReport, histograms: bool = True) -> Iterator[str]:
    """What `inspect` found; histograms too where they were asked for and not taken for a page."""
    yield f"{printable(r.path)} ({r.kind})\n\n"
    if r.curve:
        yield from _curve_lines(r.curve)
        yield f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
        return
    if r.inputs:
        yield from inputs_lines(r.inputs)
        return
    if r.comparison:
        yield from comparison_lines(r, r.comparison)
        return
    yield from fact_lines(r)
    if r.statistics:
        yield from _finding_lines(r)
    if r.by:
        yield from group_lines(r.by, r.groups)
    elif r.statistics:
        yield from table_lines(
            statistics_columns(r), r.tensors, partial(_statistics_row, r.scheme), "--csv"
        )
        yield "\n"
        yield from reason_lines(r)
    else:
        yield from table_lines(HEADERS, r.tensors, _header_row)
    shown = f"{len(r.tensors):,} of {counted(r.total_tensors, 'tensor')} shown; the file has "
    yield "\n" + wrapped(f"{shown}{r.total_values:,} values in {size(r.total_bytes)}") + "\n"
    for note in r.notes:
        yield wrapped(f"notes      {printable(note)}", LABEL) + "\n"
    for t in r.tensors:
        if t.histogram and histograms:
            yield f"\n{histogram_text(t, t.histogram)}"
    if r.statistics:
        yield f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"


def fact_lines(r: InspectReport) -> Iterator[str]:
    """What the file says of itself, and its types."""
    for label, text in r.facts.items():
        yield wrapped(f"{label:<13} {printable(text)}", " " * 14) + "\n"
    types = [
        f"{counted(t.tensors, 'tensor')} {name} ({size(t.nbytes)})" for name, t in r.types.items()
    ]
    yield wrapped(f"{'types':<13} {', '.join(types) or 'none'}", " " * 14) + "\n\n"


def _finding_lines(r: InspectReport) -> Iterator[str]:
    """What stands out, and what to do about it."""
    if r.findings is None:
        yield wrapped(NOT_LOOKED) + "\n\n"
        return
    if not r.findings:
        yield wrapped(NOTHING_FOUND) + "\n\n"
        return
    for finding in r.findings:
        yield wrapped(finding.message) + "\n"
        yield wrapped(f"  try: {finding.advice}", "       ") + "\n"
    yield "\n"


def _curve_lines(c: SizeCurve) -> Iterator[str]:
    """Size against loss, of mixes and of single schemes."""
    yield f"the best {c.container} file of each size\n\n"
    yield from _loss_table("bits", [(f"{p.bits:.2f}", _mostly(p), p) for p in c.points])
    yield f"\none scheme for all tensors, in {c.container}\n\n"
    told = [(p.scheme, f"{p.others} larger" if p.others else "-", p) for p in c.uniform]
    yield from _loss_table("scheme", told)
    yield "\n" + wrapped(PREDICTED if any(p.kl is not None for p in c.points) else UNINFORMED)
    yield "\n"
    for mark, bits in c.smallest.items():
        if bits:
            yield f"at most {mark} nats: {bits:.2f} bits: --target-bpw {bits:.2f}\n"
    for name, p in c.presets.items():
        lost = f"{number(p.kl, 3)} nats" if p.kl is not None else f"{number(p.sqnr_db, 3)} dB"
        yield f"--preset {name}: {p.bits:.2f} bits, {size(p.nbytes)}, {lost}\n"


PREDICTED = (
    "KL is the divergence of next tokens from those of the original: losses are predicted for "
    "codes rounded to nearest, to second order, which is too little below 3.5 bits. SQNR is that "
    "of the weights."
)
UNINFORMED = (
    "SQNR is that of the weights: what it does to predictions is not known without a calibration. "
    "Mixes are chosen by what tensors of each role usually need. For predictions, and better "
    "mixes: qconvert calibrate MODEL --text FILE --fisher -o C, then --curve --calibration C"
)


def _mostly(p: CurvePoint) -> str:
    return ", ".join(f"{count} {name}" for name, count in list(p.schemes.items())[:2])


def _loss_table(
    first: str, points: Sequence[tuple[str, str, CurvePoint | SchemePoint]]
) -> Iterator[str]:
    """What points lose, with a bar: by powers of ten of the KL, or by the SQNR."""
    predicted = any(p.kl is not None for _, _, p in points)
    heights = [_height(p) for _, _, p in points]
    known = [h for h in heights if h is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def row(item: tuple[str, str, CurvePoint | SchemePoint]) -> Sequence[str]:
        name, more, p = item
        height = _height(p)
        share = (height - low) / (high - low) if height is not None and high > low else 0.0
        figures = (number(p.kl, 3),) if predicted else ()
        sqnr = "exact" if p.sqnr_db is None else f"{p.sqnr_db:.1f}"
        return name, size(p.nbytes), *figures, sqnr, bar(share, CURVE_BAR), more

    columns = [
        Column(first, "left"),
        Column("size", "right", keep=9),
        *((Column("KL, nats", "right", keep=8),) if predicted else ()),
        Column("SQNR dB", "right", keep=7),
        Column("loss, by powers", "left", keep=6),
        Column("mostly" if first == "bits" else "others", "left", keep=4, quiet=True),
    ]
    yield from table_lines(columns, points, row)


def _height(p: CurvePoint | SchemePoint) -> float | None:
    """The loss by powers of ten; None where there is none."""
    if p.kl is not None:
        return math.log10(p.kl) if p.kl > 0 else None
    return None if p.sqnr_db is None else -p.sqnr_db / 10


def _header_row(t: TensorSummary) -> Sequence[str]:
    return t.name, shape_text(t.shape), t.dtype, size(t.nbytes)


HEADERS = [
    Column("tensor", "left"),
    Column("shape", "right", keep=7),
    Column("dtype", "left", keep=4, quiet=True),
    Column("size", "right", keep=3),
]


def statistics_columns(r: InspectReport) -> list[Column]:
    return [
        *HEADERS,
        *(Column(name, "right", keep=1) for name in ("min", "max")),
        Column("mean", "right", keep=0),
        Column("std", "right", keep=6),
        Column("absmax", "right", keep=4),
        Column("widest channel", "right", keep=5, quiet=True),
        Column("kurtosis", "right", keep=8),
        Column("outliers", "right", keep=2),
        Column("near 0", "right", keep=2),
        Column("zeros", "right", keep=2, quiet=True),
        Column("bad", "right", keep=10, quiet=True),
        Column("SQNR dB", "right", keep=7, quiet=True),
        Column(r.scheme or "suggested", "left", keep=9, quiet=True),
    ]


def _statistics_row(scheme: str | None, t: TensorSummary) -> Sequence[str]:
    figures = (t.minimum, t.maximum, t.mean, t.std, t.absmax)
    return (
        *_header_row(t),
        *(number(v, 3) for v in figures),
        "-" if t.widest_ratio is None else f"{t.widest_ratio:.3g}x",
        _plain(t.kurtosis),
        _percent(t.outlier_share),
        _percent(t.near_zero_share),
        *("-" if n is None else f"{n:,}" for n in (t.zeros, t.nonfinite)),
        _decibels_of_sample(t),
        (t.suggestion or "-").removeprefix(f"{scheme}_"),
    )


def _plain(value: float | None) -> str:
    """Without powers of ten below a million."""
    return "-" if value is None else f"{value:,.0f}" if 1000 <= value < 1e6 else number(value, 3)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2g}%"


def _decibels_of_sample(t: TensorSummary) -> str:
    return "-" if t.sqnr_db is None else f"{t.sqnr_db:.1f}"


def reason_lines(r: InspectReport) -> Iterator[str]:
    """Why each tensor would take what is suggested, one line for those with the same reason."""
    groups: dict[tuple[str, str], list[TensorSummary]] = {}
    for t in r.tensors:
        if t.suggestion:
            reason = t.rule if t.gain_db is not None else t.suggestion_reason
            groups.setdefault((t.suggestion, reason or ""), []).append(t)
    for (suggestion, reason), found in sorted(groups.items(), key=lambda g: -len(g[1])):
        told = reason if found[0].gain_db is None else _measured(r.scheme, found)
        yield wrapped(f"{counted(len(found), 'tensor')}: {suggestion}, {told}", "  ") + "\n"


def _measured(scheme: str | None, found: Sequence[TensorSummary]) -> str:
    """Why zero points were taken or not, or why more bits are suggested."""
    suggestion = found[0].suggestion or ""
    if not suggestion.startswith(scheme or suggestion):
        kept = _span([t.sqnr_db for t in found], 1)
        return f"since {scheme} would keep only {kept} dB: heavy tails"
    gain, cost = _span([t.gain_db for t in found], 2), _span([t.cost_db for t in found], 2)
    kind = "asymmetric" if suggestion.endswith("_asym") else "symmetric"
    return WHY.get(found[0].rule or "", WHY["sample"]).format(kind=kind, gain=gain, cost=cost)


# By the rule that decided.
WHY = {
    "requested": "{kind} as asked: zero points gain {gain} dB and cost {cost} dB",
    "one-sided": "{kind}, since all weights are on one side of 0",
    "step-ratio": "{kind} by the ranges of the groups; on a sample zero points gain {gain} dB and "
    "cost {cost} dB",
    "sample": "{kind}, since zero points gain {gain} dB and cost {cost} dB",
}


def _span(figures: Sequence[float | None], digits: int) -> str:
    """The least and the greatest of some figures."""
    low, high = (f"{end(f or 0.0 for f in figures):.{digits}f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"
