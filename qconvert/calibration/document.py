"""The JSON of a calibration file as records, and what is checked of it before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qconvert.calibration.grid import StaticRange

PARTIAL = "partial"  # an entry of the JSON that only the state of an interrupted run has
MAX_OBSERVER = 32  # characters of an observer's name
MAX_SAMPLES = (1 << 53) - 1  # what a qblk header can say
MAX_FEATURES = 1 << 20  # of a row: twenty times what is in use; statistics take 168 bytes each
MAX_ROWS = 1 << 24  # of a matrix: tables of tokens are the highest
MAX_SCALE = 3.0e38
MIN_SCALE = 2.0**-150  # exclusive: what rounds to a binary32 number above 0
_RANGE = ("low", "high", "scale", "zero_point")


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """Static parameters of one layer.

    Attributes:
        samples: rows of input that were seen.
        features: values of a row.
        input: of the input.
        output: of the output, where that was observed.
        transposed: whether the weight is stored (in, out): features are its rows, not its columns.
    """

    samples: int
    features: int
    input: StaticRange
    output: StaticRange | None = None
    transposed: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape takes as many features."""
        return len(shape) > 1 and shape[0 if self.transposed else -1] == self.features

    def note(self, observer: str) -> dict[str, Any]:
        """The ``activation`` object of a qblk tensor."""
        return {
            "observer": observer,
            "samples": self.samples,
            "scale": self.input.scale,
            "zero_point": self.input.zero_point,
        }

    def to_json(self) -> dict[str, Any]:
        """The layer's object in the file: the input's range is not an object of its own there."""
        fields = {
            "samples": self.samples,
            "features": self.features,
            **asdict(self.input),
            "output": None if self.output is None else asdict(self.output),
        }
        # Most models have no such layer, and their files are what they have always been.
        return fields | ({"transposed": True} if self.transposed else {})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LayerCalibration:
        """The inverse of `to_json`; values are looked at in `CalibrationDocument.plausible`.

        Raises:
            KeyError, TypeError: an entry is missing, or one too many.
        """
        rest = dict(fields)
        taken = StaticRange(**{key: rest.pop(key) for key in _RANGE})
        output = rest.pop("output")
        return cls(**rest, input=taken, output=None if output is None else StaticRange(**output))

    def plausible(self) -> bool:
        """Whether every value is one that a calibration can give."""
        return (
            _integer(self.samples)
            and _integer(self.features)
            and 0 < self.samples <= MAX_SAMPLES
            and 0 < self.features <= MAX_FEATURES
            and isinstance(self.transposed, bool)
            and _plausible_range(self.input)
            and (self.output is None or _plausible_range(self.output))
        )


@dataclass(frozen=True, slots=True)
class TextRun:
    """What a run over text was, and how far it came.

    Attributes:
        seqlen: tokens of a window, or the most of a line.
        nsamples: as asked for.
        seed: of the draw.
        chunks: windows or lines to run.
        done: how many have been run; fewer in the state of an interrupted run.
        tokens: in them.
        groups: passes over the text that are finished, each for a group of layers.
    """

    seqlen: int
    nsamples: int | None
    seed: int
    chunks: int
    done: int
    tokens: int
    groups: int = 1

    def plausible(self) -> bool:
        """Whether every value is one that a run can have."""
        numbers = (self.seqlen, self.seed, self.chunks, self.done, self.tokens, self.groups)
        most = self.nsamples
        return (
            all(_integer(n) and 0 <= n <= MAX_SAMPLES for n in numbers)
            and (most is None or (_integer(most) and 0 < most <= MAX_SAMPLES))
            and self.done <= self.chunks
        )


