"""Values of ggml's block types that are read and not written, where gguf-py has no decoder.

Layouts: block_q1_0 and block_q2_0 of ggml-common.h at 0c1e57098, a float16 scale and codes of one
and two bits, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qconvert.kernels.records import F32, U8


def _codes(blocks: U8, bits: int) -> U8:
    """Codes of blocks (k, nbytes), (k, block)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = blocks[:, 2:, None] >> shifts & np.uint8((1 << bits) - 1)
    return codes.reshape(len(blocks), -1)


def _scales(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)


def _q1_0(blocks: U8) -> F32:
    """A set bit is the scale, another one its negative."""
    scale = _scales(blocks)
    return np.where(_codes(blocks, 1) == 1, scale, -scale)


def _q2_0(blocks: U8) -> F32:
    """Codes 0 to 3 are -1, 0, 1 and 2 scales."""
    return (_codes(blocks, 2).astype(np.float32) - np.float32(1)) * _scales(blocks)


READ: Mapping[str, Callable[[U8], F32]] = {"Q1_0": _q1_0, "Q2_0": _q2_0}
