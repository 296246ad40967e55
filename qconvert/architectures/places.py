"""Where weights of a checkpoint's layers are in a GGUF file: names for importance matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from qconvert.architectures.config import Config
from qconvert.architectures.families import known_family
from qconvert.architectures.families.keys import MAX_BLOCKS
from qconvert.architectures.families.row import Slot
from qconvert.architectures.mapping import (
    drop_reason,
    gguf_names,
    name_table,
    source_names,
)
from qconvert.architectures.source import read_config
from qconvert.errors import UnsupportedError

# llama.cpp's names for values of ``model_type`` that it writes otherwise; for models of classes
# that the table of architectures has no row for.
_TYPES = {
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "roberta": "bert",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where the weight of a layer is in a GGUF file.

    Attributes:
        name: of the tensor.
        expert: which of the matrices stacked there; None where there is one alone.
    """

    name: str
    expert: int | None


def layer_places(fields: dict[str, Any], path: Path) -> Callable[[str], Place | None]:
    """Layer of a checkpoint -> place of its weight in GGUF, None where it has none.

    A model of a class in the table of architectures has the places that its conversion gives. Of
    other models llama.cpp's own converter makes files; their names are gguf-py's for the
    architecture that ``model_type`` says.

    Args:
        fields: of the model's config.json.
        path: that file, for messages.

    Raises:
        UnsupportedError: llama.cpp does not know the architecture.
        FormatError: the number of blocks is missing or impossible.
    """
    family = None
    config = Config(fields, path)
    if known_family(fields):
        family, config = read_config(fields, path)
    arch = family.arch if family else _arch_of_type(config)
    reordered = {s.name for s in family.block if _reordered(s)} if family else set()
    blocks = (
        family.sizes(config).blocks
        if family
        else config.count("num_hidden_layers", most=MAX_BLOCKS)
    )
    names = name_table(arch, blocks)

    def place(layer: str) -> Place | None:
        weight = f"{layer}.weight"
        if family:
            if drop_reason(weight, family, tied=False):
                return None
            name, expert, _ = next(gguf_names(family.renamed(weight), family, names))
            if name is None or name.partition(".")[2].partition(".")[2] in reordered:
                return None  # no columns that are those of the layer
            return Place(name, expert)
        source, expert, _ = next(source_names(weight))
        name = names.get_name(source, try_suffixes=(".weight",))
        return None if name is None else Place(name, expert)

    return place


def _reordered(slot: Slot) -> bool:
    """Whether columns are not those of the layer; they are where a matrix is only turned round."""
    turned = " ".join(reversed(slot.shape.split()))
    return slot.order is not None and slot.source != turned


def _arch_of_type(config: Config) -> str:
    kind = str(config.get("model_type"))
    for name in (_TYPES.get(kind, kind.replace("_", "-")), kind):
        if name in gguf.MODEL_ARCH_NAMES.values():
            return name
    raise UnsupportedError(
        "llama.cpp has no names for the tensors of this model",
        path=config.path,
        found=f"model_type {kind!r}",
        hint="leave out --imatrix",
        code="IMATRIX-ARCHITECTURE",
    )
