"""What a row of the table of architectures says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.rope import Rope


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that llama.cpp's loader asks for.

    Attributes:
        name: in GGUF; within a block without ``blk.N.``.
        shape: names of `Sizes`, outermost dimension first.
        heads: whether its rows are those of heads with rotated halves, to be interleaved.
        flag: field of the configuration that says whether there is such a tensor; none: always.
    """

    name: str
    shape: str
    heads: bool = False
    flag: str | None = None


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
