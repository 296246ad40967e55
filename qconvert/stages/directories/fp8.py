"""FP8 directories in blocks of 128 x 128, as DeepSeek, Qwen and others publish them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.exchange_schemes import FP8
from qconvert.stages.directories.compressed_tensors import DENSE
from qconvert.stages.directories.modules import dense_modules, one_scheme
from qconvert.stages.directories.target import DirectoryTarget, Readers
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan, FineGrainedFP8Config of transformers 5.24."""
    group = one_scheme(plan, FP8).group
    return {
        "quantization_config": {
            "quant_method": FP8,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [group, group],
            "modules_to_not_convert": dense_modules(plan),
        }
    }


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: the rules of vLLM 0.32, SGLang 0.5.23 and transformers 5.24."""
    return Readers(
        (
            "the directory is for vLLM, SGLang and transformers; inputs become eight bits as they "
            "come, in groups of 128",
        )
    )


TARGET: Target = DirectoryTarget(FP8, settings, readers, DENSE)
