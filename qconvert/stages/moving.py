"""Which codes of a quantized source an output can take as they are: `--scheme keep`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from qconvert.codecs import codec_of
from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Encoding, Grain, Stored
from qconvert.codecs.exchange.layout import Layout
from qconvert.codecs.ggml_blocks import FLOATING, MOVABLE, GgmlEncoding, ScaledBlocks
from qconvert.codecs.moving import MOVED_VALUES, MovedScheme
from qconvert.codecs.units import values_of
from qconvert.containers import Container
from qconvert.encoding import BITS, BLOCKS
from qconvert.errors import FormatError, UnsupportedError
from qconvert.exchange_schemes import EXCHANGE_SCHEMES, ExchangeScheme
from qconvert.files import OpenModel
from qconvert.files.shards import CONFIG
from qconvert.files.strict_json import strict_json
from qconvert.geometry import Tile, row_length, tiles
from qconvert.ggml_types import GGML_TYPES
from qconvert.kernels.records import IntegerRows
from qconvert.model import Model, TensorInfo
from qconvert.schemes import TENSOR_SCHEMES, CodebookScheme, TensorScheme
from qconvert.stages.made_from import I64, made_from
from qconvert.stages.plan import PlannedTensor

_DECODED = "decoded from "
_NEARLY = "codes and scales of groups moved from "
_NO_SCALES = "has no such scales"
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
FIRST_VALUES = 1 << 12  # of a tensor that tell most encodings that cannot hold it


@dataclass(frozen=True)
class Moving:
    """What codes move from and to.

    Attributes:
        opened: the source as it was opened.
        named: the same under the names of the output, every tensor in a plain dtype.
        container: of the output.
        dtype: that tensors are decoded to which cannot move; of scales of directories, too.
        dense: why a tensor cannot have codes in the output, by its name; None where it can.
        scaled: whether a reader of GGUF multiplies by a scale beside the tensor of this name.
    """

    opened: OpenModel
    named: Model
    container: Container
    dtype: str
    dense: Callable[[str], str | None] = lambda name: None
    scaled: Callable[[str], bool] = lambda name: False

    def plan_in_best_dtype(self, exact: bool) -> tuple[tuple[PlannedTensor, ...], str]:
        """`plan`, and the dtype that holds the scales of most: binary16 has more digits than
        bfloat16, and so have scales that were made for it.
        """
        plan, dtype = self.plan(False), self.dtype
        if dtype != "F16" and any(_NO_SCALES in p.reason for p in plan):
            other = replace(self, dtype="F16").plan(False)
            if len(_moved_and_decoded(other)[0]) > len(_moved_and_decoded(plan)[0]):
                plan, dtype = other, "F16"
        check_moved(plan, self.opened, exact)
        return plan, dtype

    @cached_property
    def _stored(self) -> dict[str, TensorInfo]:
        """Tensors as they lie in the source."""
        return {t.name: t for t in self.opened.tensors}

    def plan(self, exact: bool) -> tuple[PlannedTensor, ...]:
        """What becomes of every tensor where plain ones stay as they are.

        Args:
            exact: whether tensors that cannot move are refused.

        Raises:
            UnsupportedError: some are, or the source has nothing quantized.
        """
        found = tuple(
            self.of(t) or PlannedTensor(t, None, "plain in the source") for t in self.named.tensors
        )
        check_moved(found, self.opened, exact)
        return found

    def of(self, tensor: TensorInfo, decoded: TensorScheme | None = None) -> PlannedTensor | None:
        """What becomes of a tensor that is made from quantized ones; None where it is not.

        Args:
            decoded: what is made of it where its codes cannot move; by default the dtype.
        """
        made = made_from(self.named, tensor)
        sources = [self._stored[t.name] for t in made.sources if t.name in self._stored]
        if not any(t.coded for t in sources):
            return None
        found: MovedScheme | str | None = None
        stored = [self.opened.stored(source) for source in sources]
        rows, whole = made.rows, made.whole
        if made.turned is not None:
            rows = made.turned
            stored = [turned for s in stored if (turned := s.encoding.turned(s))]
            whole = len(stored) == len(sources)
        if not whole:
            found = "its rows are cut up, or its values changed, on the way"
        elif len(sources) == 1 and rows is None and not made.added:
            found = self._copied(tensor, stored[0])
        found = found or self._moved(tensor, sources, stored, rows, made.added)
        if isinstance(found, MovedScheme):
            how = f"moved exactly from {sources[0].dtype}"
            if not found.exact:
                how = f"{_NEARLY}{sources[0].dtype}: the scale of the tensor is rounded to a " + (
                    "factor" if isinstance(found.encoding, ScaledBlocks) else "divisor"
                )
            return PlannedTensor(tensor, found, how)
        scheme = decoded or TENSOR_SCHEMES[self.dtype.lower()]
        return PlannedTensor(tensor, scheme, f"{_DECODED}{sources[0].dtype}: {found}")

    def _copied(self, tensor: TensorInfo, stored: Stored) -> MovedScheme | None:
        """The bytes in an encoding of the output that has the same; None where there is none."""
        if self.dense(tensor.name) is not None:
            return None
        common = stored.encoding.common(stored)
        for encoding, like in self._alike(tensor, stored):
            read = encoding.taking(common)
            if read is None:
                continue
            found = replace(stored, encoding=encoding, read=read)
            if encoding == stored.encoding or _same_values(stored, found):
                return MovedScheme(encoding, found, like)
        return None

    def _alike(
        self, tensor: TensorInfo, stored: Stored
    ) -> Iterator[tuple[Encoding, ExchangeScheme | None]]:
        """Encodings of the output that may have the bytes of a tensor."""
        if self.container.name == "qblk":
            if self.opened.kind == "qblk":
                yield stored.encoding, None
            for scheme in TENSOR_SCHEMES.values():
                if isinstance(scheme, CodebookScheme):
                    yield codec_of(scheme).planned(scheme, tensor), None
        yield from self._of_schemes(tensor, stored.encoding)

    def _of_schemes(
        self, tensor: TensorInfo, source: Encoding
    ) -> Iterator[tuple[Encoding, ExchangeScheme]]:
        """Encodings of schemes of a directory with which readers treat inputs as they did."""
        inputs = source.inputs if isinstance(source, Layout) else ""
        for scheme in EXCHANGE_SCHEMES:
            if scheme.family in self.container.takes and scheme.activations == inputs:
                like = scheme.with_scales(self.dtype)
                codec = codec_of(like)
                if codec.refuses(like, tensor) is None:
                    yield codec.planned(like, tensor), like

    def _moved(
        self,
        tensor: TensorInfo,
        sources: Sequence[TensorInfo],
        stored: Sequence[Stored],
        order: I64 | None,
        added: float,
    ) -> MovedScheme | str:
        """The codes in an encoding of the output, or why there is none."""
        kinds = {t.dtype for t in sources}
        if len(kinds) > 1:
            return "its parts are of several types"
        grain = stored[0].encoding.grain
        if added or grain is None:
            return (
                stored[0].encoding.immovable
                or f"{self.container.article} has no such codes and scales"
            )
        if (why := self.dense(tensor.name)) is not None:
            return why
        divisors = {s.encoding.divisor(s) for s in stored}
        if len(divisors) > 1:
            return "its parts have scales of their own"
        rows = partial(_rows, stored, order)
        found = self._candidates(grain, tensor, stored[0].encoding)
        candidates = sorted(found, key=lambda c: c[0].size(tensor.shape))
        (divisor,) = divisors
        factor = stored[0].encoding.multiplied(stored[0])
        divided = [
            (encoding.divided(divisor, factor), encoding, like) for encoding, like in candidates
        ]
        for encoding, plain, like in divided:
            if _holds(encoding or plain, tensor, rows, exact=True):
                return MovedScheme(encoding or plain, rows, like)
        for encoding, _, like in divided:
            if encoding and _holds(encoding, tensor, rows, exact=False):
                return MovedScheme(encoding, rows, like, exact=False)
        if not candidates:
            return f"{self.container.article} has no such codes"
        if divisor != 1 and all(encoding is None for encoding, _, _ in divided):
            return (
                f"{self.container.article} has no place for the scale of the tensor, and scales of "
                "groups do not hold it too"
            )
        dtypes = sorted({like.scale_dtype for _, like in candidates if like})
        of_scales = f" of {' or '.join(dtypes)}" if dtypes else ""
        return f"{self.container.article} {_NO_SCALES}{of_scales}, or no such zero points"

    def _candidates(
        self, grain: Grain, tensor: TensorInfo, source: Encoding
    ) -> Iterator[tuple[Encoding, ExchangeScheme | None]]:
        """Encodings of the output that may hold codes of a grain."""
        columns = row_length(tensor.shape)
        if self.container.name == "qblk" and grain.number == "int":
            for bits in (b for b in BITS if b >= grain.bits):
                for symmetric in (True, False):
                    if not grain.group:
                        yield Affine(bits, "channel", 0, symmetric, "F32", columns), None
                    for block in BLOCKS:
                        for dtype in ("F16", "BF16", "F32"):
                            yield Affine(bits, "block", block, symmetric, dtype, columns), None
        elif self.container.name == "gguf":
            for name in (*MOVABLE, *FLOATING):
                candidate = GgmlEncoding(GGML_TYPES[name])
                if _finer(candidate.grain, grain) and columns % GGML_TYPES[name].block == 0:
                    yield candidate, None
                    if name == "NVFP4" and self.scaled(tensor.name):
                        yield ScaledBlocks(), None
        for planned, like in self._of_schemes(tensor, source):
            if _finer(planned.grain, grain):
                yield planned, like


def _rows(
    sources: Sequence[Stored], order: I64 | None, first: int, last: int
) -> IntegerRows | None:
    """Rows of a tensor whose rows are those of the sources in some order, as they can move."""
    columns = row_length(sources[0].shape)
    ends = np.cumsum([math.prod(s.shape) // columns for s in sources])
    wanted = np.arange(first, last) if order is None else order[first:last]
    found: list[IntegerRows] = []
    breaks = np.flatnonzero((np.diff(wanted) != 1) | np.isin(wanted[1:], ends)) + 1
    for run in np.split(wanted, breaks):
        index = int(np.searchsorted(ends, run[0], "right"))
        row = int(run[0]) - (int(ends[index - 1]) if index else 0)
        stored = sources[index]
        coded = stored.encoding.coded(stored, Tile(len(run), columns, row * columns, True))
        rows = None if coded.integers is None else stored.encoding.movable(coded.integers)
        # bitsandbytes rounds values of bytes twice.
        if rows is None or (values_of(rows) != coded.values).any():
            return None
        found.append(rows)
    return _joined(found)


def _joined(parts: Sequence[IntegerRows]) -> IntegerRows:
    offsets = [p.offset for p in parts if p.offset is not None]
    return replace(
        parts[0],
        codes=np.concatenate([p.codes for p in parts]),
        zero=np.concatenate([p.zero for p in parts]),
        scale=np.concatenate([p.scale for p in parts]),
        offset=np.concatenate(offsets) if offsets else None,
    )


def _same_values(one: Stored, other: Stored) -> bool:
    """Whether two ways of storing a tensor mean the same."""
    columns = one.encoding.columns(one.shape)
    count = math.prod(one.shape) // columns
    return all(
        np.array_equal(one.encoding.decoded(one, tile), other.encoding.decoded(other, tile))
        for tile in tiles(count, columns, max(MOVED_VALUES, columns))
    )


def _finer(grain: Grain | None, than: Grain) -> bool:
    """Whether codes of a grain may hold those of another one."""
    return grain is not None and grain.number == than.number and grain.bits >= than.bits


def _holds(
    encoding: Encoding,
    tensor: TensorInfo,
    rows: Callable[[int, int], IntegerRows | None],
    exact: bool,
) -> bool:
    """Whether an encoding holds all of a tensor as it is: values are held against values.

    Args:
        exact: whether these have to be equal; or else what `Encoding.held` allows will do.
    """
    columns = row_length(tensor.shape)
    count = tensor.size // columns
    some = min(count, max(1, FIRST_VALUES // columns))
    pieces = [Tile(some, columns, 0, True), *tiles(count, columns, max(MOVED_VALUES, columns))]
    for tile in pieces:
        first = tile.start // columns
        source = rows(first, first + tile.rows)
        held = None if source is None else encoding.held(source)
        if source is None or held is None:
            return False
        if exact and (values_of(held) != values_of(source)).any():
            return False
    return True


def check_moved(plan: Sequence[PlannedTensor], opened: OpenModel, exact: bool) -> None:
    """Refuse to move what is not there, or, if asked, what is decoded in part.

    Raises:
        UnsupportedError: the source has nothing quantized; or a tensor does not move, and all
            should: the first is named, and how many there are.
    """
    moved, decoded = _moved_and_decoded(plan)
    near = [p for p in moved if p.reason.startswith(_NEARLY)]
    if not moved and not decoded:
        raise UnsupportedError(
            "nothing in the source is quantized, so that nothing can be kept so",
            path=opened.path,
            hint="choose what the weights become with --scheme NAME",
        )
    if exact and (not_exact := decoded + near):
        count = len(moved) + len(decoded)
        raise UnsupportedError(
            f"{len(not_exact)} of {count} quantized tensors do not move exactly",
            path=opened.path,
            tensor=not_exact[0].tensor.name,
            found=not_exact[0].reason,
            wanted="codes that the output holds as they are",
            hint=f"without --exact they are {'decoded' if decoded else 'rounded so'}; another "
            "--format may hold them",
        )


def moved_notes(plan: Sequence[PlannedTensor]) -> list[str]:
    """How many tensors moved, what became of the others, and why, of most and with one by name."""
    moved, decoded = _moved_and_decoded(plan)
    plain = len(plan) - len(moved) - len(decoded)
    near = sum(p.reason.startswith(_NEARLY) for p in moved)
    found = f"{len(moved) - near} quantized tensors moved exactly, "
    if near:
        found += f"{near} but for the scale of the tensor, which was rounded, "
    notes = [f"{found}{len(decoded)} decoded, {plain} plain"]
    if decoded:
        (reason, count), *_ = Counter(p.reason for p in decoded).most_common(1)
        first = next(p.tensor.name for p in decoded if p.reason == reason)
        notes.append(f"'{first}'{f' and {count - 1} more' if count > 1 else ''}: {reason}")
    return notes


def _moved_and_decoded(
    plan: Sequence[PlannedTensor],
) -> tuple[list[PlannedTensor], list[PlannedTensor]]:
    moved = [p for p in plan if isinstance(p.scheme, MovedScheme)]
    return moved, [p for p in plan if p.reason.startswith(_DECODED)]


# --- the dtype of a model ---


def config_of(model: Model) -> dict[str, Any] | None:
    """The model's configuration, None without one.

    Raises:
        FormatError: it is no JSON object.
    """
    found = next((c for c in model.companions if c.name == CONFIG), None)
    if found is None:
        return None
    fields = strict_json(found.read(), model.path / CONFIG, infinity=True)
    if not isinstance(fields, dict):
        raise FormatError(f"{CONFIG} is no object", path=model.path / CONFIG)
    return fields


def model_dtype(config: Mapping[str, Any], model: Model) -> str:
    """Of the model's numbers, which readers load scales in: as the configuration says, or as most
    plain values have it.
    """
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        named = section.get("dtype", section.get("torch_dtype"))
        if isinstance(named, str) and named.removeprefix("torch.") in _DTYPES:
            return _DTYPES[named.removeprefix("torch.")]
    sizes = dict.fromkeys(_DTYPES.values(), 0)
    for t in model.tensors:
        if t.dtype in sizes:
            sizes[t.dtype] += t.size
    return max(sizes, key=lambda name: sizes[name])
