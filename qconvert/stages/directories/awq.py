"""AWQ directories, for vLLM, SGLang, transformers with GPTQModel, and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.exchange_schemes import AWQ
from qconvert.stages.directories.gptq import DENSE
from qconvert.stages.directories.modules import check_parts_of_names, dense_modules, one_scheme
from qconvert.stages.directories.target import DirectoryTarget, Readers
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan, as AutoAWQ 0.2.9 has it.

    Symmetric weights have zero points like others, which is what ``zero_point`` says to readers.

    Raises:
        UsageError: several schemes, or dense modules whose names are parts of others.
    """
    scheme, dense = one_scheme(plan, AWQ), dense_modules(plan)
    check_parts_of_names(plan, dense)
    return {
        "quantization_config": {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense,
        }
    }


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: the rules of vLLM 0.32 and SGLang 0.5.23."""
    notes = (
        "the directory is for vLLM, SGLang, transformers (with GPTQModel), mlx-lm and "
        "onnxruntime-genai's builder",
        "scales are float16: readers that compute in bfloat16 round them",
    )
    return Readers(notes)


TARGET: Target = DirectoryTarget(AWQ, settings, readers, DENSE)
