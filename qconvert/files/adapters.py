"""Low-rank adapters of peft (LoRA), and a model that one is merged into.

An adapter gives a weight W a small correction: W + s B A, where A has r rows, B has r columns and s
is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rank-stabilised ones (Hu et al., "LoRA",
2021, section 4.1; Kalajdzievski, "A Rank Stabilization Scaling Factor", 2023). Of an embedding,
peft keeps both turned round: its correction is s (B A)^T.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import FormatError, InputError, UnsupportedError
from qconvert.files.dequantized import bytes_of
from qconvert.files.regular import file_sha256
from qconvert.files.safetensors import SafetensorsModel, open_safetensors
from qconvert.files.strict_json import read_object
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, WEIGHT, Companion, Model, SourceFile, TensorInfo
from qconvert.quantities import counted

F64 = NDArray[np.float64]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MOST_CONFIG = 1 << 20  # bytes
MERGED = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what a correction can be added to
_MERGE = "merge it with peft (merge_and_unload), save the model, and convert that"
_COPY = ".base_layer.weight"
PREFIX = "base_model.model."
_PARTS = {  # what a name in the file ends in, and which part of an embedding's or layer's that is
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
# Fields that change what is computed, and the values under which they do not.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    # How training began: what is named here leaves the base model's weights as they were.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# Fields that say how it was trained, or repeat what the tensors say.
_INDIFFERENT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
        *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "megatron_config", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
        *("task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    }
)
_NOTHING: tuple[object, ...] = (None, False, [], {}, 0, "")
_CACHED = 8  # tensors whose A is held in memory: as many as are worked on at once
_SPAN = 1 << 15  # values that are corrected at once, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Correction:
    """The correction of one tensor.

    Attributes:
        name: of the tensor that is corrected.
        a, b: as they lie in the adapter's file.
        embedding: whether both are turned round: a is (r, rows), b (columns, r); else a is
            (r, columns) and b (rows, r).
        scale: what their product is multiplied by.
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    embedding: bool
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the tensor."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)


class Adapter:
    """An adapter's directory, opened; `close` closes its file of weights.

    Use `open_adapter` to make one.

    Attributes:
        corrections: by the tensors that they correct.
        copies: tensors of the model that peft has saved along, by their names there.
        alpha: ``lora_alpha``, where it and the rank decide all scales; else None.
    """

    def __init__(
        self,
        path: Path,
        weights: SafetensorsModel,
        corrections: Mapping[str, Correction],
        copies: Mapping[str, TensorInfo],
        alpha: float | None,
    ) -> None:
        self.path = path
        self.weights = weights
        self.corrections = corrections
        self.copies = copies
        self.alpha = alpha

    def described(self) -> str:
        """In a sentence, for people."""
        ranks = sorted({c.rank for c in self.corrections.values()})
        scales = sorted({c.scale for c in self.corrections.values()})
        rank, scale = (
            f"{v[0]:g}" if len(v) == 1 else f"{v[0]:g} to {v[-1]:g}" for v in (ranks, scales)
        )
        return (
            f"the adapter '{self.path.name}' corrects {counted(len(self.corrections), 'tensor')}: "
            f"products of rank {rank}, times {scale}"
        )

    def check(self, model: Model) -> None:
        """Refuse a model that has other tensors.

        Raises:
            UnsupportedError: names the first tensor that is missing, unlike its correction, or
                other than the copy that the adapter has of it.
        """
        tensors = {t.name: t for t in model.tensors}
        missing = [name for name in self.corrections if name not in tensors]
        if missing:
            raise UnsupportedError(
                f"the adapter corrects {len(missing)} of {len(self.corrections)} tensors that the "
                "model does not have",
                path=self.path,
                tensor=missing[0],
                wanted=f"an adapter of {model.path.name or model.path}, under the names of its "
                "checkpoint",
                hint="give the model that it was trained on, as downloaded; in a model with tied "
                "embeddings no head of its own can be corrected",
                code="ADAPTER-BASE",
            )
        for name, correction in self.corrections.items():
            tensor = tensors[name]
            if tensor.shape != correction.shape or tensor.dtype not in MERGED:
                raise UnsupportedError(
                    "the adapter's correction does not fit the tensor",
                    path=self.path,
                    tensor=name,
                    found=f"a correction of {list(correction.shape)}",
                    wanted=f"one of {tensor.dtype} {list(tensor.shape)}",
                    hint="give the model that the adapter was trained on",
                    code="ADAPTER-SHAPE",
                )
        for name, copy in self.copies.items():
            if not self._same(copy, model, tensors.get(name)):
                raise UnsupportedError(
                    "the adapter brings other values of a whole tensor",
                    path=self.path,
                    tensor=name,
                    hint=_MERGE,
                    code="ADAPTER-COPY",
                )

    def _same(self, copy: TensorInfo, model: Model, tensor: TensorInfo | None) -> bool:
        """Whether a tensor of the model has the values of a copy."""
        if tensor is None or tensor.shape != copy.shape:
            return False
        return all(
            np.array_equal(
                self.weights.values(copy, at, min(at + TILE_VALUES, copy.size)),
                model.values(tensor, at, min(at + TILE_VALUES, copy.size)),
            )
            for at in range(0, copy.size, TILE_VALUES)
        )

    def close(self) -> None:
        self.weights.close()


