"""What the stages found, as data; `to_json` gives the documented objects of ``--json``.

A report has no clock and no host in it, and paths as they were given, so that two runs compare
equal; ``bench`` is the exception.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Self

from qconvert import __version__
from qconvert.errors import QconvertError, shortened

PART_PIECES = 1 << 14  # words and signs of a document that are written at a time
LONGEST_FACT = 4096  # characters of a path, name or hint in an error: as long as a path may be


@dataclass(repr=False)
class Report:
    """Base of all reports.

    Attributes:
        status: ``pass``, ``fail`` (a promise is broken) or ``error``.
        warnings: things that a careful user wants to know; ``--strict`` makes them a failure.
    """

    SCHEMA: ClassVar[str] = ""

    kernels: str
    status: str = field(default="pass", kw_only=True)
    warnings: list[str] = field(default_factory=list, kw_only=True)
    # Wall time, for people; not part of the JSON, which is the same for the same work.
    seconds: float = field(default=0.0, kw_only=True)

    def __repr__(self) -> str:
        said = list(self._said())
        if self.warnings:
            said.append(_count(len(self.warnings), "warning"))
        return f"<{type(self).__name__} {self.status}: {', '.join(said)}>"

    def _said(self) -> Iterator[str]:
        """What a person is told of it in a line."""
        yield self.kernels

    def judged(self, strict: bool) -> Self:
        """The report itself; under ``strict`` a warning is a failure."""
        if strict and self.warnings and self.status == "pass":
            self.status = "fail"
        return self

    def to_json(self) -> dict[str, Any]:
        """The document that the command prints under ``--json``."""
        found: dict[str, Any] = json.loads("".join(self.json_parts()))
        return found

    def json_parts(self) -> Iterator[str]:
        """The document of ``--json`` in pieces: of a hundred thousand tensors it is long."""
        head = {"schema": self.SCHEMA, "qconvert": __version__, "status": self.status}
        body = _fields(self)
        for name in ("status", "seconds"):
            del body[name]
        return dump_parts({**head, **body})


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None: JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value


class _Encoder(json.JSONEncoder):
    """Dataclasses as objects, one at a time."""

    def default(self, o: Any) -> Any:
        return _fields(o) if dataclasses.is_dataclass(o) else super().default(o)


def _fields(o: Any) -> dict[str, Any]:
    return {f.name: finite(getattr(o, f.name)) for f in dataclasses.fields(o)}


def dump_parts(value: dict[str, Any]) -> Iterator[str]:
    """One JSON document in ASCII, so that no name in it can drive a terminal, and a line feed."""
    pieces = _Encoder(indent=2, allow_nan=False).iterencode(value)
    while part := "".join(islice(pieces, PART_PIECES)):
        yield part
    yield "\n"


def dump(value: dict[str, Any]) -> str:
    """`dump_parts` in one."""
    return "".join(dump_parts(value))


def error_json(error: QconvertError, exit_code: int) -> dict[str, Any]:
    """An error as the object that ``--json`` prints."""
    facts = {
        "code": error.code,
        "exit": exit_code,
        "message": str(error),
        "hint": None if error.hint is None else shortened(error.hint, LONGEST_FACT),
        "path": None if error.path is None else shortened(error.path, LONGEST_FACT),
        "tensor": None if error.tensor is None else shortened(error.tensor, LONGEST_FACT),
    }
    return {
        "schema": "qconvert.error/1",
        "qconvert": __version__,
        "status": "error",
        "error": facts,
    }


@dataclass(slots=True)
class QuantizedTensor:
    """One tensor of a written file.

    Attributes:
        stored: scheme, ggml type or dtype in the file.
        quantized: False when it was kept bit for bit.
        reason: why it was kept, or where the scheme came from.
        nbytes: bytes in the file.
        bits_per_weight: of everything stored for it; None when empty.
        sqnr_db: None when nothing was lost, or when it was kept.
        weighted: whether the calibration's mean squares of the input channels weighed the error
            that ranges and symmetry were chosen by.
        weighted_sqnr_db: SQNR with these weights, that of the layer's output for uncorrelated
            channels; None without them, or when nothing was lost.
        clipped: values outside the codes' range.
        rounding: ``nearest``, or ``compensated`` where codes make up for each other's errors; None
            where there are no codes. ``rounding_reason`` says why.
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    stored: str
    quantized: bool
    reason: str
    source_nbytes: int
    nbytes: int
    bits_per_weight: float | None
    sqnr_db: float | None = None
    nmse: float | None = None
    max_error: float | None = None
    clipped: int | None = None
    weighted: bool = False
    weighted_sqnr_db: float | None = None
    decision: dict[str, Any] | None = None
    rounding: str | None = None
    rounding_reason: str | None = None


