"""The linear layers of a model under the names of their weights, and what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.model import Model, TensorInfo, layer_name
from qconvert.running.device import device_of
from qconvert.running.hugging_face import Checkpoint

F32 = NDArray[np.float32]
Seen = Callable[[str, F32], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """A matrix that the model multiplies with.

    Attributes:
        features: of its input.
        module: the linear layer that has it; None for a matrix, or a part of one, that another
            module hands to torch's ``linear`` itself, as routers and fused experts do.
        address: where the matrix, or the one that it is a part of, lies in memory.
        transposed: whether it is stored (in, out), as transformers' Conv1D has it.
        partial: whether the module has a part of it only, so that its output is not the layer's.
        first: the row of the running model's matrix that it begins at, where several are joined.
    """

    features: int
    module: Any
    address: int
    transposed: bool = False
    partial: bool = False
    first: int = 0


def linear_layers(
    checkpoint: Checkpoint, model: Model, others: Collection[str] = ()
) -> dict[str, Layer]:
    """Every matrix of the files that the running model is seen to multiply with.

    Args:
        checkpoint: the running model.
        model: the same files, opened.
        others: names of tensors that are no matrices of a product.

    Returns:
        Name of the weight without ``.weight`` -> layer, in order of the names. A weight that is
        shared (tied) has the name it is stored under. Where transformers renames, joins or parts
        matrices at load, such as the experts of a layer or a fused one of queries, keys and values,
        each is found again by its first rows.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    matrices = {
        t.name: t
        for t in model.tensors
        if len(t.shape) == 2 and t.floating and t.name not in others
    }
    owners = {
        id(m.weight): m for m in checkpoint.model.modules() if isinstance(m, nn.Linear | Conv1D)
    }
    tables = {id(m.weight) for m in checkpoint.model.modules() if isinstance(m, nn.Embedding)}
    tables -= set(owners)
    found: dict[str, Layer] = {}
    strange: dict[int, Any] = {}
    for name, parameter in checkpoint.model.named_parameters(remove_duplicate=False):
        if name in matrices:
            strange.pop(id(parameter), None)
            if id(parameter) not in tables:
                found[layer_name(name)] = _whole(parameter, owners.get(id(parameter)))
            del matrices[name]
        elif parameter.ndim in (2, 3) and id(parameter) not in tables:
            strange[id(parameter)] = parameter
    known = {layer.address for layer in found.values()}
    strange = {k: p for k, p in strange.items() if p.data_ptr() not in known}
    if strange:
        rows = _first_rows(model, matrices)
        for key, parameter in strange.items():
            for part in parameter.unbind() if parameter.ndim == 3 else [parameter]:
                module = owners.get(key)
                names = _parts(part, rows, matrices)
                if len(names) == 1:
                    found[layer_name(names[0])] = _whole(part, module)
                    continue
                at = 0
                for name in names:
                    found[layer_name(name)] = Layer(
                        part.shape[1], module, part.data_ptr(), first=at
                    )
                    at += matrices[name].shape[0]
        parts = {_row(p, 0): p for p in strange.values() if p.ndim == 2 and len(p)}
        for name, tensor in matrices.items():
            first = None if layer_name(name) in found else _first_part(model, tensor, parts)
            if first is not None:
                module = owners.get(id(first))
                found[layer_name(name)] = Layer(
                    tensor.shape[1], module, first.data_ptr(), partial=True
                )
    return dict(sorted(found.items()))


def _first_part(model: Model, tensor: TensorInfo, parts: Mapping[bytes, Any]) -> Any:
    """The first of the running model's matrices that make up one of the files; None if there are
    none. All have the same input.
    """
    rows, columns = tensor.shape
    at, first = 0, None
    while at < rows:
        row = model.values(tensor, at * columns, (at + 1) * columns).astype(np.float32)
        part = parts.get(row.tobytes())
        if part is None or part.shape[1] != columns:
            return None
        first = part if first is None else first
        at += part.shape[0]
    return first if at == rows else None


def _row(matrix: Any, at: int) -> bytes:
    """A row as it is in float32."""
    data: bytes = matrix[at].detach().float().cpu().contiguous().numpy().tobytes()
    return data


def _whole(parameter: Any, module: Any) -> Layer:
    """The layer of a matrix that is one in the files too."""
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(module, Conv1D)
    features = parameter.shape[0 if transposed else 1]
    return Layer(features, module, parameter.data_ptr(), transposed)


def _first_rows(model: Model, matrices: Mapping[str, TensorInfo]) -> dict[bytes, str]:
    """The first row of each matrix, float32 -> its name; rows that several have are left out."""
    found: dict[bytes, str] = {}
    twice: set[bytes] = set()
    for name, t in matrices.items():
        if not t.size:
            continue
        row = model.values(t, 0, t.shape[1]).astype(np.float32).tobytes()
        twice |= {row} & found.keys()
        found[row] = name
    return {row: name for row, name in found.items() if row not in twice}


