"""What `quantize` did, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import (
    WORST_SHOWN,
    decibels,
    fitted,
    in_decibels,
    next_step,
    number,
    table_lines,
)
from qconvert.errors import printable
from qconvert.quantities import counted, duration, shape_text, size
from qconvert.report import (
    Equalisation,
    Finetuning,
    Prediction,
    QuantizedTensor,
    QuantizeReport,
    QuantizeSetReport,
)

NOTES_SHOWN = 3


def quantize_text(r: QuantizeReport) -> str:
    lines = []
    if r.dry_run:
        lines.append(_plan_table(r.tensors))
    quantized = [t for t in r.tensors if t.quantized]
    kept = [t for t in r.tensors if not t.quantized]
    written = "" if r.written else " (nothing written)"
    lines.append(f"{printable(r.source)} -> {printable(r.output)}{written}\n")
    lines.append(f"quantized  {_count(quantized)}: {_tally(t.stored for t in quantized)}\n")
    if kept:
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
    known = r.written or r.dry_run  # what --strict took back has no figures of the whole
    if known:
        lines.append(f"bits       {bits[0]} per quantized weight, {bits[1]} over the whole model\n")
    if not r.dry_run and quantized:
        if known:
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
    gains = [(t.decision or {}).get("table_gain_db", 0.0) for t in quantized]
    if any(gains):
        lines.append(
            f"tables     {sum(map(bool, gains))} of {len(gains)} fitted to their tensors: "
            f"up to {decibels(max(gains))} dB more in a sample\n"
        )
    if r.finetuning:
        lines.append(_finetuning(r.finetuning))
    rate = f", {size(round(r.source_bytes / r.seconds))} a second" if r.seconds else ""
    lines.append(f"range      {r.range}\nkernels    {r.kernels}\n")
    lines.append(f"time       {duration(r.seconds)}{rate}\n")
    if not r.dry_run:
        lines.append(
            next_step(f"qconvert verify {printable(r.output)} --against {printable(r.source)}")
        )
    return fitted("".join(lines))


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
        if p.kl_nearest is not None:
            told += f", {p.kl_nearest:.3g} if rounded to nearest"
    best = "no better mix" if p.optimal else "the best mix found"
    return f"budget     {p.budget}: {told}; {best} of the schemes\n"


def _finetuning(f: Finetuning) -> str:
    if f.kl is None or f.kl_before is None:
        return "tuned      nothing\n"
    what = [f"scales of {f.tensors} tensors"] * bool(f.tensors)
    what += [f"gains of {f.norms} norms"] * bool(f.norms)
    told = f"{' and '.join(what)} by step {f.step} of {f.steps}" if what else "nothing"
    gain = f"{f.kl_before:.4g} -> {f.kl:.4g} nats on {f.held_out_windows} held-out windows"
    return f"tuned      {told}: divergence {gain}\n"


def _count(tensors: Sequence[QuantizedTensor]) -> str:
    return counted(len(tensors), "tensor")


def _tally(words: Iterable[str]) -> str:
    counted = Counter(words).most_common()
    return ", ".join(f"{n} {printable(word)}" for word, n in counted) or "none"


def _plan_table(tensors: Sequence[QuantizedTensor]) -> str:
    def row(t: QuantizedTensor) -> Sequence[str]:
        bits = number(t.bits_per_weight)
        return t.name, shape_text(t.shape), t.source_dtype, t.stored, bits, t.reason

    columns = [
        Column("tensor", "left"),
        Column("shape", "right", keep=3),
        Column("from", "left", keep=2),
        Column("to", "left", keep=8),
        Column("bits", "right", keep=4),
        Column("why", "left", keep=6),
    ]
    return "".join(table_lines(columns, tensors, row)) + "\n"


def quantize_set_text(r: QuantizeSetReport) -> str:
    """The text of each scheme, with an empty line between them."""
    return "\n".join(map(quantize_text, r.reports))
