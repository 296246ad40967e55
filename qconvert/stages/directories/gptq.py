"""GPTQ directories, for vLLM, SGLang, transformers with GPTQModel, and others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qconvert.exchange_schemes import GPTQ, ExchangeScheme
from qconvert.model import layer_name
from qconvert.stages.directories.modules import HEAD, dense_modules, quantized_modules
from qconvert.stages.directories.target import (
    EMBEDDINGS,
    HEADS,
    ROUTERS,
    VISION,
    DirectoryTarget,
    Readers,
    Rule,
)
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target

NO_LINEAR = (*EMBEDDINGS, *HEADS)  # layers that readers quantize only if they are told to
DENSE = (
    Rule(NO_LINEAR, "embeddings and head stay as they are: readers want them dense"),
    Rule(ROUTERS, "a router stays as it is: readers multiply it as it is"),
    Rule(VISION, "parts for images and sound stay as they are, as in published checkpoints"),
)


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan: what most weights have, and in ``dynamic`` the modules
    that differ, QuantizeConfig of GPTQModel 7.7.
    """
    usual, _ = Counter(quantized_modules(plan).values()).most_common(1)[0]
    block: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **_entry(usual),
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
    }
    dense = _dense_linear(plan)
    dynamic: dict[str, dict[str, Any]] = {}
    for p in plan:
        name = layer_name(p.tensor.name)
        pattern = re.escape(name) + "$"
        if isinstance(p.scheme, ExchangeScheme):
            if p.scheme != usual:
                dynamic["+:" + pattern] = _entry(p.scheme)
        elif name in dense:
            dynamic["-:" + pattern] = {}
    if dynamic:
        block["dynamic"] = dynamic
    if dense:
        block["modules_in_block_to_quantize"] = [sorted(_places(plan))]
    return {"quantization_config": block}


def _dense_linear(plan: Sequence[PlannedTensor]) -> set[str]:
    """Modules that readers would expect codes of."""
    linear = [p for p in plan if not any(fnmatchcase(p.tensor.name, g) for g in NO_LINEAR)]
    return {*dense_modules(linear)} - {HEAD}


def _place(module: str) -> str:
    """Where in its block a module is: its name behind the number of the block."""
    return re.sub(r"^.*?\.\d+\.", "", module)


def _places(plan: Sequence[PlannedTensor]) -> set[str]:
    """Of modules that are quantized."""
    return {_place(name) for name in quantized_modules(plan)}


def _entry(scheme: ExchangeScheme) -> dict[str, Any]:
    return {"bits": scheme.bits, "group_size": scheme.group or -1}


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: the rules of vLLM 0.32, SGLang 0.5.23 and mlx-lm 0.32."""
    notes = (
        "the directory is for vLLM, SGLang, transformers (with GPTQModel), auto-round and "
        "onnxruntime-genai's builder; not for MLX, which takes no g_idx",
        "scales are float16: readers that compute in bfloat16 round them",
    )
    warnings = []
    same = _places(plan) & {_place(m) for m in _dense_linear(plan)}
    if same or len({*quantized_modules(plan).values()}) > 1:
        warnings.append(
            "transformers does not read 'dynamic', which names modules that differ from others: "
            "load with vLLM, SGLang or GPTQModel, or give all weights one scheme"
        )
    return Readers(notes, tuple(warnings))


TARGET: Target = DirectoryTarget(GPTQ, settings, readers, DENSE)
