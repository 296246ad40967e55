"""Where encoded tensors go: one small adapter a container, so that quantize knows neither."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from qconvert.encoding import Encoding, RawEncoding
from qconvert.files.atomic import AtomicOutput, machine_errors
from qconvert.files.calibration import MAX_OBSERVER
from qconvert.files.gguf_split import PROVENANCE, SplitGgufWriter
from qconvert.files.gguf_writer import GgufTensor, GgufWriter, MetadataValue
from qconvert.files.qblk_header import SLASH
from qconvert.files.qblk_writer import (
    QblkWriter,
    TensorWriter,
    header_bound,
    required_features,
    tensor_bound,
)
from qconvert.kernels.records import Bytes
from qconvert.model import Companion, Model, TensorInfo
from qconvert.schemes import AffineScheme, CastScheme, GgmlScheme
from qconvert.stages.plan import PlannedTensor, encoding_of

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
WIDEST_ACTIVATION = {"observer": "x" * MAX_OBSERVER, "samples": 0, "scale": 0, "zero_point": 0}


class TensorTarget(Protocol):
    """One tensor being written; pieces arrive in order."""

    def append(self, segments: Mapping[str, Bytes]) -> None:
        """Bytes that come next in each of some segments."""
        ...

    def abandon(self) -> None:
        """Forget what was written of the tensor, which will begin again."""
        ...

    def finish(self, notes: dict[str, Any]) -> None: ...


class Sink(Protocol):
    """A file being written; tensors arrive in the order of the plan."""

    def begin(self, tensor: TensorInfo, encoding: Encoding | None) -> TensorTarget: ...

    def finish(self) -> int:
        """Complete the file; its length in bytes."""
        ...

    def close(self) -> None:
        """Let go of everything, finished or not."""
        ...


class QblkSink:
    """Writes qblk, with the companion files of the model."""

    def __init__(
        self,
        out: AtomicOutput,
        model: Model,
        plan: tuple[PlannedTensor, ...],
        provenance: dict[str, Any],
    ) -> None:
        self.out = out
        self.model = model
        self.provenance = provenance
        files = [(_flat(c), c.size) for c in model.companions]
        calibrated = "calibration" in provenance
        bounds = (_bound(p, calibrated) for p in plan)
        features = required_features(p.tensor.dtype for p in plan)
        bound = header_bound(bounds, files, model.metadata, provenance, features)
        self.writer = QblkWriter(out, bound)

    def begin(self, tensor: TensorInfo, encoding: Encoding | None) -> TensorTarget:
        encoding = encoding or RawEncoding(tensor.dtype)
        return _QblkTarget(self.writer.begin(tensor.name, tensor.shape, tensor.dtype, encoding))

    def finish(self) -> int:
        for companion in self.model.companions:
            self.writer.add_file(_flat(companion), companion.read())
        return self.writer.finish(self.model.metadata, self.provenance)

    def close(self) -> None:
        pass  # the output file belongs to the caller


def _flat(companion: Companion) -> str:
    return companion.name.replace("/", SLASH)


def _bound(p: PlannedTensor, calibrated: bool) -> int:
    tensor = p.tensor
    notes: dict[str, Any] = {"decision": {"rule": "kept", "reason": p.reason}}
    encoding: Encoding = RawEncoding(tensor.dtype)
    if p.scheme is not None:
        notes = dict(WIDEST_NOTES)
        if calibrated:
            notes["activation"] = WIDEST_ACTIVATION
    if isinstance(p.scheme, AffineScheme):
        encoding = encoding_of(p.scheme, tensor, "BF16" if p.scheme.block else "F32")
    elif isinstance(p.scheme, CastScheme):
        encoding = RawEncoding(p.scheme.dtype)
    return tensor_bound(tensor.name, tensor.shape, tensor.dtype, encoding, notes)


class _QblkTarget:
    def __init__(self, tensor: TensorWriter) -> None:
        self.tensor = tensor

    def append(self, segments: Mapping[str, Bytes]) -> None:
        for kind, data in segments.items():
            self.tensor.append(kind, data)

    def abandon(self) -> None:
        self.tensor.abandon()

    def finish(self, notes: dict[str, Any]) -> None:
        self.tensor.finish(notes)


class GgufSink:
    """Writes GGUF, in one file or in several.

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
        metadata: Mapping[str, MetadataValue],
        plan: tuple[PlannedTensor, ...],
        provenance: dict[str, Any],
    ) -> None:
        self.target = target
        self.paths = paths
        tensors = gguf_tensors(plan)
        self.index = {t.name: i for i, t in enumerate(tensors)}
        noted = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
        keys = {**metadata, PROVENANCE: noted}
        with machine_errors(target):
            self.writer: GgufWriter | SplitGgufWriter
            if len(paths) == 1:
                self.writer = GgufWriter(paths[0], keys, tensors)
            else:
                self.writer = SplitGgufWriter(paths, keys, tensors, counts)

    def begin(self, tensor: TensorInfo, encoding: Encoding | None) -> TensorTarget:
        self.writer.begin(self.index[tensor.name])
        return _GgufTarget(self)

    def finish(self) -> int:
        with machine_errors(self.target):
            self.writer.finish()
            return sum(path.stat().st_size for path in self.paths)

    def close(self) -> None:
        with machine_errors(self.target):
            self.writer.close()


def gguf_tensors(plan: tuple[PlannedTensor, ...]) -> list[GgufTensor]:
    """The tensors of a plan as a GGUF file lists them."""
    return [GgufTensor(p.tensor.name, p.tensor.shape, _ggml_type(p)) for p in plan]


def model_name(path: Path) -> str:
    """A model by the name of its directory, or of its file without suffix."""
    resolved = path.resolve()
    return resolved.name if resolved.is_dir() else resolved.stem


def _ggml_type(p: PlannedTensor) -> str:
    if isinstance(p.scheme, GgmlScheme):
        return p.scheme.ggml_type
    return p.scheme.dtype if isinstance(p.scheme, CastScheme) else p.tensor.dtype


class _GgufTarget:
    def __init__(self, sink: GgufSink) -> None:
        self.sink = sink

    def append(self, segments: Mapping[str, Bytes]) -> None:
        with machine_errors(self.sink.target):
            self.sink.writer.append(segments["data"])

    def abandon(self) -> None:
        raise AssertionError("GGUF has no encoding to be guessed")

    def finish(self, notes: dict[str, Any]) -> None:
        pass  # GGUF has no place for notes on a tensor; decision and error are in the report
