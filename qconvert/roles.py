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
        role: what follows in the name, ``self_attn.q_proj``, with ``*`` for further numbers; what
            the same module of another layer has too.
        block: the name up to that number, ``model.layers.3``; empty outside of the layers.
        pattern: the whole name with ``*`` for its numbers.
    """

    layer: int | None
    role: str
    block: str
    pattern: str


def place_of(name: str) -> Place:
    """The place that a tensor's name tells, of any naming that counts its layers."""
    stem, pattern = layer_name(name), _NUMBER.sub("*", name)
    first = _NUMBER.search(stem)
    if first is None:
        return Place(None, stem, "", pattern)
    role = _NUMBER.sub("*", stem[first.end() + 1 :]) or stem[: first.start()]
    return Place(int(first[0]), role, stem[: first.end()], pattern)
