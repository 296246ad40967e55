"""What a row of the table of projectors says: the part of a model that turns images into tokens.

llama.cpp has it in a file of its own beside the language model, for the program llama-mtmd-cli and
the server's ``--mmproj``. Its architecture is ``clip`` whatever the tower is; which graph is run,
``clip.projector_type`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ConfigClass
from qconvert.architectures.families.keys import Keys, Sizes
from qconvert.architectures.families.row import Slot
from qconvert.architectures.vision.pictures import Pictures

ARCH = "clip"
PROJECTOR = "clip.projector_type"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the keys of a projector are read from.

    Attributes:
        whole: config.json.
        tower: its ``vision_config``.
        text: the language model's fields, of its own class where we know it.
        pictures: how pixels are prepared.
        token: the id of an added token by its text; None where there is none.
    """

    whole: Config
    tower: Config
    text: Config
    pictures: Pictures
    token: Callable[[str], int | None]

    @property
    def text_width(self) -> int:
        """Of the language model's embeddings, which images are turned into."""
        return self.text.count("hidden_size")

    def whole_is(self, model_type: str) -> bool:
        """Whether the whole model is of a type."""
        return bool(self.whole.get("model_type") == model_type)


@dataclass(frozen=True, slots=True)
class Projector:
    """One row: what llama.cpp calls a projector, and what transformers calls its model.

    Attributes:
        name: for people.
        model_types: of whole models, as config.json has them.
        classes: values of its ``architectures``, where it has no such model_type.
        towers: values of ``vision_config``'s model_type, if rows differ in it.
        kind: ``clip.projector_type``.
        config: the class of ``vision_config``.
        whole: tensors outside the tower's blocks.
        block: those of each, by whole names with ``{}`` for the number.
        parts: ends of source names within a block, or whole names outside, and the slots that are
            made of each; see `Family.parts`.
        renames: beginnings of source names, and what stands for them in ``parts``.
        prefixes: beginnings of the names of its tensors, once renamed; all others are the language
            model's.
        dropped: beginnings of names that llama.cpp has no use for, and why.
        sizes: dimensions.
        keys: with their whole names, but for those that all have.
        norm_offset: whether one is added to norms whose names end in ``norm.weight``.
        projector_key: what ``kind`` is stated under.
        more_dropped: those of ``dropped`` that follow from the configuration.
        said: what llama.cpp does otherwise than transformers.
        more_parts: those of ``parts`` that follow from the configuration.
    """

    name: str
    model_types: tuple[str, ...]
    classes: tuple[str, ...]
    kind: str
    config: ConfigClass
    whole: tuple[Slot, ...]
    block: tuple[Slot, ...]
    parts: Mapping[str, tuple[str, ...]]
    renames: tuple[tuple[str, str], ...]
    prefixes: tuple[str, ...]
    sizes: Callable[[Inputs], Sizes]
    keys: Callable[[Inputs, Sizes], Keys]
    towers: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    norm_offset: bool = False
    projector_key: str = PROJECTOR
    more_dropped: Callable[[Inputs, Sizes], tuple[tuple[str, str], ...]] = lambda inputs, sizes: ()
    said: str | None = None
    more_parts: Callable[[Inputs, Sizes], Mapping[str, tuple[str, ...]]] = lambda inputs, sizes: {}
