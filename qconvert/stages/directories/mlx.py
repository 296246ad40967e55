"""MLX directories, for mlx-lm and what is built on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from qconvert.errors import UnsupportedError, UsageError
from qconvert.exchange_schemes import MLX, MLX_AFFINE, ExchangeScheme, MlxScheme
from qconvert.model import WEIGHT, layer_name
from qconvert.stages.directories.mlx_experts import EXPERTS, stacked
from qconvert.stages.directories.modules import quantized_modules
from qconvert.stages.directories.target import ROUTERS, VISION, DirectoryTarget, Readers, Rule
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target

DENSE = (
    Rule(ROUTERS, "a router stays as it is: its choice is worth more than its bytes"),
    Rule(VISION, "parts for images and sound stay as they are, as in published checkpoints"),
)
# Kinds of models whose weights mlx-lm 0.32 takes under the names and in the shapes that they have
# in transformers: ``sanitize`` of their module drops some at most.
KNOWN = frozenset(
    {
        *("cohere", "cohere2", "ernie4_5", "exaone", "exaone4", "gemma", "gemma2", "gemma3_text"),
        *("glm", "glm4", "granite", "helium", "hunyuan_v1_dense", "internlm2", "internlm3"),
        *("llama", "mimo", "ministral3", "mistral", "nemotron", "olmo2", "olmo3", "phi", "phi3"),
        *("qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "telechat3"),
    }
)
SINGLE = "*.experts.*"  # experts that are no stack
HEAD = "lm_head.weight"


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization`` of a plan, twice: what most tensors have, and modules that differ.

    Raises:
        UnsupportedError: mlx-lm has the model's weights under other names, or stacked.
        UsageError: the head is the embedding's, and there is a quantized one beside it.
    """
    _check_names(plan, config)
    _check_head(plan, config)
    usual, _ = Counter(quantized_modules(plan).values()).most_common(1)[0]
    assert isinstance(usual, MlxScheme)
    block: dict[str, Any] = {**_entry(usual), "mode": usual.mode}
    for p in plan:
        module = layer_name(p.tensor.name)
        if isinstance(p.scheme, ExchangeScheme):
            if p.scheme != usual:
                block[module] = _entry(p.scheme)
        elif p.tensor.name.endswith(WEIGHT) and len(p.tensor.shape) > 1:
            block[module] = False
    return {"quantization": block, "quantization_config": block}


def _entry(scheme: ExchangeScheme) -> dict[str, Any]:
    assert isinstance(scheme, MlxScheme)
    found: dict[str, Any] = {"group_size": scheme.group, "bits": scheme.bits}
    return found if scheme.mode == MLX_AFFINE else found | {"mode": scheme.mode}


def _check_names(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> None:
    expert = next((p.tensor.name for p in plan if fnmatchcase(p.tensor.name, SINGLE)), None)
    kind = config.get("model_type")
    if expert is None and (kind in KNOWN or kind in EXPERTS):
        return
    raise UnsupportedError(
        "experts, which MLX stacks, are not written for models of this kind"
        if expert
        else "mlx-lm may have weights of this kind of model under other names",
        tensor=expert,
        found=f"model_type '{kind}'",
        wanted=" ".join(sorted(EXPERTS if expert else KNOWN | EXPERTS.keys())),
        hint="convert it with mlx_lm.convert, or choose another --format",
        code="EXCHANGE-MODEL",
    )


def _check_head(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> None:
    """mlx-lm drops the weight of a head that is the embedding's, and stumbles over its scales."""
    head = next((p.tensor.name for p in plan if p.scheme and p.tensor.name == HEAD), None)
    if head and config.get("tie_word_embeddings"):
        raise UsageError(
            "the head is stored although the configuration says that it is the embedding's",
            tensor=head,
            hint=f"keep it, and mlx-lm drops it: --keep {head}",
        )


def readers(plan: Sequence[PlannedTensor]) -> Readers:
    """Who loads it: mlx-lm 0.32, whose loader LM Studio and others have."""
    notes = ("the directory is for mlx-lm, LM Studio and what else loads MLX checkpoints",)
    return Readers(notes)


TARGET: Target = DirectoryTarget(
    *(MLX, settings, readers, DENSE), fused=(), metadata=(("format", "mlx"),), named=stacked
)
