"""What `quantize` did, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qconvert import __version__
from qconvert.quantities import counted
from qconvert.report.base import Report, dump_parts


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
        norms: how many have other gains now.
        kl_before, kl: mean divergence of the held-out windows from the source in nats, before and
            now; None where there was nothing to tune.
        left: why quantized tensors and gains of norms were not tuned, by their names.
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
    norms: int = 0
    kl_before: float | None = None
    kl: float | None = None


@dataclass
class Prediction:
    """What a budget led to.

    Attributes:
        budget: as asked for.
        basis: what it was decided by: ``Fisher information`` of a calibration, or ``priors by
            role``, which give an order and predict nothing.
        kl: predicted divergence of next tokens, in nats, for the rounding that tensors get.
        kl_nearest: the same of codes rounded to nearest, which the mix was chosen by; None where
            that is ``kl``.
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
    kl_nearest: float | None = None


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
        yield f"{self.scheme}, {quantized:,} of {counted(len(self.tensors), 'tensor')} quantized"
        if self.model_bits_per_weight is not None:
            yield f"{self.model_bits_per_weight:.3g} bits per weight"
        yield f"{self.output_bytes:,} bytes"


@dataclass(repr=False)
class QuantizeSetReport(Report):
    """Result of ``quantize`` with several schemes.

    Attributes:
        reports: of each, in the order that they were asked for.
    """

    SCHEMA: ClassVar[str] = "qconvert.quantize-set/1"

    source: str
    reports: list[QuantizeReport]

    def json_parts(self) -> Iterator[str]:
        """The document of ``--json``; those of the schemes are whole documents inside."""
        head = {"schema": self.SCHEMA, "qconvert": __version__, "status": self.status}
        body = {"kernels": self.kernels, "source": self.source, "warnings": self.warnings}
        yield from dump_parts({**head, **body, "reports": [r.to_json() for r in self.reports]})

    def _said(self) -> Iterator[str]:
        yield repr(self.source)
        yield from (f"{r.scheme} {r.status}" for r in self.reports)