@dataclass(frozen=True, slots=True)
class FisherRun:
    """What the Fisher information was taken of, see `qconvert.calibration.fisher`.

    Attributes:
        tokens: for each of which a label was sampled.
        shapes: rows and columns of each matrix.
        lacking: layers whose gradient was not to be had, such as those multiplied in a way of
            their own.
    """

    tokens: int
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> FisherRun:
        """The inverse of `asdict`.

        Raises:
            KeyError, TypeError, ValueError: JSON of another form.
        """
        shapes = {
            name: (int(rows), int(columns)) for name, (rows, columns) in fields["shapes"].items()
        }
        return cls(fields["tokens"], shapes, fields["lacking"])

    def plausible(self) -> bool:
        """Whether every value is one that a run can have."""
        return (
            _integer(self.tokens)
            and 0 < self.tokens <= MAX_SAMPLES
            and all(0 < n <= MAX_ROWS for shape in self.shapes.values() for n in shape)
            and isinstance(self.lacking, list)
            and all(isinstance(name, str) for name in self.lacking)
        )


@dataclass(frozen=True, slots=True)
class CalibrationDocument:
    """The JSON of a calibration file.

    Attributes:
        observer: name of the observer.
        settings: its parameters; ``symmetric`` says that every zero point is 0.
        inputs: name and SHA-256 of each file that activations or text came from.
        layers: by name.
        model: `model_digest` of the model, None where activations came without one.
        run: of a run over text; None for recorded activations and merged files.
        unreached: layers of the model that no token came through.
        partial: the state of an interrupted run.
        fisher: where the file has the Fisher information of the matrices.
    """

    observer: str
    settings: dict[str, float | bool]
    inputs: list[dict[str, str]]
    layers: dict[str, LayerCalibration]
    model: str | None = None
    run: TextRun | None = None
    unreached: list[str] = field(default_factory=list)
    partial: bool = False
    fisher: FisherRun | None = None

    @property
    def finished(self) -> bool:
        """Whether it is of a run that came to its end."""
        return not self.partial and (self.run is None or self.run.done == self.run.chunks)

    def to_json(self) -> dict[str, Any]:
        """The JSON of the file, but for the name of its schema."""
        fields: dict[str, Any] = {
            "observer": self.observer,
            "settings": self.settings,
            "inputs": self.inputs,
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "model": self.model,
            "run": None if self.run is None else asdict(self.run),
            "unreached": self.unreached,
        }
        if self.fisher is not None:
            fields["fisher"] = asdict(self.fisher)
        return fields | ({PARTIAL: True} if self.partial else {})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> CalibrationDocument:
        """The inverse of `to_json`; `plausible` looks at the values.

        Raises:
            KeyError, TypeError, AttributeError: JSON of another form.
        """
        rest = dict(fields)
        layers = {n: LayerCalibration.from_json(layer) for n, layer in rest.pop("layers").items()}
        run, fisher = rest.pop("run"), rest.pop("fisher", None)
        return cls(
            **rest,
            layers=layers,
            run=None if run is None else TextRun(**run),
            fisher=None if fisher is None else FisherRun.from_json(fisher),
        )

    def plausible(self) -> bool:
        """Whether every value is one that a calibration can give.

        Raises:
            KeyError, TypeError, AttributeError: a value of another form.
        """
        return (
            isinstance(self.observer, str)
            and len(self.observer) <= MAX_OBSERVER
            and self.observer.isidentifier()
            and self._plausible_settings()
            and all(
                isinstance(entry["name"], str) and isinstance(entry["sha256"], str)
                for entry in self.inputs
            )
            and (self.model is None or isinstance(self.model, str))
            and isinstance(self.partial, bool)
            and isinstance(self.unreached, list)
            and all(isinstance(name, str) for name in self.unreached)
            and (self.run is None or self.run.plausible())
            and (self.fisher is None or self.fisher.plausible())
            and all(layer.plausible() for layer in self.layers.values())
        )

    def _plausible_settings(self) -> bool:
        symmetric = self.settings.get("symmetric")
        ranges = [r for layer in self.layers.values() for r in (layer.input, layer.output) if r]
        return (
            all(type(v) is float for k, v in self.settings.items() if k != "symmetric")
            and type(symmetric) is bool
            and not (symmetric and any(r.zero_point != 0 for r in ranges))
        )


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plausible_range(r: StaticRange) -> bool:
    return (
        _integer(r.zero_point)
        and all(isinstance(f, float) for f in (r.low, r.high, r.scale))
        and -128 <= r.zero_point <= 127
        and math.isfinite(r.low)
        and math.isfinite(r.high)
        and MIN_SCALE < r.scale <= MAX_SCALE
    )
