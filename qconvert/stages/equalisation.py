"""Whether and how far the channels of a model are equalised before it is quantized.

Each group of channels is rescaled by factors of `equalisation_factors` or by their square roots
where that leaves clearly less error, and stays as it is elsewhere. The error is that of the scheme
at hand on a sample of rows, weighed by the mean squares of the inputs: of a calibration, of an
importance matrix, or without data of what the weights before say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert import kernels
from qconvert.calibration.equalised import EqualisedCalibration
from qconvert.calibration.file import Calibration
from qconvert.codecs.codec import Facts
from qconvert.errors import InputError, WeightError
from qconvert.files.equalised import EqualisedModel, Exponents
from qconvert.files.shards import CONFIG
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, Companion, Model, SourceFile, TensorInfo
from qconvert.progress import Progress
from qconvert.ranges import RangeMethod
from qconvert.report import Equalisation, EqualisedGroup
from qconvert.schemes import AffineScheme, TensorScheme
from qconvert.stages.equalisation_factors import (
    channel_logarithms,
    column_logarithms,
    powers_of_two,
)
from qconvert.stages.made_from import made_from
from qconvert.stages.parallel import Workers, available_threads
from qconvert.stages.quantize_options import QuantizeOptions
from qconvert.stages.sensitivities import Measuring
from qconvert.stages.target import Prepared

if TYPE_CHECKING:
    from qconvert.architectures.equalisation import ChannelGroup, Part

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
PROPORTIONS = (0.5, 1.0)
# Share of the error that has to be left at most. An error by half is what the mean squares of a
# calibration are known to predict; without them a guess has to show more.
KNOWN_GAIN, GUESSED_GAIN = 0.9, 0.7
# Rows that are drawn: of all matrices that read a group, and of each at most and at least.
SAMPLED, MOST_SAMPLED, LEAST_SAMPLED = 384, 96, 8
SEED = 0
CALIBRATION, IMPORTANCE, GUESS = "the calibration", "the importance matrix", "the weights alone"
Squares = Callable[[TensorInfo], F64 | None]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of the inputs of matrices.

    Attributes:
        basis: where from, for people.
        squares: mean squares of a tensor's input channels, (matrices, columns) or (1, columns);
            None where they are not known.
        samples: rows of input that were seen of a tensor, where one of several counts more.
    """

    basis: str
    squares: Squares = lambda tensor: None
    samples: Callable[[TensorInfo], int] = lambda tensor: 1


def inputs_of(prepared: Prepared, calibration: Calibration | None) -> Inputs:
    """What a conversion knows of the inputs of its matrices."""
    if calibration is not None:
        known = calibration

        def squares(tensor: TensorInfo) -> F64 | None:
            layer = known.find(tensor.name)
            if layer is None or layer.transposed or not layer.fits(tensor.shape):
                return None  # which is refused later
            found = known.mean_squares(tensor.name, tensor.shape[-1])
            return None if found is None else found.astype(np.float64)[None]

        def samples(tensor: TensorInfo) -> int:
            layer = known.find(tensor.name)
            return 1 if layer is None else layer.samples

        return Inputs(CALIBRATION, squares, samples)
    importance: dict[str, F64] = {}
    for p in prepared.plan:
        found = prepared.importance(p.tensor) if p.scheme else None
        if found is not None:
            rows = np.atleast_2d(found).astype(np.float64)
            names = [source.name for source in made_from(prepared.model, p.tensor).sources]
            for i, name in enumerate(names):
                importance[name] = rows[i : i + 1] if len(names) == len(rows) > 1 else rows
    if importance:
        return Inputs(IMPORTANCE, lambda tensor: importance.get(tensor.name))
    return Inputs(GUESS)


