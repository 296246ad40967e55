"""Reports to text for people or JSON for machines. rich only lays out tables; in a pipe the text
is plain.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

from qconvert.cli.exits import ExitCode
from qconvert.cli.progress import make_progress, size
from qconvert.errors import printable
from qconvert.files.atomic import AtomicOutput
from qconvert.report import (
    BenchReport,
    CalibrateReport,
    EmbeddingQuality,
    Execution,
    Histogram,
    InspectReport,
    QuantizedTensor,
    QuantizeReport,
    Report,
    TensorSummary,
    TokenQuality,
    VerifiedTensor,
    VerifyReport,
    dump,
)

R = TypeVar("R", bound=Report)
NOTES_SHOWN = 3
WORST_SHOWN = 5
FLEXIBLE_WIDTH = 24  # what names and reasons are cut to at most
COLUMN_GAP = 3
PIPE_WIDTH = 20_000  # more than any table: nothing is cut in a log


class Emitter:
    """Puts a report where the user wants it and turns its status into an exit code.

    Entered before the long work, so that a report file that cannot be written is found out at once.
    ``inputs`` are files that the report must not replace.
    """

    def __init__(
        self,
        json: bool,
        report: Path | None,
        force: bool,
        quiet: bool,
        strict: bool,
        inputs: Sequence[Path],
    ) -> None:
        self.json = json
        self.quiet = quiet
        self.strict = strict
        self.progress = make_progress(quiet)
        self.file = AtomicOutput(report, overwrite=force, inputs=inputs) if report else None

    def emit(self, report: R, text: Callable[[R], str]) -> int:
        if self.strict and report.warnings and report.status == "pass":
            report.status = "fail"
        document = dump(report.to_json())
        if self.file:
            self.file.write_at(0, document.encode())
            self.file.commit()
        if not self.quiet:
            for warning in report.warnings:
                print(f"warning: {printable(warning)}", file=sys.stderr)
        if not write_stdout(document if self.json else text(report)):
            return ExitCode.READER_GONE
        return ExitCode.DONE if report.status == "pass" else ExitCode.NO

    def __enter__(self) -> Emitter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.progress.end()  # or an error would leave the terminal without its cursor
        if self.file:
            self.file.__exit__(kind, error, tb)


def write_stdout(text: str) -> bool:
    """Write to stdout; False when its reader has gone (Typer would take the error for its own)."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        return False
    return True


def abandon_stdout() -> None:
    """Let stdout end in nothing: the interpreter flushes it at exit and would complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- pieces ---------------------------------------------------------------------------------------


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> str:
    """A table as text; ``columns`` are (heading, "left" or "right").

    On a narrow terminal the first column and the one headed "why" are cut; figures never are.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    full = [max([len(h), *(len(row[i]) for row in cells)]) for i, (h, _) in enumerate(columns)]
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    room = terminal - sum(full) - COLUMN_GAP * len(full)
    for i, (heading, _) in reversed(list(enumerate(columns))):
        if i == 0 or heading == "why":
            kept = min(full[i], max(FLEXIBLE_WIDTH, full[i] + min(room, 0)))
            room += full[i] - kept
            full[i] = kept
    grid = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for (heading, justify), width in zip(columns, full, strict=True):
        side: Literal["left", "right"] = "right" if justify == "right" else "left"
        grid.add_column(Text(heading), justify=side, no_wrap=True, width=width)
    for name, *rest in cells:
        # The end of a tensor's name tells more than its beginning.
        short = name if len(name) <= full[0] else "…" + name[1 - full[0] :]
        grid.add_row(Text(short), *(Text(cell) for cell in rest))
    out = io.StringIO()
    width = sum(full) + COLUMN_GAP * len(full)
    Console(file=out, width=width, no_color=True, highlight=False).print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape) if shape else "scalar"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _next(command: str) -> str:
    return f"next: {command}\n" if sys.stdout.isatty() else ""


# --- quantize -------------------------------------------------------------------------------------