@dataclass
class Finetuning:
    """What tuning the scales of rows led to.

    Attributes:
        steps: of gradient descent that were run; ``step`` is the one that was kept, 0 for none.
        rate: of the logarithms of the factors.
        training_windows, held_out_windows: of ``seqlen`` tokens, that steps were made by, and that
            judged.
        tensors: how many have other scales now.
        kl_before, kl: mean divergence of the held-out windows from the source in nats, before and
            now; None where there was nothing to tune.
        left: why quantized tensors were not tuned, by their names.
    """

    text: str
    steps: int
    rate: float
    seqlen: int
    training_windows: int
    held_out_windows: int
    left: dict[str, str]
    step: int = 0
    tensors: int = 0
    kl_before: float | None = None
    kl: float | None = None


@dataclass
class Prediction:
    """What a budget led to.

    Attributes:
        budget: as asked for.
        basis: what it was decided by: ``Fisher information`` of a calibration, or ``priors by
            role``, which give an order and predict nothing.
        kl: predicted divergence of next tokens, in nats.
        optimal: whether no other mix of the candidates is better by what was measured; ``gap`` is
            by how much one may be, in nats.
        measured: pairs of a tensor and a scheme that were measured; others came from
            ``sensitivities``.
        without: tensors whose sensitivity the calibration has not got.
    """

    budget: str
    basis: str
    kl: float | None
    optimal: bool
    gap: float | None
    measured: int
    sensitivities: str | None
    without: list[str]


@dataclass(slots=True)
class EqualisedGroup:
    """Channels that were rescaled.

    Attributes:
        name: of the tensor that gives them.
        channels: how many there are, and how many have another factor than 1: ``changed``.
        largest: factor, or divisor.
        proportion: the power of the factor in closed form that was taken, 0.5 or 1.
        left: of the error of a sample, by which that was decided.
    """

    name: str
    channels: int
    changed: int
    largest: int
    proportion: float
    left: float


@dataclass
class Equalisation:
    """Whether channels between tensors were rescaled so that blocks of weights lose less.

    Attributes:
        basis: what their importance was taken from.
        groups: of channels that the architecture has.
        equalised: those that gain by it.
        skipped: groups for which it was not possible, or why for none.
    """

    basis: str
    groups: int = 0
    equalised: list[EqualisedGroup] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(repr=False)
class QuantizeReport(Report):
    """Result of ``quantize``.

    Attributes:
        written: whether the output is there; not after a dry run, and not where a warning under
            ``--strict`` took it back.
    """

    SCHEMA: ClassVar[str] = "qconvert.quantize/1"

    source: str
    output: str
    container: str
    scheme: str
    range: str
    dry_run: bool
    tensors: list[QuantizedTensor]
    source_bytes: int
    output_bytes: int
    quantized_bits_per_weight: float | None
    model_bits_per_weight: float | None
    sqnr_db: float | None
    calibration: str | None
    companions: int
    files: int = 1
    written: bool = False
    notes: list[str] = field(default_factory=list)
    prediction: Prediction | None = None
    equalisation: Equalisation | None = None
    finetuning: Finetuning | None = None

    def _said(self) -> Iterator[str]:
        yield repr(self.output) if self.written else f"{self.output!r} not written"
        quantized = sum(t.quantized for t in self.tensors)
        yield f"{self.scheme}, {quantized:,} of {_count(len(self.tensors), 'tensor')} quantized"
        if self.model_bits_per_weight is not None:
            yield f"{self.model_bits_per_weight:.3g} bits per weight"
        yield f"{self.output_bytes:,} bytes"


