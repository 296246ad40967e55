"""Reading a file of limits, which is TOML: unknown keys are refused, for a limit that is misspelt
would hold nothing.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qconvert.errors import InputError
from qconvert.files.regular import RegularFile
from qconvert.limits import OF_FILE, OF_TENSORS, REQUIRED, Limits, TensorLimits

MOST_BYTES = 1 << 20
_TABLES = ("tensors", "file", "require")


def read_limits(path: Path) -> Limits:
    """The limits that a file states.

    Raises:
        InputError: it cannot be read, is no TOML, or says what no limit is.
    """
    file = RegularFile(path)
    try:
        if file.size > MOST_BYTES:
            raise InputError("too long for limits", path=path, found=f"{file.size:,} bytes")
        data = file.read(0, file.size)
    finally:
        file.close()
    try:
        found = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as e:  # of UTF-8, of TOML, of an integer of 5,000 digits
        raise InputError(f"no TOML: {e}", path=path) from e
    reader = _Reader(path)
    reader.known(found, _TABLES, "the file")
    tensors = reader.tables(found.get("tensors", []), "[[tensors]]")
    stated = reader.table(found.get("file", {}), "[file]")
    required = reader.table(found.get("require", {}), "[require]")
    reader.known(stated, OF_FILE, "[file]")
    reader.known(required, REQUIRED, "[require]")
    limits = Limits(
        str(path),
        tuple(map(reader.of_tensors, tensors)),
        {key: reader.number(key, value, "[file]") for key, value in stated.items()},
        {key: reader.texts(key, value) for key, value in required.items()},
    )
    if not (limits.tensors or limits.file or limits.required):
        raise InputError(
            "no limit in it", path=path, wanted="tables [[tensors]], [file], [require]"
        )
    return limits


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, message: str, found: object, wanted: str) -> InputError:
        try:
            shown = str(found)
        except ValueError:  # hexadecimal ones are read at any length, and not written as decimal
            shown = "an integer of thousands of digits"
        return InputError(message, path=self.path, found=shown, wanted=wanted)

    def known(self, table: dict[str, Any], keys: Collection[str], where: str) -> None:
        for key in table:
            if key not in keys:
                raise self.refuse(f"unknown key in {where}", f"'{key}'", " ".join(keys))

    def table(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(f"{where} is no table", value, where)
        return value

    def tables(self, value: object, where: str) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            raise self.refuse("tensors are a list of tables", value, where)
        return [self.table(v, where) for v in value]

    def of_tensors(self, table: dict[str, Any]) -> TensorLimits:
        where = "[[tensors]]"
        self.known(table, ("glob", *OF_TENSORS), where)
        glob = table.get("glob")
        if not isinstance(glob, str) or not glob:
            raise self.refuse(
                f"glob of {where}", glob, "a text such as '*' or '*.down_proj.weight'"
            )
        limits = {k: self.number(k, v, where) for k, v in table.items() if k != "glob"}
        if not limits:
            raise self.refuse(f"no limit in {where} of '{glob}'", None, " ".join(OF_TENSORS))
        return TensorLimits(glob, limits)

    def number(self, key: str, value: object, where: str) -> float:
        """A number, or a percentage of an increase."""
        wanted = "a finite number" + (" of at least 0" if key.startswith("max") else "")
        if key == "max_perplexity_increase":
            wanted += ', or a text such as "1%"'
            if isinstance(value, str) and value.endswith("%"):
                try:
                    value = float(value[:-1]) / 100
                except ValueError:
                    raise self.refuse(f"{key} of {where}", value, wanted) from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(f"{key} of {where}", value, wanted)
        try:
            number = float(value)
        except OverflowError:  # an integer beyond binary64
            number = math.inf
        if not math.isfinite(number) or (key.startswith("max") and number < 0):
            raise self.refuse(f"{key} of {where}", value, wanted)
        return number

    def texts(self, key: str, value: object) -> tuple[str, ...]:
        several = key.startswith("source_")
        found = tuple(value) if several and isinstance(value, list) else (value,)
        wanted = "a text" + (", or a list of them, one a file" if several else "")
        if key.endswith("sha256"):
            wanted = wanted.replace("text", "text of 64 hexadecimal digits")
        for text in found:
            good = isinstance(text, str) and text != ""
            if good and key.endswith("sha256"):
                good = len(text) == 64 and set(text.lower()) <= set("0123456789abcdef")
            if not good:
                raise self.refuse(f"{key} of [require]", text, wanted)
        if not found:
            raise self.refuse(f"{key} of [require]", "an empty list", wanted)
        return tuple(t.lower() if key.endswith("sha256") else t for t in found)
