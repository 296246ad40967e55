"""A prepared model into a quantized file, with the codes that its forward pass computes with."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qconvert import kernels
from qconvert.codecs.codec import Encoder, Outcome
from qconvert.codecs.rescaled import PROVENANCE_KEY, TRAINED, TUNED, RescaledEncoder
from qconvert.containers import CONTAINERS, Container
from qconvert.errors import UnsupportedError, UsageError
from qconvert.files.equalised import Exponents, noted_exponents
from qconvert.files.shards import COMPANIONS
from qconvert.kernels.records import ErrorSums
from qconvert.mapper import Mapper
from qconvert.model import Companion
from qconvert.progress import Silent
from qconvert.report import QuantizedTensor, QuantizeReport
from qconvert.schemes import CastScheme
from qconvert.stages.conversion import Job
from qconvert.stages.parallel import Workers
from qconvert.stages.plan import PlannedTensor, check_schemes
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.rounding import plan_roundings
from qconvert.stages.target import Prepared, target_of
from qconvert.training.live import LiveModel
from qconvert.training.preparation import Training, live_tensors, training_of


def save_model(
    model: Any,
    output: Path,
    *,
    tokenizer: Any = None,
    companions: tuple[Companion, ...] | None = None,
    force: bool = False,
    strict: bool = False,
    noted: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    exponents: Mapping[str, Exponents] | None = None,
) -> QuantizeReport:
    """Write a prepared model; other args and errors as of `qconvert.torch.save_quantized`.

    Args:
        companions: the files that go with it; None for those of the model's config and tokenizer.
        strict: a warning is a failure, and nothing is written.
        noted: what else the provenance says of the training.
        beside: tensors that the file has and the model does not, such as tables of positions.
        exponents: by which tensors were rescaled before they were trained.
    """
    started = time.perf_counter()
    training = training_of(model)
    tensors = live_tensors(model, training)
    container = container_of(output)
    check_schemes((p.scheme for p in training.plan if p.scheme), container)
    if container.name == "gguf" and (training.inputs or training.learned):
        raise UsageError(
            "a GGUF file has no place for what was learned besides weights",
            found="a model prepared with activations or learn=True",
            wanted="a name that ends in .qblk",
        )
    if companions is None:
        companions = _companions(model, tokenizer)
    live = LiveModel(tensors | dict(beside or {}), companions)
    options = QuantizeOptions(
        training.scheme,
        output,
        keep=training.asked.keep,
        tensor_schemes=training.asked.tensor_schemes,
        force=force,
        strict=strict,
        # A mix would give other types to some tensors.
        gguf=GgufOptions(pure=container.name == "gguf"),
    )
    try:
        prepared = target_of(container).prepare(live, live, options, output)
    except UnsupportedError as e:
        if e.tensor and container.name == "gguf":
            e.hint = "train with a type of shorter blocks, such as q4_0, or save a .qblk file"
        raise
    prepared = _as_trained(prepared, training)
    default = training.scheme.default_range
    report = QuantizeReport(
        kernels=kernels.describe(),
        source=str(live.path),
        output=str(output),
        container=container.name,
        scheme=training.scheme.name,
        range=default.describe() if default else "none",
        dry_run=False,
        tensors=[],
        source_bytes=sum(t.nbytes for t in live.tensors),
        output_bytes=0,
        quantized_bits_per_weight=None,
        model_bits_per_weight=None,
        sqnr_db=None,
        calibration=None,
        companions=prepared.companions,
        files=len(prepared.outputs),
        warnings=[*prepared.warnings],
        notes=[*prepared.notes],
    )
    roundings = plan_roundings(prepared.plan, None, {}, None, True, prepared.model)
    job = _TrainedJob(prepared, live, options, None, roundings, report, Silent())
    job.training, job.tensors, job.noted = training, tensors, noted or {}
    job.rescaled = noted_exponents(exponents or {})
    job.write(output)
    report.seconds = time.perf_counter() - started
    return report


def container_of(output: Path) -> Container:
    """Of the file that a trained model goes into.

    Raises:
        UsageError: the name does not say.
    """
    found = next((c for c in CONTAINERS.values() if c.suffix == output.suffix.lower() != ""), None)
    if found is None or found.name not in ("qblk", "gguf"):
        raise UsageError(
            f"cannot tell the container from the name '{output.name}'",
            wanted="a name that ends in .qblk or .gguf",
        )
    return found


def check_directory_name(output: Path, what: str) -> None:
    """Refuse a name of a file for what becomes a directory.

    Args:
        what: becomes one, in words.

    Raises:
        UsageError: it ends as a file's.
    """
    if output.suffix.lower() in (".qblk", ".gguf"):
        raise UsageError(what, found=f"-o {output}", wanted="a name without .qblk or .gguf")


def _as_trained(prepared: Prepared, training: Training) -> Prepared:
    """The conversion with the schemes of the training.

    Raises:
        UsageError: the container has other schemes for some tensors than were trained.
    """
    trained = {p.tensor.name: p for p in training.plan}
    plan = []
    for p in prepared.plan:
        origin = trained.get(prepared.origin(p.tensor.name) or "")
        scheme = None if origin is None else origin.scheme
        if prepared.outputs[0].suffix.lower() == ".qblk":
            p = replace(p, scheme=scheme, reason=origin.reason if origin else p.reason)
        elif p.scheme != scheme and not (scheme is None and isinstance(p.scheme, CastScheme)):
            raise UsageError(
                "the container has another scheme for a tensor than it was trained with",
                tensor=p.tensor.name,
                found=p.scheme.name if p.scheme else "none",
                wanted=scheme.name if scheme else "none",
                hint="prepare the model with tensor_scheme or keep so that both agree",
            )
        plan.append(p)
    return replace(prepared, plan=tuple(plan))


def _companions(model: Any, tokenizer: Any) -> tuple[Companion, ...]:
    """What a directory of the model would have beside its weights."""
    found = []
    with TemporaryDirectory(prefix="qconvert-") as place:
        config: Any = copy.deepcopy(getattr(model, "config", None))
        if hasattr(config, "save_pretrained"):
            config.architectures = [type(model).__name__]
        generation: Any = getattr(model, "generation_config", None)
        for given in (config, generation, tokenizer):
            if hasattr(given, "save_pretrained"):
                given.save_pretrained(place)
        for path in sorted(Path(place).rglob("*")):
            name = path.relative_to(place).as_posix()
            if name in COMPANIONS:
                data = path.read_bytes()
                found.append(Companion(name, len(data), partial(bytes, data)))
    return tuple(found)


class _TrainedJob(Job):
    """Writes tensors as the forward pass has them.

    Attributes:
        tensors: of the model, by name.
        noted: what else the provenance says of the training.
        rescaled: what it says of equalisation.
    """

    rescaled: Mapping[str, Any]
    training: Training
    tensors: Mapping[str, Any]
    noted: Mapping[str, Any]

    def _encoder(self, p: PlannedTensor, workers: Workers, mapper: Mapper = map) -> Encoder:
        weight = self.training.weights.get(p.tensor.name)
        if weight is None or p.scheme is None:  # kept; or under the names of another container
            return super()._encoder(p, workers, mapper)
        stored = weight.stored(self.tensors[p.tensor.name])
        said = Outcome(ErrorSums(), {"rounding": TUNED})
        return RescaledEncoder(self.model, p.tensor, stored, None, said)

    def _notes(self, row: QuantizedTensor) -> dict[str, Any]:
        notes = super()._notes(row)
        inputs = self.training.inputs.get(row.name)
        if inputs is not None and (note := inputs.note()) is not None:
            notes["activation"] = note
        return notes

    def _provenance(self, sources: list[Path]) -> dict[str, Any]:
        trained = {
            TRAINED: "scales" if self.training.learned else "weights",
            "activations": self.training.activations,
            "tensors": [p.tensor.name for p in self.prepared.plan if p.scheme],
        }
        noted = {k: v for k, v in (trained | dict(self.noted)).items() if v is not None}
        return super()._provenance(sources) | dict(self.rescaled) | {PROVENANCE_KEY: noted}
