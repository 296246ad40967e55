"""What a quantized file costs on this machine, a token at a time.

A model that writes text reads all its matrices once for each token, and does little with each
weight: what a token costs is the time of these reads, or of products that are slower than them.
Matrices of one shape and one type are one kind, of which one is measured and all are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from qconvert.codecs.codec import Stored
from qconvert.files import OpenModel, open_model
from qconvert.geometry import Tile, row_length, tiles
from qconvert.kernels.activations import dynamic_activations
from qconvert.model import TensorInfo
from qconvert.processor import features
from qconvert.report import BenchReport, FileCost, LayerCost, Measurement
from qconvert.roles import place_of
from qconvert.stages.bench import onnx_runtime
from qconvert.stages.bench.lines import Line, Section
from qconvert.stages.bench.weights import F32, MAX_VALUES
from qconvert.stages.parallel import Workers
from qconvert.tensor_classes import EMBEDDING, HEAD, class_of

READ = "read memory"
READ_BYTES = 1 << 28  # more than caches hold
# Last words of the table of tokens; others, as of positions, are no head.
TOKENS = ("embed_tokens", "token_embd", "word_embeddings", "wte", "tok_embeddings")
ENCODERS = ("bert", "encoder.")
ROLES_NAMED = 4
FEW_BITS = 5.7  # per weight; with more of them 8 are nearer than 4
NEAREST_BLOCK = 32  # of what GGUF and qblk usually have, the smallest that it takes


@dataclass(frozen=True, slots=True)
class _Kind:
    """Matrices that are alike.

    Attributes:
        tensors: of one shape and type; the first is measured.
        rows: of one, and columns: what a row has.
    """

    tensors: list[TensorInfo]
    rows: int
    columns: int

    @property
    def label(self) -> str:
        return f"{self.tensors[0].dtype} {self.rows}x{self.columns}"


def is_quantized(path: Path) -> bool:
    """Whether a file has tensors that are stored as codes."""
    model = open_model(path)
    try:
        return any(t.coded for t in model.tensors)
    finally:
        model.close()


def file_section(path: Path, workers: Workers, stack: ExitStack) -> Section:
    """One token through every kind of matrix of a quantized file, and reading memory alone.

    Raises:
        InputError: the file cannot be read.
    """
    model = open_model(path)
    stack.callback(model.close)
    architecture = str(model.metadata.get("general.architecture", ""))
    kinds = _kinds(multiplied(model.tensors, architecture))
    section = Section(f"one token, {path.name}")
    section.lines.append(reading_line(workers))
    for kind in kinds:
        stored = model.stored(kind.tensors[0])
        rows = min(kind.rows, max(1, MAX_VALUES // kind.columns))
        floats = f"float32 BLAS {rows}x{kind.columns}"
        operations = 2 * kind.rows * kind.columns / 1e9
        x = np.random.default_rng(3).standard_normal((1, kind.columns), np.float32)
        peer = _peer(kind)
        if floats not in {line.name for line in section.lines}:
            weights = np.random.default_rng(4).standard_normal((rows, kind.columns), np.float32)
            section.lines.append(
                Line(
                    floats,
                    _times(x, weights),
                    operations * rows / kind.rows,
                    "Gop/s",
                    weights.nbytes,
                    share=rows / kind.rows,
                )
            )
        theirs = f"{peer.name} {rows}x{kind.columns}"
        if theirs not in {line.name for line in section.lines}:
            work = onnx_runtime.product(peer, (rows, kind.columns), x, workers.threads)
            if isinstance(work, str):
                section.skip(peer.name, work)
            else:
                part = rows / kind.rows
                nbytes = peer.bits * rows * kind.columns / 8
                section.lines.append(
                    Line(theirs, work, operations * part, "Gop/s", nbytes, share=part)
                )
        section.lines.append(
            Line(
                kind.label,
                _product(stored, kind, x, workers),
                operations,
                "Gop/s",
                kind.tensors[0].nbytes,
                against=(floats, theirs),
            )
        )

    def conclude(found: list[Measurement], report: BenchReport) -> None:
        report.file = _cost(path, model, kinds, found)

    section.conclude = conclude
    return section


def _peer(kind: _Kind) -> onnx_runtime.Operator:
    """What ONNX Runtime has for about as many bits."""
    tensor = kind.tensors[0]
    bits = 4 if 8 * tensor.nbytes / tensor.size < FEW_BITS else 8
    return onnx_runtime.peer(bits, NEAREST_BLOCK)


def reading_line(workers: Workers) -> Line:
    """Reading of memory that no cache holds, on all threads."""
    spans = np.array_split(np.ones(READ_BYTES // 8, np.uint64), workers.threads)
    return Line(
        READ,
        lambda: list(workers.map(np.add.reduce, iter(spans))),
        READ_BYTES / 1e9,
        "GB/s",
        READ_BYTES,
    )


def reading_rate(measured: Measurement) -> float:
    """Bytes a second, of a measured `reading_line`."""
    return READ_BYTES / measured.seconds


def _times(x: F32, weights: F32) -> Callable[[], object]:
    return lambda: x @ weights.T


def _product(stored: Stored, kind: _Kind, x: F32, workers: Workers) -> Callable[[], object]:
    """The product that runs: straight from the codes where they have one, else of floats that are
    decoded a tile at a time.
    """
    encoding = stored.encoding
    if encoding.multiplies:
        bounds = np.linspace(0, kind.rows, workers.threads + 1).astype(int)
        parts = [(int(a), int(b)) for a, b in pairwise(bounds) if a < b]

        def run() -> object:
            a = dynamic_activations(x)
            return list(workers.map(lambda p: encoding.product(stored, *p, a), iter(parts)))

        return run

    def times(tile: Tile) -> F32:
        first = tile.start % kind.columns  # a tile of one long row begins within it
        part: F32 = x[:, first : first + tile.columns] @ encoding.decoded(stored, tile).T
        return part

    return lambda: list(workers.map(times, tiles(kind.rows, kind.columns)))


class Shaped(Protocol):
    """A tensor, or what one became."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


