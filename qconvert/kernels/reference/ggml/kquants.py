"""ggml's K-quants, super-blocks of 256 values: the definition of their bytes, in NumPy.

Layouts and decoders are those of ggml-quants.c; the codes are found by our own searches,
`k_affine` and `k_symmetric`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import Parts
from qconvert.kernels.reference.ggml.block import GgmlBlock
from qconvert.kernels.reference.ggml.k_affine import Affine, search_affine
from qconvert.kernels.reference.ggml.k_columns import SUPER, Found
from qconvert.kernels.reference.ggml.k_symmetric import Symmetric, search_symmetric

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
_U = np.uint8


@dataclass(frozen=True, slots=True)
class _Fields:
    """A block's bytes taken apart.

    Attributes:
        units: float32 (k, 1 or 2): d and, of affine types, m.
        scales, minima: integers (k, sub-blocks) as float32.
        codes: int16 (k, 256).
    """

    units: F32
    scales: F32
    minima: F32 | None
    codes: NDArray[np.int16]


# --- planes: codes of 1, 2 or 4 bits --------------------------------------------------------------


def _plane(codes: U8, bits: int, width: int) -> U8:
    """Codes (k, 256) below 2^bits to bytes: byte i of a run has values i, i + width, ... of it."""
    parts = codes.reshape(len(codes), -1, 8 // bits, width)
    out = parts[:, :, 0].copy()
    for i in range(1, 8 // bits):
        out |= parts[:, :, i] << np.uint8(bits * i)
    return out.reshape(len(codes), -1)


def _codes(plane: U8, bits: int, width: int) -> U8:
    """The inverse of `_plane`."""
    runs = plane.reshape(len(plane), -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(plane), -1)


# --- integer scales of 6 bits ---------------------------------------------------------------------


def _pack_pairs(scales: U8, minima: U8) -> U8:
    """8 scales and 8 minima of 6 bits in 12 bytes: Q4_K, Q5_K."""
    low, high = slice(0, 4), slice(4, 8)
    return np.concatenate(
        [
            scales[:, low] | scales[:, high] >> 4 << 6,
            minima[:, low] | minima[:, high] >> 4 << 6,
            scales[:, high] & 15 | minima[:, high] << 4,
        ],
        axis=1,
    )


def _unpack_pairs(packed: U8) -> tuple[U8, U8]:
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _pack_sixteen(scales: U8) -> U8:
    """16 scales of 6 bits in 12 bytes: Q3_K."""
    high = scales >> 4
    low = scales[:, :8] & 15 | scales[:, 8:] << 4
    return np.concatenate(
        [low, high[:, :4] | high[:, 4:8] << 2 | high[:, 8:12] << 4 | high[:, 12:] << 6], axis=1
    )


def _unpack_sixteen(packed: U8) -> U8:
    low, high = packed[:, :8], packed[:, 8:]
    shifts = np.array([[0], [2], [4], [6]], np.uint8)
    fours = ((high[:, None, :] >> shifts) & 3).reshape(len(packed), 16)
    scales: U8 = np.concatenate([low & 15, low >> 4], axis=1) | fours << 4
    return scales


# --- the types ------------------------------------------------------------------------------------


def _units(*units: NDArray[np.float16] | None) -> U8:
    stacked = np.stack([u for u in units if u is not None], axis=1)
    return stacked.astype("<f2").view(np.uint8)


def _halves(data: U8) -> F32:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _pack_q2(found: Found) -> U8:
    assert found.b is not None
    scales = found.a.astype(np.uint8) | found.b.astype(np.uint8) << 4
    plane = _plane(found.codes.astype(np.uint8), 2, 32)
    return np.concatenate([scales, plane, _units(found.d, found.m)], axis=1)


def _fields_q2(data: U8) -> _Fields:
    scales = data[:, :16]
    codes = _codes(data[:, 16:80], 2, 32).astype(np.int16)
    return _Fields(_halves(data[:, 80:]), _f32(scales & _U(15)), _f32(scales >> _U(4)), codes)


def _pack_q3(found: Found) -> U8:
    codes = (found.codes + 4).astype(np.uint8)
    scales = _pack_sixteen((found.a + 32).astype(np.uint8))
    planes = (_plane(codes >> _U(2), 1, 32), _plane(codes & _U(3), 2, 32))
    return np.concatenate([*planes, scales, _units(found.d)], axis=1)


def _fields_q3(data: U8) -> _Fields:
    codes = _codes(data[:, 32:96], 2, 32) | _codes(data[:, :32], 1, 32) << 2
    scales = _f32(_unpack_sixteen(data[:, 96:108])) - np.float32(32)
    return _Fields(_halves(data[:, 108:]), scales, None, codes.astype(np.int16) - 4)


def _pack_q45(bits: int, found: Found) -> U8:
    assert found.b is not None
    codes = found.codes.astype(np.uint8)
    scales = _pack_pairs(found.a.astype(np.uint8), found.b.astype(np.uint8))
    fifth = [_plane(codes >> _U(4), 1, 32)] if bits == 5 else []
    return np.concatenate(
        [_units(found.d, found.m), scales, *fifth, _plane(codes & _U(15), 4, 32)], axis=1
    )


def _fields_q45(bits: int, data: U8) -> _Fields:
    codes = _codes(data[:, -128:], 4, 32)
    if bits == 5:
        codes |= _codes(data[:, 16:48], 1, 32) << 4
    scales, minima = _unpack_pairs(data[:, 4:16])
    return _Fields(_halves(data[:, :4]), _f32(scales), _f32(minima), codes.astype(np.int16))


def _pack_q6(found: Found) -> U8:
    codes = (found.codes + 32).astype(np.uint8)
    scales = found.a.astype(np.int8).view(np.uint8)
    planes = (_plane(codes & _U(15), 4, 64), _plane(codes >> _U(4), 2, 32))
    return np.concatenate([*planes, scales, _units(found.d)], axis=1)


def _fields_q6(data: U8) -> _Fields:
    codes = _codes(data[:, :128], 4, 64) | _codes(data[:, 128:192], 2, 32) << 4
    scales = np.ascontiguousarray(data[:, 192:208]).view(np.int8).astype(np.float32)
    return _Fields(_halves(data[:, 208:]), scales, None, codes.astype(np.int16) - 32)


def with_integers(name: str, data: U8, scales: F32, minima: F32 | None) -> U8:
    """Blocks, (k, nbytes), with other integer scales and minima of their sub-blocks."""
    data = data.copy()
    if name == "Q2_K":
        assert minima is not None
        data[:, :16] = scales.astype(np.uint8) | minima.astype(np.uint8) << _U(4)
    elif name == "Q3_K":
        data[:, 96:108] = _pack_sixteen((scales + np.float32(32)).astype(np.uint8))
    elif name == "Q6_K":
        data[:, 192:208] = scales.astype(np.int8).view(np.uint8)
    else:
        assert minima is not None
        data[:, 4:16] = _pack_pairs(scales.astype(np.uint8), minima.astype(np.uint8))
    return data


def _f32(integers: U8) -> F32:
    return integers.astype(np.float32)


Fields = Callable[[U8], _Fields]


def _split(fields: Fields, data: U8) -> Parts:
    f = fields(data)
    scale = f.units[:, :1] * f.scales
    return Parts(f.codes, scale, None if f.minima is None else -(f.units[:, 1:] * f.minima))


def _decode(fields: Fields, data: U8) -> F32:
    parts = _split(fields, data)
    groups = parts.codes.reshape(*parts.scale.shape, -1)
    values = parts.scale[:, :, None] * groups.astype(np.float32)
    if parts.offset is not None:
        values += parts.offset[:, :, None]
    return values.reshape(len(data), SUPER)


def _scales(fields: Fields, data: U8) -> F32:
    return fields(data).units


def _encode(
    search: Callable[[F32, F32 | None], Found],
    pack: Callable[[Found], U8],
    blocks: F32,
    importance: F32 | None,
) -> U8:
    return pack(search(blocks, importance))


_Search = Affine | Symmetric


def _block(
    name: str, nbytes: int, kind: _Search, pack: Callable[[Found], U8], fields: Fields
) -> GgmlBlock:
    if isinstance(kind, Affine):
        codes = (0, kind.top)
        search: Callable[[F32, F32 | None], Found] = partial(search_affine, kind)
    else:
        codes = (-kind.half, kind.half - 1)
        search = partial(search_symmetric, kind)
    return GgmlBlock(
        name=name,
        block=SUPER,
        nbytes=nbytes,
        group=kind.length,
        codes=codes,
        encoder=partial(_encode, search, pack),
        decoder=partial(_decode, fields),
        splitter=partial(_split, fields),
        scales=partial(_scales, fields),
    )


Q2_K = Affine(16, 3, 15, (1.0, 1.1875, 1.4375), 0.3125)
Q4_K = Affine(32, 15, 63, (1.0, 1.078125, 1.15625), 0.3125)
Q5_K = Affine(32, 31, 63, (1.0, 1.0390625, 1.078125), 0.3125)
Q3_K = Symmetric(
    *(16, 4, 31, 1.0625),
    (1.125, 1.0, 0.875, 0.75, 0.625, -1.25, -1.125, -1.0, -0.875),
    (0, 1, -1),
)
Q6_K = Symmetric(16, 32, 127, 1.1875, tuple(1 + i / 32 for i in range(-1, 7)), ())

TYPES = (
    _block("Q2_K", 84, Q2_K, _pack_q2, _fields_q2),
    _block("Q3_K", 110, Q3_K, _pack_q3, _fields_q3),
    _block("Q4_K", 144, Q4_K, partial(_pack_q45, 4), partial(_fields_q45, 4)),
    _block("Q5_K", 176, Q5_K, partial(_pack_q45, 5), partial(_fields_q45, 5)),
    _block("Q6_K", 210, Q6_K, _pack_q6, _fields_q6),
)
