"""What every command asks of a model before it takes its tensors for weights."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.files.exchange import QuantizedModel
from qconvert.files.prequantized import Prequantized, plain_f8, recognised, refusal
from qconvert.files.safetensors import SafetensorsModel
from qconvert.model import Model


@dataclass(frozen=True, slots=True)
class Remarks:
    """What is to be said of a source.

    Attributes:
        notes: what was taken and what was left.
        warnings: where something else may have been meant.
    """

    notes: list[str]
    warnings: list[str]


def examined(model: Model) -> Remarks:
    """What is to be said of an opened model whose tensors are weights.

    Raises:
        UnsupportedError: they are codes and scales of a quantization.
        FormatError: a small file that would tell is no JSON.
    """
    found, quantized = described(model)
    if quantized:
        raise refusal(quantized, model.path)
    return found


def described(model: Model) -> tuple[Remarks, Prequantized | None]:
    """The same of a model that may be quantized already, and whether it is."""
    found, quantized = Remarks([], []), recognised(model)
    if isinstance(model, SafetensorsModel | QuantizedModel):
        found.notes.extend(model.notes)
        found.warnings.extend(model.warnings)
    if quantized:
        found.warnings.append(
            f"the checkpoint is quantized already ({quantized.method}: {quantized.evidence}): its "
            "tensors are codes and scales, not weights; convert the checkpoint that it was made "
            "from"
        )
    elif cast := plain_f8(model.tensors):
        found.warnings.append(
            f"{len(cast)} matrices are stored in 8-bit floating numbers without scales, such as "
            f"'{cast[0].name}', and are taken for plain weights; if scales for them lie in another "
            "file, the result is wrong"
        )
    return found, quantized
