"""Quantized files as transformers models; needs torch and transformers.

::

    import qconvert.torch

    model = qconvert.torch.load_model("model.qblk", activations="dynamic")
    tokenizer = qconvert.torch.load_tokenizer("model.qblk")

A model loaded this way runs what `formats/schemes/SPEC.md` section 7 says: linear layers keep
their codes packed in memory and multiply in integers; everything else is float32. It is for
inference on the CPU: it has no gradients, and transformers cannot save it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qconvert.running.hugging_face import INSTALL
from qconvert.running.quantized_model import open_quantized, open_tokenizer

try:
    import transformers as _transformers  # noqa: F401

    from qconvert.running.integer_layers import QuantizedEmbedding, QuantizedLinear
except ImportError as e:
    raise ImportError(
        f"qconvert.torch needs torch and transformers; install with: {INSTALL}"
    ) from e

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "load_model", "load_tokenizer"]


def load_model(
    path: Path | str, activations: str = "auto", *, directory: Path | str | None = None
) -> Any:
    """The transformers model of a .qblk or GGUF file, in eval mode.

    Args:
        path: a .qblk file that was made from a model directory; or a GGUF file, whose weights
            are float32 in memory, which takes ``activations="none"`` and a ``directory``.
        activations: what goes into linear layers: ``static`` bytes with the file's calibration,
            ``dynamic`` ones with a scale for each row (``dynamic_asym``: and a zero point),
            ``auto`` for static where there is a calibration and dynamic elsewhere, or ``none`` for
            floats and dequantized weights.
        directory: where config and tokenizer are, if the file carries none.

    Raises:
        InputError: the file is damaged, carries no config, or is of another model than that says.
        UnsupportedError: a GGUF file of an architecture that we have no names for, or of another
            model than the directory says.
        UsageError: ``static``, and a layer has no calibration.
    """
    place = Path(directory) if directory is not None else None
    return open_quantized(Path(path), activations, directory=place).checkpoint.model


def load_tokenizer(path: Path | str, *, directory: Path | str | None = None) -> Any:
    """The tokenizer that a .qblk file carries.

    Raises:
        InputError: the file is damaged, or carries none.
    """
    return open_tokenizer(Path(path), directory=Path(directory) if directory is not None else None)
