"""GPTQ checkpoints, as GPTQModel, AutoGPTQ, transformers and others write them.

formats/exchange/gptq.md says which of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.codecs.exchange.columns import CODES, SCALES, ZEROS, Bands
from qconvert.codecs.exchange.gptq import ORDER, Gptq
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.settings import (
    OTHER_VERSIONS,
    check_keys,
    flag,
    integer,
    pattern,
    refuse_setting,
    scale_dtype,
    section,
    text,
    unsupported,
)
from qconvert.model import WEIGHT, TensorInfo

KIND = "gptq"
WIDTHS = (2, 3, 4, 8)
VERSIONS = {"gptq": True, "gptq_v2": False}  # whether zero points are stored less one
SUFFIXES = (CODES, ZEROS, SCALES, ORDER)
# Fields that say how codes were found, by whom, or how to compute with them: not what they mean.
ASIDE: frozenset[str] = frozenset(
    {
        *("quant_method", "method", "desc_act", "act_group_aware", "static_groups", "hyb_act"),
        *("true_sequential", "damp_percent", "damp_auto_increment", "mse", "meta", "dataset"),
        *("tokenizer", "model_name_or_path", "model_file_base_name", "model_seqlen", "batch_size"),
        *("block_name_to_quantize", "module_name_preceding_first_block", "pad_token_id"),
        *("max_input_length", "cache_block_outputs", "modules_in_block_to_quantize", "backend"),
        *("use_exllama", "use_cuda_fp16", "disable_exllama", "exllama_config", "max_length"),
        *("lm_head", "offload_to_disk", "offload_to_disk_path", "modules_to_not_convert"),
    }
)
# The same of auto-round 0.16, which writes both formats, and its own; ``data_type`` is checked.
_AUTO_ROUND = frozenset(
    {
        *("autoround_version", "provider", "amp", "iters", "lr", "minmax_lr", "nsamples", "seqlen"),
        *("enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage", "scale_dtype"),
        *("gradient_accumulate_steps", "to_quant_block_names", "data_type"),
    }
)
ASIDE |= _AUTO_ROUND
_FIELDS = ASIDE | {"bits", "group_size", "sym", "checkpoint_format", "format", "pack_dtype"}
_FIELDS |= {"dynamic", "is_marlin_format"}
_OWN = frozenset(
    {"bits", "group_size", "sym", "desc_act", "act_group_aware", "damp_percent", "mse"}
)


@dataclass(frozen=True, slots=True)
class How:
    """How a module is quantized."""

    bits: int
    group: int
    symmetric: bool


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    path, settings = checkpoint.path, checkpoint.settings
    check_keys(path, "the quantization block", settings, _FIELDS)
    check_integers(path, settings)
    version = text(
        path, "format", settings.get("checkpoint_format", settings.get("format", "gptq"))
    )
    if version not in VERSIONS:
        raise unsupported(path, "version of GPTQ", version, " ".join(VERSIONS))
    if settings.get("is_marlin_format"):
        raise unsupported(path, "layout of GPTQ", "Marlin", " ".join(VERSIONS))
    if (packed := settings.get("pack_dtype", "int32")) != "int32":
        raise unsupported(path, "words of GPTQ", packed, "int32")
    overall = _how(path, settings)
    rules = [
        (_pattern(path, expression), entry)
        for expression, entry in section(path, "dynamic", settings.get("dynamic") or {}).items()
    ]
    bands, matrices = Bands(), []
    for name, info in checkpoint.tensors.items():
        if name.endswith(CODES):
            module = name.removesuffix(CODES)
            how = overall
            rule = next((r for r in rules if r[0][1].match(module)), None)
            if rule is not None:
                how = _own(checkpoint, module, rule, overall)
            matrices.append(_matrix(checkpoint, module, info, how, VERSIONS[version], bands))
    return Found(KIND, matrices, SUFFIXES)


def check_integers(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse other codes than integers, of which auto-round has some in the same words.

    Raises:
        UnsupportedError: there are some.
    """
    if (found := settings.get("data_type", "int")) != "int":
        raise unsupported(path, "data_type of auto-round", found, "int")


