"""Groups of weights that share a scale, as torch adds over them."""

from __future__ import annotations

import math

import torch

from qconvert.codecs.affine.encoding import Affine
from qconvert.training.weights import group_length


class Groups:
    """The groups of a tensor that share a scale."""

    def __init__(self, encoding: Affine, shape: torch.Size) -> None:
        self.encoding = encoding
        self.length = group_length(encoding, tuple(shape))

    @property
    def gradient_scale(self) -> float:
        bits, symmetric = self.encoding.bits, self.encoding.symmetric
        top = (1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1
        return 1 / math.sqrt(self.length * top)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Of the values of each group, (G,)."""
        if self.encoding.granularity == "tensor":
            return values.sum().reshape(1)
        rows = values.reshape(-1, self.encoding.row_length)
        missing = self.encoding.row_groups * self.length - rows.shape[1]
        return torch.nn.functional.pad(rows, (0, missing)).reshape(-1, self.length).sum(1)

    def spread(self, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """One of each group (G,) for every weight, in their shape."""
        if self.encoding.granularity == "tensor":
            return values.expand(shape)
        rows = values.reshape(-1, self.encoding.row_groups).repeat_interleave(self.length, 1)
        return rows[:, : self.encoding.row_length].reshape(shape)
