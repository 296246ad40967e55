"""Rows of a written file as ``verify`` needs them: decoded, and in integer units, whatever the
container.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_header import StoredTensor
from qconvert.geometry import Tile
from qconvert.kernels.arithmetic import integer_rows, zero_steps
from qconvert.kernels.records import Activations, IntegerRows
from qconvert.kernels.reference.ggml import GGML_BLOCKS
from qconvert.model import Model, TensorInfo

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StaticParameters:
    """Activation scale and zero point from the file."""

    scale: float
    zero_point: int


def static_parameters(stored: StoredTensor | None) -> StaticParameters | None:
    """The static activation parameters of a tensor, if the file has them."""
    if stored is None or stored.activation is None:
        return None
    return StaticParameters(float(stored.activation["scale"]), stored.activation["zero_point"])


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a tensor, or a run of columns of one row.

    Attributes:
        dtype: of the tensor.
        start, stop: place in the flattened tensor.
        first_column: of the run.
        values: decoded, float32 (R, C).
        integer: in integer units; None where the file holds plain numbers or a type we have no
            integer product for.
        scale: of a step in each group, (R, G); None without codes.
        low, high: smallest and largest code, in the units of ``integer``.
        code_step: units of ``integer`` between neighbouring codes.
        scaled_always: whether a scale of 0 promises a group of zeros (ggml's may underflow).
        scale_rounding, offset_rounding: see `kernels.worst_step`; None where codes are made with
            the numbers that are stored.
    """

    dtype: str
    start: int
    stop: int
    first_column: int
    values: F32
    integer: IntegerRows | None
    scale: F32 | None = None
    low: int = 0
    high: int = 0
    code_step: int = 1
    scaled_always: bool = True
    scale_rounding: F32 | None = None
    offset_rounding: F32 | None = None

    def worst_step(self, weights: F32) -> float:
        """Largest |weight - value| in steps over the weights that were not clipped."""
        if self.integer is None or self.scale is None:
            return 0.0
        worst, unscaled = kernels.worst_step(
            *(weights, self.values, self.integer.group, self.scale, self.integer.offset),
            *(self.integer.zero, self.code_step, self.low, self.high),
            *(self.scale_rounding, self.offset_rounding),
        )
        return math.inf if unscaled and self.scaled_always else worst

    def offset_magnitude(self, a: Activations) -> NDArray[np.float64] | float:
        """Σ|offset · input| per output: its rounding adds to that of the products."""
        if self.integer is None or self.integer.offset is None:
            return 0.0
        total = np.zeros((len(a.codes), len(self.values)))
        for group, span in self.integer.spans():
            inputs = np.abs(a.values[:, span]).sum(axis=1)[:, None]
            total += inputs * np.abs(self.integer.offset[:, group])
        return total


def quantized_rows(model: Model, tensor: TensorInfo, tile: Tile, columns: int) -> Rows:
    """Read a tile of a quantized (or cast) tensor."""
    first = tile.start % columns
    if isinstance(model, QblkModel) and isinstance(
        model.stored[tensor.name].encoding, AffineEncoding
    ):
        return _affine_rows(model, model.stored[tensor.name], tile, first)
    if tensor.dtype in GGML_BLOCKS:
        return _ggml_rows(model, tensor, tile, first)
    values = model.values(tensor, tile.start, tile.stop).astype(np.float32)
    values = values.reshape(tile.rows, tile.columns)
    return Rows(tensor.dtype, tile.start, tile.stop, first, values, None)


def _affine_rows(model: QblkModel, stored: StoredTensor, tile: Tile, first: int) -> Rows:
    encoding = stored.encoding
    assert isinstance(encoding, AffineEncoding)
    row = tile.start // encoding.row_length
    part = model.rows(stored, row, row + tile.rows, first, first + tile.columns)
    length = part.codes.shape[1] // part.scale.shape[1]
    values = kernels.decode(
        part.codes.reshape(-1, length),
        part.scale.ravel(),
        part.zero.ravel(),
        encoding.bits,
        encoding.symmetric,
    )
    steps = 1 if encoding.symmetric else zero_steps(encoding.bits)
    centre = (1 << (encoding.bits - 1)) if encoding.symmetric else 0
    return Rows(
        dtype=encoding.scheme,
        start=tile.start,
        stop=tile.stop,
        first_column=first,
        values=values.reshape(tile.rows, -1)[:, : tile.columns],
        integer=integer_rows(part.codes[:, : tile.columns], part.scale, part.zero, encoding),
        scale=part.scale,
        low=(1 if encoding.symmetric and encoding.bits == 8 else 0) - centre,
        high=encoding.levels * steps - centre,
        code_step=steps,
    )


def _ggml_rows(model: Model, tensor: TensorInfo, tile: Tile, first: int) -> Rows:
    block = GGML_BLOCKS[tensor.dtype]
    start, stop = (n // block.block * block.nbytes for n in (tile.start, tile.stop))
    data = np.frombuffer(model.raw(tensor, start, stop - start), np.uint8)
    data = data.reshape(-1, block.nbytes)
    parts = block.splitter(data)
    of_scale, of_offset = block.rounding(data)
    per_row = tile.columns // block.group
    scale = parts.scale.reshape(tile.rows, per_row)

    def by_group(of_blocks: F32) -> F32:
        return np.repeat(of_blocks, block.block // block.group).reshape(scale.shape)

    return Rows(
        dtype=tensor.dtype,
        start=tile.start,
        stop=tile.stop,
        first_column=first,
        values=kernels.ggml_decode(block.name, data).reshape(tile.rows, tile.columns),
        integer=IntegerRows(
            codes=parts.codes.reshape(tile.rows, tile.columns),
            zero=np.zeros((tile.rows, per_row), np.int32),
            scale=scale,
            offset=None if parts.offset is None else parts.offset.reshape(scale.shape),
            group=block.group,
        ),
        scale=scale * np.float32(block.gap),  # of a step, which is a gap
        low=block.codes[0],
        high=block.codes[1],
        code_step=block.gap,
        scaled_always=False,
        scale_rounding=None if of_scale is None else by_group(of_scale),
        offset_rounding=None if of_offset is None else by_group(of_offset),
    )
