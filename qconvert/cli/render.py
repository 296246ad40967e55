"""Reports to text for people or JSON for machines."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar
from unicodedata import combining, east_asian_width

from qconvert.cli.exits import ExitCode
from qconvert.cli.progress import make_progress, size
from qconvert.cli.streams import tell, write_stdout
from qconvert.errors import printable
from qconvert.files.atomic import AtomicOutput
from qconvert.report import (
    BenchReport,
    CalibratedFisher,
    CalibrateReport,
    CurvePoint,
    EmbeddingQuality,
    Equalisation,
    Execution,
    Finetuning,
    Histogram,
    InspectReport,
    Prediction,
    QuantizedTensor,
    QuantizeReport,
    Report,
    SizeCurve,
    TensorSummary,
    TokenQuality,
    VerifiedTensor,
    VerifyReport,
)

R = TypeVar("R", bound=Report)
T = TypeVar("T")
NOTES_SHOWN = 3
WORST_SHOWN = 5
FAILING_SHOWN = 20
FLEXIBLE_WIDTH = 24  # what names and reasons are cut to at most
COLUMN_GAP = 3
CURVE_BAR = 16  # characters
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

    def emit(self, report: R, text: Callable[[R], str | Iterable[str]]) -> int:
        if self.file:
            at = 0
            for part in report.json_parts():
                self.file.write_at(at, part.encode())
                at += len(part)
            self.file.commit()
        if not self.quiet:
            for warning in report.warnings:
                tell(f"warning: {warning}")
        if self.strict and report.warnings:
            # Quiet or not: an exit code of 1 without a word would leave a script in the dark.
            told = f": {report.warnings[0]}" if self.quiet else ""
            count = len(report.warnings)
            which = "a warning is a failure" if count == 1 else f"{count} warnings are a failure"
            tell(f"failed: under --strict {which}{told}")
        parts = report.json_parts() if self.json else text(report)
        if not write_stdout(parts):
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


# --- pieces ---------------------------------------------------------------------------------------


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; see `table_lines`."""
    return "".join(table_lines(columns, rows, lambda row: row))


def table_lines(
    columns: Sequence[tuple[str, str]], items: Sequence[T], row: Callable[[T], Sequence[str]]
) -> Iterator[str]:
    """A table line by line; ``columns`` are (heading, "left" or "right").

    On a narrow terminal the first column and the one headed "why" are cut; figures never are.

    Args:
        items: what the rows are of; there may be hundreds of thousands.
        row: the cells of one of them; asked for twice, so that not all have to be kept.
    """
    headings = [heading for heading, _ in columns]
    full = [len(heading) for heading in headings]
    for item in items:
        cells = _cells(row(item))
        widths = map(len if _is_plain(cells) else _width, cells)
        full = [max(pair) for pair in zip(full, widths, strict=True)]
    wanted = list(full)
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    room = terminal - sum(full) - COLUMN_GAP * len(full)
    for i, heading in reversed(list(enumerate(headings))):
        if i == 0 or heading == "why":
            kept = min(full[i], max(FLEXIBLE_WIDTH, full[i] + min(room, 0)))
            room += full[i] - kept
            full[i] = kept
    right = [justify == "right" for _, justify in columns]
    gap = " " * COLUMN_GAP
    plain = gap.join(f"{{:{'>' if r else '<'}{n}}}" for r, n in zip(right, full, strict=True))
    yield _line(headings, full, right)
    yield "─" * (sum(full) + COLUMN_GAP * (len(full) - 1)) + "\n"
    for item in items:
        cells = _cells(row(item))
        if full == wanted and _is_plain(cells):  # the same line, in one step
            yield plain.format(*cells).rstrip() + "\n"
        else:
            yield _line(cells, full, right)


def _cells(row: Sequence[str]) -> Sequence[str]:
    return [printable(cell, PIPE_WIDTH) for cell in row]


def _is_plain(cells: Sequence[str]) -> bool:
    """Whether each letter takes one column."""
    return "".join(cells).isascii()


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    parts = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        spare = width - _width(cell)
        if spare < 0:
            # The end of a tensor's name tells more than its beginning.
            cell = "…" + cell[1 - width :] if i == 0 else cell[: width - 1] + "…"
            spare = width - _width(cell)
        parts.append(" " * spare + cell if right[i] else cell + " " * spare)
    return (" " * COLUMN_GAP).join(parts).rstrip() + "\n"


