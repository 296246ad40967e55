"""DeepSeek V4 under its own names: ``.scale`` beside weights, experts of two numbers a byte.

formats/exchange/deepseek-v4.md says which are read.
"""

from __future__ import annotations

from qconvert.codecs.exchange.floats import Float8
from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.exchange.micro import FP4, MX_GROUP, POWERS, Micro
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.model import WEIGHT

KIND = "fp8"
SCALE = ".scale"
EXPERTS = Micro(FP4, (WEIGHT, "I8"), (SCALE, POWERS), MX_GROUP)


def recognised(checkpoint: Checkpoint) -> bool:
    """Whether scales have this model's names."""
    return any(t.dtype == POWERS and name.endswith(SCALE) for name, t in checkpoint.tensors.items())


def find(checkpoint: Checkpoint, block: tuple[int, int]) -> Found:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Args:
        block: rows and columns of E4M3 weights that share a scale.
    """
    matrices = []
    for name, info in checkpoint.tensors.items():
        if not name.endswith(WEIGHT) or len(info.shape) != 2:
            continue
        module, (rows, columns) = name.removesuffix(WEIGHT), info.shape
        layout: Layout
        if info.dtype == "I8":
            layout, columns = EXPERTS, 2 * columns
        elif info.dtype == "F8_E4M3":
            layout = Float8(SCALE, POWERS, block)
        else:
            continue
        parts = {s: module + s for s in (WEIGHT, SCALE) if module + s in checkpoint.tensors}
        matrices.append(Matrix(name, (rows, columns), layout, parts))
    return Found(KIND, matrices, (SCALE,))
