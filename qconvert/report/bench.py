"""What `bench` measured, as data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from qconvert.quantities import counted
from qconvert.report.base import Report


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


@dataclass
class LayerCost:
    """Matrices of one shape and type in a file, of which one was measured.

    Attributes:
        roles: what they do, for people.
        count: how many there are.
        nbytes: of one.
        seconds: of the product of one with one row of activations.
        float_ratio: its speed in relation to the product of float32 weights by BLAS.
        peer_ratio: likewise, in relation to ONNX Runtime's product of about as many bits; None
            where it is not installed.
        integer: whether the product runs straight from the codes; else they are decoded.
    """

    roles: str
    stored: str
    shape: tuple[int, ...]
    count: int
    nbytes: int
    seconds: float
    float_ratio: float
    peer_ratio: float | None
    integer: bool


@dataclass
class FileCost:
    """What a file costs here, a token at a time.

    Attributes:
        nbytes: of all tensors, which is the memory they take; ``float_nbytes`` in float32.
        token_bytes: that are read for a token, by the matrices it goes through.
        read_gigabytes_per_second: of memory, measured beside the products.
        bound_tokens_per_second: no program here is faster, since all those bytes have to be read.
        tokens_per_second: of the products of qconvert alone: without attention over the context,
            norms and sampling.
        experts: whether there are experts, all of which are counted although a token meets few.
        processor: what it has for products of bytes, and what each does.
    """

    path: str
    nbytes: int
    float_nbytes: int
    token_bytes: int
    read_gigabytes_per_second: float
    bound_tokens_per_second: float | None
    tokens_per_second: float | None
    layers: list[LayerCost]
    experts: bool
    processor: dict[str, str]


@dataclass
class MemoryChoice:
    """A scheme that a model could take.

    Attributes:
        nbytes: of its file, which is the memory that it takes.
        token_bytes: that are read for a token, by the matrices it goes through.
        sqnr_db: to be expected of the poorest matrix; None where nothing is lost.
        fits: whether the limit has room for the file and a context as `MemoryFit` says.
        bound_tokens_per_second: no program here is faster with it.
        context: tokens for whose keys and values, in float16, the limit leaves room; None where
            that is not known.
    """

    scheme: str
    container: str
    nbytes: int
    token_bytes: int
    sqnr_db: float | None
    fits: bool = False
    bound_tokens_per_second: float | None = None
    context: int | None = None


@dataclass
class MemoryFit:
    """Schemes for a model under a limit of memory.

    Attributes:
        limit: bytes.
        context_bytes: of keys and values of a token in float16, 0 where that is not known.
        context: tokens that have to have room beside the file.
        best: that which fits and loses least; None where none fits.
    """

    path: str
    limit: int
    read_gigabytes_per_second: float
    context_bytes: int
    context: int
    choices: list[MemoryChoice]
    best: str | None


@dataclass
class Compared:
    """A line of an earlier report against the same line now.

    Attributes:
        ratio: of its time now to its time then; above 1 is slower.
        noise: the half range of the runs of both, relative to their medians: less than that is no
            difference.
    """

    section: str
    name: str
    ratio: float
    noise: float
    slower: bool


@dataclass(repr=False)
class BenchReport(Report):
    """Result of ``bench``.

    Attributes:
        machine: its processor, how many, and the version of NumPy.
        runs: of each line; figures are their medians.
        file: what a quantized file costs; None where none was given.
        memory: what fits into a limit; None where none was asked for.
        compared: lines of an earlier report against these.
    """

    SCHEMA: ClassVar[str] = "qconvert.bench/1"

    machine: str
    threads: int
    runs: int
    measurements: list[Measurement]
    skipped: list[SkippedLine]
    file: FileCost | None = None
    memory: MemoryFit | None = None
    compared: list[Compared] = field(default_factory=list)

    def _said(self) -> Iterator[str]:
        yield counted(len(self.measurements), "line")
        if self.skipped:
            yield f"{len(self.skipped)} skipped"
        yield self.machine
