"""Inputs of a layer as signed bytes: formats/schemes/SPEC.md section 7."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert.kernels.records import F32, Activations


@dataclass(frozen=True, slots=True)
class StaticInput:
    """Scale and zero point of a layer's input, known beforehand; symmetric with zero point 0.

    All that a quantized file notes and the arithmetic needs; a calibration's `StaticRange` knows
    the range that they cover too.

    Attributes:
        scale: above 0.
        zero_point: -128..127.
    """

    scale: float
    zero_point: int

    @classmethod
    def noted(cls, activation: Mapping[str, Any] | None) -> StaticInput | None:
        """That of the ``activation`` object of a stored tensor; None without one."""
        if not activation:
            return None
        return cls(float(activation["scale"]), activation["zero_point"])


@dataclass(frozen=True, slots=True)
class DynamicInput:
    """A scale for each row of a layer's input, from the row itself.

    Attributes:
        symmetric: whether without a zero point.
    """

    symmetric: bool = True


def as_bytes(x: F32, how: StaticInput | DynamicInput) -> Activations:
    """Inputs (M, c), which are finite, as signed bytes."""
    if isinstance(how, StaticInput):
        return static_activations(x, how.scale, how.zero_point)
    return dynamic_activations(x, symmetric=how.symmetric)


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
