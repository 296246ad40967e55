"""Opens the part of a model directory that sees as what llama.cpp's projector file needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_warnings import unread_fields
from qconvert.architectures.families import CONFIG_CLASSES
from qconvert.architectures.families.keys import Sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.mapped import MappedModel
from qconvert.architectures.mapping import map_tensors
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.source import (
    CONFIG,
    TOKENIZER,
    GgufSource,
    check_configuration,
    model_name,
    size_label,
)
from qconvert.architectures.tying import Head
from qconvert.architectures.vision.pictures import read_pictures
from qconvert.architectures.vision.row import ARCH, Inputs, Projector
from qconvert.architectures.vision.table import projector_of
from qconvert.errors import InputError
from qconvert.files.gguf import ARCHITECTURE, KIND, PROJECTOR_FILE
from qconvert.files.gguf_writer import GgufTensor, GgufValue, MetadataValue, check_gguf
from qconvert.model import Model, TensorInfo

# What models have the language model's fields under, where not at the top.
_TEXT = ("text_config", "llm_config")


@dataclass(frozen=True, slots=True)
class _Part:
    """Some tensors of a model."""

    path: Path
    tensors: tuple[TensorInfo, ...]


def open_projector_source(model: Model) -> GgufSource:
    """Map what turns images into tokens, of a Hugging Face model directory, to GGUF.

    Args:
        model: as ``open_model`` gives it; no value is read.

    Raises:
        UnsupportedError: a model or an option of it that llama.cpp's multimodal tool does not have,
            or a tensor without a place there.
        InputError: no directory with config.json and preprocessor_config.json, one without
            tensors that see, or a tensor that is missing or contradicts the configuration.
        FormatError: one of those files breaks a rule.
    """
    files = SmallFiles(model)
    fields = files.json(CONFIG)
    if fields is None:
        raise InputError(
            "a projector for llama.cpp needs the configuration of the model",
            path=model.path,
            found=f"no {CONFIG}" if model.path.is_dir() else f"a {model.kind} file by itself",
            wanted=f"a model directory with {CONFIG} and preprocessor_config.json",
            code="ARCH-NO-CONFIG",
        )
    path = model.path / CONFIG
    check_configuration(fields, path)
    if not isinstance(fields.get("vision_config"), dict):
        raise InputError(
            "the model has no part that sees images",
            path=path,
            found="no object 'vision_config'",
            hint="leave out --mmproj, which writes that part alone",
            code="ARCH-NO-VISION",
        )
    row = projector_of(fields, path)
    inputs = _inputs(row, files, fields, path)
    sizes = row.sizes(inputs)
    keys = row.keys(inputs, sizes)
    family = _as_family(row, inputs, sizes)
    part = _Part(
        model.path,
        tuple(t for t in model.tensors if family.renamed(t.name).startswith(row.prefixes)),
    )
    if not part.tensors:
        raise InputError(
            "the directory has no tensors of the part that sees images",
            path=model.path,
            found=f"{len(model.tensors)} tensors, of the language model alone",
            wanted=f"names that begin with {' or '.join(row.prefixes)}",
            hint="download the files of the whole model",
            code="ARCH-NO-VISION",
        )
    tensors, dropped = map_tensors(part, family, inputs.tower, sizes, {}, Head(tied=False))
    mapped = MappedModel(model, tensors)
    check_gguf([GgufTensor(t.name, t.shape, "F32") for t in mapped.tensors])
    metadata: dict[str, MetadataValue] = {
        ARCHITECTURE: ARCH,
        KIND: PROJECTOR_FILE,
        "general.name": model_name(model.path),
        "general.size_label": size_label(mapped, 0),
        row.projector_key: row.kind,
    }
    metadata |= {k: GgufValue("UINT32", v) if type(v) is int else v for k, v in keys.items()}
    others = len(model.tensors) - len(part.tensors)
    notes = (f"{others} tensors of the language model are left out: --mmproj writes what sees",)
    said = (row.said,) if row.said else ()
    unread = unread_fields(fields, "vision_config", row.config)
    return GgufSource(
        mapped, metadata, row.name, tuple(dropped), unread + said, notes if others else ()
    )


def _tower(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tower's fields."""
    found: Mapping[str, Any] = fields["vision_config"]
    return found


def _inputs(row: Projector, files: SmallFiles, fields: dict[str, Any], path: Path) -> Inputs:
    """What the row reads."""
    whole = Config(fields, path)
    tower = Config(_tower(fields), path, row.config, "vision_config.")
    return Inputs(
        whole, tower, _text(whole), read_pictures(files), lambda text: _token(files, text)
    )


def _text(whole: Config) -> Config:
    """The language model's fields, with the defaults of their class where a table has it."""
    kinds = [c for o in CONFIG_CLASSES for c in (o, *([o.inner[1]] if o.inner else []))]
    name = next((n for n in _TEXT if whole.section(n) is not None), None)
    if name is None:
        return whole  # as older files have it
    inside = whole.section(name)
    assert inside is not None
    known = next((c for c in kinds if c.model_type == inside.get("model_type")), None)
    return Config(inside.fields(), whole.path, known, f"{name}.")


def _token(files: SmallFiles, text: str) -> int | None:
    """The id of a token that was added to the vocabulary."""
    added = (files.json(TOKENIZER) or {}).get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and token.get("content") == text:
            found = token.get("id")
            return found if type(found) is int else None
    return None


def _as_family(row: Projector, inputs: Inputs, sizes: Sizes) -> Family:
    """What `map_tensors` goes by."""
    return Family(
        row.name,
        row.classes,
        ARCH,
        row.whole,
        row.block,
        keys=lambda config, sizes: {},
        sizes=lambda config: sizes,
        rope=None,
        activations=(),
        norm_offset=row.norm_offset,
        renames=row.renames,
        dropped=row.dropped + row.more_dropped(inputs, sizes),
        parts={**row.parts, **row.more_parts(inputs, sizes)},
    )
