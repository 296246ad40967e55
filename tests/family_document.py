"""Tables in formats/gguf.md, from what `make_families.py` and `make_tokenizers.py` found."""

from __future__ import annotations

from typing import Any

from conftest import ROOT
from family_models import MORE, NARROW

PAGE = ROOT / "formats" / "gguf.md"
_HEAD = """
| model | class | layers | logits differ by | tensors | types equal |
|---|---|---|---|---|---|
"""
_TOKENIZERS = """
| package | model | tokens | pre-tokenizer | other tokens for | of plain texts |
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
        counts = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
        layers = next(inner[name] for name in counts if name in inner)
        differing = len(found["otherwise"])
        types = f"all {found['types']}" if not differing else f"all but {differing}"
        cells = (name, config["architectures"][0], layers, f"{found['difference']:.1e}")
        lines.append(f"| {' | '.join(map(str, cells))} | {found['tensors']} | {types} |")
    return _HEAD + "\n".join(lines) + "\n\n"


def with_table(page: str, figures: dict[str, Any]) -> str:
    """The page with another table of families."""
    return _between(page, "families", table(figures))


def with_tokenizers(page: str, figures: dict[str, Any]) -> str:
    """The page with another table of tokenizers."""
    lines = []
    for name, found in figures.items():
        told = found.get("refused")
        counts = "refused" if told else f"{found['different']} of {found['texts']}"
        plain = "" if told else f"{len(found['plain different'])} of {found['plain']}"
        cells = (name, found["kind"], f"{found['rows']:,}", found.get("pre", ""), counts, plain)
        lines.append(f"| {' | '.join(cells)} |")
    return _between(page, "tokenizers", _TOKENIZERS + "\n".join(lines) + "\n\n")


def _between(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]
