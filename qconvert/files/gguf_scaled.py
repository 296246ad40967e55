"""NVFP4 of GGUF with a scale of the tensor: ``NAME.weight`` in blocks, and ``NAME.scale``, F32 [1],
by which llama.cpp multiplies products with it. Both are seen as one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qconvert.codecs.codec import Stored
from qconvert.codecs.ggml_blocks import FACTOR_BYTES, SCALED, encoding_of, segment_start
from qconvert.errors import FormatError, UnsupportedError
from qconvert.model import WEIGHT, TensorInfo

NVFP4 = "NVFP4"
SCALE = ".scale"
Raw = Callable[[TensorInfo, int, int], bytes]


def scale_name(name: str) -> str:
    """The name of the scale of a tensor."""
    return name.removesuffix(WEIGHT) + SCALE


class ScaledTensors:
    """Tensors of a GGUF model, those with a scale of their own together with it.

    Args:
        listed: as the headers list them.
        raw: bytes of such a tensor, from an offset on.
        path: of the model, for messages.

    Attributes:
        tensors: what there is to see: of type `SCALED`, and without their scales.

    Raises:
        UnsupportedError: a scale of other than one number (of experts, one each).
        FormatError: a scale that is no finite number above 0.
    """

    def __init__(self, listed: Sequence[TensorInfo], raw: Raw, path: Path) -> None:
        self._raw = raw
        self._path = path
        self._pairs: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        of_name = {t.name: t for t in listed}
        for tensor in listed:
            scale = of_name.get(scale_name(tensor.name)) if tensor.dtype == NVFP4 else None
            if scale is not None:
                self._check(tensor, scale)
                self._pairs[tensor.name] = tensor, scale
        hidden = {scale.name for _, scale in self._pairs.values()}
        self.tensors = tuple(self._seen(t) for t in listed if t.name not in hidden)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Stored bytes ``offset..offset+size`` of a tensor; the scale lies behind the blocks."""
        pair = self._pairs.get(tensor.name)
        if pair is None:
            return self._raw(tensor, offset, size)
        blocks, scale = pair
        if not 0 <= offset <= offset + size <= blocks.nbytes + scale.nbytes:
            raise ValueError(f"bytes {offset}..{offset + size} of a tensor of {tensor.nbytes}")
        end = offset + size
        found = b""
        if offset < blocks.nbytes:
            found = self._raw(blocks, offset, min(end, blocks.nbytes) - offset)
        if end > blocks.nbytes:
            begin = max(offset - blocks.nbytes, 0)
            found += self._raw(scale, begin, end - blocks.nbytes - begin)
        return found

    def stored(self, tensor: TensorInfo, rounding: str) -> Stored:
        """How a tensor lies in the file."""

        def read(kind: str, offset: int, size: int) -> bytes:
            return self.raw(tensor, segment_start(kind, tensor.nbytes) + offset, size)

        encoding = encoding_of(tensor.dtype)
        return Stored(tensor.name, tensor.shape, encoding, read, self._path, rounding=rounding)

    def _seen(self, tensor: TensorInfo) -> TensorInfo:
        if tensor.name not in self._pairs:
            return tensor
        return replace(tensor, dtype=SCALED, nbytes=tensor.nbytes + FACTOR_BYTES)

    def _check(self, tensor: TensorInfo, scale: TensorInfo) -> None:
        if len(tensor.shape) != 2 or (scale.dtype, scale.shape) != ("F32", (1,)):
            raise UnsupportedError(
                "the scale of an NVFP4 tensor is not one number, which alone is read",
                path=self._path,
                tensor=scale.name,
                found=f"{scale.dtype} {list(scale.shape)} of a tensor {list(tensor.shape)}",
                wanted="F32 [1] of a matrix",
                hint="convert the checkpoint that it was made from",
                code="GGUF-SCALED",
            )
        found = float(np.frombuffer(self._raw(scale, 0, FACTOR_BYTES), "<f4")[0])
        if not 0 < found < math.inf:
            raise FormatError(
                "the scale of an NVFP4 tensor scales nothing",
                path=self._path,
                tensor=scale.name,
                found=found,
                wanted="a positive number",
                code="GGUF-SCALED",
            )