def quantize_text(r: QuantizeReport) -> str:
    lines = []
    if r.dry_run:
        lines.append(_plan_table(r.tensors))
    quantized = [t for t in r.tensors if t.quantized]
    kept = [t for t in r.tensors if not t.quantized]
    written = " (dry run: nothing written)" if r.dry_run else ""
    lines.append(f"{printable(r.source)} -> {printable(r.output)}{written}\n")
    lines.append(f"quantized  {_count(quantized)}: {_tally(t.stored for t in quantized)}\n")
    lines.append(f"kept       {_count(kept)}: {_tally(t.reason for t in kept)}\n")
    ratio = r.output_bytes / r.source_bytes if r.source_bytes else 0.0
    about = "about " if r.dry_run else ""
    sizes = f"{size(r.source_bytes)} -> {about}{size(r.output_bytes)}"
    lines.append(f"size       {sizes} ({100 * ratio:.1f} %)\n")
    for i, note in enumerate(r.notes[:NOTES_SHOWN]):
        lines.append(f"{'notes      ' if i == 0 else '           '}{printable(note)}\n")
    if len(r.notes) > NOTES_SHOWN:
        lines.append(f"           and {len(r.notes) - NOTES_SHOWN} more, see --json\n")
    if r.files > 1:
        lines.append(f"files      {r.files}\n")
    if r.companions:
        lines.append(f"carried    {r.companions} files of the model (config, tokenizer, ...)\n")
    bits = number(r.quantized_bits_per_weight), number(r.model_bits_per_weight)
    lines.append(f"bits       {bits[0]} per quantized weight, {bits[1]} over the whole model\n")
    if not r.dry_run and quantized:
        lines.append(f"SQNR       {decibels(r.sqnr_db)} dB overall\n")
        lossy = sorted(
            (t for t in quantized if t.sqnr_db is not None), key=lambda t: t.sqnr_db or 0.0
        )
        for i, t in enumerate(lossy[:WORST_SHOWN]):
            label = "worst      " if i == 0 else "           "
            output = f" ({decibels(t.weighted_sqnr_db)} output-weighted)" if t.weighted else ""
            lines.append(
                f"{label}{decibels(t.sqnr_db)} dB{output}  {printable(t.name)}  {t.stored}\n"
            )
    if weighted := [t for t in quantized if t.weighted]:
        lines.append(
            f"weighted   {_count(weighted)} by the mean squares of their inputs, "
            f"{_count(quantized[len(weighted) :])} not\n"
        )
    lines.append(
        f"range      {r.range}\nkernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
    )
    if not r.dry_run:
        lines.append(
            _next(f"qconvert verify {printable(r.output)} --against {printable(r.source)}")
        )
    return "".join(lines)


def _count(tensors: Sequence[QuantizedTensor]) -> str:
    return f"{len(tensors)} tensors"


def _tally(words: Iterable[str]) -> str:
    counted = Counter(words).most_common()
    return ", ".join(f"{n} {printable(word)}" for word, n in counted) or "none"


def _plan_table(tensors: Sequence[QuantizedTensor]) -> str:
    rows = [
        (t.name, shape_text(t.shape), t.source_dtype, t.stored, number(t.bits_per_weight), t.reason)
        for t in tensors
    ]
    columns = [
        ("tensor", "left"),
        ("shape", "right"),
        ("from", "left"),
        ("to", "left"),
        ("bits", "right"),
        ("why", "left"),
    ]
    return table(columns, rows) + "\n"


# --- inspect --------------------------------------------------------------------------------------


def inspect_text(r: InspectReport) -> str:
    parts = [f"{printable(r.path)} ({r.kind})\n\n"]
    parts.append(_statistics_table(r.tensors) if r.statistics else _header_table(r.tensors))
    parts.append(f"\n{len(r.tensors)} of {r.total_tensors} tensors shown; the file has ")
    parts.append(f"{r.total_values:,} values in {size(r.total_bytes)}\n")
    for t in r.tensors:
        if t.histogram:
            parts.append(f"\n{histogram_text(t, t.histogram)}")
    parts.append(
        f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n" if r.statistics else ""
    )
    return "".join(parts)


