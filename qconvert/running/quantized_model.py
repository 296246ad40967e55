"""A quantized file as a transformers model: codes in memory as in the file, everything else as
float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qconvert.encoding import AffineEncoding
from qconvert.errors import QconvertError, UnsupportedError, UsageError
from qconvert.files import open_model
from qconvert.files.gguf import ARCHITECTURE, RAW
from qconvert.files.qblk import QblkModel
from qconvert.files.qblk_check import check_payload
from qconvert.files.qblk_header import StoredTensor
from qconvert.geometry import TILE_VALUES
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.running.hugging_face import (
    CONFIG,
    Checkpoint,
    checked_config,
    model_class,
    plain_experts,
    refuse_loading,
    require,
)
from qconvert.running.integer_path import DynamicInput, StaticInput, StoredMatrix, read_matrix

ACTIVATIONS = ("none", "dynamic", "dynamic_asym", "static", "auto")


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """A quantized model ready to run.

    Attributes:
        checkpoint: model, tokenizer and config, as of `hugging_face.open_checkpoint`.
        static, dynamic: names of the linear layers that run in integers, by their activations.
        quantized: names of the layers whose weights are codes in memory, those of `static` and
            `dynamic` among them.
        dequantized: names of the tensors that are codes in the file and float32 in memory: no
            layer of ours takes them.
    """

    checkpoint: Checkpoint
    static: tuple[str, ...]
    dynamic: tuple[str, ...]
    quantized: tuple[str, ...]
    dequantized: tuple[str, ...]


def open_quantized(
    path: Path,
    activations: str = "none",
    *,
    directory: Path | None = None,
    threads: int | None = None,
    check: bool = True,
) -> QuantizedCheckpoint:
    """Build the model of a file, with its own config and tokenizer.

    Args:
        path: a .qblk file; or a GGUF file, whose weights are float32 in memory: with llama.cpp's
            names, of an architecture in our table, or with those of the source.
        activations: of linear layers with codes: ``none`` computes in float with the dequantized
            weights, and is all there is for GGUF; ``dynamic`` (symmetric), ``dynamic_asym`` and
            ``static`` run `integer_path`; ``auto`` is static where the file has parameters and
            dynamic elsewhere.
        directory: where config and tokenizer are, for a file that carries none.
        threads: of torch, for the whole process.
        check: whether to hold a .qblk file against its digests first.

    Raises:
        InputError: the file is damaged or carries no config, its tensors are not those of the
            model that the config describes, the model needs code of its own, or activations are
            to be bytes and no linear layer has codes.
        UsageError: static activations, and a layer has no parameters in the file.
        MachineError: torch or transformers is not installed.
    """
    if activations not in ACTIVATIONS:
        raise UsageError("activations", found=activations, wanted=", ".join(ACTIVATIONS))
    model = open_model(path)
    try:
        if model.kind == "gguf" and activations != "none":
            raise UnsupportedError(
                "there is no integer path for ggml's types, they are computed in float",
                path=path,
                found=f"activations {activations}",
                wanted="none",
                hint="llama.cpp has its own; a .qblk file has ours",
                code="HF-INTEGERS",
            )
        if check and isinstance(model, QblkModel):
            check_payload(model, lambda _: None)
        with _directory(model, directory) as place:
            return _Builder(model, activations).build(place, threads)
    finally:
        model.close()


def open_tokenizer(path: Path, *, directory: Path | None = None) -> Any:
    """The tokenizer that a file carries; arguments and errors as of `open_quantized`."""
    model = open_model(path)
    try:
        with _directory(model, directory) as place:
            checked_config(place)
            return _tokenizer(place, path)
    finally:
        model.close()


def _tokenizer(directory: Path, path: Path) -> Any:
    (transformers,) = require("transformers")
    try:
        with _quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # whatever transformers makes of files that it does not like
        refuse_loading(e, path)


@contextmanager
def _directory(model: Model, given: Path | None) -> Iterator[Path]:
    """Config and tokenizer as transformers wants them: in a directory."""
    files = model.header.files if isinstance(model, QblkModel) else ()
    if not any(f.name == CONFIG for f in files):
        if given is None:
            raise UnsupportedError(
                "the file carries no config and tokenizer",
                path=model.path,
                hint="quantize a model directory, or say where they are",
                code="HF-CONFIG",
            )
        yield given
        return
    assert isinstance(model, QblkModel)
    with TemporaryDirectory(prefix="qconvert-") as place:
        for file in files:  # QBLK-025: base names
            (Path(place) / file.name).write_bytes(model.companion(file))
        try:
            yield Path(place)
        except QconvertError as e:
            if e.path and e.path.startswith(place):  # a name that tells nobody anything
                e.path = str(model.path) + e.path.removeprefix(place).replace("/", ": ", 1)
            raise


class _Builder:
    def __init__(self, model: Model, activations: str) -> None:
        self.model = model
        self.activations = activations
        self.tensors = {t.name: t for t in model.tensors}
        self.stored = model.stored if isinstance(model, QblkModel) else {}
        self.matrices: dict[str, StoredMatrix] = {}
        self.values: dict[str, Any] = {}  # torch tensors
        self.buffers: set[str] = set()
        self.static: list[str] = []
        self.dynamic: list[str] = []
        self.quantized: list[str] = []
        self.dequantized: list[str] = []

    def build(self, directory: Path, threads: int | None) -> QuantizedCheckpoint:
        config = checked_config(directory)
        torch, transformers = require("torch", "transformers")
        if threads is not None:
            torch.set_num_threads(threads)
        tokenizer = _tokenizer(directory, self.model.path)
        name, kind = model_class(config, directory)
        try:
            described = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            with _quiet(transformers), _parameters_on_meta(torch):
                built = getattr(transformers, name)(described)
            built.tie_weights()
            if (directory / "generation_config.json").is_file() and built.can_generate():
                built.generation_config = transformers.GenerationConfig.from_pretrained(
                    directory, local_files_only=True
                )
        except Exception as e:  # whatever transformers makes of files that it does not like
            refuse_loading(e, self.model.path)
        if self.model.kind == "gguf" and self.model.metadata.get(ARCHITECTURE) != RAW:
            self._restore(built, config, directory / CONFIG)
        self._fill(built)
        plain_experts(built)
        if self.activations != "none" and not (self.static or self.dynamic):
            raise UnsupportedError(
                "no linear layer of the file has codes to multiply in integers",
                path=self.model.path,
                hint="--activations none computes with the dequantized weights",
                code="HF-INTEGERS",
            )
        built.eval().requires_grad_(False)
        checkpoint = Checkpoint(self.model.path, built, tokenizer, config, kind)
        return QuantizedCheckpoint(
            checkpoint,
            tuple(self.static),
            tuple(self.dynamic),
            tuple(self.quantized),
            tuple(self.dequantized),
        )

    def _restore(self, built: Any, config: dict[str, Any], path: Path) -> None:
        """Give the tensors of a file with llama.cpp's names those of the modules.

        A module that no such file has tensors for, such as a pooler, is taken out.
        """
        from qconvert.architectures import restored  # its tables take 0.1 s to build

        self.dequantized = [t.name for t in self.model.tensors if t.dtype not in DTYPES]
        shapes = {name: tuple(p.shape) for name, p in built.named_parameters()}
        found = restored(self.model, config, path, shapes)
        self.model = found.model
        self.tensors = {t.name: t for t in self.model.tensors}
        dropped = {d.name for d in found.dropped}
        for place, module in list(built.named_modules()):
            below = {f"{place}.{name}" for name, _ in module.named_parameters()}
            if below and below <= dropped:
                _replace(built, place, None)
                dropped -= below

    def _fill(self, built: Any) -> None:
        """Give every module its tensors."""
        import torch

        from qconvert.running.integer_layers import QuantizedEmbedding, QuantizedLinear

        names = _Names(built, self.tensors)
        self._buffers(built, names)
        modules = list(built.named_modules())
        missing = []
        for place, module in modules:
            own = [p for p, parameter in module._parameters.items() if parameter is not None]
            found = {p: names.find(place, p) for p in own}
            missing += [f"{place}.{p}" for p, tensor in found.items() if tensor is None]
            taken = {p: tensor for p, tensor in found.items() if tensor is not None}
            weight = taken.get("weight")
            if missing or not taken:
                continue
            for p, tensor in taken.items():
                self._check_shape(tensor, module._parameters[p])
            if weight and type(module) is torch.nn.Linear and self._has_codes(weight):
                matrix = self._matrix(weight)
                bias = self._float(taken["bias"]) if "bias" in taken else None
                how = self._activations(place, self.stored[weight.name])
                _replace(built, place, QuantizedLinear(matrix, bias, how))
                self.quantized.append(place)
            elif weight and type(module) is torch.nn.Embedding and self._has_codes(weight):
                _replace(built, place, QuantizedEmbedding(self._matrix(weight), module.padding_idx))
                self.quantized.append(place)
            else:
                for p, tensor in taken.items():
                    values = self._float(tensor)
                    module._parameters[p] = torch.nn.Parameter(values, requires_grad=False)
        if missing:
            raise self._another_model(missing[0], f"{len(missing)} tensors missing")
        self._no_others(built)

    def _has_codes(self, tensor: TensorInfo) -> bool:
        stored = self.stored.get(tensor.name)
        return stored is not None and isinstance(stored.encoding, AffineEncoding)

    def _matrix(self, tensor: TensorInfo) -> StoredMatrix:
        """The codes of a tensor, read once for all layers that share it."""
        if tensor.name not in self.matrices:
            assert isinstance(self.model, QblkModel)
            self.matrices[tensor.name] = read_matrix(self.model, self.stored[tensor.name])
        return self.matrices[tensor.name]

    def _activations(self, place: str, stored: StoredTensor) -> StaticInput | DynamicInput | None:
        """How the layer's input becomes bytes."""
        if self.activations == "none":
            return None
        note = stored.activation
        if note and self.activations in ("static", "auto"):
            self.static.append(place)
            return StaticInput(float(note["scale"]), note["zero_point"])
        if self.activations == "static":
            raise UsageError(
                "static activations need a calibration in the file",
                found=f"none for layer '{place}'",
                hint="calibrate every layer, or take --activations auto: dynamic where there is "
                "none",
            )
        self.dynamic.append(place)
        return DynamicInput(symmetric=self.activations != "dynamic_asym")

    def _check_shape(self, tensor: TensorInfo, parameter: Any) -> None:
        if tensor.shape != tuple(parameter.shape):
            raise UnsupportedError(
                "the file is not of the model that its config describes",
                path=self.model.path,
                tensor=tensor.name,
                found=f"shape {list(tensor.shape)}",
                wanted=f"{list(parameter.shape)}",
                code="HF-WEIGHTS",
            )

    def _float(self, tensor: TensorInfo) -> Any:
        """The float32 values of a tensor as torch has them, read once for all that share it."""
        import torch

        if not tensor.real:
            raise UnsupportedError(
                "complex weights are not run",
                path=self.model.path,
                tensor=tensor.name,
                found=tensor.dtype,
                code="HF-WEIGHTS",
            )
        if tensor.name not in self.values:
            out = np.empty(tensor.size, np.float32)
            for start in range(0, tensor.size, TILE_VALUES):
                stop = min(start + TILE_VALUES, tensor.size)
                out[start:stop] = self.model.values(tensor, start, stop)
            self.values[tensor.name] = torch.from_numpy(out.reshape(tensor.shape))
            if not tensor.floating:
                self.dequantized.append(tensor.name)
        return self.values[tensor.name]

    def _buffers(self, built: Any, names: _Names) -> None:
        """Buffers that the file has, such as running means; the others are the module's own."""
        import torch

        for place, buffer in built.named_buffers():
            module, _, name = place.rpartition(".")
            tensor = names.find(module, name)
            if tensor is not None:
                self._check_shape(tensor, buffer)
                values = self.model.values(tensor, 0, tensor.size).reshape(tensor.shape)
                buffer.copy_(torch.from_numpy(np.array(values)))
                self.buffers.add(tensor.name)

    def _no_others(self, built: Any) -> None:
        """Refuse tensors that no module took, but for those that the class says to ignore."""
        ignored = [*(getattr(built, "_keys_to_ignore_on_load_unexpected", None) or ())]
        ignored += [r"position_ids$", r"rotary_emb\.inv_freq$"]  # of older checkpoints
        tied = [*(getattr(built, "_tied_weights_keys", None) or ())]  # stored twice
        used = self.matrices.keys() | self.values.keys() | self.buffers
        left = [
            name
            for name in self.tensors
            if name not in used
            and not any(re.search(pattern, name) for pattern in ignored)
            and not any(re.search(key, name) for key in tied)
        ]
        if left:
            raise self._another_model(left[0], f"{len(left)} tensors that no layer takes")

    def _another_model(self, tensor: str, found: str) -> UnsupportedError:
        return UnsupportedError(
            "the file is not of the model that its config describes",
            path=self.model.path,
            tensor=tensor,
            found=found,
            code="HF-WEIGHTS",
        )


