"""What every command asks of a model before it takes its tensors for weights."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.errors import UnsupportedError
from qconvert.files.exchange import QuantizedModel
from qconvert.files.prequantized import Prequantized, plain_f8, recognised, refusal
from qconvert.files.safetensors import SafetensorsModel
from qconvert.model import WEIGHT, Model


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
    _refuse_scaled_blocks(model)
    return found


def _refuse_scaled_blocks(model: Model) -> None:
    """Refuse NVFP4 of GGUF with a tensor ``.scale`` beside it, which llama.cpp multiplies products
    by: without it, values are wrong.

    Raises:
        UnsupportedError: there is such a tensor.
    """
    names = {t.name for t in model.tensors}
    scaled = [
        t.name
        for t in model.tensors
        if t.dtype == "NVFP4" and t.name.removesuffix(WEIGHT) + ".scale" in names
    ]
    if scaled:
        raise UnsupportedError(
            f"{len(scaled)} NVFP4 tensors have a scale of their own, which is not read",
            path=model.path,
            tensor=scaled[0],
            found=scaled[0].removesuffix(WEIGHT) + ".scale",
            wanted="scales of blocks alone",
            hint="convert the checkpoint that it was made from",
            code="GGUF-SCALED",
        )


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
