"""Low-rank corrections that a running model computes beside its weights, whatever holds those."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qconvert.errors import InputError, UnsupportedError
from qconvert.files.adapters import Correction, open_adapter
from qconvert.files.safetensors import SafetensorsModel
from qconvert.model import TensorInfo, layer_name


def attach(module: Any, a: torch.Tensor, b: torch.Tensor) -> None:
    """Have a layer add B A x to what it makes of its input x.

    Args:
        module: of one input (..., inputs).
        a, b: (rank, inputs) and (outputs, rank); gradients go through them.
    """

    def corrected(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        return output + functional.linear(functional.linear(inputs[0], a), b)

    module.register_forward_hook(corrected)


def attach_adapter(model: Any, path: Path) -> None:
    """Have a model compute with an adapter, a directory as peft saves it.

    Raises:
        InputError: no such directory, or it is for another model.
        FormatError, UnsupportedError: see `open_adapter`; a correction of rows that are looked up.
    """
    modules = dict(model.named_modules())
    adapter = open_adapter(path)
    with closing(adapter):
        for name, found in adapter.corrections.items():
            if found.embedding:
                raise UnsupportedError(
                    "a correction of rows that are looked up is not computed beside them",
                    path=path,
                    tensor=name,
                    hint="merge the adapter: quantize MODEL --adapter DIR",
                )
            module = modules.get(layer_name(name))
            shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
            if module is None or shape != found.shape:
                raise InputError(
                    "the adapter is for another model",
                    path=path,
                    tensor=name,
                    found=f"a correction {list(found.shape)}",
                    wanted="a linear layer of the model" if module is None else f"{list(shape)}",
                )
            a, b = _parts(adapter.weights, found)
            attach(module, a, b)


def _parts(weights: SafetensorsModel, found: Correction) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as float32, the scale in the second."""

    def whole(part: TensorInfo) -> torch.Tensor:
        values = np.asarray(weights.values(part, 0, part.size), np.float32)
        return torch.from_numpy(values.reshape(part.shape).copy())

    return whole(found.a), whole(found.b) * found.scale
