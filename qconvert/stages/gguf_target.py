"""Writing GGUF, in one file or in several."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qconvert.codecs.codec import Encoding
from qconvert.codecs.ggml_blocks import SCALED, type_of
from qconvert.containers import CONTAINERS
from qconvert.errors import UsageError
from qconvert.files import OpenModel
from qconvert.files.adapters import AdaptedModel
from qconvert.files.atomic import AtomicDirectory, AtomicOutput, machine_errors
from qconvert.files.equalised import EqualisedModel, noted
from qconvert.files.gguf import ADAPTER, ARCHITECTURE, KIND, PROJECTOR_FILE, RAW
from qconvert.files.gguf_scaled import NVFP4, scale_name
from qconvert.files.gguf_split import SplitGgufWriter, plan_shards, shard_path
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import (
    GgufTensor,
    GgufValue,
    GgufWriter,
    MetadataScalar,
    MetadataValue,
    check_gguf,
)
from qconvert.files.imatrix import Imatrix, read_imatrix
from qconvert.files.provenance import PROVENANCE
from qconvert.kernels.records import F32, Bytes
from qconvert.mixes import MIXES, Mix, MixOptions, ModelFacts, parse_mix
from qconvert.model import Model, TensorInfo
from qconvert.product_scales import takes_scale
from qconvert.schemes import TENSOR_SCHEMES, GgmlScheme, KeepScheme, MixScheme
from qconvert.stages.gguf_sources import (
    FURTHER_LAYERS,
    PRE_TOKENIZER,
    TOKENIZER,
    GgufModelSource,
    adapter_as_gguf,
    as_gguf,
    projector_as_gguf,
)
from qconvert.stages.made_from import made_from
from qconvert.stages.moving import Moving, check_moved, config_of, model_dtype
from qconvert.stages.plan import MIN_VALUES, PlannedTensor, PlanOptions, make_plan, plan_mix
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.target import Atomic, Finding, Prepared, Sink, Target, model_name

PROVENANCE_BYTES = 4096  # for a bound before it is known
PADDING = 32  # at most, behind a tensor
# Keys that nobody but the writer can set.
_STRUCTURAL = frozenset(
    {ARCHITECTURE, PROVENANCE, "general.alignment", "general.quantization_version"}
)


class GgufTarget:
    """See `Target`."""

    def prepare(
        self, opened: OpenModel, model: Model, options: QuantizeOptions, output: Path
    ) -> Prepared:
        o = options.gguf
        if options.adapter_only:
            assert isinstance(model, AdaptedModel)
            source = adapter_as_gguf(model)
        elif o.mmproj:
            source = projector_as_gguf(model)
        else:
            name = model_name(model.path)
            source = as_gguf(
                opened, model, raw=o.raw, name=name, pre_tokenizer=o.pre_tokenizer, mtp=o.mtp
            )
        imatrix = read_imatrix(o.imatrix) if o.imatrix else None
        keys: dict[str, MetadataValue] = {"general.quantization_version": 2}
        notes, warnings = [*source.notes], [*source.warnings]
        if source.facts is None and options.budget:
            raise UsageError("a raw file takes no budget", hint="choose types with --scheme")
        keep = isinstance(options.scheme, KeepScheme)
        if keep:
            dtype = model_dtype(config_of(model) or {}, opened)
            options = replace(options, scheme=TENSOR_SCHEMES[dtype.lower()])
        if source.facts is None:
            plan = _plain_plan(source, options)
        else:
            plan, file_type, more = _mixed_plan(
                source, source.facts, opened, options, imatrix is not None
            )
            keys["general.file_type"] = file_type
            warnings += more
        if keep:
            plan = _moved_plan(plan, opened, source, dtype, options.exact)
            keys |= _kept_file_type(plan, keys)
        if imatrix:
            imatrix, said, more = _fitting(imatrix, plan, source.model)
            notes += said
            warnings += more
        if imatrix:
            keys |= imatrix.keys()
        overridden, said = _overridden(source.metadata | keys, o.overrides)
        keys |= overridden
        notes += said
        rescaled = noted(model)
        tensors = [t for p in plan for t in _listed(p)]
        check_gguf(tensors)
        counts = plan_shards(tensors, o.shard_size) if o.shard_size is not None else []
        outputs = tuple(shard_path(output, i, len(counts)) for i, _ in enumerate(counts, 1))
        if len(counts) <= 1:
            counts, outputs = [len(tensors)], (output,)
        return Prepared(
            source.model,
            plan,
            outputs,
            partial(_sink, outputs[0], counts, source.metadata | keys, tensors),
            importance=importance_of(imatrix, source.model, model),
            origin=source.origin,
            options=_noted(o),
            provenance=rescaled | ({"imatrix": {"sha256": imatrix.sha256}} if imatrix else {}),
            warnings=warnings,
            notes=notes,
            overhead=partial(
                _overhead,
                source.metadata | keys,
                tensors,
                rescaled,
                lists=2 * bool(options.calibration) + bool(options.repair) + bool(options.finetune),
            ),
        )

    def source_of(self, made: OpenModel, opened: OpenModel, model: Model) -> Model:
        if made.metadata.get(ARCHITECTURE) == RAW or isinstance(opened, AnyGgufModel):
            return model
        if made.metadata.get(KIND) == ADAPTER and isinstance(model, AdaptedModel):
            return adapter_as_gguf(model).model
        if made.metadata.get(KIND) == PROJECTOR_FILE:
            return projector_as_gguf(model).model
        if _is_another(made, opened):
            return model  # under its own names: that no tensor is the same will be said
        # Other kinds of tokenizers have a pre-tokenizer in the file, but none that can be named.
        named = made.metadata.get(TOKENIZER) == "gpt2"
        pre_tokenizer = made.metadata.get(PRE_TOKENIZER) if named else None
        mtp = f"{made.metadata.get(ARCHITECTURE)}.{FURTHER_LAYERS}" in made.metadata
        return as_gguf(
            opened, model, raw=False, name="", pre_tokenizer=pre_tokenizer, compare=False, mtp=mtp
        ).model

    def examined(self, made: OpenModel) -> Sequence[Finding]:
        return ()


def _is_another(made: OpenModel, source: OpenModel) -> bool:
    """Whether a source is of another architecture than the file that is said to be made of it."""
    from qconvert.architectures import architecture_of

    of_source = architecture_of(source)
    return of_source is not None and of_source != made.metadata.get(ARCHITECTURE)


TARGET: Target = GgufTarget()


# --- the plan -------------------------------------------------------------------------------------


def _plain_plan(source: GgufModelSource, options: QuantizeOptions) -> tuple[PlannedTensor, ...]:
    """The plan of a raw file, which nobody is to run.

    Raises:
        UsageError: options or a scheme that need an architecture.
    """
    o = options.gguf
    if replace(o, raw=False, shard_size=None, imatrix=None, overrides=()) != GgufOptions():
        raise UsageError(
            "a raw file has no architecture, to whose tensors the options of mixes apply",
            hint="choose types with --scheme, --tensor-scheme and --keep",
        )
    assert not isinstance(options.scheme, KeepScheme)  # but what it stands for
    if isinstance(options.scheme, MixScheme):
        raise UsageError(
            f"{options.scheme.name} is a mix, which a raw file does not have",
            hint="choose a single type" + (", or leave out --raw" if o.raw else ""),
        )
    asked = PlanOptions(options.keep, options.tensor_schemes, options.min_values)
    return make_plan(source.model.tensors, options.scheme, asked)


def _mixed_plan(
    source: GgufModelSource,
    facts: ModelFacts,
    opened: OpenModel,
    options: QuantizeOptions,
    has_imatrix: bool,
) -> tuple[tuple[PlannedTensor, ...], int, list[str]]:
    """The plan by the rules of a mix, ``general.file_type``, and warnings."""
    o = options.gguf
    mix = parse_mix(options.scheme.name)
    wanted = MixOptions(
        *(mix, o.pure, o.fallback, o.output_type, o.token_embedding_type, o.tensor_types),
        has_imatrix=has_imatrix,
    )
    # What has its type already in a GGUF file stays bit for bit.
    tensors = opened.tensors if isinstance(opened, AnyGgufModel) else source.model.tensors
    sources = {
        t.name: [s.name for s in made_from(source.model, t).sources] for t in source.model.tensors
    }
    asked = PlanOptions(
        options.keep, options.tensor_schemes, assigned=options.assigned, sources=sources
    )
    plan, fell_back = plan_mix(tensors, asked, wanted, facts)
    decoded = {t.name: t for t in source.model.tensors}
    plan = tuple(replace(p, tensor=decoded[p.tensor.name]) if p.scheme else p for p in plan)
    if options.assigned:
        mix = _nearest_mix(plan, mix)
    else:  # of what is assigned, sizes were counted
        plan = tuple(_with_scale(p, source) for p in plan)
    warnings = []
    if options.min_values != MIN_VALUES:
        warnings.append("--min-values has no effect: the mixes choose by name and shape")
    if fell_back:
        warnings.append(
            f"{fell_back} tensors take another type than {mix.name} gives them: their rows do "
            "not divide into its blocks"
        )
    return plan, mix.file_type, warnings


def _overridden(
    metadata: Mapping[str, MetadataValue], overrides: Sequence[tuple[str, MetadataScalar]]
) -> tuple[dict[str, MetadataValue], list[str]]:
    """Keys with the values that somebody asked for, and notes of what they were.

    Raises:
        UsageError: a key that says how the file lies, or one with a value of another kind.
    """
    found: dict[str, MetadataValue] = {}
    notes = []
    for key, value in overrides:
        if key in _STRUCTURAL or key.startswith("split."):
            raise UsageError(
                f"--override-kv cannot change '{key}', which says how the file lies",
                hint="leave it out",
            )
        before = metadata.get(key)
        stated = before.value if isinstance(before, GgufValue) else before
        alike = isinstance(value, str) == isinstance(stated, str)
        alike &= isinstance(value, bool) == isinstance(stated, bool)
        if before is not None and (isinstance(stated, list | tuple) or not alike):
            kind = "an array" if isinstance(stated, list | tuple) else type(stated).__name__
            raise UsageError(
                f"--override-kv of '{key}' is of another type than its value",
                found=f"{type(value).__name__}, where there is {kind}",
            )
        if isinstance(before, GgufValue):
            found[key] = GgufValue(before.type, value)
        elif isinstance(stated, float):
            found[key] = float(value)
        else:
            found[key] = value
        was = "which was not there" if before is None else f"not {stated!r}"
        notes.append(f"'{key}' is {value!r}, {was}, as --override-kv asks")
    return found, notes


def _moved_plan(
    plan: tuple[PlannedTensor, ...],
    opened: OpenModel,
    source: GgufModelSource,
    dtype: str,
    exact: bool,
) -> tuple[PlannedTensor, ...]:
    """A plan of casts with codes in their place that the file takes as they are."""
    if isinstance(opened, AnyGgufModel):
        stored = {t.name: t for t in opened.tensors}
        return tuple(
            PlannedTensor(stored[p.tensor.name], None, f"is {stored[p.tensor.name].dtype} already")
            for p in plan
        )
    moving = Moving(
        *(opened, source.model, CONTAINERS["gguf"], dtype), scaled=partial(_takes_scale, source)
    )
    found = tuple(moving.of(p.tensor, p.scheme) or p for p in plan)
    check_moved(found, opened, exact)
    return found


def _with_scale(p: PlannedTensor, source: GgufModelSource) -> PlannedTensor:
    """A tensor with a scale of its own, where its type gains by one and llama.cpp applies it."""
    if not isinstance(p.scheme, GgmlScheme) or p.scheme.ggml_type != NVFP4:
        return p
    if not _takes_scale(source, p.tensor.name):
        return p
    return replace(p, scheme=replace(p.scheme, scaled=True))


def _takes_scale(source: GgufModelSource, name: str) -> bool:
    """Whether llama.cpp will multiply by a scale beside a tensor."""
    names = {t.name for t in source.model.tensors}
    return source.facts is not None and takes_scale(source.facts.architecture, name, names)


def _kept_file_type(
    plan: tuple[PlannedTensor, ...], keys: Mapping[str, MetadataValue]
) -> dict[str, MetadataValue]:
    """``general.file_type`` of a file whose codes were moved, where it has one."""
    if "general.file_type" not in keys:
        return {}
    base = next(m for m in MIXES.values() if m.file_type == keys["general.file_type"])
    return {"general.file_type": _nearest_mix(plan, base).file_type}


def _nearest_mix(plan: tuple[PlannedTensor, ...], mix: Mix) -> Mix:
    """The mix whose base type most bytes of a file have that keeps to none: readers show it."""
    taken: Counter[str] = Counter()
    for p in plan:
        if p.scheme:
            taken[type_of(p.encoding.name)] += p.encoding.size(p.tensor.shape)
    bases = {m.base: m for m in reversed(MIXES.values())}
    return next((bases[name] for name, _ in taken.most_common() if name in bases), mix)


def _fitting(
    imatrix: Imatrix, plan: tuple[PlannedTensor, ...], model: Model
) -> tuple[Imatrix | None, list[str], list[str]]:
    """An importance matrix that has something to weigh, notes and warnings.

    Raises:
        UnsupportedError: it is of another model.
    """
    weighted = [p.tensor for p in plan if p.scheme and p.scheme.family == "ggml"]
    if not weighted:
        return None, [], ["--imatrix has no effect: no tensor is quantized"]
    fit = imatrix.check(weighted)
    notes = [f"no importance for '{name}': quantized unweighted" for name in fit.missing]
    names = {p.tensor.name for p in plan}
    foreign = [name for name in fit.unused if name not in names]
    if not foreign:
        return imatrix, notes, []
    return (
        imatrix,
        notes,
        [
            f"the importance matrix has {len(foreign)} entries that no tensor has, "
            f"such as '{foreign[0]}': it may be of another model"
        ],
    )


def importance_of(
    imatrix: Imatrix | None, named: Model, model: Model
) -> Callable[[TensorInfo], F32 | None]:
    """Importance of the input channels of a tensor, of rescaled ones divided by the squares of
    their factors.

    Args:
        named: with the names of the file.
        model: with those of the source.
    """
    if imatrix is None:
        return lambda tensor: None
    if not isinstance(model, EqualisedModel):
        return imatrix.find
    known, exponents = imatrix, model.exponents

    def find(tensor: TensorInfo) -> F32 | None:
        found = known.find(tensor)
        if found is None:
            return None
        columns = [
            e.columns if (e := exponents.get(name)) and e.columns is not None else np.zeros((1, 1))
            for name in (source.name for source in made_from(named, tensor).sources)
        ]
        width = tensor.shape[-1]
        halves = np.concatenate([np.broadcast_to(c, (len(c), width)) for c in columns])
        factors = np.ldexp(1.0, -2 * halves.astype(np.int32))
        return (found * (factors if found.ndim > 1 else factors[0])).astype(np.float32)

    return find


def _noted(o: GgufOptions) -> dict[str, Any]:
    """The options that decide about the bytes of a file, where they were given."""
    noted: dict[str, Any] = {
        "raw": o.raw,
        "mmproj": o.mmproj,
        "pure": o.pure,
        "pre_tokenizer": o.pre_tokenizer,
        "no_mtp": not o.mtp,
        "output_tensor_type": o.output_type,
        "token_embedding_type": o.token_embedding_type,
        "tensor_type": [str(rule) for rule in o.tensor_types],
        "shard_size": o.shard_size,
        "override_kv": [[key, value] for key, value in o.overrides],
    }
    return {k: v for k, v in noted.items() if v}


# --- writing --------------------------------------------------------------------------------------


class _GgufSink:
    """In one file or in several.

    Args:
        target: the output, for messages.
        paths: where the files are written, one for each count.
        counts: how many tensors go into each file.
    """

    def __init__(
        self,
        target: Path,
        paths: Sequence[Path],
        counts: Sequence[int],
        keys: Mapping[str, MetadataValue],
        tensors: Sequence[GgufTensor],
    ) -> None:
        self.target = target
        self.paths = paths
        self.index = {t.name: i for i, t in enumerate(tensors)}
        self.sizes = [t.nbytes for t in tensors]
        with machine_errors(target):
            self.writer: GgufWriter | SplitGgufWriter
            if len(paths) == 1:
                self.writer = GgufWriter(paths[0], keys, tensors)
            else:
                self.writer = SplitGgufWriter(paths, keys, tensors, counts)

    def begin(self, tensor: TensorInfo, encoding: Encoding) -> _GgufTensorTarget:
        return _GgufTensorTarget(self, self.index[tensor.name])

    def finish(self) -> int:
        with machine_errors(self.target):
            self.writer.finish()
            return sum(path.stat().st_size for path in self.paths)

    def close(self) -> None:
        with machine_errors(self.target):
            self.writer.close()


class _GgufTensorTarget:
    """Of a tensor, which may be two in the file: what the first has no room for is the second's."""

    def __init__(self, sink: _GgufSink, index: int) -> None:
        self.sink = sink
        self._begin(index)

    def _begin(self, index: int) -> None:
        self.sink.writer.begin(index)
        self.index, self.room = index, self.sink.sizes[index]

    def append(self, segments: Mapping[str, Bytes]) -> None:
        with machine_errors(self.sink.target):
            for data in segments.values():
                left = memoryview(data)
                while len(left) > self.room:
                    self.sink.writer.append(left[: self.room])
                    left = left[self.room :]
                    self._begin(self.index + 1)
                self.sink.writer.append(left)
                self.room -= len(left)

    def finish(self, notes: dict[str, Any]) -> None:
        pass  # GGUF has no place for notes on a tensor; decision and error are in the report


