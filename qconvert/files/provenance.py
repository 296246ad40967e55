"""How a file was made, as JSON under a key of its metadata: of GGUF files and of directories."""

from __future__ import annotations

import json
from typing import Any

from qconvert.codecs.codec import NEAREST, REPAIRED
from qconvert.codecs.compensation import COMPENSATED
from qconvert.codecs.rescaled import TUNED, tuned_tensors
from qconvert.errors import InputError
from qconvert.files import OpenModel
from qconvert.files.qblk import QblkModel
from qconvert.files.strict_json import strict_json

PROVENANCE = "qconvert.provenance"  # a JSON object, in files of ours


def read_provenance(model: OpenModel) -> Any:
    """What a file says of how it was made, for whom goes by it; an empty object where it says
    nothing.

    Raises:
        FormatError: it is no JSON.
    """
    if isinstance(model, QblkModel):
        return model.header.provenance
    text = model.metadata.get(PROVENANCE)
    return strict_json(text.encode(), model.path) if text else {}


def provenance_of(model: OpenModel) -> dict[str, Any]:
    """The same for whom only shows it: an empty object also where it is no object of JSON."""
    try:
        found = read_provenance(model)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


class NotedRoundings:
    """How codes were chosen, as far as a provenance says.

    Args:
        provenance: as the file has it, None without one.
    """

    def __init__(self, provenance: str | None) -> None:
        self._compensated = compensated_tensors(provenance)
        self._repaired = repaired_tensors(provenance)
        self._tuned = tuned_tensors(_noted(provenance))

    def of(self, name: str) -> str:
        """Of a tensor's codes."""
        if name in self._repaired:
            return REPAIRED
        if name in self._compensated:
            return COMPENSATED
        return TUNED if name in self._tuned else NEAREST


def _noted(provenance: str | None) -> object:
    """A provenance as JSON, None where it is none."""
    try:
        return json.loads(provenance or "{}")
    except (ValueError, RecursionError):
        return None


def compensated_tensors(provenance: str | None) -> frozenset[str]:
    """Names of the tensors whose codes make up for each other's errors, as the provenance of a file
    of ours lists them; none where it is no such JSON.
    """
    return _listed(provenance, "rounding", COMPENSATED)


def repaired_tensors(provenance: str | None) -> frozenset[str]:
    """The same of those among them that were aimed at other weights than their own."""
    return _listed(provenance, "repair", "tensors")


def _listed(provenance: str | None, *keys: str) -> frozenset[str]:
    try:
        names = json.loads(provenance or "{}")
        for key in keys:
            names = names[key]
        return frozenset(name for name in names if isinstance(name, str))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return frozenset()
