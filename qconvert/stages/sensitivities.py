"""What each tensor would lose under each scheme: measured once, and kept in a file for later runs.

A tensor is encoded and decoded as the conversion would. With the Fisher information of a
calibration its errors have a divergence of next tokens in nats, 1/2 Σ D d²; their share of the
weights' energy is measured in any case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qconvert.calibration.file import Calibration
from qconvert.calibration.fisher import Sensitivity, stacked
from qconvert.codecs import codec_of
from qconvert.codecs.codec import Encoder, Encoding, Facts, Stored
from qconvert.codecs.source import rows_of
from qconvert.errors import FormatError, UnsupportedError, WeightError
from qconvert.files.atomic import AtomicOutput
from qconvert.files.qblk_writer import packed
from qconvert.files.strict_json import read_object
from qconvert.geometry import row_length, tiles
from qconvert.kernels.records import Bytes, Encoded
from qconvert.model import Model, TensorInfo
from qconvert.progress import Progress
from qconvert.schemes import TENSOR_SCHEMES
from qconvert.stages.made_from import made_from
from qconvert.stages.parallel import Workers

SCHEMA = "qconvert.sensitivities/1"
MAX_BYTES = 1 << 28
KEPT = "kept"  # in the place of a scheme: the tensor as it is

# What a tensor may take under a budget, container by container, by names of
# `qconvert.schemes.TENSOR_SCHEMES`; those that do not fit its shape are left out.
CANDIDATES: dict[str, tuple[str, ...]] = {
    "qblk": (
        *("c2_block16", "c2_block32", "c2z_block16", "c3_block16", "c3_block32"),
        *("c4_block16", "c4_block32", "c4s_block16"),
        *("c5_block16", "c5_block32", "c6_block16", "c6_block32"),
        *("q2_block16", "q2_block32", "q3_block16", "q3_block32", "q3_block64"),
        *("q4_block16", "q4_block32", "q4_block64", "nf4_block64_dq"),
        *("q5_block32", "q5_block64", "q6_block32", "q6_block64", "q8_block64", "q8_channel", KEPT),
    ),
    "gguf": (
        *("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q4_k"),
        *("q5_0", "q5_1", "q5_k", "q6_k", "q8_0", "f16"),
    ),
}


@dataclass(frozen=True, slots=True)
class Loss:
    """What a tensor loses under a scheme.

    Attributes:
        nbytes: that it takes.
        nmse: squared error by the energy of the weights.
        kl: predicted divergence of next tokens, in nats; None where its sensitivity is not known.
    """

    nbytes: int
    nmse: float
    kl: float | None


@dataclass(slots=True)
class Sensitivities:
    """Losses by tensor and by scheme.

    Attributes:
        bound: to what they are bound: digests of the model and of the calibration, the container,
            and the options that decide how a tensor is encoded.
        losses: tensor -> scheme, or `KEPT` -> loss; a scheme that a tensor cannot take is missing.
        refused: schemes that a tensor's weights do not fit, by tensor.
    """

    bound: dict[str, Any]
    losses: dict[str, dict[str, Loss]] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)

    def parts(self) -> bytes:
        """The file."""
        tensors = {
            name: {
                scheme: {"bytes": loss.nbytes, "kl": loss.kl, "nmse": loss.nmse}
                for scheme, loss in found.items()
            }
            for name, found in self.losses.items()
        }
        fields = {
            "schema": SCHEMA, "bound": self.bound, "tensors": tensors, "refused": self.refused
        }  # fmt: skip
        return json.dumps(fields, sort_keys=True, ensure_ascii=False, indent=1).encode() + b"\n"

    def write(self, path: Path, inputs: Sequence[Path]) -> None:
        """Write the file, in place of one that was read."""
        with AtomicOutput(path, overwrite=True, inputs=inputs) as out:
            out.write_at(0, self.parts())
            out.commit()


def read_sensitivities(path: Path, bound: Mapping[str, Any]) -> Sensitivities:
    """Losses that an earlier run has measured.

    Args:
        bound: what they have to be bound to, see `Sensitivities`.

    Raises:
        FormatError: not such a file, or a damaged one.
        UnsupportedError: they are bound to something else; names it.
    """
    fields = read_object(path, MAX_BYTES)
    if fields.get("schema") != SCHEMA:
        raise FormatError(
            "not a file of sensitivities",
            path=path,
            found=fields.get("schema"),
            wanted=SCHEMA,
            hint="give --sensitivities a new name, and it is written",
        )
    try:
        found = fields["bound"]
        for key, wanted in bound.items():
            if found[key] != wanted:
                raise UnsupportedError(
                    f"the sensitivities are of another {key}",
                    path=path,
                    found=found[key],
                    wanted=wanted,
                    hint="give --sensitivities a new name, and it is written",
                    code="SENSITIVITIES-BOUND",
                )
        losses = {
            name: {scheme: _loss(loss) for scheme, loss in schemes.items()}
            for name, schemes in fields["tensors"].items()
        }
        refused = {str(name): list(map(str, found)) for name, found in fields["refused"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise FormatError("damaged sensitivities", path=path, found=str(e)) from e
    return Sensitivities(dict(bound), losses, refused)


def _loss(fields: Mapping[str, Any]) -> Loss:
    """An entry of the file.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    nbytes, nmse, kl = fields["bytes"], float(fields["nmse"]), fields["kl"]
    kl = None if kl is None else float(kl)
    numbers = (nbytes, nmse, 0.0 if kl is None else kl)
    if type(nbytes) is not int or any(not math.isfinite(n) or n < 0 for n in numbers):
        raise ValueError(f"a loss of {dict(fields)}")
    return Loss(nbytes, nmse, kl)


