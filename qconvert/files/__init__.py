"""Containers that are read, each by its row of `qconvert.containers`: told by content and never by
suffix.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qconvert.containers import container_of
from qconvert.files.regular import RegularFile
from qconvert.model import Model

if TYPE_CHECKING:
    from qconvert.codecs.codec import Stored
    from qconvert.model import TensorInfo

SNIFFED = 8  # bytes


class OpenModel(Model, Protocol):
    """A model of which is known how its tensors lie in their files."""

    def stored(self, tensor: TensorInfo) -> Stored:
        """How a tensor lies in its file; may be called from several threads at once."""
        ...

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """Hold the payload against the rules and digests of the format.

        Args:
            advance: called with numbers of bytes as they are checked.

        Returns:
            What was held against what, for a report.

        Raises:
            FormatError: a rule is broken; ``code`` names it.
        """
        ...


def open_model(path: Path) -> OpenModel:
    """Open a safetensors file or directory, a GGUF file (of several the first) or a qblk file.

    Raises:
        InputError: the path cannot be opened, or is none of these.
    """
    start = b""
    if not path.is_dir():
        file = RegularFile(path)
        start = file.read(0, min(SNIFFED, file.size))
        file.close()
    module, _, function = container_of(start).reader.partition(":")
    model: OpenModel = getattr(importlib.import_module(module), function)(path)
    return model
