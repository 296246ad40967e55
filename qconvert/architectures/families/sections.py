"""Rotary positions of models that see: pairs of dimensions for time, height and width (mrope).

In a text all three are one position, so that llama.cpp has to rotate each pair by one of them.
"""

from __future__ import annotations

from collections.abc import Callable

from qconvert.architectures.config import Config
from qconvert.architectures.families.keys import Sizes, partial_rotary, rotated
from qconvert.architectures.rope import Rope, Scalings, settled
from qconvert.files.gguf_writer import GgufValue

SECTIONS = "mrope_section"
INTERLEAVED = (SECTIONS, "mrope_interleaved")


def sectioned(
    scalings: Scalings, usual: tuple[int, int, int], *, interleaved: bool
) -> Callable[[Config, Sizes], Rope]:
    """Rotary positions of an architecture with sections.

    Args:
        scalings: what llama.cpp does for it.
        usual: numbers of pairs for time, height and width where no field says them.
        interleaved: whether pairs take turns, rather than lie together.
    """

    def rope(config: Config, sizes: Sizes) -> Rope:
        found = partial_rotary(scalings, scalings.whole)(config, sizes)
        parameters = settled(config, scalings)
        fields = parameters.fields
        stated = fields.get(SECTIONS, list(usual))
        if (
            not isinstance(stated, list)
            or len(stated) != 3
            or not all(type(s) is int and 0 <= s <= 1024 for s in stated)
        ):
            raise fields.wrong(SECTIONS, "three integers")
        pairs = rotated(parameters, sizes.head_dim) // 2
        if interleaved:
            sections = _turns(fields, stated, pairs, sizes.head_dim)
        elif sum(stated) != pairs:
            raise fields.wrong(SECTIONS, f"three integers whose sum is {pairs}, half a head")
        else:
            sections = stated
        found.keys["dimension_sections"] = GgufValue("INT32", [*sections, 0])
        return found

    return rope


def _turns(fields: Config, stated: list[int], pairs: int, head_dim: int) -> list[int]:
    """Sections of which none ends before the last pair that is its turn.

    llama.cpp gives a pair after the end of its section a fourth position, zero in a text, where
    transformers takes that of time: Qwen3-VL's own 24, 20 and 20 end before the 62nd of 64 pairs.
    One more of height or width makes a text right, and moves slow pairs of an image by its rows
    or columns.
    """
    least = [-(-(pairs - turn) // 3) for turn in range(3)]
    if any(s < wanted - 1 for s, wanted in zip(stated, least, strict=True)):
        raise fields.unlike(SECTIONS, f"{pairs} pairs in three parts of nearly one length")
    found = [max(both) for both in zip(stated, least, strict=True)]
    # llama.cpp ends its process at a sum above a head's width; longer sections say nothing more.
    return least if sum(found) > head_dim else found
