"""FP8 checkpoints of ``quant_method: fp8``: in blocks with ``weight_scale_inv``, and those of
Mistral with one scale a tensor. formats/exchange/fp8.md says which are read.
"""

from __future__ import annotations

from qconvert.codecs.exchange.floats import OTHER_INPUTS, Float8
from qconvert.codecs.exchange.fp8 import SCALE
from qconvert.files.exchange import Checkpoint, Found, Matrix, deepseek_v4
from qconvert.files.exchange.activations import ACTIVATIONS, dropped_note
from qconvert.files.exchange.settings import (
    check_keys,
    integer,
    refuse_setting,
    unsupported,
)
from qconvert.model import WEIGHT

MISTRAL = ".qscale_weight"
SCALES = (SCALE, MISTRAL)
# FineGrainedFP8Config of transformers 5.24, and what published checkpoints have besides.
_KNOWN = frozenset(
    {
        *("quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt"),
        *("modules_to_not_convert", "ignored_layers", "dequantize", "kv_cache_scheme"),
    }
)
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path, settings = checkpoint.path, checkpoint.settings
    check_keys(path, "the quantization block", settings, _KNOWN)
    if settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise unsupported(path, "fmt", settings["fmt"], "e4m3")
    sizes = settings.get("weight_block_size")
    block = (0, 0)
    if sizes is not None:
        if not isinstance(sizes, list) or len(sizes) != 2:
            refuse_setting(path, "weight_block_size", sizes, "two sizes")
        rows, columns = (integer(path, "weight_block_size", n, 1, 1 << 20) for n in sizes)
        block = (rows, columns)
    if deepseek_v4.recognised(checkpoint):
        return deepseek_v4.find(checkpoint, block)
    inputs = settings.get("activation_scheme", "dynamic")
    inputs = inputs if inputs == "dynamic" else OTHER_INPUTS
    matrices = []
    for name, info in checkpoint.tensors.items():
        if not name.endswith(WEIGHT) or info.dtype != "F8_E4M3" or len(info.shape) != 2:
            continue
        module = name.removesuffix(WEIGHT)
        suffix = next((s for s in SCALES if module + s in checkpoint.tensors), SCALE)
        scale = checkpoint.tensors.get(module + suffix)
        dtype = scale.dtype if scale and scale.dtype in _SCALE_DTYPES else "F32"
        single = scale is not None and scale.size == 1 and not any(block)
        dimensions = len(scale.shape) if scale is not None and single else 2
        layout = Float8(suffix, dtype, block, dimensions, inputs)
        parts = {s: module + s for s in (WEIGHT, suffix) if module + s in checkpoint.tensors}
        matrices.append(Matrix(name, info.shape, layout, parts))
    dropped = [name for name in checkpoint.tensors if name.endswith(ACTIVATIONS)]
    return Found("fp8", matrices, SCALES, frozenset(dropped), dropped_note(dropped))
