"""The small files of a model: its configuration, tokenizer, templates and modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconvert.architectures.older_forms import in_todays_form
from qconvert.errors import FormatError
from qconvert.files.shards import CONFIG
from qconvert.files.strict_json import strict_json
from qconvert.model import Companion, Model


class SmallFiles:
    """The small files of a model, in its directory or carried in a container.

    Args:
        model: it has them, unless others are given.
        companions: those instead.
        home: where they are, for messages.
    """

    def __init__(
        self,
        model: Model,
        companions: tuple[Companion, ...] | None = None,
        home: Path | None = None,
    ) -> None:
        self.home = home or model.path
        taken = model.companions if companions is None else companions
        self._companions = {c.name: c for c in taken}

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None when there is none."""
        found = self._companions.get(name)
        return None if found is None else found.read()

    def names(self) -> list[str]:
        """Of all of them."""
        return sorted(self._companions)

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file; None when there is none."""
        found = self._parsed(name)
        if found is not None and not isinstance(found, dict):
            raise FormatError("file holds no JSON object", path=self.home / name, code="ARCH-JSON")
        return found and in_todays_form(found) if name == CONFIG else found

    def list(self, name: str) -> list[Any] | None:
        """The JSON list in a file; None when there is none."""
        found = self._parsed(name)
        if found is not None and not isinstance(found, list):
            raise FormatError("file holds no JSON list", path=self.home / name, code="ARCH-JSON")
        return found

    def _parsed(self, name: str) -> Any:
        data = self.read(name)
        if data is None:
            return None
        return strict_json(data, self.home / name, infinity=name == CONFIG)