def equalise(
    model: Model,
    prepared: Prepared,
    calibration: Calibration | None,
    options: QuantizeOptions,
    progress: Progress,
) -> tuple[Model, Equalisation]:
    """Rescale the channels that gain by it.

    Args:
        model: with every tensor in a plain dtype, under the names of the source.
        prepared: the conversion of it as it is.

    Returns:
        The model, itself where nothing gains, and what was done.
    """
    schemes = {
        source.name: p.scheme
        for p in prepared.plan
        if p.scheme and not p.scheme.for_vectors
        for source in made_from(prepared.model, p.tensor).sources
    }
    inputs = inputs_of(prepared, calibration if options.weighting else None)
    report = Equalisation(inputs.basis)
    found = _groups(model, schemes)
    if isinstance(found, str):
        report.skipped.append(found)
        return model, report
    report.groups = len(found)
    norms = {
        p.tensor.name: g for g in found if len(g.givers[0].tensor.shape) == 1 for p in g.takers
    }
    judge = _Judge(model, schemes, inputs, options.range, norms)
    progress.begin("equalise", len(found), "groups")
    chosen: list[Choice] = []
    # BLAS with threads of its own would add in an order that depends on their number.
    with threadpool_limits(1, "blas"), Workers(options.threads or available_threads()) as workers:
        for group, choice in zip(found, workers.map(judge.choose, found), strict=True):
            progress.advance(1, group.name)
            if isinstance(choice, str):
                report.skipped.append(f"{group.name}: {choice}")
            elif choice is not None:
                chosen.append(choice)
        chosen, inexact = _exact(model, chosen, workers)
    report.skipped += [f"{n}: weights at the end of the range of their dtype" for n in inexact]
    progress.end()
    report.equalised = [c.report for c in chosen]
    return (EqualisedModel(model, exponents_of(chosen)) if chosen else model), report


def rescaled(
    plain: Model,
    prepare: Callable[[Model], Prepared],
    calibration: Calibration | None,
    options: QuantizeOptions,
    files: ExitStack,
    progress: Progress,
) -> tuple[Model, Prepared, Calibration | None, Equalisation | None]:
    """A conversion of the model with its channels rescaled, where that is asked for and gains.

    Args:
        plain: the model, with every tensor in a plain dtype.
        prepare: a conversion of one.
        files: closes a calibration that reads as if made with the rescaled model.

    Returns:
        The model, the conversion of it, the calibration for it, and what was done.
    """
    prepared = prepare(plain)
    if not options.equalise:
        return plain, prepared, calibration, None
    model, report = equalise(plain, prepared, calibration, options, progress)
    if not isinstance(model, EqualisedModel):
        return plain, prepared, calibration, report
    if options.calibration:
        calibration = files.enter_context(EqualisedCalibration(options.calibration, model))
    return model, prepare(model), calibration, report


def _groups(model: Model, schemes: Mapping[str, TensorScheme]) -> list[ChannelGroup] | str:
    """The groups of a model, or why nothing can be done with them."""
    if not schemes:
        return "no tensor gets codes"
    if any(isinstance(s, AffineScheme) and s.granularity == "tensor" for s in schemes.values()):
        return "a scale for a whole tensor does not follow its rows"
    if all(c.name != CONFIG for c in model.companions):
        return f"no {CONFIG} says how layers follow each other"
    from qconvert.architectures.equalisation import channel_groups  # 0.1 s to load

    try:
        return channel_groups(model)
    except InputError as e:
        return e.message


@dataclass(frozen=True, slots=True)
class Choice:
    """Factors that a group is given."""

    group: ChannelGroup
    exponents: NDArray[np.int8]
    report: EqualisedGroup


