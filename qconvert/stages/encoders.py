"""How a tile of a tensor becomes bytes, one function a family of schemes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.errors import WeightError
from qconvert.geometry import Tile, row_length
from qconvert.model import Model, TensorInfo
from qconvert.observers.statistics import TensorStatistics
from qconvert.quantizers.affine import EncodedRows, ErrorSums, encode_rows, to_groups
from qconvert.quantizers.casts import cast
from qconvert.quantizers.fitting import fit
from qconvert.quantizers.ggml import GGML_BLOCKS
from qconvert.ranges import RangeMethod
from qconvert.schemes import CastScheme, GgmlScheme
from qconvert.stages.analyse import Analysis, Mapper, check_finite, observe_tensor, rows_of

Encoder = Callable[[Tile], EncodedRows]
F32 = NDArray[np.float32]


def affine_encoder(
    model: Model, tensor: TensorInfo, analysis: Analysis, method: RangeMethod
) -> Encoder:
    """Tiles to codes, with their own scales and zero points or those that all tiles share."""
    encoding = analysis.encoding

    def encode(tile: Tile) -> EncodedRows:
        x = rows_of(model, tensor, tile)
        shared = analysis.parameters(tile)
        if shared is not None:
            done = encode_rows(x, encoding, shared)
            return replace(done, scales=b"", zero=np.zeros(0, np.uint8))
        groups, counts = to_groups(x, encoding)
        return encode_rows(x, encoding, fit(groups, encoding, method, counts))

    return encode


def cast_encoder(model: Model, tensor: TensorInfo, scheme: CastScheme, mapper: Mapper) -> Encoder:
    """Tiles to another floating dtype.

    Raises:
        WeightError: NaN or Inf, or, when a tile is encoded, a weight beyond the dtype.
    """
    statistics = _finite(model, tensor, mapper)

    def encode(tile: Tile) -> EncodedRows:
        x = rows_of(model, tensor, tile)
        stored, back = cast(x, scheme.dtype)
        if not np.isfinite(back).all():
            raise WeightError(
                f"a weight does not fit {scheme.dtype}",
                path=model.path,
                tensor=tensor.name,
                found=f"{statistics.absmax:g}",
                hint=f"use --scheme bf16, or keep the tensor with --keep '{tensor.name}'",
            )
        return _self_contained(stored, x, back)

    return encode


def ggml_encoder(model: Model, tensor: TensorInfo, scheme: GgmlScheme, mapper: Mapper) -> Encoder:
    """Tiles to ggml blocks.

    Raises:
        WeightError: NaN or Inf, or, when a tile is encoded, a scale beyond float16.
    """
    block = GGML_BLOCKS[scheme.ggml_type]
    statistics = _finite(model, tensor, mapper)

    def encode(tile: Tile) -> EncodedRows:
        x = rows_of(model, tensor, tile)
        data = block.encode(x.reshape(-1, block.block))
        if not block.finite_scales(data):
            raise WeightError(
                "a block's scale does not fit float16",
                path=model.path,
                tensor=tensor.name,
                found=f"weights up to {statistics.absmax:g}",
                hint=f"keep the tensor with --keep '{tensor.name}'",
            )
        return _self_contained(data.tobytes(), x, block.decode(data).reshape(x.shape))

    return encode


def _finite(model: Model, tensor: TensorInfo, mapper: Mapper) -> TensorStatistics:
    statistics = observe_tensor(model, tensor, row_length(tensor.shape), mapper)
    check_finite(statistics, tensor, model.path)
    return statistics


def _self_contained(stored: bytes, x: F32, back: F32) -> EncodedRows:
    """Encoded rows of a format that carries its scales inside."""
    error = ErrorSums(x.size, *kernels.error_sums(x, back))
    return EncodedRows(stored, b"", np.zeros(0, np.uint8), error)
