"""Recorded activations: files of arrays (samples, features), each named like its layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.document import MAX_FEATURES
from qconvert.errors import InputError, UnsupportedError, WeightError
from qconvert.geometry import TILE_VALUES
from qconvert.model import Model, TensorInfo, layer_name

BATCH_ROWS = 32  # rows of one step of the moving average


def widths(files: Sequence[Model]) -> dict[str, int]:
    """Features of each layer, in the order of the files.

    Raises:
        InputError: an array that is no activations, two widths of a layer, or no array at all.
    """
    found: dict[str, int] = {}
    for file in files:
        for tensor in file.tensors:
            check_activations(tensor, file.path)
            features = tensor.shape[1]
            wanted = found.setdefault(layer_name(tensor.name), features)
            if features != wanted:
                raise UnsupportedError(
                    "activations of one layer differ in width",
                    path=file.path,
                    tensor=tensor.name,
                    found=f"{features:,} features",
                    wanted=f"{wanted:,}, as in the files before",
                )
    if not found:
        raise InputError("no activations in the input", path=files[0].path)
    return found


def check_activations(tensor: TensorInfo, path: Path) -> None:
    """Refuse an array that is not (samples, features) of floats, or has no sample."""
    if len(tensor.shape) == 2 and tensor.shape[1] > MAX_FEATURES:
        raise UnsupportedError(
            "too many features",
            path=path,
            tensor=tensor.name,
            found=f"{tensor.shape[1]:,}",
            wanted=f"at most {MAX_FEATURES:,} values of a row",
        )
    if len(tensor.shape) != 2 or not tensor.size or not tensor.floating:
        raise UnsupportedError(
            "activations",
            path=path,
            tensor=tensor.name,
            found=f"{tensor.dtype} of shape {list(tensor.shape)}",
            wanted="a floating array (samples, features)",
        )


def batches(tensor: TensorInfo) -> int:
    """How many `read_batches` gives."""
    return -(-tensor.shape[0] // _batch_rows(tensor))


def _batch_rows(tensor: TensorInfo) -> int:
    return max(1, min(BATCH_ROWS, TILE_VALUES // tensor.shape[1]))


def read_batches(
    model: Model, tensor: TensorInfo, path: Path, first: int = 0
) -> Iterator[NDArray[np.float32]]:
    """The rows of an activation array, 32 at a time or fewer when they are long.

    Args:
        first: number of the batch to begin with.

    Raises:
        WeightError: a value is NaN or Inf, named by its sample.
    """
    samples, features = tensor.shape
    step = _batch_rows(tensor)
    for row in range(first * step, samples, step):
        stop = min(row + step, samples)
        with np.errstate(over="ignore"):
            batch = model.values(tensor, row * features, stop * features).astype(np.float32)
        batch = batch.reshape(-1, features)
        finite = np.isfinite(batch).all(axis=1)
        if not finite.all():
            raise WeightError(
                f"activations of sample {row + int(np.argmin(finite)):,} are NaN or Inf",
                path=path,
                tensor=tensor.name,
                hint="record them again; one such value would spoil every range",
            )
        yield batch
