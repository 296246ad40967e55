"""What a Hugging Face model directory is called in GGUF, so that llama.cpp loads and runs it.

`open_gguf_source` wraps an opened model: tensors under GGUF's names, in llama.cpp's order of rows,
read lazily from the same files; and the metadata that goes before them. `restored` goes the other
way, and `as_checkpoint` with codes as they are; `layer_places` gives the names alone.
"""

from __future__ import annotations

from qconvert.architectures.adapters import open_adapter_source
from qconvert.architectures.checkpoint import Checkpoint, as_checkpoint
from qconvert.architectures.families import FAMILIES
from qconvert.architectures.made_config import made_config
from qconvert.architectures.made_tokenizer import made_tokenizer
from qconvert.architectures.mapping import Dropped
from qconvert.architectures.places import Place, layer_places
from qconvert.architectures.restored import RestoredModel, restored
from qconvert.architectures.sentence_modules import modules_beyond
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.source import GgufSource, architecture_of, open_gguf_source
from qconvert.architectures.vision.source import open_projector_source


def supported() -> tuple[str, ...]:
    """Names of the architectures, for people."""
    return tuple(family.name for family in FAMILIES)


__all__ = [
    "Checkpoint",
    "Dropped",
    "GgufSource",
    "Place",
    "RestoredModel",
    "SmallFiles",
    "architecture_of",
    "as_checkpoint",
    "layer_places",
    "made_config",
    "made_tokenizer",
    "modules_beyond",
    "open_adapter_source",
    "open_gguf_source",
    "open_projector_source",
    "restored",
    "supported",
]
