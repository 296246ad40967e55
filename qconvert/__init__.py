"""qconvert: convert model weights to quantized files, and prove the result."""

from __future__ import annotations

TYPE_CHECKING = False  # as of `typing`, whose import would delay the handling of signals
if TYPE_CHECKING:
    from pathlib import Path

    from qconvert.loading import Tensors

__version__ = "0.1.0"


def load(path: Path | str) -> Tensors:
    """Open a .qblk, GGUF or safetensors model as a lazy mapping of names to tensors.

    Nothing is read before a tensor is asked for its values, or its codes, scales and zero points::

        with qconvert.load("model.qblk") as tensors:
            weight = tensors["lm_head.weight"].dequantize()  # float32
            codes = tensors["lm_head.weight"].quantized()  # codes, scale, zero_point

    Raises:
        InputError: the file cannot be opened, or is damaged.
    """
    # Here, so that the version and --help cost no NumPy.
    from qconvert.loading import load as open_tensors

    return open_tensors(path)
