"""Which channels of a model can be rescaled without a change of its function, by the tensors that
give them out and those that take them in.

The table is in GGUF's names, which are the same for all architectures; what tensors of a checkpoint
these are made of is what `map_tensors` says, which also holds every tensor of the checkpoint
against the architecture: nothing that reads a channel is overlooked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.families.keys import Sizes
from qconvert.architectures.families.slots import OUTPUT
from qconvert.architectures.mapped import MappedTensor
from qconvert.architectures.mapping import map_tensors
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.source import CONFIG, read_config
from qconvert.architectures.tying import output_head
from qconvert.errors import UnsupportedError
from qconvert.model import WEIGHT, Model, TensorInfo

I64 = NDArray[np.int64]

# Each norm whose output nothing reads but these matrices (those that an architecture has).
_NORMS = (
    ("attn_norm", ("attn_q", "attn_k", "attn_v", "attn_qkv")),
    ("ffn_norm", ("ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps")),
)
# llama.cpp's architectures for which this was looked up. In all of them a block normalises before
# attention and before its inner layer, but in BERT, whose norms are read by the sum too; and all
# multiply the outputs of a gate and of ``ffn_up``, but BERT, which has a GELU there.
_ARCHITECTURES = {
    *("llama", "qwen2", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "gemma", "gemma2", "gemma3"),
    *("phi3", "bert"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor as a giver or a taker of channels.

    Attributes:
        tensor: of the checkpoint.
        channels: which one a row gives, or a value of a vector, (rows,), -1 for none; or which one
            a column takes, (matrices, columns), of as many equal matrices as the tensor is of.
    """

    tensor: TensorInfo
    channels: I64


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels between tensors.

    Attributes:
        name: of the tensor that gives them.
        size: number of channels.
        givers: tensors whose rows are divided by factors: a norm, or a matrix with its bias.
        takers: tensors whose columns are multiplied by them.
        offset: what a norm adds to its weights before it multiplies.
    """

    name: str
    size: int
    givers: tuple[Part, ...]
    takers: tuple[Part, ...]
    offset: float = 0.0


def channel_groups(model: Model) -> list[ChannelGroup]:
    """All groups of a model.

    Args:
        model: with every tensor in a plain dtype; of its tensors, token embedding and output matrix
            are read if they may be the same.

    Raises:
        UnsupportedError: no configuration, or an architecture that is not in the table.
        InputError: tensors that are not those which the configuration says.
    """
    fields = SmallFiles(model).json(CONFIG)
    if fields is None:
        raise UnsupportedError(f"no {CONFIG} says how its layers follow each other")
    family, config = read_config(fields, model.path / CONFIG)
    if family.arch not in _ARCHITECTURES:
        raise UnsupportedError(f"{family.name} is not in the table of what follows what")
    sizes = family.sizes(config)
    head = output_head(model, family, config)
    mapped, _ = map_tensors(model, family, config, sizes, {}, head)
    return list(_groups({t.info.name.removesuffix(WEIGHT): t for t in mapped}, sizes))


def _groups(made: dict[str, MappedTensor], sizes: Sizes) -> Iterator[ChannelGroup]:
    for i in range(sizes.blocks):
        block = f"blk.{i}."
        parts = {n.removeprefix(block): t for n, t in made.items() if n.startswith(block)}
        for norm, readers in _NORMS:
            if norm in parts:
                yield _of_norm(parts[norm], [parts[r] for r in readers if r in parts])
        yield _of_values(parts, sizes)
        yield from _of_gates(parts)
    output = made.get(OUTPUT.removesuffix(WEIGHT))
    if output is not None:
        yield _of_norm(made["output_norm"], [output])


def _of_norm(norm: MappedTensor, readers: Sequence[MappedTensor]) -> ChannelGroup:
    """A norm's gains, and the matrices that read what it gives."""
    channels = np.arange(norm.info.size)
    takers = {p.tensor.name: p for r in readers for p in _takers(r, channels[None])}
    givers = _givers(norm, channels)
    return _group(givers, tuple(takers.values()), len(channels), norm.added)


def _of_values(parts: dict[str, MappedTensor], sizes: Sizes) -> ChannelGroup:
    """The values of attention, which it averages, and the matrix after it. Heads of queries may
    share those of a head.
    """
    query, key, head = sizes.named["query"], sizes.named["key"], sizes.head_dim
    values = np.arange(key)
    fused = "attn_qkv" in parts
    rows = np.concatenate([np.full(query + key, -1), values]) if fused else values
    giver = parts["attn_qkv" if fused else "attn_v"]
    column = np.arange(query)
    shared = column // head // (query // key) * head + column % head
    givers = _givers(giver, rows)
    if "attn_v.bias" in parts:
        givers += _givers(parts["attn_v.bias"], values)
    return _group(givers, _takers(parts["attn_output"], shared[None]), key)


def _of_gates(parts: dict[str, MappedTensor]) -> Iterator[ChannelGroup]:
    """What is multiplied by a gate's output, and the matrix after it."""
    if "ffn_up_exps" in parts:
        experts, inner, _ = parts["ffn_up_exps"].info.shape
        channels = np.arange(experts * inner)
        givers = _givers(parts["ffn_up_exps"], channels)
        takers = _takers(parts["ffn_down_exps"], channels.reshape(experts, inner))
        yield _group(givers, takers, len(channels))
        return
    inner, rows = parts["ffn_down"].info.shape[1], parts["ffn_up"].info.shape[0]
    channels = np.arange(inner)
    if "ffn_gate" not in parts and rows != 2 * inner:
        return  # it is the argument of a function that is not linear
    gate = np.full(rows - inner, -1)  # in one matrix with it
    givers = _givers(parts["ffn_up"], np.concatenate([gate, channels]))
    if "ffn_up.bias" in parts:
        givers += _givers(parts["ffn_up.bias"], channels)
    yield _group(givers, _takers(parts["ffn_down"], channels[None]), inner)


def _group(
    givers: tuple[Part, ...], takers: tuple[Part, ...], size: int, offset: float = 0.0
) -> ChannelGroup:
    return ChannelGroup(givers[0].tensor.name, size, givers, takers, offset)


def _givers(tensor: MappedTensor, channels: I64) -> tuple[Part, ...]:
    """The sources of a tensor with the channels of its rows, -1 for none."""
    rows = np.arange(len(channels))
    there = rows if tensor.locate is None else tensor.locate(rows)
    shape = tensor.sources[0].shape
    count = int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0]
    parts = []
    for i, source in enumerate(tensor.sources):
        found = np.full(count, -1)
        inside = there // count == i
        found[there[inside] - i * count] = channels[inside]
        parts.append(Part(source, found))
    return tuple(parts)


def _takers(tensor: MappedTensor, channels: I64) -> tuple[Part, ...]:
    """The sources of a tensor with the channels of its columns, (matrices, columns) or for all
    matrices the same.
    """
    if len(channels) == len(tensor.sources) > 1:
        return tuple(Part(s, channels[i : i + 1]) for i, s in enumerate(tensor.sources))
    return tuple(Part(s, channels) for s in tensor.sources)
