"""What `tune` did, for people."""

from __future__ import annotations

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import fitted, next_step, number, table_lines
from qconvert.errors import printable
from qconvert.quantities import counted, duration, size
from qconvert.report import JudgedModel, TuneReport

COURSE_SHOWN = 12  # validations


def tune_text(r: TuneReport) -> str:
    written = "" if r.written else " (nothing written)"
    of_file = r.source.lower().endswith(".qblk")
    lines = [f"{printable(r.source)} -> {printable(r.output)}{written}\n"]
    lines.append(f"trained    {r.trained}: {counted(r.trained_tensors, 'tensor')}, {r.scheme}")
    lines.append(f", activations {r.activations}\n" if r.activations != "none" else "\n")
    if r.began_compensated:
        began = counted(r.began_compensated, "tensor")
        lines.append(f"began      {began} with compensated codes on their grid\n")
    learned = "next tokens of the text"
    if r.loss == "distill":
        learned = f"divergence from {printable(r.teacher) if r.teacher else 'the float model'}"
    encoder = r.loss == "cosine"
    if encoder:
        lines.append("loss       1 - cosine of a sentence's embedding and the float model's\n")
    else:
        lines.append(f"loss       {learned}, in nats a token\n")
    what = "lines" if encoder else f"windows of {r.seqlen} tokens"
    lines.append(
        f"text       {what} of {printable(r.text)}: "
        f"{r.training_windows:,} to train on, {r.validation_windows} to choose the state by, "
        f"{r.judging_windows} to judge it\n"
    )
    if r.generated_windows:
        apart = " and all that choose and judge" if r.calibration else ""
        lines.append(
            f"generated  {counted(r.generated_windows, 'window')} more to train on{apart}, written "
            "by the model that is learned from\n"
        )
    if r.block_steps:
        ends = [number(getattr(r.blocks[-1], at)) for at in ("before_db", "after_db")]
        lines.append(
            f"blocks     {counted(r.block_steps, 'step')} for each of {len(r.blocks)}, "
            f"{size(r.block_bytes)} of memory a block; hidden states behind the last: "
            f"{' -> '.join(ends)} dB SQNR\n"
        )
    went_on = f", resumed after {r.resumed_at:,}" if r.resumed_at else ""
    each = f"{r.batch} {'lines' if encoder else 'windows'} each"
    lines.append(
        f"steps      {r.steps_run} of {r.steps}{went_on}, {each}; {r.stopped}; "
        f"the state of step {r.step} was kept\n"
    )
    shown = r.course[:: max(1, -(-len(r.course) // COURSE_SHOWN))]
    told = ", ".join(f"{v.validation:.4g} (step {v.step})" for v in shown)
    lines.append(f"validation {told}\n\n")
    names = ["cosine"] if encoder else ["divergence", "perplexity"]
    columns = [Column("model", "left")]
    columns += [Column(n, "right") for name in names for n in (name, "std error")]

    def row(m: JudgedModel) -> list[str]:
        if encoder:
            return [m.model, f"{m.cosine_mean:.6f}", number(m.cosine_mean_error)]
        figures = m.kl_mean, m.kl_mean_error, m.perplexity, m.perplexity_error
        return [m.model, *(number(n) for n in figures)]

    lines += table_lines(columns, r.models, row)
    lines.append("\n")
    if any(m.model == "tuned" for m in r.models):
        lines.append(
            f"gain       {r.gain:.3g} {r.unit}, standard error {r.gain_error:.2g}, "
            f"over {'the file as it was' if of_file else 'the best without training'}\n"
        )
    adapters = r.trained == "adapters"
    if r.written and adapters:
        lines.append(f"adapters   {size(r.output_bytes)}, as peft has them\n")
    elif r.written:
        lines.append(f"file       that of {r.chosen}: {size(r.output_bytes)}, ")
        lines.append(f"{number(r.model_bits_per_weight)} bits over the whole model\n")
    lines += [f"note       {printable(note)}\n" for note in r.notes]
    lines.append(f"memory     about {size(r.memory_bytes)} were reckoned with\n")
    lines.append(f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n")
    against = r.teacher if of_file else r.source
    if r.written and adapters and against:
        lines.append(
            next_step(
                f"qconvert quantize {printable(against)} --adapter {printable(r.output)} "
                "--adapter-only --scheme f16 -o lora.gguf"
            )
        )
    elif r.written and against:
        lines.append(
            next_step(
                f"qconvert verify {printable(r.output)} --against {printable(against)} "
                "--text OTHER-TEXT"
            )
        )
    return fitted("".join(lines))
