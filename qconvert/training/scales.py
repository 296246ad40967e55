"""Weights whose codes stay while their scales are trained, and gains of norms beside them.

Of every tensor that takes part a module computes with what its file would hold: scales, zero points
and gains rounded to where the file has them. What is trained begins at 0: logarithms of factors of
the scales and gains, and how far zero points have moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Encoding, Stored
from qconvert.files.qblk_writer import packed
from qconvert.kernels.arithmetic import SCALE_NUMPY, stored_zero_points, zero_steps
from qconvert.kernels.records import F32, Bytes
from qconvert.model import TensorInfo
from qconvert.running.device import CPU
from qconvert.stages.norm_gains import Norm
from qconvert.training.fixed import held
from qconvert.training.groups import Groups
from qconvert.training.weights import first_parameters, stored_parameters

ZERO_POINT = "zero_point"  # a kind of what is trained
QUARTER = 4  # of the codes: how far a weight is from its zero point, about, in codes


class TunedScales:
    """A weight as its codes and its scales of now decode it.

    Codes with a scale for each group have a factor for each, and where there are zero points that
    have steps between codes, one of them too; all others have a factor for each row.

    Attributes:
        log: of the factors, (groups,) or (rows,).
        zero: how far zero points have moved, in codes, (groups,); None where they stay.
    """

    def __init__(self, stored: Stored, device: Any = CPU) -> None:
        self.base = held(stored)
        encoding = stored.encoding
        self.affine = encoding if isinstance(encoding, Affine) else None
        scales, zeros = self.sizes(encoding, stored.shape)
        self.log: Any = torch.zeros(scales, requires_grad=True, device=device)
        self.zero: Any = None
        if zeros:
            self.zero = torch.zeros(zeros, requires_grad=True, device=device)

    @staticmethod
    def sizes(encoding: Encoding, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many factors and zero points are trained."""
        if not isinstance(encoding, Affine):
            return math.prod(shape) // encoding.columns(shape), 0
        count = encoding.groups(shape)
        moves = not encoding.symmetric and zero_steps(encoding.bits) > 1
        return count, count if moves else 0

    def parameters(self) -> dict[str, Any]:
        """What is trained, by the names of their kinds."""
        found = {"scale": self.log, ZERO_POINT: self.zero}
        return {kind: p for kind, p in found.items() if p is not None}

    def unit(self, kind: str) -> float:
        """How far something of a kind has to move to change weights by about their own size."""
        if kind != ZERO_POINT:
            return 1.0
        assert self.affine
        return float(2**self.affine.bits) / QUARTER

    def segments(self) -> dict[str, Bytes]:
        """The segments that are not the file's any more, whole.

        Raises:
            WeightError: a factor is not finite.
        """
        factors = self.log.detach().exp().numpy(force=True)
        if not self.affine:
            return self.base.encoding.rescaled(self.base, 0, factors)
        scale, zero = first_parameters(self.base)
        moved = None if self.affine.symmetric else zero
        if self.zero is not None:
            moved = zero + self.zero.detach().numpy(force=True)
        info = TensorInfo(self.base.name, self.base.shape, self.affine.name, 0)
        found = stored_parameters(scale * factors, moved, self.affine, info)
        scale = np.where(scale == 0, scale, found.scale)
        segments: dict[str, Bytes] = {
            "scales": scale.astype(SCALE_NUMPY[self.affine.scale_dtype]).tobytes()
        }
        if self.zero is not None:
            steps = stored_zero_points(found.zero, self.affine)
            segments["zero_points"] = packed(steps, self.affine.zero_point_bits)
        return segments

    def applied(self, stored: Stored) -> Stored:
        """A tensor on the grid of ``base``, whatever its codes, with the scales of now."""
        return replace(stored, read=partial(_read, stored, self.segments()))

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """What the file decodes to, in the shape of the weight that it stands for."""
        return self.multiplied(weight, self.base, None)

    def multiplied(self, weight: torch.Tensor, stored: Stored, inside: Any) -> torch.Tensor:
        """What a tensor on the grid of ``base`` decodes to with the scales of now.

        Args:
            weight: that was rounded to it, and gets a gradient if it wants one.
            inside: which weights are not clipped; None for all.
        """
        found = self.applied(stored)
        whole = found.values(0, weight.numel()).reshape(tuple(weight.shape))
        values = torch.from_numpy(whole).to(weight.device)
        step = None
        if self.affine:
            step = torch.from_numpy(first_parameters(found)[0]).to(weight.device)
        done: torch.Tensor = _Scaled.apply(
            *(weight, self.log, self.zero, values, inside, step, self.affine)
        )
        return done


def _read(stored: Stored, changed: Mapping[str, Bytes], kind: str, start: int, size: int) -> bytes:
    if kind not in changed:
        return stored.read(kind, start, size)
    return bytes(changed[kind][start : start + size])


class _Scaled(torch.autograd.Function):  # type: ignore[misc]
    """Decoded weights w' = g·s·(u - z), with dw'/d(log g) = w' and dw'/dz = -g·s; of what was
    rounded, dw'/dw = g where it is not clipped. Rounding is passed straight through.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        log: torch.Tensor,
        zero: Any,
        values: torch.Tensor,
        inside: Any,
        step: Any,
        affine: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(log, values, inside, step)
        ctx.affine, ctx.moves = affine, zero is not None
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        log, values, inside, step = ctx.saved_tensors
        by_weight, by_zero = None, None
        if ctx.affine is None:
            by_log = (gradient * values).reshape(len(log), -1).sum(1)
            wide = log.exp()[:, None].expand(-1, gradient.numel() // len(log))
            factor = wide.reshape(gradient.shape)
        else:
            groups = Groups(ctx.affine, gradient.shape)
            by_log = groups.sums(gradient * values)
            by_zero = -groups.sums(gradient) * step if ctx.moves else None
            factor = groups.spread(log.exp(), gradient.shape) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[0]:
            by_weight = gradient * factor
            by_weight = by_weight if inside is None else by_weight * inside
        return by_weight, by_log, by_zero, None, None, None, None


class TunedGains:
    """The gains of a norm, times a factor each, in the dtype of the file.

    Attributes:
        log: of the factors, (n,).
    """

    def __init__(self, norm: Norm, device: Any = CPU) -> None:
        self.norm = norm
        self.log = torch.zeros(len(norm.stored), requires_grad=True, device=device)

    def parameters(self) -> dict[str, Any]:
        """See `TunedScales.parameters`."""
        return {"gain": self.log}

    def unit(self, kind: str) -> float:
        """See `TunedScales.unit`."""
        return 1.0

    def segments(self) -> dict[str, Bytes]:
        """See `TunedScales.segments`."""
        return {"data": self.norm.tuned(self.log.detach().exp().numpy(force=True))}

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        data = self.segments()["data"]
        values: F32 = np.frombuffer(data, SCALE_NUMPY[self.norm.dtype]).astype(np.float32)
        stored = torch.from_numpy(values).to(weight.device)
        found: torch.Tensor = _Gained.apply(self.log, stored, self.norm.added)
        return found


class _Gained(torch.autograd.Function):  # type: ignore[misc]
    """A stored vector v, whose gains are v + added: dv/d(log of their factor) = v + added."""

    @staticmethod
    def forward(ctx: Any, log: torch.Tensor, values: torch.Tensor, added: float) -> torch.Tensor:
        ctx.save_for_backward(values)
        ctx.added = added
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (values,) = ctx.saved_tensors
        return gradient * (values + ctx.added), None, None
