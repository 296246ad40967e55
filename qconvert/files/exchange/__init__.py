"""Checkpoints of safetensors whose matrices are codes and scales in a layout of another tool,
opened as a model of weights: `open_weights`.

There is a module for each method, by the name that configurations have for it. It says which
tensors make up which weights, from their names, dtypes, shapes and the configuration; this module
makes a model of that, and refuses what is left over.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.codecs.exchange.layout import Layout
from qconvert.errors import FormatError
from qconvert.files import OpenModel
from qconvert.files.exchange.settings import OTHER_VERSIONS
from qconvert.files.prequantized import MODELOPT, settings_of
from qconvert.files.provenance import PROVENANCE, NotedRoundings
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.shards import CONFIG
from qconvert.files.strict_json import strict_json
from qconvert.model import Companion, SourceFile, TensorInfo

# Modules of this package with a function ``find`` from a `Checkpoint` to what was `Found` in it, or
# None for what it does not read; by the names of methods in configurations.
METHODS: dict[str, str] = {
    "compressed-tensors": "qconvert.files.exchange.compressed_tensors",
    "fp8": "qconvert.files.exchange.fp8",
    "mlx": "qconvert.files.exchange.mlx",
    "gptq": "qconvert.files.exchange.gptq",
    "awq": "qconvert.files.exchange.awq",
    "auto-round": "qconvert.files.exchange.auto_round",
    "bitsandbytes": "qconvert.files.exchange.bitsandbytes",
    "modelopt": "qconvert.files.exchange.modelopt",
    "mxfp4": "qconvert.files.exchange.mxfp4",
}


_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})  # that no method has codes in


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A quantized checkpoint, before its weights are known.

    Attributes:
        tensors: as they lie in the files, by name.
        settings: the quantization block of its configuration.
        read: all bytes of a tensor that is small.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    read: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight and where it lies.

    Attributes:
        name: of the weight, ``model.layers.0.mlp.up_proj.weight``.
        shape: of the weight, (out, in).
        parts: names of tensors by the suffix that the layout has for them.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    parts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Found:
    """What a checkpoint holds besides plain tensors.

    Attributes:
        kind: the container of `qconvert.containers`.
        suffixes: ends of names that only parts of weights have: one that no weight has is refused.
        dropped: tensors that no weight needs, such as scales of activations.
        notes: what is to be said of these.
    """

    kind: str
    matrices: Sequence[Matrix]
    suffixes: tuple[str, ...]
    dropped: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Placed:
    """A matrix with what is read of it."""

    layout: Layout
    parts: Mapping[str, TensorInfo] = field(default_factory=dict)


class QuantizedModel:
    """A `Model` of the weights that the tensors of another one stand for; see `OpenModel`.

    Attributes:
        kind: the container.
        notes, warnings: see `SafetensorsModel`.
    """

    def __init__(self, source: SafetensorsModel, found: Found) -> None:
        self.path: Path = source.path
        self.kind = found.kind
        self.metadata = source.metadata
        self.sources: tuple[SourceFile, ...] = source.sources
        self.companions = _without_quantization(source)
        self.notes = (*source.notes, *found.notes)
        self.warnings = source.warnings
        self._source = source
        self._roundings = NotedRoundings(self.metadata.get(PROVENANCE))
        stored = {t.name: t for t in source.tensors}
        self._placed: dict[str, _Placed] = {}
        made: dict[str, TensorInfo] = {}
        used: set[str] = set(found.dropped)
        for m in found.matrices:
            parts = _own_parts(m, stored, source.path)
            self._placed[m.name] = _Placed(m.layout, parts)
            nbytes = sum(t.nbytes for t in parts.values())
            first = next(iter(parts.values()))
            made[first.name] = TensorInfo(m.name, m.shape, m.layout.name, nbytes)
            used |= {t.name for t in parts.values()}
        left = [t for t in source.tensors if t.name not in used]
        _refuse_orphans(left, found, source.path)
        clash = next((t.name for t in left if t.name in self._placed), None)
        if clash is not None:
            raise FormatError(
                "a weight is stored twice, plain and quantized",
                path=source.path,
                tensor=clash,
                code="EXCHANGE-TWICE",
            )
        self.tensors = tuple(
            made.get(t.name, t) for t in source.tensors if t.name in made or t.name not in used
        )

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in its files."""
        placed = self._placed.get(tensor.name)
        if placed is None:
            return self._source.stored(tensor)

        def read(kind: str, offset: int, size: int) -> bytes:
            return self._source.raw(placed.parts[kind], offset, size)

        return Stored(
            *(tensor.name, tensor.shape, placed.layout, read, self.path),
            rounding=self._roundings.of(tensor.name),
        )

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Values ``start..stop`` of the flattened tensor as numbers; see `Model.values`."""
        return self.stored(tensor).values(start, stop)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of the tensor: its parts, one after the other."""
        placed = self._placed.get(tensor.name)
        if placed is None:
            return self._source.raw(tensor, offset, size)
        found = []
        for part in placed.parts.values():
            low, high = min(offset, part.nbytes), min(offset + size, part.nbytes)
            found.append(self._source.raw(part, low, high - low))
            offset, size = max(offset - part.nbytes, 0), size - (high - low)
        return b"".join(found)

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        for tensor in self.tensors:
            if tensor.name in self._placed:
                stored = self.stored(tensor)
                stored.encoding.check(stored)
            advance(tensor.nbytes)
        return f"structure, and the numbers of {len(self._placed)} quantized matrices"

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Close the files; may be called again."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Weights(OpenModel, Protocol):
    """A model of safetensors files whose tensors are weights, stored or decoded; a context manager.

    Attributes:
        notes, warnings: of what was taken.
    """

    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_weights(path: Path) -> Weights:
    """Open a safetensors file or directory; one that is quantized in a way that is read as weights.

    Raises:
        InputError, FormatError: as of `open_safetensors`, or codes and scales do not fit together.
    """
    model = open_safetensors(path)
    try:
        found = _found(model)
        return QuantizedModel(model, found) if found else model
    except BaseException:
        model.close()
        raise


