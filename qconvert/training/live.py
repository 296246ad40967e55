"""A torch model in memory as a `Model`: its tensors under the names of a checkpoint, read where
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.codecs.raw import RawEncoding
from qconvert.errors import UnsupportedError
from qconvert.model import DTYPES, Companion, SourceFile, TensorInfo

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
IN_MEMORY = Path("model in memory")  # where files have a path, for messages


class LiveModel:
    """See `OpenModel`; values are those that the tensors have when they are read.

    Args:
        tensors: by the names that they have in a checkpoint, each once.
        companions: what a directory would have beside the weights.

    Raises:
        UnsupportedError: a tensor without values, or of a dtype that files do not have.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], companions: tuple[Companion, ...] = ()
    ) -> None:
        self.path = IN_MEMORY
        self.kind = "safetensors"
        self.metadata: dict[str, str] = {}
        self.sources: tuple[SourceFile, ...] = ()
        self.companions = companions
        self.tensors = tuple(_info(name, tensor) for name, tensor in tensors.items())
        self._tensors = dict(tensors)
        self._moved: tuple[str, memoryview] | None = None  # the last one from another device

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """See `Model.values`."""
        return self.stored(tensor).values(start, stop)

    def stored(self, tensor: TensorInfo) -> Stored:
        """See `OpenModel.stored`."""

        def read(kind: str, offset: int, size: int) -> bytes:
            return self.raw(tensor, offset, size)

        return Stored(tensor.name, tensor.shape, RawEncoding(tensor.dtype), read, self.path)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """See `Model.raw`."""
        return bytes(self._bytes(tensor.name)[offset : offset + size])

    def check_payload(self, advance: Callable[[int], None]) -> str:
        """See `OpenModel.check_payload`."""
        return "memory; it has no digests"

    def check_unchanged(self) -> None:
        """See `Model.check_unchanged`: there is no file that could change."""

    def close(self) -> None:
        """See `Model.close`."""

    def _bytes(self, name: str) -> memoryview:
        held = self._tensors[name].detach()
        if held.device.type == "cpu" and held.is_contiguous():
            return _memory(held)
        moved = self._moved
        if moved is None or moved[0] != name:
            moved = self._moved = name, _memory(held.cpu().contiguous())
        return moved[1]


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of the CPU, not copied."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _info(name: str, tensor: torch.Tensor) -> TensorInfo:
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if tensor.is_meta:
        raise UnsupportedError(
            "the model has no weights yet",
            path=IN_MEMORY,
            tensor=name,
            found="a tensor on device meta",
            wanted="values in memory",
            hint="load or initialise the weights first, such as with model.to_empty",
            code="TRAIN-META",
        )
    if dtype is None or tensor.is_sparse or tensor.is_quantized:
        raise UnsupportedError(
            "no file of ours has a tensor of this kind",
            path=IN_MEMORY,
            tensor=name,
            found=f"{tensor.dtype}, {tensor.layout}",
            wanted="a dense tensor of " + ", ".join(DTYPE_NAMES.values()),
            code="TRAIN-DTYPE",
        )
    shape = tuple(tensor.shape)
    return TensorInfo(name, shape, dtype, DTYPES[dtype].nbytes(tensor.numel()))


def named_tensors(model: Any, without: Callable[[Any], bool]) -> dict[str, Any]:
    """Parameters and persistent buffers of a module, each under the first of its names.

    Args:
        without: whether a module is none of the model's own.
    """
    added = tuple(f"{name}." for name, m in model.named_modules() if without(m))
    found: dict[int, tuple[str, Any]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and not name.startswith(added):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
