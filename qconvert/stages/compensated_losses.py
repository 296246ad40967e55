"""What tensors are predicted to lose where their codes make up for each other's errors.

A budget is decided by 1/2 Σ D d² of codes rounded to nearest, which says too much of these: their
errors are larger, and lie where they cost little. What they cost is tr(O E H E'), E the errors of a
tensor, H = E[|g|² x x'] and O = E[g g'] of its layer (Kronecker-factored, as in YAQA, Tseng et al.,
2025). A sample of rows is encoded both ways; a tensor is predicted to lose that part of its loss by
nearest codes that is left of this cost. H and O are damped as for the rounding, for codes that were
chosen by a sample of text fit that sample better than any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert.calibration.file import Calibration
from qconvert.codecs import codec_of
from qconvert.codecs.codec import Facts
from qconvert.codecs.compensation import ROW_DAMPING
from qconvert.codecs.source import rows_of
from qconvert.geometry import tiles
from qconvert.kernels.records import F64
from qconvert.model import Companion, Model, SourceFile, TensorInfo
from qconvert.progress import Progress
from qconvert.stages.parallel import Workers
from qconvert.stages.plan import PlannedTensor
from qconvert.stages.quantize_options import QuantizeOptions
from qconvert.stages.rounding import Roundings
from qconvert.stages.sensitivities import encoded, sensitivity_of
from qconvert.stages.target import Prepared

SAMPLE = 1 << 20  # weights of a tensor that are encoded both ways, whole rows
Rows = NDArray[np.int64]


class SampledModel:
    """A `Model` of one matrix: some rows of one of another model.

    Args:
        model, tensor: the matrix, (R, C).
        rows: of it, rising.
    """

    def __init__(self, model: Model, tensor: TensorInfo, rows: Rows) -> None:
        self.path: Path = model.path
        self.kind = model.kind
        self.metadata = model.metadata
        self.sources: tuple[SourceFile, ...] = model.sources
        self.companions: tuple[Companion, ...] = model.companions
        shape = (len(rows), tensor.shape[1])
        self.tensor = TensorInfo(tensor.name, shape, "F32", 4 * shape[0] * shape[1])
        self.tensors: tuple[TensorInfo, ...] = (self.tensor,)
        columns = shape[1]
        found = [model.values(tensor, r * columns, (r + 1) * columns) for r in rows.tolist()]
        self._values = np.concatenate(found).astype(np.float32)

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """See `Model.values`."""
        return self._values[start:stop]

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """See `Model.raw`."""
        return self._values.astype("<f4", copy=False).tobytes()[offset : offset + size]

    def check_unchanged(self) -> None:
        pass  # the values are here

    def close(self) -> None:
        pass  # the model belongs to whoever opened it


def sampled_rows(tensor: TensorInfo, most: int) -> Rows:
    """Rows of a matrix (R, C) that stand for all, rising; all where they are few."""
    rows, columns = tensor.shape
    count = min(rows, max(most // max(columns, 1), 1))
    return np.arange(count, dtype=np.int64) * rows // count


def cost(errors: F64, gram: F64, output: F64) -> float:
    """tr(O E H E') of errors E (R, C), H (C, C), and O (R, R) or its diagonal (R,)."""
    pulled = errors * output[:, None] if output.ndim == 1 else output @ errors
    return float(np.vdot(pulled, errors @ gram))


@dataclass(frozen=True, slots=True)
class CompensatedLosses:
    """Predicts them for a conversion that is planned.

    Attributes:
        prepared: the conversion.
        calibration: with Fisher information.
    """

    prepared: Prepared
    options: QuantizeOptions
    calibration: Calibration
    roundings: Roundings

    def of(self, losses: Mapping[str, float], progress: Progress, threads: int) -> dict[str, float]:
        """Losses by tensor.

        Args:
            losses: in nats, of nearest codes.

        Raises:
            WeightError, FormatError: as in the conversion.
        """
        compensated = set(self.roundings.compensated)
        planned = [
            p
            for p in self.prepared.plan
            if p.tensor.name in compensated and losses.get(p.tensor.name)
        ]
        found = dict(losses)
        progress.begin("predict what is left", sum(p.tensor.nbytes for p in planned), "bytes")
        # Or the bits of factors would depend on the number of BLAS's threads.
        with threadpool_limits(1, "blas"), Workers(threads) as workers:
            for p, left in zip(planned, workers.map(self._left, planned), strict=True):
                found[p.tensor.name] *= left
                progress.advance(p.tensor.nbytes, p.tensor.name)
        progress.end()
        return found

    def _left(self, p: PlannedTensor) -> float:
        """The part of a tensor's loss that compensated codes leave."""
        name, rows = p.tensor.name, sampled_rows(p.tensor, SAMPLE)
        rounder = self.roundings.rounder(name, rows=rows)
        assert rounder
        gram = rounder.factors().gram.astype(np.float64)
        output = self.roundings.output(name, rows)
        if output is not None:
            damped = ROW_DAMPING * float(output.diagonal().mean())
            output = output + damped * np.eye(len(output))
        else:
            d = sensitivity_of(self.calibration, self.prepared.model, p.tensor)
            if d is None:
                return 1.0
            output = d.rows.sum(axis=0)[rows]
        sample = SampledModel(self.prepared.model, p.tensor, rows)
        nearest, best = (
            cost(self._errors(p, sample, facts), gram, output)
            for facts in (self._facts(p), replace(self._facts(p), rounder=rounder))
        )
        return min(best / nearest, 1.0) if nearest > 0 else 1.0

    def _facts(self, p: PlannedTensor) -> Facts:
        """As the conversion has them, but for the rounding."""
        weighting = self.calibration if self.options.weighting else None
        layer = self.roundings.layers.get(p.tensor.name)
        return Facts(
            self.options.range,
            partial(weighting.mean_squares, layer) if weighting and layer else lambda _: None,
            self.prepared.importance(p.tensor),
            tables=True,
        )

    def _errors(self, p: PlannedTensor, sample: SampledModel, facts: Facts) -> F64:
        """What the rows of a sample lose, (R, C)."""
        assert p.scheme
        tensor = sample.tensor
        stored = encoded(codec_of(p.scheme).encoder(sample, tensor, p.scheme, facts))
        rows, columns = tensor.shape
        found = np.empty(tensor.size)
        for tile in tiles(rows, columns):
            weights = rows_of(sample, tensor, tile).astype(np.float64)
            lost = stored.encoding.coded(stored, tile).values - weights
            found[tile.start : tile.stop] = lost.ravel()
        return found.reshape(rows, columns)
