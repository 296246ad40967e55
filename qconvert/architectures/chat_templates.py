"""Chat templates, from every place that transformers reads them from."""

from __future__ import annotations

import re
from typing import Any

from qconvert.architectures.small_files import SmallFiles
from qconvert.errors import FormatError
from qconvert.files.gguf_writer import GgufValue, MetadataValue
from qconvert.files.shards import TEMPLATES

DEFAULT = "default"
ALONE = "chat_template.jinja"
OF_PROCESSOR = ("chat_template.json", "processor_config.json")
_NAME = re.compile(r"[\w.-]{1,64}")


def chat_templates(files: SmallFiles, settings: dict[str, Any]) -> dict[str, str]:
    """Templates by their names.

    Files of their own go before tokenizer_config.json, as in transformers: with them nothing is
    taken from there. Models of text and images may have theirs with the processor alone.

    Args:
        files: of the model.
        settings: tokenizer_config.json.

    Raises:
        FormatError: a template that is not UTF-8.
    """
    found: dict[str, str] = {}
    if (text := _text(files, ALONE)) is not None:
        found[DEFAULT] = text
    for name in files.names():
        if name.startswith(f"{TEMPLATES}/"):
            stem = name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")
            found[stem] = _text(files, name) or ""
    if found:
        return found
    found = _named(settings.get("chat_template"))
    for name in OF_PROCESSOR:
        found = found or _named((files.json(name) or {}).get("chat_template"))
    return found


def chat_template_keys(templates: dict[str, str]) -> dict[str, MetadataValue]:
    """The templates as GGUF has them; one with a name that no key can have is left out."""
    keys: dict[str, MetadataValue] = {}
    if DEFAULT in templates:
        keys["tokenizer.chat_template"] = templates[DEFAULT]
    names = [n for n in templates if n != DEFAULT and _NAME.fullmatch(n)]
    keys |= {f"tokenizer.chat_template.{name}": templates[name] for name in names}
    if names:
        keys["tokenizer.chat_templates"] = GgufValue("STRING", names)
    return keys


def _named(value: Any) -> dict[str, str]:
    """A text, a list of objects with name and template, or an object of texts."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) for e in value if isinstance(e, dict)]
    elif isinstance(value, dict):
        pairs = list(value.items())
    else:
        pairs = []
    return {k: v for k, v in pairs if isinstance(k, str) and isinstance(v, str)}


def _text(files: SmallFiles, name: str) -> str | None:
    data = files.read(name)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            "chat template is not UTF-8", path=files.home / name, code="ARCH-TEMPLATE"
        ) from error
