"""compressed-tensors checkpoints, as llm-compressor and others write them.

formats/exchange/compressed-tensors.md says which of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.codecs.exchange.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
    PackedIntegers,
)
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.settings import (
    check_keys,
    flag,
    integer,
    refuse_setting,
    section,
    text,
    texts,
    unsupported,
)
from qconvert.model import WEIGHT

KIND = "compressed-tensors"
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO_POINT)
# Fields of a group's weights: QuantizationArgs of compressed-tensors 0.20.
_ARGUMENTS = frozenset(
    {
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)
MAX_PATTERN = 1000  # characters of a regular expression


@dataclass(frozen=True, slots=True)
class Group:
    """How some modules are stored: a group of ``config_groups``.

    Attributes:
        targets: names of classes or modules, or ``re:`` and an expression.
        format: of the group, or of the whole.
        weights: checked fields of QuantizationArgs.
    """

    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]

    def has(self, module: str) -> bool:
        """Whether a module belongs to the group; of which class it is nobody can tell here."""
        return any(_matches(target, module) for target in self.targets)


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module or target in ("Linear", "Embedding") or module.endswith("." + target)


def find(checkpoint: Checkpoint) -> Found | None:
    """What a checkpoint holds; see `qconvert.files.exchange`.

    Raises:
        FormatError, UnsupportedError: its configuration is none, or means what is not read here.
    """
    groups = _groups(checkpoint)
    matrices = []
    for name in checkpoint.tensors:
        if name.endswith(PACKED):
            module = name.removesuffix(PACKED)
            group = next((g for g in groups if g.has(module)), None)
            if group is None:
                raise FormatError(
                    "a quantized weight is in none of the groups of the configuration",
                    path=checkpoint.path,
                    tensor=module,
                    code="EXCHANGE-GROUP",
                )
            matrices.append(_packed(checkpoint, module, group))
    return Found(KIND, matrices, SUFFIXES)


def _packed(checkpoint: Checkpoint, module: str, group: Group) -> Matrix:
    parts = {s: module + s for s in SUFFIXES if module + s in checkpoint.tensors}
    weights, path = group.weights, checkpoint.path
    if group.format != "pack-quantized" or weights["type"] != "int":
        raise unsupported(path, "format of a group", group.format, "pack-quantized")
    shape = _shape(checkpoint, module)
    size = weights["group_size"] if weights["strategy"] == "group" else 0
    scale = checkpoint.tensors.get(module + SCALE)
    layout = PackedIntegers(
        weights["num_bits"], size, weights["symmetric"], scale.dtype if scale else "BF16"
    )
    return Matrix(module + WEIGHT, shape, layout, parts)


def _shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """Of a packed weight, as ``weight_shape`` says.

    Raises:
        FormatError: it is missing, or no shape of a matrix.
    """
    info = checkpoint.tensors.get(module + SHAPE)
    if info is None or info.dtype not in ("I64", "I32") or info.size != 2:
        raise FormatError(
            "a packed weight has no shape",
            path=checkpoint.path,
            tensor=module + SHAPE,
            found=f"{info.dtype} {list(info.shape)}" if info else "no such tensor",
            wanted="I64 [2]",
            code="EXCHANGE-SHAPE",
        )
    found = np.frombuffer(checkpoint.read(module + SHAPE), f"<i{info.nbytes // 2}")
    rows, columns = (int(n) for n in found)
    if rows < 1 or columns < 1:
        raise FormatError(
            "the shape of a packed weight is no shape of a matrix",
            path=checkpoint.path,
            tensor=module + SHAPE,
            found=f"[{rows}, {columns}]",
            code="EXCHANGE-SHAPE",
        )
    return rows, columns


# --- the configuration ---


def _groups(checkpoint: Checkpoint) -> Sequence[Group]:
    path, settings = checkpoint.path, checkpoint.settings
    overall = text(path, "format", settings.get("format", "dense"))
    groups = section(path, "config_groups", settings.get("config_groups", {}))
    return [_group(path, name, section(path, name, g), overall) for name, g in groups.items()]


def _group(path: Path, name: str, fields: Mapping[str, Any], overall: str) -> Group:
    targets = texts(path, f"{name}.targets", fields.get("targets"))
    for target in targets:
        if target.startswith("re:"):
            _check_pattern(path, target)
    format = fields.get("format")
    weights = section(path, f"{name}.weights", fields.get("weights"))
    check_keys(path, f"{name}.weights", weights, _ARGUMENTS)
    strategy = text(path, "strategy", weights.get("strategy", "tensor"))
    checked: dict[str, Any] = {
        "num_bits": integer(path, "num_bits", weights.get("num_bits", 8), 1, 8),
        "type": text(path, "type", weights.get("type", "int")),
        "symmetric": flag(path, "symmetric", weights.get("symmetric", True)),
        "strategy": strategy,
        "group_size": None,
    }
    if strategy in ("group", "tensor_group"):
        checked["group_size"] = integer(path, "group_size", weights.get("group_size"), 1, 1 << 20)
    return Group(targets, text(path, "format", format or overall), checked)


def _check_pattern(path: Path, target: str) -> None:
    try:
        if len(target) > MAX_PATTERN:
            raise re.error("too long")
        re.compile(target[3:])
    except re.error as e:
        refuse_setting(path, "targets", target, f"a regular expression ({e})")