class _Names:
    """Parameters to tensors of the file: by name, with or without the prefix of the base model, and
    for a tied parameter by any of its names.
    """

    def __init__(self, built: Any, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.prefix = f"{built.base_model_prefix}." if built.base_model_prefix else ""
        self.parameters = dict(built.named_parameters(remove_duplicate=False))
        self.aliases: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self.aliases.setdefault(id(parameter), []).append(name)

    def find(self, module: str, name: str) -> TensorInfo | None:
        full = f"{module}.{name}" if module else name
        parameter = self.parameters.get(full)
        for alias in self.aliases.get(id(parameter), [full]):
            for spelled in (alias, alias.removeprefix(self.prefix), self.prefix + alias):
                if spelled in self.tensors:
                    return self.tensors[spelled]
        return None


def _replace(built: Any, place: str, new: Any) -> None:
    parent, _, name = place.rpartition(".")
    setattr(built.get_submodule(parent), name, new)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Errors of transformers only; its setting belongs to the program that we are part of."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _parameters_on_meta(torch: Any) -> Iterator[None]:
    """Modules made inside have parameters without memory; buffers, which are computed, are real.

    A whole ``torch.device("meta")`` would lose the buffers that no file has.
    """
    module = torch.nn.Module
    register = module.register_parameter

    def on_meta(self: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    module.register_parameter = on_meta
    try:
        yield
    finally:
        module.register_parameter = register
