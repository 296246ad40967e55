"""What is written: one target a container, which plans and checks before the long work, and then
takes the bytes of tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qconvert.codecs.codec import Encoding
from qconvert.containers import Container
from qconvert.files import OpenModel
from qconvert.files.atomic import AtomicDirectory, AtomicOutput, AtomicSet
from qconvert.kernels.records import F32, Bytes
from qconvert.model import Model, TensorInfo, layer_name
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.quantize_options import QuantizeOptions

Atomic = AtomicOutput | AtomicSet | AtomicDirectory


class TensorTarget(Protocol):
    """One tensor being written."""

    def append(self, segments: Mapping[str, Bytes]) -> None:
        """Bytes that come next in each of some segments, by their kind."""
        ...

    def finish(self, notes: dict[str, Any]) -> None:
        """Close the tensor; ``notes`` are its ``decision``, ``error`` and ``activation``."""
        ...


class Sink(Protocol):
    """An output being written; tensors arrive in the order of the plan."""

    def begin(self, tensor: TensorInfo, encoding: Encoding) -> TensorTarget:
        """Begin the next tensor, or the last one once more, whose bytes are then forgotten."""
        ...

    def finish(self) -> int:
        """Complete the output; its length in bytes."""
        ...

    def close(self) -> None:
        """Let go of everything, finished or not; the output itself belongs to the caller."""
        ...


@dataclass
class Prepared:
    """A conversion as it was decided and checked.

    Attributes:
        model: the source, with the names and shapes of the output.
        plan: of its tensors, in the order of the output.
        outputs: the files to be written, or a directory.
        sink: writes them; takes where they are made, and the provenance.
        importance: of the input channels of a tensor, where it is known; see `Facts`.
        origin: the name in the source of a tensor of the plan; None where it is made of several.
        options: of the container's own, as provenance has them.
        provenance: what else there is to record.
        companions: files that are carried along, and ``companion_bytes`` their size.
        readers: who loads the result, two notes at most: the report has them before others.
        warnings, notes: for the report.
        overhead: gives what the files take at most besides the bytes of their tensors.
        directory: whether the output is one.
    """

    model: Model
    plan: tuple[PlannedTensor, ...]
    outputs: tuple[Path, ...]
    sink: Callable[[Atomic, dict[str, Any]], Sink]
    importance: Callable[[TensorInfo], F32 | None] = lambda tensor: None
    origin: Callable[[str], str | None] = lambda name: name
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    companions: int = 0
    companion_bytes: int = 0
    readers: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overhead: Callable[[], int] = lambda: 0
    directory: bool = False

    def layers_of(self, calibrated: AbstractSet[str]) -> dict[str, str]:
        """The layers that tensors of the plan are weights of, by the tensors' names, where they are
        among those that were calibrated.
        """
        origins = {p.tensor.name: self.origin(p.tensor.name) for p in self.plan}
        layers = {name: layer_name(origin) for name, origin in origins.items() if origin}
        return {name: layer for name, layer in layers.items() if layer in calibrated}

    @property
    def ranged(self) -> bool:
        """Whether a tensor takes a scheme that chooses ranges."""
        return any(p.scheme and p.scheme.default_range for p in self.plan)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule of the readers of a container says of a file.

    Attributes:
        id: of the rule, as a check has it.
        broken: what breaks it, for people; None where nothing does.
        detail: what was looked at.
        tensor: that breaks it.
        cautions: what breaks nothing, and some readers take otherwise.
    """

    id: str
    detail: str
    broken: str | None = None
    tensor: str | None = None
    cautions: tuple[str, ...] = ()


class Target(Protocol):
    """A container, as what is written."""

    def prepare(
        self, opened: OpenModel, model: Model, options: QuantizeOptions, output: Path
    ) -> Prepared:
        """Decide what becomes of each tensor, and refuse what cannot be.

        Args:
            opened: the source as it was opened.
            model: the same, with every tensor in a plain dtype.
            output: the name that was asked for.

        Raises:
            UsageError: options that contradict each other, the model or the container.
            UnsupportedError: a model that the container cannot hold.
        """
        ...

    def source_of(self, made: OpenModel, opened: OpenModel, model: Model) -> Model:
        """A source under the names of a file that was made from it.

        Args:
            made: the file.
            opened: the source as it was opened.
            model: the same, with every tensor in a plain dtype.
        """
        ...

    def examined(self, made: OpenModel) -> Sequence[Finding]:
        """A file held against rules that its readers have besides those of the format."""
        ...


def target_of(container: Container) -> Target:
    """The target of a container that is written."""
    found: Target = importlib.import_module(container.target).TARGET
    return found


def model_name(path: Path) -> str:
    """A model by the name of its directory, or of its file without suffix."""
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem
