"""What weights become in a quantized file, and which of them lie beyond the ends of their grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs import codec_of
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Coded, Facts, Stored
from qconvert.codecs.levels import LevelEncoding
from qconvert.codecs.source import RUN_VALUES, rows_of
from qconvert.errors import UsageError, WeightError
from qconvert.geometry import Tile, tiles
from qconvert.kernels.arithmetic import nearest_zero_point, real_zero, round_scale
from qconvert.kernels.records import F32, Bools, Parameters
from qconvert.model import Model, TensorInfo
from qconvert.schemes import AffineScheme, CastScheme, LevelScheme, TensorScheme
from qconvert.stages.sensitivities import as_stored, encoded

TRAINED_FAMILIES = ("affine", "codebook", "levels", "ggml")
LARGEST_HALF = 65504.0  # of binary16


def check_trainable(scheme: object) -> TensorScheme:
    """A scheme that training can simulate.

    Raises:
        UsageError: it is none.
    """
    if getattr(scheme, "family", None) not in TRAINED_FAMILIES or isinstance(scheme, CastScheme):
        raise UsageError(
            "a scheme that cannot be trained with",
            found=getattr(scheme, "name", scheme),
            wanted="one grid for each tensor, in a .qblk or GGUF file: q..., nf4..., fp4..., c... "
            "or a ggml type such as q4_0",
            hint="qconvert quantize --list-schemes shows all; for directories of other tools train "
            "with the scheme on the same grid",
        )
    return scheme  # type: ignore[return-value]


def as_in_file(model: Model, tensor: TensorInfo, scheme: TensorScheme) -> Stored:
    """A tensor as `qconvert quantize` without a calibration stores it.

    Raises:
        WeightError: NaN or Inf, or weights that the scheme cannot hold.
    """
    return encoded(codec_of(scheme).encoder(model, tensor, scheme, Facts(tables=True)))


def settled_scheme(scheme: TensorScheme, stored: Stored) -> TensorScheme:
    """The scheme with the choice of symmetric or asymmetric, or of a table, that was made for the
    tensor.
    """
    if isinstance(scheme, AffineScheme) and isinstance(stored.encoding, Affine):
        return scheme.resolved(stored.encoding.symmetric)
    if isinstance(scheme, LevelScheme) and isinstance(stored.encoding, LevelEncoding):
        return replace(scheme, table=stored.encoding.code.levels)
    return scheme


@dataclass(frozen=True, slots=True)
class Decoded:
    """A stored tensor as values.

    Attributes:
        values: float32, in the tensor's shape.
        inside: which weights are not clipped, in that shape; None where all are, or where the
            encoding does not tell.
    """

    values: F32
    inside: Bools | None


def decoded(model: Model, tensor: TensorInfo, stored: Stored, *, clipping: bool) -> Decoded:
    """The values of a stored tensor, tile by tile.

    Args:
        model, tensor: the weights, which are read only where ``clipping`` is to be found.
    """
    columns = stored.encoding.columns(tensor.shape)
    values = np.empty(tensor.size, np.float32)
    mask: Bools | None = None
    for tile in tiles(tensor.size // columns, columns, RUN_VALUES):
        part = slice(tile.start, tile.stop)
        if not clipping:
            values[part] = stored.encoding.decoded(stored, tile).ravel()
            continue
        coded = stored.encoding.coded(stored, tile)
        values[part] = coded.values.ravel()
        found = unclipped(rows_of(model, tensor, tile), coded)
        if found is None or found.all():
            continue
        if mask is None:
            mask = np.ones(tensor.size, np.bool_)
        mask[part] = found.ravel()
    shaped = values.reshape(tensor.shape)
    return Decoded(shaped, None if mask is None else mask.reshape(tensor.shape))


def unclipped(weights: F32, coded: Coded) -> Bools | None:
    """Which weights (R, C) lie at most half a step beyond the ends of their grid, (R, C); all of a
    group without a scale. None without a grid, as of tables whose scale is the largest magnitude:
    no weight is beyond their ends.
    """
    n, grid = coded.integers, coded.grid
    if n is None or grid is None:
        return None
    columns = weights.shape[1]
    group = min(grid.group or n.group, columns)

    def by_column(of_groups: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(of_groups, group, axis=1)[:, :columns]

    half = grid.code_step / 2
    unit = by_column(grid.scale / np.float32(grid.code_step))
    zero = by_column(n.zero if grid.zero is None else grid.zero)
    start = weights if n.offset is None else weights - by_column(n.offset)
    place = np.divide(start, unit, out=np.zeros_like(weights), where=unit != 0) + zero
    found: Bools = (unit == 0) | ((place >= grid.low - half) & (place <= grid.high + half))
    return found


# --- scales and zero points that are learned ------------------------------------------------------


def first_parameters(stored: Stored) -> tuple[F32, F32]:
    """Scales and zero points, in codes, of the groups of an affine tensor, (G,) each."""
    encoding = stored.encoding
    assert isinstance(encoding, Affine)
    scale, zero = encoding.parameters(stored, 0, encoding.groups(stored.shape))
    return scale.copy(), real_zero(zero, encoding.bits)


def stored_parameters(
    scale: F32, zero_point: F32 | None, encoding: Affine, tensor: TensorInfo
) -> Parameters:
    """Learned scales and zero points (G,) as they are stored.

    Scales that a file does not have become the nearest one that it has: none is 0 or beyond its
    dtype, and only those of symmetric tensors below 8 bits are negative.

    Raises:
        WeightError: one is not finite.
    """
    numbers = [scale] if zero_point is None else [scale, zero_point]
    if not all(np.isfinite(n).all() for n in numbers):
        raise WeightError(
            "a learned scale or zero point is NaN or Inf",
            tensor=tensor.name,
            hint="train with a smaller learning rate, from the last good checkpoint",
        )
    if encoding.scale_dtype == "F16":
        scale = np.clip(scale, -LARGEST_HALF, LARGEST_HALF)
    if not encoding.symmetric or encoding.bits == 8:
        scale = np.maximum(scale, np.float32(0))
    stored = round_scale(scale.astype(np.float32), encoding.scale_dtype, np.ones_like(scale))
    if zero_point is None:
        return Parameters(stored, np.zeros(len(stored), np.int32))
    whole = np.zeros(len(stored), np.bool_)
    return Parameters(stored, nearest_zero_point(zero_point, whole, encoding))


def on_learned_grid(
    model: Model, tensor: TensorInfo, encoding: Affine, parameters: Parameters
) -> Stored:
    """A tensor with the nearest codes for given scales and zero points of its groups.

    Raises:
        WeightError: NaN or Inf.
    """
    columns = encoding.row_length
    x = rows_of(model, tensor, Tile(tensor.size // columns, columns, 0, True))
    done = kernels.encode_rows(x, encoding, parameters)
    return as_stored(tensor, encoding, [done.segments], model.path)


def group_length(encoding: Affine, shape: tuple[int, ...]) -> int:
    """Values that share a scale, of a group that is full."""
    if encoding.granularity == "tensor":
        return math.prod(shape)
    return min(encoding.block or encoding.row_length, encoding.row_length)
