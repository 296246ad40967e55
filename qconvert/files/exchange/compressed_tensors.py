"""compressed-tensors checkpoints, as llm-compressor and others write them.

formats/exchange/compressed-tensors.md says which of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.codecs.exchange.compressed_tensors import (
    GLOBAL,
    MICRO,
    PACKED,
    SCALE,
    SHAPE,
    ZERO_POINT,
    PackedIntegers,
    PlainIntegers,
)
from qconvert.codecs.exchange.floats import OTHER_INPUTS, Float8
from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.exchange.micro import Micro
from qconvert.encoding import SCALE_SIZES
from qconvert.errors import FormatError
from qconvert.files.exchange import Checkpoint, Found, Matrix
from qconvert.files.exchange.activations import ACTIVATIONS, dropped_note
from qconvert.files.exchange.settings import (
    OTHER_VERSIONS,
    check_keys,
    flag,
    integer,
    pattern,
    refuse_setting,
    section,
    text,
    texts,
    unsupported,
)
from qconvert.model import WEIGHT, TensorInfo

KIND = "compressed-tensors"
ORDER = ".weight_g_idx"  # of columns, where groups are none of neighbours
SUFFIXES = (PACKED, SCALE, SHAPE, ZERO_POINT, GLOBAL, ORDER)
_CODES = ("I32", "I8", "F8_E4M3", "U8")
# Fields of the block: QuantizationConfig of compressed-tensors 0.20, what it writes beside them,
# and those of transformers' CompressedTensorsConfig, which say how to compute.
_FIELDS = frozenset(
    {
        *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "version"),
        *("quantization_status", "global_compression_ratio", "sparsity_config"),
        *("transform_config", "moe_sparsity_config", "run_compressed", "dequantize"),
        *("use_optimized_inference",),
    }
)
# Of these, what makes other weights of what is stored.
_CHANGING = ("sparsity_config", "transform_config", "moe_sparsity_config")
# Fields of a group: QuantizationScheme.
_GROUP = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
# Fields of a group's weights: QuantizationArgs of compressed-tensors 0.20.
_ARGUMENTS = frozenset(
    {
        *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"),
        *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    }
)


@dataclass(frozen=True, slots=True)
class Group:
    """How some modules are stored: a group of ``config_groups``.

    Attributes:
        targets: names of classes or modules, or ``re:`` and an expression.
        format: of the group, or of the whole.
        weights: checked fields of QuantizationArgs.
        inputs: see `qconvert.codecs.exchange.layout.Layout`.
    """

    targets: tuple[str, ...]
    format: str
    weights: Mapping[str, Any]
    inputs: str

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
    for name, info in checkpoint.tensors.items():
        for suffix, made in _MODULES.items():
            module = name.removesuffix(suffix)
            if module == name or info.dtype not in _CODES:
                continue
            if suffix == PACKED or module + SCALE in checkpoint.tensors:
                matrices.append(made(checkpoint, module, _group_of(checkpoint, module, groups)))
    dropped = [name for name in checkpoint.tensors if name.endswith(ACTIVATIONS)]
    return Found(KIND, matrices, SUFFIXES, frozenset(dropped), dropped_note(dropped))


def _group_of(checkpoint: Checkpoint, module: str, groups: Sequence[Group]) -> Group:
    """The first group that a module belongs to.

    Raises:
        FormatError: there is none.
    """
    group = next((g for g in groups if g.has(module)), None)
    if group is None:
        raise FormatError(
            "a quantized weight is in none of the groups of the configuration",
            path=checkpoint.path,
            tensor=module,
            hint=OTHER_VERSIONS,
            code="EXCHANGE-GROUP",
        )
    return group


def _packed(checkpoint: Checkpoint, module: str, group: Group) -> Matrix:
    """A weight in ``weight_packed``."""
    weights = group.weights
    if group.format in MICRO:
        return _micro(checkpoint, module, group)
    if group.format != "pack-quantized" or weights["type"] != "int":
        wanted = " ".join(("pack-quantized", *MICRO))
        raise unsupported(checkpoint.path, "format of packed weights", group.format, wanted)
    layout = PackedIntegers(
        *(weights["num_bits"], weights["group_size"], weights["symmetric"]),
        *(_scale_dtype(checkpoint, module), weights["strategy"] == "tensor"),
    )
    return Matrix(module + WEIGHT, _shape(checkpoint, module), layout, _parts(checkpoint, module))


def _plain(checkpoint: Checkpoint, module: str, group: Group) -> Matrix:
    """A weight in ``weight``: signed bytes, or E4M3."""
    weights, path = group.weights, checkpoint.path
    info = checkpoint.tensors[module + WEIGHT]
    if group.format in MICRO:
        return _micro(checkpoint, module, group)
    wanted = {"int": "I8", "float": "F8_E4M3"}.get(weights["type"])
    plain = group.format in ("int-quantized", "float-quantized", "naive-quantized")
    if not plain or weights["num_bits"] != 8 or wanted != info.dtype or len(info.shape) != 2:
        found = f"{info.dtype} {list(info.shape)} in a group of {group.format}"
        raise unsupported(path, "a weight of codes", found, "I8 or F8_E4M3, of two dimensions")
    dtype, strategy = _scale_dtype(checkpoint, module), weights["strategy"]
    layout: Layout
    if info.dtype == "I8":
        layout = PlainIntegers(
            *(8, weights["group_size"], weights["symmetric"], dtype, strategy == "tensor")
        )
    else:
        blocks = {"tensor": (0, 0), "channel": (1, 0), "block": weights["block"]}
        if strategy not in blocks:
            raise unsupported(path, "strategy of E4M3 weights", strategy, " ".join(blocks))
        dimensions = 1 if strategy == "tensor" else 2
        layout = Float8(SCALE, dtype, blocks[strategy], dimensions, group.inputs)
    return Matrix(module + WEIGHT, info.shape, layout, _parts(checkpoint, module))


def _micro(checkpoint: Checkpoint, module: str, group: Group) -> Matrix:
    """A weight of small floating numbers."""
    layout, weights, path = MICRO[group.format], group.weights, checkpoint.path
    found = (weights["type"], weights["num_bits"], weights["group_size"])
    wanted = ("float", layout.bits, layout.group)
    if found != wanted:
        refuse_setting(path, f"weights of {group.format}", found, f"type, bits and group {wanted}")
    suffix, dtype = layout.packed
    info = checkpoint.tensors.get(module + suffix)
    if info is None or info.dtype != dtype or len(info.shape) != 2 or not _whole(layout, info):
        raise FormatError(
            f"codes that are no matrix of {group.format}",
            path=path,
            tensor=module + suffix,
            found=f"{info.dtype} {list(info.shape)}" if info else "no such tensor",
            wanted=f"{dtype}, rows of whole numbers of {layout.bits} bits",
            code="EXCHANGE-SHAPE",
        )
    rows, stored = info.shape
    shape = rows, stored if dtype == layout.number else stored * 8 // layout.bits
    own = [part.suffix for part in layout.parts(shape)]
    parts = {s: module + s for s in own if module + s in checkpoint.tensors}
    return Matrix(module + WEIGHT, shape, layout, parts)


def _whole(layout: Micro, info: TensorInfo) -> bool:
    """Whether rows of bytes end where a code ends."""
    return info.shape[1] * 8 % layout.bits == 0


_MODULES: Mapping[str, Callable[[Checkpoint, str, Group], Matrix]] = {
    PACKED: _packed,
    WEIGHT: _plain,
}


def _parts(checkpoint: Checkpoint, module: str) -> dict[str, str]:
    """Tensors of a module by their suffixes."""
    return {s: module + s for s in (WEIGHT, *SUFFIXES) if module + s in checkpoint.tensors}


def _scale_dtype(checkpoint: Checkpoint, module: str) -> str:
    """Of a module's scales; of one without any some dtype, for it will be refused."""
    scale = checkpoint.tensors.get(module + SCALE)
    return scale.dtype if scale and scale.dtype in SCALE_SIZES else "BF16"


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
            hint="the checkpoint is damaged or was written wrongly: download or save it again",
            code="EXCHANGE-SHAPE",
        )
    return rows, columns


