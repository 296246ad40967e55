"""What `calibrate` observed, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report


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
        device: of torch that ran the text; None for recorded activations.
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
    device: str | None = None
    fisher: CalibratedFisher | None = None

    def _said(self) -> Iterator[str]:
        yield repr(self.output)
        yield counted(len(self.layers), "layer")
        yield f"observer {self.observer}"