def _header_table(tensors: Sequence[TensorSummary]) -> str:
    rows = [(t.name, shape_text(t.shape), t.dtype, size(t.nbytes)) for t in tensors]
    return table(
        [("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("size", "right")], rows
    )


def _statistics_table(tensors: Sequence[TensorSummary]) -> str:
    columns = [("tensor", "left"), ("shape", "right"), ("dtype", "left"), ("size", "right")]
    columns += [
        (name, "right")
        for name in ("min", "max", "mean", "std", "absmax", "kurtosis", "outliers", "zeros", "bad")
    ]
    columns += [("suggested", "left"), ("why", "left")]
    rows = []
    for t in tensors:
        share = "-" if t.outlier_share is None else f"{100 * t.outlier_share:.3g}%"
        rows.append(
            (
                t.name,
                shape_text(t.shape),
                t.dtype,
                size(t.nbytes),
                *(
                    number(v, 3)
                    for v in (t.minimum, t.maximum, t.mean, t.std, t.absmax, t.kurtosis)
                ),
                share,
                "-" if t.zeros is None else f"{t.zeros:,}",
                "-" if t.nonfinite is None else f"{t.nonfinite:,}",
                t.suggestion or "-",
                t.suggestion_reason or "-",
            )
        )
    return table(columns, rows)


EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int) -> str:
    """A bar of ``share`` of ``width`` characters, to an eighth of one; at least a sliver above
    0.
    """
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(eighths, 1)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")


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


# --- calibrate, verify, bench ---------------------------------------------------------------------


def calibrate_text(r: CalibrateReport) -> str:
    rows = [
        (
            layer.name,
            f"{layer.samples:,}",
            f"{layer.features:,}",
            number(layer.low),
            number(layer.high),
            number(layer.scale),
            str(layer.zero_point),
            number(layer.channel_absmax_ratio, 3),
        )
        for layer in r.layers
    ]
    columns = [("layer", "left")] + [
        (name, "right")
        for name in (
            "samples",
            "features",
            "low",
            "high",
            "scale",
            "zero point",
            "widest/median channel",
        )
    ]
    return (
        table(columns, rows)
        + f"\n{len(r.layers)} layers, observer {r.observer} -> {printable(r.output)}\n"
        + _text_lines(r)
        + f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
        + _next(f"qconvert quantize MODEL --scheme q8_channel --calibration {printable(r.output)}")
    )


def _text_lines(r: CalibrateReport) -> str:
    """What a run over text has to say besides its layers."""
    lines = []
    if r.chunks is not None:
        went_on = f", resumed after {r.resumed_at:,}" if r.resumed_at else ""
        lines.append(f"text       {r.tokens:,} tokens in {r.chunks:,} pieces{went_on}\n")
    lines += [f"no token   {printable(name)}\n" for name in r.unreached]
    for what, path in (("imatrix", r.imatrix), ("record", r.record)):
        if path:
            lines.append(f"{what:<10} {printable(path)}\n")
    return "".join(lines)


def verify_text(r: VerifyReport) -> str:
    marks = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}
    lines = []
    for c in r.checks:
        figures = "" if c.worst is None else f": {number(c.worst)} (limit {number(c.limit)})"
        where = f"  [{printable(c.tensor)}]" if c.tensor else ""
        lines.append(f"{marks[c.status]}  {c.id:<15} {printable(c.detail)}{figures}{where}\n")
    lossy = sorted((t for t in r.tensors if t.sqnr_db is not None), key=_worse)
    outputs = [t for t in r.tensors if t.output_sqnr_db is not None]
    if lossy:
        lines.append(f"\nSQNR       {decibels(r.sqnr_db)} dB overall, {len(lossy)} tensors\n")
        rows = [
            (
                t.name,
                t.stored,
                decibels(t.sqnr_db),
                number(t.max_error),
                number(t.worst_step),
                "-" if t.integer_exact is None else decibels(t.output_sqnr_db),
                t.activations or "-",
            )
            for t in lossy[:WORST_SHOWN]
        ]
        columns = [
            ("worst tensors", "left"),
            ("stored", "left"),
            ("SQNR dB", "right"),
            ("max error", "right"),
        ]
        columns += [("in steps", "right"), ("output SQNR dB", "right"), ("activations", "left")]
        lines.append(table(columns, rows))
    if outputs:
        mean = sum(t.output_sqnr_db or 0.0 for t in outputs) / len(outputs)
        lines.append(
            f"output     {mean:.2f} dB mean SQNR of the integer product against the float product\n"
        )
    if r.token_quality:
        lines.append(_token_quality(r.token_quality))
    if r.embedding_quality:
        lines.append(_embedding_quality(r.embedding_quality))
    lines.append(f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n")
    lines.append(f"verdict    {r.status}\n")
    return "".join(lines)


def _token_quality(q: TokenQuality) -> str:
    which = "" if q.scoring == "all" else f", {q.scoring}"
    return (
        f"text       {q.tokens:,} tokens in {q.windows:,} windows of {q.seqlen:,}{which}; "
        f"{_execution(q.execution)}\n"
        f"perplexity {q.source_perplexity:.4f} ± {q.source_perplexity_error:.4f} of the source, "
        f"{q.perplexity:.4f} ± {q.perplexity_error:.4f} quantized: "
        f"{100 * q.perplexity_increase:+.3f} % ± {100 * q.perplexity_increase_error:.3f}\n"
        f"divergence {q.kl_mean:.3g} ± {q.kl_mean_error:.1g} nats mean, {q.kl_p99:.3g} 99th "
        f"percentile, {q.kl_max:.3g} largest\n"
        f"same top   {100 * q.same_top:.2f} % of tokens\n"
    )


def _embedding_quality(q: EmbeddingQuality) -> str:
    return (
        f"text       {q.sentences:,} sentences, {q.tokens:,} tokens; {_execution(q.execution)}\n"
        f"cosine     {q.cosine_mean:.5f} mean, {q.cosine_p1:.5f} first percentile, "
        f"{q.cosine_min:.5f} smallest\n"
    )


def _execution(e: Execution) -> str:
    counts = (
        (e.static_layers, "layers in integers with static activations"),
        (e.dynamic_layers, "layers in integers with dynamic activations"),
        (e.float_layers, "quantized layers in float"),
        (e.dequantized_tensors, "tensors dequantized"),
    )
    return ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing quantized"


def _worse(t: VerifiedTensor) -> float:
    """The lower of a tensor's two figures, in dB."""
    return min(f for f in (t.sqnr_db, t.output_sqnr_db, math.inf) if f is not None)


def bench_text(r: BenchReport) -> str:
    parts = [f"{r.machine}; {r.threads} threads, medians of {r.runs} runs that took turns\n"]
    sections = dict.fromkeys([m.section for m in r.measurements] + [s.section for s in r.skipped])
    for section in sections:
        rows = []
        for m in (m for m in r.measurements if m.section == section):
            figures = (f"{1000 * m.seconds:.4g} ms", f"{m.rate:.4g} {m.unit}")
            head = (m.name, *figures, number(m.gigabytes_per_second, 3))
            ratios = [(f"{number(x, 3)} x", name) for name, x in m.ratios.items()] or [("", "")]
            rows += [(*(head if i == 0 else ("",) * 4), *x) for i, x in enumerate(ratios)]
        columns = [(section, "left"), ("median", "right"), ("rate", "right"), ("GB/s", "right")]
        parts.append("\n" + table([*columns, ("speed", "right"), ("of", "left")], rows))
        parts += [
            f"skipped    {printable(s.name)}: {printable(s.reason)}\n"
            for s in r.skipped
            if s.section == section
        ]
    return "".join(parts) + f"\nkernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
