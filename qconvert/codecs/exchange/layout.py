"""A layout: which tensors of a safetensors file a matrix is stored as."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import Encoding, Segment, Stored, smaller
from qconvert.errors import FormatError
from qconvert.geometry import spans_tiles
from qconvert.kernels.records import Bytes
from qconvert.model import DTYPES, TensorInfo

CHECKED = 1 << 18  # numbers that are looked at at once


@dataclass(frozen=True, slots=True)
class Part:
    """One of the tensors that a matrix is stored as.

    Attributes:
        suffix: what its name adds to that of the module, with the dot in between; the kind of a
            segment, too.
        dtype, shape: as in a safetensors header.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return DTYPES[self.dtype].nbytes(math.prod(self.shape))


class Layout(Encoding):
    """How a weight (out, in) lies in the tensors of its module.

    Attributes:
        inputs: what readers make of inputs of the layer: see `ExchangeScheme.activations`.
        stacks: whether a weight may be a stack of matrices (n, out, in), of experts.
        static: whether parts say how an input of the layer becomes eight bits, which no encoder
            knows: `static_input` gives them.
    """

    inputs: str = ""
    stacks: ClassVar[bool] = False

    @property
    def static(self) -> bool:
        return False

    @property
    def caution(self) -> str:
        """What some readers take otherwise, for people; empty where there is no such thing."""
        return ""

    def static_input(self, scale: float, zero_point: int) -> dict[str, Bytes]:
        """The parts that say how an input x becomes eight bits.

        Args:
            scale, zero_point: of its static range: x is (code - zero_point) · scale with a signed
                byte for a code.
        """
        raise NotImplementedError

    def uneven(self, shape: tuple[int, ...]) -> str | None:
        """Why a shape does not divide into what shares a scale; None where it does."""
        return None

    def misfit(self, tensor: TensorInfo, scheme: str) -> str | None:
        """Why a tensor cannot be written so, or would not be smaller; None where it can."""
        if len(tensor.shape) != 2 and not (self.stacks and len(tensor.shape) == 3):
            return "no matrix of two dimensions, which is what readers of the format quantize"
        if (why := self.uneven(tensor.shape)) is not None:
            return why
        if spans_tiles(tensor.shape[-1]):
            return f"rows of {tensor.shape[-1]:,} values are too long"
        return smaller(self, tensor, scheme)

    @abstractmethod
    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """What a weight of this shape is stored as."""

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        return tuple(Segment(part.suffix, part.size) for part in self.parts(shape))

    def to_json(self) -> dict[str, object]:
        raise AssertionError("no qblk file has layouts of other tools")


def furthest(scale: float, zero_point: int) -> float:
    """The end of a static range of signed bytes that is furthest from 0, as a magnitude."""
    return scale * max(128 + zero_point, 127 - zero_point)


def ungrouped(columns: int, group: int) -> str | None:
    """Why rows do not divide into groups of columns; None where they do, or have one scale, 0."""
    if group and columns % group:
        return f"rows of {columns:,} values do not divide into groups of {group}"
    return None


def refuse_values(stored: Stored, message: str, found: object, wanted: str) -> NoReturn:
    """Refuse numbers of a part that no such matrix may have.

    Raises:
        FormatError: always.
    """
    raise FormatError(
        message,
        path=stored.path,
        tensor=stored.name,
        found=found,
        wanted=wanted,
        hint="the checkpoint is damaged or was written wrongly: download or save it again",
        code="EXCHANGE-VALUES",
    )


def check_finite(stored: Stored, kind: str, dtype: str, count: int) -> None:
    """Refuse scales, or codes, that are not finite.

    Raises:
        FormatError: one is NaN or infinite.
    """
    size = DTYPES[dtype].size
    for start in range(0, count, CHECKED):
        data = stored.read(kind, start * size, min(CHECKED, count - start) * size)
        if not np.isfinite(kernels.widen(data, dtype)).all():
            refuse_values(stored, f"a number of {kind} is not finite", "NaN or Inf", "finite ones")
