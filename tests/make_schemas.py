"""Write the JSON schemas of all reports, formats/reports/*.json, from the classes of reports.

python tests/make_schemas.py          # write them
python tests/make_schemas.py --check  # exit 1 if one is not current
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from generated import ROOT, write_or_check

from qconvert.report import (
    BenchReport,
    CalibrateReport,
    InspectReport,
    QuantizeReport,
    QuantizeSetReport,
    Report,
    TuneReport,
    VerifyReport,
)

REPORTS = (
    *(BenchReport, CalibrateReport, InspectReport, QuantizeReport, QuantizeSetReport),
    *(TuneReport, VerifyReport),
)
PLAIN = {str: "string", int: "integer", bool: "boolean", type(None): "null"}
ERROR = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "qconvert.error/1",
    "description": "What a command prints under --json when it could not do its work.",
    "type": "object",
    "properties": {
        "schema": {"const": "qconvert.error/1"},
        "qconvert": {"type": "string"},
        "status": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "which error; does not change"},
                "exit": {"type": "integer", "description": "the exit code of the command"},
                "message": {"type": "string", "description": "for people"},
                "hint": {"type": ["string", "null"], "description": "what to do"},
                "path": {"type": ["string", "null"], "description": "the file it is about"},
                "tensor": {"type": ["string", "null"], "description": "and the tensor"},
            },
            "required": ["code", "exit", "message", "hint", "path", "tensor"],
            "additionalProperties": False,
        },
    },
    "required": ["schema", "qconvert", "status", "error"],
    "additionalProperties": False,
}
NOT_WRITTEN = {"seconds"}  # of a report, since equal work gives equal documents


def attributes(cls: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes, by name."""
    text = inspect.getdoc(cls) or ""
    _, _, listed = text.partition("Attributes:\n")
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", "\n" + re.split(r"\n\S", listed)[0]):
        names, colon, told = entry.strip().partition(":")
        if colon:
            for name in names.split(","):
                found[name.strip()] = " ".join(told.split())
    return found


def schema_of(hint: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; classes go into ``parts``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (typing.Union, types.UnionType):
        kinds = [schema_of(a, parts) for a in arguments]
        if all(list(kind) == ["type"] for kind in kinds):
            names = [kind["type"] for kind in kinds]
            flat = [n for name in names for n in (name if isinstance(name, list) else [name])]
            return {"type": list(dict.fromkeys(flat))}
        return {"anyOf": kinds}
    if origin in (list, tuple):
        return {"type": "array", "items": schema_of(arguments[0], parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of(arguments[1], parts)}
    if dataclasses.is_dataclass(hint):
        name = hint.__name__
        if name not in parts:
            parts[name] = {}  # so that a class may hold itself
            body = object_of(hint, parts)  # type: ignore[arg-type]
            parts[name] = headed(hint, body) if issubclass(hint, Report) else body  # type: ignore[arg-type]
        return {"$ref": f"#/$defs/{name}"}
    if hint is float:
        return {"type": ["number", "null"]}  # JSON has neither infinities nor NaN
    return {"type": PLAIN[hint]}


def object_of(cls: type, parts: dict[str, Any]) -> dict[str, Any]:
    told = attributes(cls)
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        if issubclass(cls, Report) and field.name in NOT_WRITTEN:
            continue
        properties[field.name] = schema_of(hints[field.name], parts)
        if field.name in told:
            properties[field.name]["description"] = told[field.name]
    first = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return {
        "type": "object",
        "description": " ".join(first.split()),
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def headed(cls: type[Report], body: dict[str, Any]) -> dict[str, Any]:
    """The schema of a report, which says first what it is."""
    head = {"schema": {"const": cls.SCHEMA}, "qconvert": {"type": "string"}}
    status = {"enum": ["pass", "fail"], "description": attributes(Report)["status"]}
    properties = {**head, **body["properties"], "status": status}
    return {**body, "properties": properties, "required": [*head, *body["required"]]}


def document(cls: type[Report]) -> str:
    """The schema of what a command prints under ``--json``."""
    parts: dict[str, Any] = {}
    body = headed(cls, object_of(cls, parts))
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": cls.SCHEMA,
        **body,
        "$defs": dict(sorted(parts.items())),
    }
    return json.dumps(whole, indent=1) + "\n"


def documents() -> dict[Path, str]:
    folder = ROOT / "formats/reports"
    reports = {
        folder / f"{cls.SCHEMA.split('.')[1].split('/')[0]}.json": document(cls) for cls in REPORTS
    }
    return {**reports, folder / "error.json": json.dumps(ERROR, indent=1) + "\n"}


if __name__ == "__main__":
    sys.exit(write_or_check(documents(), "tests/make_schemas.py"))
