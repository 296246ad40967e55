"""What `verify` found, for people."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from qconvert.cli.text.pieces import (
    WORST_SHOWN,
    decibels,
    fitted,
    in_decibels,
    number,
    table,
    wrapped,
)
from qconvert.errors import LINE, printable
from qconvert.quantities import counted, duration
from qconvert.report import (
    EmbeddingQuality,
    Execution,
    LlamaCppRun,
    TokenQuality,
    Verdict,
    VerifiedTensor,
    VerifyReport,
)

CHECK = " " * 6  # below the name of a check, where its line goes on


def verify_text(r: VerifyReport) -> str:
    if r.verdict and r.verdict.other_model:
        return _headline(r)
    marks = {"pass": "ok  ", "fail": "FAIL", "skip": "skip"}
    lines = []
    for c in r.checks:
        figures = "" if c.worst is None else f": {number(c.worst)} (limit {number(c.limit)})"
        where = f"  [{printable(c.tensor)}]" if c.tensor else ""
        line = f"{marks[c.status]}  {c.id:<15} {printable(c.detail)}{figures}{where}"
        lines.append(wrapped(line, CHECK) + "\n")
    lossy = [t for t in r.tensors if t.sqnr_db is not None]
    if lossy:
        count = counted(len(lossy), "tensor")
        lines.append(f"\nSQNR       {in_decibels(r.sqnr_db)} overall, {count}\n")
        lines.append(_classes(r.verdict))
    failing = sorted((t for t in r.tensors if t.fails), key=_worse)
    good = sorted((t for t in lossy if not t.fails), key=lambda t: t.sqnr_db or 0.0)
    shown = [*failing, *good[: max(WORST_SHOWN - len(failing), 0)]]
    if shown:
        lines.append(_verified_table(shown, failing=bool(failing)))
    lines += _remedies(r, failing)
    lines += [f"outlier    {printable(str(o), LINE)}\n" for o in r.outliers[:WORST_SHOWN]]
    if len(r.outliers) > WORST_SHOWN:
        lines.append(f"           and {len(r.outliers) - WORST_SHOWN} more, see --json\n")
    if r.against:
        lines += _outputs_text(r.tensors)
    if r.token_quality:
        lines.append(_token_quality(r.token_quality))
    if r.llama_cpp:
        lines.append(_llama_cpp(r.llama_cpp))
    if r.embedding_quality:
        lines.append(_embedding_quality(r.embedding_quality))
    lines.append(f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n")
    return fitted("".join(lines)) + _headline(r)


def _headline(r: VerifyReport) -> str:
    """The verdict: one line where a script may read it, wrapped where a person does."""
    told = printable(r.headline, LINE)
    return (wrapped(told, " " * 6) if sys.stdout.isatty() else told) + "\n"


def _classes(v: Verdict | None) -> str:
    """SQNR of each class of tensors."""
    if v is None or not v.class_db:
        return ""
    told = ", ".join(f"{of} {in_decibels(db)}" for of, db in v.class_db.items())
    return f"classes    {told}\n"


def _remedies(r: VerifyReport, failing: Sequence[VerifiedTensor]) -> list[str]:
    """Options of `quantize` to paste, the worst tensor first."""
    options = r.mending(failing)
    if not options:
        return []
    head = "\nTo mend it, quantize again with\n"
    return [head, *(f"  {printable(option, LINE)}\n" for option in options), "\n"]


def _verified_table(tensors: Sequence[VerifiedTensor], failing: bool) -> str:
    """Figures of some tensors, and which checks they fail if any does."""
    rows = [
        (
            t.name,
            t.stored,
            decibels(t.sqnr_db) if t.max_error is not None else "-",
            number(t.max_error),
            number(t.worst_step),
            "-" if t.output_sqnr_db is None and t.inputs is None else _output_cell(t),
            t.inputs or "-",
            *((", ".join(t.fails) or "-",) if failing else ()),
        )
        for t in tensors
    ]
    columns = [("worst tensors", "left"), ("stored", "left"), ("SQNR dB", "right")]
    columns += [("max error", "right"), ("in steps", "right"), ("product SQNR dB", "right")]
    columns.append(("inputs", "left"))
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


def _llama_cpp(run: LlamaCppRun) -> str:
    alike = (
        f"smallest cosine {run.cosine_min:.5f}"
        if run.cosine_min is not None
        else f"same top token after {100 * (run.same_top or 0):.0f} %, {run.kl_mean:.2g} nats"
    )
    return (
        f"llama.cpp  {run.tokens} tokens, {run.outputs} within {run.largest_difference:.2g} of "
        f"transformers' largest\n           on the same weights; {alike}\n"
    )


def _execution(e: Execution) -> str:
    counts = (
        (e.static_layers, "layers in integers with static activations"),
        (e.dynamic_layers, "layers in integers with dynamic activations"),
        (e.float_layers, "quantized layers in float"),
        (e.dequantized_tensors, "tensors dequantized"),
    )
    where = "" if e.device == "cpu" else f", on {e.device}"
    told = ", ".join(f"{count} {what}" for count, what in counts if count) or "nothing quantized"
    return told + where


def _worse(t: VerifiedTensor) -> float:
    """What a tensor fails by, in dB: its weights, or where these are good enough its product."""
    of_product = t.fails == ["min-output-sqnr"]
    found = t.output_sqnr_db if of_product else t.sqnr_db
    return math.inf if found is None else found
