"""How much each input channel of a layer reaches its output: the norms of the weight's columns,
or of its rows where they are the inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.observers import READ_WEIGHTS, ObserverSettings
from qconvert.errors import WeightError
from qconvert.geometry import TILE_VALUES
from qconvert.model import Model, layer_name

F64 = NDArray[np.float64]
LARGEST = 1e100  # of a weight: no sum of its squares overflows


def column_norms(model: Model, layer: str, *, transposed: bool = False) -> F64 | None:
    """Σ_r W[r,c]² of the weight of a layer, (columns,), read a tile at a time; Σ_c, (rows,), of one
    that is stored ``transposed``, (in, out).

    None where the model has no weight of that name with at least two dimensions.

    Raises:
        WeightError: a weight is NaN or Inf, or too large to be squared.
    """
    found = [t for t in model.tensors if layer_name(t.name) == layer and len(t.shape) >= 2]
    found = [t for t in found if t.real]
    if not found or not found[0].size:
        return None
    tensor, columns = found[0], found[0].shape[-1]
    sums = np.zeros(tensor.size // columns if transposed else columns)
    step = max(1, TILE_VALUES // columns) * columns
    for start in range(0, tensor.size, step):
        tile = model.values(tensor, start, min(start + step, tensor.size)).astype(np.float64)
        good = (np.abs(tile) < LARGEST).reshape(-1, columns).all(axis=0)
        if not good.all():
            raise WeightError(
                "a weight is NaN, Inf or too large",
                path=model.path,
                tensor=tensor.name,
                found=f"column {int(np.argmin(good)):,}",
                wanted=f"below {LARGEST:g}",
                hint="repair the model first; qconvert inspect says where",
            )
        tile *= tile
        squares = tile.reshape(-1, columns)
        if transposed:
            first = start // columns
            sums[first : first + len(squares)] = squares.sum(axis=1)
        else:
            sums += squares.sum(axis=0)
    return sums


def weight_norms(
    settings: ObserverSettings,
    model: Model | None,
    layer: str,
    features: int,
    transposed: bool,
) -> F64 | None:
    """What the observer of a layer wants of its weight; None where that is nothing, or unknown.

    Args:
        transposed: whether the weight is stored (in, out).
    """
    if model is None or settings.name not in READ_WEIGHTS:
        return None
    norms = column_norms(model, layer, transposed=transposed)
    return None if norms is None or len(norms) != features else norms  # refused later, by name
