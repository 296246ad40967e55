"""A directory of safetensors shards with configuration, tokenizer and the other small files of the
model, as its readers expect it.

What a reader would refuse, or take wrongly in silence, is refused here before a byte is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from qconvert.calibration.file import Calibration
from qconvert.codecs.codec import Encoding, Stored
from qconvert.codecs.exchange.layout import Layout, furthest
from qconvert.codecs.exchange.micro import Micro
from qconvert.codecs.moving import MovedScheme
from qconvert.containers import CONTAINERS
from qconvert.errors import UnsupportedError, UsageError
from qconvert.exchange_schemes import CompressedTensorsScheme, ExchangeScheme
from qconvert.files import OpenModel
from qconvert.files.atomic import AtomicDirectory, machine_errors
from qconvert.files.equalised import noted
from qconvert.files.provenance import PROVENANCE
from qconvert.files.safetensors_writer import Entry, SafetensorsWriter, planned_shards
from qconvert.files.shards import CONFIG
from qconvert.kernels.records import Bytes
from qconvert.model import WEIGHT, Companion, Model, TensorInfo, layer_name
from qconvert.schemes import KeepScheme, MixScheme, TensorScheme
from qconvert.stages.moving import DTYPE_NAMES, Moving, config_of, model_dtype
from qconvert.stages.plan import PlannedTensor, PlanOptions, make_plan
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.target import Atomic, Finding, Prepared, Sink

_FUSED = "parts of a layer that readers multiply as one matrix are stored alike"
SHARD_SIZE = 5 * 10**9  # bytes, as transformers has it
# What parts of a fused layer are called: readers multiply them as one matrix.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
EMBEDDINGS = ("*embed*.weight", "*wte.weight", "*wpe.weight")
HEADS = ("lm_head.weight", "*.lm_head.weight", "*embed_out.weight")
ROUTERS = ("*.gate.weight", "*.router.weight", "*.shared_expert_gate.weight")
VISION = ("*vision*", "*visual*", "*audio*", "*multi_modal_projector*")


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors that stay as they are.

    Attributes:
        globs: of their names.
        reason: for the report.
    """

    globs: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Readers:
    """What tools make of a directory.

    Attributes:
        notes: which of them load it.
        warnings: which do not, and what else is to be known.
    """

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DirectoryTarget:
    """See `qconvert.stages.target.Target`.

    Attributes:
        name: of the format.
        settings: gives the members that config.json gets, of the plan and the configuration.
        readers: says who loads what was planned.
        dense: what stays as it is.
        fused: names of modules that take one scheme.
        metadata: of the headers of the files.
        quantizes: whether there are codes in it.
        named: gives a model the names and shapes that its readers have for its tensors.
    """

    name: str
    settings: Callable[[Sequence[PlannedTensor], Mapping[str, Any]], dict[str, Any]]
    readers: Callable[[Sequence[PlannedTensor]], Readers]
    dense: tuple[Rule, ...]
    fused: tuple[tuple[str, ...], ...] = FUSED
    metadata: tuple[tuple[str, str], ...] = (("format", "pt"),)
    quantizes: bool = True
    named: Callable[[Model], Model] = lambda model: model

    def prepare(
        self, opened: OpenModel, model: Model, options: QuantizeOptions, output: Path
    ) -> Prepared:
        if replace(options.gguf, shard_size=None) != GgufOptions():
            raise UsageError(
                "options of GGUF files have no place in a directory",
                hint="leave them out, or write a .gguf file with another scheme",
            )
        config = config_of(model)
        if config is None:
            raise UnsupportedError(
                f"the model has no {CONFIG}, without which no tool loads a directory",
                path=model.path,
                hint="convert the model's directory, in which it lies beside the tensors",
            )
        rescaled, own = noted(model), {t.name: t.name for t in model.tensors}
        model = self.named(model)
        dtype = model_dtype(config, model)
        planned, scales = self._planned(opened, model, options, dtype)
        warnings = []
        if scales != dtype:
            config = config | _named_dtype(config, scales)
            warnings.append(
                f"{CONFIG} says {DTYPE_NAMES[scales]}, not {DTYPE_NAMES[dtype]}, in which scales "
                "that moved would be rounded: a model whose activations go beyond 65,504 needs "
                "--scheme bf16 --format hf instead"
            )
        self._check_fused(planned, model.path, keep=isinstance(options.scheme, KeepScheme))
        planned = self._tied(planned)
        _check_static(planned, options.calibration)
        plan = [replace(p, scheme=_like(p.scheme)) for p in planned]
        if self.quantizes and not any(isinstance(p.scheme, ExchangeScheme) for p in plan):
            decoded = Counter(p.reason for p in plan if p.reason.startswith("decoded"))
            if decoded:
                raise UnsupportedError(
                    f"no quantized tensor moves into a directory for {self.name}",
                    path=model.path,
                    found=decoded.most_common(1)[0][0],
                    hint="decode them with --format hf --scheme bf16, or quantize them again with "
                    "--allow-requantize and a scheme",
                )
            raise UnsupportedError(
                f"no tensor of the model goes into a directory for {self.name} quantized",
                path=model.path,
                wanted="linear layers: matrices of two dimensions called MODULE.weight",
                hint="the reasons are shown with --format qblk --dry-run",
            )
        readers = self.readers(plan)
        files = _files(model.companions, {**config, **self.settings(plan, config)})
        groups = [_entries(p) for p in planned]
        shards = planned_shards(groups, options.gguf.shard_size or SHARD_SIZE)
        return Prepared(
            model,
            planned,
            (output,),
            partial(_sink, shards, dict(self.metadata), files, _joined(planned)),
            options={"format": self.name}
            | ({"shard_size": options.gguf.shard_size} if options.gguf.shard_size else {}),
            origin=own.get,
            provenance=rescaled,
            companions=len(files),
            companion_bytes=sum(len(data) for data in files.values()),
            warnings=[*warnings, *readers.warnings, *self._unlike(planned)],
            readers=readers.notes,
            directory=True,
        )

    def _planned(
        self, opened: OpenModel, model: Model, options: QuantizeOptions, dtype: str
    ) -> tuple[tuple[PlannedTensor, ...], str]:
        """What becomes of every tensor, and the dtype that readers have to load scales in."""
        if isinstance(options.scheme, KeepScheme):
            moving = Moving(opened, model, CONTAINERS[self.name], dtype, self._dense)
            return moving.plan_in_best_dtype(options.exact)
        scales = partial(_with_scales, dtype=dtype)
        asked = PlanOptions(
            options.keep,
            tuple((glob, scales(s)) for glob, s in options.tensor_schemes),
            options.min_values,
        )
        assert not isinstance(options.scheme, MixScheme)
        plan = make_plan(model.tensors, scales(options.scheme), asked)
        return tuple(self._checked(p) for p in plan), dtype

    def source_of(self, made: OpenModel, opened: OpenModel, model: Model) -> Model:
        return self.named(model)

    def examined(self, made: OpenModel) -> Sequence[Finding]:
        """Parts of fused layers have one layout: vLLM refuses others, or takes one for all."""
        if not self.fused:
            return ()
        stored = {layer_name(t.name): made.stored(t) for t in made.tensors}
        layers = [parts for _, parts in self._layers(stored)]
        for first, *others in layers:
            name = stored[first].encoding.name
            other = next((m for m in others if stored[m].encoding.name != name), None)
            if other is not None:
                broken = f"{name} and {stored[other].encoding.name} in one layer"
                return (Finding("fused-layers", _FUSED, broken, other),)
        count = sum(len(parts) > 1 for parts in layers)
        several = [
            (names, parts[0])
            for names, parts in self._layers(stored)
            if len({stored[part].encoding.divisor(stored[part]) for part in parts}) > 1
        ]
        kinds = (s.encoding.caution for s in stored.values() if isinstance(s.encoding, Layout))
        cautions = (*_several_scales(several), *sorted({kind for kind in kinds if kind}))
        return (Finding("fused-layers", f"{_FUSED}: {count} layers", cautions=cautions),)

    def _checked(self, p: PlannedTensor) -> PlannedTensor:
        """A planned tensor by the rules of the format."""
        why = self._dense(p.tensor.name) if isinstance(p.scheme, ExchangeScheme) else None
        return p if why is None else PlannedTensor(p.tensor, None, why)

    def _dense(self, name: str) -> str | None:
        """Why a tensor has no codes in a directory of the format; None where it may."""
        if not name.endswith(WEIGHT):
            return "no weight of a module, by its name"
        found = (r.reason for r in self.dense if any(fnmatchcase(name, g) for g in r.globs))
        return next(found, None)

    def _check_fused(self, plan: Sequence[PlannedTensor], path: Path, keep: bool) -> None:
        """Refuse parts of one layer that take several schemes.

        Args:
            keep: whether they were moved, or decoded where they could not be.

        Raises:
            UsageError: names two of them.
        """
        for names, parts in self._planned_layers(plan):
            p = parts[0]
            for q in parts[1:]:
                if _like(q.scheme) != _like(p.scheme):
                    found = (x.scheme.name if x.scheme else "dense" for x in (p, q))
                    raise UsageError(
                        f"readers of {self.name} multiply {' '.join(names)} as one matrix, so "
                        "that all of them take one scheme",
                        path=path,
                        tensor=q.tensor.name,
                        found=" and ".join(found),
                        hint="quantize them again alike with a scheme and --allow-requantize, "
                        "decode them with --format hf --scheme bf16, or move them with --format "
                        "qblk, where each may have its own"
                        if keep
                        else "give them the same with --tensor-scheme, or keep them all",
                    )

    def _tied(self, plan: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
        """A plan whose schemes know the other parts of their layers."""
        together = {
            p.tensor.name: tuple(q.tensor.name for q in parts)
            for _, parts in self._planned_layers(plan)
            for p in parts
        }
        return tuple(
            replace(p, scheme=p.scheme.with_parts(together[p.tensor.name]))
            if isinstance(p.scheme, ExchangeScheme) and p.tensor.name in together
            else p
            for p in plan
        )

    def _unlike(self, plan: Sequence[PlannedTensor]) -> list[str]:
        """A warning of layers whose parts were moved with different scales of the tensor."""
        found = []
        for names, parts in self._planned_layers(plan):
            moved = [p.scheme for p in parts if isinstance(p.scheme, MovedScheme)]
            if len({_divisor(scheme) for scheme in moved}) > 1:
                found.append((names, parts[0].tensor.name))
        return _several_scales(found)

    def _planned_layers(
        self, plan: Sequence[PlannedTensor]
    ) -> Iterator[tuple[tuple[str, ...], list[PlannedTensor]]]:
        """See `_layers`."""
        by_name = {layer_name(p.tensor.name): p for p in plan}
        for names, parts in self._layers(by_name):
            yield names, [by_name[module] for module in parts]

    def _layers(self, modules: Collection[str]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
        """What readers call the modules that they fuse, and those of a layer that are there."""
        for module in modules:
            place, _, last = module.rpartition(".")
            for names in self.fused:
                if last == names[0]:
                    parts = (f"{place}.{name}" for name in names)
                    yield names, [part for part in parts if part in modules]


def _several_scales(layers: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """A warning of layers whose parts have different scales of the tensor.

    Args:
        layers: what readers call the parts, and one of them.
    """
    if not layers:
        return []
    names, first = layers[0]
    return [
        f"{len(layers)} layers, such as that of '{first}', have parts ({' '.join(names)}) with "
        "different scales of the tensor, of which vLLM takes the largest for all: weights are "
        "off there, and right in transformers; convert them with --scheme nvfp4a16 and "
        "--allow-requantize"
    ]


def _divisor(scheme: MovedScheme) -> float:
    """The scale of a tensor, as a divisor; 1 where its encoding has none."""
    if isinstance(scheme.source, Stored):
        return scheme.encoding.divisor(scheme.source)
    return scheme.encoding.divides if isinstance(scheme.encoding, Micro) else 1.0


def _with_scales(scheme: TensorScheme, dtype: str) -> TensorScheme:
    return scheme.with_scales(dtype) if isinstance(scheme, ExchangeScheme) else scheme


def _named_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The fields of a configuration that name a dtype, with another one."""
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    found: dict[str, Any] = dict.fromkeys(named, DTYPE_NAMES[dtype])
    inner = config.get("text_config")
    if isinstance(inner, dict) and any(key in inner for key in ("dtype", "torch_dtype")):
        found["text_config"] = inner | _named_dtype(inner, dtype)
    return found


def _like(scheme: TensorScheme | None) -> TensorScheme | None:
    """What quantizing would be called that gives such codes as were moved."""
    return scheme.like if isinstance(scheme, MovedScheme) else scheme


def _check_static(plan: Sequence[PlannedTensor], calibration: Path | None) -> None:
    """Refuse static ranges of inputs that nobody has observed.

    Raises:
        UsageError: there is no calibration.
        UnsupportedError: it lacks a layer.
    """
    static = [
        p.tensor.name
        for p in plan
        if isinstance(p.scheme, ExchangeScheme) and p.scheme.activations == "static"
    ]
    if not static:
        return
    if calibration is None:
        raise UsageError(
            "static ranges of inputs come from a calibration", hint="give one with --calibration"
        )
    with Calibration(calibration) as observed:
        missing = [name for name in static if observed.find(name) is None]
    if missing:
        raise UnsupportedError(
            f"the calibration lacks {len(missing)} of {len(static)} layers whose inputs have "
            "static ranges",
            path=calibration,
            tensor=missing[0],
            hint="calibrate all of them, or keep the others with --keep",
        )


def _files(companions: Sequence[Companion], config: Mapping[str, Any]) -> dict[str, bytes]:
    """Small files of the output by their names."""
    found = {c.name: c.read() for c in companions if c.name != CONFIG}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {**found, CONFIG: text.encode()}


def _joined(plan: Sequence[PlannedTensor]) -> dict[str, Sequence[str]]:
    """Weights that have one scale of their inputs together with others, and which these are."""
    return {
        p.tensor.name: p.scheme.parts
        for p in plan
        if isinstance(p.scheme, CompressedTensorsScheme) and p.scheme.one_input
    }


def _entries(p: PlannedTensor) -> list[Entry]:
    """What a planned tensor is stored as."""
    encoding, tensor = p.encoding, p.tensor
    if not isinstance(encoding, Layout):
        return [Entry(tensor.name, encoding.name, tensor.shape)]
    module = layer_name(tensor.name)
    return [Entry(module + x.suffix, x.dtype, x.shape) for x in encoding.parts(tensor.shape)]


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Input:
    """The static range of the input of a layer, in signed bytes."""

    layout: Layout
    scale: float
    zero_point: int


class _DirectorySink:
    def __init__(
        self,
        directory: Path,
        shards: Sequence[Sequence[Entry]],
        metadata: Mapping[str, str],
        files: Mapping[str, bytes],
        joined: Mapping[str, Sequence[str]],
    ) -> None:
        self.joined = joined
        self.inputs: dict[str, _Input] = {}  # by the names of weights
        self.directory = directory
        self.files = files
        self.writer = SafetensorsWriter(directory, shards, metadata)

    def begin(self, tensor: TensorInfo, encoding: Encoding) -> _Parts:
        return _Parts(self.writer, tensor, encoding, self.inputs)

    def finish(self) -> int:
        for name, own in self.inputs.items():
            # All parts of a layer have one input: the widest of its ranges.
            ranges = [self.inputs[n] for n in self.joined.get(name, ()) if n in self.inputs]
            widest = max([own, *ranges], key=lambda r: furthest(r.scale, r.zero_point))
            for suffix, data in own.layout.static_input(widest.scale, widest.zero_point).items():
                self.writer.append(layer_name(name) + suffix, data)
        size = self.writer.finish()
        for name, data in self.files.items():
            path = self.directory.joinpath(*name.split("/"))
            with machine_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return size + sum(len(data) for data in self.files.values())

    def close(self) -> None:
        self.writer.close()


class _Parts:
    """The tensors of one weight being written."""

    def __init__(
        self,
        writer: SafetensorsWriter,
        tensor: TensorInfo,
        encoding: Encoding,
        inputs: dict[str, _Input],
    ) -> None:
        self.writer = writer
        self.weight = tensor.name
        self.inputs = inputs
        plain = not isinstance(encoding, Layout)
        self.name = tensor.name if plain else layer_name(tensor.name)
        self.plain = plain
        self.encoding = encoding

    def append(self, segments: Mapping[str, Bytes]) -> None:
        for kind, data in segments.items():
            self.writer.append(self.name if self.plain else self.name + kind, data)

    def finish(self, notes: dict[str, Any]) -> None:
        """Close the tensor; safetensors has no place for notes but static ranges of inputs."""
        if isinstance(self.encoding, Layout) and self.encoding.static:
            found = notes["activation"]
            scale, zero_point = found["scale"], found["zero_point"]
            self.inputs[self.weight] = _Input(self.encoding, scale, zero_point)


def _sink(
    shards: Sequence[Sequence[Entry]],
    metadata: Mapping[str, str],
    files: Mapping[str, bytes],
    joined: Mapping[str, Sequence[str]],
    out: Atomic,
    provenance: dict[str, Any],
) -> Sink:
    assert isinstance(out, AtomicDirectory)
    text = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    return _DirectorySink(out.path, shards, {**metadata, PROVENANCE: text}, files, joined)
