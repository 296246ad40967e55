"""Fake quantization of weights: what a module computes with is what the file will hold, what is
trained is the weight that it was made of.

A module keeps its class, its parameters and their names; hooks put the decoded weight in the place
of the parameter while its ``forward`` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qconvert.codecs.affine.encoding import Affine
from qconvert.codecs.codec import Stored
from qconvert.model import TensorInfo
from qconvert.schemes import TensorScheme
from qconvert.training.activations import FakeInput, StraightThrough
from qconvert.training.fixed import on_grid_of
from qconvert.training.groups import Groups
from qconvert.training.live import LiveModel
from qconvert.training.scales import TunedScales
from qconvert.training.weights import (
    as_in_file,
    decoded,
    first_parameters,
    on_learned_grid,
    settled_scheme,
    stored_parameters,
)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FakeWeight(torch.nn.Module):  # type: ignore[misc]
    """A weight as its quantized tensor decodes it.

    Codes are made by the codec of the scheme whenever the weight has changed, and kept packed until
    then. The gradient of the decoded weight is that of the weight itself, 0 where it is clipped.
    With ``learn``, scales and zero points are parameters (LSQ: Esser et al., 2020, arXiv
    1902.08153; LSQ+: Bhalgat et al., 2020, arXiv 2004.09576). Rounding is passed straight through,
    so that a weight w that becomes w' = s·(u - z) has dw'/ds = (w' - w)/s where it is not clipped,
    u - z where it is, and dw'/dz = 0 and -s; both times 1 / √(n·p) for groups of n weights and p
    codes above 0.

    Args:
        tensor: its name and shape in a checkpoint.
        weight: as it is now.
        learn: whether scale and zero point are learned; the scheme is affine then.

    Attributes:
        scheme: with the choice of symmetric or asymmetric that was made for the weight as it was.
        scale, zero_point: (G,), of its groups; None where they are found anew for each weight, or
            there is no zero point.
        base: whose scales it keeps; None where they are found anew or learned.
        settled: whose codes it keeps, too, whatever becomes of the weight; None where they follow.
        gains: of the scales and zero points of ``base``, which multiply what weights become on its
            grid and leave their codes alone: w' = g·s·(u(w) - z). None where they stay.
    """

    def __init__(
        self, tensor: TensorInfo, scheme: TensorScheme, weight: torch.Tensor, *, learn: bool
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self._known: tuple[tuple[int, ...], Stored] | None = None
        self.scale: Any = None
        self.zero_point: Any = None
        self.base: Stored | None = None
        self.settled: Stored | None = None
        self.gains: TunedScales | None = None
        live = LiveModel({tensor.name: weight})
        stored = as_in_file(live, live.tensors[0], scheme)
        self.scheme = settled_scheme(scheme, stored)
        self.encoding = stored.encoding
        if not learn:
            return
        assert isinstance(stored.encoding, Affine)
        scale, zero_point = first_parameters(stored)
        self.scale = torch.nn.Parameter(torch.from_numpy(scale).to(weight.device))
        if not stored.encoding.symmetric:
            self.zero_point = torch.nn.Parameter(torch.from_numpy(zero_point).to(weight.device))

    def keep_scales(self, base: Stored) -> None:
        """Have weights take the scales and zero points of a tensor, whatever becomes of them."""
        self.base, self.encoding, self._known = base, base.encoding, None
        self.scheme = settled_scheme(self.scheme, base)

    def settle(self, stored: Stored) -> None:
        """Have the weight stay what a tensor decodes to."""
        self.settled, self.encoding, self._known = stored, stored.encoding, None
        self.scheme = settled_scheme(self.scheme, stored)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}  # of a copy, whose weight lies elsewhere

    def stored(self, weight: torch.Tensor) -> Stored:
        """The bytes of the weight as it is now.

        Raises:
            WeightError: NaN or Inf, or beyond what the scheme holds.
        """
        placed = self._placed(weight)
        return placed if self.gains is None else self.gains.applied(placed)

    def _placed(self, weight: torch.Tensor) -> Stored:
        """The same without gains."""
        if self.settled is not None:
            return self.settled
        learned = [p for p in (self.scale, self.zero_point) if p is not None]
        state = tuple(n for t in (weight, *learned) for n in _state(t))
        if self._known is None or self._known[0] != state:
            self._known = state, self._encoded(LiveModel({self.tensor.name: weight}))
        return self._known[1]

    def _encoded(self, live: LiveModel) -> Stored:
        (tensor,) = live.tensors
        if self.base is not None:
            return on_grid_of(live, tensor, self.base)
        if self.scale is None:
            return as_in_file(live, tensor, self.scheme)
        assert isinstance(self.encoding, Affine)
        scale, zero = (
            None if p is None else p.detach().to("cpu", torch.float32).numpy()
            for p in (self.scale, self.zero_point)
        )
        assert scale is not None
        parameters = stored_parameters(scale, zero, self.encoding, tensor)
        return on_learned_grid(live, tensor, self.encoding, parameters)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.settled is not None and self.gains is not None:
            return self.gains(weight)
        stored = self._placed(weight)
        live = LiveModel({self.tensor.name: weight})
        clipping = torch.is_grad_enabled() and (weight.requires_grad or self.scale is not None)
        found = decoded(live, live.tensors[0], stored, clipping=clipping)
        values = torch.from_numpy(found.values).to(weight.device)
        inside = None if found.inside is None else torch.from_numpy(found.inside).to(weight.device)
        if self.gains is not None:
            return self.gains.multiplied(weight, stored, inside)
        if self.scale is None:
            return StraightThrough.apply(weight, values, inside)
        step = first_parameters(stored)[0]
        return _Learned.apply(
            *(weight, self.scale, self.zero_point, values, inside),
            *(torch.from_numpy(step).to(weight.device), self.encoding),
        )

    def extra_repr(self) -> str:
        return f"{self.scheme.name}, learn={self.scale is not None}"


def _state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Another one whenever the values of a tensor are: its version, where it lies, and, since
    writing to ``.data`` leaves both, the sum of its bit patterns.
    """
    held = tensor.detach()
    bits = held.contiguous().view(_BITS[held.element_size()])
    return tensor._version, tensor.data_ptr(), int(bits.sum(dtype=torch.int64))


class _Learned(torch.autograd.Function):  # type: ignore[misc]
    """Decoded weights, with gradients by weight, scale and zero point: see `FakeWeight`."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: Any,
        values: torch.Tensor,
        inside: Any,
        step: torch.Tensor,
        encoding: Affine,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, values, inside, step)
        ctx.encoding, ctx.asymmetric = encoding, zero_point is not None
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        weight, values, inside, step = ctx.saved_tensors
        encoding: Affine = ctx.encoding
        wide = gradient.to(torch.float32)
        if inside is None:
            inside = torch.ones_like(gradient, dtype=torch.bool)
        grouped = Groups(encoding, weight.shape)
        share = grouped.gradient_scale
        moved = torch.where(inside, values - weight.to(torch.float32), values)
        by_scale = grouped.sums(wide * moved) / step * share
        by_zero = None
        if ctx.asymmetric:
            outside = torch.where(inside, torch.zeros_like(wide), wide)
            by_zero = -grouped.sums(outside) * step * share
        return gradient * inside, by_scale, by_zero, None, None, None, None


class WeightHook:
    """Has a module compute with the decoded weight in the place of one of its parameters.

    Args:
        weight: gives it for the parameter; shared by all modules that share the parameter.
        name: of the parameter in the module.
    """

    def __init__(self, weight: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
        self.weight, self.name = weight, name
        self.latent: Any = None  # the parameter, while the module runs

    def attach(self, module: Any) -> None:
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, always_call=True)

    def before(self, module: Any, args: tuple[Any, ...]) -> None:
        latent = module._parameters[self.name]
        decoded_weight = self.weight(latent)
        self.latent, module._parameters[self.name] = latent, decoded_weight

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if self.latent is not None:  # not where `before` failed
            module._parameters[self.name], self.latent = self.latent, None


class InputHook:
    """Has a linear layer take its input as signed bytes give it."""

    def __init__(self, inputs: FakeInput) -> None:
        self.inputs = inputs

    def attach(self, module: Any) -> None:
        module.register_forward_pre_hook(self.before, with_kwargs=True)

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.inputs(args[0]), *args[1:]), kwargs
        return args, kwargs | {"input": self.inputs(kwargs["input"])}


def detach_hooks(module: Any) -> None:
    """Take `WeightHook` and `InputHook` off a module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), WeightHook | InputHook):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
