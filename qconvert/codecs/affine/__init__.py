"""Codes on a uniform grid, with a scale and perhaps a zero point for each tensor, channel or
block.
"""

from __future__ import annotations

from qconvert.codecs.affine.encoder import encoder_for, planned
from qconvert.codecs.affine.encoding import parse
from qconvert.codecs.affine.shared import shares_parameters
from qconvert.codecs.affine.suggestion import look
from qconvert.codecs.codec import Codec, smaller
from qconvert.model import TensorInfo
from qconvert.schemes import AffineScheme


def _refuses(scheme: AffineScheme, tensor: TensorInfo) -> str | None:
    return smaller(planned(scheme, tensor), tensor, scheme.name)


def _passes(scheme: AffineScheme, tensor: TensorInfo) -> bool:
    return shares_parameters(planned(scheme, tensor))


CODEC: Codec[AffineScheme] = Codec(
    *("affine", planned, _refuses, encoder_for, parse, _passes, look),
    uncompensated=lambda scheme, tensor: None,
)
