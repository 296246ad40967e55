"""The table of projectors in formats/gguf.md, from the figures that `make_projectors.py` found."""

from __future__ import annotations

from typing import Any

from conftest import ROOT
from projector_models import MODELS, OTHERWISE, WITHOUT_CONVERTER

from qconvert.architectures.vision.table import projector_of

PAGE = ROOT / "formats" / "gguf.md"
BEGIN, END = "<!-- projectors -->\n", "<!-- end of projectors -->\n"
_SCHEMES = ("f32", "f16", "q8_0", "q4_0")
_HEAD = """
| model | class | `clip.projector_type` | converter's file | rounded | f32 | f16 | q8_0 | q4_0 |
|---|---|---|---|---|---|---|---|---|
"""


def table(recorded: dict[str, Any]) -> str:
    """The table.

    Args:
        recorded: of each model by its name in `MODELS`.
    """
    lines = []
    for name, found in recorded.items():
        row = projector_of(MODELS[name], PAGE)
        same = "no converter" if name in WITHOUT_CONVERTER else "equal"
        if name in OTHERWISE:
            same = f"equal but for {', '.join(f'`{t}`' for t in OTHERWISE[name])}"
        figures = [f"{found['differences'][s]:.1e}" for s in ("tables", *_SCHEMES)]
        cells = (row.name, MODELS[name]["architectures"][0], f"`{row.kind}`", same, *figures)
        lines.append(f"| {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n\n"


def with_table(page: str, recorded: dict[str, Any]) -> str:
    """The page with another table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(recorded) + END + rest.split(END)[1]
