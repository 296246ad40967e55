"""A GGUF file as the model directory that a directory is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.errors import UnsupportedError, UsageError
from qconvert.files import OpenModel, open_model
from qconvert.files.gguf import ARCHITECTURE, RAW
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.shards import CONFIG, directory_companions, holds_weights
from qconvert.model import Companion
from qconvert.stages.sources import Remarks


@dataclass(frozen=True, slots=True)
class Seen:
    """A source as a directory is made of it, and what is to be said of that."""

    model: OpenModel
    said: Remarks


def as_directory(opened: OpenModel, home: Path | None) -> Seen:
    """A source under the names of a checkpoint, with the small files of one.

    Args:
        opened: the source; of one that is no GGUF file nothing changes.
        home: the directory of the model that a GGUF file was made from: its configuration and
            tokenizer are taken, and the names of its tensors. None: they are made of the file.

    Raises:
        UsageError: a directory for another source.
        UnsupportedError: the file is of no architecture of llama.cpp, or of another model; or its
            keys do not say what a configuration does.
        InputError: the directory cannot be read.
    """
    remarks = Remarks([], [])
    if not isinstance(opened, AnyGgufModel):
        if home is not None:
            raise UsageError(
                "--config goes with a GGUF file that becomes a directory",
                found=f"{opened.path}, which has names and files of its own",
                hint="leave it out",
            )
        return Seen(opened, remarks)
    from qconvert.architectures import as_checkpoint, made_config, made_tokenizer  # 0.1 s

    if opened.metadata.get(ARCHITECTURE) == RAW:
        raise UnsupportedError(
            "a raw GGUF file says nothing of a model, and has no names that a tool would know",
            path=opened.path,
            hint="convert what it was made from",
        )
    if home is not None:
        companions = directory_companions(home)
        weights = open_model(home) if holds_weights(home) else None
        try:
            found = as_checkpoint(opened, companions, weights, home)
        finally:
            if weights is not None:
                weights.close()
        remarks.notes.extend(
            f"tensor '{d.name}' of {home} is not in the file: {d.reason}" for d in found.dropped
        )
        return Seen(found, remarks)
    config = made_config(opened)
    tokenizer = made_tokenizer(opened)
    remarks.warnings.extend(tokenizer.warnings)
    remarks.notes.append(
        f"{CONFIG} {'and tokenizer are' if tokenizer.files else 'is'} made of what the GGUF file "
        f"says, dtype {config['dtype']}"
    )
    remarks.notes.extend(tokenizer.notes)
    files = {CONFIG: _json(config), **tokenizer.files}
    made = tuple(_companion(name, data) for name, data in sorted(files.items()))
    return Seen(as_checkpoint(opened, made), remarks)


def as_made(opened: OpenModel, made: OpenModel) -> OpenModel:
    """A source under the names of a directory that was made of it."""
    if not isinstance(opened, AnyGgufModel) or opened.metadata.get(ARCHITECTURE) == RAW:
        return opened
    from qconvert.architectures import as_checkpoint  # 0.1 s

    try:
        return as_checkpoint(opened, made.companions)
    except UnsupportedError as error:
        if error.code != "ARCH-NAMES":
            raise
        return as_checkpoint(opened, made.companions, made)


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _companion(name: str, data: bytes) -> Companion:
    return Companion(name, len(data), lambda: data)
