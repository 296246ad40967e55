"""A GGUF file of llama.cpp's under the names, and in the order, of the model that it was made from.

The table is that of the way there: what `map_tensors` says of the model's tensors, turned round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.architectures.dense_modules import DENSE
from qconvert.architectures.families import hyper_parameters
from qconvert.architectures.families.slots import OUTPUT
from qconvert.architectures.mapped import MappedModel, described, inverted
from qconvert.architectures.mapping import Dropped, map_tensors
from qconvert.architectures.rerankers import SCORES
from qconvert.architectures.source import read_config
from qconvert.architectures.tying import HEAD, Head
from qconvert.errors import UnsupportedError
from qconvert.files.dequantized import DequantizedModel
from qconvert.files.gguf import ARCHITECTURE
from qconvert.model import Model, TensorInfo


@dataclass(frozen=True, slots=True)
class RestoredModel:
    """What a GGUF file holds of a model.

    Attributes:
        model: the tensors asked for, F32, from what those of the file decode to; closing it closes
            the file.
        dropped: those that no GGUF file of the architecture has, and why.
    """

    model: MappedModel
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    path: Path
    tensors: tuple[TensorInfo, ...]


def restored(
    gguf: Model, fields: dict[str, Any], config: Path, shapes: Mapping[str, tuple[int, ...]]
) -> RestoredModel:
    """Tensors of a model out of a GGUF file with llama.cpp's names.

    Rows get back their order, stacks and fused matrices are taken apart or joined as asked, and
    what GGUF adds to norms is taken away (in binary32: bit for bit where the sum was exact).

    Args:
        gguf: the file, opened; no tensor is read.
        fields: of the model's config.json.
        config: that file, for messages.
        shapes: of the tensors asked for by their names, which may be those of a checkpoint or of
            the modules of transformers.

    Raises:
        UnsupportedError: an architecture without a row in our table, or a file of another one, or
            of tensors that the model does not have, or have another shape there.
        InputError, FormatError: a field of the configuration is missing or unusable.
    """
    family, checked = read_config(fields, config)
    if (found := gguf.metadata.get(ARCHITECTURE)) != family.arch:
        raise _another_model(gguf, None, f"architecture {found}", family.arch)
    sizes = family.sizes(checked)
    _, rope = hyper_parameters(family, checked, sizes)
    asked = _Asked(config.parent, tuple(described(n, s, "F32") for n, s in shapes.items()))
    output = any(t.name == OUTPUT for t in gguf.tensors)
    copied = output and family.own_head and not any(n.endswith(HEAD) for n in shapes)
    head = Head(tied=copied or not output, copied=copied)
    mapped, dropped = map_tensors(asked, family, checked, sizes, rope.tensors, head)
    there = {t.name: t for t in gguf.tensors}
    for tensor in mapped:
        wanted = tensor.info
        has = there.pop(wanted.name, None)
        if has is not None and has.shape == wanted.shape:
            continue
        if has is not None or tensor.sources:  # constants follow from the configuration
            shape = "no such tensor" if has is None else f"shape {list(has.shape)}"
            raise _another_model(gguf, wanted.name, shape, f"shape {list(wanted.shape)}")
    if family.dense:  # of modules that follow the model
        there = {n: t for n, t in there.items() if n.partition(".")[0] not in DENSE}
    if family.scores and checked.flag("tie_word_embeddings"):
        there.pop(SCORES, None)  # rows of the token embedding, which is there
    if there:
        raise _another_model(gguf, next(iter(there)), f"{len(there)} tensors too many", None)
    return RestoredModel(
        MappedModel(DequantizedModel(gguf, kept=("F32",)), inverted(mapped)), tuple(dropped)
    )


def _another_model(
    gguf: Model, tensor: str | None, found: str, wanted: str | None
) -> UnsupportedError:
    return UnsupportedError(
        "the file is not of the model that the config describes",
        path=gguf.path,
        tensor=tensor,
        found=found,
        wanted=wanted,
        code="ARCH-ANOTHER-MODEL",
    )
