"""ggml's block types whose codes are places in a table: IQ4_NL, IQ4_XS, MXFP4, NVFP4, in NumPy.

The encoders search, for the least (weighted) squared error: formats/schemes/SPEC.md section 8.
Two codes lie in a byte: of 32 values (16 for NVFP4) those of the second half in the upper bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qconvert.kernels.records import Parts
from qconvert.kernels.reference.ggml import search
from qconvert.kernels.reference.ggml.block import GgmlBlock

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int16)
# The magnitudes of E2M1, doubled; the upper eight codes are negative.
E2M1 = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int16)

# Where the value furthest from 0 is put. The first two restore weights that lie on such a grid; the
# others were chosen for the error that they leave on weights of several distributions.
ENDS = (-127, 113, -138, -110)
WEIGHTED_ENDS = (-127, 113, -138, -106, 162, 94, 130, -86, -166, -118)

# Steps from the exponent or scale that ggml takes; it comes first and wins where all are equal.
MXFP4_STEPS = (0, 1)
WEIGHTED_MXFP4_STEPS = (0, 1, -1, -2)
NVFP4_STEPS = (0, 1, 2, 3, 4, 5, 6, -1, -2)
WEIGHTED_NVFP4_STEPS = (0, 1, 2, 3, 4, 5, 6, -1, -2, -3, -4, -5, -6, -7, -8)

_IQ4_MIDDLES = (IQ4[1:] + IQ4[:-1]).astype(np.float32) / 2
_E2M1_MIDDLES = (E2M1[1:8] + E2M1[:7]).astype(np.float32) / 2
_FINE = np.float32(64)  # IQ4 places are compared in 64ths, so that 16-bit integers do


# --- IQ4 ------------------------------------------------------------------------------------------


def _iq4_index(places: F32) -> NDArray[np.intp]:
    """Index of the nearest level, of two the upper, of places in units of a code."""
    fine = np.rint(np.clip(places * _FINE, -16383, 16383))
    index: NDArray[np.intp] = np.searchsorted(_IQ4_MIDDLES * _FINE, fine, side="right")
    return index


def _iq4_nearest(places: F32) -> F32:
    return IQ4[_iq4_index(places)].astype(np.float32)


def _iq4_scales(values: F32, weights: F32 | None) -> tuple[F32, F32]:
    """Scales of columns, and the power of two that the columns are to be multiplied by."""
    magnitude = np.abs(values).max(axis=0)
    shrink = search.inverse_power_of(magnitude)
    ends = ENDS if weights is None else WEIGHTED_ENDS
    scale = search.fitted_scale(values * shrink, weights, ends, _iq4_nearest)
    return scale * search.power_of(magnitude), shrink


def _iq4_codes(values: F32, shrink: F32, scale: F32) -> U8:
    """Packed codes of columns by their stored scales, (G, 16)."""
    inverse = np.where(scale == 0, np.float32(0), np.float32(1) / (scale * shrink))
    return _packed(_iq4_index(values * shrink * inverse).T)


def _encode_iq4_nl(blocks: F32, importance: F32 | None) -> U8:
    values = search.columns_of(blocks, 32)
    scale, shrink = _iq4_scales(values, search.weights_of(importance, len(blocks), 32))
    stored = scale.astype("<f2")
    codes = _iq4_codes(values, shrink, stored.astype(np.float32))
    return np.concatenate([stored.view(np.uint8).reshape(-1, 2), codes], axis=1)


def _encode_iq4_xs(blocks: F32, importance: F32 | None) -> U8:
    values = search.columns_of(blocks, 32)
    scale, shrink = _iq4_scales(values, search.weights_of(importance, len(blocks), 32))
    groups = scale.reshape(-1, 8)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    # 0 - and not a negation: a block of zeros has the scale +0.
    stored = (np.float32(0) - largest / np.float32(32)).astype("<f2")
    whole = stored.astype(np.float32)  # (k, 1)
    steps = groups * search.inverse_of(whole)
    steps = np.clip(np.rint(steps), -32, 31)
    inner = np.where(steps == 0, np.float32(0), whole * steps)
    codes = _iq4_codes(values, shrink, inner.ravel())
    return np.concatenate(
        [stored.view(np.uint8), _iq4_xs_steps(steps), codes.reshape(-1, 128)], axis=1
    )


def _iq4_xs_steps(steps: F32) -> U8:
    """Scales of sub-blocks, (k, 8), in 6 bytes of a block."""
    six = (steps + 32).astype(np.uint8)
    low = six[:, 0::2] & 0x0F | (six[:, 1::2] & 0x0F) << 4
    high = (six >> 4).astype("<u2") << np.arange(0, 16, 2, dtype=np.uint16)
    high = np.bitwise_or.reduce(high, axis=1).astype("<u2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([high, low], axis=1)


def with_steps(data: U8, steps: F32) -> U8:
    """Blocks of IQ4_XS, (k, nbytes), with other scales of their sub-blocks, -32..31."""
    data = data.copy()
    data[:, 2:8] = _iq4_xs_steps(steps)
    return data


def _iq4_nl_parts(data: U8) -> Parts:
    return Parts(_unpacked(data[:, 2:], 32, IQ4), _halves(data[:, :2]), None)


def _iq4_xs_parts(data: U8) -> Parts:
    high = np.ascontiguousarray(data[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([data[:, 4:8] & 0x0F, data[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    steps = (low | (high & 3) << 4).astype(np.float32) - np.float32(32)
    return Parts(_unpacked(data[:, 8:], 32, IQ4), _halves(data[:, :2]) * steps, None)


# --- E2M1 -----------------------------------------------------------------------------------------


def _e2m1_index(magnitudes: F32, scale: F32) -> NDArray[np.intp]:
    """Index of the nearest magnitude, of two the lower. Middles times scales are exact."""
    index = np.zeros(magnitudes.shape, np.intp)
    for middle in _E2M1_MIDDLES:
        index += magnitudes > middle * scale
    return index


def _e2m1_error(magnitudes: F32, scale: F32, weights: F32 | None) -> F32:
    restored = E2M1[_e2m1_index(magnitudes, scale)].astype(np.float32) * scale
    return search.squared_error(magnitudes, restored, weights)


def _e2m1_codes(values: F32, scale: F32) -> U8:
    """Packed codes of columns, (G, n / 2): 0 by a scale of 0, and never -0."""
    index = _e2m1_index(np.abs(values), np.where(scale == 0, np.float32(np.inf), scale))
    return _packed((index | ((values < 0) & (index > 0)) << 3).T)


def _encode_mxfp4(blocks: F32, importance: F32 | None) -> U8:
    values = search.columns_of(blocks, 32)
    weights = search.weights_of(importance, len(blocks), 32)
    magnitude = np.abs(values).max(axis=0)
    values = values * search.inverse_power_of(magnitude)
    exponent = magnitude.view(np.int32) >> 23
    kept = np.clip(exponent, 1, 253)  # what inverse_power_of took

    def scale_of(stored: NDArray[np.int32]) -> F32:  # of the values as they are now
        scale: F32 = ((stored - kept + 126) << 23).view(np.float32)
        return scale

    # Above 252 the largest code would be Inf.
    steps = MXFP4_STEPS if weights is None else WEIGHTED_MXFP4_STEPS
    candidates = [np.clip(exponent - 2 + step, 0, 252) for step in steps]
    stored = _least(candidates, lambda c: _e2m1_error(np.abs(values), scale_of(c), weights))
    codes = _e2m1_codes(values, scale_of(stored))
    return np.concatenate([stored.astype(np.uint8)[:, None], codes], axis=1)


def _encode_nvfp4(blocks: F32, importance: F32 | None) -> U8:
    values = search.columns_of(blocks, 16)
    weights = search.weights_of(importance, len(blocks), 16)
    magnitude = np.abs(values).max(axis=0)
    shrink = search.inverse_power_of(magnitude)
    values = values * shrink
    first = _nearest_ue4m3(magnitude / np.float32(6))
    steps = NVFP4_STEPS if weights is None else WEIGHTED_NVFP4_STEPS
    candidates = [np.clip(first + step, 0, 126) for step in steps]
    stored = _least(candidates, lambda c: _e2m1_error(np.abs(values), _UE4M3[c] * shrink, weights))
    codes = _e2m1_codes(values, _UE4M3[stored] * shrink)
    scales = stored.astype(np.uint8).reshape(-1, 4)
    return np.concatenate([scales, codes.reshape(-1, 32)], axis=1)


def _least(
    candidates: list[NDArray[np.int32]], error_of: Callable[[NDArray[np.int32]], F32]
) -> NDArray[np.int32]:
    """The candidate of the least error for each group, the first of equals."""
    best = candidates[0]
    error = error_of(best)
    for candidate in candidates[1:]:
        found = error_of(candidate)
        best = np.where(found < error, candidate, best)
        error = np.minimum(found, error)
    return best


def _ue4m3() -> F32:
    """What a scale byte of NVFP4 means for doubled codes; ggml ignores the sign bit."""
    low = np.arange(128)
    exponent, mantissa = low >> 3, low & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    table: F32 = np.tile(value / 2, 2).astype(np.float32)
    table[127] = 0  # NaN, which ggml takes for 0
    return table


_UE4M3 = _ue4m3()


def _nearest_ue4m3(scale: F32) -> NDArray[np.int32]:
    """Bytes of the nearest scales, halves up; above 126, the largest, where there is none."""
    normal = ((scale.view(np.int32) + (1 << 19)) >> 20) - (120 << 3)
    small = np.minimum(scale, np.float32(1)) * np.float32(512) + np.float32(0.5)
    return np.where(scale < np.float32(2.0**-6), small.astype(np.int32), normal)


def _mxfp4_parts(data: U8) -> Parts:
    stored = data[:, :1].astype(np.uint32)
    bits = np.where(stored < 2, np.uint32(0x00200000) << stored, (stored - 1) << 23)
    return Parts(_unpacked(data[:, 1:], 32, E2M1), bits.astype(np.uint32).view(np.float32), None)


def _mxfp4_scales(data: U8) -> F32:
    return np.where(data[:, :1] == 255, np.float32(np.nan), _mxfp4_parts(data).scale)


def _nvfp4_parts(data: U8) -> Parts:
    return Parts(_unpacked(data[:, 4:], 16, E2M1), _UE4M3[data[:, :4]], None)


def _nvfp4_scales(data: U8) -> F32:
    stored = data[:, :4]
    return np.where(stored & 0x7F == 0x7F, np.float32(np.nan), _UE4M3[stored])


# --- bytes ----------------------------------------------------------------------------------------


def _packed(index: NDArray[np.intp]) -> U8:
    """Indices (G, n) below 16 in n / 2 bytes."""
    half = index.shape[1] // 2
    return (index[:, :half] | index[:, half:] << 4).astype(np.uint8)


def _unpacked(body: U8, group: int, table: NDArray[np.int16]) -> NDArray[np.int16]:
    """Codes (k, block)."""
    pairs = body.reshape(len(body), -1, group // 2)
    codes: NDArray[np.int16] = table[np.concatenate([pairs & 0x0F, pairs >> 4], axis=2)]
    return codes.reshape(len(body), -1)


def _halves(data: U8) -> F32:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _decode(parts: Callable[[U8], Parts], data: U8) -> F32:
    found = parts(data)
    groups = found.codes.reshape(*found.scale.shape, -1).astype(np.float32)
    return (found.scale[:, :, None] * groups).reshape(len(data), -1)


def _block(
    name: str,
    nbytes: int,
    sizes: tuple[int, int],
    table: NDArray[np.int16],
    encoder: Callable[[F32, F32 | None], U8],
    parts: Callable[[U8], Parts],
    scales: Callable[[U8], F32],
) -> GgmlBlock:
    block, group = sizes
    levels = np.unique(table)
    return GgmlBlock(
        name=name,
        block=block,
        nbytes=nbytes,
        group=group,
        codes=(int(levels[0]), int(levels[-1])),
        encoder=encoder,
        decoder=partial(_decode, parts),
        splitter=parts,
        scales=scales,
        gap=int(np.diff(levels).max()),
        halves=name.startswith("IQ4"),
    )


def _iq4_stored(data: U8) -> F32:
    return _halves(data[:, :2])


TYPES = (
    _block("IQ4_NL", 18, (32, 32), IQ4, _encode_iq4_nl, _iq4_nl_parts, _iq4_stored),
    _block("IQ4_XS", 136, (256, 32), IQ4, _encode_iq4_xs, _iq4_xs_parts, _iq4_stored),
    _block("MXFP4", 17, (32, 32), E2M1, _encode_mxfp4, _mxfp4_parts, _mxfp4_scales),
    _block("NVFP4", 36, (64, 16), E2M1, _encode_nvfp4, _nvfp4_parts, _nvfp4_scales),
)
