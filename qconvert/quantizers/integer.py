"""The integer matrix product of a quantized layer: formats/schemes/SPEC.md section 7.

Activations become signed bytes; codes are multiplied as they are stored, zero points are corrected
for afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.encoding import AffineEncoding
from qconvert.quantizers.affine import load_codes

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
SEGMENT = 16_384  # columns that int32 can take at any width: 255 · 255 · 16,384 < 2^30


@dataclass(frozen=True, slots=True)
class Activations:
    """Inputs as signed bytes: value = (codes - zero_point) · scale.

    Attributes:
        codes: int8 (M, c).
        scale: float32 (M,).
        zero_point: -128..127; one for all rows, or int32 (M,).
    """

    codes: NDArray[np.int8]
    scale: F32
    zero_point: int | I32

    @property
    def zero_points(self) -> I32:
        """The zero point of each row, int32 (M, 1)."""
        shape = (len(self.codes), 1)
        return np.broadcast_to(np.asarray(self.zero_point, np.int32).reshape(-1, 1), shape)

    @property
    def values(self) -> F64:
        """What the codes stand for, float64 (M, c)."""
        return (self.codes.astype(np.float64) - self.zero_points) * self.scale[:, None]


def dynamic_activations(x: F32, *, symmetric: bool = True) -> Activations:
    """Signed bytes with a scale, and unless symmetric a zero point, for each row of (M, c)."""
    if not symmetric:
        return _asymmetric_rows(x)
    magnitude = np.abs(x).max(axis=1)
    scale = (magnitude / np.float32(127)).astype(np.float32)
    scale[scale == 0] = 1
    codes = np.clip(np.rint(x / scale[:, None]), -127, 127).astype(np.int8)
    return Activations(codes, scale, 0)


def _asymmetric_rows(x: F32) -> Activations:
    zero = np.float32(0)
    low, high = np.minimum(x.min(axis=1), zero), np.maximum(x.max(axis=1), zero)
    scale = high / np.float32(255) - low / np.float32(255)  # the difference may overflow
    scale[scale == 0] = 1
    zero_point = np.clip(np.rint(np.float32(-128) - low / scale), -128, 127)
    codes = np.rint(x / scale[:, None] + zero_point[:, None])
    return Activations(
        np.clip(codes, -128, 127).astype(np.int8), scale, zero_point.astype(np.int32)
    )


def static_activations(x: F32, scale: float, zero_point: int) -> Activations:
    """Asymmetric signed bytes with parameters known beforehand."""
    s = np.float32(scale)
    codes = np.clip(np.rint(x / s + np.float32(zero_point)), -128, 127).astype(np.int8)
    return Activations(codes, np.full(len(x), s, np.float32), zero_point)


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """Weight rows in integer units: value = (code - zero) · scale + offset.

    Attributes:
        codes: int16 (R, c), within -255..255.
        zero: int32 (R, G).
        scale: float32 (R, G).
        offset: float32 (R, G) or None; the float minimum that some ggml types have.
        group: columns of a group; the last may be shorter.
    """

    codes: NDArray[np.int16]
    zero: NDArray[np.int32]
    scale: F32
    offset: F32 | None
    group: int

    def spans(self) -> list[tuple[int, slice]]:
        """Index of the group and its columns; groups beyond 16,384 columns come in segments."""
        columns = self.codes.shape[1]
        step = min(self.group, SEGMENT)
        return [
            (start // self.group, slice(start, min(start + step, columns)))
            for start in range(0, columns, step)
        ]


@dataclass(frozen=True, slots=True)
class Product:
    """Result of the integer path.

    Attributes:
        y: float32 (M, R).
        exact: whether every int32 accumulator equals the int64 one; None when that was not asked
            for.
    """

    y: F32
    exact: bool | None


def integer_rows(
    codes: NDArray[np.uint8], scale: F32, zero: NDArray[np.int32], encoding: AffineEncoding
) -> IntegerRows:
    """Unsigned codes (R, c) with parameters (R, G) in integer units: k of section 7."""
    symmetric = encoding.symmetric
    steps = 1 if symmetric else kernels.zero_steps(encoding.bits)
    centre = 1 << (encoding.bits - 1) if symmetric else 0
    return IntegerRows(
        codes=codes.astype(np.int16) * np.int16(steps) - np.int16(centre),
        zero=zero,
        scale=scale / np.float32(steps),
        offset=None,
        group=encoding.block or codes.shape[1],
    )


def integer_product(rows: IntegerRows, a: Activations, *, check: bool = False) -> Product:
    """y = a · rowsᵀ in integers.

    Args:
        check: whether to hold each accumulator against exact arithmetic without correction terms.
    """
    y = np.zeros((len(a.codes), len(rows.codes)), np.float32)
    exact = True if check else None
    spans = rows.spans()
    whole = [s for s in spans if s[1].stop - s[1].start == spans[0][1].stop]
    for run in (whole, spans[len(whole) :]):  # a shorter span can only be the last
        if run:
            y, same = _equal_spans(rows, a, run, y, check)
            exact = exact and same
    return Product(y * a.scale[:, None], exact)


def _equal_spans(
    rows: IntegerRows, a: Activations, spans: list[tuple[int, slice]], y: F32, check: bool
) -> tuple[F32, bool]:
    """``y`` (M, R) with what spans of one length add to it in their order, and whether every int32
    accumulator is the exact one.
    """
    groups = [group for group, _ in spans]
    columns = slice(spans[0][1].start, spans[-1][1].stop)
    shape = (len(spans), spans[0][1].stop - spans[0][1].start)
    codes = rows.codes[:, columns].reshape(-1, *shape).swapaxes(0, 1)  # (S, R, L)
    inputs = a.codes[:, columns].reshape(-1, *shape).swapaxes(0, 1)  # (S, M, L)
    zero = rows.zero[:, groups].T[:, None, :]  # (S, 1, R)
    input_sum = inputs.sum(axis=2, dtype=np.int32)[:, :, None]  # (S, M, 1)
    code_sum = codes.sum(axis=2, dtype=np.int32)[:, None, :]  # (S, 1, R)
    count, za = np.int32(shape[1]), a.zero_points
    acc = np.stack([kernels.integer_product(c, x) for c, x in zip(codes, inputs, strict=True)])
    acc -= input_sum * zero
    acc -= za * code_sum
    acc += count * zero * za
    same = not check or bool((acc == _exact(codes, zero, inputs, za)).all())
    terms = [acc.astype(np.float32) * rows.scale[:, groups].T[:, None, :]]
    if rows.offset is not None:
        shares = (input_sum - count * za).astype(np.float32)
        terms.append(shares * rows.offset[:, groups].T[:, None, :])
    ordered = np.stack(terms, axis=1)  # of each group one after the other
    ordered = ordered.reshape(len(spans) * len(terms), *y.shape)  # -1 fails where there are no rows
    return np.add.accumulate(np.concatenate([y[None], ordered]))[-1], same


def stored_product(
    packed: bytes, scale: F32, zero: NDArray[np.int32], encoding: AffineEncoding, a: Activations
) -> F32:
    """`integer_product` straight from stored codes: y, float32 (M, R).

    Args:
        packed: whole rows as in the file.
        scale, zero: parameters of each group, (R, G).
    """
    columns = encoding.row_length
    if kernels.fused is None:
        codes = load_codes(packed, encoding).reshape(-1, encoding.row_codes)[:, :columns]
        return integer_product(integer_rows(codes, scale, zero, encoding), a).y
    y = np.empty((len(a.codes), len(scale)), np.float32)
    zero_points = a.zero_points[:, 0]
    for zero_point in np.unique(zero_points):  # the kernel takes one for all of its rows
        rows = zero_points == zero_point
        y[rows] = kernels.fused.product(
            *(packed, encoding.row_codes, columns, scale, zero),
            *(encoding.bits, encoding.symmetric, encoding.block, a.codes[rows], int(zero_point)),
        )
    return y * a.scale[:, None]


def _exact(
    codes: NDArray[np.int16], zero: I32, inputs: NDArray[np.int8], zero_points: I32
) -> NDArray[np.float64]:
    """Σ (code - zero) (a - zero point) without any correction terms, (S, M, R).

    In binary64, which is exact: the sums stay below 255 · 256 · 16,384 < 2^31, far from 2^53, in
    whatever order they are added.
    """
    k = codes.astype(np.float64) - zero.swapaxes(1, 2)
    exact: NDArray[np.float64] = (inputs.astype(np.float64) - zero_points) @ k.swapaxes(1, 2)
    return exact
