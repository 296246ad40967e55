"""The integer matrix product, against float32 BLAS, ONNX Runtime and reading the codes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qconvert import kernels
from qconvert.codecs.levels import level_code
from qconvert.kernels.activations import dynamic_activations
from qconvert.kernels.records import U8, Activations, Bytes, LevelSteps
from qconvert.ranges import RangeMethod
from qconvert.schemes import AffineScheme, LevelScheme
from qconvert.stages.bench import onnx_runtime
from qconvert.stages.bench.lines import Line, Section
from qconvert.stages.bench.weights import F32, Weights, affine, encoded_levels
from qconvert.stages.parallel import Workers

BLAS = "float32 BLAS"
REST = 0.05  # seconds; OpenBLAS and ONNX Runtime let their threads spin for a while


@dataclass(frozen=True, slots=True)
class _Stored:
    """A matrix as it is stored.

    Attributes:
        name: of its scheme.
        rows: how many.
        codes: packed.
        times: the product of a run of rows, from one to before another, with activations.
        peer: the operator that it is held against.
    """

    name: str
    rows: int
    codes: Bytes | U8
    times: Callable[[tuple[int, int], Activations], F32]
    peer: onnx_runtime.Operator


def product_section(
    weights: Weights,
    schemes: list[AffineScheme | LevelScheme],
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
    matrices = [
        _levels(weights, s) if isinstance(s, LevelScheme) else _affine(weights, s, method)
        for s in schemes
    ]
    for peer in dict.fromkeys(stored.peer for stored in matrices):
        work = onnx_runtime.product(peer, weights.values.shape, x, workers.threads)
        if isinstance(work, str):
            section.skip(peer.name, work)
        else:
            nbytes = peer.bits * weights.values.size / 8
            section.lines.append(line(peer.name, work, nbytes, (BLAS,)))
    for stored in matrices:
        against: tuple[str, ...] = (BLAS, stored.peer.name)
        if rows == 1:
            reading = _reading_line(stored)
            section.lines.append(reading)
            against += (reading.name,)
        for name, work, beside in _works(stored, x, workers, against):
            section.lines.append(line(name, work, len(stored.codes), beside))
    return section


def _affine(weights: Weights, scheme: AffineScheme, method: RangeMethod | None) -> _Stored:
    how = affine(weights, scheme, method)
    done = [how.encode(x) for x in weights.tiles()]
    rows, groups = len(weights.values), how.encoding.row_groups
    codes = memoryview(b"".join(packed for _, packed in done))
    scale = np.concatenate([p.scale for p, _ in done]).reshape(rows, groups)
    zero = np.concatenate([p.zero for p, _ in done]).reshape(rows, groups)
    nbytes = len(codes) // rows

    def times(rows: tuple[int, int], a: Activations) -> F32:
        first, end = rows
        part = codes[first * nbytes : end * nbytes]
        return kernels.product(part, scale[first:end], zero[first:end], how.encoding, a)

    peer = onnx_runtime.peer(how.encoding.bits, how.encoding.block)
    return _Stored(how.name, rows, codes, times, peer)


def _levels(weights: Weights, scheme: LevelScheme) -> _Stored:
    code = level_code(scheme)
    done = [encoded_levels(x, code) for x in weights.tiles()]
    rows, columns = weights.values.shape
    codes = np.concatenate([packed for packed, _ in done])
    units, steps, shifts = (
        np.concatenate([getattr(found, name) for _, found in done])
        for name in ("unit", "steps", "shifts")
    )
    nbytes = len(codes) // rows

    def times(rows: tuple[int, int], a: Activations) -> F32:
        first, end = rows
        found = LevelSteps(units[first:end], steps[first:end], shifts[first:end])
        return kernels.levels_product(codes[first * nbytes : end * nbytes], columns, found, code, a)

    return _Stored(scheme.name, rows, codes, times, onnx_runtime.peer(scheme.bits, scheme.block))


def _reading_line(stored: _Stored) -> Line:
    """How fast one thread can look at every byte of the codes: the floor of a product of one row.

    Codes that fit a cache come from there, in the product as well.
    """
    words = np.frombuffer(stored.codes, np.uint64, len(stored.codes) // 8)
    return Line(
        f"read {stored.name} codes, 1 thread",
        lambda: np.add.reduce(words),
        words.nbytes / 1e9,
        "GB/s",
        words.nbytes,
    )


def _works(
    stored: _Stored, x: F32, workers: Workers, against: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], object], tuple[str, ...]]]:
    """Name, work and what to compare with of each line of a scheme."""
    a = dynamic_activations(x)
    bounds = [stored.rows * i // workers.threads for i in range(workers.threads + 1)]
    parts = [(first, end) for first, end in pairwise(bounds) if first < end]
    alone = f"{stored.name} x int8, 1 thread"

    def product(parts: list[tuple[int, int]], a: Activations) -> list[F32]:
        def times(part: tuple[int, int]) -> F32:
            return stored.times(part, a)

        others = [workers.submit(times, part) for part in parts[1:]]
        return [times(parts[0]), *(future.result() for future in others)]

    if len(parts) > 1:
        yield alone, lambda: product([(0, stored.rows)], a), ()
    yield f"{stored.name} x int8", lambda: product(parts, a), (*against, alone)
    yield f"{stored.name} x float32", lambda: product(parts, dynamic_activations(x)), against
