"""compressed-tensors directories, for vLLM, SGLang and transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.codecs.exchange.compressed_tensors import PACKED_ZEROS
from qconvert.codecs.exchange.micro import FP8
from qconvert.exchange_schemes import COMPRESSED_TENSORS, CompressedTensorsScheme, ExchangeScheme
from qconvert.stages.directories.modules import dense_modules, quantized_modules
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

# What scales are called that are bytes.
SCALE_DTYPES = {FP8: "torch.float8_e4m3fn", "U8": "torch.uint8"}
VERSION = "0.20.0"  # of the library whose layout this is
DENSE = (
    Rule((*EMBEDDINGS, *HEADS), "embeddings and head stay as they are: not all readers take codes"),
    Rule(ROUTERS, "a router stays as it is: readers multiply it as it is"),
    Rule(VISION, "parts for images and sound stay as they are, as in published checkpoints"),
)


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan: a group for each scheme, QuantizationConfig of
    compressed-tensors 0.20.
    """
    modules: dict[ExchangeScheme, list[str]] = {}
    for name, scheme in quantized_modules(plan).items():
        modules.setdefault(scheme, []).append(name)
    groups = {
        f"group_{i}": {
            # A class of modules where one scheme is for all: what is not of it is ignored by name.
            "targets": ["Linear"] if len(modules) == 1 else names,
            "format": _format(scheme),
            "weights": _weights(scheme),
            "input_activations": _inputs(scheme),
            "output_activations": None,
        }
        for i, (scheme, names) in enumerate(modules.items())
    }
    formats = {_format(scheme) for scheme in modules}
    return {
        "quantization_config": {
            "quant_method": COMPRESSED_TENSORS,
            "version": VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": dense_modules(plan),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }
    }


def _format(scheme: ExchangeScheme) -> str:
    if isinstance(scheme, CompressedTensorsScheme) and scheme.micro:
        return scheme.micro
    if scheme.number != "int":
        return "float-quantized"
    return "int-quantized" if scheme.activations else "pack-quantized"


def _weights(scheme: ExchangeScheme) -> dict[str, Any]:
    """QuantizationArgs of a scheme's weights."""
    whole = isinstance(scheme, CompressedTensorsScheme) and scheme.whole
    found: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.number == "int" else "float",
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "tensor" if whole else "channel",
        "group_size": scheme.group or None,
        "dynamic": False,
    }
    if scheme.scale_dtype in SCALE_DTYPES:
        found["scale_dtype"] = SCALE_DTYPES[scheme.scale_dtype]
        if scheme.scale_dtype == FP8:
            found["strategy"] = "tensor_group"  # and a scale of the tensor besides
    elif scheme.number != "int" and scheme.group:
        found |= {"strategy": "block", "group_size": None}
        found["block_structure"] = [scheme.group, scheme.group]
    return found


def _inputs(scheme: ExchangeScheme) -> dict[str, Any] | None:
    """QuantizationArgs of inputs that readers quantize."""
    if not scheme.activations:
        return None
    if scheme.number == "e2m1":  # the same as weights, but for scales of groups: as inputs come
        return {**_weights(scheme), "dynamic": "local", "observer": "static_minmax"}
    if scheme.activations == "static":
        integers = scheme.number == "int"
        found = {"num_bits": 8, "type": "int" if integers else "float", "symmetric": not integers}
        return found | {"strategy": "tensor", "group_size": None, "dynamic": False}
    found = {
        "num_bits": 8,
        "type": "int" if scheme.number == "int" else "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    if scheme.number != "int" and scheme.group:
        found |= {"strategy": "group", "group_size": scheme.group}
    return found


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: the rules of vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""
    schemes = {*quantized_modules(plan).values()}
    notes = ("the directory is for vLLM, SGLang and transformers (with compressed-tensors)",)
    warnings = []
    if any(s.number == "int" and 8 % s.bits for s in schemes):
        warnings.append(
            "codes of 3, 5 and 6 bits are a dense stream of bits, as compressed-tensors 0.20 has "
            "them; an older reader takes them for others: load with 0.20 or newer"
        )
    if any(not s.symmetric for s in schemes):
        warnings.append(PACKED_ZEROS)
    return Readers(notes, tuple(warnings))


TARGET: Target = DirectoryTarget(COMPRESSED_TENSORS, settings, readers, DENSE)
