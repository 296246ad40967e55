"""bitsandbytes directories, for transformers, peft and unsloth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.codecs.exchange.bitsandbytes import TORCH_NAMES
from qconvert.exchange_schemes import BNB, BnbScheme
from qconvert.stages.directories.gptq import DENSE
from qconvert.stages.directories.modules import check_parts_of_names, dense_modules, one_scheme
from qconvert.stages.directories.target import DirectoryTarget, Readers
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a plan: BitsAndBytesConfig of transformers 5.24.

    Raises:
        UsageError: several schemes, or dense modules whose names are parts of others.
    """
    scheme, dense = one_scheme(plan, BNB), dense_modules(plan)
    assert isinstance(scheme, BnbScheme)
    check_parts_of_names(plan, dense)
    four = scheme.bits == 4
    return {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": scheme.number if four else "fp4",
            "bnb_4bit_use_double_quant": scheme.double,
            "bnb_4bit_compute_dtype": TORCH_NAMES[scheme.scale_dtype],
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_skip_modules": dense,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }
    }


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: transformers 5.24, and vLLM 0.32 with its plugin."""
    return Readers(
        ("the directory is for transformers, peft and unsloth, and for vLLM with vllm-bnb-plugin",)
    )


TARGET: Target = DirectoryTarget(BNB, settings, readers, DENSE)