def _parts(
    part: Any, rows: Mapping[bytes, str], matrices: Mapping[str, TensorInfo]
) -> tuple[str, ...]:
    """Names of the matrices that make up one of the running model, from above; () if not found."""
    names: list[str] = []
    at, height = 0, int(part.shape[0])
    while at < height:
        name = rows.get(_row(part, at))
        if name is None:
            return ()
        names.append(name)
        at += matrices[name].shape[0]
    return tuple(names) if at == height else ()


def tables(checkpoint: Checkpoint) -> set[str]:
    """Names of the parameters whose rows are looked up."""
    from torch import nn

    return {
        f"{place}.weight"
        for place, module in checkpoint.model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def embeddings(checkpoint: Checkpoint) -> int:
    """How many token ids the model has an embedding for."""
    return int(checkpoint.model.get_input_embeddings().weight.shape[0])


@contextmanager
def watching(
    layers: Mapping[str, Layer],
    on_input: Seen,
    on_output: Seen | None = None,
    on_use: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Call back with what enters, and what leaves, each layer while the model runs.

    Modules are watched with hooks; other matrices where they are handed to torch's ``linear``,
    several of them joined there into one having the same input and no output of their own, or
    multiplied with as they are. What is multiplied in any other way is only told to ``on_use``.
    Rows are (samples, features) float32 views of torch's memory: use them at once or copy them.
    """
    by_address: dict[int, list[tuple[str, Layer]]] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            by_address.setdefault(layer.address, []).append((name, layer))
            if layer.module is None:
                continue
            before = layer.module.register_forward_pre_hook(_before(name, on_input))
            hooks.callback(before.remove)
            if on_output is not None and not layer.partial:
                after = layer.module.register_forward_hook(_after(name, on_output))
                hooks.callback(after.remove)
        hooks.enter_context(_watching_products(by_address, on_input, on_output, on_use))
        yield


def _before(name: str, seen: Seen) -> Callable[[Any, tuple[Any, ...]], None]:
    return lambda _, inputs: seen(name, rows_of(inputs[0]))


def _after(name: str, seen: Seen) -> Callable[[Any, Any, Any], None]:
    return lambda _, inputs, output: seen(name, rows_of(output))


# Names of torch's functions that multiply matrices.
_PRODUCTS = frozenset(
    {
        *("matmul", "mm", "bmm", "mv", "__matmul__", "__rmatmul__", "addmm", "addmv", "addbmm"),
        *("baddbmm", "einsum", "tensordot", "bilinear", "inner", "conv1d", "conv2d", "conv3d"),
    }
)


def _watching_products(
    matrices: Mapping[int, list[tuple[str, Layer]]],
    on_input: Seen,
    on_output: Seen | None,
    on_use: Callable[[str], None] | None,
) -> Any:
    """A mode of torch that sees each product, with matrices by their address.

    A layer that is a module tells its input itself; here it is seen when it is passed by and its
    weight used directly.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is functional.linear and len(args) > 1:
                alone = [n for n, k in matrices.get(args[1].data_ptr(), ()) if k.module is None]
                for name in alone:
                    on_input(name, rows_of(args[0]))
                if len(alone) == 1 and on_output is not None:
                    on_output(alone[0], rows_of(result))
            elif getattr(func, "__name__", "") in _PRODUCTS:
                tensors = [t for t in _flat(args) if isinstance(t, torch.Tensor)]
                for tensor in tensors:
                    for name, layer in matrices.get(tensor.data_ptr(), ()):
                        rows = _entering(layer, tensor, tensors)
                        if rows is not None:
                            on_input(name, rows)
                        elif on_use is not None and not layer.transposed:
                            on_use(name)
            return result

    return Products()


def _entering(layer: Layer, weight: Any, factors: list[Any]) -> F32 | None:
    """The rows that a product of two tensors puts into a layer; None if it is another product.

    Either ``weight @ x``, with the inputs in columns, or ``x @ weight.T``.
    """
    if len(factors) != 2 or weight.dim() != 2 or layer.transposed:
        return None
    other = factors[0] if factors[1] is weight else factors[1]
    if factors[0] is weight and weight.shape[1] == layer.features:
        inputs = other.transpose(-1, -2) if other.dim() > 1 else other
    elif factors[1] is weight and weight.shape[0] == layer.features and weight.stride(0) == 1:
        inputs = other
    else:
        return None
    return rows_of(inputs) if inputs.shape[-1] == layer.features else None


def _flat(args: Any) -> Iterator[Any]:
    """Arguments of a function, those in a list among them."""
    for arg in args:
        yield from arg if isinstance(arg, list | tuple) else (arg,)


def run_tokens(checkpoint: Checkpoint, tokens: NDArray[np.int64]) -> None:
    """One forward pass over a window or a line, (tokens,)."""
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(tokens)[None]).to(device_of(checkpoint.model))
    options = {"use_cache": False} if checkpoint.kind == "causal" else {}
    with torch.inference_mode():
        checkpoint.model(input_ids=ids, **options)


def rows_of(x: Any) -> F32:
    """A torch tensor as rows of its last dimension, (rows, C) float32."""
    rows: F32 = x.detach().reshape(-1, x.shape[-1]).float().cpu().contiguous().numpy()
    return rows
