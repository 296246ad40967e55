"""The matrix that kernels and products are measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.affine.encoder import planned
from qconvert.encoding import AffineEncoding
from qconvert.errors import InputError, UsageError
from qconvert.files import open_model
from qconvert.geometry import TILE_VALUES, spans_tiles, tiles
from qconvert.kernels.arithmetic import level_steps, to_groups
from qconvert.kernels.records import U8, Bytes, LevelCode, LevelSteps, Parameters
from qconvert.model import TensorInfo
from qconvert.ranges import RangeMethod, default_method
from qconvert.schemes import AffineScheme

F32 = NDArray[np.float32]
MAX_VALUES = 1 << 24  # taken of a file's largest matrix


@dataclass(frozen=True, slots=True)
class Weights:
    """A float32 matrix (N, K) and what to call it."""

    label: str
    values: F32

    def tiles(self) -> list[F32]:
        """The pieces that a conversion works on."""
        flat = self.values.ravel()
        return [
            flat[t.start : t.stop].reshape(t.rows, t.columns) for t in tiles(*self.values.shape)
        ]


def gaussian(shape: tuple[int, int]) -> Weights:
    """Normal deviates as large as weights usually are."""
    values = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
    return Weights(f"{shape[0]}x{shape[1]} Gaussian", values)


def from_file(path: Path) -> Weights:
    """The largest matrix of a file, or its first 16 M values.

    Raises:
        InputError: the file has no matrix.
    """
    model = open_model(path)
    try:
        matrices = [t for t in model.tensors if len(t.shape) == 2 and t.size]
        if not matrices:
            raise InputError("no matrix to measure with", path=path)
        tensor = max(matrices, key=lambda t: t.size)
        columns = tensor.shape[1]
        rows = min(tensor.shape[0], max(1, MAX_VALUES // columns))
        values = model.values(tensor, 0, rows * columns).astype(np.float32)
        return Weights(f"{tensor.name} {rows}x{columns}", values.reshape(rows, columns))
    finally:
        model.close()


@dataclass(frozen=True, slots=True)
class Affine:
    """An affine scheme on a matrix; asymmetric where the tool would decide, the costlier."""

    name: str
    encoding: AffineEncoding
    method: RangeMethod

    def encode(self, x: F32) -> tuple[Parameters, Bytes]:
        """Parameters and stored codes of whole rows."""
        groups, counts = to_groups(x, self.encoding.block)
        parameters = kernels.fit(groups, self.encoding, self.method, counts)
        return parameters, kernels.encode_rows(x, self.encoding, parameters).segments["codes"]


def affine(weights: Weights, scheme: AffineScheme, method: RangeMethod | None) -> Affine:
    """The scheme with its parameters for these weights.

    Raises:
        UsageError: one scale a tensor, or rows longer than a tile, which has no independent
            pieces.
    """
    shape = weights.values.shape
    if scheme.granularity == "tensor" or spans_tiles(shape[1]):
        raise UsageError(
            f"bench measures schemes per channel and block, on rows of at most {TILE_VALUES:,}",
            found=f"{scheme.name}, {shape[1]:,} columns",
        )
    resolved = scheme if scheme.symmetric is not None else scheme.resolved(False)
    encoding = replace(
        planned(resolved, TensorInfo("", shape, "F32", weights.values.nbytes)),
        scale_dtype="F16" if scheme.block else "F32",
    )
    return Affine(scheme.name, encoding, method or default_method(scheme.bits))


def encoded_levels(x: F32, code: LevelCode) -> tuple[U8, LevelSteps]:
    """Packed codes of whole rows, and their steps."""
    stored = kernels.levels_encode(x, code).segments
    step = np.frombuffer(stored["scales"], np.uint8).reshape(len(x), -1)
    packed = np.frombuffer(stored["codes"], np.uint8)
    return packed, level_steps(step, stored["row_scales"], code)
