"""NVIDIA's ModelOpt: NVFP4 beside the FP8 of `floats`.

The law is formats/exchange/modelopt.md.
"""

from __future__ import annotations

from qconvert.codecs.exchange.floats import WEIGHT
from qconvert.codecs.exchange.micro import FP4, FP8, NV_GROUP, Micro, Overall

SCALE, OVERALL = ".weight_scale", ".weight_scale_2"
NVFP4 = Micro(
    *(FP4, (WEIGHT, "U8"), (SCALE, FP8), NV_GROUP),
    Overall(OVERALL, 0, divides=False),
    signed_zero=False,
)
