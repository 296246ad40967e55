"""`qconvert.load`: the tensors of a model file as a lazy mapping of NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.codecs.codes import Codes
from qconvert.errors import UnsupportedError
from qconvert.files import OpenModel, open_model
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, TensorInfo

AS_STORED = {"int": "<i", "uint": "<u", "complex": "<c"}  # kinds that NumPy has


class Tensor:
    """A tensor of an open file; nothing is read before one of its methods asks for it.

    Attributes:
        name, shape: as in the file.
        dtype: a dtype of safetensors (``BF16``), a ggml type (``Q4_0``), or a scheme
            (``q4_block64_asym``).
        nbytes: in the file.
    """

    def __init__(self, model: OpenModel, info: TensorInfo) -> None:
        self._model = model
        self._info = info
        self.name, self.shape = info.name, info.shape
        self.dtype, self.nbytes = info.dtype, info.nbytes

    def __repr__(self) -> str:
        return f"<Tensor {self.name!r} {self.dtype} {list(self.shape)}>"

    def dequantize(self) -> NDArray[Any]:
        """The values in the tensor's shape.

        float32 for codes and for floating types up to 32 bits (exact); F64, C64, integers and bool
        keep their dtype.
        """
        known = DTYPES.get(self.dtype)
        if known and known.kind in (*AS_STORED, "bool"):
            raw = np.frombuffer(self._model.raw(self._info, 0, self.nbytes), np.uint8)
            if known.kind == "bool":
                return np.not_equal(raw, 0).reshape(self.shape)
            return raw.view(f"{AS_STORED[known.kind]}{known.size}").reshape(self.shape).copy()
        out = np.empty(self._info.size, np.float64 if self.dtype == "F64" else np.float32)
        for start in range(0, len(out), TILE_VALUES):
            stop = min(start + TILE_VALUES, len(out))
            out[start:stop] = self._model.values(self._info, start, stop)
        return out.reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("values are decoded from the file, which makes a copy")
        values = self.dequantize()
        return values if dtype is None else values.astype(dtype, copy=False)

    def quantized(self) -> Codes:
        """Codes, scales and zero points.

        Raises:
            UnsupportedError: the tensor has none, or is of a ggml type.
        """
        stored = self._model.stored(self._info)
        codes = stored.encoding.codes(stored)
        if codes is None:
            raise UnsupportedError(
                "no codes with scales and zero points",
                path=self._model.path,
                tensor=self.name,
                found=self.dtype,
                wanted="a quantized tensor of a .qblk file",
                hint="dequantize() gives the values of every tensor",
            )
        return codes

    @property
    def activation(self) -> dict[str, Any] | None:
        """The static activation parameters of the layer, ``scale`` and ``zero_point`` among them;
        None without a calibration.
        """
        found = self._model.stored(self._info).activation
        return dict(found) if found else None


class Tensors(Mapping[str, Tensor]):
    """An open model file: names to `Tensor`, in the order of the file.

    Use it as a context manager, or call `close`.

    Attributes:
        path: as given.
        kind: ``qblk``, ``gguf`` or ``safetensors``.
        metadata: of the file.
    """

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._tensors = {t.name: Tensor(model, t) for t in model.tensors}
        self.path, self.kind, self.metadata = model.path, model.kind, model.metadata

    def __repr__(self) -> str:
        return f"<Tensors {str(self.path)!r} ({self.kind}), {len(self):,} tensors>"

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the model's small files, such as ``config.json``, beside it or in the .qblk."""
        return tuple(c.name for c in self._model.companions)

    def file(self, name: str) -> bytes:
        """A small file of the model.

        Raises:
            KeyError: no such file.
        """
        for companion in self._model.companions:
            if companion.name == name:
                return companion.read()
        raise KeyError(name)

    def close(self) -> None:
        self._model.close()

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: Path | str) -> Tensors:
    """Open a .qblk, GGUF or safetensors model as a lazy mapping of names to tensors.

    Nothing is read before a tensor is asked for its values, or its codes, scales and zero points.

    >>> made = qconvert.quantize("samples/tiny-llama", "q4_block64", output="model.qblk")
    >>> with qconvert.load("model.qblk") as tensors:
    ...     weight = tensors["lm_head.weight"]
    ...     values, stored = weight.dequantize(), weight.quantized()
    >>> weight
    <Tensor 'lm_head.weight' q4_block64_asym [2048, 256]>
    >>> stored
    <Codes 2048 x 256, 4 bits, groups of 64>
    >>> same = (stored.codes - stored.zero_point) * stored.scale
    >>> bool((same == values).all())
    True

    Args:
        path: a file, or a directory of safetensors.

    Raises:
        InputError: it cannot be opened, or is damaged.
    """
    return Tensors(open_model(Path(path)))
