"""Containers: one adapter each, sniffed by content and never by suffix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.files.regular import RegularFile

if TYPE_CHECKING:
    from qconvert.model import Model


def open_model(path: Path) -> Model:
    """Open a safetensors file or directory, a GGUF file (of several the first) or a qblk file.

    Raises:
        InputError: the path cannot be opened, or is none of these.
    """
    # Imported when used: the gguf package alone costs 0.1 s.
    if not path.is_dir():
        file = RegularFile(path)
        start = file.read(0, min(8, file.size))
        file.close()
        if start[1:5] == b"QBLK":  # whole or damaged: the reader tells
            from qconvert.files.qblk import open_qblk

            return open_qblk(path)
        if start[:4] == b"GGUF":
            from qconvert.files.gguf_split_reader import open_gguf_model

            return open_gguf_model(path)
    from qconvert.files.safetensors import open_safetensors

    return open_safetensors(path)
