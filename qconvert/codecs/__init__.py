"""Families of schemes: `codec_of` a scheme, `codec_named` by a header. `codec` says what a codec is
and how a new family is added.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from qconvert.codecs.codec import Codec
from qconvert.schemes import FAMILIES, TensorScheme


@cache
def codec_named(family: str) -> Codec[Any]:
    """The codec of a family, one of `qconvert.schemes.FAMILIES`."""
    found: Codec[Any] = importlib.import_module(FAMILIES[family].codec).CODEC
    return found


def codec_of(scheme: TensorScheme) -> Codec[Any]:
    """The codec of a scheme."""
    return codec_named(scheme.family)
