"""From the tensors of a checkpoint to those that llama.cpp's loader asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import Sizes
from qconvert.architectures.families.row import Family, Slot
from qconvert.architectures.families.slots import NEXTN_PARTS, OUTPUT
from qconvert.architectures.mapped import (
    Factors,
    Locate,
    MappedTensor,
    described,
    interleaved,
    window,
)
from qconvert.architectures.tying import HEAD, Head
from qconvert.errors import InputError, UnsupportedError
from qconvert.model import TensorInfo

# Matrices of one shape that become one tensor: of experts, and of the inputs of Gemma 3n.
_STACKED = re.compile(
    r"(.*\.experts|.*\.altup_(?:unembed_)?projections)\.(\d+)((?:\.\w+)?\.weight)"
)
_IN_BLOCK = re.compile(r"(?:.*\.)?layers\.(\d+)\.")
_STACKED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")
# What transformers computes instead of storing, as some older checkpoints have it.
_COMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")
TOKEN_EMBEDDING = "token_embd.weight"
# Fields that count layers for the prediction of further tokens.
_COUNTS = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Dropped:
    """A tensor of the source that the result does without, and why."""

    name: str
    reason: str


class Tensors(Protocol):
    """What of a `Model` is looked at: names and shapes."""

    @property
    def path(self) -> Path: ...
    @property
    def tensors(self) -> tuple[TensorInfo, ...]: ...


@dataclass(slots=True)
class _Found:
    """The sources of one GGUF tensor."""

    sources: dict[int, TensorInfo] = field(default_factory=dict)  # by expert, or 0 alone
    part: tuple[int, int] = (0, 1)  # this part of so many equal ones of each source's rows
    per_expert: bool = False  # one source for each, rather than one for all


def map_tensors(
    model: Tensors,
    family: Family,
    config: Config,
    sizes: Sizes,
    constants: Mapping[str, NDArray[np.float32]],
    head: Head,
) -> tuple[list[MappedTensor], list[Dropped]]:
    """The tensors of the GGUF file in their order, and what is left out.

    Args:
        model, family, config, sizes: what is mapped.
        constants: tensors that no file of the transformer has: they follow from the configuration,
            or are those of modules after it.
        head: whether the output matrix is one of its own.

    Raises:
        InputError: a tensor is missing or of another shape than the configuration says.
        UnsupportedError: a tensor has no place in the architecture, or a dtype that it cannot have.
    """
    slots = dict(slots_of(family, config, sizes, with_output=not head.tied or head.copied))
    found, dropped = _collect(model, family, config, sizes, slots, head)
    mapped = []
    for name, slot in slots.items():
        shape = sizes.shape(slot.shape, _block(name))
        if name in found:
            mapped.append(_made(model, name, slot, found[name], family, config, sizes))
        elif slot.zeros:
            values = np.zeros(math.prod(shape), np.float32)
            mapped.append(MappedTensor(described(name, shape, "F32"), constant=values))
        elif not slot.optional:
            raise InputError(
                "tensor is missing that the architecture needs",
                path=model.path,
                tensor=name,
                wanted=f"shape {list(shape)}",
                hint="the checkpoint is not whole, or config.json is that of another model",
                code="ARCH-TENSOR-MISSING",
            )
    for name, values in constants.items():
        mapped.append(
            MappedTensor(described(name, values.shape, "F32"), constant=values.reshape(-1))
        )
    return mapped, dropped


def slots_of(
    family: Family, config: Config, sizes: Sizes, with_output: bool
) -> Iterator[tuple[str, Slot]]:
    """All tensors by their whole names: those outside blocks first."""
    for slot in family.whole:
        there = slot.only is None or slot.only(config, sizes, 0)
        if there and (with_output or slot.name != OUTPUT):
            yield slot.name, slot
    more = family.further.block if family.further else ()
    for i in range(sizes.blocks + sizes.further):
        for slot in family.block if i < sizes.blocks else more:
            if slot.flag is not None and not config.flag(slot.flag):
                continue
            if slot.only is None or slot.only(config, sizes, i):
                whole = "{}" in slot.name
                yield slot.name.format(i) if whole else f"blk.{i}.{slot.name}", slot


def _block(name: str) -> int | None:
    """The block that a tensor of GGUF belongs to."""
    found = re.match(r"(?:enc\.|dec\.)?blk\.(\d+)\.", name)
    return int(found[1]) if found else None


def _collect(
    model: Tensors,
    family: Family,
    config: Config,
    sizes: Sizes,
    slots: dict[str, Slot],
    head: Head,
) -> tuple[dict[str, _Found], list[Dropped]]:
    """Which source tensors make up each GGUF tensor."""
    names = name_table(family.arch, sizes.blocks + sizes.further)
    further = further_layers(model, family, config, sizes.blocks)
    found: dict[str, _Found] = {}
    dropped: list[Dropped] = []
    for tensor in model.tensors:
        plain = family.renamed(tensor.name)
        reason = drop_reason(tensor.name, family, head.tied and not head.stands_in)
        if further and is_further(plain, family, sizes.blocks):
            plain = _of_layer(plain, family, sizes.blocks)
            reason = reason or (None if sizes.further else _left_out(further))
        if reason:
            dropped.append(Dropped(tensor.name, reason))
            continue
        for name, expert, part in gguf_names(plain, family, names):
            if name == OUTPUT and head.stands_in:
                name = TOKEN_EMBEDDING
            if name not in slots:
                raise _left_over(model, tensor, name, family, sizes)
            entry = found.setdefault(name, _Found())
            other = entry.sources.setdefault(expert or 0, tensor)
            if other is not tensor:
                raise InputError(
                    "two tensors would have one name in GGUF",
                    path=model.path,
                    tensor=tensor.name,
                    found=other.name,
                    hint="the directory holds two versions of the model",
                    code="ARCH-TENSOR-TWICE",
                )
            entry.per_expert = expert is not None
            entry.part = part
    if head.copied and TOKEN_EMBEDDING in found:
        found[OUTPUT] = found[TOKEN_EMBEDDING]
    return found, dropped


def _left_over(
    model: Tensors, tensor: TensorInfo, name: str | None, family: Family, sizes: Sizes
) -> UnsupportedError:
    ending = (name or "").partition(".")[2].partition(".")[2]
    flag = next((s.flag for s in family.block if s.name == ending and s.flag), None)
    return UnsupportedError(
        "tensor has no place in the architecture",
        path=model.path,
        tensor=tensor.name,
        found=f"'{flag}' that is not true" if flag else None,
        wanted=f"tensors of {family.name} with {sizes.blocks} blocks",
        hint="llama.cpp would refuse the file; --raw writes the tensors under their own names",
        code="ARCH-TENSOR-LEFT",
    )


def name_table(arch: str, blocks: int) -> Any:
    """gguf-py's table of names for an architecture of llama.cpp's."""
    found = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return gguf.get_tensor_name_map(found, blocks)


def further_layers(model: Tensors, family: Family, config: Config, blocks: int) -> int:
    """How many layers after the last of so many blocks predict further tokens; of more than one,
    2, since llama.cpp has a place for one. The tensors say it, unless the configuration has none.
    """
    if any(config.get(field) == 0 for field in _COUNTS):
        return 0
    names = [family.renamed(t.name) for t in model.tensors]
    further = [n for n in names if is_further(n, family, blocks)]
    only = f".{blocks}."
    one = all(only in _of_layer(n, family, blocks) for n in further)
    return (1 if one else 2) if further else 0


def is_further(name: str, family: Family, blocks: int) -> bool:
    """Whether a tensor belongs to such a layer, by its name as `Family.renamed` gives it."""
    if family.further is None:
        return False
    found = _IN_BLOCK.match(name)
    starts = {start.partition(".")[0] for start, _ in family.further.renames}
    return name.partition(".")[0] in starts or (found is not None and int(found[1]) >= blocks)


def _of_layer(name: str, family: Family, blocks: int) -> str:
    """The name of a tensor of such a layer, as one of a layer after the last."""
    assert family.further
    for start, instead in family.further.renames:
        if name.startswith(start):
            return instead.format(blocks) + name.removeprefix(start)
    return name


def _left_out(layers: int) -> str:
    """Why layers that predict further tokens are."""
    why = "--no-mtp leaves it out" if layers == 1 else "llama.cpp has a place for one such layer"
    return f"predicts further tokens at once, and {why}"


def drop_reason(name: str, family: Family, tied: bool) -> str | None:
    """Why GGUF does without a tensor of the checkpoint; None when it has it."""
    if name.endswith((*_COMPUTED, *family.buffers)):
        return "is computed, not stored"
    if why := family.useless(name):
        return why
    return (
        "equals the token embedding, which it is tied to" if tied and name.endswith(HEAD) else None
    )


def gguf_names(
    name: str, family: Family, names: Any
) -> Iterator[tuple[str | None, int | None, tuple[int, int]]]:
    """What is made of a source: GGUF's names, with the expert, or the part of a fused tensor."""
    if slots := _named(name, family):
        for i, slot in enumerate(slots):
            yield slot, None, (i, len(slots))
        return
    for source_name, expert, part in source_names(name):
        own = _named(source_name, family)
        found = own[0] if own else names.get_name(source_name, try_suffixes=(".weight", ".bias"))
        yield found, expert, part or (0, 1)


