"""Quantized files as transformers models; needs torch and transformers.

::

    import qconvert.torch

    model = qconvert.torch.load_model("model.qblk", activations="dynamic")
    tokenizer = qconvert.torch.load_tokenizer("model.qblk")

A model loaded this way runs what `formats/schemes/SPEC.md` section 7 says: linear layers keep
their codes packed in memory and multiply in integers; everything else is float32. It is for
inference on the CPU: it has no gradients, and transformers cannot save it.

Quantization-aware training is `prepare`, any loop that trains the model, and `save_quantized` or
`convert`; `quantize` does without training, in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qconvert.errors import UsageError
from qconvert.report import QuantizeReport
from qconvert.running.hugging_face import INSTALL
from qconvert.running.quantized_model import open_quantized, open_tokenizer

try:
    import transformers as _transformers  # noqa: F401

    from qconvert.running.integer_layers import QuantizedEmbedding, QuantizedLinear
    from qconvert.running.low_rank import attach_adapter
    from qconvert.training.preparation import convert_model, freeze_ranges, prepare_model
    from qconvert.training.saving import save_model
except ImportError as e:
    raise ImportError(
        f"qconvert.torch needs torch and transformers; install with: {INSTALL}"
    ) from e

__all__ = [
    "QuantizedEmbedding",
    "QuantizedLinear",
    "convert",
    "freeze",
    "load_model",
    "load_tokenizer",
    "prepare",
    "quantize",
    "save_quantized",
]


def load_model(
    path: Path | str,
    activations: str = "auto",
    *,
    directory: Path | str | None = None,
    adapter: Path | str | None = None,
) -> Any:
    """The transformers model of a .qblk or GGUF file, in eval mode.

    Args:
        path: a .qblk file that was made from a model directory; or a GGUF file, whose weights
            are float32 in memory, which takes ``activations="none"`` and a ``directory``.
        activations: what goes into linear layers: ``static`` bytes with the file's calibration,
            ``dynamic`` ones with a scale for each row (``dynamic_asym``: and a zero point),
            ``auto`` for static where there is a calibration and dynamic elsewhere, or ``none`` for
            floats and dequantized weights.
        directory: where config and tokenizer are, if the file carries none.
        adapter: a low-rank adapter of its linear layers, as peft saves it, which is computed
            beside them in floats: such as `qconvert.tune` trains (``train="adapters"``).

    Raises:
        InputError: the file is damaged, carries no config, or is of another model than that says;
            the adapter is of another model.
        UnsupportedError: a GGUF file of an architecture that we have no names for, or of another
            model than the directory says.
        UsageError: ``static``, and a layer has no calibration.
    """
    place = Path(directory) if directory is not None else None
    model = open_quantized(Path(path), activations, directory=place).checkpoint.model
    if adapter is not None:
        attach_adapter(model, Path(adapter))
    return model


def load_tokenizer(path: Path | str, *, directory: Path | str | None = None) -> Any:
    """The tokenizer that a .qblk file carries.

    Raises:
        InputError: the file is damaged, or carries none.
    """
    return open_tokenizer(Path(path), directory=Path(directory) if directory is not None else None)


def prepare(
    model: Any,
    scheme: str,
    *,
    activations: str | None = None,
    observer: str = "ema",
    keep: Sequence[str] = (),
    tensor_scheme: Mapping[str, str] | None = None,
    learn: bool = False,
) -> Any:
    """Have a model compute with the weights that its quantized file will have, while what is
    trained stays float: quantization-aware training.

    Which tensors take the scheme, and whether symmetric or asymmetric, is decided once, now, as
    `qconvert.quantize` decides it. From then on each forward pass encodes weights that have changed
    and decodes them again, by the arithmetic of the file. Gradients pass straight through the
    rounding, but for weights that are clipped: those get none. (Of tables whose scale is the
    largest magnitude, ``nf4`` and ``fp4``, no weight is clipped.) Parameters keep their names, so
    that checkpoints of the training fit the float model; with ``learn`` and static activations,
    and only then, they have entries more.

    Args:
        model: a torch module, such as a transformers model; changed in place.
        scheme: one grid for each tensor, in a .qblk or GGUF file: ``q4_block64``, ``c2_block16``,
            ``nf4_block64``, ``q4_0`` and their like.
        activations: whether linear layers take their inputs as signed bytes: ``dynamic`` with a
            scale for each row (``dynamic_asym``: and a zero point), ``static`` with one scale and
            zero point for a layer, from what an observer sees in train mode.
        observer: of static ranges: ``ema``, a moving average of each batch's extremes, or
            ``minmax``.
        keep: globs of tensors that stay as they are.
        tensor_scheme: glob -> scheme for the tensors it matches, the first that does.
        learn: whether scales and zero points are parameters too (LSQ), and of static inputs a
            factor of the scale; for schemes ``q...``.

    Returns:
        The model.

    Raises:
        UsageError: no such scheme, one that cannot be trained, or nothing that takes it.
        UnsupportedError: the model has no weights yet (device meta), or a weight that another
            module computes with.
        WeightError: NaN or Inf among the weights.
    """
    prepare_model(
        model,
        scheme,
        activations=activations,
        observer=observer,
        keep=keep,
        tensor_scheme=tensor_scheme,
        learn=learn,
    )
    return model


def freeze(model: Any) -> int:
    """Have the observers of a prepared model's static activations look no more: their ranges stay
    as they are. How many there are.

    Raises:
        UsageError: the model is not prepared.
    """
    return freeze_ranges(model)


def convert(model: Any) -> Any:
    """Exchange the layers of a prepared model, in place, for `QuantizedLinear` and
    `QuantizedEmbedding`, with the codes of its next forward pass: for inference on the CPU.
    Weights of other layers, and of schemes that do not multiply in integers, become the decoded
    ones. The float weights are gone then.

    Returns:
        The model, in eval mode.

    Raises:
        UsageError: the model is not prepared, or a layer with static activations has seen no input.
        WeightError: NaN or Inf among the weights.
    """
    return convert_model(model)


def quantize(
    model: Any,
    scheme: str,
    *,
    activations: str | None = "dynamic",
    keep: Sequence[str] = (),
    tensor_scheme: Mapping[str, str] | None = None,
) -> Any:
    """Quantize a live model in memory, in place, without a file: `prepare`, then `convert`.

    Args and errors as of both; ``activations`` is ``dynamic``, ``dynamic_asym`` or None.
    """
    if activations == "static":
        raise UsageError(
            "static activations need inputs to be seen",
            hint="prepare the model, run some batches in train mode, then convert it",
        )
    prepare(model, scheme, activations=activations, keep=keep, tensor_scheme=tensor_scheme)
    return convert(model)


def save_quantized(
    model: Any, path: Path | str, *, tokenizer: Any = None, force: bool = False
) -> QuantizeReport:
    """Write a prepared model to a .qblk or, where the scheme is one of ggml's, GGUF file, with the
    codes of its next forward pass, bit for bit, and static activations.

    Args:
        path: its name ends in .qblk or .gguf.
        tokenizer: of transformers, which the file then carries; `load_model` needs one.
        force: whether a file of that name may be replaced.

    Returns:
        What `qconvert.quantize` returns; errors are measured against the trained weights.

    Raises:
        UsageError: the model is not prepared, or the container does not take the scheme.
        WeightError: NaN or Inf among the weights.
        MachineError: the file cannot be written.
    """
    return save_model(model, Path(path), tokenizer=tokenizer, force=force)