# --- one group ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Taker:
    """A sample of rows of a matrix that reads a group.

    Attributes:
        weights: (rows, columns).
        matrix: of each row, among the equal matrices that the tensor is of.
        columns: mean squares of the columns of each matrix, (matrices, columns).
    """

    part: Part
    weights: F64
    matrix: I64
    columns: F64
    scheme: TensorScheme | None
    squares: list[F64] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Chooses factors group by group; from several threads at once.

    Attributes:
        schemes: of the tensors that get codes.
        method: how ranges are chosen.
        norms: by the names of the matrices that read them.
    """

    model: Model
    schemes: Mapping[str, TensorScheme]
    inputs: Inputs
    method: RangeMethod | None
    norms: Mapping[str, ChannelGroup]

    @np.errstate(over="ignore", invalid="ignore")  # of huge weights, whose errors then win nothing
    def choose(self, group: ChannelGroup) -> Choice | str | None:
        """Factors for a group; None where none gain, and why where none are possible."""
        if not any(p.tensor.name in self.schemes for p in group.takers):
            return "no matrix that reads it gets codes"
        most = SAMPLED // sum(len(p.channels) for p in group.takers)
        most = min(max(most, LEAST_SAMPLED), MOST_SAMPLED)
        takers = [self._taker(p, most) for p in group.takers]
        if not all(np.isfinite(t.weights).all() for t in takers):
            return "weights that are NaN or Inf"
        known = self._hypotheses(group, takers)
        c = self._logarithms(group, takers)
        best, proportion, exponents = KNOWN_GAIN if known else GUESSED_GAIN, 0.0, None
        try:
            before = self._errors(takers, np.zeros(group.size, np.int8))
            for p in PROPORTIONS:
                tried = powers_of_two(c, p)
                if not tried.any():
                    continue
                left = _left(before, self._errors(takers, tried), takers)
                if left < best:
                    best, proportion, exponents = left, p, tried
        except WeightError as e:
            return e.message
        if exponents is None:
            return None
        largest = int(np.abs(exponents).max())
        changed = int(np.count_nonzero(exponents))
        done = EqualisedGroup(group.name, group.size, changed, 2**largest, proportion, best)
        return Choice(group, exponents, done)

    def _logarithms(self, group: ChannelGroup, takers: list[_Taker]) -> F64:
        """log2 c of the channels, nan where nothing is known.

        Matrices that read all channels alike are as one of all their rows; experts, each with
        channels of its own, are by themselves.
        """
        total, count = np.zeros(group.size), np.zeros(group.size)
        waiting = list(takers)
        while waiting:
            channels = waiting[0].part.channels
            alike = [t for t in waiting if np.array_equal(t.part.channels, channels)]
            waiting = [t for t in waiting if not np.array_equal(t.part.channels, channels)]
            rows = np.array([t.part.tensor.size // channels.shape[1] for t in alike], np.float64)
            seen = np.array([self.inputs.samples(t.part.tensor) for t in alike], np.float64)
            columns = np.tensordot(rows / rows.sum(), [t.columns for t in alike], 1)
            squares = np.tensordot(seen / seen.sum(), [t.squares[0] for t in alike], 1)
            found = channel_logarithms(column_logarithms(squares, columns), channels, group.size)
            known = np.isfinite(found)
            total[known] += found[known]
            count[known] += 1
        means: F64 = np.divide(total, count, out=np.full(group.size, np.nan), where=count > 0)
        return means

    def _taker(self, part: Part, most: int) -> _Taker:
        """So many rows of each matrix of a tensor at most."""
        tensor = part.tensor
        columns, matrices = tensor.shape[-1], len(part.channels)
        height = tensor.size // columns // matrices
        rows = np.arange(height)
        if height > most:
            rows = np.sort(np.random.default_rng(SEED).choice(height, most, replace=False))
        chosen = (np.arange(matrices)[:, None] * height + rows).ravel()
        weights = np.empty((len(chosen), columns))
        for i, row in enumerate(chosen.tolist()):
            weights[i] = self.model.values(tensor, row * columns, (row + 1) * columns)
        squares = np.square(weights).reshape(matrices, len(rows), columns).mean(axis=1)
        scheme = self.schemes.get(tensor.name)
        return _Taker(part, weights, chosen // height, squares, scheme)

    def _hypotheses(self, group: ChannelGroup, takers: list[_Taker]) -> bool:
        """Give takers the mean squares of their inputs, and say whether they are measured ones.

        Without data there are two of them, and what is done has to gain under both: what follows
        from the weights that give the channels, for inputs of one size before them, and that every
        channel matters alike.
        """
        for t in takers:
            found = self.inputs.squares(t.part.tensor)
            if found is not None:
                t.squares = [np.broadcast_to(found, t.columns.shape)]
        known = [t for t in takers if t.squares]
        if known:
            # Those that were not seen read the same channels, or others that nothing is known of.
            for t in takers:
                like = [k for k in known if np.array_equal(k.part.channels, t.part.channels)]
                t.squares = t.squares or [like[0].squares[0] if like else np.zeros(t.columns.shape)]
            return True
        given = self._given(group)
        for t in takers:
            alike = np.divide(1.0, t.columns, out=np.zeros(t.columns.shape), where=t.columns > 0)
            t.squares = [given[t.part.channels], alike]
        return False

    def _given(self, group: ChannelGroup) -> F64:
        """Mean squares of a group's channels by the weights that give them."""
        found = np.zeros(group.size)
        for part in group.givers:
            tensor, inside = part.tensor, part.channels >= 0
            if len(tensor.shape) > 1:
                squares = self._row_squares(tensor)
            elif tensor.size == group.size and part is group.givers[0]:
                gains = self.model.values(tensor, 0, tensor.size).astype(np.float64)
                squares = (gains + group.offset) ** 2
            else:
                continue  # a bias
            found[part.channels[inside]] += squares[inside]
        return found

    def _row_squares(self, tensor: TensorInfo) -> F64:
        """Σ_k w_ik² of each row of a matrix, each column weighed by the square of the norm's gain
        before it.
        """
        columns = tensor.shape[-1]
        gains = np.ones(columns)
        norm = self.norms.get(tensor.name)
        if norm is not None:
            vector = norm.givers[0].tensor
            values = self.model.values(vector, 0, vector.size).astype(np.float64)
            gains = (values + norm.offset) ** 2
        found = np.empty(tensor.size // columns)
        step = max(1, TILE_VALUES // columns)
        for first in range(0, len(found), step):
            last = min(first + step, len(found))
            tile = self.model.values(tensor, first * columns, last * columns).astype(np.float64)
            found[first:last] = np.square(tile).reshape(-1, columns) @ gains
        return found

    def _errors(self, takers: list[_Taker], exponents: NDArray[np.int8]) -> list[list[float]]:
        """Squared errors of the products of each taker that is quantized, under each hypothesis."""
        found = []
        for t in takers:
            if t.scheme is None:
                continue
            factors = np.ldexp(1.0, exponents[t.part.channels].astype(np.int32))
            costs = [s / factors**2 for s in t.squares]
            weights = (t.weights * factors[t.matrix]).astype(np.float32)
            errors = np.square(self._quantized(t, weights, costs[0]) - weights.astype(np.float64))
            found.append([float(np.sum(errors * c[t.matrix])) for c in costs])
        return found

    def _quantized(self, t: _Taker, weights: NDArray[np.float32], cost: F64) -> F64:
        """A sample as it would be decoded, its scales found with the cost of errors in each column
        where that is known.
        """
        assert t.scheme
        sample = _Sample(self.model, t.part.tensor.name, weights)
        known = self.inputs.basis != GUESS and len(cost) == 1 and cost.any()
        weighing = cost[0].astype(np.float32) if known else None
        facts = Facts(
            self.method,
            lambda columns: None if self.inputs.basis == IMPORTANCE else weighing,
            weighing if self.inputs.basis == IMPORTANCE else None,
        )
        measuring = Measuring(sample, "", lambda tensor: facts, lambda tensor: None)
        tensor = sample.tensors[0]
        stored = measuring.stored(tensor, t.scheme.name)
        values: F64 = stored.values(0, tensor.size).astype(np.float64)
        return values.reshape(weights.shape)


def _left(before: list[list[float]], after: list[list[float]], takers: list[_Taker]) -> float:
    """Share of the error that is left: the mean over matrices by their sizes, for errors of
    different matrices do not compare; of several hypotheses the worst.
    """
    sizes = np.array([t.part.tensor.size for t in takers if t.scheme], np.float64)
    old, new = np.array(before), np.array(after)
    shares = np.divide(new, old, out=np.where(new > 0, np.inf, 1.0), where=old > 0)
    return float((sizes / sizes.sum() @ shares).max())


class _Sample:
    """Some rows of a tensor: a `Model` of nothing else."""

    def __init__(self, model: Model, name: str, rows: NDArray[np.float32]) -> None:
        nbytes = DTYPES["F32"].nbytes(rows.size)
        self.path: Path = model.path
        self.kind = model.kind
        self.tensors: tuple[TensorInfo, ...] = (TensorInfo(name, rows.shape, "F32", nbytes),)
        self.metadata: dict[str, str] = {}
        self.sources: tuple[SourceFile, ...] = ()
        self.companions: tuple[Companion, ...] = ()
        self._values = rows.ravel()

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        return self._values[start:stop]

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        return self._values.tobytes()[offset : offset + size]

    def check_unchanged(self) -> None:
        pass

    def close(self) -> None:
        pass


# --- all groups -----------------------------------------------------------------------------------


def exponents_of(chosen: Sequence[Choice]) -> dict[str, Exponents]:
    """Exponents of the tensors that are rescaled."""
    found: dict[str, Exponents] = {}
    for choice in chosen:
        wide = np.append(choice.exponents, np.int8(0))  # of the channel -1, which is none
        for part in choice.group.givers:
            old = found.get(part.tensor.name, Exponents())
            found[part.tensor.name] = replace(
                old, rows=wide[part.channels], offset=choice.group.offset
            )
        for part in choice.group.takers:
            old = found.get(part.tensor.name, Exponents())
            found[part.tensor.name] = replace(old, columns=wide[part.channels])
    return found


def _exact(model: Model, chosen: list[Choice], workers: Workers) -> tuple[list[Choice], list[str]]:
    """Leave out groups that would change a digit of a weight: the names of these too.

    Gains of norms that add one are not looked at: they are rounded to binary32.
    """
    inexact: list[str] = []
    exact: dict[str, list[str]] = {}  # tensors, with the groups by which they are rescaled
    while True:
        groups: dict[str, list[str]] = {}
        for c in chosen:
            for part in (*c.group.givers, *c.group.takers):
                groups.setdefault(part.tensor.name, []).append(c.group.name)
        waiting = [t for t in model.tensors if groups.get(t.name) != exact.get(t.name)]
        waiting = [t for t in waiting if t.name in groups]
        unchanged = partial(_unchanged, EqualisedModel(model, exponents_of(chosen)))
        bad: list[str] = []
        for tensor, good in zip(waiting, workers.map(unchanged, waiting), strict=True):
            if good:
                exact[tensor.name] = groups[tensor.name]
            else:
                bad += groups[tensor.name]
        if not bad:
            return chosen, inexact
        inexact += dict.fromkeys(bad)
        chosen = [c for c in chosen if c.group.name not in bad]


def _unchanged(model: EqualisedModel, tensor: TensorInfo) -> bool:
    """Whether rescaled weights, in the dtype that they have then, are the old ones times a power of
    two.
    """
    e = model.exponents[tensor.name]
    if e.offset:
        return True
    back = replace(
        e,
        rows=None if e.rows is None else -e.rows,
        columns=None if e.columns is None else -e.columns,
    )
    info = model.rescaled(tensor)
    width = DTYPES[info.dtype].size
    for start in range(0, tensor.size, TILE_VALUES):
        stop = min(start + TILE_VALUES, tensor.size)
        stored = model.raw(info, start * width, (stop - start) * width)
        again = back.applied(kernels.widen(stored, info.dtype), tensor.shape, start)
        if not np.array_equal(again, model.source.values(tensor, start, stop), equal_nan=True):
            return False
    return True
