"""The table of families in formats/gguf.md, from the figures that `make_families.py` found."""

from __future__ import annotations

from typing import Any

from conftest import ROOT
from family_models import MORE, NARROW

PAGE = ROOT / "formats" / "gguf.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
_HEAD = """
| model | class | layers | logits differ by | tensors | types equal |
|---|---|---|---|---|---|
"""


def table(figures: dict[str, Any]) -> str:
    """The table.

    Args:
        figures: of each model by its name in `NARROW` or `MORE`.
    """
    models = NARROW | MORE
    lines = []
    for name, found in figures.items():
        config = models[name]
        inner = config.get("text_config", config)
        layers = inner.get("num_hidden_layers") or inner["num_layers"]
        differing = len(found["otherwise"])
        types = f"all {found['types']}" if not differing else f"all but {differing}"
        cells = (name, config["architectures"][0], layers, f"{found['difference']:.1e}")
        lines.append(f"| {' | '.join(map(str, cells))} | {found['tensors']} | {types} |")
    return _HEAD + "\n".join(lines) + "\n\n"


def with_table(page: str, figures: dict[str, Any]) -> str:
    """The page with another table."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(figures) + END + rest.split(END)[1]
