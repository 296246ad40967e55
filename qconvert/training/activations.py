"""Inputs of linear layers as the integer path will have them: formats/schemes/SPEC.md section 7.

The arithmetic is that of `qconvert.kernels.activations` in torch, bit for bit, so that gradients
pass and any device does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qconvert.calibration.grid import StaticRange, static_range
from qconvert.calibration.observers import EmaObserver, MinMaxObserver
from qconvert.errors import UsageError, WeightError
from qconvert.kernels.activations import DynamicInput, StaticInput

OBSERVERS = ("ema", "minmax")
KINDS = ("dynamic", "dynamic_asym", "static")


class FakeInput(torch.nn.Module):  # type: ignore[misc]
    """Signed bytes of a layer's input, times their scale.

    Gradients pass straight through the rounding; where a static range cuts a value off, none does.
    Scales of dynamic ranges are taken as constants. That of a static one may be learned: values
    x' = f·s·(u - z) have dx'/d(log f) = x' - x where they are not cut off, and x' where they are
    (learned step size, LSQ: Esser et al., 2020, arXiv 1902.08153), so that the range gives up on
    outliers where rounding all others more finely is worth it.

    Args:
        layer: for messages.
        kind: of `KINDS`.
        observer: of `OBSERVERS`, of static ranges.
        learn: whether the scale of a static range is learned, too.

    Attributes:
        clip: logarithm of the factor f of the scale, (); None where it is not learned.
        extremes: what the observer has seen, (2,), NaN before the first batch.
        samples: rows that it has seen.
        frozen: whether it looks no more.
        noted: what a file says of a range that was found before; None for what is seen.
    """

    def __init__(self, layer: str, kind: str, observer: str, *, learn: bool = False) -> None:
        super().__init__()
        self.layer, self.kind, self.observer = layer, kind, observer
        self.noted: Mapping[str, Any] | None = None
        self.clip: Any = None
        if kind == "static":
            if learn:
                self.clip = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("extremes", torch.full((2,), torch.nan, dtype=torch.float64))
            self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
            self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "static":
            if self.training and not self.frozen:
                self._observe(x.detach())
            values, inside = static_values(x.detach(), self.static())
            if self.clip is not None:
                return _Clipped.apply(x, self.clip, values, inside)
        else:
            values, inside = dynamic_values(x.detach(), self.kind == "dynamic"), None
        return StraightThrough.apply(x, values, inside)

    def static(self) -> StaticRange | StaticInput:
        """The parameters of what has been seen, with the factor that was learned.

        Raises:
            UsageError: nothing has.
            WeightError: the factor is no number.
        """
        found = self._seen()
        factor = 1.0 if self.clip is None else float(self.clip.detach().double().exp())
        if factor == 1:
            return found
        scale = np.float32(found.scale * factor)
        if not 0 < scale < np.inf:
            raise WeightError(
                "the learned scale of a layer's input is no number above 0",
                tensor=self.layer,
                hint="train with a smaller learning rate, from the last good checkpoint",
            )
        return StaticInput(float(str(scale)), found.zero_point)

    def _seen(self) -> StaticRange | StaticInput:
        if (given := StaticInput.noted(self.noted)) is not None:
            return given
        low, high = self.extremes.tolist()
        if np.isnan(low):
            raise UsageError(
                "no input of a layer with static activations has been seen",
                found=f"layer '{self.layer}'",
                wanted="a range",
                hint="run some batches in train mode first: model.train()",
            )
        return static_range(low, high)

    def begin_at(self, noted: Mapping[str, Any]) -> None:
        """Keep the range that a file has for the layer, and look no more."""
        self.noted = dict(noted)
        self.frozen.fill_(True)

    def how(self) -> StaticInput | DynamicInput:
        """How the integer path makes bytes of this input."""
        if self.kind != "static":
            return DynamicInput(symmetric=self.kind == "dynamic")
        found = self.static()
        return StaticInput(found.scale, found.zero_point)

    def note(self) -> dict[str, Any] | None:
        """What a file says of a static range; None of a dynamic one."""
        if self.kind != "static":
            return None
        found = self.static()
        seen = self.noted or {"observer": self.observer, "samples": int(self.samples)}
        return {**seen, "scale": found.scale, "zero_point": found.zero_point}

    def _observe(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).to("cpu", torch.float32).numpy()
        if not rows.size:
            return
        if not np.isfinite(rows).all():
            raise WeightError(
                "the input of a layer is NaN or Inf",
                tensor=self.layer,
                hint="train with a smaller learning rate, from the last good checkpoint",
            )
        observer = EmaObserver() if self.observer == "ema" else MinMaxObserver()
        if int(self.samples):
            observer.restore({"extremes": self.extremes.numpy(force=True)})
        observer.update(rows)
        self.extremes.copy_(torch.tensor(observer.range(), dtype=torch.float64))
        self.samples += len(rows)

    def extra_repr(self) -> str:
        return self.kind if self.kind != "static" else f"static, observer={self.observer}"


class StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Values in place of others, whose gradient they hand on where ``inside`` is true, or
    everywhere where it is None (Bengio et al., 2013, arXiv 1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: torch.Tensor, inside: Any) -> torch.Tensor:
        ctx.save_for_backward(inside)
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None


class _Clipped(torch.autograd.Function):  # type: ignore[misc]
    """See `FakeInput`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, clip: torch.Tensor, values: torch.Tensor, inside: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values, inside)
        return values.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        x, values, inside = ctx.saved_tensors
        by_input = gradient * inside
        by_clip = (gradient * values).sum() - (by_input * x).sum()
        return by_input, by_clip.to(torch.float32), None, None


def dynamic_values(x: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """What bytes with a scale, and unless ``symmetric`` a zero point, for each row stand for."""
    wide = x.to(torch.float32)
    if symmetric:
        scale = _or_one(wide.abs().amax(-1, keepdim=True) / _number(127, x))
        return torch.clamp(torch.round(wide / scale), -127, 127) * scale
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    codes = _number(255, x)
    scale = _or_one(high / codes - low / codes)
    zero = torch.clamp(torch.round(-128 - low / scale), -128, 127)
    return (torch.clamp(torch.round(wide / scale + zero), -128, 127) - zero) * scale


def static_values(
    x: torch.Tensor, r: StaticRange | StaticInput
) -> tuple[torch.Tensor, torch.Tensor]:
    """What bytes with parameters known beforehand stand for, and which values are not cut off."""
    scale = _number(r.scale, x)
    codes = torch.round(x.to(torch.float32) / scale + r.zero_point)
    inside = (codes >= -128) & (codes <= 127)
    return (torch.clamp(codes, -128, 127) - r.zero_point) * scale, inside


def _number(value: float, x: torch.Tensor) -> torch.Tensor:
    """A number where ``x`` is: by one of Python's, accelerators multiply with the inverse."""
    return torch.tensor(value, dtype=torch.float32, device=x.device)


def _or_one(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
