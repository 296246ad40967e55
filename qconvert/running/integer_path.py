"""A linear layer from float input to float output in integers: formats/schemes/SPEC.md section 7.

    out = weight · input + bias

The input becomes signed bytes, the bytes are multiplied by the codes as they are stored, and one
float32 multiplication a group brings the sums back. Codes stay packed in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import SCALE_SIZES, AffineEncoding
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_header import StoredTensor
from qconvert.geometry import TILE_VALUES
from qconvert.kernels.activations import dynamic_activations, static_activations
from qconvert.kernels.records import Parameters
from qconvert.quantizers.affine import decode_groups, load_scales, load_zero_points

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class StaticInput:
    """Scale and zero point of a layer's input, known beforehand; symmetric with zero point 0.

    Attributes:
        scale: above 0.
        zero_point: -128..127.
    """

    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class DynamicInput:
    """A scale for each row of a layer's input, from the row itself.

    Attributes:
        symmetric: whether without a zero point.
    """

    symmetric: bool = True


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """The rows of a quantized tensor in memory, with the bytes of the file.

    Attributes:
        encoding: how they are stored.
        rows: their number; each has ``encoding.row_length`` columns.
        codes, scales, zero_points: the segments; no zero points when symmetric.
    """

    encoding: AffineEncoding
    rows: int
    codes: bytes
    scales: bytes
    zero_points: bytes

    @property
    def nbytes(self) -> int:
        return len(self.codes) + len(self.scales) + len(self.zero_points)

    def values(self, first: int, last: int) -> F32:
        """Rows ``first..last`` dequantized, (last - first, c)."""
        encoding = self.encoding
        codes = kernels.load_codes(self._packed(first, last), encoding).reshape(last - first, -1)
        scale, zero = self._parameters(first, last)
        groups = codes[:, : scale.shape[1] * (encoding.block or encoding.row_length)]
        values = decode_groups(
            groups.reshape(scale.size, -1), Parameters(scale.ravel(), zero.ravel()), encoding
        )
        return values.reshape(last - first, -1)[:, : encoding.row_length]

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
        if isinstance(how, DynamicInput):
            a = dynamic_activations(clean, symmetric=how.symmetric)
        else:
            a = static_activations(clean, how.scale, how.zero_point)
        out = np.empty((len(x), self.rows), np.float32)
        # Codes that are unpacked once and used for all of x: the reference has them as int32.
        step = max(1, TILE_VALUES // self.encoding.row_length)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            scale, zero = self._parameters(first, last)
            out[:, first:last] = kernels.product(
                self._packed(first, last), scale, zero, self.encoding, a
            )
        out[~finite] = np.nan
        if bias is not None:
            out += bias
        return out

    def _packed(self, first: int, last: int) -> bytes:
        nbytes = self.encoding.row_codes * self.encoding.bits // 8
        return self.codes[first * nbytes : last * nbytes]

    def _parameters(self, first: int, last: int) -> tuple[F32, I32]:
        """Scale and zero steps of some rows, (last - first, G)."""
        encoding = self.encoding
        shape = (last - first, encoding.row_groups)
        if encoding.granularity == "tensor":
            low, high = 0, 1
        else:
            low, high = first * shape[1], last * shape[1]
        size = SCALE_SIZES[encoding.scale_dtype]
        scale = load_scales(self.scales[low * size : high * size], encoding)
        if encoding.symmetric:
            zero = np.zeros(high - low, np.int32)
        else:
            zero = load_zero_points(self.zero_points, encoding)[low:high]
        if high - low == 1:
            return np.broadcast_to(scale, shape), np.broadcast_to(zero, shape)
        return scale.reshape(shape), zero.reshape(shape)


def read_matrix(model: QblkModel, stored: StoredTensor) -> StoredMatrix:
    """The rows of a quantized tensor, as large in memory as in the file."""
    encoding = stored.encoding
    assert isinstance(encoding, AffineEncoding)
    found = {s.kind: model.read_at(s.offset, s.size) for s in stored.segments}
    return StoredMatrix(
        encoding=encoding,
        rows=encoding.rows(stored.shape),
        codes=found["codes"],
        scales=found["scales"],
        zero_points=found.get("zero_points", b""),
    )