def adapter_sha256(path: Path) -> str:
    """Of an adapter: SHA-256 of the digests of its configuration and its weights, in hexadecimal.

    Raises:
        InputError: one of the files is missing.
    """
    digests = [file_sha256(path / name) for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_adapter(path: Path) -> Adapter:
    """Open a directory that peft's ``save_pretrained`` made.

    Raises:
        InputError: no such directory.
        FormatError: its files break a rule: a part without the other, shapes that do not meet.
        UnsupportedError: it changes more than weights of linear layers and embeddings, or in
            another way than LoRA.
    """
    if not path.is_dir():
        raise InputError(
            "an adapter is a directory",
            path=path,
            found="a file" if path.exists() else "nothing",
            wanted=f"one with {CONFIG} and {WEIGHTS}, as peft's save_pretrained writes it",
        )
    fields = read_object(path / CONFIG, MOST_CONFIG)
    _check_fields(fields, path / CONFIG)
    if not (path / WEIGHTS).exists() and (path / "adapter_model.bin").exists():
        raise UnsupportedError(
            "the adapter's weights are pickled",
            path=path / "adapter_model.bin",
            wanted=WEIGHTS,
            hint="load it with peft, and save_pretrained(DIR) writes safetensors",
            code="ADAPTER-PICKLED",
        )
    weights = open_safetensors(path / WEIGHTS)
    try:
        scales = _Scales(fields, path / CONFIG)
        found = {}
        copies = {
            t.name[len(PREFIX) : -len(_COPY)] + WEIGHT: t
            for t in weights.tensors
            if t.name.startswith(PREFIX) and t.name.endswith(_COPY)
        }
        for name, (embedding, parts) in _paired(weights).items():
            a, b = parts["a"], parts["b"]
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
                raise FormatError(
                    "the two parts of a correction do not meet",
                    path=weights.path,
                    tensor=a.name,
                    found=f"{list(a.shape)} and {list(b.shape)}",
                    wanted="(r, columns) and (rows, r)",
                    code="ADAPTER-RANK",
                )
            scale = scales.of(name, a.shape[0])
            found[name + WEIGHT] = Correction(name + WEIGHT, a, b, embedding, scale)
        if not found:
            raise FormatError("the adapter corrects nothing", path=path, code="ADAPTER-EMPTY")
        return Adapter(path, weights, found, copies, None if scales.uneven else scales.alpha)
    except BaseException:
        weights.close()
        raise


def _check_fields(fields: Mapping[str, Any], path: Path) -> None:
    """Refuse what is not merged by adding s B A to weights.

    Raises:
        UnsupportedError: another kind of adapter, or a field that we do not know.
    """
    if fields.get("peft_type") != "LORA":
        raise UnsupportedError(
            "the adapter is of another kind",
            path=path,
            found=f"peft_type {fields.get('peft_type')!r}",
            wanted="LORA",
            hint=_MERGE,
            code="ADAPTER-KIND",
        )
    for name, value in fields.items():
        neutral = _NEUTRAL.get(name)
        if neutral is None:
            good = name in _INDIFFERENT or value in _NOTHING
        else:
            good = any(type(v) is type(value) and v == value for v in neutral)
        if not good:
            raise UnsupportedError(
                f"'{name}' of the adapter changes the model in a way that is not supported",
                path=path,
                found=repr(value),
                wanted=" or ".join(map(repr, neutral)) if neutral else "nothing",
                hint=_MERGE,
                code="ADAPTER-FIELD",
            )


def _paired(weights: SafetensorsModel) -> dict[str, tuple[bool, dict[str, TensorInfo]]]:
    """Both parts of each correction, and whether it is one of an embedding, by names of modules.

    Raises:
        UnsupportedError: a tensor that is no part of a correction.
        FormatError: a part without the other one.
    """
    found: dict[str, tuple[bool, dict[str, TensorInfo]]] = {}
    for tensor in weights.tensors:
        if tensor.name.endswith(_COPY):
            continue
        end = next((e for e in _PARTS if tensor.name.endswith(e)), None)
        if end is None or not tensor.name.startswith(PREFIX) or not tensor.floating:
            raise UnsupportedError(
                "a tensor of the adapter is no part of a low-rank correction",
                path=weights.path,
                tensor=tensor.name,
                found=f"{tensor.dtype} {list(tensor.shape)}",
                wanted=f"{PREFIX}MODULE.lora_A.weight and .lora_B.weight",
                hint=_MERGE,
                code="ADAPTER-TENSOR",
            )
        part, embedding = _PARTS[end]
        name = tensor.name[len(PREFIX) : -len(end)]
        found.setdefault(name, (embedding, {}))[1][part] = tensor
    for _, parts in found.values():
        if len(parts) != 2:
            (only,) = parts.values()
            raise FormatError(
                "a part of a correction is missing",
                path=weights.path,
                tensor=only.name,
                found="this part alone",
                wanted="lora_A and lora_B",
                code="ADAPTER-PART",
            )
    return found


class _Scales:
    """What products are multiplied by.

    Attributes:
        uneven: whether they are not alpha / rank for one alpha.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.path = path
        self.rank = self._number("r", fields.get("r", 8))
        self.alpha = self._number("lora_alpha", fields.get("lora_alpha", 8))
        self.ranks = self._pattern("rank_pattern", fields.get("rank_pattern"))
        self.alphas = self._pattern("alpha_pattern", fields.get("alpha_pattern"))
        self.stabilised = fields.get("use_rslora", False)
        if type(self.stabilised) is not bool:
            raise self._wrong("use_rslora", self.stabilised, "true or false")
        self.uneven = self.stabilised or bool(self.alphas)

    def of(self, module: str, rank: int) -> float:
        """The scale of a module's correction.

        Raises:
            FormatError: the file has another rank than the configuration.
        """
        if (wanted := self._named(self.ranks, module, self.rank)) != rank:
            raise FormatError(
                f"rank of the correction of '{module}'",
                path=self.path,
                found=rank,
                wanted=f"{wanted:g}, by the configuration",
                code="ADAPTER-RANK",
            )
        alpha = self._named(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    @staticmethod
    def _named(values: Mapping[str, float], module: str, other: float) -> float:
        """The value of the first name that a module's ends in."""
        return next((v for k, v in values.items() if f".{module}".endswith(f".{k}")), other)

    def _pattern(self, field: str, value: object) -> dict[str, float]:
        """peft takes names for regular expressions; what it writes itself are plain ones."""
        found = {} if value is None else value
        if not isinstance(found, dict):
            raise self._wrong(field, value, "an object of names and numbers")
        for name in found:
            if set(name) & set("\\^$*+?{}[]|()"):
                raise UnsupportedError(
                    f"a name in '{field}' of the adapter is a regular expression",
                    path=self.path,
                    found=repr(name),
                    wanted="names of modules",
                    hint="write out the modules that it stands for",
                    code="ADAPTER-FIELD",
                )
        return {name: self._number(f"{field}.{name}", v) for name, v in found.items()}

    def _number(self, field: str, value: object) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e9:  # type: ignore[operator]
            raise self._wrong(field, value, "a number above 0")
        return float(value)  # type: ignore[arg-type]

    def _wrong(self, field: str, value: object, wanted: str) -> FormatError:
        return FormatError(
            f"'{field}' of the adapter",
            path=self.path,
            found=repr(value),
            wanted=wanted,
            code="ADAPTER-CONFIG",
        )


class AdaptedModel:
    """A `Model` that an adapter is merged into, of one with plain dtypes; `close` closes both.

    Corrected tensors are F32, or F64 where they were: they are not rounded to the dtype that they
    had before, as they would be if the merged model were saved. A request takes memory for what is
    asked, for the same rows of B, and for the whole A of a few tensors.
    """

    def __init__(self, source: Model, adapter: Adapter) -> None:
        adapter.check(source)
        self.path: Path = source.path
        self.kind = source.kind
        self.metadata = source.metadata
        self.sources: tuple[SourceFile, ...] = source.sources
        self.companions: tuple[Companion, ...] = source.companions
        self.adapter = adapter
        self._source = source
        self._stored = {t.name: t for t in source.tensors}
        self.tensors = tuple(
            _widened(t) if t.name in adapter.corrections else t for t in source.tensors
        )
        self._columns: OrderedDict[str, F64] = OrderedDict()
        self._lock = threading.Lock()

    def values(self, tensor: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
        """Values ``start..stop`` of the flattened tensor; see `Model.values`.

        The sum over the rank is made in binary64, one term after the other, so that a value is the
        same in whatever piece of the tensor it is asked for.
        """
        values = self._source.values(self._stored[tensor.name], start, stop)
        correction = self.adapter.corrections.get(tensor.name)
        if correction is None or start == stop:
            return values
        columns = tensor.shape[1]
        first, last = start // columns, -(-stop // columns)
        right = self._right(correction)
        left = self._left(correction, first, last)
        product = np.zeros((last - first, columns))
        step = max(1, _SPAN // columns)
        for low in range(0, last - first, step):
            rows = product[low : low + step]
            for k in range(correction.rank):
                rows += left[low : low + step, k, None] * right[k]
        skipped = start - first * columns
        added = correction.scale * product.ravel()[skipped:][: len(values)]
        found = values.astype(np.float64) + added
        return found if values.dtype == np.float64 else found.astype(np.float32)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        """Bytes ``offset..offset+size`` of the tensor as it would be stored."""
        if tensor.name not in self.adapter.corrections:
            return self._source.raw(tensor, offset, size)
        return bytes_of(partial(self.values, tensor), tensor.dtype, offset, size)

    def check_unchanged(self) -> None:
        """Refuse files that were written to since they were opened."""
        self._source.check_unchanged()
        self.adapter.weights.check_unchanged()

    def close(self) -> None:
        """Close the source and the adapter."""
        self._source.close()
        self.adapter.close()

    def _right(self, correction: Correction) -> F64:
        """What rows are multiplied with, (r, columns)."""
        with self._lock:
            found = self._columns.pop(correction.name, None)
            if found is None:
                part = correction.b if correction.embedding else correction.a
                found = self._part(part, 0, part.shape[0])
                found = np.ascontiguousarray(found.T) if correction.embedding else found
            self._columns[correction.name] = found
            if len(self._columns) > _CACHED:
                self._columns.popitem(last=False)
            return found

    def _left(self, correction: Correction, first: int, last: int) -> F64:
        """Factors of rows ``first..last``, (last - first, r)."""
        if not correction.embedding:
            return self._part(correction.b, first, last)
        rows = correction.a.shape[1]
        weights = self.adapter.weights
        pieces = [
            weights.values(correction.a, k * rows + first, k * rows + last)
            for k in range(correction.rank)
        ]
        return np.stack(pieces, axis=1).astype(np.float64)

    def _part(self, part: TensorInfo, first: int, last: int) -> F64:
        width = part.shape[1]
        values = self.adapter.weights.values(part, first * width, last * width)
        return values.reshape(-1, width).astype(np.float64)


def _widened(tensor: TensorInfo) -> TensorInfo:
    dtype = "F64" if tensor.dtype == "F64" else "F32"
    return replace(tensor, dtype=dtype, nbytes=DTYPES[dtype].nbytes(tensor.size))
