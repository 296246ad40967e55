"""Weights as small floating numbers: scales searched for the least squared error.

Those of four bits are searched, and weighted, as ggml's MXFP4 and NVFP4 are: section 8 of
formats/schemes/SPEC.md. Its blocks hold the same numbers in another order; its NVFP4 has no scale
of the tensor, by which rows are multiplied before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Encoder, Facts, Outcome
from qconvert.codecs.exchange.floats import e4m3, largest_of
from qconvert.codecs.exchange.micro import FP4, FP8, POWERS, Micro, divisor_of, scaled
from qconvert.codecs.source import RUN_VALUES, rows_of, tiles_of
from qconvert.geometry import Tile
from qconvert.kernels.records import F32, U8, Bytes, Encoded, ErrorSums, SourceRows
from qconvert.model import Model, TensorInfo

FP8_EXPONENT = 8  # of its largest numbers
BIAS = 127  # of bytes that are powers of two
_GGML = {POWERS: "MXFP4", FP8: "NVFP4"}  # ggml's types by the numbers of their scales


@dataclass(frozen=True, slots=True)
class MicroEncoder(Encoder):
    """Small numbers whose scales leave the least error.

    Attributes:
        divisor: the scale of the tensor; 1 where the layout has none.
        weights: of the input channels, (columns,), where known; for numbers of four bits.
    """

    model: Model
    tensor: TensorInfo
    layout: Micro
    divisor: np.float32
    weights: F32 | None

    @property
    def encoding(self) -> Micro:
        return self.layout

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, RUN_VALUES)

    def encode(self, tile: Tile) -> Encoded:
        x = rows_of(self.model, self.tensor, tile)
        search = self._fours if self.layout.number == FP4 else self._eights
        codes, scales, values = search(x)
        sums = kernels.error_sums(x, values)
        segments: dict[str, Bytes] = {
            self.layout.packed[0]: codes.tobytes(),
            self.layout.scales[0]: scales.tobytes(),
        }
        return Encoded(segments, ErrorSums(x.size, *sums))

    def _fours(self, x: F32) -> tuple[U8, U8, F32]:
        """Codes two to a byte, scales, and what they are worth."""
        name = _GGML[self.layout.scale_number]
        wide, weights = x * self.divisor, self.weights
        block = 64 if name == "NVFP4" else 32
        short = -x.shape[1] % block
        if short:  # groups of zeros, which are left out again
            wide = np.pad(wide, ((0, 0), (0, short)))
            weights = None if weights is None else np.pad(weights, (0, short))
        if weights is not None:
            weights = np.ascontiguousarray(weights).reshape(-1, block)
        done = kernels.ggml_quantize(name, SourceRows.of(wide), weights)
        data = np.frombuffer(done.segments["data"], np.uint8)
        codes, scales = unpacked_blocks(name, data.reshape(len(x), -1))
        codes = np.ascontiguousarray(codes[:, : x.shape[1] // 2])
        scales = np.ascontiguousarray(scales[:, : self.layout.groups(x.shape[1])])
        each: F32 = kernels.widen(scales.tobytes(), self.layout.scale_number).reshape(scales.shape)
        numbers = kernels.widen(codes.tobytes(), FP4).reshape(x.shape)
        return codes, scales, scaled(numbers, each / self.divisor, self.layout.group)

    def _eights(self, x: F32) -> tuple[U8, U8, F32]:
        """The same of E4M3: of the power of two with which the largest number fits, and the one
        with which it is cut off if it is above 448, whichever leaves less error.
        """
        group = self.layout.group
        groups = x.reshape(len(x), -1, group)
        exponent = np.frexp(np.abs(groups).max(axis=2))[1] - 1 - FP8_EXPONENT
        found: list[tuple[U8, U8, F32, F32]] = []
        for step in (0, 1):
            stored = np.clip(exponent + step + BIAS, 0, 2 * BIAS).astype(np.uint8)
            scale = np.ldexp(np.float32(1), stored.astype(np.int32) - BIAS)[:, :, None]
            codes = e4m3(groups / scale)
            values = kernels.widen(codes.tobytes(), FP8).reshape(groups.shape) * scale
            noise: F32 = np.square(groups - values).sum(axis=2)
            found.append((codes, stored, values, noise))
        first, second = found
        better = second[3] < first[3]
        codes = np.where(better[:, :, None], second[0], first[0])
        values = np.where(better[:, :, None], second[2], first[2])
        return codes, np.where(better, second[1], first[1]), values.reshape(x.shape)

    def shared(self) -> dict[str, Bytes]:
        overall = self.layout.overall
        return {} if overall is None else {overall.suffix: self.divisor.astype("<f4").tobytes()}

    def outcome(self, seen: Encoded) -> Outcome:
        return Outcome(seen.error)


def unpacked_blocks(name: str, blocks: U8) -> tuple[U8, U8]:
    """Blocks of ggml's MXFP4 or NVFP4, rows of them, as two codes that follow each other in each
    byte, and scales.

    ggml has two codes that are half a group apart in a byte.
    """
    rows = len(blocks)
    size, scales, group = (17, 1, 32) if name == "MXFP4" else (36, 4, 16)
    data = blocks.reshape(rows, -1, size)
    halves = data[:, :, scales:].reshape(rows, -1, group // 2)
    codes = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(rows, -1, 2)
    return codes[:, :, 0] | codes[:, :, 1] << 4, data[:, :, :scales].reshape(rows, -1)


def micro_encoder(
    model: Model, tensor: TensorInfo, layout: Micro, facts: Facts, parts: Sequence[str]
) -> MicroEncoder:
    """The encoder of a matrix that is no `Layout.misfit`.

    Args:
        parts: names of the tensors that have one scale of the tensor with it.
    """
    divisor = np.float32(1)
    if layout.overall is not None:
        divisor = divisor_of(largest_of(model, tensor, parts, facts.mapper))
    return MicroEncoder(model, tensor, layout, divisor, facts.mean_square(tensor.shape[-1]))
