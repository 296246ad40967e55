"""`qconvert.load`: the tensors of a model file as a lazy mapping of NumPy arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.encoding import AffineEncoding
from qconvert.errors import UnsupportedError
from qconvert.files import open_model
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_header import StoredTensor
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, Model, TensorInfo

AS_STORED = {"int": "<i", "uint": "<u", "complex": "<c"}  # kinds that NumPy has


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized tensor as it is stored: value = (codes - zero_point) * scale, in float32.

    Attributes:
        codes: uint8 (R, c), one row of the tensor after the other, 0..2^bits - 1 (symmetric 8-bit
            codes and zero points are those of the file plus 128).
        scales: float32 (R, G), one for each group of a row.
        zero_points: float32 (R, G); quarters below 8 bits, 2^(bits - 1) when symmetric.
        block: columns of a group; c when a row has one scale. The last group may be shorter.
        bits: of a code.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.float32]
    block: int
    bits: int

    @property
    def scale(self) -> NDArray[np.float32]:
        """Of every code, float32 (R, c)."""
        return self._of_codes(self.scales)

    @property
    def zero_point(self) -> NDArray[np.float32]:
        """Of every code, float32 (R, c)."""
        return self._of_codes(self.zero_points)

    def _of_codes(self, of_groups: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.repeat(of_groups, self.block, axis=1)[:, : self.codes.shape[1]]

    def dequantize(self) -> NDArray[np.float32]:
        """The values, (R, c); the same bits as `Tensor.dequantize`."""
        values: NDArray[np.float32] = (self.codes - self.zero_point) * self.scale
        return values

    def __repr__(self) -> str:
        rows, columns = self.codes.shape
        return f"<Codes {rows} x {columns}, {self.bits} bits, groups of {self.block}>"


class Tensor:
    """A tensor of an open file; nothing is read before one of its methods asks for it.

    Attributes:
        name, shape: as in the file.
        dtype: a dtype of safetensors (``BF16``), a ggml type (``Q4_0``), or a scheme
            (``q4_block64_asym``).
        nbytes: in the file.
    """

    def __init__(self, model: Model, info: TensorInfo) -> None:
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
        model, stored = self._model, self._entry()
        if (
            not isinstance(model, QblkModel)
            or stored is None
            or not isinstance(stored.encoding, AffineEncoding)
        ):
            raise UnsupportedError(
                "no codes with scales and zero points",
                path=model.path,
                tensor=self.name,
                found=self.dtype,
                wanted="a quantized tensor of a .qblk file",
                hint="dequantize() gives the values of every tensor",
            )
        encoding = stored.encoding
        columns = encoding.row_length
        part = model.rows(stored, 0, encoding.rows(self.shape), 0, columns)
        if encoding.symmetric:
            zero = np.full(part.scale.shape, 1 << (encoding.bits - 1), np.float32)
        else:
            zero = part.zero.astype(np.float32) / np.float32(1 if encoding.bits == 8 else 4)
        return Codes(
            np.ascontiguousarray(part.codes[:, :columns]),
            np.ascontiguousarray(part.scale),
            zero,
            encoding.block or columns,
            encoding.bits,
        )

    @property
    def activation(self) -> dict[str, Any] | None:
        """The static activation parameters of the layer, ``scale`` and ``zero_point`` among them;
        None without a calibration.
        """
        stored = self._entry()
        return dict(stored.activation) if stored and stored.activation else None

    def _entry(self) -> StoredTensor | None:
        return self._model.stored[self.name] if isinstance(self._model, QblkModel) else None


class Tensors(Mapping[str, Tensor]):
    """An open model file: names to `Tensor`, in the order of the file.

    Use it as a context manager, or call `close`.

    Attributes:
        path: as given.
        kind: ``qblk``, ``gguf`` or ``safetensors``.
        metadata: of the file.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._tensors = {t.name: Tensor(model, t) for t in model.tensors}
        self.path, self.kind, self.metadata = model.path, model.kind, model.metadata

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
    """Open a .qblk, GGUF or safetensors model.

    Raises:
        InputError: it cannot be opened, or is damaged.
    """
    return Tensors(open_model(Path(path)))
