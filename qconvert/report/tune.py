"""What `tune` did, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report


@dataclass(slots=True)
class TuningStep:
    """A step after which the validation windows were run.

    Attributes:
        step: 0 for before the first.
        loss: mean of a token of the step's own windows, in nats; None before the first step.
        validation: the same of the validation windows.
    """

    step: int
    loss: float | None
    validation: float


@dataclass(slots=True)
class TunedBlock:
    """A block that was trained by itself.

    Attributes:
        before_db, after_db: SQNR of the hidden states behind it, against those that the float model
            has there, before it was trained and after; None where they are equal.
        warning: what went wrong, if anything did; the block is as it was then.
    """

    before_db: float | None
    after_db: float | None
    warning: str | None = None


@dataclass(slots=True)
class JudgedModel:
    """A model on the windows that neither trained nor chose a state.

    Attributes:
        model: ``float``, the model as it is; ``nearest``, the same scheme without training, codes
            rounded to the nearest; ``compensated``, what ``quantize --calibration`` makes;
            ``quantized``, a quantized file as it was; ``tuned``.
        kl_mean, kl_mean_error: mean divergence of next tokens from the teacher, which is the model
            as it was where no other is given, in nats, and its standard error.
        perplexity, perplexity_error: of the text, and its standard error.
        cosine_mean, cosine_mean_error: of an encoder, in place of these: mean cosine of its
            embedding of a sentence and that of the float model, and its standard error.
    """

    model: str
    kl_mean: float | None = None
    kl_mean_error: float | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None
    cosine_mean: float | None = None
    cosine_mean_error: float | None = None


@dataclass(repr=False)
class TuneReport(Report):
    """Result of ``tune``.

    Attributes:
        loss: ``distill``, divergence from the teacher, or ``lm``, next tokens of the text,
            ``cosine``, 1 less that of the embeddings of an encoder, which are means of its last
            hidden states over a sentence.
        trained: ``weights``, ``scales``, ``norms`` or ``all``.
        trained_tensors: how many tensors were.
        began_compensated: how many began with the codes of ``compensated``, on their grid.
        device: of torch, where the models were.
        steps: asked for; ``steps_run`` were, ``step`` is the one whose state was kept, 0 for none.
        stopped: why no more steps were run.
        rate: of the weights, as asked for; None where it follows from each tensor's rounding error.
        training_windows, validation_windows, judging_windows: of ``seqlen`` tokens, that steps were
            made by, that chose the state, and that judged it.
        generated_windows: those to train on that the model which is learned from wrote itself. With
            a calibration such windows choose and judge, and all of the text's are trained on.
        memory_bytes: what was reckoned with, from the shapes of the model.
        state_bytes: size of what a run leaves beside the output until it is finished.
        resumed_at: steps that an interrupted run had done; None without ``--resume``.
        block_steps: of each block, before the steps end to end; 0 for none.
        block_bytes: memory that a block takes while it is trained, besides the models.
        blocks: that were trained.
        began: whether the steps began with the ``blocks``, or, where that predicts better,
            ``untrained``, with what quantization alone gives.
        course: the validations.
        models: how good each is on the judging windows.
        gain, gain_error: by how much the loss of the tuned model is below that of the better
            post-training one on the judging windows, in nats a token, token by token, or in
            cosine, sentence by sentence, and its standard error.
        chosen: whose the written file is, of ``models``.
        written: whether the output is there; not where a warning under ``--strict`` took it back.
    """

    SCHEMA: ClassVar[str] = "qconvert.tune/1"

    source: str
    output: str
    container: str
    scheme: str
    text: str
    loss: str
    teacher: str | None
    calibration: str | None
    trained: str
    activations: str
    device: str
    steps: int
    rate: float | None
    seqlen: int
    batch: int
    seed: int
    training_windows: int
    validation_windows: int
    judging_windows: int
    memory_bytes: int
    generated_windows: int = 0
    block_steps: int = 0
    block_bytes: int = 0
    blocks: list[TunedBlock] = field(default_factory=list)
    began: str = ""
    state_bytes: int = 0
    resumed_at: int | None = None
    trained_tensors: int = 0
    began_compensated: int = 0
    steps_run: int = 0
    step: int = 0
    stopped: str = ""
    course: list[TuningStep] = field(default_factory=list)
    models: list[JudgedModel] = field(default_factory=list)
    gain: float = 0.0
    gain_error: float = 0.0
    chosen: str = ""
    output_bytes: int = 0
    model_bits_per_weight: float | None = None
    written: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Of the loss and the gain."""
        return "of cosine" if self.loss == "cosine" else "nats a token"

    def _said(self) -> Iterator[str]:
        yield repr(self.output) if self.written else f"{self.output!r} not written"
        yield f"{self.scheme}, {self.chosen} after {counted(self.steps_run, 'step')}"
        yield f"{self.output_bytes:,} bytes"