def _width(text: str) -> int:
    """Columns of a terminal that the text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"


def in_decibels(value: float | None) -> str:
    """With its unit, where there is a number."""
    return decibels(value) + ("" if value is None else " dB")


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


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
    written = "" if r.written else " (nothing written)"
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
    if r.equalisation:
        lines.append(_equalisation(r.equalisation))
    if r.prediction:
        lines.append(_prediction(r.prediction))
    bits = number(r.quantized_bits_per_weight), number(r.model_bits_per_weight)
    lines.append(f"bits       {bits[0]} per quantized weight, {bits[1]} over the whole model\n")
    if not r.dry_run and quantized:
        lines.append(f"SQNR       {in_decibels(r.sqnr_db)} overall\n")
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
    if compensated := [t for t in quantized if t.rounding == "compensated"]:
        lines.append(
            f"rounding   {_count(compensated)} compensated, "
            f"{_count([t for t in quantized if t.rounding == 'nearest'])} to the nearest\n"
        )
    if r.finetuning:
        lines.append(_finetuning(r.finetuning))
    lines.append(
        f"range      {r.range}\nkernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
    )
    if not r.dry_run:
        lines.append(
            _next(f"qconvert verify {printable(r.output)} --against {printable(r.source)}")
        )
    return "".join(lines)


def _equalisation(e: Equalisation) -> str:
    """How many groups gained, and why others could not."""
    done = e.equalised
    if done:
        left = min(g.left for g in done)
        told = f"{len(done)} of {e.groups} groups of channels, by {e.basis}: errors down to "
        told += f"{number(100 * left)} % of a sample's"
    else:
        told = f"none of {e.groups} groups of channels" + ("" if e.skipped else ": none gains")
    if not e.groups and e.skipped:
        return f"equalised  nothing: {printable(e.skipped[0])}\n"
    if e.skipped:
        told += f"; {len(e.skipped)} skipped, such as {printable(e.skipped[0])}"
    return f"equalised  {told}\n"


def _prediction(p: Prediction) -> str:
    if p.kl is None:
        told = "by priors of each role, without a prediction: calibrate with --fisher for one"
    else:
        told = f"predicted divergence {p.kl:.3g} nats by the Fisher information"
    best = "no better mix" if p.optimal else "the best mix found"
    return f"budget     {p.budget}: {told}; {best} of the schemes\n"


def _finetuning(f: Finetuning) -> str:
    if f.kl is None or f.kl_before is None:
        return "tuned      nothing\n"
    told = (
        f"scales of {f.tensors} tensors by step {f.step} of {f.steps}" if f.tensors else "nothing"
    )
    gain = f"{f.kl_before:.4g} -> {f.kl:.4g} nats on {f.held_out_windows} held-out windows"
    return f"tuned      {told}: divergence {gain}\n"


def _count(tensors: Sequence[QuantizedTensor]) -> str:
    return f"{len(tensors)} tensors"


def _tally(words: Iterable[str]) -> str:
    counted = Counter(words).most_common()
    return ", ".join(f"{n} {printable(word)}" for word, n in counted) or "none"


def _plan_table(tensors: Sequence[QuantizedTensor]) -> str:
    def row(t: QuantizedTensor) -> Sequence[str]:
        bits = number(t.bits_per_weight)
        return t.name, shape_text(t.shape), t.source_dtype, t.stored, bits, t.reason

    columns = [
        ("tensor", "left"),
        ("shape", "right"),
        ("from", "left"),
        ("to", "left"),
        ("bits", "right"),
        ("why", "left"),
    ]
    return "".join(table_lines(columns, tensors, row)) + "\n"


# --- inspect --------------------------------------------------------------------------------------


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
    written = "" if r.written else " (nothing written)"
    told = (
        table(columns, rows)
        + f"\n{len(r.layers)} layers, observer {r.observer} -> {printable(r.output)}{written}\n"
        + _text_lines(r)
        + f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
    )
    if not r.written:
        return told
    name = printable(r.output)
    return told + _next(f"qconvert quantize MODEL --scheme q8_channel --calibration {name}")


def _text_lines(r: CalibrateReport) -> str:
    """What a run over text has to say besides its layers."""
    lines = []
    if r.chunks is not None:
        went_on = f", resumed after {r.resumed_at:,}" if r.resumed_at else ""
        lines.append(f"text       {r.tokens:,} tokens in {r.chunks:,} pieces{went_on}\n")
    lines += [f"no token   {printable(name)}\n" for name in r.unreached]
    if r.fisher:
        lines.append(_fisher(r.fisher))
    for what, path in (("imatrix", r.imatrix), ("record", r.record)):
        if path:
            lines.append(f"{what:<10} {printable(path)}\n")
    return "".join(lines)


def _fisher(f: CalibratedFisher) -> str:
    kept = "a block at a time" if f.blocks else "of a whole window: the blocks are not known"
    return (
        f"Fisher     of {f.matrices:,} matrices from {f.labels:,} sampled labels, seed {f.seed}\n"
        f"memory     statistics in {f.passes:,} passes over the text, activations {kept}\n"
    ) + "".join(f"no gradient of its outputs: {printable(name)}\n" for name in f.without_output)


def verify_text(r: VerifyReport) -> str:
    marks = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}
    lines = []
    for c in r.checks:
        figures = "" if c.worst is None else f": {number(c.worst)} (limit {number(c.limit)})"
        where = f"  [{printable(c.tensor)}]" if c.tensor else ""
        lines.append(f"{marks[c.status]}  {c.id:<15} {printable(c.detail)}{figures}{where}\n")
    lossy = [t for t in r.tensors if t.sqnr_db is not None]
    if lossy:
        lines.append(f"\nSQNR       {in_decibels(r.sqnr_db)} overall, {len(lossy)} tensors\n")
    failing = sorted((t for t in r.tensors if t.fails), key=_worse)
    good = sorted((t for t in lossy if not t.fails), key=_worse)
    shown = [*failing[:FAILING_SHOWN], *good[: max(WORST_SHOWN - len(failing), 0)]]
    if shown:
        lines.append(_verified_table(shown, failing=bool(failing)))
    if len(failing) > FAILING_SHOWN:
        lines.append(f"{len(failing) - FAILING_SHOWN} more tensors fail, see --json\n")
    lines += _outputs_text(r.tensors)
    if r.token_quality:
        lines.append(_token_quality(r.token_quality))
    if r.embedding_quality:
        lines.append(_embedding_quality(r.embedding_quality))
    lines.append(f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n")
    lines.append(f"verdict    {r.status}\n")
    return "".join(lines)


def _verified_table(tensors: Sequence[VerifiedTensor], failing: bool) -> str:
    """Figures of some tensors, and which checks they fail if any does."""
    rows = [
        (
            t.name,
            t.stored,
            decibels(t.sqnr_db),
            number(t.max_error),
            number(t.worst_step),
            "-" if t.output_sqnr_db is None and t.inputs is None else _output_cell(t),
            *((", ".join(t.fails) or "-",) if failing else ()),
        )
        for t in tensors
    ]
    columns = [("worst tensors", "left"), ("stored", "left"), ("SQNR dB", "right")]
    columns += [("max error", "right"), ("in steps", "right"), ("product SQNR dB", "right")]
    return table([*columns, ("fails", "left")] if failing else columns, rows)


def _output_cell(t: VerifiedTensor) -> str:
    blind = t.activations == "static" and t.inputs == "Gaussian"
    return "not known" if blind else decibels(t.output_sqnr_db)


def _outputs_text(tensors: Sequence[VerifiedTensor]) -> list[str]:
    """Mean SQNR of the products, a line for each kind of their inputs."""
    kinds: dict[tuple[str, str], list[VerifiedTensor]] = {}
    for t in tensors:
        if t.inputs and t.activations:
            kinds.setdefault((t.activations, t.inputs), []).append(t)
    lines: list[str] = []
    for (activations, inputs), found in kinds.items():
        head = "product   " if not lines else "          "
        how = "in float: their codes have no integer product"
        if activations != "float":
            how = f"{activations.replace('_', ' ')} 8-bit"
        of = f"{len(found)} tensors, {inputs} inputs, {how}"
        kind = "product" if activations == "float" else "integer product"
        known = [t.output_sqnr_db for t in found if t.output_sqnr_db is not None]
        if known:
            what = f"{sum(known) / len(known):.2f} dB mean SQNR of the {kind}"
        elif activations == "static" and inputs == "Gaussian":
            what = "exact, but its SQNR is not known without recorded inputs (--samples)"
        else:
            what = f"nothing is lost in the {kind}"
        lines.append(f"{head} {what} ({of})\n")
    return lines


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
        f"{_predicted(q)}"
        f"same top   {100 * q.same_top:.2f} % of tokens\n"
    )


def _predicted(q: TokenQuality) -> str:
    if q.kl_predicted is None:
        return ""
    return f"predicted  {q.kl_predicted:.3g} nats when the file was made\n"


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
