"""Checkpoints of NVIDIA's ModelOpt, as told by hf_quant_config.json or config.json.

formats/exchange/modelopt.md says which of them are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qconvert.codecs.exchange.floats import Float8
from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.exchange.micro import NV_GROUP
from qconvert.codecs.exchange.modelopt import NVFP4, OVERALL, SCALE
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.activations import ACTIVATIONS, dropped_note
from qconvert.files.exchange.settings import (
    check_keys,
    integer,
    section,
    text,
    unsupported,
)
from qconvert.model import WEIGHT, TensorInfo

KIND = "modelopt"
MIXED = "MIXED_PRECISION"
# What a weight is by the algorithm that its layer names.
DTYPES = {
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), "F8_E4M3"),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4"), "U8"),
}
# Names of parts end so; in stacks of experts, which are not read, without the dot.
SUFFIXES = ("weight_scale", "weight_scale_2", ".pre_quant_scale", ".weight_quantizer._amax")
_OUTER = frozenset({"producer", "quantization"})
_KNOWN = frozenset(
    {
        *("quant_method", "quant_algo", "kv_cache_quant_algo", "kv_cache_scheme", "producer"),
        *("exclude_modules", "ignore", "config_groups", "quantized_layers", "group_size"),
    }
)
_LAYER = frozenset({"quant_algo", "group_size"})


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path, settings = checkpoint.path, checkpoint.settings
    if "quantization" in settings:  # of hf_quant_config.json
        check_keys(path, "hf_quant_config.json", settings, _OUTER)
        settings = section(path, "quantization", settings["quantization"])
    check_keys(path, "the quantization block", settings, _KNOWN)
    algorithm = text(path, "quant_algo", settings.get("quant_algo"))
    layers: Mapping[str, Any] | None = None
    if algorithm == MIXED:
        layers = section(path, "quantized_layers", settings.get("quantized_layers"))
        for name, fields in layers.items():
            check_keys(path, name, section(path, name, fields), _LAYER)
            _check(path, text(path, "quant_algo", fields.get("quant_algo")), fields)
    else:
        _check(path, algorithm, settings)
    matrices = []
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(WEIGHT)
        if module == name or info.dtype not in DTYPES.values() or len(info.shape) != 2:
            continue
        if layers is not None:
            fields = section(path, f"quantized_layers.{module}", layers.get(module))
            algorithm = fields["quant_algo"]
        matrices.append(_matrix(checkpoint, module, info, algorithm))
    dropped = [name for name in checkpoint.tensors if name.endswith(ACTIVATIONS)]
    return Found(KIND, matrices, SUFFIXES, frozenset(dropped), dropped_note(dropped))


def _check(path: Path, algorithm: str, fields: Mapping[str, Any]) -> None:
    """Refuse algorithms and groups that are not read."""
    if algorithm not in DTYPES:
        raise unsupported(path, "quant_algo", algorithm, " ".join((*DTYPES, MIXED)))
    size = fields.get("group_size")
    if DTYPES[algorithm] == "U8" and size is not None:
        integer(path, "group_size", size, NV_GROUP, NV_GROUP)


def _matrix(checkpoint: Checkpoint, module: str, info: TensorInfo, algorithm: str) -> Matrix:
    if info.dtype != DTYPES[algorithm]:
        raise FormatError(
            f"codes of another dtype than {algorithm} has",
            path=checkpoint.path,
            tensor=info.name,
            found=info.dtype,
            wanted=DTYPES[algorithm],
            code="EXCHANGE-SHAPE",
        )
    parts = {s: module + s for s in (WEIGHT, SCALE, OVERALL) if module + s in checkpoint.tensors}
    rows, columns = info.shape
    layout: Layout
    if info.dtype == "U8":
        overall = checkpoint.tensors.get(module + OVERALL)
        layout = NVFP4
        if overall is not None and overall.shape == (1,):
            assert layout.overall is not None
            layout = replace(layout, overall=replace(layout.overall, dimensions=1))
        return Matrix(info.name, (rows, 2 * columns), layout, parts)
    scale = checkpoint.tensors.get(module + SCALE)
    shape = scale.shape if scale is not None else ()
    single = shape in ((), (1,))
    layout = Float8(SCALE, "F32", (0 if single else 1, 0), len(shape))
    return Matrix(info.name, info.shape, layout, parts)