@dataclass(slots=True)
class TensorSummary:
    """A row of ``inspect``; numbers are None where they make no sense."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    std: float | None = None
    absmax: float | None = None
    skewness: float | None = None
    kurtosis: float | None = None
    outlier_share: float | None = None
    zeros: int | None = None
    nonfinite: int | None = None
    suggestion: str | None = None
    suggestion_reason: str | None = None
    histogram: Histogram | None = None


@dataclass
class Histogram:
    """Counts of values in bins of equal width between ``low`` and ``high``."""

    low: float
    high: float
    counts: list[int]


@dataclass
class CurvePoint:
    """The best mix of schemes of at most so many bits.

    Attributes:
        bits: per weight, over the whole file.
        nbytes: of the file, at most.
        kl: predicted divergence of next tokens, in nats.
        schemes: how many tensors take each.
    """

    bits: float
    nbytes: int
    kl: float
    schemes: dict[str, int]


@dataclass
class SizeCurve:
    """What files of all sizes are predicted to lose.

    Attributes:
        presets: bits per weight of each in this container.
        smallest: the bits of the first point that loses at most so many nats; None where none does.
        without: tensors whose sensitivity the calibration has not got.
    """

    container: str
    points: list[CurvePoint]
    presets: dict[str, float]
    smallest: dict[str, float | None]
    without: list[str]


@dataclass(repr=False)
class InspectReport(Report):
    """Result of ``inspect``; ``curve`` where it was asked for."""

    SCHEMA: ClassVar[str] = "qconvert.inspect/1"

    path: str
    kind: str
    metadata: dict[str, str]
    tensors: list[TensorSummary]
    total_tensors: int
    total_values: int
    total_bytes: int
    statistics: bool
    notes: list[str] = field(default_factory=list)
    curve: SizeCurve | None = None

    def _said(self) -> Iterator[str]:
        shown, total = len(self.tensors), _count(self.total_tensors, "tensor")
        yield f"{self.path!r} ({self.kind})"
        yield total if shown == self.total_tensors else f"{shown:,} of {total}"


@dataclass
class CalibratedLayer:
    """Static range and channel figures of one layer's input, and the range of its output where that
    was observed.
    """

    name: str
    samples: int
    features: int
    low: float
    high: float
    scale: float
    zero_point: int
    channel_absmax_ratio: float
    output: dict[str, float] | None = None


@dataclass
class CalibratedFisher:
    """How the Fisher information of the matrices was taken.

    Attributes:
        labels: sampled from the model, one a token, with this ``seed``.
        matrices: that have it.
        lacking: layers whose gradient was not to be had.
        gram: whether the matrices of second moments were kept too.
        without_output: matrices of too many outputs for that of the gradients.
        passes: over the text, each for as many layers as the memory of statistics holds.
        blocks: of the model that kept their input alone until the backward pass; where there are
            none, it kept all activations of a window.
    """

    labels: int
    seed: int
    matrices: int
    lacking: list[str]
    gram: bool
    without_output: list[str]
    passes: int
    blocks: int


@dataclass(repr=False)
class CalibrateReport(Report):
    """Result of ``calibrate``.

    Attributes:
        chunks, tokens: of the text that was run; None for recorded activations.
        resumed_at: pieces of text that an interrupted run had done; None without ``--resume``.
        unreached: layers that no token came through.
        imatrix, record: other files that were written.
        written: whether the outputs are there; not where a warning under ``--strict`` took them
            back.
    """

    SCHEMA: ClassVar[str] = "qconvert.calibrate/1"

    inputs: list[str]
    output: str
    observer: str
    layers: list[CalibratedLayer]
    chunks: int | None = None
    tokens: int | None = None
    resumed_at: int | None = None
    unreached: list[str] = field(default_factory=list)
    imatrix: str | None = None
    record: str | None = None
    written: bool = True
    fisher: CalibratedFisher | None = None

    def _said(self) -> Iterator[str]:
        yield repr(self.output)
        yield _count(len(self.layers), "layer")
        yield f"observer {self.observer}"


@dataclass
class Check:
    """One promise that ``verify`` looked at: ``pass``, ``fail`` or ``skip`` (with the reason in
    ``detail``).
    """

    id: str
    status: str
    detail: str
    worst: float | None = None
    limit: float | None = None
    tensor: str | None = None


@dataclass(slots=True)
class VerifiedTensor:
    """Measured error of a tensor and of its integer matrix product.

    Attributes:
        finite: whether every decoded value is.
        sqnr_db: of the weights against the source; None when lossless or without a source.
        cast_exact: whether plain numbers are the source's, rounded; None for codes.
        worst_step: largest error of an unclipped value, in steps (at most 0.5 is promised); None
            where codes are not evenly spaced.
        output_sqnr_db: of the product against the float product of the original weights
            and inputs; None where the activations are static and no inputs are recorded, since no
            others are known to lie in the calibrated range.
        integer_exact: whether int32 accumulation equals exact integer arithmetic, and the kernel
            that runs gives its bits; None where the product is one of floats.
        float_error: largest difference between the integer path and the float product of the
            dequantized operands, relative to the sum of magnitudes.
        activations: where scale and zero point of the inputs come from: ``static`` or ``dynamic``;
            ``float`` where the codes have no integer product and inputs stay as they are.
        inputs: ``recorded``, or ``Gaussian`` where there are no samples.
        fails: ids of the checks that this tensor fails.
    """

    name: str
    stored: str
    finite: bool
    sqnr_db: float | None = None
    nmse: float | None = None
    max_error: float | None = None
    cast_exact: bool | None = None
    worst_step: float | None = None
    output_sqnr_db: float | None = None
    integer_exact: bool | None = None
    float_error: float | None = None
    activations: str | None = None
    inputs: str | None = None
    fails: list[str] = field(default_factory=list)


@dataclass
class Execution:
    """How the layers of a quantized model ran.

    Attributes:
        activations: as asked for: ``none``, ``dynamic``, ``static`` or ``auto``.
        static_layers, dynamic_layers: linear layers that ran in integers.
        float_layers: layers with codes that ran in float: embeddings, and linear layers under
            ``none``.
        dequantized_tensors: tensors that no layer of ours takes as codes.
    """

    activations: str
    static_layers: int
    dynamic_layers: int
    float_layers: int
    dequantized_tensors: int


@dataclass
class TokenQuality:
    """A causal language model against its source on a text; errors are standard errors.

    Attributes:
        scoring: ``all`` tokens of a window or its ``second-half``.
        tokens: scored.
        perplexity_increase: of the quantized model over the source's, as a share; its error is
            that of paired differences.
        kl_mean, kl_p99, kl_max: KL(source || quantized) of the next token's distribution, in nats,
            over the scored positions.
        same_top: share of positions where both find the same token the likeliest.
        kl_blind: mean KL divergence of the source's distributions from their own mean: that of the
            best guess that does not look at the text.
        kl_predicted: mean KL divergence that the file's budget was decided by.
    """

    text: str
    windows: int
    seqlen: int
    scoring: str
    tokens: int
    execution: Execution
    source_perplexity: float
    source_perplexity_error: float
    perplexity: float
    perplexity_error: float
    perplexity_increase: float
    perplexity_increase_error: float
    kl_mean: float
    kl_mean_error: float
    kl_p99: float
    kl_max: float
    same_top: float
    kl_blind: float
    kl_predicted: float | None = None


@dataclass
class EmbeddingQuality:
    """An encoder against its source: cosine of both embeddings of each sentence of a text.

    Attributes:
        cosine_p1: the first percentile.
        spread: mean squared distance of the source's embeddings, of length 1, from their mean.
    """

    text: str
    sentences: int
    tokens: int
    execution: Execution
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    spread: float


@dataclass(repr=False)
class VerifyReport(Report):
    SCHEMA: ClassVar[str] = "qconvert.verify/1"

    path: str
    against: str | None
    checks: list[Check]
    tensors: list[VerifiedTensor]
    sqnr_db: float | None
    token_quality: TokenQuality | None = None
    embedding_quality: EmbeddingQuality | None = None

    def _said(self) -> Iterator[str]:
        yield repr(self.path)
        failed = [c.id for c in self.checks if c.status == "fail"]
        held = sum(c.status == "pass" for c in self.checks)
        yield f"{_count(held, 'check')} passed"
        if failed:
            yield f"failed: {' '.join(failed)}"
        if self.sqnr_db is not None:
            yield f"SQNR {self.sqnr_db:.2f} dB"


@dataclass
class Measurement:
    """One line of ``bench``.

    Attributes:
        section: what the line can be compared within.
        times: seconds of each run, in order; the runs of all lines of a section took turns.
        seconds: their median.
        rate: the line's own measure per second of the median, in ``unit``.
        gigabytes_per_second: of weights as the source or the packed codes hold them; None where
            that says nothing.
        ratios: speed in relation to other lines of the section, for the same amount of work: above
            1 is faster than the line named.
    """

    section: str
    name: str
    times: list[float]
    seconds: float
    rate: float
    unit: str
    gigabytes_per_second: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)


@dataclass
class SkippedLine:
    """A line that could not be had here, and why."""

    section: str
    name: str
    reason: str


@dataclass(repr=False)
class BenchReport(Report):
    SCHEMA: ClassVar[str] = "qconvert.bench/1"

    machine: str
    threads: int
    runs: int
    measurements: list[Measurement]
    skipped: list[SkippedLine]

    def _said(self) -> Iterator[str]:
        yield _count(len(self.measurements), "line")
        if self.skipped:
            yield f"{len(self.skipped)} skipped"
        yield self.machine