T = TypeVar("T", bound=Shaped)


def multiplied(tensors: Iterable[T], architecture: str) -> list[T]:
    """Matrices that every token goes through: all but the table of embeddings, unless that is the
    head too.

    Args:
        architecture: as GGUF names it; empty for other files.
    """
    matrices = [t for t in tensors if len(t.shape) > 1 and 0 not in t.shape]
    tied = _is_tied(architecture, matrices)
    return [
        t
        for t in matrices
        if class_of(t.name) != EMBEDDING or (tied and place_of(t.name).role.endswith(TOKENS))
    ]


def _is_tied(architecture: str, matrices: Sequence[Shaped]) -> bool:
    """Whether the table of embeddings is what next tokens are told by: a language model without a
    head of its own.
    """
    encoder = "bert" in architecture or any(t.name.startswith(ENCODERS) for t in matrices)
    return not encoder and not any(class_of(t.name) == HEAD for t in matrices)


def _kinds(tensors: Iterable[TensorInfo]) -> list[_Kind]:
    found: dict[tuple[str, int, int], list[TensorInfo]] = {}
    for tensor in tensors:
        columns = row_length(tensor.shape)
        found.setdefault((tensor.dtype, tensor.size // columns, columns), []).append(tensor)
    return [_Kind(same, rows, columns) for (_, rows, columns), same in found.items()]


def _cost(
    path: Path, model: OpenModel, kinds: list[_Kind], measured: list[Measurement]
) -> FileCost:
    lines = {m.name: m for m in measured}
    layers = []
    for kind in kinds:
        line = lines[kind.label]
        ratio, *others = line.ratios.values()
        roles = dict.fromkeys(place_of(t.name).role for t in kind.tensors)
        more = f" and {len(roles) - ROLES_NAMED} more" if len(roles) > ROLES_NAMED else ""
        layers.append(
            LayerCost(
                roles=", ".join(list(roles)[:ROLES_NAMED]) + more,
                stored=kind.tensors[0].dtype,
                shape=kind.tensors[0].shape,
                count=len(kind.tensors),
                nbytes=kind.tensors[0].nbytes,
                seconds=line.seconds,
                float_ratio=ratio,
                peer_ratio=others[0] if others else None,
                integer=model.stored(kind.tensors[0]).encoding.multiplies,
            )
        )
    token_bytes = sum(layer.count * layer.nbytes for layer in layers)
    seconds = sum(layer.count * layer.seconds for layer in layers)
    reading = reading_rate(lines[READ])
    return FileCost(
        path=str(path),
        nbytes=sum(t.nbytes for t in model.tensors),
        float_nbytes=4 * sum(t.size for t in model.tensors),
        token_bytes=token_bytes,
        read_gigabytes_per_second=reading / 1e9,
        bound_tokens_per_second=reading / token_bytes if token_bytes else None,
        tokens_per_second=1 / seconds if seconds else None,
        layers=layers,
        experts=any(".experts." in t.name or "_exps" in t.name for k in kinds for t in k.tensors),
        processor=features(),
    )
