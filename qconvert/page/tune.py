"""The page of `tune`."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.page.parts import Cell, Column, Fact, Finding, Page, number, table_of, warned
from qconvert.quantities import counted, size
from qconvert.report import JudgedModel, TuneReport, TuningStep

MODELS = [
    Column("model"),
    Column("divergence", "number", "mean of next tokens from the teacher, in nats"),
    Column("its standard error", "number"),
    Column("perplexity", "number", "of the text that judges"),
    Column("its standard error", "number"),
]
EMBEDDED = [
    Column("model"),
    Column("cosine", "number", "mean, of its embedding of a sentence and the float model's"),
    Column("its standard error", "number"),
]
COURSE = [
    Column("step", "number"),
    Column("loss", "number", "of the step's own windows"),
    Column("validation", "number", "the same of windows that were not trained on"),
]


def tune_page(r: TuneReport) -> Page:
    """What was gained over quantization without training."""
    facts = [
        Fact("file", size(r.output_bytes) if r.written else "none", f"that of {r.chosen}"),
        Fact("scheme", r.scheme, f"activations {r.activations}"),
        Fact("steps", f"{r.steps_run} of {r.steps}", r.stopped),
        Fact("gain", f"{r.gain:.3g} {r.unit}", f"standard error {r.gain_error:.2g}"),
    ]

    def model(m: JudgedModel) -> Sequence[Cell]:
        if r.loss == "cosine":
            return [Cell(m.model), number(m.cosine_mean, 7), number(m.cosine_mean_error)]
        figures = m.kl_mean, m.kl_mean_error, m.perplexity, m.perplexity_error
        return [Cell(m.model), *(number(n) for n in figures)]

    def step(s: TuningStep) -> Sequence[Cell]:
        return [number(s.step, 9), number(s.loss), number(s.validation)]

    columns = EMBEDDED if r.loss == "cosine" else MODELS
    return Page(
        command="tune",
        title=r.output,
        status="done" if r.status == "pass" else "fail",
        verdict=f"{r.chosen}, after {counted(r.steps_run, 'step')} on {r.text}",
        findings=[*warned(r.warnings), *(Finding("note", note) for note in r.notes)],
        facts=facts,
        tables=[
            table_of("Models", columns, r.models, model, "the first"),
            table_of("Validations", COURSE, r.course, step, "the first"),
        ],
        closing=[Fact("source", r.source), Fact("loss", r.loss), Fact("seed", str(r.seed))],
    )
