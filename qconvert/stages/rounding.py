"""Which tensors are rounded so that codes make up for each other's errors, those of a row and those
of all rows, why the others are not, and the factors of their layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.factors import input_factor, no_output_factor, output_factor
from qconvert.calibration.file import Calibration
from qconvert.codecs import codec_of
from qconvert.codecs.codec import NEAREST
from qconvert.codecs.compensation import (
    COMPENSATED,
    DAMPING,
    MOST_COLUMNS,
    ROW_DAMPING,
    Rounder,
    prepared,
    shares_of,
)
from qconvert.errors import FormatError, UsageError
from qconvert.kernels.records import F32, F64, Factors
from qconvert.mapper import Mapper
from qconvert.model import Model, TensorInfo
from qconvert.stages.made_from import made_from
from qconvert.stages.plan import PlannedTensor

METHODS = (NEAREST, COMPENSATED)
NO_LAYER = "the calibration has no layer of it"
NO_GRAM = "the calibration has no Gram matrix of its input: calibrate --gram"
KEPT_FACTORS = 2  # of layers at a time: the one under way, and the one whose last tiles still run
PREPARING, PREPARED = 36, 8  # bytes of memory for each pair of channels
# Bytes of memory for each weight of a matrix whose rows make up for each other's errors, and for
# each pair of rows of its layer; and of all such matrices at a time, on however many threads.
OF_WEIGHT, OF_ROWS = 32, 16
WHOLE_BYTES = 6 << 30


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a tensor is rounded, and why.

    Attributes:
        by_row: why its rows do not make up for each other's errors; None where they do.
        located: its rows among those of its layer; None where they are the same.
        whole: bytes of memory for all of it at once; 0 where that is not needed.
    """

    method: str
    reason: str
    by_row: str | None = "it is rounded to the nearest"
    located: NDArray[np.int64] | None = None
    whole: int = 0


