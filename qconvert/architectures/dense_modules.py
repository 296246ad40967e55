"""Matrices that sentence-transformers multiplies a pooled output by: its dense modules.

llama.cpp has two places for them, after the pooling and without bias or activation, in
architectures whose `Family.dense` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.families.keys import Keys
from qconvert.architectures.small_files import SmallFiles
from qconvert.errors import FormatError, InputError, UnsupportedError
from qconvert.files.gguf_writer import GgufValue
from qconvert.files.safetensors import open_safetensors
from qconvert.files.shards import CONFIG, WEIGHTS, inside_directory

# Names in GGUF, in the order in which they are multiplied by.
DENSE = ("dense_2", "dense_3")
_IDENTITY = "Identity"
_MOST_VALUES = 1 << 26  # 256 MiB in binary32; published ones have 2.4 million
_NAMED = 80  # characters


def dense_keys(matrices: Mapping[str, NDArray[np.float32]], arch: str) -> Keys:
    """The widths of each matrix, by their keys."""
    keys: Keys = {}
    for name, values in matrices.items():
        for end, width in (("in", values.shape[1]), ("out", values.shape[0])):
            key = f"{arch}.{name.removesuffix('.weight')}_feat_{end}"
            keys[key] = GgufValue("UINT32", width)
    return keys


def dense_matrices(
    files: SmallFiles, places: tuple[str, ...], width: int
) -> dict[str, NDArray[np.float32]]:
    """The matrices by GGUF's names, binary32, shape (out, in).

    Args:
        files: of the model, which has to be a directory.
        places: of the modules below it, in their order.
        width: of the transformer, which is also what comes out in the end.

    Raises:
        UnsupportedError: more modules than llama.cpp has places for, a bias, an activation, or
            another width than the transformer's in the end.
        InputError: weights of a module are missing, or contradict its settings.
    """
    if len(places) > len(DENSE):
        raise UnsupportedError(
            "more dense modules than llama.cpp has places for",
            path=files.home,
            found=f"{len(places)}: {', '.join(places)}"[:_NAMED],
            wanted=f"at most {len(DENSE)}",
            code="ARCH-MODULE",
        )
    found = {}
    before = width
    for name, place in zip(DENSE, places, strict=False):
        values = _matrix(files, place)
        if values.shape[1] != before:
            raise FormatError(
                "a dense module takes another width than what comes before it has",
                path=files.home / place / WEIGHTS,
                found=values.shape[1],
                wanted=before,
                code="ARCH-MODULE",
            )
        found[f"{name}.weight"] = values
        before = values.shape[0]
    if before != width:
        raise UnsupportedError(
            "dense modules end in another width than the transformer's, which llama.cpp cannot",
            path=files.home / places[-1] / WEIGHTS,
            found=before,
            wanted=width,
            hint="--raw writes the transformer's tensors alone",
            code="ARCH-MODULE",
        )
    return found


def _matrix(files: SmallFiles, place: str) -> NDArray[np.float32]:
    settings = files.home / place / CONFIG
    fields = files.json(f"{place}/{CONFIG}")
    if fields is None:
        raise _missing(settings)
    if fields.get("bias", True) is not False:  # sentence-transformers has one unless it is told
        raise _without(settings, "bias", fields, "false")
    activation = fields.get("activation_function", "torch.nn.modules.activation.Tanh")
    if not isinstance(activation, str) or activation.rpartition(".")[2] != _IDENTITY:
        raise _without(settings, "activation_function", fields, _IDENTITY)
    path = inside_directory(files.home, f"{place}/{WEIGHTS}")
    if not path.is_file():
        raise _missing(path)
    model = open_safetensors(path)
    try:
        shape = (fields.get("out_features"), fields.get("in_features"))
        tensor = next((t for t in model.tensors if t.name == "linear.weight"), None)
        if len(model.tensors) != 1 or tensor is None or tensor.shape != shape:
            raise InputError(
                "weights of a dense module are not those that its settings say",
                path=path,
                found=", ".join(f"{t.name} {list(t.shape)}" for t in model.tensors)[:_NAMED],
                wanted=f"linear.weight {list(shape)}",
                code="ARCH-MODULE",
            )
        if tensor.size > _MOST_VALUES:
            raise UnsupportedError(
                "a dense module is too large", path=path, found=f"{tensor.size:,} values",
                wanted=f"at most {_MOST_VALUES:,}", code="ARCH-MODULE",
            )  # fmt: skip
        return model.values(tensor, 0, tensor.size).astype(np.float32).reshape(tensor.shape)
    finally:
        model.close()


def _missing(path: Path) -> InputError:
    return InputError(
        "a file of a dense module is missing",
        path=path,
        hint="download the whole directory",
        code="ARCH-MODULE",
    )


def _without(path: Path, name: str, fields: Mapping[str, Any], wanted: str) -> UnsupportedError:
    return UnsupportedError(
        f"llama.cpp has dense modules without '{name}' only",
        path=path,
        found=str(fields.get(name, "no such field"))[:_NAMED],
        wanted=wanted,
        hint="embeddings would be other ones; --raw writes the transformer's tensors alone",
        code="ARCH-MODULE",
    )
