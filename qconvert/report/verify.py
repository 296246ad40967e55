"""What `verify` found, as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.floors import Outlier
from qconvert.quantities import counted
from qconvert.remedies import mending
from qconvert.report.base import Report

# What may be wrong with a file that is nevertheless what its maker meant it to be: all other checks
# say that it is whole, made of its source, and right in its arithmetic.
OF_QUALITY = {
    *("quality", "usable", "min-sqnr", "max-nmse", "min-output-sqnr", "exact"),
    *("finite-quality", "same-model", "predictions", "max-kl", "max-ppl-increase", "min-cosine"),
}
REBUILD = "rebuild"  # the id of the check that the recorded recipe was run again
SAME_BYTES = "the recorded recipe gives the same bytes again"  # begins its detail
LIMIT = "limit:"  # begins the ids of checks of a file of limits
BROKEN = {"quality", "usable", "finite-quality", "same-model", "predictions"}  # by our floors


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


@dataclass
class PairedHistogram:
    """Values of a sample of a tensor, of the source and as they are stored.

    Attributes:
        low, high: ends of bins of equal width.
        before, after: counts of the source's and of the stored values.
        grid: the values that codes stand for, where these are few; else the least and the largest,
            beyond which weights were clipped.
    """

    low: float
    high: float
    before: list[int]
    after: list[int]
    grid: list[float]


def of_quality(check: Check) -> bool:
    """Whether a check is of `OF_QUALITY`, or of a limit that somebody set."""
    return check.id in {*OF_QUALITY, REBUILD} or check.id.startswith(LIMIT)


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
        histogram: of the values before and after; None where none was asked for.
        bits_per_weight: of all that is stored for it.
        remedy: the option of ``quantize`` that should give it what it misses; None where it misses
            nothing that more bits give.
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
    histogram: PairedHistogram | None = None
    bits_per_weight: float | None = None
    remedy: str | None = None


@dataclass
class Execution:
    """How the layers of a quantized model ran.

    Attributes:
        activations: as asked for: ``none``, ``dynamic``, ``static`` or ``auto``.
        device: of torch: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        static_layers, dynamic_layers: linear layers that ran in integers.
        float_layers: layers with codes that ran in float: embeddings, and linear layers under
            ``none``.
        dequantized_tensors: tensors that no layer of ours takes as codes.
    """

    activations: str
    device: str
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


@dataclass
class LlamaCppRun:
    """A GGUF file in llama.cpp, held against transformers on the weights that it decodes to.

    Attributes:
        version: of llama-cpp-python.
        tokens: that went in at once.
        outputs: what was compared: ``logits``, or ``last hidden states`` of an encoder.
        largest_difference: as a share of the largest output of transformers.
        kl_mean: KL(transformers || llama.cpp) of next tokens, in nats; None for encoders.
        same_top: share of tokens after which both find the same one the likeliest, likewise.
        cosine_min: the smallest of an encoder's hidden states with each other; else None.
    """

    version: str
    tokens: int
    outputs: str
    largest_difference: float
    kl_mean: float | None = None
    same_top: float | None = None
    cosine_min: float | None = None


@dataclass
class Verdict:
    """What all of it comes to.

    Attributes:
        intact: whether the file is whole, made of its source, and right in its arithmetic.
        quality: ``lossless``; ``expected`` of so many bits; ``poor``, which is worse than that;
            ``broken``, worse than a model can be that works; None where there was no source.
        bits_per_weight: over the whole file.
        worst_db, worst_tensor: SQNR of the tensor that has lost most.
        class_db: SQNR of each class of tensors together, in dB; None where nothing is lost.
        reasons: why the quality is no better, the gravest first.
        unchecked: what was not looked at, and why.
        other_model: that the source is of another one; nothing else is known then.
    """

    intact: bool
    quality: str | None = None
    bits_per_weight: float | None = None
    worst_db: float | None = None
    worst_tensor: str | None = None
    class_db: dict[str, float | None] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    other_model: str | None = None


@dataclass(repr=False)
class VerifyReport(Report):
    """Result of ``verify``.

    Attributes:
        sqnr_db: of all compared weights together; None without a source, or when nothing was lost.
        verdict: what it all comes to.
        outliers: tensors that are far below others of their kind.
    """

    SCHEMA: ClassVar[str] = "qconvert.verify/1"

    path: str
    against: str | None
    checks: list[Check]
    tensors: list[VerifiedTensor]
    sqnr_db: float | None
    token_quality: TokenQuality | None = None
    embedding_quality: EmbeddingQuality | None = None
    llama_cpp: LlamaCppRun | None = None
    verdict: Verdict | None = None
    outliers: list[Outlier] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """The checks that do not hold."""
        return [c for c in self.checks if c.status == "fail"]

    def mending(self, worst: Iterable[VerifiedTensor]) -> list[str]:
        """Options of `quantize` that should mend what fails, those of the ``worst`` first."""
        lossy = sum(t.sqnr_db is not None for t in self.tensors)
        return mending({t.name: t.remedy for t in (*worst, *self.tensors)}, lossy)

    @property
    def comparable(self) -> bool:
        """Whether the file is whole and of the model that it was held against."""
        whole = all(c.id != "integrity" for c in self.failed)
        return whole and not (self.verdict and self.verdict.other_model)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        parts = [*self._judged()]
        if self.verdict and self.verdict.unchecked:
            parts.append(f"not checked: {', '.join(self.verdict.unchecked)}")
        if self.status == "fail" and not self.failed:
            parts.append("under --strict a warning is a failure")
        return f"{self.status.upper()}  {'; '.join(parts)}"

    def _judged(self) -> Iterator[str]:
        """What the verdict says of what was looked at."""
        if self.verdict and self.verdict.other_model:
            yield self.verdict.other_model
            return
        damage = [c.id for c in self.failed if not of_quality(c)]
        v = self.verdict
        if damage:
            checks = ", ".join(dict.fromkeys(damage))
            yield f"not intact: {checks} failed"
        if v is None:
            return
        worst = "" if v.worst_db is None else f" (worst {v.worst_db:.1f} dB)"
        bits = "" if v.bits_per_weight is None else f" of {v.bits_per_weight:.1f} bits"
        intact = "" if damage else "intact, "
        if v.quality == "lossless":
            yield f"{intact}nothing lost"
        elif v.quality == "expected":
            yield f"{intact}quality as expected{bits}{worst}"
        elif v.quality == "poor":
            yield f"{intact}poorer than expected{bits}{worst}: {v.reasons[0]}"
        elif v.quality == "broken":
            yield f"{intact}but broken{worst}: {v.reasons[0]}" if intact else f"broken{worst}"
        elif not damage:
            yield "intact"
        yield from (
            "rebuilt byte for byte" if c.detail.startswith(SAME_BYTES) else c.detail
            for c in self.checks
            if c.id == REBUILD
        )
        told = {*BROKEN, REBUILD}
        if asked := [c.id for c in self.failed if of_quality(c) and c.id not in told]:
            yield f"limits missed: {', '.join(dict.fromkeys(asked))}"
        if q := self.token_quality:
            yield (
                f"perplexity {100 * q.perplexity_increase:+.2f} %, divergence {q.kl_mean:.2g} nats"
            )
        if e := self.embedding_quality:
            yield f"cosine of embeddings {e.cosine_mean:.4f}"

    def _said(self) -> Iterator[str]:
        yield repr(self.path)
        failed = [c.id for c in self.checks if c.status == "fail"]
        held = sum(c.status == "pass" for c in self.checks)
        yield f"{counted(held, 'check')} passed"
        if failed:
            yield f"failed: {' '.join(failed)}"
        if self.sqnr_db is not None:
            yield f"SQNR {self.sqnr_db:.2f} dB"
