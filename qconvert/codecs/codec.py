"""What a family of schemes is to the rest of the program.

A *scheme* is what a user names (`qconvert.schemes`). An *encoding* is how one tensor lies in a file
under a scheme: its segments and what their bytes mean. A *codec* leads from one to the other; there
is one a family, in a module of its own, found through `qconvert.schemes.FAMILIES`. Planning,
conversion, verification, loading, running and every container ask these and never a class.

A new family is a class of schemes with its row in `FAMILIES`, and a module here with an `Encoding`,
an `Encoder` and their `CODEC`; `codebook` is the shortest. The law comes first: formats/schemes and
formats/qblk with vectors and reader, and kernels with their definitions where NumPy is too slow.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.channels import ChannelStatistics
from qconvert.codecs.codes import Codes
from qconvert.codecs.compensation import Rounder
from qconvert.codecs.statistics import TensorStatistics
from qconvert.errors import FormatError
from qconvert.geometry import Tile
from qconvert.kernels.records import (
    F32,
    I32,
    Activations,
    Bytes,
    Encoded,
    ErrorSums,
    IntegerRows,
)
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.ranges import RangeMethod

if TYPE_CHECKING:
    from qconvert.schemes import TensorScheme


NEAREST = "nearest"  # the code next to a weight, whatever became of other weights
REPAIRED = "repaired"  # codes that make up for each other's errors, of other weights than its own


# --- a tensor in a file ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes of a stored tensor.

    Attributes:
        kind: ``data``, ``codes``, ``scales`` ...
        size: in bytes.
        width: bits of a value that comes as a byte and is packed over the whole tensor, 32 values
            at a time; 0 for bytes that are written as they come.
    """

    kind: str
    size: int
    width: int = 0


