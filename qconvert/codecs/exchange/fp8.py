"""FP8 in blocks as DeepSeek, Qwen and others publish it, or with one scale for a tensor.

The law is formats/exchange/fp8.md.
"""

from __future__ import annotations

from qconvert.codecs.codec import Codec, Encoder, Facts
from qconvert.codecs.exchange.floats import Float8, float8_encoder
from qconvert.exchange_schemes import NOT_ROUNDED, Fp8Scheme
from qconvert.model import Model, TensorInfo

SCALE = ".weight_scale_inv"  # which weights are multiplied by, its name notwithstanding


def layout_of(scheme: Fp8Scheme) -> Float8:
    """What a scheme writes: scales are float32, whatever the model is."""
    return Float8(SCALE, "F32", (scheme.group, scheme.group), inputs=scheme.activations)


def _planned(scheme: Fp8Scheme, tensor: TensorInfo) -> Float8:
    return layout_of(scheme)


def _refuses(scheme: Fp8Scheme, tensor: TensorInfo) -> str | None:
    return layout_of(scheme).misfit(tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: Fp8Scheme, facts: Facts) -> Encoder:
    return float8_encoder(model, tensor, layout_of(scheme), facts, ())


CODEC: Codec[Fp8Scheme] = Codec(
    *("fp8", _planned, _refuses, _encoder),
    uncompensated=lambda scheme, tensor: NOT_ROUNDED,
)
