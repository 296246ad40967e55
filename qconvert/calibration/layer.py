"""All that is observed of one layer, and its state as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.calibration.exact import ExactSum
from qconvert.calibration.gram import GramMatrix
from qconvert.calibration.observers import (
    F32,
    F64,
    Arrays,
    ChannelStatistics,
    Observer,
    ObserverSettings,
)

OBSERVER_BYTES = 6 << 19  # of the nmse observer; histograms take 1 << 19
CHANNEL_BYTES = 168  # of an exact sum and two extremes


class LayerStatistics:
    """Input, per tensor and per channel, and where asked for the output of a linear layer.

    Memory is bounded by `size`, whatever the number of batches. But for the moving average the
    state is the same bits for any split and order of the same rows.

    Args:
        features: values of an input row.
        settings: of the observers.
        norms: squared, of the weight's columns, (features,), for the input's observer.
        gram: whether to keep the Gram matrix of the input.

    Attributes:
        input, output: observers of the ranges; the second once an output was seen.
        channels: statistics of the input's features.
        gram: Gram matrix of the input, or None.
    """

    def __init__(
        self,
        features: int,
        settings: ObserverSettings,
        norms: F64 | None = None,
        *,
        gram: bool = False,
    ) -> None:
        self.features = features
        self.settings = settings
        self.input = settings.make(norms)
        self.output: Observer | None = None
        self.channels = ChannelStatistics(features)
        self.gram = GramMatrix(features) if gram else None

    @staticmethod
    def size(features: int, *, outputs: bool = False, gram: bool = False) -> int:
        """Bytes that the statistics of a layer take at most."""
        size = features * CHANNEL_BYTES + OBSERVER_BYTES * (2 if outputs else 1)
        return size + (GramMatrix.size(features) if gram else 0)

    def update(self, batch: F32) -> None:
        """Take in rows of input, (samples, features), finite.

        Raises:
            OverflowError: beyond what a Gram matrix holds.
        """
        self.input.update(batch)
        self.channels.update(batch)
        if self.gram is not None:
            self.gram.update(batch)

    def update_output(self, batch: F32) -> None:
        """Take in rows of output, finite."""
        if self.output is None:
            self.output = self.settings.make()
        self.output.update(batch)

    def merge(self, other: LayerStatistics) -> None:
        """Take in all that another one has seen.

        Raises:
            UsageError: a moving average.
            ValueError: another width, or only one has outputs or a Gram matrix.
        """
        if self.features != other.features or (self.output is None) != (other.output is None):
            raise ValueError("statistics of different layers")
        if (self.gram is None) != (other.gram is None):
            raise ValueError("statistics of different layers")
        self.input.merge(other.input)
        self.channels.merge(other.channels)
        if self.output is not None and other.output is not None:
            self.output.merge(other.output)
        if self.gram is not None and other.gram is not None:
            self.gram.merge(other.gram)

    def arrays(self) -> Arrays:
        """Its state, and the channel statistics for readers."""
        squares, first = self.channels.squares.packed()
        found: Arrays = {
            "minimum": self.channels.low,
            "maximum": self.channels.high,
            "mean_square": self.channels.mean_square,
            "squares": squares,
            "state.first": np.array([first, self.channels.samples], np.int64),
        }
        found |= {f"state.input.{k}": a for k, a in self.input.state().items()}
        if self.output is not None:
            found |= {f"state.output.{k}": a for k, a in self.output.state().items()}
        if self.gram is not None:
            found["gram.high"], found["gram.low"] = self.gram.packed()
        return found

    @classmethod
    def restored(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        features: int,
        settings: ObserverSettings,
        norms: F64 | None = None,
    ) -> LayerStatistics:
        """The inverse of `arrays`; ``norms`` as of the class, for what is yet to come.

        Raises:
            KeyError, ValueError, IndexError, TypeError: arrays that no layer has made.
        """
        prefix = "state.output."
        outputs = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        found = cls(features, settings, norms)
        first, samples = arrays["state.first"].tolist()
        low, high = arrays["minimum"], arrays["maximum"]
        if samples < 1 or low.shape != (features,) or high.shape != (features,):
            raise ValueError("channel statistics")
        if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
            raise ValueError("channel extremes")
        squares = ExactSum.unpacked(arrays["squares"], first)
        if squares.limbs.shape[1] != features:
            raise ValueError("sums of squares")
        found.channels.samples = samples
        found.channels.low[:], found.channels.high[:] = low, high
        found.channels.squares = squares
        if not np.array_equal(found.channels.mean_square, arrays["mean_square"]):
            raise ValueError("sums of squares that are not those of the mean squares")
        prefix = "state.input."
        inputs = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
        found.input.restore(inputs)
        if outputs:
            found.output = settings.make()
            found.output.restore(outputs)
        if "gram.high" in arrays:
            gram = arrays["gram.high"], arrays["gram.low"]
            found.gram = GramMatrix.unpacked(*gram, features)
        return found
