"""Directories of plain weights, a quantized model decoded, for transformers and its readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconvert.schemes import CastScheme
from qconvert.stages.directories.target import DirectoryTarget, Readers
from qconvert.stages.moving import DTYPE_NAMES
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.target import Target


def settings(plan: Sequence[PlannedTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """The dtype that tensors were cast to, where the configuration names one."""
    cast = {p.scheme.dtype for p in plan if isinstance(p.scheme, CastScheme)}
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    return dict.fromkeys(keys, DTYPE_NAMES[cast.pop()]) if len(cast) == 1 else {}


TARGET: Target = DirectoryTarget(
    name="hf",
    settings=settings,
    readers=lambda plan: Readers(),
    dense=(),
    fused=(),
    quantizes=False,
)
