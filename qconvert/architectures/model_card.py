"""``general.*`` keys: licence, languages, tags and base models from the front matter of README.md.

Only what the card states is written, nothing is guessed from names of files. A card describes a
model and is no part of it: a field that cannot be read is left out with a warning, and nothing in a
card stops a conversion.

Fields are taken one by one, each by itself as YAML without types: cards hold much that is not asked
for and not always YAML, and ``no`` is a language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

MAX_FRONT_MATTER = 1 << 20  # bytes that are looked through for fields
MAX_FIELD = 1 << 15  # characters of a field that is read
MAX_NESTING = 16  # of brackets in it
MAX_TEXT = 1000  # characters of a value
MAX_NAMES = 1000
_HUB = "https://huggingface.co/"
_TEXTS = ("license", "license_name", "license_link", "model_name")
_LISTS = ("base_model", "datasets", "tags", "language")
_FIELD = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]|$)")
_ENDLESS: list[str] = []  # known by its identity
_NULL = ("", "~", "null", "Null", "NULL")


def card_keys(readme: bytes | None, path: Path) -> tuple[Keys, list[str]]:
    """Keys from a model card, and warnings; none without a card or without front matter."""
    fields, warnings = _fields(readme or b"", path)
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
    return keys, warnings


def _names(value: Any) -> list[str]:
    """A name or a list of names as a list."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str) and v not in _NULL][:MAX_NAMES]


def _fields(readme: bytes, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The fields asked for that could be read, and what is to be said of the others."""
    lines = _front_matter(readme)
    if lines is None:
        return {}, []
    if lines is _ENDLESS:
        return {}, [
            f"{path.name} begins with fields that have no end in its first {MAX_FRONT_MATTER:,} "
            "bytes: nothing was taken from it"
        ]
    texts = dict(_split(lines))  # of two fields with one name the last, as in YAML
    found: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name in (*_TEXTS, *_LISTS):
        if name not in texts:
            continue
        value, reason = _read(texts[name])
        if reason is None and name in _TEXTS and value in _NULL:
            continue
        if reason is None and not isinstance(value, str) and name in _TEXTS:
            reason = "is no text"
        if reason is not None:
            wrong[name] = reason
            continue
        found[name] = value
    if not texts and any(lines):
        return {}, [
            f"{path.name} begins with a rule and not with fields: nothing was taken from it"
        ]
    return found, [
        f"field '{name}' of {path.name} is left out: it {reason}" for name, reason in wrong.items()
    ]


def _front_matter(readme: bytes) -> list[str] | None:
    """Lines between the first, ``---``, and the next of this kind; None without the first."""
    text = readme[:MAX_FRONT_MATTER].decode("utf-8", "replace").lstrip("\ufeff")
    lines = [line.rstrip() for line in text.splitlines()]
    if not lines or lines[0] != "---":
        return None
    end = next((i for i, line in enumerate(lines[1:], 1) if line == "---"), None)
    return _ENDLESS if end is None else lines[1:end]


def _split(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each field with its lines: the one that it begins on, and those that belong to it."""
    name, held = "", [""]
    for line in lines:
        match = _FIELD.match(line)
        if match:
            if name:
                yield name, "\n".join(held)
            name, held = match[1], [re.sub(r"^([^\s]+:)\t+", r"\1 ", line)]
        elif name:
            held.append(line)
    if name:
        yield name, "\n".join(held)


def _read(text: str) -> tuple[Any, str | None]:
    """The value of a field, every scalar a text; and why there is none."""
    if len(text) > MAX_FIELD:
        return None, f"has more than {MAX_FIELD:,} characters"
    depth = deepest = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        return None, "is nested too deep"
    try:
        fields = yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(getattr(error, "problem", None) or error).split())
        return None, f"is not YAML ({said[:80]})"
    value = next(iter(fields.values()), None) if isinstance(fields, dict) else None
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return None, f"is a text of more than {MAX_TEXT:,} characters"
    if isinstance(value, str) and not _encodable(value):
        return None, "is no Unicode"
    if isinstance(value, list):
        texts = [v for v in value if isinstance(v, str)]
        value = [v for v in texts if len(v) <= MAX_TEXT and _encodable(v)]
    return value, None


def _encodable(text: str) -> bool:
    """Whether a text has no half of a pair of UTF-16, which YAML lets one write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # neither gives anything but texts
