"""Quantized tensors of a file that are the weight of one linear layer of the running model, row by
row: those whose scales can be tuned while it runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.raw import RawEncoding
from qconvert.codecs.source import RUN_VALUES
from qconvert.files import OpenModel
from qconvert.kernels.records import F32
from qconvert.model import TensorInfo, layer_name

I64 = NDArray[np.int64]
Place = tuple[str, I64]
MOST_RATE = 8e-3


def rate_of(tensors: Sequence[TensorInfo]) -> float:
    """Of the logarithms of factors: twice as far to go for each bit less. At 2.4 bits a rate of
    4e-3 to 8e-3 was best of those tried, at 3.4 bits 2e-3 to 4e-3, at 4.4 bits 1e-3.

    Args:
        tensors: of the file, which are tuned.
    """
    weights = sum(t.size for t in tensors)
    bits = 8 * sum(t.nbytes for t in tensors) / weights if weights else 0.0
    return min(1.25e-3 * math.exp2(4.4 - bits), MOST_RATE)


def find_places(
    made: OpenModel, origins: Mapping[str, str | None], model: Any
) -> tuple[dict[str, Place], dict[str, str]]:
    """Quantized tensors that are the weight of one linear layer.

    Args:
        made: the file, which ``model`` runs.
        origins: the names of its tensors that may be, and of those that they were made of.

    Returns:
        The tensor's name -> the layer's name in the running model and, row by row, which of its
        rows each is; and why other tensors are left as they are, by their names.
    """
    from torch import nn

    modules = dict(model.named_modules())
    uses = Counter(
        m.weight.data_ptr() for m in modules.values() if isinstance(m, nn.Linear | nn.Embedding)
    )
    infos = {t.name: t for t in made.tensors}
    found: dict[str, Place] = {}
    left: dict[str, str] = {}
    for name, origin in origins.items():
        stored = made.stored(infos[name])
        if isinstance(stored.encoding, RawEncoding):
            continue
        place = layer_name(origin) if origin else ""
        module = modules.get(place)
        why = stored.encoding.unscalable(stored.shape)
        if why is None and isinstance(module, nn.Embedding):
            why = "its rows are looked up"
        elif why is None and type(module) is not nn.Linear:
            why = "no linear layer of its own has it"
        elif why is None and stored.encoding.columns(stored.shape) > RUN_VALUES:
            why = "its rows are too long to be measured whole"
        elif why is None and module is not None and uses[module.weight.data_ptr()] > 1:
            why = "several layers share it"
        if why is None and module is not None:
            order = _order(_values(made, infos[name]), module.weight.numpy())
            if order is not None:
                found[name] = place, order
                continue
            why = "its rows cannot be told in the running model"
        left[name] = str(why)
    return found, left


def _values(made: OpenModel, tensor: TensorInfo) -> F32:
    values: F32 = made.values(tensor, 0, tensor.size).reshape(tensor.shape)
    return values


def _order(stored: F32, running: F32) -> I64 | None:
    """Which row of the running model's matrix each stored row is: where rows of heads have another
    order in a file. None where that is not clear.
    """
    if stored.shape != running.shape:
        return None
    if np.array_equal(stored, running):
        return np.arange(len(stored))
    rows = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(running))}
    found = [rows.get(row.tobytes(), -1) for row in stored]
    if len(rows) < len(stored) or len(set(found)) < len(stored) or -1 in found:
        return None
    return np.array(found)
