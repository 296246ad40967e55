"""bench: how fast quantization, dequantization and the integer product run, against references in
the same run.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.errors import InputError, UsageError
from qconvert.files import open_model
from qconvert.geometry import TILE_VALUES, spans_tiles, tiles
from qconvert.model import TensorInfo
from qconvert.progress import Progress, Silent
from qconvert.quantizers.affine import (
    Parameters,
    decode_groups,
    encode_rows,
    load_codes,
    to_groups,
)
from qconvert.quantizers.fitting import fit
from qconvert.quantizers.ggml import GGML_BLOCKS
from qconvert.quantizers.integer import dynamic_activations, stored_product
from qconvert.ranges import RangeMethod, default_method
from qconvert.report import BenchReport, Measurement
from qconvert.schemes import AffineScheme, GgmlScheme, Scheme
from qconvert.stages.parallel import Workers
from qconvert.stages.plan import encoding_of

F32 = NDArray[np.float32]
SOURCE_BYTES = 2  # per weight: the copy is that of a BF16 source
MAX_VALUES = 1 << 24  # taken of a file's largest matrix
COPY_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of ``qconvert bench``; the command line's help describes each."""

    scheme: Scheme
    file: Path | None = None
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)
    rows: int = 32
    runs: int = 5
    threads: int = 1
    range: RangeMethod | None = None


@dataclass(frozen=True, slots=True)
class _Line:
    """One thing to time: ``amount`` of ``unit`` a run, held against the line ``reference``."""

    name: str
    work: Callable[[], object]
    amount: float
    unit: str
    reference: str | None = None