def _sink(
    target: Path,
    counts: Sequence[int],
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[GgufTensor],
    out: Atomic,
    provenance: dict[str, Any],
) -> Sink:
    assert not isinstance(out, AtomicDirectory)
    paths = (out.path,) if isinstance(out, AtomicOutput) else out.paths
    keys = {**metadata, PROVENANCE: _text(provenance)}
    return _GgufSink(target, paths, counts, keys, tensors)


def _text(provenance: dict[str, Any]) -> str:
    """The value of the key."""
    return json.dumps(provenance, sort_keys=True, ensure_ascii=False)


def _overhead(
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[GgufTensor],
    known: dict[str, Any],
    *,
    lists: int,
) -> int:
    """What a file takes at most besides the bytes of its tensors: its header is made to see.

    Args:
        known: members of the provenance that are not in its bound.
        lists: how often provenance may name every tensor.
    """
    names = [t.name for t in tensors]
    provenance = " " * (PROVENANCE_BYTES + lists * len(_text({"": names}))) + _text(known)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "header.gguf"
        with machine_errors(path):
            writer = GgufWriter(path, {**metadata, PROVENANCE: provenance}, tensors)
            writer.close()
    size: int = writer.header_size
    return size + PADDING * len(tensors)


def _listed(p: PlannedTensor) -> list[GgufTensor]:
    """A planned tensor as a GGUF file lists it, with its scale where it has one."""
    kind = p.encoding.name
    found = [GgufTensor(p.tensor.name, p.tensor.shape, type_of(kind))]
    return [*found, GgufTensor(scale_name(p.tensor.name), (1,), "F32")] if kind == SCALED else found