# --- the configuration ---


def _groups(checkpoint: Checkpoint) -> Sequence[Group]:
    path, settings = checkpoint.path, checkpoint.settings
    check_keys(path, "the quantization block", settings, _FIELDS)
    for name in _CHANGING:
        found = settings.get(name)
        dense = isinstance(found, dict) and found.get("format") == "dense"
        if found and not dense:
            raise unsupported(path, f"'{name}' of the quantization block", found, "none, or empty")
    overall = text(path, "format", settings.get("format", "dense"))
    groups = section(path, "config_groups", settings.get("config_groups", {}))
    return [_group(path, name, section(path, name, g), overall) for name, g in groups.items()]


def _group(path: Path, name: str, fields: Mapping[str, Any], overall: str) -> Group:
    check_keys(path, name, fields, _GROUP)
    targets = texts(path, f"{name}.targets", fields.get("targets"))
    for target in targets:
        if target.startswith("re:"):
            pattern(path, "targets", target.removeprefix("re:"))
    format = fields.get("format")
    weights = section(path, f"{name}.weights", fields.get("weights"))
    check_keys(path, f"{name}.weights", weights, _ARGUMENTS)
    strategy = text(path, "strategy", weights.get("strategy", "tensor"))
    checked: dict[str, Any] = {
        "num_bits": integer(path, "num_bits", weights.get("num_bits", 8), 1, 8),
        "type": text(path, "type", weights.get("type", "int")),
        "symmetric": flag(path, "symmetric", weights.get("symmetric", True)),
        "strategy": strategy,
        "group_size": 0,
        "block": (0, 0),
    }
    if strategy in ("group", "tensor_group"):
        checked["group_size"] = integer(path, "group_size", weights.get("group_size"), 1, 1 << 20)
    if weights.get("actorder") not in (None, False, "static", "weight"):
        wanted = "columns of a group beside each other"
        raise unsupported(path, "actorder", weights["actorder"], wanted)
    if strategy == "block":
        block = weights.get("block_structure")
        if not isinstance(block, list) or len(block) != 2:
            refuse_setting(path, "block_structure", block, "two sizes")
        checked["block"] = tuple(integer(path, "block_structure", n, 1, 1 << 20) for n in block)
    inputs = _inputs(path, name, fields.get("input_activations"))
    return Group(targets, text(path, "format", format or overall), checked, inputs)


def _inputs(path: Path, name: str, found: Any) -> str:
    """What readers make of inputs, where that is one of our schemes of E4M3."""
    if found is None:
        return ""
    fields = section(path, f"{name}.input_activations", found)
    alike = (fields.get("num_bits"), fields.get("type"), fields.get("dynamic")) == (
        8,
        "float",
        True,
    )
    return "dynamic" if alike else OTHER_INPUTS
