"""Weights that stay in their files: mapped, and widened to float32 for the time of one product."""

from __future__ import annotations

from typing import Any


def stream_weights(model: Any) -> None:
    """Make a model that was loaded in the dtype of its files compute in float32.

    Matrices of linear layers and embeddings keep their dtype, and with it the mapping of the file;
    a copy in float32 lives during a call. All else is small and is widened here. BF16 and F16 are
    exact in float32: the results are the same bits as of a model loaded in float32.

    Args:
        model: a torch.nn.Module; changed in place. Its weights must not be changed afterwards.
    """
    import torch
    from torch import nn

    kept: set[int] = set()
    for module in model.modules():
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        if module.weight.dtype in (torch.bfloat16, torch.float16):
            kept.add(id(module.weight))
            module.forward = _widened(module)
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.dtype in (torch.bfloat16, torch.float16):
            buffer.data = buffer.data.float()


def widen_if_needed(model: Any) -> None:
    """Widen every weight of a model from `stream_weights` that does not run: some models multiply
    with the weight of a layer without calling the layer, as Mamba does.

    Two tokens are run to see.
    """
    import torch

    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64))
    except Exception:  # of two dtypes in one product; any other comes back with the text
        for module in model.modules():
            if "forward" in vars(module):
                del module.forward
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()


def _widened(module: Any) -> Any:
    """The forward of a linear layer or an embedding with its weight in float32."""
    from torch import nn
    from torch.nn import functional

    if isinstance(module, nn.Linear):
        return lambda x: functional.linear(x, module.weight.float(), module.bias)
    # The rows that are looked up are widened, not the table.
    return lambda ids: functional.embedding(ids, module.weight, module.padding_idx).float()
