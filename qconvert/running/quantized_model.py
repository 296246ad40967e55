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
from numpy.typing import NDArray

from qconvert.codecs.codec import Stored
from qconvert.errors import QconvertError, UnsupportedError, UsageError
from qconvert.files import OpenModel, open_model
from qconvert.files.exchange import QuantizedModel, open_weights
from qconvert.files.gguf import ARCHITECTURE, RAW
from qconvert.files.prequantized import refuse_prequantized
from qconvert.files.qblk_header import SLASH
from qconvert.geometry import TILE_VALUES
from qconvert.kernels.activations import DynamicInput, StaticInput
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.running.device import CPU
from qconvert.running.hugging_face import (
    CONFIG,
    Checkpoint,
    check_text_alone,
    checked_config,
    model_class,
    open_checkpoint,
    plain_experts,
    refuse_loading,
    require,
    without_quantizer,
)
from qconvert.running.integer_path import StoredMatrix, read_matrix
from qconvert.running.state_dict import Loaded, StandIns, load_state, quiet

OUTPUT = "output.weight"  # in a GGUF file
# What older checkpoints store and transformers computes.
_COMPUTED = re.compile(r"position_ids$|rotary_emb\.inv_freq$")
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
    decoded: bool = False,
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
        decoded: whether all weights are float32 in memory and their modules torch's own, which
            gradients go through; with ``none`` only.

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
        refuse_prequantized(model)
        if check:
            model.check_payload(lambda _: None)
        with _directory(model, directory) as place:
            return _Builder(model, activations, decoded).build(place, threads)
    finally:
        model.close()


def open_source(
    path: Path, *, threads: int | None = None, streamed: bool = False, device: str = CPU
) -> Checkpoint:
    """A directory as `hugging_face.open_checkpoint` loads it; one of codes that are read as weights
    with these in memory, float32.

    Args and errors as of `hugging_face.open_checkpoint` and `open_quantized`.
    """
    checked_config(path)
    with open_weights(path) as model:
        quantized = isinstance(model, QuantizedModel)
    if quantized:
        found = open_quantized(path, threads=threads, check=False, decoded=True).checkpoint
        found.model.to(device)
        return found
    return open_checkpoint(path, threads=threads, streamed=streamed, device=device)


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
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # whatever transformers makes of files that it does not like
        refuse_loading(e, path)


@contextmanager
def _directory(model: Model, given: Path | None) -> Iterator[Path]:
    """Config and tokenizer as transformers wants them: in a directory."""
    if all(c.name != CONFIG for c in model.companions):
        if given is None:
            raise UnsupportedError(
                "the file carries no config and tokenizer",
                path=model.path,
                hint="quantize a model directory, or say where they are",
                code="HF-CONFIG",
            )
        yield given
        return
    with TemporaryDirectory(prefix="qconvert-") as place:
        for companion in model.companions:
            path = Path(place, *_parts(companion.name))
            if path.exists() or any(p.is_file() for p in path.parents):
                path = Path(place) / companion.name.replace("/", SLASH)  # two names, one place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(companion.read())
        try:
            yield Path(place)
        except QconvertError as e:
            if e.path and e.path.startswith(place):  # a name that tells nobody anything
                e.path = str(model.path) + e.path.removeprefix(place).replace("/", ": ", 1)
            raise


def _parts(name: str) -> list[str]:
    """Where a file that is carried was in the model's directory: QBLK-025, and section 5."""
    parts = name.split("/")
    return [name.replace("/", SLASH)] if {"", ".", ".."} & set(parts) else parts