def _named(name: str, family: Family) -> list[str]:
    """The names that a family itself has for a tensor."""
    within = _IN_BLOCK.match(name)
    if within is None:
        return list(family.parts.get(name, ()))
    end = name[within.end() :]
    found = family.parts.get(end) or (NEXTN_PARTS.get(end) if family.further else None) or ()
    return [s.format(within[1]) if "{}" in s else f"blk.{within[1]}.{s}" for s in found]


def source_names(name: str) -> Iterator[tuple[str, int | None, tuple[int, int] | None]]:
    """Names as gguf-py's table has them, with the expert, or the part of a fused tensor."""
    if one := _STACKED.fullmatch(name):
        yield one[1] + one[3], int(one[2]), None
    elif (all_of := _STACKED_EXPERTS.fullmatch(name)) and all_of[2] == "gate_up_proj":
        yield f"{all_of[1]}.gate_proj.weight", None, (0, 2)
        yield f"{all_of[1]}.up_proj.weight", None, (1, 2)
    elif all_of:
        yield f"{all_of[1]}.down_proj.weight", None, (0, 1)
    else:
        yield name, None, None


def _made(
    model: Tensors,
    name: str,
    slot: Slot,
    found: _Found,
    family: Family,
    config: Config,
    sizes: Sizes,
) -> MappedTensor:
    """One tensor, its sources held to shape and dtype."""
    block = _block(name)
    shape = sizes.shape(slot.shape, block)
    wanted, count = shape, 1
    if found.per_expert:
        count, wanted = shape[0], shape[1:]
        missing = [e for e in range(count) if e not in found.sources]
        if missing or len(found.sources) != count:
            raise InputError(
                "experts are not those that the configuration says",
                path=model.path,
                tensor=name,
                found=f"{len(found.sources)} experts, without {missing[:3]}"
                if missing
                else f"{len(found.sources)} experts",
                wanted=f"{count} experts",
                code="ARCH-EXPERTS",
            )
    elif slot.source is not None:
        wanted = sizes.shape(slot.source, block)
    elif found.part[1] > 1:
        axis = max(len(shape) - 2, 0)  # of rows; of a bias every value is one
        wanted = (*shape[:axis], shape[axis] * found.part[1], *shape[axis + 1 :])
    sources = tuple(found.sources[e] for e in range(count))
    other = slot.stored
    if other and other.source and sources[0].shape == sizes.shape(other.source, block) != wanted:
        return _made(model, name, other, found, family, config, sizes)
    for source in sources:
        _check_source(model, source, wanted, config)
    if len({s.dtype for s in sources}) > 1:
        raise UnsupportedError(
            "experts to be stacked have different dtypes",
            path=model.path,
            tensor=name,
            found=", ".join(sorted({s.dtype for s in sources})),
            code="ARCH-EXPERT-DTYPES",
        )
    locate: Locate | None = None
    if slot.heads:
        locate = interleaved(sizes.head_dim)
    elif slot.rows:
        locate = slot.rows(sizes)
    elif found.part[1] > 1 and not slot.order:
        part, rows = found.part[0], shape[max(len(shape) - 2, 0)]
        locate = window(rows * found.part[1], part * rows, (part + 1) * rows)
    added = 1.0 if family.norm_offset and name.endswith("norm.weight") and not slot.plain else 0.0
    factors = _factors(slot, config, sizes)
    dtype = "F32" if added or slot.change or factors else sources[0].dtype
    return MappedTensor(
        described(name, shape, dtype),
        sources,
        locate,
        slot.order(sizes) if slot.order else None,
        slot.turned,
        added,
        slot.change,
        factors,
        slot.cut,
    )


def _factors(slot: Slot, config: Config, sizes: Sizes) -> Factors | None:
    """What rows are multiplied by; None where that is one."""
    found = np.array(slot.factors(config, sizes) if slot.factors else [1.0], np.float32)
    return None if (found == 1.0).all() else Factors(found)


def _check_source(
    model: Tensors, source: TensorInfo, wanted: tuple[int, ...], config: Config
) -> None:
    if source.dtype not in _FLOATS:
        raise UnsupportedError(
            "weights of this dtype cannot become GGUF",
            path=model.path,
            tensor=source.name,
            found=source.dtype,
            wanted=", ".join(_FLOATS),
            hint="convert a checkpoint that is not quantized already",
            code="ARCH-DTYPE",
        )
    if source.shape != wanted:
        raise InputError(
            f"shape contradicts {config.path.name}",
            path=model.path,
            tensor=source.name,
            found=list(source.shape),
            wanted=list(wanted),
            hint="config.json is that of another model, or was changed",
            code="ARCH-SHAPE",
        )
