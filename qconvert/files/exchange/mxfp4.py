"""MXFP4 checkpoints of gpt-oss: experts in blocks of 32. formats/exchange/mxfp4.md says which."""

from __future__ import annotations

from qconvert.codecs.exchange.micro import BLOCKS, MX_GROUP, SCALES, Experts
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.settings import check_keys

KIND = "mxfp4"
_KNOWN = frozenset({"quant_method", "modules_to_not_convert", "dequantize"})


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path = checkpoint.path
    check_keys(path, "the quantization block", checkpoint.settings, _KNOWN)
    matrices = []
    for name, info in checkpoint.tensors.items():
        weight = name.removesuffix(BLOCKS)
        if weight == name:
            continue
        if len(info.shape) != 4 or 0 in info.shape:
            raise FormatError(
                "blocks of codes that are no weights of experts",
                path=path,
                tensor=name,
                found=f"{info.dtype} {list(info.shape)}",
                wanted=f"U8 [experts, out, in / {MX_GROUP}, {MX_GROUP // 2}]",
                code="EXCHANGE-SHAPE",
            )
        experts, outputs, groups, _ = info.shape
        parts = {s: weight + s for s in (BLOCKS, SCALES) if weight + s in checkpoint.tensors}
        shape = (experts, groups * MX_GROUP, outputs)
        matrices.append(Matrix(weight, shape, Experts(), parts))
    return Found(KIND, matrices, (BLOCKS, SCALES))
