"""The table of projectors, and the row for a configuration."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.architectures.vision import gemma4, internvl, llama4, llava, pixtral, qwen, siglip
from qconvert.architectures.vision.row import Projector
from qconvert.errors import UnsupportedError

PROJECTORS: tuple[Projector, ...] = tuple(
    row
    for module in (siglip, gemma4, qwen, internvl, llava, pixtral, llama4)
    for row in module.ROWS
)


def projector_of(fields: Mapping[str, Any], path: Path) -> Projector:
    """The row for a configuration, by its model_type, and by that of its tower.

    Args:
        fields: of config.json.
        path: the file, for messages.

    Raises:
        UnsupportedError: no row is for it; the message names what there is.
    """
    named = fields.get("architectures")
    classes = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
    model_type = fields.get("model_type")
    vision = fields.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    of_type = [
        p
        for p in PROJECTORS
        if model_type in p.model_types
        or (model_type is None and any(name in p.classes for name in classes))
    ]
    fitting = [p for p in of_type if not p.towers or tower in p.towers]
    if fitting:
        return fitting[0]
    found = f"{', '.join(classes) or 'no architectures'}, model_type {reprlib.repr(model_type)}"
    if of_type:
        found += f" with a tower of model_type {reprlib.repr(tower)}"
        wanted = " or ".join(t for p in of_type for t in p.towers)
    else:
        wanted = ", ".join(p.name for p in PROJECTORS)
    raise UnsupportedError(
        "the part of the model that sees is none that llama.cpp's projectors have here",
        path=path,
        found=found,
        wanted=wanted,
        hint="formats/gguf.md has a table of them; without --mmproj the language model is written",
        code="ARCH-UNKNOWN",
    )
