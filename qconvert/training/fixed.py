"""Codes of weights on a grid that stays as it is: that of a tensor which was quantized before."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from qconvert import kernels
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Stored
from qconvert.codecs.levels import LevelEncoding
from qconvert.codecs.source import rows_of
from qconvert.geometry import PACK_GROUP, Tile
from qconvert.kernels.records import F32, Bytes, Parameters
from qconvert.model import Model, TensorInfo
from qconvert.training.weights import on_learned_grid


def can_stay(stored: Stored) -> bool:
    """Whether other codes can be found for the scales of a tensor."""
    return isinstance(stored.encoding, Affine | LevelEncoding)


def held(stored: Stored) -> Stored:
    """The tensor with its bytes in memory, for when its file is gone."""
    segments = stored.encoding.segments(stored.shape)
    return _of(stored, {s.kind: stored.read(s.kind, 0, s.size) for s in segments})


def on_grid_of(model: Model, tensor: TensorInfo, base: Stored) -> Stored:
    """A tensor with the nearest codes for the scales and zero points of another.

    Raises:
        WeightError: NaN or Inf.
    """
    encoding = base.encoding
    if isinstance(encoding, Affine):
        scale, zero = encoding.parameters(base, 0, encoding.groups(base.shape))
        return on_learned_grid(model, tensor, encoding, Parameters(scale, zero))
    assert isinstance(encoding, LevelEncoding)
    columns = encoding.row_length
    rows = tensor.size // columns
    x = rows_of(model, tensor, Tile(rows, columns, 0, True))
    padded = np.zeros((rows, -(-columns // PACK_GROUP) * PACK_GROUP), np.uint8)
    padded[:, :columns] = _nearest_levels(x, base, encoding)
    packed = kernels.pack(padded.ravel(), encoding.code.bits).tobytes()
    others = [s for s in encoding.segments(base.shape) if s.kind != "codes"]
    return _of(base, {"codes": packed, **{s.kind: base.read(s.kind, 0, s.size) for s in others}})


def _nearest_levels(x: F32, base: Stored, encoding: LevelEncoding) -> F32:
    """Places in the table of the levels that are nearest to weights (R, C); those of ``base`` where
    the scale is 0.
    """
    codes = encoding.codes(base)
    scale = codes.scale
    place = np.divide(x, scale, out=np.zeros_like(x), where=scale != 0) + codes.zero_point
    table = encoding.code.table.astype(np.float32)
    found = np.searchsorted((table[1:] + table[:-1]) / 2, place)
    return np.where(scale != 0, found, codes.codes)


def _of(stored: Stored, segments: dict[str, Bytes]) -> Stored:
    return replace(stored, read=partial(_part, segments))


def _part(segments: dict[str, Bytes], kind: str, offset: int, size: int) -> bytes:
    return bytes(segments[kind][offset : offset + size])
