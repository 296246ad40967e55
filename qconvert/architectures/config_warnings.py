"""What of a configuration nobody reads, and what llama.cpp does otherwise whatever it says."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.config_classes import ConfigClass
from qconvert.architectures.families import known_class
from qconvert.architectures.families.keys import Sizes
from qconvert.architectures.families.row import Family
from qconvert.architectures.rope import Rope

_MOST_LISTED = 300  # characters
_CUT = reprlib.Repr()
_CUT.maxstring = 60
_Unknown = list[tuple[str, ConfigClass | None]]


def config_warnings(
    fields: Mapping[str, Any], family: Family, config: Config, sizes: Sizes, rope: Rope
) -> tuple[str, ...]:
    """Warnings about a configuration that is taken.

    Args:
        fields: all of the file.
        family: row of the table.
        config: the language model's fields.
        sizes: of the model.
        rope: its rotary positions.
    """
    found = []
    known = known_class(fields)
    assert known is not None  # or there were no row
    named = fields.get("architectures")
    if isinstance(named, list) and named and not set(known.architectures) & set(map(str, named)):
        found.append(
            f"config.json has model_type '{known.model_type}', by which transformers goes, and "
            f"architectures {reprlib.repr(named)}: taken for {known.architectures[0]}"
        )
    unknown = _outside(fields, known)
    if known.inner and isinstance(inside := fields.get(known.inner[0]), dict):
        where, inner = known.inner
        unknown += [(f"{where}.{name}", inner) for name in _unknown(inside, inner)]
    unknown += [(name, None) for name in rope.unread]
    found += _without_effect(unknown, known)
    if known.model_type == "bert" and "labels" in sizes.named and sizes.named["types"] > 1:
        found.append(
            "llama.cpp has no second token type: values of a text by itself are the model's, but "
            "scores of pairs of texts differ from those of transformers"
        )
    if said := family.said(config):
        found.append(said)
    if family.arch == "qwen3" and "labels" in sizes.named:
        found.append(
            "llama.cpp takes softmax of the labels' values, or of one label's the logistic "
            "function; transformers gives the values themselves"
        )
    if window := family.window(config, sizes):
        found.append(
            f"llama.cpp attends to all tokens, not to a window of {window} as the configuration "
            f"says: texts of more than {window} tokens come out otherwise"
        )
    if rope.longer:
        found.append(
            f"llama.cpp takes the rotary factors for long texts when its context is longer than "
            f"{rope.longer} tokens, transformers when the text is: run it with a context of at "
            f"most {rope.longer} for texts that short"
        )
    if rope.dynamic:
        found.append(
            f"transformers stretches rotary positions by the length of a text above "
            f"{rope.dynamic} tokens ('dynamic'), llama.cpp does not: longer texts come out "
            "otherwise"
        )
    if rope.rounded > 0:
        found.append(
            "llama.cpp rounds the bounds between which YaRN stretches rotary positions, and "
            f"config.json says 'truncate': false: frequencies differ by up to {rope.rounded:.1%}"
        )
    return tuple(found)


def unread_fields(fields: Mapping[str, Any], inside: str, known: ConfigClass) -> tuple[str, ...]:
    """Warnings about fields that their classes do not know.

    Args:
        fields: all of the file.
        inside: name of an object in it.
        known: the class of that object.
    """
    whole = known_class(fields)
    unknown: _Unknown
    unknown = [(f"{inside}.{name}", known) for name in _unknown(fields[inside], known)]
    found = _without_effect(_outside(fields, whole), whole) if whole else []
    return (*found, *_without_effect(unknown, known))


def _outside(fields: Mapping[str, Any], known: ConfigClass) -> _Unknown:
    """Names at the top of the file that mean nothing, and the class that does not know them."""
    unknown: _Unknown = [(name, known) for name in _unknown(fields, known)]
    if known.flat and known.inner and fields.get(known.inner[0]) is None:
        inner = known.inner[1]
        unknown = [(n, c) for n, c in unknown if not inner.stands_outside(n)]
    return unknown


def _without_effect(unknown: _Unknown, known: ConfigClass) -> list[str]:
    if not unknown:
        return []
    return [
        "config.json has fields without effect, in transformers' "
        f"{known.name} as here: {_listed(unknown)}"
    ]


def _unknown(fields: Mapping[str, Any], known: ConfigClass) -> list[str]:
    """Names that ask for something, and that the class does not know; null asks for nothing."""
    names = []
    for name, value in fields.items():
        if value is None or known.knows(name):
            continue
        if name in known.harmless:
            harmless = known.harmless[name]
            if harmless is None or any(value == h and type(value) is type(h) for h in harmless):
                continue
        names.append(name)
    return names


def _listed(unknown: _Unknown) -> str:
    """Names, as many as fit on a line."""
    text = ""
    for i, one in enumerate(unknown):
        more = (", " if text else "") + _shown(*one)
        if len(text) + len(more) > _MOST_LISTED:
            return f"{text} and {len(unknown) - i} more"
        text += more
    return text


def _shown(name: str, known: ConfigClass | None) -> str:
    """A name, cut, and a field that it may have been meant for."""
    last = name.rpartition(".")[2][:80]
    fields = [*known.fields, *known.beside] if known else ()
    near = difflib.get_close_matches(last, fields, 1, 0.85)
    return _CUT.repr(name) + (f" (for '{near[0]}'?)" if near else "")