def _found(model: SafetensorsModel) -> Found | None:
    """What a checkpoint of a known method holds; None where there are no codes, for whoever asks
    refuses a configuration that speaks of some then.
    """
    stated = settings_of(model)
    if stated is None or stated.method not in METHODS:
        return None
    if all(t.dtype in _PLAIN for t in model.tensors):
        return None
    tensors = {t.name: t for t in model.tensors}

    def read(name: str) -> bytes:
        return model.raw(tensors[name], 0, tensors[name].nbytes)

    module = importlib.import_module(METHODS[stated.method])
    found: Found | None = module.find(Checkpoint(model.path, tensors, stated.settings, read))
    return found if found and found.matrices else None


def _own_parts(m: Matrix, stored: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """The parts that a weight of this layout and shape has; what else there is of its module is
    left over.

    Raises:
        FormatError: one is missing, or of another dtype or shape.
    """
    found: dict[str, TensorInfo] = {}
    for part in m.layout.parts(m.shape):
        name = m.parts.get(part.suffix)
        if name is None:
            raise FormatError(
                "a quantized weight lacks one of its tensors",
                path=path,
                tensor=m.name,
                found=" ".join(sorted(m.parts)),
                wanted=part.suffix,
                hint="the checkpoint is incomplete: download or save it again",
                code="EXCHANGE-MISSING",
            )
        there = found[part.suffix] = stored[name]
        if (there.dtype, there.shape) != (part.dtype, part.shape):
            raise FormatError(
                f"a tensor does not fit the weight {list(m.shape)} that it is a part of",
                path=path,
                tensor=there.name,
                found=f"{there.dtype} {list(there.shape)}",
                wanted=f"{part.dtype} {list(part.shape)}",
                hint=OTHER_VERSIONS,
                code="EXCHANGE-SHAPE",
            )
    return found


def _refuse_orphans(left: Sequence[TensorInfo], found: Found, path: Path) -> None:
    """Refuse parts of no weight: read without them, weights would be wrong in silence.

    Raises:
        FormatError: there are some; both counts are given.
    """
    orphans = [t.name for t in left if t.name.endswith(found.suffixes)]
    if orphans:
        raise FormatError(
            "a tensor of codes or scales belongs to no quantized weight",
            path=path,
            tensor=orphans[0],
            found=f"{len(orphans)} such tensors beside {len(found.matrices)} whole weights",
            wanted="codes and scales of every weight",
            hint="the checkpoint is incomplete: download or save it again",
            code="EXCHANGE-ORPHAN",
        )


def _without_quantization(model: SafetensorsModel) -> tuple[Companion, ...]:
    """Small files as a model of plain weights has them: none says that it is quantized."""
    return tuple(
        _plain_config(c, model.path) if os.path.basename(c.name) == CONFIG else c
        for c in model.companions
        if c.name != MODELOPT
    )


def _plain_config(companion: Companion, path: Path) -> Companion:
    fields = strict_json(companion.read(), path / companion.name)
    if not isinstance(fields, dict):
        return companion
    for section in (fields, *(v for v in fields.values() if isinstance(v, dict))):
        for key in ("quantization_config", "compression_config", "quantization"):
            section.pop(key, None)
    data = json.dumps(fields, indent=2, ensure_ascii=False).encode()
    return replace(companion, size=len(data), read=lambda: data)
