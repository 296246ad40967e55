"""Writing qblk, with the companion files of the model."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qconvert.calibration.document import MAX_OBSERVER
from qconvert.codecs.codec import Encoding
from qconvert.codecs.compensation import COMPENSATED
from qconvert.codecs.rescaled import PROVENANCE_KEY, tuned_tensors
from qconvert.containers import CONTAINERS
from qconvert.errors import FormatError, UsageError
from qconvert.files import OpenModel
from qconvert.files.atomic import AtomicOutput
from qconvert.files.equalised import noted
from qconvert.files.qblk_header import ALIGNMENT, PREAMBLE, SLASH, align
from qconvert.files.qblk_writer import (
    QblkWriter,
    TensorWriter,
    check_qblk,
    header_bound,
    required_features,
    tensor_bound,
)
from qconvert.files.shards import MAX_COMPANION_BYTES, MODULES, companion_too_large
from qconvert.model import Companion, Model, TensorInfo
from qconvert.schemes import KeepScheme, MixScheme
from qconvert.stages.moving import Moving, config_of, model_dtype
from qconvert.stages.plan import PlannedTensor, PlanOptions, make_plan
from qconvert.stages.quantize_options import GgufOptions, QuantizeOptions
from qconvert.stages.target import Atomic, Finding, Prepared, Sink, Target

# The longest notes that a tensor can carry, to bound the header; numbers are widened by
# `tensor_bound`.
WIDEST_NOTES: dict[str, Any] = {
    "decision": {
        "rule": "weighted-sample",
        "symmetric": False,
        "range": "percentile " + "9" * 20,
        "cost_db": 0,
        "predicted_db": 0,
        "sample": {
            "symmetric_db": 0,
            "asymmetric_db": 0,
            "weighted_symmetric_db": 0,
            "weighted_asymmetric_db": 0,
        },
        "statistics": {"asymmetry": 0, "skewness": 0, "kurtosis": 0, "outlier_share": 0},
    },
    "error": {"max": 0, "nmse": 0, "sqnr_db": 0, "weighted_sqnr_db": 0, "clipped": 0},
}
PROVENANCE_BYTES = 4096  # of options and notes, for a bound before they are known
WIDEST_ROUNDING = {"rounding": COMPENSATED, "damping": 0}
WIDEST_SWEEP = {"row_damping": 0}
WIDEST_ACTIVATION = {"observer": "x" * MAX_OBSERVER, "samples": 0, "scale": 0, "zero_point": 0}


class QblkTarget:
    """See `Target`."""

    def prepare(
        self, opened: OpenModel, model: Model, options: QuantizeOptions, output: Path
    ) -> Prepared:
        if options.gguf != GgufOptions():
            raise UsageError(
                "options of GGUF files have no place in a .qblk file", hint="write a .gguf file"
            )
        assert not isinstance(options.scheme, MixScheme)  # which qblk does not take
        if isinstance(options.scheme, KeepScheme):
            dtype = model_dtype(config_of(model) or {}, opened)
            plan = Moving(opened, model, CONTAINERS["qblk"], dtype).plan(options.exact)
        else:
            asked = PlanOptions(
                options.keep, options.tensor_schemes, options.min_values, options.assigned
            )
            plan = make_plan(model.tensors, options.scheme, asked)
        check_qblk(model.tensors, model.path)
        for companion in model.companions:
            if companion.size > MAX_COMPANION_BYTES:
                raise companion_too_large(model.path, companion.name, companion.size)
        return Prepared(
            model,
            plan,
            (output,),
            partial(_sink, model, plan),
            provenance=noted(model),
            companions=len(model.companions),
            companion_bytes=sum(c.size for c in model.companions),
            warnings=_module_warnings(opened),
            overhead=partial(
                _overhead,
                model,
                plan,
                calibrated=options.calibration is not None,
                repaired=options.repair is not None,
                tuned=options.finetune is not None,
            ),
        )

    def source_of(self, made: OpenModel, opened: OpenModel, model: Model) -> Model:
        return model

    def examined(self, made: OpenModel) -> Sequence[Finding]:
        return ()


TARGET: Target = QblkTarget()


class _QblkSink:
    def __init__(
        self,
        out: AtomicOutput,
        model: Model,
        plan: tuple[PlannedTensor, ...],
        provenance: dict[str, Any],
    ) -> None:
        self.model = model
        self.provenance = provenance
        trained = provenance.get(PROVENANCE_KEY, {})
        calibrated = "calibration" in provenance or trained.get("activations") == "static"
        rounding = provenance.get("rounding", {})
        compensated = set(rounding.get("compensated", ()))
        swept = compensated - set(rounding["by_row"]) if "by_row" in rounding else set()
        rounded = compensated | tuned_tensors(provenance)
        bound = _header_bound(model, plan, provenance, calibrated, rounded, swept)
        self.writer = QblkWriter(out, bound)

    def begin(self, tensor: TensorInfo, encoding: Encoding) -> TensorWriter:
        return self.writer.begin(tensor.name, tensor.shape, tensor.dtype, encoding)

    def finish(self) -> int:
        for companion in self.model.companions:
            self.writer.add_file(_flat(companion), companion.read())
        return self.writer.finish(self.model.metadata, self.provenance)

    def close(self) -> None:
        pass


def _sink(
    model: Model,
    plan: tuple[PlannedTensor, ...],
    out: Atomic,
    provenance: dict[str, Any],
) -> Sink:
    assert isinstance(out, AtomicOutput)
    return _QblkSink(out, model, plan, provenance)


def _header_bound(
    model: Model,
    plan: tuple[PlannedTensor, ...],
    provenance: dict[str, Any],
    calibrated: bool,
    compensated: Container[str],
    swept: Container[str],
) -> int:
    """Upper bound of the header's bytes; ``compensated`` and ``swept`` are names of tensors."""
    files = [(_flat(c), c.size) for c in model.companions]
    bounds = (
        _bound(p, calibrated, p.tensor.name in compensated, p.tensor.name in swept) for p in plan
    )
    features = required_features((p.tensor.dtype, str(p.encoding.to_json()["kind"])) for p in plan)
    return header_bound(bounds, files, model.metadata, provenance, features)