@dataclass
class Roundings:
    """How the tensors of a plan are rounded.

    Attributes:
        of: by the name of the tensor; not of those that have no codes.
        layers: of tensors that a calibration has the layer of.
        calibration: None without one.
        asked: for compensated codes, and not left to what the calibration has.
    """

    of: dict[str, Rounding] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    asked: bool = False

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._kept: dict[str, Factors] = {}
        self._room = Condition()
        self._taken = 0  # bytes, of whole matrices

    @property
    def compensated(self) -> list[str]:
        """Names of the tensors that are."""
        return [name for name, r in self.of.items() if r.method == COMPENSATED]

    @property
    def swept(self) -> list[str]:
        """Names of those of them whose rows make up for each other's errors."""
        return [name for name in self.compensated if self.of[name].by_row is None]

    def rounder(
        self, tensor: str, mapper: Mapper = map, rows: NDArray[np.int64] | None = None
    ) -> Rounder | None:
        """What chooses the codes of a tensor; None where they are the nearest.

        Args:
            mapper: runs work on parts of a whole matrix.
            rows: of the tensor that codes are chosen for; None for all.
        """
        found = self.of.get(tensor)
        if found is None or found.method != COMPENSATED:
            return None
        factors = partial(self._factors, self.layers[tensor])
        if found.by_row is not None:
            return Rounder(factors)
        return Rounder(factors, shares=partial(self._shares, tensor, rows), mapper=mapper)

    def output(self, tensor: str, rows: NDArray[np.int64] | None = None) -> F64 | None:
        """What the errors of rows of a tensor have to do with each other, (rows, rows); None where
        they are not said to make up for each other's.

        Args:
            rows: of the tensor; None for all.
        """
        if self.of[tensor].by_row is not None:
            return None
        assert self.calibration
        located = self.of[tensor].located
        if located is not None:
            rows = located if rows is None else located[rows]
        found = output_factor(self.calibration, self.layers[tensor])
        return found if rows is None else found[np.ix_(rows, rows)]

    @contextmanager
    def room(self, tensor: str) -> Iterator[None]:
        """Memory for the whole of a matrix whose rows make up for each other's errors; waits until
        others have let go of theirs.
        """
        wanted = self.of[tensor].whole if tensor in self.of else 0
        with self._room:
            self._room.wait_for(lambda: not wanted or self._taken + wanted <= WHOLE_BYTES)
            self._taken += wanted
        try:
            yield
        finally:
            with self._room:
                self._taken -= wanted
                self._room.notify_all()

    def _factors(self, layer: str) -> Factors:
        """Prepared by whoever comes first, while others wait: memory for one preparation."""
        with self._lock:
            if layer not in self._kept:
                while len(self._kept) >= KEPT_FACTORS:
                    del self._kept[next(iter(self._kept))]
                self._kept[layer] = self._prepared(layer)
            return self._kept[layer]

    def _prepared(self, layer: str) -> Factors:
        assert self.calibration
        gram = input_factor(self.calibration, layer)
        assert gram is not None  # which was looked for when the plan was made
        try:
            return prepared(gram)
        except ValueError as e:
            raise self._unusable("Gram matrix", layer, e) from e

    def _shares(self, tensor: str, rows: NDArray[np.int64] | None) -> F32:
        output = self.output(tensor, rows)
        assert output is not None
        try:
            return shares_of(output)
        except ValueError as e:
            raise self._unusable("Fisher information", self.layers[tensor], e) from e

    def _unusable(self, what: str, layer: str, why: ValueError) -> FormatError:
        assert self.calibration
        return FormatError(
            f"the {what} of a layer cannot be used",
            path=self.calibration.path,
            tensor=layer,
            found=str(why),
            hint="calibrate once more, or round with --rounding nearest",
            code="CALIBRATION-GRAM",
        )

    def notes(self) -> list[str]:
        """What the report says besides."""
        if not (names := self.compensated):
            return []
        assert self.calibration
        widest = max(self._features(name) for name in names)
        mib = (PREPARING + PREPARED) * widest * widest / 2**20
        weighed = ", weighed by gradients," if self.calibration.has_fisher else ""
        found = [
            f"{len(names)} tensors are rounded so that codes make up for each other's errors: by "
            f"the Gram matrices of the calibration{weighed} with {DAMPING} of the mean diagonal "
            f"added, in up to {mib:,.0f} MiB of memory for {widest:,} channels"
        ]
        if swept := self.swept:
            found.append(
                f"in {len(swept)} of them rows make up for the errors of other rows too: by the "
                f"Fisher information of the outputs with {ROW_DAMPING} of the mean diagonal added, "
                f"whole matrices in up to {WHOLE_BYTES >> 30} GiB of memory"
            )
        found += _listed(
            {name: r.by_row for name, r in self.of.items() if r.method == COMPENSATED},
            "round each row by itself",
        )
        found += _listed(
            {name: r.reason for name, r in self.of.items() if r.method == NEAREST},
            "rounded to the nearest",
        )
        return found

    def _features(self, tensor: str) -> int:
        """Channels of the Gram matrix of a tensor."""
        assert self.calibration
        layer = self.layers[tensor]
        if layer in self.calibration.layers:
            return self.calibration.layers[layer].features
        return self.calibration.tables[layer][1]

    def warnings(self) -> list[str]:
        """Tensors without factors, where they were asked for, and layers that saw fewer rows of
        input than they have channels.
        """
        if self.calibration is None:
            return []
        missing = [n for n, r in self.of.items() if r.reason in (NO_LAYER, NO_GRAM)]
        said = []
        if self.asked and missing:
            said.append(
                f"{len(missing)} tensors are rounded to the nearest, such as '{missing[0]}': the "
                "calibration has no factors for them; leave out --rounding, or calibrate what "
                "it lacks"
            )
        found = [
            (layer.samples, layer.features, name)
            for name in self.compensated
            if (layer := self.calibration.layers.get(self.layers[name]))
            and layer.samples < layer.features
        ]
        if not found:
            return said
        samples, features, name = min(found)
        return [
            *said,
            f"the Gram matrices of {len(found)} tensors are singular but for the damping, such as "
            f"that of '{name}': {samples:,} rows of input for {features:,} channels; calibrate "
            "with more text",
        ]


def _listed(reasons: Mapping[str, str | None], what: str) -> list[str]:
    """A sentence for each reason why tensors are rounded in such a way, with the first of them."""
    counted = Counter(reason for reason in reasons.values() if reason is not None)
    return [
        f"{count} {what}, such as '{next(n for n, r in reasons.items() if r == reason)}': {reason}"
        for reason, count in counted.most_common()
    ]


