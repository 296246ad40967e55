"""Which tensors are rounded so that codes make up for each other's errors, why the others are not,
and the factors of their layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from threading import Lock

from qconvert.calibration.factors import input_factor
from qconvert.calibration.file import Calibration
from qconvert.codecs import codec_of
from qconvert.codecs.codec import NEAREST
from qconvert.codecs.compensation import (
    COMPENSATED,
    DAMPING,
    MOST_COLUMNS,
    Rounder,
    prepared,
)
from qconvert.errors import FormatError, UsageError
from qconvert.kernels.records import Factors
from qconvert.stages.plan import PlannedTensor

METHODS = (NEAREST, COMPENSATED)
KEPT_FACTORS = 2  # of layers at a time: the one under way, and the one whose last tiles still run
PREPARING, PREPARED = 36, 8  # bytes of memory for each pair of channels


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a tensor is rounded, and why."""

    method: str
    reason: str


@dataclass
class Roundings:
    """How the tensors of a plan are rounded.

    Attributes:
        of: by the name of the tensor; not of those that have no codes.
        layers: of tensors that a calibration has the layer of.
        calibration: None without one.
    """

    of: dict[str, Rounding] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._kept: dict[str, Factors] = {}

    @property
    def compensated(self) -> list[str]:
        """Names of the tensors that are."""
        return [name for name, r in self.of.items() if r.method == COMPENSATED]

    def rounder(self, tensor: str) -> Rounder | None:
        """What chooses the codes of a tensor; None where they are the nearest."""
        found = self.of.get(tensor)
        if found is None or found.method != COMPENSATED:
            return None
        return Rounder(partial(self._factors, self.layers[tensor]))

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
            raise FormatError(
                "the Gram matrix of a layer cannot be used",
                path=self.calibration.path,
                tensor=layer,
                found=str(e),
                hint="calibrate once more, or round with --rounding nearest",
                code="CALIBRATION-GRAM",
            ) from e

    def notes(self) -> list[str]:
        """What the report says besides."""
        if not (names := self.compensated):
            return []
        assert self.calibration
        widest = max(self.calibration.layers[self.layers[name]].features for name in names)
        mib = (PREPARING + PREPARED) * widest * widest / 2**20
        weighed = ", weighed by gradients," if self.calibration.has_fisher else ""
        found = [
            f"{len(names)} tensors are rounded so that codes make up for each other's errors: by "
            f"the Gram matrices of the calibration{weighed} with {DAMPING} of the mean diagonal "
            f"added, in up to {mib:,.0f} MiB of memory for {widest:,} channels"
        ]
        reasons = Counter(r.reason for r in self.of.values() if r.method == NEAREST)
        for reason, count in reasons.most_common():
            first = next(name for name, r in self.of.items() if r.reason == reason)
            found.append(f"{count} rounded to the nearest, such as '{first}': {reason}")
        return found

    def warnings(self) -> list[str]:
        """Layers that saw fewer rows of input than they have channels."""
        if self.calibration is None:
            return []
        found = [
            (layer.samples, layer.features, name)
            for name in self.compensated
            if (layer := self.calibration.layers[self.layers[name]]).samples < layer.features
        ]
        if not found:
            return []
        samples, features, name = min(found)
        return [
            f"the Gram matrices of {len(found)} tensors are singular but for the damping, such as "
            f"that of '{name}': {samples:,} rows of input for {features:,} channels; calibrate "
            "with more text"
        ]


def plan_roundings(
    plan: tuple[PlannedTensor, ...],
    calibration: Calibration | None,
    layers: Mapping[str, str],
    asked: str | None,
    weighting: bool,
) -> Roundings:
    """Decide for every tensor that gets codes.

    Args:
        layers: of the calibration, by the tensors that they have weights in.
        asked: ``nearest``, ``compensated``, or None for compensated where that is possible.
        weighting: whether the calibration is to weigh errors.

    Raises:
        UsageError: asked for and impossible for every tensor.
    """
    found = Roundings({}, layers, calibration)
    for p in plan:
        if p.scheme is None or p.scheme.for_vectors:
            continue
        why = _not_compensated(p, calibration, layers.get(p.tensor.name), asked, weighting)
        default = "the calibration has the Gram matrix of its input"
        found.of[p.tensor.name] = Rounding(NEAREST if why else COMPENSATED, why or default)
    if asked == COMPENSATED and not found.compensated:
        raise UsageError(
            "--rounding compensated: no tensor can be rounded so",
            found="; ".join(dict.fromkeys(r.reason for r in found.of.values())) or None,
            hint="give a calibration with Gram matrices: qconvert calibrate --text FILE --gram",
        )
    return found


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
        return "the calibration has no layer of it"
    if calibration.layers[layer].transposed:
        return "it is stored (in, out): a row meets one channel of the input"
    if not calibration.has_gram(layer):
        return "the calibration has no Gram matrix of its input: calibrate --gram"
    if shape[1] > MOST_COLUMNS:
        return f"it has more than {MOST_COLUMNS:,} channels"
    if calibration.mean_squares(layer, shape[1]) is None:
        return "all of its inputs were 0"
    return codec_of(p.scheme).uncompensated(p.scheme, p.tensor)
