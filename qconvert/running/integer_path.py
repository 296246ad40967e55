"""A linear layer from float input to float output in integers: formats/schemes/SPEC.md section 7.

    out = weight · input + bias

The input becomes signed bytes, the bytes are multiplied by the codes as they are stored, and one
float32 multiplication a group brings the sums back. Codes stay packed in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from qconvert.codecs.codec import Stored
from qconvert.geometry import TILE_VALUES
from qconvert.kernels.activations import DynamicInput, StaticInput, as_bytes
from qconvert.kernels.records import F32


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """The rows of a quantized tensor in memory, with the bytes of the file.

    Attributes:
        stored: how they lie there; its encoding `multiplies`.
        nbytes: of all segments.
    """

    stored: Stored
    nbytes: int

    @property
    def columns(self) -> int:
        return self.stored.encoding.columns(self.stored.shape)

    @property
    def rows(self) -> int:
        return math.prod(self.stored.shape) // self.columns

    @property
    def scheme(self) -> str:
        return self.stored.encoding.name

    def values(self, first: int, last: int) -> F32:
        """Rows ``first..last`` dequantized, (last - first, c)."""
        found: F32 = self.stored.values(first * self.columns, last * self.columns)
        return found.reshape(-1, self.columns)

    def linear(self, x: F32, bias: F32 | None, how: StaticInput | DynamicInput) -> F32:
        """out = weight · x + bias with ``x`` as signed bytes.

        Args:
            x: (M, c). A row that is not finite gives a row of NaN, as a float layer may.
            bias: (R,), added in float32 after everything else.
            how: the input becomes bytes.

        Returns:
            float32 (M, R).
        """
        finite = np.asarray(np.isfinite(x).all(axis=1))
        clean = x if finite.all() else np.where(finite[:, None], x, np.float32(0))
        a = as_bytes(clean, how)
        out = np.empty((len(x), self.rows), np.float32)
        # Codes that are unpacked once and used for all of x: the reference has them as int32.
        step = max(1, TILE_VALUES // self.columns)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            out[:, first:last] = self.stored.encoding.product(self.stored, first, last, a)
        out[~finite] = np.nan
        if bias is not None:
            out += bias
        return out


def read_matrix(stored: Stored) -> StoredMatrix:
    """The rows of a quantized tensor, as large in memory as in the file."""
    segments = {
        s.kind: stored.read(s.kind, 0, s.size) for s in stored.encoding.segments(stored.shape)
    }

    def read(kind: str, offset: int, size: int) -> bytes:
        return segments[kind][offset : offset + size]

    return StoredMatrix(replace(stored, read=read), sum(map(len, segments.values())))
