"""What a row of the table of architectures says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.mapped import Change, Locate, Order
from qconvert.architectures.rope import Rope


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that llama.cpp's loader asks for.

    Attributes:
        name: in GGUF; within a block without ``blk.N.``, or whole with ``{}`` for the number.
        shape: names of `Sizes`, outermost dimension first.
        heads: whether its rows are those of heads with rotated halves, to be interleaved.
        flag: field of the configuration that says whether there is such a tensor; none: always.
        only: which blocks have it; None: all.
        source: the shape that a checkpoint has it in, likewise; None: the same, or, of a tensor
            that is one of several equal parts, so many times as many rows.
        rows: where its rows are in the source, if that is not said by ``heads`` or equal parts.
        order: where its values are in the source, if they are not whole rows of it.
        turned: where its rows are in the source with its last two dimensions exchanged.
        change: what is done to each value.
        factors: what its rows are multiplied by, all by one number or each by its own.
        stored: the same slot for checkpoints that have it in another form, which ``source`` of that
            slot is the shape of; where both are of one shape, it is in this slot's.
        cut: whether rows of the source that nothing is computed with are left out.
        plain: a norm to which nothing is added, in a family that adds to norms.
        optional: whether llama.cpp does without it.
        zeros: whether zeros stand for one that the checkpoint does without: llama.cpp wants it, and
            computes nothing with it.
    """

    name: str
    shape: str
    heads: bool = False
    flag: str | None = None
    only: Callable[[Config, Sizes, int], bool] | None = None
    source: str | None = None
    rows: Callable[[Sizes], Locate] | None = None
    order: Callable[[Sizes], Order] | None = None
    turned: Locate | None = None
    change: Change | None = None
    factors: Callable[[Config, Sizes], Sequence[float]] | None = None
    stored: Slot | None = None
    cut: bool = False
    plain: bool = False
    optional: bool = False
    zeros: bool = False


@dataclass(frozen=True, slots=True)
class Further:
    """A layer after the last that predicts a further token (multi-token prediction, MTP), for
    drafts that the model then checks.

    Attributes:
        block: its tensors.
        renames: beginnings of source names, and what stands for them as layer ``{}``.
    """

    block: tuple[Slot, ...]
    renames: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what llama.cpp calls an architecture, and what transformers calls it.

    Attributes:
        name: for people.
        classes: values of config.json's ``architectures``.
        arch: GGUF's ``general.architecture``.
        whole: tensors outside the blocks.
        block: tensors of each block.
        keys: hyper-parameters, below ``<arch>.``; rotary ones come from ``rope``.
        sizes: dimensions.
        rope: rotary positions; None without.
        activations: what ``hidden_act`` or ``hidden_activation`` may be.
        window: the sliding window that the configuration asks for and llama.cpp does not apply.
        norm_offset: whether transformers adds one to the weights of norms; llama.cpp does not.
        tied: what ``tie_word_embeddings`` is where config.json does not say; None: whatever the
            tensors are.
        renames: beginnings of source names, and what stands for them in gguf-py's table.
        dropped: beginnings of source names that llama.cpp has no use for, and why.
        buffers: ends of source names that older checkpoints have of what is computed.
        parts: ends of source names within a block, or whole names outside, for which gguf-py's
            table has no name, or another one, and the slots that are made of each: several are
            equal parts of its rows, in their order, or say themselves where their rows are.
        further: the layer for the prediction of one more token; None where llama.cpp has no place
            for it.
        per_layer: whether its keys say what ``per_layer_config`` says.
        dense: whether llama.cpp has places for sentence-transformers' dense modules.
        scores: whether llama.cpp has a head of two rows with softmax, for rerankers that are
            language models.
        own_head: whether llama.cpp wants an output matrix even where it is the token embedding.
        said: what is to be said of a configuration that is taken, of what llama.cpp does otherwise.
        instead: rows for some configurations of the same classes, by what the language model's
            fields say: llama.cpp has another architecture for them, or other tensors.
    """

    name: str
    classes: tuple[str, ...]
    arch: str
    whole: tuple[Slot, ...]
    block: tuple[Slot, ...]
    keys: Callable[[Config, Sizes], Keys]
    sizes: Callable[[Config], Sizes]
    rope: Callable[[Config, Sizes], Rope] | None
    activations: tuple[str, ...]
    window: Callable[[Config, Sizes], int | None] = lambda config, sizes: None
    norm_offset: bool = False
    tied: bool | None = None
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    further: Further | None = None
    own_head: bool = False
    dense: bool = False
    scores: bool = False
    per_layer: bool = False
    said: Callable[[Config], str | None] = lambda config: None
    instead: Callable[[Mapping[str, Any]], Family | None] = lambda fields: None

    def renamed(self, name: str) -> str:
        """The name as gguf-py's table has it, for checkpoints that write it otherwise."""
        for start, instead in self.renames:
            if name.startswith(start):
                name = instead + name.removeprefix(start)
        # LayerNorm of checkpoints that came from TensorFlow
        if name.endswith(".gamma"):
            return name.removesuffix("gamma") + "weight"
        if name.endswith(".beta"):
            return name.removesuffix("beta") + "bias"
        return name

    def useless(self, name: str) -> str | None:
        """Why llama.cpp has no use for a tensor of the source; None where it may have."""
        plain = self.renamed(name)
        return next((why for start, why in self.dropped if plain.startswith(start)), None)
