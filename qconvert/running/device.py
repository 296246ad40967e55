"""Where torch runs a model. Sums of other devices than the CPU run in other orders: what comes out
differs in its last bits, and so may the bytes of a file that is made of it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import MachineError, UsageError

CPU = "cpu"
DEVICES = "cpu, cuda, cuda:N, mps or auto"


def check_device(name: str) -> str:
    """A name of a device as the option takes it, whether this machine has it or not.

    Raises:
        UsageError: it is none.
    """
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?|mps|auto", name) is None:
        raise UsageError("--device", found=name, wanted=DEVICES)
    return name


def chosen_device(name: str) -> str:
    """The device of torch that a name of `check_device` stands for; ``auto`` is the first of cuda,
    mps and cpu that there is.

    Raises:
        MachineError: torch does not have it here.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return "cuda" if cuda else "mps" if mps else CPU
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if cuda else 0
    there = {CPU: True, "cuda": int(index or 0) < count, "mps": mps}
    if not there[kind]:
        known = [CPU, *(f"cuda:{i}" for i in range(count)), *(["mps"] if mps else [])]
        raise MachineError(
            f"torch has no device '{name}' here",
            found=", ".join(known),
            wanted=name,
            hint="give --device cpu, or install a torch that is built for the device",
            code="TORCH-DEVICE",
        )
    return name


def on_device(array: NDArray[Any], model: Any) -> Any:
    """An array as a tensor where a model is."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array)).to(device_of(model))


def device_of(model: Any) -> Any:
    """Where the weights of a model are, all of which are in one place."""
    return next(model.parameters()).device
