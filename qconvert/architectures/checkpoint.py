"""A GGUF file of llama.cpp's as the model directory that it was made from, or might have been.

Tensors have the names of a checkpoint and keep the blocks that they have in the file: most changes
on the way were of whole rows, and a row is a run of blocks. So codes can move on from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.families import family_of
from qconvert.architectures.mapped import MappedModel, MappedTensor
from qconvert.architectures.mapping import Dropped
from qconvert.architectures.restored import restored
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.source import CONFIG, read_config
from qconvert.architectures.source_names import source_shapes
from qconvert.codecs.codec import Stored
from qconvert.codecs.ggml_blocks import FACTOR_BYTES, SCALED, encoding_of, segment_start
from qconvert.errors import InputError, UnsupportedError
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.model import Companion, Model, SourceFile, TensorInfo

_HINT = "give the original model's directory, with its weights, with --config"


class Checkpoint:
    """A GGUF file, opened, under the names of a checkpoint: a `qconvert.files.OpenModel`.

    A tensor is of a type of ggml where its rows are rows of tensors of that type, and plain
    otherwise. Closing it closes the file.

    Args:
        gguf: the file.
        model: its tensors under the names of a checkpoint, decoded.
        companions: small files that it has as a directory.
        dropped: tensors of the original model that the file has not, and why.
    """

    kind = "gguf"

    def __init__(
        self,
        gguf: AnyGgufModel,
        model: MappedModel,
        companions: tuple[Companion, ...],
        dropped: tuple[Dropped, ...],
    ) -> None:
        self.path: Path = gguf.path
        self.metadata = gguf.metadata
        self.sources: tuple[SourceFile, ...] = gguf.sources
        self.companions = companions
        self.dropped = dropped
        self._gguf, self._model = gguf, model
        there = {t.name: t for t in gguf.tensors}
        self._parts: dict[str, tuple[TensorInfo, ...]] = {}
        found = []
        for tensor in model.tensors:
            made = model.made(tensor)
            parts = tuple(there[s.name] for s in made.sources)
            if _rows_of_blocks(made, parts):
                self._parts[tensor.name] = parts
                size = encoding_of(parts[0].dtype).size(tensor.shape)
                tensor = replace(tensor, dtype=parts[0].dtype, nbytes=size)
            found.append(tensor)
        self.tensors = tuple(found)

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`."""
        if tensor.name in self._parts and tensor.coded:
            return self.stored(tensor).values(start, stop)
        return self._model.values(tensor, start, stop)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of the tensor as it would be stored."""
        if tensor.name not in self._parts or not tensor.coded:
            return self._model.raw(tensor, offset, size)
        if not 0 <= offset <= offset + size <= tensor.nbytes:
            raise ValueError(f"bytes {offset}..{offset + size} of a tensor of {tensor.nbytes}")
        # The scale of a tensor, where it has one, lies behind its rows.
        part, end = self._parts[tensor.name][0], offset + size
        of_rows = tensor.nbytes - (FACTOR_BYTES if tensor.dtype == SCALED else 0)
        row = of_rows // (tensor.size // tensor.shape[-1])
        first, last = min(offset, of_rows) // row, -(-min(end, of_rows) // row)
        whole = b"".join(self._rows(tensor, first, last, row))
        found = whole[offset - first * row : end - first * row]
        begin = max(offset, of_rows)
        if end > begin:
            found += self._gguf.raw(part, part.nbytes - tensor.nbytes + begin, end - begin)
        return found

    def _rows(self, tensor: TensorInfo, first: int, last: int, row: int) -> list[bytes]:
        """Rows ``first..last`` of so many bytes, in runs that lie together in the file."""
        parts, made = self._parts[tensor.name], self._model.made(tensor)
        wanted = np.arange(first, last, dtype=np.int64)
        wanted = wanted if made.locate is None else made.locate(wanted)
        ends = np.cumsum([p.nbytes // row for p in parts])
        breaks = np.flatnonzero((np.diff(wanted) != 1) | np.isin(wanted[1:], ends)) + 1
        found = []
        for run in np.split(wanted, breaks) if len(wanted) else ():
            index = int(np.searchsorted(ends, run[0], "right"))
            start = int(run[0]) - (int(ends[index - 1]) if index else 0)
            found.append(self._gguf.raw(parts[index], start * row, len(run) * row))
        return found

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in the file, its rows in the order of the checkpoint."""

        def read(kind: str, offset: int, size: int) -> bytes:
            return self.raw(tensor, segment_start(kind, tensor.nbytes) + offset, size)

        parts = self._parts.get(tensor.name, ())
        roundings = {self._gguf.stored(p).rounding for p in parts}
        found = Stored(tensor.name, tensor.shape, encoding_of(tensor.dtype), read, self.path)
        return replace(found, rounding=roundings.pop()) if len(roundings) == 1 else found

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        return self._gguf.check_payload(advance)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened."""
        self._gguf.check_unchanged()

    def close(self) -> None:
        """Close the file."""
        self._gguf.close()


def _rows_of_blocks(made: MappedTensor, parts: tuple[TensorInfo, ...]) -> bool:
    """Whether a tensor has whole rows of blocks of one type, and one scale if these have any."""
    changed = made.order or made.change or made.added or made.factors or made.cut
    kinds = {p.dtype for p in parts}
    one_scale = len(parts) == 1 or SCALED not in kinds
    return not changed and len(kinds) == 1 and all(p.coded for p in parts) and one_scale


def as_checkpoint(
    gguf: AnyGgufModel,
    companions: tuple[Companion, ...],
    weights: Model | None = None,
    home: Path | None = None,
) -> Checkpoint:
    """A GGUF file under the names of a checkpoint.

    Args:
        gguf: the file; it is closed when the result is.
        companions: small files of the model, the configuration among them.
        weights: the original model, whose names and shapes are taken; None: those that models of
            the architecture have, where they are known.
        home: where the small files are, for messages.

    Raises:
        UnsupportedError: the architecture has no row in our table, or no names that are known; the
            file is of another model.
        InputError, FormatError: the configuration is missing or unusable.
    """
    place = home or gguf.path
    fields = SmallFiles(gguf, companions, place).json(CONFIG)
    if fields is None:
        raise InputError(
            f"no {CONFIG} among the files of the original model",
            path=place,
            hint="give its directory with --config",
            code="ARCH-NO-CONFIG",
        )
    path = place / CONFIG
    family_of(fields, path)
    if weights is not None:
        shapes = {t.name: t.shape for t in weights.tensors}
    else:
        family, config = read_config(fields, path)
        named = source_shapes(family, config, {t.name for t in gguf.tensors})
        if named is None:
            raise UnsupportedError(
                f"names of tensors of {family.name} are not known here without their weights",
                path=gguf.path,
                hint=_HINT,
                code="ARCH-NAMES",
            )
        shapes = named
    found = restored(gguf, fields, path, shapes)
    return Checkpoint(gguf, found.model, companions, found.dropped)