def plan_roundings(
    plan: tuple[PlannedTensor, ...],
    calibration: Calibration | None,
    layers: Mapping[str, str],
    asked: str | None,
    weighting: bool,
    model: Model,
) -> Roundings:
    """Decide for every tensor that gets codes.

    Args:
        layers: of the calibration, and tables of its Fisher information, by the tensors that they
            have weights in.
        asked: ``nearest``, ``compensated``, or None for compensated where that is possible.
        weighting: whether the calibration is to weigh errors.
        model: of the plan's tensors.

    Raises:
        UsageError: asked for and impossible for every tensor.
    """
    found = Roundings({}, layers, calibration, asked == COMPENSATED)
    for p in plan:
        if p.scheme is None or p.scheme.for_vectors:
            continue
        layer = layers.get(p.tensor.name)
        why = _not_compensated(p, calibration, layer, asked, weighting)
        if why is not None:
            found.of[p.tensor.name] = Rounding(NEAREST, why)
            continue
        assert calibration
        assert layer
        located = made_from(model, p.tensor).rows
        reason, whole = _default(calibration, layer), 0
        by_row = no_output_factor(calibration, layer)
        if by_row is None:
            rows = calibration.outputs(layer)
            whole = OF_WEIGHT * p.tensor.size + OF_ROWS * rows**2
            by_row = _not_swept(p.tensor, rows, whole, located)
        more = (located, whole) if by_row is None else ()
        found.of[p.tensor.name] = Rounding(COMPENSATED, reason, by_row, *more)
    if asked == COMPENSATED and not found.compensated:
        raise UsageError(
            "--rounding compensated: no tensor can be rounded so",
            found="; ".join(dict.fromkeys(r.reason for r in found.of.values())) or None,
            hint="give a calibration with Gram matrices: qconvert calibrate --text FILE --gram",
        )
    return found


def _default(calibration: Calibration, layer: str) -> str:
    """Why a tensor is compensated."""
    if layer in calibration.tables:
        return "the calibration has the Fisher information of what is looked up in it"
    return "the calibration has the Gram matrix of its input"


def _not_swept(
    tensor: TensorInfo, rows: int, whole: int, located: NDArray[np.int64] | None
) -> str | None:
    """Why the rows of a tensor do not make up for each other's errors, though ``rows`` of its layer
    have gradients.
    """
    if located is None and rows != tensor.shape[0]:
        return f"it has {tensor.shape[0]:,} rows, and the calibration gradients of {rows:,}"
    if located is not None and (located.max() >= rows or len(np.unique(located)) < len(located)):
        return "its rows are not each one row of its layer"
    if whole > WHOLE_BYTES:
        return f"it would take more than {WHOLE_BYTES >> 30} GiB of memory at once"
    return None


def _not_compensated(
    p: PlannedTensor,
    calibration: Calibration | None,
    layer: str | None,
    asked: str | None,
    weighting: bool,
) -> str | None:
    """Why a tensor is rounded to the nearest."""
    if asked == NEAREST:
        return "--rounding nearest"
    if calibration is None:
        return "there is no calibration"
    if not weighting and asked is None:
        return "--no-weighting"
    assert p.scheme
    shape = p.tensor.shape
    if len(shape) != 2:
        return "it is no matrix, but several of them" if len(shape) > 2 else "it is no matrix"
    if layer is None:
        return NO_LAYER
    known = calibration.layers.get(layer)
    if known is not None and known.transposed:
        return "it is stored (in, out): a row meets one channel of the input"
    if not calibration.has_gram(layer) and not calibration.has_input_fisher(layer):
        return NO_GRAM
    if known is None and (width := calibration.tables[layer][1]) != shape[1]:
        return f"it has {shape[1]:,} columns, and the calibration gradients of {width:,}"
    if shape[1] > MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS:,} channels"
    if known is not None and calibration.mean_squares(layer, shape[1]) is None:
        return "all of its inputs were 0"
    return codec_of(p.scheme).uncompensated(p.scheme, p.tensor)
