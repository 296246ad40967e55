"""Read a GGUF model that lies in several files, as `gguf_split` writes them.

The first file is the one that is given; the others are found by its name. What the files say about
each other is held together before any of them is used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.errors import FormatError, InputError
from qconvert.files.gguf import MAX_TENSORS, GgufModel, open_gguf
from qconvert.files.gguf_scaled import ScaledTensors
from qconvert.files.gguf_split import set_of
from qconvert.files.provenance import PROVENANCE
from qconvert.model import Companion, SourceFile, TensorInfo

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class SplitGgufModel:
    """A GGUF model in several files, opened: implements `qconvert.model.Model`.

    Metadata is that of the first file, without the keys that say how the model is split.

    Args:
        parts: the files in order, which belong together; closed with the model.
    """

    kind = "gguf"
    companions: tuple[Companion, ...] = ()

    def __init__(self, parts: Sequence[GgufModel]) -> None:
        first = parts[0]
        self.path = first.path
        self.metadata = {
            k: v for k, v in first.metadata.items() if k not in (NUMBER, COUNT, TENSORS)
        }
        self.sources: tuple[SourceFile, ...] = tuple(s for part in parts for s in part.sources)
        self._parts = tuple(parts)
        self._part_of = {t.name: part for part in parts for t in part.listed}
        listed = [t for part in parts for t in part.listed]  # of a pair in two files as well
        self._scaled = ScaledTensors(listed, self._listed_raw, first.path)
        self.tensors = self._scaled.tensors

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[Any]:
        """Values ``start..stop`` of the flattened tensor; see `GgufModel.values`."""
        return self.stored(tensor).values(start, stop)

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in its file."""
        return self._scaled.stored(tensor, self._parts[0].rounding(tensor))

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        return self._parts[0].check_payload(advance)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of the tensor; see `GgufModel.raw`."""
        return self._scaled.raw(tensor, offset, size)

    def _listed_raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        return self._part_of[tensor.name].listed_raw(tensor, offset, size)

    def value(self, key: str) -> tuple[str, Any]:
        """The type and value of a key in the metadata; see `GgufModel.value`."""
        return self._parts[0].value(key)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        for part in self._parts:
            part.check_unchanged()

    def close(self) -> None:
        """Close all files; may be called again."""
        for part in self._parts:
            part.close()


AnyGgufModel = GgufModel | SplitGgufModel


def open_gguf_model(path: Path) -> AnyGgufModel:
    """Open a GGUF model by its only or its first file.

    Raises:
        InputError: a file is missing or cannot be read, or ``path`` is not the first of several.
        FormatError: a file breaks a rule of the format, or they do not belong together.
        UnsupportedError: see `open_gguf`.
    """
    with ExitStack() as opened:
        first = open_gguf(path)
        opened.callback(first.close)
        count = _number(first, COUNT) if COUNT in first.metadata else 1
        if count <= 1:
            opened.pop_all()
            return first
        parts = [first]
        for other in _others(first, count):
            parts.append(open_gguf(other))
            opened.callback(parts[-1].close)
            tensors = sum(len(part.listed) for part in parts)
            if tensors > MAX_TENSORS:
                raise FormatError(
                    "too many tensors in the files of the split model",
                    path=other,
                    found=f"{tensors:,}",
                    wanted=f"at most {MAX_TENSORS:,}",
                    code="GGUF-COUNT",
                )
        _check_together(parts)
        opened.pop_all()
        return SplitGgufModel(parts)


def _others(first: GgufModel, count: int) -> list[Path]:
    """Where the other files must be, all of which exist."""
    path = first.path
    number = _number(first, NUMBER)
    name = _NAME.fullmatch(path.name)
    if not name or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise InputError(
            "the name of the file does not lead to the others of the split model",
            path=path,
            found=f"split.no {number} and split.count {count}",
            wanted=f"a name that ends in -{number + 1:05d}-of-{count:05d}.gguf",
            hint="give the files the names that they were made with",
            code="GGUF-SPLIT-NAME",
        )

    def part(i: int) -> Path:
        return path.with_name(f"{name['stem']}-{i:05d}-of-{count:05d}.gguf")

    if number != 0:
        raise InputError(
            f"file {number + 1} of {count} of a split model",
            path=path,
            wanted=f"the first, {part(1).name}",
            code="GGUF-SPLIT-FIRST",
        )
    others = [part(i) for i in range(2, count + 1)]
    missing = next((p for p in others if not p.exists()), None)
    if missing:
        raise InputError(
            "a file of the split model is missing",
            path=missing,
            wanted=f"all {count} files in one directory",
            hint="finish the download",
            code="GGUF-SPLIT-MISSING",
        )
    return others


def _check_together(parts: Sequence[GgufModel]) -> None:
    total = sum(len(part.listed) for part in parts)
    names: dict[str, Path] = {}
    facts = [(NUMBER, part, i) for i, part in enumerate(parts)]
    facts += [(COUNT, part, len(parts)) for part in parts]
    facts += [(TENSORS, part, total) for part in parts]
    for key, part, wanted in facts:
        found = _number(part, key)
        if found != wanted:
            raise FormatError(
                f"'{key}' contradicts the other files of the split model",
                path=part.path,
                found=found,
                wanted=wanted,
                hint="one of the files is of another model, or has another's name",
                code="GGUF-SPLIT-KEYS",
            )
    for part in parts[1:]:
        sets = [set_of(p.metadata.get(PROVENANCE)) for p in (part, parts[0])]
        if sets[0] != sets[1]:  # a file of another program has none
            raise FormatError(
                f"is not of the same set as '{parts[0].path.name}': one was replaced without the "
                "other",
                path=part.path,
                found=f"set {sets[0]}",
                wanted=f"{sets[1]}",
                hint="convert the model again",
                code="GGUF-SPLIT-SET",
            )
    for part in parts:
        for tensor in part.listed:
            if tensor.name in names:
                raise FormatError(
                    f"the name appears in '{names[tensor.name].name}' too",
                    path=part.path,
                    tensor=tensor.name,
                    code="GGUF-DUPLICATE-TENSOR",
                )
            names[tensor.name] = part.path


def _number(model: GgufModel, key: str) -> int:
    """A key that counts; 0 or more.

    Raises:
        FormatError: it is missing or no count.
    """
    value = model.value(key)[1] if key in model.metadata else None
    if type(value) is not int or value < 0:
        raise FormatError(
            f"'{key}' is missing or no count",
            path=model.path,
            found=model.metadata.get(key),
            wanted="a whole number",
            code="GGUF-SPLIT-KEYS",
        )
    return value
