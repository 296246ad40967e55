"""``general.*`` keys: licence, languages, tags and base models from the front matter of README.md.

Only what the card states is written, nothing is guessed from names of files.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from qconvert.errors import FormatError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

MAX_FRONT_MATTER = 1 << 20
MAX_NAMES = 1000
_HUB = "https://huggingface.co/"


def card_keys(readme: bytes | None, path: Path) -> Keys:
    """Keys from a model card; none without one or without front matter.

    Raises:
        FormatError: the front matter is no YAML of fields.
    """
    fields = _front_matter(readme or b"", path)
    keys: Keys = {}
    for name in ("license", "license_name", "license_link"):
        if isinstance(fields.get(name), str):
            keys[f"general.{name.replace('_', '.')}"] = fields[name]
    if isinstance(fields.get("model_name"), str):
        keys["general.name"] = fields["model_name"]
    for field_name, key in (("base_model", "base_model"), ("datasets", "dataset")):
        repositories = _names(fields.get(field_name))
        if repositories:
            keys[f"general.{key}.count"] = GgufValue("UINT32", len(repositories))
        for i, repository in enumerate(repositories):
            organisation, _, name = repository.rpartition("/")
            keys[f"general.{key}.{i}.name"] = name or repository
            if organisation:
                keys[f"general.{key}.{i}.organization"] = organisation
                folder = "datasets/" if key == "dataset" else ""
                keys[f"general.{key}.{i}.repo_url"] = f"{_HUB}{folder}{repository}"
    for field_name, key in (("tags", "general.tags"), ("language", "general.languages")):
        if names := _names(fields.get(field_name)):
            keys[key] = GgufValue("STRING", names)
    return keys


def _names(value: Any) -> list[str]:
    """A name or a list of names as a list; YAML reads the language code of Norwegian as false."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v][:MAX_NAMES]


def _front_matter(readme: bytes, path: Path) -> dict[str, Any]:
    """The YAML between the first line and the next ``---``."""
    text = readme[: MAX_FRONT_MATTER + 8].decode("utf-8", "replace").lstrip("\ufeff")
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    end = next((i for i, line in enumerate(lines[1:], 1) if line.strip() == "---"), None)
    if end is None:
        return {}
    matter = "\n".join(lines[1:end])
    try:
        fields = yaml.safe_load(matter)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(
            "front matter of the model card is not YAML",
            path=path,
            found=" ".join(str(error).split())[:160],
            hint="correct README.md, or move it away",
            code="ARCH-CARD",
        ) from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise FormatError(
            "front matter of the model card has no fields",
            path=path,
            found=reprlib.repr(fields),
            code="ARCH-CARD",
        )
    return fields