def options_of(tensor: TensorInfo, container: str) -> list[str]:
    """The candidates that the shape and dtype of a tensor allow."""
    found = []
    for name in CANDIDATES[container]:
        if name == KEPT:
            found.append(KEPT)
            continue
        scheme = TENSOR_SCHEMES[name]
        refused = codec_of(scheme).refuses(scheme, tensor)
        if refused is None and codec_of(scheme).planned(scheme, tensor).size(tensor.shape) < (
            tensor.nbytes if container == "qblk" else math.inf
        ):
            found.append(name)
    if not found or (container == "gguf" and tensor.dtype == "F16"):
        found.append(KEPT)
    return found


@dataclass(frozen=True, slots=True)
class Measuring:
    """How tensors are measured.

    Attributes:
        model: with the names and shapes of the output.
        container: that is written.
        facts: of a tensor, as the conversion has them.
        sensitivity: D of a tensor, where it is known.
    """

    model: Model
    container: str
    facts: Callable[[TensorInfo], Facts]
    sensitivity: Callable[[TensorInfo], Sensitivity | None]

    def missing(
        self, tensors: Iterable[TensorInfo], known: Sensitivities
    ) -> list[tuple[TensorInfo, str]]:
        """What has not been measured yet."""
        return [
            (tensor, name)
            for tensor in tensors
            for name in options_of(tensor, self.container)
            if name not in known.losses.get(tensor.name, {})
            and name not in known.refused.get(tensor.name, [])
        ]

    def measure(
        self,
        missing: list[tuple[TensorInfo, str]],
        known: Sensitivities,
        threads: int,
        progress: Progress,
    ) -> None:
        """Measure what is missing and add it to what is known.

        Raises:
            WeightError: NaN or Inf, or weights that no candidate takes.
        """
        progress.begin("measure schemes", sum(t.nbytes for t, _ in missing), "bytes")
        with Workers(threads) as workers:
            for tensor, name, loss in workers.map(self._measured, missing):
                if isinstance(loss, WeightError):
                    known.refused.setdefault(tensor.name, []).append(name)
                    if len(known.refused[tensor.name]) == len(options_of(tensor, self.container)):
                        raise loss
                else:
                    known.losses.setdefault(tensor.name, {})[name] = loss
                progress.advance(tensor.nbytes, f"{tensor.name} {name}")
        progress.end()

    def _measured(self, work: tuple[TensorInfo, str]) -> tuple[TensorInfo, str, Loss | WeightError]:
        tensor, name = work
        found = self.sensitivity(tensor)
        if name == KEPT:
            return tensor, name, Loss(tensor.nbytes, 0.0, None if found is None else 0.0)
        try:
            stored = self.stored(tensor, name)
        except WeightError as e:
            return tensor, name, e
        return tensor, name, self._loss(tensor, stored, found)

    def stored(self, tensor: TensorInfo, name: str) -> Stored:
        """A tensor as it will be in the file.

        Raises:
            WeightError: NaN or Inf, or weights that the scheme does not take.
        """
        scheme = TENSOR_SCHEMES[name]
        return encoded(codec_of(scheme).encoder(self.model, tensor, scheme, self.facts(tensor)))

    def _loss(self, tensor: TensorInfo, stored: Stored, d: Sensitivity | None) -> Loss:
        """What the decoded tensor has lost."""
        columns = row_length(tensor.shape)
        signal = noise = kl = 0.0
        for tile in tiles(tensor.size // columns, columns):
            weights = rows_of(self.model, tensor, tile).astype(np.float64)
            errors = stored.encoding.coded(stored, tile).values - weights
            squares = errors * errors
            signal += float(np.vdot(weights, weights))
            noise += float(squares.sum())
            if d is not None:
                first, column = divmod(tile.start, columns)
                kl += d.divergence(first, column, squares)
        nbytes = stored.encoding.size(tensor.shape)
        return Loss(nbytes, noise / signal if signal else 0.0, None if d is None else kl)


def encoded(encoder: Encoder) -> Stored:
    """A whole tensor as it will be in a file.

    Raises:
        WeightError: NaN or Inf, or weights that the encoding cannot hold.
    """
    parts, seen = _encoded(encoder)
    settled = encoder.settled(seen)
    if settled.encoding != encoder.encoding:
        parts, _ = _encoded(settled)
    tensor, path = encoder.tensor, encoder.model.path
    return as_stored(tensor, settled.encoding, [*parts, settled.shared()], path)


def _encoded(encoder: Encoder) -> tuple[list[dict[str, Bytes]], Encoded]:
    """The segments of all tiles of a tensor, and what was seen of it."""
    parts = []
    seen = Encoded()
    for tile in encoder.tiles():
        done = encoder.encode(tile)
        parts.append(done.segments)
        seen += done
    return parts, seen


def as_stored(
    tensor: TensorInfo, encoding: Encoding, parts: Iterable[Mapping[str, Bytes]], path: Path
) -> Stored:
    """A tensor as it will be in a file, from the segments of its tiles and those they share."""
    pieces: dict[str, list[Bytes]] = {}
    for segments in parts:
        for kind, data in segments.items():
            pieces.setdefault(kind, []).append(data)
    whole = {kind: b"".join(data) for kind, data in pieces.items()}
    for segment in encoding.segments(tensor.shape):
        if segment.width:
            values = np.frombuffer(whole[segment.kind], np.uint8)
            whole[segment.kind] = packed(values, segment.width)

    def read(kind: str, offset: int, size: int) -> bytes:
        return whole[kind][offset : offset + size]

    return Stored(tensor.name, tensor.shape, encoding, read, path)


def sensitivity_of(
    calibration: Calibration, model: Model, tensor: TensorInfo
) -> Sensitivity | None:
    """D of a tensor under the names of an output, None where the calibration has none.

    A GGUF tensor is made of rows of the checkpoint's: D goes with them.

    Raises:
        UnsupportedError: the calibration has it for another shape.
    """
    made = made_from(model, tensor)
    parts = [calibration.sensitivity(source.name) for source in made.sources]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    found = stacked(known)
    columns = row_length(tensor.shape)
    if made.rows is not None:
        found = found.taken(made.rows)
    if found.shape != (tensor.size // columns, columns):
        raise UnsupportedError(
            "the calibration does not fit the weight",
            path=calibration.path,
            tensor=tensor.name,
            found=f"Fisher information of {found.shape[0]:,} x {found.shape[1]:,} weights",
            wanted=f"{tensor.size // columns:,} x {columns:,}",
            hint="calibrate with this model",
        )
    return found
