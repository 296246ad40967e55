"""The integer matrix product, against float32 BLAS, ONNX Runtime and reading the codes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.kernels.activations import dynamic_activations
from qconvert.kernels.records import Activations
from qconvert.ranges import RangeMethod
from qconvert.schemes import AffineScheme
from qconvert.stages.bench import onnx_runtime
from qconvert.stages.bench.lines import Line, Section
from qconvert.stages.bench.weights import F32, Affine, Weights, affine
from qconvert.stages.parallel import Workers

BLAS = "float32 BLAS"
REST = 0.05  # seconds; OpenBLAS and ONNX Runtime let their threads spin for a while


@dataclass(frozen=True, slots=True)
class _Rows:
    """A run of stored rows with the parameters of their groups, as `kernels.product` takes them."""

    packed: bytes
    scale: F32
    zero: NDArray[np.int32]


def product_section(
    weights: Weights,
    schemes: list[AffineScheme],
    rows: int,
    method: RangeMethod | None,
    workers: Workers,
) -> Section:
    """``rows`` activation rows times the transposed matrix.

    Activations are signed bytes already in the lines "x int8", as in MatMulInteger; BLAS,
    MatMulNBits and the lines "x float32" take floats, which the latter two quantize each time.
    """
    x = np.random.default_rng(1).standard_normal((rows, weights.values.shape[1]), np.float32)
    count = "1 row" if rows == 1 else f"{rows} rows"
    section = Section(
        f"integer matmul, {count}, {weights.label}", rest=REST if workers.threads > 1 else 0
    )
    operations = 2 * rows * weights.values.size / 1e9

    def line(
        name: str, work: Callable[[], object], nbytes: float, against: tuple[str, ...] = ()
    ) -> Line:
        return Line(name, work, operations, "Gop/s", nbytes, against=against)

    section.lines.append(line(BLAS, lambda: x @ weights.values.T, weights.values.nbytes))
    encoded = [affine(weights, s, method) for s in schemes]
    peers = {a.name: onnx_runtime.peer(a.encoding) for a in encoded}
    for peer in dict.fromkeys(peers.values()):
        work = onnx_runtime.product(peer, weights.values.shape, x, workers.threads)
        if isinstance(work, str):
            section.skip(peer.name, work)
        else:
            nbytes = peer.bits * weights.values.size / 8
            section.lines.append(line(peer.name, work, nbytes, (BLAS,)))
    for a in encoded:
        stored = _store(weights, a)
        against: tuple[str, ...] = (BLAS, peers[a.name].name)
        if rows == 1:
            reading = _reading_line(a.name, stored)
            section.lines.append(reading)
            against += (reading.name,)
        for name, work, beside in _works(a, stored, x, workers, against):
            section.lines.append(line(name, work, len(stored.packed), beside))
    return section


def _store(weights: Weights, how: Affine) -> _Rows:
    done = [how.encode(x) for x in weights.tiles()]
    shape = (len(weights.values), how.encoding.row_groups)
    return _Rows(
        b"".join(packed for _, packed in done),
        np.concatenate([p.scale for p, _ in done]).reshape(shape),
        np.concatenate([p.zero for p, _ in done]).reshape(shape),
    )


def _reading_line(name: str, stored: _Rows) -> Line:
    """How fast one thread can look at every byte of the codes: the floor of a product of one row.

    Codes that fit a cache come from there, in the product as well.
    """
    words = np.frombuffer(stored.packed, np.uint64, len(stored.packed) // 8)
    return Line(
        f"read {name} codes, 1 thread",
        lambda: np.add.reduce(words),
        words.nbytes / 1e9,
        "GB/s",
        words.nbytes,
    )


def _works(
    how: Affine, stored: _Rows, x: F32, workers: Workers, against: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], object], tuple[str, ...]]]:
    """Name, work and what to compare with of each line of a scheme."""
    a = dynamic_activations(x)
    parts = _cut(stored, workers.threads)
    alone = f"{how.name} x int8, 1 thread"

    def product(parts: list[_Rows], a: Activations) -> list[F32]:
        def one(part: _Rows) -> F32:
            return kernels.product(part.packed, part.scale, part.zero, how.encoding, a)

        others = [workers.submit(one, part) for part in parts[1:]]
        return [one(parts[0]), *(future.result() for future in others)]

    if len(parts) > 1:
        yield alone, lambda: product([stored], a), ()
    yield f"{how.name} x int8", lambda: product(parts, a), (*against, alone)
    yield f"{how.name} x float32", lambda: product(parts, dynamic_activations(x)), against


def _cut(stored: _Rows, parts: int) -> list[_Rows]:
    """Runs of whole rows, as equal as they come."""
    rows = len(stored.scale)
    nbytes = len(stored.packed) // rows
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [
        _Rows(stored.packed[b * nbytes : e * nbytes], stored.scale[b:e], stored.zero[b:e])
        for b, e in pairwise(bounds)
        if b < e
    ]
