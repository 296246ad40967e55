"""Where a tensor stands in its model: in which layer, and what it does there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qconvert.model import layer_name

# ``layers.3.``, ``h.3.``, ``blk.3.``: the first number of a name counts the layers, later ones
# experts and the modules of a list.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's place.

    Attributes:
        layer: counted from 0 as in its name; None outside of the layers, as embeddings are.
        role: the rest of the name, ``self_attn.q_proj``, with ``*`` for further numbers; what the
            same module of another layer has too.
    """

    layer: int | None
    role: str


def place_of(name: str) -> Place:
    """The place that a tensor's name tells, of any naming that counts its layers."""
    stem = layer_name(name)
    first = _NUMBER.search(stem)
    if first is None:
        return Place(None, stem)
    return Place(int(first[0]), _NUMBER.sub("*", stem[first.end() + 1 :]) or stem[: first.start()])