Read = Callable[[str, int, int], bytes]  # bytes ``offset..offset + size`` of a segment of a kind


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as some container has it, which is all that decoding needs to know.

    Attributes:
        name, shape: of the tensor.
        encoding: how it lies there.
        read: of its segments.
        path: of the file, for messages.
        source_dtype: that it had where it came from, if the container says.
        activation: static activation parameters of the layer, as the container noted them.
        error: that the container noted.
        rounding: how codes were chosen; `NEAREST` promises that a weight that was not clipped is
            half a step off at most, which no tensor does whose scales were tuned.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    read: Read
    path: Path
    source_dtype: str | None = None
    activation: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    rounding: str = NEAREST

    def values(self, start: int, stop: int) -> NDArray[Any]:
        """See `Model.values`."""
        return self.encoding.values(self, start, stop)

    def refuse(self, rule: int, message: str) -> NoReturn:
        """Say that a rule of formats/qblk/SPEC.md is broken."""
        raise FormatError(message, path=self.path, tensor=self.name, code=f"QBLK-{rule:03}")


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid that the codes of some rows stand on, for the bound on a weight's error.

    Attributes:
        scale: of a step in each group, float32 (R, G).
        low, high: smallest and largest code, in the units of `IntegerRows`.
        code_step: units between neighbouring codes.
        always_scaled: whether a scale of 0 promises a group of zeros (ggml's may underflow).
        scale_rounding, offset_rounding: see `kernels.worst_step`; None where codes are made with
            the numbers that are stored.
        group, zero: columns of a group and the zero point of each, int32 (R, G), where they are
            not those of the integers; 0 and None where they are.
    """

    scale: F32
    low: int
    high: int
    code_step: int = 1
    always_scaled: bool = True
    scale_rounding: F32 | None = None
    offset_rounding: F32 | None = None
    group: int = 0
    zero: I32 | None = None


@dataclass(frozen=True, slots=True)
class Coded:
    """Some rows of a stored tensor, or a run of columns of one row.

    Attributes:
        values: decoded, float32 (R, C).
        integers: in integer units; None where there are no integers to multiply.
        grid: of the codes; None without one.
    """

    values: F32
    integers: IntegerRows | None = None
    grid: Grid | None = None

    def worst_step(self, weights: F32) -> float | None:
        """Largest |weight - value| in steps over the weights (R, C) that were not clipped; None
        without a grid.
        """
        if self.integers is None or self.grid is None:
            return None
        n, g = self.integers, self.grid
        zero = n.zero if g.zero is None else g.zero
        worst, unscaled = kernels.worst_step(
            *(weights, self.values, g.group or n.group, g.scale, n.offset, zero, g.code_step),
            *(g.low, g.high, g.scale_rounding, g.offset_rounding),
        )
        return math.inf if unscaled and g.always_scaled else worst


@dataclass(frozen=True, slots=True)
class Grain:
    """What codes are that can move to another encoding.

    Attributes:
        number: ``int``, or ``e2m1``, whose codes are doubled in `IntegerRows`.
        bits: of a code.
        group: columns that share a scale; 0 where a row has one.
    """

    number: str
    bits: int
    group: int


class Encoding(ABC):
    """How a tensor lies in a file: frozen data, equal where the bytes mean the same.

    Attributes:
        name: as `TensorInfo.dtype` has it: a dtype, a ggml type or a scheme.
        bits: of a code.
        multiplies: whether there is an integer product straight from the stored codes.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def bits(self) -> float: ...

    @property
    def multiplies(self) -> bool:
        return False

    @abstractmethod
    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        """What a tensor of this shape is stored as, in the order of the file."""

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of all segments, padding between segments not counted."""
        return sum(segment.size for segment in self.segments(shape))

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """As the header of a qblk file describes it; ``kind`` is the family."""

    def columns(self, shape: tuple[int, ...]) -> int:
        """Values of a row: what tiles are whole rows of."""
        return shape[-1] if shape else 1

    @abstractmethod
    def coded(self, stored: Stored, tile: Tile) -> Coded:
        """Read and decode a tile: whole rows, or a run of columns of one row that begins at a
        multiple of 256.
        """

    def decoded(self, stored: Stored, tile: Tile) -> F32:
        """The values of `coded` alone, for which some encodings need less."""
        return self.coded(stored, tile).values

    def codes(self, stored: Stored) -> Codes | None:
        """All of a tensor as codes; None where it is not made of any, or of ggml's.

        Symmetric 8-bit codes are given plus 128.
        """
        return None

    def values(self, stored: Stored, start: int, stop: int) -> NDArray[Any]:
        """Values ``start..stop`` of the flattened tensor, float32 unless it is kept in more."""
        if start == stop:
            return np.zeros(0, np.float32)
        columns = self.columns(stored.shape)
        first, last = start // columns, (stop - 1) // columns
        if first == last:
            low = (start - first * columns) // 256 * 256
            tile = Tile(1, stop - first * columns - low, first * columns + low, True)
        else:
            tile = Tile(last + 1 - first, columns, first * columns, True)
        found: NDArray[np.floating] = self.decoded(stored, tile).ravel()
        return found[start - tile.start : stop - tile.start]

    def product(self, stored: Stored, first: int, last: int, a: Activations) -> F32:
        """a · rowsᵀ of rows ``first..last`` in integers, straight from the stored codes: float32
        (M, last - first). Only where the encoding `multiplies`.
        """
        raise NotImplementedError

    # --- bytes that are those of another encoding: `qconvert.codecs.moving` ---

    def turned(self, stored: Stored) -> Stored | None:
        """The same tensor with its last two dimensions exchanged, where its rows lie so; None where
        they do not.
        """
        return None

    def common(self, stored: Stored) -> Stored:
        """The same tensor in the encoding whose codes and numbers this one has under other names:
        that of which `taking` is asked.
        """
        return stored

    def taking(self, stored: Stored) -> Read | None:
        """Reads its segments of a tensor that is stored in the `common` way; None where the bytes
        are others.
        """
        return stored.read if stored.encoding == self else None

    # --- codes that move to another encoding: `qconvert.codecs.moving` ---

    @property
    def grain(self) -> Grain | None:
        """What its codes are, where they can move; None where they cannot."""
        return None

    @property
    def immovable(self) -> str:
        """Why codes can move nowhere, where that is not for their kind; empty elsewhere."""
        return ""

    def movable(self, rows: IntegerRows) -> IntegerRows | None:
        """Rows of `coded` with unsigned codes below 2^bits of the `grain` and whole zero points, as
        all encodings of a number agree on; None where they are not such.
        """
        raise NotImplementedError

    def divisor(self, stored: Stored) -> float:
        """What scales of groups were divided by, all of them; 1 where there is no such number."""
        return 1.0

    def multiplied(self, stored: Stored) -> float | None:
        """The same as a factor, where that is what is stored; `divisor` may be off by a rounding
        then. None elsewhere.
        """
        return None

    def divided(self, divisor: float, factor: float | None = None) -> Encoding | None:
        """This encoding for scales that were divided by a number, or `multiplied` by one; None
        without a place for it.
        """
        return None

    def held(self, rows: IntegerRows) -> IntegerRows | None:
        """`movable` rows of an encoding in the units of this one; None where it has no such codes,
        scales or zero points.
        """
        raise NotImplementedError

    def laid(self, rows: IntegerRows) -> dict[str, Bytes]:
        """Segments of whole rows that it has `held`."""
        raise NotImplementedError

    def gathered(self, rows: IntegerRows) -> dict[str, NDArray[Any]]:
        """What `laid_together` needs of some rows, (R, n) each, by kind."""
        return {}

    def laid_together(
        self, shape: tuple[int, ...], rows: Mapping[str, NDArray[Any]]
    ) -> dict[str, Bytes]:
        """Segments that are no rows one after the other, of a tensor of this shape and what was
        gathered of it.
        """
        return {}

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        """Why rows cannot be multiplied by a number each while codes stay; None where they can."""
        return "it has no scales"

    def rescaled(self, stored: Stored, first: int, factors: F32) -> dict[str, Bytes]:
        """Other bytes of rows from ``first`` on, multiplied by ``factors``, (rows,): of the
        segments that change, which consist of rows of equal size. Only where nothing is
        `unscalable`.
        """
        raise NotImplementedError

    def check(self, stored: Stored) -> None:
        """Hold the payload against the rules of its encoding, if there are any.

        Raises:
            FormatError: a rule is broken; the code names it.
        """
        return


@np.errstate(over="ignore")
def rescaled_numbers(numbers: NDArray[Any], factors: F32) -> NDArray[Any]:
    """Stored scales (R, n) times a factor a row, in their dtype; one that would become infinite or
    0 stays as it is.
    """
    found = (numbers.astype(np.float32) * factors[:, None]).astype(numbers.dtype)
    wide = found.astype(np.float32)
    kept: NDArray[Any] = np.where(np.isfinite(wide) & (wide != 0), found, numbers)
    return kept


# --- a tensor on its way into a file --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known besides the weights when a tensor is encoded.

    Attributes:
        method: how ranges are chosen; None for the default of the width.
        mean_square: of the input channels, float32 (columns,), where a calibration has them.
        importance: of the input channels, float32 (columns,), or (matrices, columns) for experts,
            where there is an importance matrix.
        rounder: chooses codes that make up for each other's errors; None for the nearest. Only
            for tensors that `Codec.uncompensated` says nothing against, whose tiles are whole rows
            then.
        mapper: runs work that spans tiles.
        tables: whether tables may be fitted to the tensor, where its family has such.
    """

    method: RangeMethod | None = None
    mean_square: Callable[[int], F32 | None] = lambda columns: None
    importance: F32 | None = None
    rounder: Rounder | None = None
    mapper: Mapper = map
    tables: bool = False


class Encoder(ABC):
    """Makes the bytes of one tensor; `encode` may run on several threads at once."""

    model: Model
    tensor: TensorInfo

    @property
    @abstractmethod
    def encoding(self) -> Encoding:
        """What the bytes mean; a guess until the whole tensor was `settled`."""

    @abstractmethod
    def tiles(self) -> Iterator[Tile]:
        """What `encode` takes, in order."""

    @abstractmethod
    def encode(self, tile: Tile) -> Encoded:
        """The bytes of a tile, and what was seen of it.

        Raises:
            WeightError: NaN, Inf, or a weight that the encoding cannot hold.
        """

    def settled(self, seen: Encoded) -> Encoder:
        """This encoder, or another one where all of the tensor, which was ``seen``, says otherwise
        than the sample that was looked at first; then it is encoded once more.
        """
        return self

    def shared(self) -> Mapping[str, Bytes]:
        """Bytes that all tiles share and that are stored once, by the kind of segment."""
        return {}

    def outcome(self, seen: Encoded) -> Outcome:
        """What the report and the file say of the tensor, once all of it was seen."""
        return Outcome(seen.error)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a tensor.

    Attributes:
        error: None where it was kept bit for bit.
        decision: as reports and headers have it, where there was one.
        clipped: weights beyond the ends of the grid, where it has ends that were chosen.
        weighted: whether a calibration's mean squares weighed the error.
        warning: what is wrong with it, though it was kept.
    """

    error: ErrorSums | None
    decision: dict[str, Any] | None = None
    clipped: int | None = None
    weighted: bool = False
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at a tensor found.

    Attributes:
        scheme: the name of the one that suits it.
        reason: in words.
        rule: that decided, a word of `qconvert.codecs.affine.decide.Decision`.
        sqnr_db: what a sample keeps with these bits, in dB; None where nothing is lost.
        gain_db: by how much zero points are better on the sample; None where that is not known.
        cost_db: what they cost.
    """

    statistics: TensorStatistics
    scheme: str
    reason: str
    rule: str
    sqnr_db: float | None
    gain_db: float | None
    cost_db: float


S = TypeVar("S", bound="TensorScheme")


@dataclass(frozen=True, slots=True)
class Codec(Generic[S]):
    """One family of schemes.

    Attributes:
        family: its key in `qconvert.schemes.FAMILIES`, and ``kind`` in a header.
        planned: the encoding that a tensor takes under a scheme; while something is undecided, the
            one of most bytes and the longest description.
        refuses: why a tensor cannot take a scheme, or would not be smaller; None where it can.
        encoder: for a tensor that takes the scheme; may look at a sample of it, and where tiles
            share something at all of it.
        parse: the encoding that a header describes; None for a family that no qblk file has.
        passes: whether `encoder` reads the whole tensor for what tiles share.
        look: what statistics of a tensor suggest; None for a family that has nothing to choose.
            Adds tiles to statistics of channels where they are wanted. Raises a WeightError.
        uncompensated: why a matrix that takes the scheme cannot have codes that make up for each
            other's errors; None where it can.
    """

    family: str
    planned: Callable[[S, TensorInfo], Encoding]
    refuses: Callable[[S, TensorInfo], str | None]
    encoder: Callable[[Model, TensorInfo, S, Facts], Encoder]
    parse: Callable[[HeaderFields], Encoding] | None = None
    passes: Callable[[S, TensorInfo], bool] = lambda scheme, tensor: False
    look: Callable[[Model, TensorInfo, S, Mapper, ChannelStatistics | None], Look] | None = None
    uncompensated: Callable[[S, TensorInfo], str | None] = lambda scheme, tensor: "it has no codes"


@dataclass(frozen=True, slots=True)
class HeaderFields:
    """How the header of a qblk file describes an encoding, as its codec sees it.

    Attributes:
        described: the JSON object.
        source_dtype: of the tensor, a name of `qconvert.model.DTYPES`.
        shape: of the tensor.
        field: gives a member of ``described`` of a type, or refuses the file (QBLK-010).
        refuse: refuses the file by a rule of SPEC.md: its number, a message, found, wanted.
    """

    described: dict[str, Any]
    source_dtype: str
    shape: tuple[int, ...]
    field: Callable[[Any, str, type], Any]
    refuse: Callable[..., NoReturn]

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self.described

    def integer(self, name: str) -> int:
        """A field that is an integer."""
        found: int = self.field(self.described, name, int)
        return found

    def text(self, name: str) -> str:
        """A field that is a string."""
        found: str = self.field(self.described, name, str)
        return found

    def flag(self, name: str) -> bool:
        """A field that is a truth value."""
        found: bool = self.field(self.described, name, bool)
        return found

    def impossible(self, what: str) -> NoReturn:
        """Refuse fields that do not go together."""
        self.refuse(14, f"impossible {what}", json.dumps(self.described))

    def check_row_length(self, columns: int) -> None:
        """Refuse a row length that is none of the shape's."""
        products = {math.prod(self.shape[i:]) for i in range(len(self.shape))} or {1}
        if 0 in self.shape or columns not in products:
            self.refuse(15, "row length", columns, f"a product of trailing {self.shape}")


def smaller(encoding: Encoding, tensor: TensorInfo, scheme: str) -> str | None:
    """Why a tensor stays as it is: it would not become smaller."""
    if encoding.size(tensor.shape) >= tensor.nbytes:
        return f"{scheme} would not make it smaller"
    return None
