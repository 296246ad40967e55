"""Whether a model's output matrix is its token embedding: settled by comparing the two.

transformers 5 ties what the configuration ties, unless the checkpoint has both matrices and they
differ: merged adapters and resized models often keep the flag beside a head that was trained. Where
only one of the two is there, it serves as both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qconvert.architectures.config import Config
from qconvert.architectures.families.row import Family
from qconvert.architectures.families.slots import OUTPUT
from qconvert.errors import UnsupportedError
from qconvert.geometry import TILE_VALUES
from qconvert.model import Model, TensorInfo

HEAD = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "word_embeddings.weight", "backbone.embeddings.weight",
    "backbone.embedding.weight", "model.embeddings.weight", "shared.weight", "embed_in.weight",
    "wte.weight",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Head:
    """The output matrix of a model.

    Attributes:
        tied: whether it is the token embedding, so that a file needs one of them.
        copied: whether the file has it nevertheless, as llama.cpp wants one.
        stands_in: whether the head is what the checkpoint has of the two.
        notes, warnings: what is to be said about it.
    """

    tied: bool
    stands_in: bool = False
    copied: bool = False
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def output_head(model: Model, family: Family, config: Config) -> Head:
    """Settle where the output matrix comes from; both matrices are read if both may be it.

    Raises:
        UnsupportedError: a head of its own, in an architecture for which llama.cpp has none.
        FormatError: ``tie_word_embeddings`` is no truth value.
    """
    heads = (t for t in model.tensors if t.name.endswith(HEAD))
    head = next((t for t in heads if family.useless(t.name) is None), None)
    embedding = next((t for t in model.tensors if t.name.endswith(_EMBEDDINGS)), None)
    # A class without the field has one of that name for something else.
    of_class = config.known is None or "tie_word_embeddings" in config.known.fields
    if of_class and config.get("tie_word_embeddings") is not None:
        asked = config.flag("tie_word_embeddings", False)
    else:
        asked = head is None if family.tied is None else family.tied
    if head is None or (asked and embedding is None):
        return Head(asked, stands_in=head is not None, copied=asked and family.own_head)
    assert embedding is not None or not asked
    if asked and embedding is not None and equal_values(model, head, embedding):
        return Head(True, copied=family.own_head)
    if not any(slot.name == OUTPUT for slot in family.whole):
        raise UnsupportedError(
            "llama.cpp multiplies with the token embedding in this architecture, and the model has "
            "another output matrix",
            path=model.path,
            tensor=head.name,
            found="other values than the token embedding's",
            hint="write a .qblk file, or the tensors as they are with --raw",
            code="ARCH-HEAD",
        )
    if not asked:
        return Head(False)
    return Head(
        False,
        notes=(
            f"tensor '{head.name}' is not left out, though {config.path.name} ties it: it is "
            "another matrix than the token embedding",
        ),
        warnings=(
            f"{config.path.name} ties the output matrix to the token embedding, but '{head.name}' "
            "is another matrix: both are kept, as transformers does; set tie_word_embeddings to "
            "false to say so",
        ),
    )


def equal_values(model: Model, a: TensorInfo, b: TensorInfo) -> bool:
    """Whether two tensors hold the same numbers in the same shape, read a tile at a time."""
    if a.shape != b.shape or not (a.floating and b.floating):
        return False
    for start in range(0, a.size, TILE_VALUES):
        stop = min(start + TILE_VALUES, a.size)
        if not np.array_equal(model.values(a, start, stop), model.values(b, start, stop)):
            return False
    return True