def _how(path: Path, fields: Mapping[str, Any]) -> How:
    bits = integer(path, "bits", fields.get("bits"), 1, 32)
    if bits not in WIDTHS:
        raise unsupported(path, "bits of GPTQ", bits, " ".join(map(str, WIDTHS)))
    group = integer(path, "group_size", fields.get("group_size", 128), -1, 1 << 20)
    if group == 0:
        refuse_setting(path, "group_size", group, "-1, or columns of a group")
    return How(bits, max(group, 0), flag(path, "sym", fields.get("sym", True)))


def _pattern(path: Path, text: str) -> tuple[bool, re.Pattern[str]]:
    """Whether a rule of ``dynamic`` leaves modules as they are, and which modules it is for."""
    expression = text[2:] if text.startswith(("+:", "-:")) else text
    return text.startswith("-:"), pattern(path, "dynamic", expression)


def _own(
    checkpoint: Checkpoint,
    module: str,
    rule: tuple[tuple[bool, re.Pattern[str]], Any],
    overall: How,
) -> How:
    (excluded, module_names), entry = rule
    if excluded:
        raise FormatError(
            "a weight is quantized that the configuration says is not",
            path=checkpoint.path,
            tensor=module,
            found=f"'-:{module_names.pattern}'",
            hint=OTHER_VERSIONS,
            code="EXCHANGE-CONFIG",
        )
    path = checkpoint.path
    fields = section(path, "dynamic", entry)
    check_keys(path, "dynamic", fields, _OWN)
    group = overall.group or -1
    return _how(
        path, {"bits": overall.bits, "group_size": group, "sym": overall.symmetric, **fields}
    )


def _matrix(
    checkpoint: Checkpoint, module: str, codes: TensorInfo, how: How, less_one: bool, bands: Bands
) -> Matrix:
    tensors = checkpoint.tensors
    parts = {s: module + s for s in SUFFIXES if module + s in tensors}
    if len(codes.shape) != 2 or codes.shape[0] * 32 % how.bits or 0 in codes.shape:
        raise FormatError(
            "words of codes that make no matrix",
            path=checkpoint.path,
            tensor=codes.name,
            found=f"{codes.dtype} {list(codes.shape)}",
            wanted=f"columns of {how.bits}-bit codes in words of 32 bits",
            code="EXCHANGE-SHAPE",
        )
    shape = (codes.shape[1], codes.shape[0] * 32 // how.bits)
    dtype = scale_dtype(checkpoint.path, tensors.get(module + SCALES), "F16")
    layout = Gptq(
        *(how.bits, how.group, how.symmetric, dtype),
        bands=bands,
        less_one=less_one,
        indexed=ORDER in parts,
    )
    if layout.indexed:
        layout = replace(layout, order=_order(checkpoint, module, layout, shape[1]))
    return Matrix(module + WEIGHT, shape, layout, parts)


def _order(checkpoint: Checkpoint, module: str, layout: Gptq, columns: int) -> bytes:
    """Which group each column belongs to; empty where groups are runs of columns.

    Raises:
        FormatError: a group that there is not.
    """
    info = checkpoint.tensors[module + ORDER]
    if (info.dtype, info.shape) != ("I32", (columns,)):
        return b""  # and refused as a part that does not fit
    data = checkpoint.read(info.name)
    order = np.frombuffer(data, "<i4")
    if (order == np.arange(columns) // (layout.group or columns)).all():
        return b""
    groups = layout.groups(columns)
    if order.min() < 0 or order.max() >= groups:
        raise FormatError(
            "a column belongs to a group that there is not",
            path=checkpoint.path,
            tensor=info.name,
            found=int(order.min() if order.min() < 0 else order.max()),
            wanted=f"0 to {groups - 1}",
            hint="the checkpoint is damaged or was written wrongly: download or save it again",
            code="EXCHANGE-VALUES",
        )
    return data
