"""formats/gguf-configuration.md from the outcomes that `make_config_table.py` found."""

from __future__ import annotations

from typing import Any

TITLE = """[GGUF](gguf.md). Made by [a script](../tests/make_config_table.py), not by hand.

# What every field of a configuration becomes

For every class of configuration that becomes a GGUF file for llama.cpp, every field of it that
transformers 5.24 knows, set to other values, to null, and removed ("absent"); and rotary fields in
their old and new places beside each other. A tiny model with random weights was built by
transformers from each, converted to F32 and run by llama.cpp 0c1e57098 on {tokens} tokens. Of
the classes from smollm3 on, whose models are in
[a file of their own](../tests/family_models.py), each field has one or two other values, and null
where its type allows that; fields that nothing depends on are changed together; of rotary fields
there are the kinds of scaling. Any outcome but these four would have been a fault ({taken} more are
explained below):

- **equal**: llama.cpp computes what transformers does. *Effect* is how far the field moves
  transformers' own outputs (logits; hidden states of an encoder), *difference* how far llama.cpp is
  from transformers, both of the largest output. "Shapes": the checkpoint is another one.
- **no effect**: the same, and transformers computes the same without the field.
- **refused**, before anything is written, with the code given ([what they mean](gguf.md)).
- **warned**: equal for texts of so many tokens, or, with factors for long texts, in a context of
  the length that the warning names; it is said at the conversion.

"not loaded" marks configurations that transformers itself refuses or cannot run. Types are
transformers' too: where it wants a number with a point, 30 is refused and 30.0 taken.

| class | cases | equal | no effect | refused | warned | without a change they differ by |
|---|---|---|---|---|---|---|
"""


def document(table: dict[str, list[dict[str, Any]]], bases: dict[str, Any], tokens: int) -> str:
    """The whole page.

    Args:
        table: rows of each class, by its ``model_type``.
        bases: outcomes without a change.
        tokens: of the text.
    """
    found = [(name, row) for name, rows in table.items() for row in rows]
    taken = [(name, row) for name, row in found if row["verdict"] == "taken"]
    lines = [TITLE.format(tokens=tokens, taken=len(taken)).rstrip("\n")]
    for name, rows in table.items():
        verdicts = [row["verdict"] for row in rows]
        counts = [verdicts.count(v) for v in ("equal", "no effect", "refused")]
        counts.append(verdicts.count("warned"))
        cells = [f"[{name}](#{name})", len(rows), *counts, f"{bases[name]['difference']:.1e}"]
        lines.append(_line(cells))
    taken = [
        (name, row) for name, rows in table.items() for row in rows if row["verdict"] == "taken"
    ]
    lines += ["", "Taken although transformers does not load it:", ""]
    lines += [f"- {name}, {row['field']}, {row['value']}: {row['why']}." for name, row in taken]
    for name, rows in table.items():
        lines += ["", f"## {name}", "", "| field | value | outcome | effect | difference |"]
        lines.append("|---|---|---|---|---|")
        lines += [_line(_cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[object]:
    verdict = row["verdict"]
    outcome = {
        "refused": f"refused: {row.get('code')}",
        "warned": f"warned: equal up to {row.get('tokens')} tokens",
    }.get(verdict, verdict)
    if verdict == "warned" and not row.get("tokens"):
        outcome = "warned: differs"
    if "unread" in row.get("warnings", ()):
        outcome += ", a warning names what has no effect"
    if "class" in row.get("warnings", ()):
        outcome += ", a warning names both"
    effect = row.get("effect", "not loaded" if "transformers" in row else "")
    difference = row.get("difference", "")
    return [f"`{row['field']}`", f"`{row['value']}`", outcome, _number(effect), _number(difference)]


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value else str(value)


def _line(cells: list[object]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
