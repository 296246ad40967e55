"""What is known of the inputs of layers, by a calibration or an importance matrix of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.file import ENTRY, Calibration
from qconvert.errors import InputError, UsageError
from qconvert.files import OpenModel
from qconvert.files.imatrix import Imatrix, read_imatrix
from qconvert.report import InputLayer, InputsView
from qconvert.stages.grouping import matches

HOTTEST = 3  # channels that are named
IMATRIX = "imatrix"  # general.type of such a GGUF file


def inputs_view(path: Path, model: OpenModel, names: tuple[str, ...]) -> InputsView | None:
    """The view of an opened file; None of one that holds weights.

    Raises:
        InputError: it is a calibration or an importance matrix, and a bad one.
        UsageError: a name matches no layer.
    """
    if model.kind == "safetensors" and ENTRY in model.metadata:
        with Calibration(path) as calibration:
            return _view("calibration", dict(_facts(calibration)), _layers(calibration), names)
    if model.kind == "gguf" and model.metadata.get("general.type") == IMATRIX:
        return imatrix_view(read_imatrix(path), names)
    return None


def older_imatrix(path: Path, refused: InputError) -> Imatrix:
    """The importance matrix in a file without a magic that was not to be opened as a model.

    Raises:
        InputError: ``refused``, where it is no such thing.
    """
    if path.is_dir():
        raise refused
    try:
        return read_imatrix(path)
    except InputError:
        raise refused from None


def imatrix_view(imatrix: Imatrix, names: tuple[str, ...]) -> InputsView:
    """The view of an importance matrix.

    Raises:
        UsageError: a name matches no layer.
    """
    facts = {"texts": ", ".join(imatrix.datasets)} if imatrix.datasets else {}
    if imatrix.chunk_count is not None:
        facts["chunks"] = f"{imatrix.chunk_count:,}"
    rows = (_channels(name, imatrix.weights[name]) for name in imatrix.weights)
    return _view("imatrix", facts, rows, names)


def _view(
    kind: str, facts: dict[str, str], layers: Iterator[InputLayer], names: tuple[str, ...]
) -> InputsView:
    every = list(layers)
    for rank, layer in enumerate(sorted(every, key=lambda x: -x.mean_square), 1):
        layer.rank = rank
    for name in names:
        if not any(matches(layer.name, name) for layer in every):
            raise UsageError(f"no layer matches '{name}'")
    shown = [x for x in every if not names or any(matches(x.name, name) for name in names)]
    return InputsView(kind, facts, shown, len(every))


def _facts(calibration: Calibration) -> Iterator[tuple[str, str]]:
    document = calibration.document
    yield "observer", calibration.observer
    yield "inputs", ", ".join(entry["name"] for entry in document.inputs if "name" in entry)
    if run := document.run:
        yield "text", f"{run.tokens:,} tokens in {run.chunks:,} pieces of {run.seqlen:,}"
    if document.fisher:
        yield "Fisher", f"of {len(document.fisher.shapes):,} matrices"
    if document.unreached:
        yield "no token", ", ".join(document.unreached)


def _layers(calibration: Calibration) -> Iterator[InputLayer]:
    for name, layer in calibration.layers.items():
        absmax, squares = calibration.channels(name)
        row = _channels(name, squares, absmax)
        row.samples = layer.samples
        row.low, row.high = layer.input.low, layer.input.high
        row.scale, row.zero_point = layer.input.scale, layer.input.zero_point
        yield row


def _channels(name: str, squares: NDArray[Any], absmax: NDArray[Any] | None = None) -> InputLayer:
    """Of the mean squares of all channels, and their largest magnitudes where those are known."""
    wide = squares.astype(np.float64).ravel()
    sizes = np.sqrt(wide) if absmax is None else absmax.astype(np.float64)
    middle = float(np.median(sizes))
    order = np.argsort(-sizes, kind="stable")[:HOTTEST]
    return InputLayer(
        name,
        features=len(wide),
        spread=float(sizes[order[0]]) / middle if middle > 0 else None,
        hottest=[int(i) for i in order],
        mean_square=float(wide.mean()),
    )
