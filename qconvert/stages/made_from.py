"""What the tensors of an output are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert.geometry import row_length
from qconvert.model import Model, TensorInfo

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """What a tensor is made from.

    Attributes:
        sources: tensors of the source, one below the other.
        rows: which of their rows those of the tensor are; None where they are the same.
        added: to their values.
        whole: whether its rows are rows of the sources, neither cut up nor with values changed.
        turned: which rows its own are of the sources with their last two dimensions exchanged; None
            where they are none.
    """

    sources: tuple[TensorInfo, ...]
    rows: I64 | None = None
    added: float = 0.0
    whole: bool = True
    turned: I64 | None = None


def made_from(model: Model, tensor: TensorInfo) -> MadeFrom:
    """What a tensor is made from, of a model under the names of an output."""
    from qconvert.architectures.mapped import MappedModel  # 0.1 s, and known where it is needed

    if not isinstance(model, MappedModel):
        return MadeFrom((tensor,))
    made = model.made(tensor)
    every = np.arange(tensor.size // row_length(tensor.shape), dtype=np.int64)
    rows = made.locate(every) if made.locate else None
    turned = made.turned(every) if made.turned else None
    whole = not (made.order or made.change or made.factors)
    return MadeFrom(made.sources, rows, made.added, whole, turned)
