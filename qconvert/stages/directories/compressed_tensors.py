"""compressed-tensors directories, for vLLM, SGLang and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.exchange_schemes import COMPRESSED_TENSORS, ExchangeScheme
from qconvert.model import WEIGHT, layer_name
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

VERSION = "0.20.0"  # of the library whose layout this is
DENSE = (
    Rule((*EMBEDDINGS, *HEADS), "embeddings and head stay as they are: not all readers take codes"),
    Rule(ROUTERS, "a router stays as it is: readers multiply it as it is"),
    Rule(VISION, "parts for images and sound stay as they are, as in published checkpoints"),
)
HEAD = "lm_head"  # a module even where its weight is the embedding's


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan: a group for each scheme, QuantizationConfig of
    compressed-tensors 0.20.
    """
    modules: dict[ExchangeScheme, list[str]] = {}
    dense = {HEAD}
    for p in plan:
        name = layer_name(p.tensor.name)
        if isinstance(p.scheme, ExchangeScheme):
            modules.setdefault(p.scheme, []).append(name)
        elif p.tensor.name.endswith(WEIGHT) and len(p.tensor.shape) == 2:
            dense.add(name)
    groups = {
        f"group_{i}": {
            # A class of modules where one scheme is for all: what is not of it is ignored by name.
            "targets": ["Linear"] if len(modules) == 1 else names,
            "format": "pack-quantized",
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(modules.items())
    }
    return {
        "quantization_config": {
            "quant_method": COMPRESSED_TENSORS,
            "version": VERSION,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(dense),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
    }


def _weights(scheme: ExchangeScheme) -> dict[str, Any]:
    """QuantizationArgs of a scheme's weights."""
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
    }


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: the rules of vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""
    schemes = {p.scheme for p in plan if isinstance(p.scheme, ExchangeScheme)}
    notes = ("the directory is for vLLM, SGLang and transformers (with compressed-tensors)",)
    warnings = []
    if any(not s.symmetric for s in schemes):
        warnings.append(
            "zero points of asymmetric schemes load in vLLM, but by default not in transformers "
            "5.24 with compressed-tensors 0.20, which wants them unpacked: load with "
            "CompressedTensorsConfig(dequantize=True), or choose a symmetric scheme"
        )
    return Readers(notes, tuple(warnings))


TARGET: Target = DirectoryTarget(COMPRESSED_TENSORS, settings, readers, DENSE)
