"""Tables of levels that are fitted to a tensor, where that gains: formats/schemes/SPEC.md section
11.

The usual tables are for weights that are near Gaussian. Those of heavier tails want their inner
levels closer: a fitted table costs no byte, since the encoding has its table anyway.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from qconvert import kernels
from qconvert.codecs.source import rows_of
from qconvert.geometry import PACK_GROUP, Tile, row_length
from qconvert.kernels.arithmetic import level_steps
from qconvert.kernels.records import F32, Encoded, LevelCode
from qconvert.model import Model, TensorInfo

SAMPLE = 1 << 16  # values, in whole rows: the scale of a row hangs on its largest
ROUNDS = 10
WORTH = 0.998  # of the noise before: what another round has to leave
LEAST_GAIN_DB = 0.1  # on rows that were not fitted to


def fitted_code(
    model: Model, tensor: TensorInfo, code: LevelCode, mean_square: F32 | None
) -> tuple[LevelCode, float]:
    """The code with a table of the tensor's own, and what that gains in dB over its table on rows
    of the sample that were not fitted to; the same code and 0 where that is less than 0.1 dB.

    Evenly spaced rows are read, 2^16 values or two rows: one half is fitted to, the other judges.

    Args:
        mean_square: of the input channels, (columns,): weights of the error; None for 1.

    Raises:
        WeightError: NaN or Inf in the sample.
    """
    columns = row_length(tensor.shape)
    rows = tensor.size // columns
    if rows < 2:
        return code, 0.0
    places = np.unique(np.linspace(0, rows - 1, max(2, min(rows, SAMPLE // columns))).astype(int))
    x = np.concatenate(
        [rows_of(model, tensor, Tile(1, columns, int(r) * columns, True)) for r in places]
    )
    found = fitted_levels(x[::2], code, mean_square)
    before, after = (_noise(x[1::2], c, mean_square)[1] for c in (code, found))
    gain = 10 * math.log10(before / after) if 0 < after < before else 0.0
    return (found, gain) if gain >= LEAST_GAIN_DB else (code, 0.0)


def fitted_levels(x: F32, code: LevelCode, mean_square: F32 | None = None) -> LevelCode:
    """The code with the table that rows (R, C) are fitted by: Lloyd's method, in which steps and
    codes that are best for levels take turns with levels that are best for them.
    """
    done, best = _noise(x, code, mean_square)
    for _ in range(ROUNDS):
        levels = _best_levels(x, done, code, mean_square)
        if levels is None:
            break
        tried = replace(code, levels=levels)
        done, noise = _noise(x, tried, mean_square)
        if not noise < WORTH * best:
            break
        code, best = tried, noise
    return code


def _noise(x: F32, code: LevelCode, mean_square: F32 | None) -> tuple[Encoded, float]:
    """Rows as codes, and their error."""
    done = kernels.levels_encode(x, code, mean_square)
    weighed = mean_square is not None
    return done, done.error.weighted_noise if weighed else done.error.noise


def _best_levels(
    x: F32, done: Encoded, code: LevelCode, mean_square: F32 | None
) -> tuple[int, ...] | None:
    """The levels of least squared error for codes and steps, as integers that ascend; None where
    those would not lie on either side of 0.
    """
    rows, columns = x.shape
    step = np.frombuffer(done.segments["scales"], np.uint8).reshape(rows, -1)
    steps = level_steps(step, done.segments["row_scales"], code)
    packed = np.frombuffer(done.segments["codes"], np.uint8)
    padded = -(-columns // PACK_GROUP) * PACK_GROUP
    codes = kernels.unpack(packed, code.bits).reshape(rows, padded)[:, :columns].ravel()

    def each(of_blocks: np.ndarray) -> np.ndarray:
        return np.repeat(of_blocks.astype(np.float64), code.block, axis=1)[:, :columns]

    scale = each(steps.scale)
    rest = x - scale * each(steps.shifts)
    weight = 1.0 if mean_square is None else mean_square.astype(np.float64)
    count = 1 << code.bits
    share = np.bincount(codes, (weight * scale * rest).ravel(), count)
    whole = np.bincount(codes, (weight * scale * scale).ravel(), count)
    wanted = np.where(whole > 0, share / np.where(whole > 0, whole, 1), code.levels)
    lowest, highest = -127, 127 - code.shifts[-1]
    levels = np.rint(np.clip(wanted, lowest, highest)).astype(int)
    at = np.arange(count)
    levels = np.minimum(levels, highest - at[::-1])  # room for those above
    levels = np.maximum.accumulate(np.maximum(levels, lowest + at) - at) + at
    if not levels[0] < 0 < levels[-1]:
        return None
    return tuple(levels.tolist())