def _overhead(
    model: Model,
    plan: tuple[PlannedTensor, ...],
    *,
    calibrated: bool,
    repaired: bool,
    tuned: bool,
) -> int:
    """What the file takes at most besides the bytes of its tensors."""
    names = [p.tensor.name for p in plan if calibrated]  # that may be rounded so
    wide: dict[str, Any] = {
        "": "x" * PROVENANCE_BYTES,
        "sources": [s.name for s in model.sources],
        "rounding": {**WIDEST_ROUNDING, **WIDEST_SWEEP, "compensated": names, "by_row": names},
        **noted(model),
    }
    if repaired:
        wide["repair"] = names
    rounded = names
    if tuned:
        rounded = [p.tensor.name for p in plan]
        wide[PROVENANCE_KEY] = {"tensors": rounded}
    header = PREAMBLE.size + _header_bound(model, plan, wide, calibrated, rounded, names)
    segments = sum(len(p.encoding.segments(p.tensor.shape)) for p in plan)
    segments += len(model.companions)
    return align(header) + ALIGNMENT * segments + sum(c.size for c in model.companions)


def _flat(companion: Companion) -> str:
    return companion.name.replace("/", SLASH)


def _bound(p: PlannedTensor, calibrated: bool, compensated: bool, swept: bool) -> int:
    """Upper bound in bytes of a tensor's entry in the header."""
    tensor = p.tensor
    notes: dict[str, Any] = {"decision": {"rule": "kept", "reason": p.reason}}
    if p.scheme is None and compensated:  # gains that were tuned
        notes["decision"] |= WIDEST_ROUNDING
    if p.scheme is not None:
        notes = dict(WIDEST_NOTES)
        if compensated:
            more = WIDEST_SWEEP if swept else {}
            notes["decision"] = {**WIDEST_NOTES["decision"], **WIDEST_ROUNDING, **more}
        if calibrated:
            notes["activation"] = WIDEST_ACTIVATION
    return tensor_bound(tensor.name, tensor.shape, tensor.dtype, p.encoding, notes)


def _module_warnings(model: Model) -> list[str]:
    """Modules of sentence-transformers that follow the transformer and are files of their own."""
    if all(c.name != MODULES for c in model.companions):
        return []
    from qconvert.architectures import SmallFiles, modules_beyond  # 0.1 s to load

    try:
        modules = modules_beyond(SmallFiles(model))
    except FormatError as error:  # which is carried along as it is
        return [f"{MODULES} does not say what follows the transformer: {error.message}"]
    return [
        f"the file holds the transformer, not the module '{name}' of sentence-transformers that "
        "follows it: embeddings from the file alone are other ones"
        for name in modules
    ]
