"""What a matrix has to be so that it makes up for what was lost before it.

With X the inputs of the float model and Y those of the model quantized so far, rows of tokens, the
outputs that a weight W had are best given back by the T of the least |X W' - Y T'|² + λ |T - W|²:
T = W + W (X'Y - Y'Y) (Y'Y + λ I)^-1. Qronos (Zhang et al., 2025), GPTAQ (Li et al., 2025).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.source import rows_of
from qconvert.geometry import tiles
from qconvert.kernels.records import F32, F64
from qconvert.mapper import Mapper
from qconvert.model import Companion, Model, SourceFile, TensorInfo

DAMPING = 0.01  # λ, of the mean diagonal of Y'Y
STRIPE = 256  # channels whose products one thread sums at a time
PAIR_BYTES = 48  # of memory for each pair of channels


class Moments:
    """Sums over tokens of products of the inputs of a layer, in float64.

    Their bits depend on how tokens are cut into batches, not on the number of threads.

    Args:
        channels: of the input.

    Attributes:
        gram: Y'Y, (channels, channels).
        cross: (X - Y)'Y.
    """

    def __init__(self, channels: int) -> None:
        self.gram: F64 = np.zeros((channels, channels))
        self.cross: F64 = np.zeros((channels, channels))

    def add(self, before: F32, now: F32, mapper: Mapper) -> None:
        """Some tokens: their inputs in the float model and in the one quantized so far, (T, C)."""
        wide = now.astype(np.float64)
        lost = before.astype(np.float64) - wide

        def work(start: int) -> None:
            part = slice(start, start + STRIPE)
            self.gram[part] += wide[:, part].T @ wide
            self.cross[part] += lost[:, part].T @ wide

        for _ in mapper(work, range(0, len(self.gram), STRIPE)):
            pass

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.gram).all() and np.isfinite(self.cross).all())

    def change(self) -> F64 | None:
        """(X'Y - Y'Y) (Y'Y + λ I)^-1: T is W and W times that. None where all inputs were 0."""
        mean = float(self.gram.diagonal().mean())
        if not mean > 0:
            return None
        damped = self.gram.copy()
        damped[np.diag_indices_from(damped)] += DAMPING * mean
        return np.linalg.solve(damped, self.cross.T).T.astype(np.float64, copy=False)


class RepairedModel:
    """A `Model` of one matrix: a weight of another model, changed.

    Args:
        model, tensor: the weight W, (R, C), with C of at most `MOST_COLUMNS` of compensation.
        change: (C, C); values are W + W · change, rounded to float32.
    """

    def __init__(self, model: Model, tensor: TensorInfo, change: F64) -> None:
        self.path: Path = model.path
        self.kind = model.kind
        self.metadata = model.metadata
        self.sources: tuple[SourceFile, ...] = model.sources
        self.companions: tuple[Companion, ...] = model.companions
        self.tensor = TensorInfo(tensor.name, tensor.shape, "F32", 4 * tensor.size)
        self.tensors: tuple[TensorInfo, ...] = (self.tensor,)
        self._model, self._weight, self._change = model, tensor, change

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """See `Model.values`."""
        columns = tensor.shape[-1]
        first, last = start // columns, -(-stop // columns)
        found = np.empty((last - first, columns), np.float32)
        for part in tiles(last - first, columns):
            tile = replace(part, start=part.start + first * columns)
            weights = rows_of(self._model, self._weight, tile).astype(np.float64)
            row = part.start // columns
            with np.errstate(over="ignore"):  # which whoever takes them finds
                found[row : row + part.rows] = weights + weights @ self._change
        skipped = start - first * columns
        return found.ravel()[skipped : skipped + stop - start]

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """See `Model.raw`."""
        start, stop = offset // 4, -(-(offset + size) // 4)
        data = self.values(tensor, start, stop).astype("<f4").tobytes()
        return data[offset - 4 * start :][:size]

    def check_unchanged(self) -> None:
        self._model.check_unchanged()

    def close(self) -> None:
        pass  # the weight's model belongs to whoever opened it
