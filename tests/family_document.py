"""Tables in formats/gguf.md, from what `make_families.py` and its like found."""

from __future__ import annotations

from typing import Any

from conftest import ROOT
from family_models import MORE, NARROW
from pretokenizer_data import ORIGINS

from qconvert.architectures.llama_pretokenizers import PRE_TOKENIZERS, plain_name

PAGE = ROOT / "formats" / "gguf.md"
_HEAD = """
| model | class | layers | logits differ by | tensors | types equal |
|---|---|---|---|---|---|
"""
_TOKENIZERS = """
| package | model | tokens | pre-tokenizer | by the hash | other tokens for | of plain texts |
|---|---|---|---|---|---|---|
"""
_PRE_TOKENIZERS = """
| name | the same under other names | its rules are | other tokens for | of more scripts |
|---|---|---|---|---|
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
        pre, hashed = found.get("pre", ""), found["by hash"] or ""
        cells = (name, found["kind"], f"{found['rows']:,}", pre, hashed, counts, plain)
        lines.append(f"| {' | '.join(cells)} |")
    return _between(page, "tokenizers", _TOKENIZERS + "\n".join(lines) + "\n\n")


def with_pre_tokenizers(page: str, figures: dict[str, Any]) -> str:
    """The page with another table of pre-tokenizers."""
    lines = []
    for name in dict.fromkeys(map(plain_name, PRE_TOKENIZERS)):
        others = ", ".join(n for n in PRE_TOKENIZERS if plain_name(n) == name != n)
        counts = [f"{n} of 2000" for n in figures["differences"].get(name, ())] or ["", ""]
        cells = (name, others, ORIGINS.get(name, "not known"), *counts)
        lines.append(f"| {' | '.join(cells)} |")
    return _between(page, "pre-tokenizers", _PRE_TOKENIZERS + "\n".join(lines) + "\n\n")


def _between(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, rest = page.split(begin)
    return before + begin + text + end + rest.split(end)[1]