def bench(options: BenchOptions, progress: Progress | None = None) -> BenchReport:
    """Measure; the lines of a subject are run in turn, so that all meet the machine in the same
    moods.

    Raises:
        InputError: the file has no matrix to measure with.
        UsageError: the scheme is a cast, which has nothing to measure.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    names = kernels.describe()
    subjects = [_from_file(options.file)] if options.file else [_random(s) for s in options.shapes]
    measurements = []
    for label, weights in subjects:
        with ExitStack() as stack:
            workers = stack.enter_context(Workers(options.threads))
            stack.enter_context(threadpool_limits(options.threads))
            lines = list(_lines(weights, options, workers, stack))
            progress.begin(f"bench {label}", options.runs * len(lines), "runs")
            measurements += _measure(lines, options.runs, progress)
            progress.end()
    return BenchReport(
        kernels=names,
        subject=", ".join(label for label, _ in subjects),
        machine=f"{platform.machine()}, {os.cpu_count()} processors, NumPy {np.__version__}",
        threads=options.threads,
        measurements=measurements,
        seconds=time.perf_counter() - started,
    )


def _random(shape: tuple[int, int]) -> tuple[str, F32]:
    random = np.random.default_rng(0)
    return (
        f"{shape[0]}x{shape[1]} Gaussian",
        random.standard_normal(shape, np.float32) * np.float32(0.02),
    )


def _from_file(path: Path) -> tuple[str, F32]:
    """The largest matrix of a file, or its first 16 M values."""
    model = open_model(path)
    try:
        matrices = [t for t in model.tensors if len(t.shape) == 2 and t.size]
        if not matrices:
            raise InputError("no matrix to measure with", path=path)
        tensor = max(matrices, key=lambda t: t.size)
        columns = tensor.shape[1]
        rows = min(tensor.shape[0], max(1, MAX_VALUES // columns))
        values = model.values(tensor, 0, rows * columns).astype(np.float32)
        return f"{tensor.name} {rows}x{columns}", values.reshape(rows, columns)
    finally:
        model.close()


def _measure(lines: list[_Line], runs: int, progress: Progress) -> list[Measurement]:
    times: dict[str, list[float]] = {line.name: [] for line in lines}
    for line in lines:
        line.work()  # first touch
    for _ in range(runs):
        for line in lines:
            begin = time.perf_counter()
            line.work()
            times[line.name].append(time.perf_counter() - begin)
            progress.advance(1, line.name)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return [
        Measurement(
            name=line.name,
            runs=runs,
            seconds=medians[line.name],
            rate=line.amount / medians[line.name],
            unit=line.unit,
            ratio=medians[line.reference] / medians[line.name] if line.reference else None,
            reference=line.reference,
        )
        for line in lines
    ]


def _lines(
    weights: F32, options: BenchOptions, workers: Workers, stack: ExitStack
) -> Iterator[_Line]:
    copy = _copy_line(weights.size, stack)
    yield copy
    if isinstance(options.scheme, AffineScheme):
        yield from _affine_lines(weights, options.scheme, options, workers, copy.name)
    elif isinstance(options.scheme, GgmlScheme):
        if options.range:
            raise UsageError(f"--range has no meaning for {options.scheme.name}")
        yield from _ggml_lines(weights, options.scheme.ggml_type, workers, copy.name)
    else:
        raise UsageError(f"nothing to measure in a cast to {options.scheme.name}")
    if weights.shape[1] % 32 == 0:
        yield from _gguf_py_lines(weights, options.scheme, copy.name)


def _weights_line(name: str, work: Callable[[], object], size: int, reference: str | None) -> _Line:
    return _Line(name, work, size / 1e6, "Mweights/s", reference)


def _copy_line(size: int, stack: ExitStack) -> _Line:
    """Copying a BF16 source from file to file through the page cache: the floor of any
    conversion.
    """
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    source = stack.enter_context((folder / "source").open("wb+"))
    target = stack.enter_context((folder / "target").open("wb+"))
    total = SOURCE_BYTES * size
    for start in range(0, total, COPY_CHUNK):
        source.write(bytes(min(COPY_CHUNK, total - start)))
    source.flush()

    def copy() -> None:
        for start in range(0, total, COPY_CHUNK):
            os.pwrite(target.fileno(), os.pread(source.fileno(), COPY_CHUNK, start), start)

    return _Line("copy a BF16 source, 1 thread", copy, total / 1e9, "GB/s")


def _pieces(weights: F32) -> list[F32]:
    flat = weights.ravel()
    return [flat[t.start : t.stop].reshape(t.rows, t.columns) for t in tiles(*weights.shape)]


def _affine_lines(
    weights: F32, scheme: AffineScheme, options: BenchOptions, workers: Workers, copy: str
) -> Iterator[_Line]:
    scheme = scheme if scheme.symmetric is not None else scheme.resolved(False)
    if scheme.granularity == "tensor" or spans_tiles(weights.shape[1]):
        raise UsageError(
            f"bench measures schemes per channel and block, on rows of at most {TILE_VALUES:,}",
            found=f"{scheme.name}, {weights.shape[1]:,} columns",
        )
    encoding = encoding_of(scheme, TensorInfo("", weights.shape, "F32", weights.nbytes))
    method = options.range or default_method(scheme.bits)
    parts = _pieces(weights)

    def one(x: F32) -> tuple[Parameters, bytes]:
        groups, counts = to_groups(x, encoding)
        parameters = fit(groups, encoding, method, counts)
        return parameters, encode_rows(x, encoding, parameters).codes

    def back(item: tuple[Parameters, bytes]) -> F32:
        parameters, packed = item
        codes = load_codes(packed, encoding).reshape(len(parameters.scale), -1)
        return decode_groups(codes, parameters, encoding)

    done = [one(x) for x in parts]
    size = weights.size
    yield _weights_line(
        f"quantize {scheme.name} {method.describe()}",
        lambda: list(workers.map(one, parts)),
        size,
        copy,
    )
    yield _weights_line(
        f"dequantize {scheme.name}", lambda: list(workers.map(back, done)), size, copy
    )
    yield from _product_lines(weights, encoding, done, options.rows, workers)


def _product_lines(
    weights: F32,
    encoding: AffineEncoding,
    done: list[tuple[Parameters, bytes]],
    rows: int,
    workers: Workers,
) -> Iterator[_Line]:
    """The integer product, against NumPy's float32 one with as many threads."""
    columns = weights.shape[1]
    x = np.random.default_rng(1).standard_normal((rows, columns), np.float32)
    operations = 2 * rows * weights.size / 1e9
    yield _Line("float32 matmul (BLAS)", lambda: x @ weights.T, operations, "Gop/s")
    a = dynamic_activations(x)
    stored: list[tuple[bytes, F32, NDArray[np.int32]]] = []
    share = -(-len(done) // workers.threads)
    for start in range(0, len(done), share):  # one run of rows a thread
        run = done[start : start + share]
        packed = b"".join(codes for _, codes in run)
        shape = (len(packed) * 8 // (encoding.bits * encoding.row_codes), encoding.row_groups)
        scale = np.concatenate([p.scale for p, _ in run]).reshape(shape)
        zero = np.concatenate([p.zero for p, _ in run]).reshape(shape)
        stored.append((packed, scale, zero))

    def one(part: tuple[bytes, F32, NDArray[np.int32]]) -> F32:
        return stored_product(*part, encoding, a)

    yield _Line(
        f"integer matmul {encoding.scheme} x int8, {rows} rows",
        lambda: list(workers.map(one, stored)),
        operations,
        "Gop/s",
        "float32 matmul (BLAS)",
    )


def _ggml_lines(weights: F32, ggml_type: str, workers: Workers, copy: str) -> Iterator[_Line]:
    block = GGML_BLOCKS[ggml_type]
    if weights.shape[1] % block.block:
        raise UsageError(f"{ggml_type} needs rows that divide into blocks of {block.block}")
    parts = [x.reshape(-1, block.block) for x in _pieces(weights)]
    done = [block.encode(x) for x in parts]
    name = ggml_type.lower()
    size = weights.size
    yield _weights_line(
        f"quantize {name}", lambda: list(workers.map(block.encode, parts)), size, copy
    )
    yield _weights_line(
        f"dequantize {name}", lambda: list(workers.map(block.decode, done)), size, copy
    )


def _gguf_py_lines(weights: F32, scheme: Scheme, copy: str) -> Iterator[_Line]:
    """gguf-py on one thread, with the same type or the nearest one that it can quantize."""
    if isinstance(scheme, GgmlScheme):
        name = scheme.ggml_type
    else:
        bits = scheme.bits if isinstance(scheme, AffineScheme) else 8
        name = "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"
    kind = gguf.GGMLQuantizationType[name]
    packed = gguf.quants.quantize(weights, kind)
    size = weights.size
    yield _weights_line(
        f"gguf-py quantize {name.lower()}, 1 thread",
        lambda: gguf.quants.quantize(weights, kind),
        size,
        copy,
    )
    yield _weights_line(
        f"gguf-py dequantize {name.lower()}, 1 thread",
        lambda: gguf.quants.dequantize(packed, kind),
        size,
        copy,
    )
