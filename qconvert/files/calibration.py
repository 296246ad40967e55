"""Calibration files: static activation parameters, channel statistics and the state that made them,
as safetensors.

Per layer ``L`` the tensors ``L/minimum``, ``L/maximum`` and ``L/mean_square`` (float32, one value
a feature) are for reading; ``L/squares`` and ``L/state.*`` are exact and let two files be merged,
or an interrupted run go on. ``L/gram.high`` and ``L/gram.low`` (int64) are the upper triangle of
the Gram matrix, row after row, where one was asked for: a value is high · 2^-2 + low · 2^-64. The
rest is JSON in the metadata entry ``qconvert.calibration``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert import fixed_point
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.scratch import Scratch
from qconvert.files.strict_json import strict_json
from qconvert.geometry import row_length
from qconvert.model import Model, TensorInfo

ENTRY = "qconvert.calibration"
SCHEMA = "qconvert.calibration/3"
PARTIAL = "partial"  # an entry of the JSON that only the state of an interrupted run has
CHANNELS = ("minimum", "maximum", "mean_square")
WEIGHT = ".weight"
MAX_OBSERVER = 32  # characters of an observer's name
MAX_SAMPLES = (1 << 53) - 1  # what a qblk header can say
MAX_FEATURES = (
    1 << 20
)  # values of a row: twenty times what is in use; statistics take 168 bytes each
MAX_SCALE = 3.0e38
MIN_SCALE = 2.0**-150  # exclusive: what rounds to a binary32 number above 0
DIGEST_BYTES = 4096  # of each tensor
NUMPY = {"F32": "<f4", "F64": "<f8", "U16": "<u2", "U32": "<u4", "I64": "<i8"}
DTYPES = {np.dtype(code): name for name, code in NUMPY.items()}
PART_BYTES = 1 << 24  # of a file that is written


@dataclass(frozen=True, slots=True)
class StaticParameters:
    """Range, scale and zero point; see `qconvert.observers.ranges.StaticRange`."""

    low: float
    high: float
    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """Static parameters of one layer.

    Attributes:
        samples: rows of input that were seen.
        features: values of a row.
        low, high, scale, zero_point: of the input; see `StaticParameters`.
        output: of the output, where that was observed.
        transposed: whether the weight is stored (in, out): features are its rows, not its columns.
    """

    samples: int
    features: int
    low: float
    high: float
    scale: float
    zero_point: int
    output: StaticParameters | None = None
    transposed: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape takes as many features."""
        return len(shape) > 1 and shape[0 if self.transposed else -1] == self.features

    def note(self, observer: str) -> dict[str, Any]:
        """The ``activation`` object of a qblk tensor."""
        return {
            "observer": observer,
            "samples": self.samples,
            "scale": self.scale,
            "zero_point": self.zero_point,
        }


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
    """

    observer: str
    settings: dict[str, float | bool]
    inputs: list[dict[str, str]]
    layers: dict[str, LayerCalibration]
    model: str | None = None
    run: TextRun | None = None
    unreached: list[str] = field(default_factory=list)
    partial: bool = False

    @property
    def finished(self) -> bool:
        """Whether it is of a run that came to its end."""
        return not self.partial and (self.run is None or self.run.done == self.run.chunks)


class Calibration:
    """A finished calibration file, checked and open; a context manager.

    Arrays are read when they are wanted, by several threads at once if need be.

    Attributes:
        path: as given.
        document: its JSON.

    Raises:
        InputError: it cannot be read, is not a calibration file, or not a finished one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_safetensors(path)
        with ExitStack() as closing:  # a refusal closes the file
            closing.callback(self._file.close)
            self.document = _document(self._file, path)
            if not self.document.finished:
                raise unfinished(path)
            closing.pop_all()
        self._tensors = {t.name: t for t in self._file.tensors}

    @property
    def observer(self) -> str:
        return self.document.observer

    @property
    def layers(self) -> dict[str, LayerCalibration]:
        return self.document.layers

    def sha256(self) -> str:
        """Of the whole file."""
        return self._file.sha256()

    def mean_squares(self, tensor: str, columns: int) -> NDArray[np.float32] | None:
        """Mean squares of the input channels of a weight, (columns,), finite and not negative.

        None where the file has not got its layer, where the layer was never active (all are 0), and
        where the weight is stored (in, out): all values of a row meet one channel then, and no
        search within a row has anything to weigh.

        Raises:
            FormatError: another number of channels than ``columns``, another dtype than F32, or a
                mean square that is negative, NaN or infinite.
        """
        name = f"{layer_name(tensor)}/mean_square"
        info = self._tensors.get(name)
        layer = self.find(tensor)
        if info is None or (layer is not None and layer.transposed):
            return None
        if (info.shape, info.dtype) != ((columns,), "F32"):
            raise self._impossible(name, f"{info.dtype} {list(info.shape)}", f"F32 [{columns}]")
        squares = self._file.values(info, 0, columns).astype(np.float32, copy=False)
        wrong = ~(np.isfinite(squares) & (squares >= 0))
        if wrong.any():
            found = f"a mean square of {squares[wrong][0]:g}"
            raise self._impossible(name, found, "a finite number, at least 0")
        return squares if squares.any() else None

    def gram(self, tensor: str) -> NDArray[np.float64] | None:
        """Xᵀ X of the inputs of the layer of a weight, (features, features), symmetric; to a
        unit in the last place.

        None where the file has none: it is there with ``calibrate --gram``.

        Raises:
            FormatError: arrays that are no such matrix.
        """
        name = layer_name(tensor)
        layer = self.layers.get(name)
        if layer is None or f"{name}/gram.high" not in self._tensors:
            return None
        n = layer.features
        found = np.empty((n, n))
        parts = []
        for kind in ("gram.high", "gram.low"):
            info = self._tensors.get(f"{name}/{kind}")
            if info is None or (info.shape, info.dtype) != ((n * (n + 1) // 2,), "I64"):
                described = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise self._impossible(f"{name}/{kind}", described, f"I64 [{n * (n + 1) // 2}]")
            parts.append(info)
        at = 0
        for k in range(n):
            high, low = (
                np.frombuffer(self._file.raw(t, 8 * at, 8 * (n - k)), "<i8") for t in parts
            )
            try:
                fixed_point.check(high, low)
            except ValueError as e:
                raise self._impossible(f"{name}/gram", f"row {k}", f"{e}, see there") from e
            if high[0] < 0:
                raise self._impossible(f"{name}/gram.high", f"{high[0]}", "no negative square")
            found[k, k:] = found[k:, k] = fixed_point.wide(high, low)
            at += n - k
        return found

    def check_unchanged(self) -> None:
        """Raise an InputError if the file is not the one that was opened."""
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _impossible(self, name: str, found: str, wanted: str) -> FormatError:
        return FormatError(
            "impossible values in the calibration",
            path=self.path,
            tensor=name,
            found=found,
            wanted=wanted,
        )

    def find(self, tensor: str) -> LayerCalibration | None:
        """The calibration of the layer that a weight belongs to."""
        return self.layers.get(layer_name(tensor))

    def check(self, tensor: TensorInfo) -> None:
        """Refuse a layer whose number of features is not that of the weight's."""
        found = self.layers[layer_name(tensor.name)]
        columns = row_length(tensor.shape)
        if found.features != columns and not found.fits(tensor.shape):
            raise UnsupportedError(
                "the calibration does not fit the weight",
                path=self.path,
                tensor=tensor.name,
                found=f"{found.features:,} features",
                wanted=f"{columns:,}",
                hint="calibrate with activations of this model",
            )

    def check_model(self, model: Model) -> None:
        """Refuse a calibration that was made with another model."""
        check_digest(self.document.model, model, self.path)

    def unused(self, tensors: list[str]) -> list[str]:
        """Layers that belong to none of these tensors."""
        used = {layer_name(t) for t in tensors}
        return sorted(set(self.layers) - used)


def unfinished(path: Path) -> FormatError:
    """The refusal of a state where a calibration is wanted."""
    return FormatError(
        "the state of an interrupted run, not a calibration",
        path=path,
        hint="finish it: its command with --resume",
        code="CALIBRATION-PARTIAL",
    )


def layer_name(name: str) -> str:
    """The layer of a weight or of an activation array: the name without ``.weight``."""
    return name.removesuffix(WEIGHT)


def model_digest(model: Model) -> str:
    """What tells two models apart: SHA-256 over the name, dtype, shape and first 4 KiB of every
    tensor, in order of the names. Training changes every tensor, and 4 KiB cost no second pass.
    """
    digest = hashlib.sha256()
    for t in sorted(model.tensors, key=lambda t: t.name.encode()):
        digest.update(json.dumps([t.name, t.dtype, list(t.shape)]).encode() + b"\n")
        digest.update(model.raw(t, 0, min(DIGEST_BYTES, t.nbytes)))
    return digest.hexdigest()


def check_digest(recorded: str | None, model: Model, path: Path) -> None:
    """Refuse a file that was made with another model than this one.

    Raises:
        UnsupportedError: the digests differ; a file without one fits any model.
    """
    if recorded is None:
        return
    found = model_digest(model)
    if recorded != found:
        raise UnsupportedError(
            "the calibration is of another model",
            path=path,
            found=f"digest {recorded[:16]}...",
            wanted=f"{found[:16]}..., of {model.path}",
            hint="calibrate with this model",
            code="CALIBRATION-MODEL",
        )


def calibration_parts(
    document: CalibrationDocument, arrays: Mapping[str, NDArray[Any]]
) -> Iterator[bytes]:
    """A calibration file, piece by piece; ``arrays`` are the tensors, named ``L/...``."""
    fields = {"schema": SCHEMA, **asdict(document)}
    if not document.partial:
        del fields[PARTIAL]
    for layer in fields["layers"].values():
        if not layer["transposed"]:  # so that files of most models are what they have always been
            del layer["transposed"]
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    header: dict[str, Any] = {"__metadata__": {ENTRY: text}}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # aligned
    at = 0
    for name in names:
        a = arrays[name]
        place = [at, at + a.nbytes]
        header[name] = {"dtype": DTYPES[a.dtype], "shape": list(a.shape), "data_offsets": place}
        at = place[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    start = text.encode()
    start += b" " * (-len(start) % 8)
    yield len(start).to_bytes(8, "little") + start
    for name in names:
        flat = arrays[name].reshape(-1)
        step = PART_BYTES // flat.itemsize
        for first in range(0, len(flat), step):
            part = flat[first : first + step]
            yield part.astype(part.dtype.newbyteorder("<"), copy=False).tobytes()


def read_state(
    path: Path, scratch: Scratch | None = None
) -> tuple[CalibrationDocument, dict[str, NDArray[Any]]]:
    """A calibration file, finished or not, and all its arrays; Gram matrices in ``scratch``.

    Raises:
        InputError: it cannot be read, or is not a calibration file.
    """
    model = open_safetensors(path)
    try:
        document = _document(model, path)
        arrays = {}
        for t in model.tensors:
            if t.dtype not in NUMPY:
                raise FormatError("impossible values in the calibration", path=path, tensor=t.name)
            values = np.frombuffer(model.raw(t, 0, t.nbytes), NUMPY[t.dtype]).reshape(t.shape)
            arrays[t.name] = scratch.keep(values) if scratch and "/gram." in t.name else values
        model.check_unchanged()
    finally:
        model.close()
    return document, arrays


def _document(model: SafetensorsModel, path: Path) -> CalibrationDocument:
    text = model.metadata.get(ENTRY)
    if text is None:
        raise FormatError(
            "not a calibration file", path=path, hint="make one with: qconvert calibrate"
        )
    shapes = {t.name: t.shape for t in model.tensors}
    described = strict_json(text.encode(), path)
    try:
        schema = described.pop("schema")
        if schema != SCHEMA:
            raise UnsupportedError("calibration", path=path, found=schema, wanted=SCHEMA)
        layers = {n: _layer(fields) for n, fields in described.pop("layers").items()}
        run = described.pop("run")
        run = None if run is None else TextRun(**run)
        document = CalibrationDocument(**described, layers=layers, run=run)
        good = _plausible_document(document) and all(
            _plausible(layer)
            and all(shapes.get(f"{name}/{kind}") == (layer.features,) for kind in CHANNELS)
            for name, layer in layers.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise FormatError("damaged calibration metadata", path=path) from e
    if not good:
        raise FormatError("impossible values in the calibration", path=path)
    return document


def _layer(fields: dict[str, Any]) -> LayerCalibration:
    output = fields.pop("output")
    return LayerCalibration(**fields, output=None if output is None else StaticParameters(**output))


def _plausible_document(document: CalibrationDocument) -> bool:
    observer, run = document.observer, document.run
    return (
        isinstance(observer, str)
        and len(observer) <= MAX_OBSERVER
        and observer.isidentifier()
        and _plausible_settings(document)
        and all(
            isinstance(entry["name"], str) and isinstance(entry["sha256"], str)
            for entry in document.inputs
        )
        and (document.model is None or isinstance(document.model, str))
        and isinstance(document.partial, bool)
        and isinstance(document.unreached, list)
        and all(isinstance(name, str) for name in document.unreached)
        and (run is None or _plausible_run(run))
    )


def _plausible_settings(document: CalibrationDocument) -> bool:
    settings = document.settings
    symmetric = settings.get("symmetric")
    ranges: list[LayerCalibration | StaticParameters] = list(document.layers.values())
    ranges += [layer.output for layer in document.layers.values() if layer.output]
    return (
        all(type(v) is float for k, v in settings.items() if k != "symmetric")
        and type(symmetric) is bool
        and not (symmetric and any(r.zero_point != 0 for r in ranges))
    )


def _plausible_run(run: TextRun) -> bool:
    numbers = (run.seqlen, run.seed, run.chunks, run.done, run.tokens, run.groups)
    return (
        all(_integer(n) and 0 <= n <= MAX_SAMPLES for n in numbers)
        and (run.nsamples is None or (_integer(run.nsamples) and 0 < run.nsamples <= MAX_SAMPLES))
        and run.done <= run.chunks
    )


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plausible(layer: LayerCalibration) -> bool:
    return (
        _integer(layer.samples)
        and _integer(layer.features)
        and 0 < layer.samples <= MAX_SAMPLES
        and 0 < layer.features <= MAX_FEATURES
        and isinstance(layer.transposed, bool)
        and _plausible_range(layer)
        and (layer.output is None or _plausible_range(layer.output))
    )


def _plausible_range(r: LayerCalibration | StaticParameters) -> bool:
    return (
        _integer(r.zero_point)
        and all(isinstance(f, float) for f in (r.low, r.high, r.scale))
        and -128 <= r.zero_point <= 127
        and math.isfinite(r.low)
        and math.isfinite(r.high)
        and MIN_SCALE < r.scale <= MAX_SCALE
    )
