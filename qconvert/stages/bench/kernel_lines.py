"""Kernels: weights to codes and back with every set of kernels that runs here, against copying a
source file and against gguf-py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes

from qconvert import kernels
from qconvert.codecs.levels import level_code
from qconvert.errors import UsageError
from qconvert.kernels.records import Encoded, SourceRows
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.mapper import Mapper
from qconvert.ranges import RangeMethod
from qconvert.schemes import AffineScheme, GgmlScheme, LevelScheme, Scheme
from qconvert.stages.bench.lines import Line, Section
from qconvert.stages.bench.options import BenchOptions
from qconvert.stages.bench.peers import gguf_py_encodes
from qconvert.stages.bench.weights import F32, Weights, affine, encoded_levels
from qconvert.stages.parallel import Workers

SOURCE_BYTES = 2  # per weight: the copy is that of a BF16 source
COPY = "copy BF16, 1 thread"
COPY_CHUNK = 1 << 22
# Tiles of a run; the definition in NumPy is some hundred times slower than the best kernels.
NATIVE_TILES = 16
REFERENCE_TILES = 1
PEER_TILES = 4


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A scheme both ways, on one tile.

    Attributes:
        convert: all that a conversion does with a tile as it is read, its error included.
        encode: what ``decode`` takes.
    """

    name: str
    detail: str
    convert: Callable[[SourceRows], object]
    encode: Callable[[F32], Any]
    decode: Callable[[Any], object]


def kernel_section(
    weights: Weights, options: BenchOptions, workers: Workers, stack: ExitStack
) -> Section:
    """The lines of every scheme and every set of kernels.

    Raises:
        UsageError: a scheme that has nothing to measure, or not with these weights.
    """
    section = Section(f"kernels, {weights.label}")
    section.lines.append(_copy_line(weights.values.size, stack))
    for scheme in options.schemes:
        conversion = _conversion(weights, scheme, options.range)
        for name in reversed(kernels.available()):
            section.lines += _kernel_lines(weights, conversion, name, workers)
    for kind in dict.fromkeys(map(nearest_ggml_type, options.schemes)):
        if weights.values.shape[1] % GGML_BLOCKS[kind].block:
            section.skip(f"gguf-py {kind.lower()}", "rows do not divide into its blocks")
        elif not gguf_py_encodes(kind):
            section.skip(f"gguf-py {kind.lower()}", f"it does not quantize to {kind}")
        else:
            section.lines += _gguf_py_lines(weights, kind)
    return section


def nearest_ggml_type(scheme: Scheme) -> str:
    """The type of a scheme, or the nearest one that gguf-py and we both can quantize."""
    if isinstance(scheme, GgmlScheme):
        return scheme.ggml_type
    bits = scheme.bits if isinstance(scheme, AffineScheme | LevelScheme) else 8
    return "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0"


def _copy_line(size: int, stack: ExitStack) -> Line:
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

    return Line(COPY, copy, size / 1e6, "Mweights/s", total)


def _conversion(weights: Weights, scheme: Scheme, method: RangeMethod | None) -> _Conversion:
    if isinstance(scheme, AffineScheme):
        how = affine(weights, scheme, method)

        def back(item: Any) -> F32:
            parameters, packed = item
            codes = kernels.load_codes(packed, how.encoding).reshape(len(parameters.scale), -1)
            e = how.encoding
            return kernels.decode(codes, parameters.scale, parameters.zero, e.bits, e.symmetric)

        def convert(rows: SourceRows) -> Encoded:
            return kernels.quantize_rows(rows, how.encoding, how.method, (-1.0, 1.0))

        detail = f" {how.method.describe()}"
        return _Conversion(scheme.name, detail, convert, how.encode, back)
    if isinstance(scheme, LevelScheme) and not method:
        return _level_conversion(weights, scheme)
    if not isinstance(scheme, GgmlScheme | LevelScheme):
        raise UsageError(
            f"there are no kernels of {scheme.name} alone to measure",
            hint="measure whole conversions: qconvert bench MODEL --end-to-end",
        )
    if method:
        raise UsageError(f"--range has no meaning for {scheme.name}")
    assert isinstance(scheme, GgmlScheme)
    block = GGML_BLOCKS[scheme.ggml_type]
    if weights.values.shape[1] % block.block:
        raise UsageError(f"{scheme.ggml_type} needs rows that divide into blocks of {block.block}")

    return _Conversion(
        scheme.name,
        "",
        lambda rows: kernels.ggml_quantize(block.name, rows),
        lambda x: kernels.ggml_encode(block.name, x.reshape(-1, block.block)),
        lambda data: kernels.ggml_decode(block.name, data),
    )


def _level_conversion(weights: Weights, scheme: LevelScheme) -> _Conversion:
    code, columns = level_code(scheme), weights.values.shape[1]

    return _Conversion(
        scheme.name,
        "",
        lambda rows: kernels.levels_encode(kernels.values(rows), code),
        lambda x: encoded_levels(x, code),
        lambda item: kernels.levels_decode(item[0], columns, item[1], code),
    )


def _kernel_lines(
    weights: Weights, conversion: _Conversion, name: str, workers: Workers
) -> Iterator[Line]:
    tiles = weights.tiles()
    tiles = tiles[: workers.threads * (REFERENCE_TILES if name == "reference" else NATIVE_TILES)]
    stored = [
        SourceRows(x.astype(ml_dtypes.bfloat16).tobytes(), "BF16", (x.shape[0], x.shape[1]))
        for x in tiles
    ]
    encoded = [conversion.encode(x) for x in tiles]
    lines: tuple[tuple[str, str, Callable[[Any], object], list[Any]], ...] = (
        ("quantize", conversion.detail, conversion.convert, stored),
        ("dequantize", "", conversion.decode, encoded),
    )
    for verb, detail, work, items in lines:
        yield _line(
            f"{verb} {conversion.name}{detail}, {name}",
            partial(_each, workers.map, work, items),
            sum(x.size for x in tiles),
            weights.values.size,
            name,
        )


def _gguf_py_lines(weights: Weights, kind: str) -> Iterator[Line]:
    """gguf-py has no threads."""
    type_ = gguf.GGMLQuantizationType[kind]
    tiles = weights.tiles()[:PEER_TILES]
    packed = [gguf.quants.quantize(x, type_) for x in tiles]
    for verb, work, items in (
        ("quantize", gguf.quants.quantize, tiles),
        ("dequantize", gguf.quants.dequantize, packed),
    ):
        yield _line(
            f"gguf-py {verb} {kind.lower()}, 1 thread",
            partial(_each, map, partial(work, qtype=type_), items),
            sum(x.size for x in tiles),
            weights.values.size,
        )


def _each(mapper: Mapper, work: Callable[[Any], Any], items: list[Any]) -> None:
    """Does the work and drops each result, so that its memory serves again, as in a conversion."""
    for _ in mapper(work, items):
        pass


def _line(
    name: str, work: Callable[[], object], size: int, total: int, running: str | None = None
) -> Line:
    part = "" if size == total else f", on 1/{total / size:.3g} of it"
    return Line(
        name=name + part,
        work=work,
        amount=size / 1e6,
        unit="Mweights/s",
        nbytes=SOURCE_BYTES * size,
        share=size / total,
        against=(COPY,),
        kernels=running,
    )
