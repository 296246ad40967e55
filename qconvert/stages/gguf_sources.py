"""What a GGUF file is made from: any model, under GGUF's names and with its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qconvert.errors import UnsupportedError, UsageError
from qconvert.files.adapters import AdaptedModel
from qconvert.files.gguf import ARCHITECTURE, RAW
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import GgufValue, MetadataValue
from qconvert.files.provenance import PROVENANCE
from qconvert.mixes import ModelFacts
from qconvert.model import DTYPES, Model

TOKENIZER = "tokenizer.ggml.model"
PRE_TOKENIZER = "tokenizer.ggml.pre"
FURTHER_LAYERS = "nextn_predict_layers"  # below the architecture's name
CLIP = "clip"  # the architecture of a file that turns images into tokens, whatever it is
_PROJECTORS = ("clip.projector_type", "clip.vision.projector_type")
# Of the file they are read from: its layout, and what was done to its tensors.
_NOT_CARRIED = (
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    PROVENANCE,
)
_NOT_CARRIED_BELOW = ("split.", "quantize.imatrix.")


@dataclass(frozen=True, slots=True)
class GgufModelSource:
    """A model as a GGUF file will have it.

    Attributes:
        model: with the names of the file.
        metadata: its keys, but for those that depend on the quantization.
        facts: what the mixes ask; None for a raw file, which has no architecture.
        origin: the name in the source of a tensor; None where it is made of several, or of none.
        warnings: what may surprise in use.
        notes: what was left out.
    """

    model: Model
    metadata: dict[str, MetadataValue]
    facts: ModelFacts | None
    origin: Callable[[str], str | None] = lambda name: name
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def as_gguf(
    opened: Model,
    model: Model,
    *,
    raw: bool,
    name: str,
    pre_tokenizer: str | None,
    compare: bool = True,
    mtp: bool = True,
) -> GgufModelSource:
    """The model as GGUF has it.

    Args:
        opened: as it was opened.
        model: the same, perhaps with its quantized tensors decoded.
        raw: keep the source's names and say nothing about an architecture.
        name: ``general.name`` of a raw file.
        pre_tokenizer, compare, mtp: see `open_gguf_source`.

    Raises:
        UsageError: a pre-tokenizer for a file that gets no tokenizer from us.
        UnsupportedError: a dtype that GGUF has nothing for.
        InputError, UnsupportedError: see `open_gguf_source`.
    """
    _check_dtypes(model)
    if pre_tokenizer is not None and (raw or isinstance(opened, AnyGgufModel)):
        raise UsageError(
            "--pre-tokenizer goes with a model directory, whose tokenizer is converted",
            hint="leave it out",
        )
    if not mtp and (raw or isinstance(opened, AnyGgufModel)):
        raise UsageError(
            "--no-mtp goes with a model directory, whose layers are counted", hint="leave it out"
        )
    if isinstance(opened, AnyGgufModel) and not raw and opened.metadata.get(ARCHITECTURE) != RAW:
        metadata, empty = _carried(opened)
        notes = tuple(f"the empty array '{key}' is left out" for key in empty)
        return GgufModelSource(model, metadata, facts_of(metadata), notes=notes)
    if raw or isinstance(opened, AnyGgufModel):
        keys: dict[str, MetadataValue] = {ARCHITECTURE: RAW, "general.name": name}
        keys |= {f"qconvert.source.{k}": v for k, v in opened.metadata.items()}
        return GgufModelSource(model, keys, None)
    from qconvert.architectures import open_gguf_source  # its tables take 0.1 s to build

    found = open_gguf_source(model, pre_tokenizer=pre_tokenizer, compare=compare, mtp=mtp)
    notes = found.notes + tuple(f"tensor '{d.name}' is left out: {d.reason}" for d in found.dropped)
    return GgufModelSource(
        *(found.model, found.metadata, facts_of(found.metadata)),
        *(found.model.origin, found.warnings, notes),
    )


def adapter_as_gguf(model: AdaptedModel) -> GgufModelSource:
    """The adapter that is merged into a model, by itself.

    Raises:
        InputError, UnsupportedError: see `open_adapter_source`.
    """
    from qconvert.architectures import open_adapter_source

    found = open_adapter_source(model, model.adapter)
    return GgufModelSource(found.model, found.metadata, None, notes=found.notes)


def projector_as_gguf(model: Model) -> GgufModelSource:
    """What turns images into tokens, of a model directory, by itself.

    Raises:
        InputError, UnsupportedError: see `open_projector_source`.
    """
    _check_dtypes(model)
    from qconvert.architectures import open_projector_source

    found = open_projector_source(model)
    notes = found.notes + tuple(f"tensor '{d.name}' is left out: {d.reason}" for d in found.dropped)
    return GgufModelSource(
        *(found.model, found.metadata, facts_of(found.metadata)),
        *(found.model.origin, found.warnings, notes),
    )


def _check_dtypes(model: Model) -> None:
    """Refuse dtypes that GGUF has nothing for, before their tensors are mapped.

    Raises:
        UnsupportedError: names the first such tensor.
    """
    for tensor in model.tensors:
        if tensor.dtype in DTYPES and DTYPES[tensor.dtype].kind in ("narrow", "complex"):
            raise UnsupportedError(
                f"GGUF has no type {tensor.dtype}",
                path=model.path,
                tensor=tensor.name,
                hint="write a .qblk file, which keeps every type",
                code="GGUF-DTYPE",
            )


def _carried(model: AnyGgufModel) -> tuple[dict[str, MetadataValue], list[str]]:
    """The keys of a GGUF file that hold for another file of the same model, and empty arrays."""
    carried: dict[str, MetadataValue] = {}
    empty = []
    for key in model.metadata:
        if key in _NOT_CARRIED or key.startswith(_NOT_CARRIED_BELOW):
            continue
        kind, value = model.value(key)
        if value == []:
            empty.append(key)
        else:
            carried[key] = GgufValue(kind, value)
    return carried, empty


def facts_of(metadata: dict[str, MetadataValue]) -> ModelFacts:
    """What the mixes ask, from the keys of a GGUF file.

    Raises:
        UnsupportedError: the file does not say how many layers there are.
    """

    def plain(key: str) -> Any:
        value = metadata.get(key)
        value = value.value if isinstance(value, GgufValue) else value
        return value[0] if isinstance(value, list) else value  # of the first layer

    architecture = str(plain(ARCHITECTURE))

    def count(key: str, default: int | None = None) -> int:
        value = plain(f"{architecture}.{key}")
        if isinstance(value, int) and value >= 0:
            return value
        if default is None:
            raise UnsupportedError(
                f"GGUF key '{architecture}.{key}' is missing or no count",
                found=value,
                hint="write the tensors as they are with --raw",
            )
        return default

    if architecture == CLIP:  # llama-quantize reads no numbers of it
        kinds = (str(plain(key)) for key in _PROJECTORS if key in metadata)
        return ModelFacts(CLIP, 0, 0, 0, projector=next(kinds, ""))
    heads = count("attention.head_count", 0)
    return ModelFacts(
        architecture=architecture,
        n_layer=count("block_count"),
        n_head=heads,
        n_head_kv=count("attention.head_count_kv", heads),
        n_expert=count("expert_count", 0),
    )