class _Builder:
    def __init__(self, model: OpenModel, activations: str, decoded: bool) -> None:
        self.model: Model = model
        self.activations = activations
        self.tensors = {t.name: t for t in model.tensors}
        stored = {} if decoded else {t.name: model.stored(t) for t in model.tensors}
        self.codes = {n: s for n, s in stored.items() if s.encoding.multiplies}
        self.matrices: dict[str, StoredMatrix] = {}
        self.values: dict[str, Any] = {}  # torch tensors
        self.dropped: set[str] = set()  # parameters that no file of the kind has
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
        cls = getattr(transformers, name)
        try:
            described = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            without_quantizer(described)
            if self.model.kind == "gguf" and self.model.metadata.get(ARCHITECTURE) != RAW:
                self._restore(cls, described, config, directory / CONFIG)
            built = self._load(cls, described)
            if (directory / "generation_config.json").is_file() and built.can_generate():
                built.generation_config = transformers.GenerationConfig.from_pretrained(
                    directory, local_files_only=True
                )
        except Exception as e:  # whatever transformers makes of files that it does not like
            refuse_loading(e, self.model.path)
        plain_experts(built)
        if self.activations != "none" and not (self.static or self.dynamic):
            raise UnsupportedError(
                "no linear layer of the file has codes to multiply in integers",
                path=self.model.path,
                hint="--activations none computes with the dequantized weights",
                code="HF-INTEGERS",
            )
        built.eval().requires_grad_(False)
        check_text_alone(built, self.model.path)
        checkpoint = Checkpoint(self.model.path, built, tokenizer, config, kind)
        return QuantizedCheckpoint(
            checkpoint,
            tuple(self.static),
            tuple(self.dynamic),
            tuple(self.quantized),
            tuple(self.dequantized),
        )

    def _restore(self, cls: Any, described: Any, config: dict[str, Any], path: Path) -> None:
        """Give the tensors of a file with llama.cpp's names those of the modules."""
        import torch

        from qconvert.architectures import restored  # its tables take 0.1 s to build

        if OUTPUT in self.tensors:  # the file has an output matrix of its own
            described.tie_word_embeddings = False
            described.get_text_config().tie_word_embeddings = False
        with torch.device("meta"):  # for its names and shapes alone
            skeleton = cls(described)
        skeleton.tie_weights()
        self.dequantized = [t.name for t in self.model.tensors if t.coded]
        shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
        found = restored(self.model, config, path, shapes)
        self.model = found.model
        self.tensors = {t.name: t for t in self.model.tensors}
        self.dropped = {d.name for d in found.dropped}

    def _load(self, cls: Any, described: Any) -> Any:
        """The model with every tensor of the file where transformers puts it.

        Stand-ins go first. Those that are parameters afterwards are exchanged for the tensor's
        codes or values; tensors that went into something new are loaded once more with values.
        """
        stand_ins = StandIns()
        state = {n: stand_ins.make(n, t.shape) for n, t in self.tensors.items()}
        loaded = self._complete(load_state(cls, described, state, self.model.path))
        direct = {stand_ins.name_of(p) for p in _tensors_of(loaded.model)}
        others = self.tensors.keys() - direct - set(loaded.unexpected)
        if others:
            state |= {n: self._torch(self.tensors[n]) for n in others}
            loaded = self._complete(load_state(cls, described, state, self.model.path))
        self._without_dropped(loaded)
        self._exchange(loaded.model, stand_ins)
        return loaded.model

    def _complete(self, loaded: Loaded) -> Loaded:
        """Refuse tensors too many or too few, or of another shape."""
        missing = [name for name in loaded.missing if name not in self.dropped]
        if missing:
            raise self._another_model(missing[0], f"{len(missing)} tensors missing")
        if loaded.mismatched:
            name, found, wanted = loaded.mismatched[0]
            raise UnsupportedError(
                "the file is not of the model that its config describes",
                path=self.model.path,
                tensor=name,
                found=f"shape {list(found)}",
                wanted=f"{list(wanted)}",
                code="HF-WEIGHTS",
            )
        left = [name for name in loaded.unexpected if not _COMPUTED.search(name)]
        if left:
            raise self._another_model(left[0], f"{len(left)} tensors that no layer takes")
        return loaded

    def _without_dropped(self, loaded: Loaded) -> None:
        """Take out modules that no such file has tensors for, such as a pooler."""
        dropped = set(self.dropped)
        for place, module in list(loaded.model.named_modules()):
            below = {f"{place}.{name}" for name, _ in module.named_parameters()}
            if below and below <= dropped:
                _replace(loaded.model, place, None)
                dropped -= below

    def _exchange(self, built: Any, stand_ins: StandIns) -> None:
        """Put codes or values where stand-ins are."""
        import torch

        from qconvert.running.integer_layers import QuantizedEmbedding, QuantizedLinear

        for place, module in list(built.named_modules()):
            for kind, held in (("parameters", module._parameters), ("buffers", module._buffers)):
                for name, tensor in list(held.items()):
                    source = None if tensor is None else stand_ins.name_of(tensor)
                    if source is None or self._takes_codes(module, name, source):
                        continue
                    values = self._torch(self.tensors[source])
                    if kind == "parameters":
                        values = torch.nn.Parameter(values, requires_grad=False)
                    held[name] = values
            weight = module._parameters.get("weight")
            source = None if weight is None else stand_ins.name_of(weight)
            if source is None:
                continue
            matrix = self._matrix(self.tensors[source])
            if type(module) is torch.nn.Linear:
                how = self._activations(place, self.codes[source])
                _replace(built, place, QuantizedLinear(matrix, module.bias, how))
            else:
                _replace(built, place, QuantizedEmbedding(matrix, module.padding_idx))
            self.quantized.append(place)

    def _takes_codes(self, module: Any, name: str, source: str) -> bool:
        """Whether a parameter stays codes: a linear layer's or an embedding's weight."""
        import torch

        plain = type(module) in (torch.nn.Linear, torch.nn.Embedding)
        return plain and name == "weight" and source in self.codes

    def _matrix(self, tensor: TensorInfo) -> StoredMatrix:
        """The codes of a tensor, read once for all layers that share it."""
        if tensor.name not in self.matrices:
            self.matrices[tensor.name] = read_matrix(self.codes[tensor.name])
        return self.matrices[tensor.name]

    def _activations(self, place: str, stored: Stored) -> StaticInput | DynamicInput | None:
        """How the layer's input becomes bytes."""
        if self.activations == "none":
            return None
        noted = StaticInput.noted(stored.activation)
        if noted and self.activations in ("static", "auto"):
            self.static.append(place)
            return noted
        if self.activations == "static":
            raise UsageError(
                "static activations need a calibration in the file",
                found=f"none for layer '{place}'",
                hint="calibrate every layer, or take --activations auto: dynamic where there is "
                "none",
            )
        self.dynamic.append(place)
        return DynamicInput(symmetric=self.activations != "dynamic_asym")

    def _torch(self, tensor: TensorInfo) -> Any:
        """The values of a tensor as torch has them, read once for all that share it.

        float32 for codes and floating numbers; integers and bool keep their dtype.
        """
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
            self.values[tensor.name] = torch.from_numpy(self._values(tensor))
        return self.values[tensor.name]

    def _values(self, tensor: TensorInfo) -> NDArray[Any]:
        known = DTYPES.get(tensor.dtype)
        if known and not known.floating:
            kind = "?" if known.kind == "bool" else f"<{known.kind[0]}{known.size}"
            raw = np.frombuffer(self.model.raw(tensor, 0, tensor.nbytes), np.uint8)
            return (raw != 0 if kind == "?" else raw.view(kind)).reshape(tensor.shape).copy()
        out = np.empty(tensor.size, np.float32)
        for start in range(0, tensor.size, TILE_VALUES):
            stop = min(start + TILE_VALUES, tensor.size)
            out[start:stop] = self.model.values(tensor, start, stop)
        if not tensor.floating:
            self.dequantized.append(tensor.name)
        return out.reshape(tensor.shape)

    def _another_model(self, tensor: str, found: str) -> UnsupportedError:
        return UnsupportedError(
            "the file is not of the model that its config describes",
            path=self.model.path,
            tensor=tensor,
            found=found,
            code="HF-WEIGHTS",
        )


def _tensors_of(built: Any) -> Iterator[Any]:
    """Parameters and buffers."""
    yield from built.parameters()
    yield from built.buffers()


def _replace(built: Any, place: str, new: Any) -> None:
    parent, _, name = place.rpartition(".")
    setattr(built.get_submodule(parent), name, new)
