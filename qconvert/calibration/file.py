"""Calibration files: static activation parameters, channel statistics and the state that made them,
as safetensors.

Per layer ``L`` the tensors ``L/minimum``, ``L/maximum`` and ``L/mean_square`` (float32, one value
a feature) are for reading; ``L/squares`` and ``L/state.*`` are exact and let two files be merged,
or an interrupted run go on. ``L/gram.high`` and ``L/gram.low`` (int64) are the upper triangle of
the Gram matrix, row after row, where one was asked for: a value is high · 2^-2 + low · 2^-64.
``L/fisher.*`` are the sums of `qconvert.calibration.fisher`, of tables of tokens too. The rest is
JSON in the metadata entry ``qconvert.calibration``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration import fixed_point
from qconvert.calibration.digest import check_digest
from qconvert.calibration.document import CalibrationDocument, FisherRun, LayerCalibration
from qconvert.calibration.fisher import (
    PREFIX,
    PRODUCT,
    USES,
    FinishedFisher,
    FisherStatistics,
    Sensitivity,
    is_gram,
    sensitivity_of,
)
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.safetensors_writer import CODES, array_parts
from qconvert.files.scratch import Scratch
from qconvert.files.strict_json import strict_json
from qconvert.geometry import row_length
from qconvert.model import Model, TensorInfo, layer_name

ENTRY = "qconvert.calibration"
SCHEMA = "qconvert.calibration/3"
CHANNELS = ("minimum", "maximum", "mean_square")
NUMPY = {name: CODES[name] for name in ("F32", "F64", "U16", "U32", "I64")}
_EXPERT = re.compile(r"\.experts\.\d+\.")


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

    @property
    def tables(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the matrices that are no layers, but looked up, where the file has
        Fisher information of them; by name.
        """
        run = self.document.fisher
        shapes = run.shapes if run else {}
        return {name: shape for name, shape in shapes.items() if name not in self.layers}

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

    def channels(self, layer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Largest magnitudes and mean squares of the input channels of a layer, (features,) each.

        Raises:
            FormatError: arrays that are not such, or not finite.
        """
        wanted = (self.layers[layer].features,)
        found = []
        for kind in CHANNELS:
            name = f"{layer}/{kind}"
            info = self._tensors.get(name)
            if info is None or (info.shape, info.dtype) != (wanted, "F32"):
                described = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise self._impossible(name, described, f"F32 {list(wanted)}")
            values = self._file.values(info, 0, info.size).astype(np.float32, copy=False)
            if not np.isfinite(values).all():
                raise self._impossible(name, "NaN or Inf", "finite numbers")
            found.append(values)
        low, high, squares = found
        return np.maximum(np.abs(low), np.abs(high)), squares

    def has_gram(self, tensor: str) -> bool:
        """Whether there is the Gram matrix of the inputs of the layer of a weight."""
        return f"{layer_name(tensor)}/gram.high" in self._tensors

    def gram(self, tensor: str) -> NDArray[np.float64] | None:
        """Xᵀ X of the inputs of the layer of a weight, (features, features), symmetric; to a
        unit in the last place.

        None where the file has none: it is there with ``calibrate --gram``.

        Raises:
            FormatError: arrays that are no such matrix.
        """
        name = layer_name(tensor)
        layer = self.layers.get(name)
        if layer is None or not self.has_gram(name):
            return None
        return self._symmetric(f"{name}/", layer.features)

    def sensitivity(self, tensor: str) -> Sensitivity | None:
        """D of a weight, in nats: the mean divergence of next tokens is 1/2 Σ D d² for errors d.

        Of an expert that no token reached, the mean over the experts of its layer.

        Returns:
            None where the file has none: it is there with ``calibrate --fisher``.

        Raises:
            FormatError: arrays that are no such sums.
        """
        names, run = self._informed(tensor)
        if not run or not names:
            return None
        found = sensitivity_of([self._fisher(name, run) for name in names], run.tokens)
        layer = self.find(tensor)
        return found.transposed() if layer is not None and layer.transposed else found

    def input_fisher(self, tensor: str) -> NDArray[np.float64] | None:
        """E[|g|² x x'] of a layer, x its input and g the gradient by its output, (features,
        features); of a table that is looked up, E[g g'], g the gradient by what was found there; of
        a tied matrix their sum. The mean over tokens, in nats.

        None as of `sensitivity`, and where the file was made without ``--gram``.

        Raises:
            FormatError: arrays that are no such matrix.
        """
        return self._moments(tensor, [f"{use}.input." for use in USES], 1)

    def output_fisher(self, tensor: str) -> NDArray[np.float64] | None:
        """E[g g'] of a layer, g the gradient by its output, (outputs, outputs); see `input_fisher`.

        None for a table that is only looked up too, and for a matrix of very many outputs.

        Raises:
            FormatError: arrays that are no such matrix.
        """
        return self._moments(tensor, [f"{PRODUCT}.output."], 0)

    def has_input_fisher(self, tensor: str) -> bool:
        """Whether there is `input_fisher`."""
        return self._has_moments(tensor, [f"{use}.input." for use in USES])

    def has_output_fisher(self, tensor: str) -> bool:
        """Whether there is `output_fisher`."""
        return self._has_moments(tensor, [f"{PRODUCT}.output."])

    def outputs(self, tensor: str) -> int:
        """Rows of the matrix of a layer that there is Fisher information of."""
        names, run = self._informed(tensor)
        assert run
        return run.shapes[names[0]][0]

    def uses(self, tensor: str) -> tuple[bool, bool]:
        """Whether there is Fisher information of a matrix as one that multiplies, and as a table
        that is looked up.
        """
        names, run = self._informed(tensor)
        product, lookup = (
            bool(run) and any(f"{name}/{PREFIX}{use}.first" in self._tensors for name in names)
            for use in USES
        )
        return product, lookup

    @property
    def has_fisher(self) -> bool:
        """Whether the file says how much the errors of matrices matter."""
        return self.document.fisher is not None

    def _informed(self, tensor: str) -> tuple[list[str], FisherRun | None]:
        """The matrices whose mean stands for a tensor's Fisher information."""
        name, run = layer_name(tensor), self.document.fisher
        if run is None or name in run.shapes:
            return [name], run
        if name not in self.document.unreached or not _EXPERT.search(name):
            return [], run
        kind = _EXPERT.sub(".experts.*.", name)
        return [n for n in run.shapes if _EXPERT.sub(".experts.*.", n) == kind], run

    def _fisher(self, name: str, run: FisherRun) -> FisherStatistics:
        """The sums of a matrix."""
        arrays: dict[str, NDArray[Any]] = {}
        for use in USES:
            for kind in ("rows", "columns", "first"):
                key = f"{PREFIX}{use}.{kind}"
                info = self._tensors.get(f"{name}/{key}")
                if info is not None and info.dtype in NUMPY:
                    raw = self._file.raw(info, 0, info.nbytes)
                    arrays[key] = np.frombuffer(raw, NUMPY[info.dtype]).reshape(info.shape)
        try:
            return FinishedFisher(run.shapes[name], arrays).restored()
        except (KeyError, ValueError, TypeError) as e:
            raise self._impossible(f"{name}/fisher", f"{e}", "exact sums") from e

    def _moments(self, tensor: str, kinds: list[str], side: int) -> NDArray[np.float64] | None:
        """Second moments of a layer, summed over some uses."""
        names, run = self._informed(tensor)
        total: NDArray[np.float64] | None = None
        for name in names if run else ():
            assert run
            for kind in kinds:
                at = f"{name}/{PREFIX}{kind}"
                if f"{at}gram.high" in self._tensors:
                    found = self._symmetric(at, run.shapes[name][side])
                    found /= run.tokens * len(names)
                    total = found if total is None else total + found
        return total

    def _has_moments(self, tensor: str, kinds: list[str]) -> bool:
        """Whether there are second moments of a layer."""
        names, run = self._informed(tensor)
        ends = [f"{PREFIX}{kind}gram.high" for kind in kinds]
        return bool(run) and any(f"{n}/{end}" in self._tensors for n in names for end in ends)

    def _symmetric(self, at: str, n: int) -> NDArray[np.float64]:
        """A Gram matrix whose arrays have names that begin so."""
        found = np.empty((n, n))
        parts = []
        for kind in ("gram.high", "gram.low"):
            info = self._tensors.get(f"{at}{kind}")
            if info is None or (info.shape, info.dtype) != ((n * (n + 1) // 2,), "I64"):
                described = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
                raise self._impossible(f"{at}{kind}", described, f"I64 [{n * (n + 1) // 2}]")
            parts.append(info)
        start = 0
        for k in range(n):
            high, low = (
                np.frombuffer(self._file.raw(t, 8 * start, 8 * (n - k)), "<i8") for t in parts
            )
            try:
                fixed_point.check(high, low)
            except ValueError as e:
                raise self._impossible(f"{at}gram", f"row {k}", f"{e}, see there") from e
            if high[0] < 0:
                raise self._impossible(f"{at}gram.high", f"{high[0]}", "no negative square")
            found[k, k:] = found[k:, k] = fixed_point.wide(high, low)
            start += n - k
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

    def check(self, tensor: TensorInfo, layer: str | None = None) -> None:
        """Refuse a layer whose number of features is not that of the weight's.

        Args:
            layer: that has the tensor as its weight, where the name does not say.
        """
        found = self.layers[layer or layer_name(tensor.name)]
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


def calibration_parts(
    document: CalibrationDocument, arrays: Mapping[str, NDArray[Any]]
) -> Iterator[bytes]:
    """A calibration file, piece by piece; ``arrays`` are the tensors, named ``L/...``."""
    fields = {"schema": SCHEMA, **document.to_json()}
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return array_parts({ENTRY: text}, arrays)


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
            arrays[t.name] = scratch.keep(values) if scratch and is_gram(t.name) else values
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
        document = CalibrationDocument.from_json(described)
        good = document.plausible() and all(
            shapes.get(f"{name}/{kind}") == (layer.features,)
            for name, layer in document.layers.items()
            for kind in CHANNELS
        )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise FormatError("damaged calibration metadata", path=path) from e
    if not good:
        raise FormatError("impossible values in the calibration", path=path)
    return document
