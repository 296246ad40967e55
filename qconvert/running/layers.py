"""The linear layers of a model under the names of their weights, and hooks on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.files.calibration import layer_name
from qconvert.running.hugging_face import Checkpoint

F32 = NDArray[np.float32]
Seen = Callable[[str, F32], None]


def linear_layers(checkpoint: Checkpoint, tensors: set[str]) -> dict[str, Any]:
    """Every torch.nn.Linear whose weight is a tensor of the checkpoint's files.

    Args:
        checkpoint: an open model.
        tensors: names of the tensors in its files.

    Returns:
        Name of the weight without ``.weight`` -> module, in order of the names. A weight that is
        shared (tied) has the name it is stored under; a file that leaves out the model's own
        prefix, or has it where the class has not, is followed.
    """
    from torch import nn

    stored: dict[int, str] = {}
    prefix = getattr(checkpoint.model, "base_model_prefix", "") + "."
    for name, parameter in checkpoint.model.named_parameters(remove_duplicate=False):
        for spelt in (name, prefix + name, name.removeprefix(prefix)):
            if spelt in tensors:
                stored.setdefault(id(parameter), spelt)
                break
    found = {
        layer_name(stored[id(module.weight)]): module
        for module in checkpoint.model.modules()
        if isinstance(module, nn.Linear) and id(module.weight) in stored
    }
    return dict(sorted(found.items()))


def embeddings(checkpoint: Checkpoint) -> int:
    """How many token ids the model has an embedding for."""
    return int(checkpoint.model.get_input_embeddings().weight.shape[0])


@contextmanager
def watching(
    layers: Mapping[str, Any], on_input: Seen, on_output: Seen | None = None
) -> Iterator[None]:
    """Call back with what enters, and what leaves, each layer while the model runs.

    Rows are (samples, features) float32 views of torch's memory: use them at once or copy them.
    """

    def before(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _, inputs: on_input(name, _rows(inputs[0]))

    def after(name: str, seen: Seen) -> Callable[[Any, Any, Any], None]:
        return lambda _, inputs, output: seen(name, _rows(output))

    with ExitStack() as hooks:
        for name, module in layers.items():
            hooks.callback(module.register_forward_pre_hook(before(name)).remove)
            if on_output is not None:
                hooks.callback(module.register_forward_hook(after(name, on_output)).remove)
        yield


def run_tokens(checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
    """One forward pass over a window or a line, (tokens,)."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(tokens)[None])
    options = {"use_cache": False} if checkpoint.kind == "causal" else {}
    with torch.inference_mode():
        checkpoint.model(input_ids=ids, **options)


def _rows(x: Any) -> F32:
    rows: F32 = x.detach().reshape(-1, x.shape[-1]).float().contiguous().numpy()
    return rows
