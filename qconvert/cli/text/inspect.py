"""What `inspect` found, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qconvert.cli.text.pieces import bar, number, table_lines
from qconvert.errors import printable
from qconvert.quantities import duration, shape_text, size
from qconvert.report import CurvePoint, Histogram, InspectReport, SizeCurve, TensorSummary

CURVE_BAR = 16  # characters


def inspect_text(r: InspectReport) -> Iterator[str]:
    yield f"{printable(r.path)} ({r.kind})\n\n"
    if r.curve:
        yield from _curve_lines(r.curve)
        yield f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
        return
    columns = [("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("size", "right")]
    if r.statistics:
        yield from table_lines(columns + STATISTICS, r.tensors, _statistics_row)
    else:
        yield from table_lines(columns, r.tensors, _header_row)
    yield f"\n{len(r.tensors)} of {r.total_tensors} tensors shown; the file has "
    yield f"{r.total_values:,} values in {size(r.total_bytes)}\n"
    for note in r.notes:
        yield f"notes      {printable(note)}\n"
    for t in r.tensors:
        if t.histogram:
            yield f"\n{histogram_text(t, t.histogram)}"
    if r.statistics:
        yield f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"


def _curve_lines(c: SizeCurve) -> Iterator[str]:
    """Size against loss, with a bar by powers of ten of the loss."""
    yield f"files in {c.container} and what they are predicted to lose\n\n"
    losses = [math.log10(p.kl) for p in c.points if p.kl > 0]
    low, high = (min(losses), max(losses)) if losses else (0.0, 0.0)

    def row(p: CurvePoint) -> Sequence[str]:
        share = (math.log10(p.kl) - low) / (high - low) if p.kl > 0 and high > low else 0.0
        mostly = ", ".join(f"{count} {name}" for name, count in list(p.schemes.items())[:2])
        return f"{p.bits:.2f}", size(p.nbytes), number(p.kl, 3), bar(share, CURVE_BAR), mostly

    columns = [("bits", "right"), ("size", "right"), ("KL, nats", "right")]
    columns += [("powers of ten", "left"), ("mostly", "left")]
    yield from table_lines(columns, c.points, row)
    yield "\nKL is the divergence of next tokens from those of the original: losses are predicted\n"
    yield "for codes rounded to nearest, to second order, which is too little below 3.5 bits.\n"
    for mark, bits in c.smallest.items():
        told = f"{bits:.2f} bits: --target-bpw {bits:.2f}" if bits else "nothing here"
        yield f"at most {mark} nats: {told}\n"
    yield "presets    " + ", ".join(f"{name} {bits:g}" for name, bits in c.presets.items()) + "\n"


def _header_row(t: TensorSummary) -> Sequence[str]:
    return t.name, shape_text(t.shape), t.dtype, size(t.nbytes)


def _statistics_row(t: TensorSummary) -> Sequence[str]:
    figures = (t.minimum, t.maximum, t.mean, t.std, t.absmax, t.kurtosis)
    return (
        *_header_row(t),
        *(number(v, 3) for v in figures),
        "-" if t.outlier_share is None else f"{100 * t.outlier_share:.3g}%",
        "-" if t.zeros is None else f"{t.zeros:,}",
        "-" if t.nonfinite is None else f"{t.nonfinite:,}",
        t.suggestion or "-",
        t.suggestion_reason or "-",
    )


STATISTICS = [
    *((name, "right") for name in ("min", "max", "mean", "std", "absmax", "kurtosis")),
    *((name, "right") for name in ("outliers", "zeros", "bad")),
    ("suggested", "left"),
    ("why", "left"),
]


def histogram_text(t: TensorSummary, h: Histogram) -> str:
    """Counts per bin with a linear and a logarithmic bar."""
    width = 30
    top = max(h.counts) or 1
    step = (h.high - h.low) / len(h.counts)
    lines = [f"{printable(t.name)}  {shape_text(t.shape)} {t.dtype}\n"]
    lines.append(f"{'from':>12} {'count':>13}  {'linear':<{width}}  logarithmic\n")
    for i, count in enumerate(h.counts):
        linear = bar(count / top, width)
        log = bar(math.log1p(count) / math.log1p(top), width)
        lines.append(f"{h.low + i * step:>12.4g} {count:>13,}  {linear:<{width}}  {log}\n")
    lines.append(f"{h.high:>12.4g}\n")
    return "".join(lines)
