"""Gradients by the outputs of a model's layers: of the NLL of labels that it sampled itself.

Forward and backward pass of one window, activations kept for one block at a time: the others are
computed again when the backward pass comes to their block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import UnsupportedError
from qconvert.model import Model, layer_name
from qconvert.running.device import device_of
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.layers import Layer, rows_of

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Product = Callable[[str, F32, F32], None]
Lookup = Callable[[str, I64, F32], None]
SAMPLED_ROWS = 64  # positions whose distributions are in float64 at once


def token_tables(checkpoint: Checkpoint, model: Model) -> dict[int, str]:
    """Where tables whose rows are looked up lie in memory, and their names in the files without
    ``.weight``; those that the files have under another name of the running model are found by how
    both end.
    """
    from torch import nn

    names = {t.name for t in model.tensors if len(t.shape) == 2 and t.floating}
    found: dict[int, str] = {}
    for place, module in checkpoint.model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        mine = f"{place}.weight"
        ends = [n for n in names if mine.endswith(f".{n}") or n.endswith(f".{mine}")]
        name = mine if mine in names else ends[0] if len(ends) == 1 else None
        if name is None and checkpoint.config.get("tie_word_embeddings"):
            tied = [n for n in names if n.endswith("lm_head.weight")]
            name = tied[0] if len(tied) == 1 else None
        if name is not None:
            found[module.weight.data_ptr()] = layer_name(name)
    return found


@contextmanager
def watching_gradients(
    layers: Mapping[str, Layer],
    heights: Mapping[str, int],
    tables: Mapping[int, str],
    on_product: Product,
    on_lookup: Lookup,
) -> Iterator[Any]:
    """Call back with input and gradient of each layer while a backward pass runs.

    Yields the mode of torch for `recomputed_blocks`.

    Args:
        layers: those to watch; a partial one has no gradient of its own and is left out.
        heights: rows of each layer's matrix.
        tables: to watch, from `token_tables`.
        on_product: takes a layer's name, its input (T, C) and the gradients by its output (T, R).
        on_lookup: takes a table's name, the rows looked up (T,) and the gradients by them (T, C).
    """
    by_address: dict[int, list[tuple[str, Layer]]] = {}

    def told(name: str, x: Any, output: Any) -> None:
        """Watch the gradient by an output, if one will come."""
        if not output.requires_grad:
            return
        first = layers[name].first
        part = slice(first, first + heights[name])
        output.register_hook(lambda g: on_product(name, rows_of(x), rows_of(g)[:, part]))

    with ExitStack() as hooks:
        for name, layer in layers.items():
            if layer.partial:
                continue
            if layer.module is None:
                by_address.setdefault(layer.address, []).append((name, layer))
                continue
            hook = layer.module.register_forward_hook(_after(name, told))
            hooks.callback(hook.remove)
        yield hooks.enter_context(_watching(by_address, tables, told, on_lookup))


def _after(name: str, told: Callable[[str, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
    return lambda _, inputs, output: told(name, inputs[0].detach(), output)


def _watching(
    matrices: Mapping[int, list[tuple[str, Layer]]],
    tables: Mapping[int, str],
    told: Callable[[str, Any, Any], None],
    on_lookup: Lookup,
) -> Any:
    """A mode of torch that sees products with matrices of no module of their own, and makes what
    is looked up the beginning of the graph: weights themselves have no gradients here.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Graph(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if not torch.is_grad_enabled():
                return result
            if func is functional.linear and len(args) > 1:
                for layer, _ in matrices.get(args[1].data_ptr(), ()):
                    told(layer, args[0].detach(), result)
            elif func is functional.embedding and len(args) > 1:
                leaf = result.detach().float().requires_grad_()
                table = tables.get(args[1].data_ptr())
                if table is not None:
                    ids = args[0].detach().reshape(-1).cpu().numpy()
                    leaf.register_hook(lambda g: on_lookup(table, ids, rows_of(g)))
                return leaf.clone()  # a model may change what it gets
            return result

    return Graph()


@contextmanager
def recomputed_blocks(checkpoint: Checkpoint, mode: Any) -> Iterator[int]:
    """Keep of each block of the model only its input until the backward pass comes to it.

    Args:
        mode: of torch, that blocks run in when they run once more: a backward pass suspends modes.

    Yields how many blocks there are; a model without any that transformers knows keeps everything.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [m for m in checkpoint.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = _recomputed(block.forward, mode)
    try:
        yield len(blocks)
    finally:
        for block in blocks:
            del block.forward


def _recomputed(forward: Callable[..., Any], mode: Any) -> Callable[..., Any]:
    """A forward that is run once more, with gradients, in the backward pass."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def graded(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and bool(value.requires_grad)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        places = [i for i, value in enumerate(given) if graded(value)]
        inner = any(graded(v) for g in given if isinstance(g, list | tuple) for v in g)
        if not torch.is_grad_enabled() or not places or inner:
            return forward(*args, **kwargs)

        def again(*tensors: Any) -> Any:
            values = list(given)
            for place, tensor in zip(places, tensors, strict=True):
                values[place] = tensor
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            with mode if torch.is_grad_enabled() else nullcontext():
                return forward(*values[: len(args)], **named)

        tensors = [given[i] for i in places]
        return checkpoint(again, *tensors, use_reentrant=True, preserve_rng_state=False)

    return run


def run_sampled(
    checkpoint: Checkpoint, tokens: I64, seed: int, before_backward: Callable[[], None]
) -> None:
    """Forward and backward pass over a window, (tokens,), with a label for each position.

    Args:
        before_backward: called between the two: blocks then run once more.

    Raises:
        UnsupportedError: nothing of the model is looked up by tokens.
    """
    import torch
    from torch.nn import functional

    device = device_of(checkpoint.model)
    ids = torch.from_numpy(np.ascontiguousarray(tokens)[None]).to(device)
    with torch.enable_grad():
        logits = checkpoint.model(input_ids=ids, use_cache=False).logits[0]
        if not logits.requires_grad:
            raise UnsupportedError(
                "no gradient reaches the layers of this model",
                path=checkpoint.path,
                hint="calibrate without --fisher",
                code="FISHER-GRADIENT",
            )
        labels = torch.from_numpy(sampled(logits.detach().cpu().numpy(), tokens, seed)).to(device)
        loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
        before_backward()
        loss.backward()


def sampled(logits: NDArray[np.floating], tokens: I64, seed: int) -> I64:
    """A label for each position, (T,), from the distributions of the logits, (T, vocabulary).

    The numbers drawn depend on the seed and on the tokens of the window alone, so that neither the
    order of windows nor a split over several runs changes a label.
    """
    window = hashlib.sha256(np.ascontiguousarray(tokens, "<i8").tobytes()).digest()
    drawn = np.random.default_rng([seed, *np.frombuffer(window, "<u4").tolist()])
    u = drawn.random(len(logits))
    labels = np.empty(len(logits), np.int64)
    for start in range(0, len(logits), SAMPLED_ROWS):
        part = slice(start, start + SAMPLED_ROWS)
        wide = logits[part].astype(np.float64)
        wide = np.exp(wide - wide.max(axis=1, keepdims=True)).cumsum(axis=1)
        below = wide < u[part, None] * wide[:, -1:]
        labels[part] = np.minimum(below.sum(axis=1), wide.shape[1] - 1)
    return labels
