"""The gains of norms that quantize --finetune tunes: which tensors they are, and their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qconvert import kernels
from qconvert.files import OpenModel
from qconvert.kernels.arithmetic import SCALE_NUMPY
from qconvert.kernels.records import F32, SourceRows
from qconvert.model import layer_name

PLACES = 1e-5  # relative, that a norm may be off its own multiple in binary32


@dataclass(frozen=True, slots=True)
class Norm:
    """A kept vector of a file that multiplies what a norm of the running model gives.

    Attributes:
        place: the norm's name in the running model.
        dtype: of the vector in the file.
        stored: its numbers, (n,).
        added: what the norm adds to them before it multiplies: 0 or 1.
    """

    place: str
    dtype: str
    stored: F32
    added: float

    def tuned(self, factors: F32) -> bytes:
        """The vector with every gain times its factor, rounded to its dtype; a gain that would
        leave its range stays.
        """
        added = np.float32(self.added)
        changed = (self.stored + added) * factors - added
        limit = float(np.finfo(np.float16).max) if self.dtype == "F16" else 3e38
        values = np.where(np.abs(changed) < limit, changed, self.stored).astype(np.float32)
        return bytes(kernels.cast(SourceRows.of(values[None]), self.dtype).segments["data"])


def find_norms(
    made: OpenModel, origins: Mapping[str, str | None], model: Any
) -> tuple[dict[str, Norm], dict[str, str]]:
    """Kept tensors that are the gains of one norm, by their names in the file; and why those of
    other norms are left as they are.

    Args:
        made: the file with these tensors, which ``model`` runs.
        origins: the names of the kept tensors, and of those that they were made of.
    """
    modules: Mapping[str, Any] = dict(model.named_modules())
    infos = {t.name: t for t in made.tensors}
    found: dict[str, Norm] = {}
    left: dict[str, str] = {}
    for name, origin in origins.items():
        place = layer_name(origin) if origin else ""
        module, info = modules.get(place), infos[name]
        known = len(info.shape) == 1 and info.dtype in SCALE_NUMPY
        if not known or module is None or "Norm" not in type(module).__name__:
            continue
        values = made.values(info, 0, info.size).astype(np.float32)
        added = _added(module, values)
        if added is None:
            left[name] = "its norm does not multiply what it gives by it alone"
        else:
            found[name] = Norm(place, info.dtype, values, added)
    return found, left


def _added(module: Any, stored: F32) -> float | None:
    """What a norm adds to a stored vector to have its gains; None where it does not multiply what
    it gives by these alone.
    """
    import torch

    weight = module.weight
    if tuple(weight.shape) != stored.shape:
        return None
    bias = module._parameters.get("bias")
    x = torch.linspace(-1.0, 2.0, len(stored))[None]
    with torch.no_grad():
        before = weight.clone()
        try:
            given = []
            for gains in (before, torch.zeros_like(before), torch.ones_like(before)):
                weight.copy_(gains)
                given.append(module(x) - (0 if bias is None else bias))
        except TypeError:  # it takes more than what it norms
            return None
        finally:
            weight.copy_(before)
    now, nothing, one = given
    offset = 1.0 if bool(nothing.any()) else 0.0
    if not torch.allclose(now, (one - nothing) * (before + offset), rtol=PLACES, atol=PLACES):
        return None
    numbers = before.numpy().astype(np.float32)
    if np.array_equal(numbers, stored):
        return offset
    return 0.0 if np.array_equal(numbers + np.float32(offset), stored) else None
