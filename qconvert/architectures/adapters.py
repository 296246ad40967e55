"""An adapter by itself under GGUF's names, as llama.cpp loads it beside any file of its model.

llama.cpp adds ``scale * B (A x)`` to the product of each corrected tensor and takes a row of A for
a token's correction, so that A lies transposed for embeddings. Its scale is ``alpha / r`` for one
alpha in the file, or 1 where alpha is 0.
"""

from __future__ import annotations

from qconvert.architectures.families import hyper_parameters
from qconvert.architectures.mapped import (
    Change,
    MappedModel,
    MappedTensor,
    described,
    strided,
)
from qconvert.architectures.mapping import map_tensors
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.source import CONFIG, GgufSource, read_config
from qconvert.architectures.tying import output_head
from qconvert.errors import InputError, UnsupportedError
from qconvert.files.adapters import Adapter, Correction
from qconvert.files.gguf import ADAPTER, ARCHITECTURE, KIND
from qconvert.files.gguf_writer import GgufTensor, GgufValue, MetadataValue, check_gguf
from qconvert.model import Model


def open_adapter_source(model: Model, adapter: Adapter) -> GgufSource:
    """Map an adapter to GGUF.

    Args:
        model: that it is of, with a configuration; no value is read but to see whether embeddings
            and head are the same.

    Raises:
        InputError: the model has no configuration, or is of other tensors than that says.
        UnsupportedError: an architecture that we do not know; a correction of a tensor that
            llama.cpp has in another form.
    """
    fields = SmallFiles(model).json(CONFIG)
    if fields is None:
        raise InputError(
            "an adapter for llama.cpp needs the configuration of its model",
            path=model.path,
            found=f"no {CONFIG}",
            wanted="the model's directory",
            code="ARCH-NO-CONFIG",
        )
    family, config = read_config(fields, model.path / CONFIG)
    sizes = family.sizes(config)
    _, rope = hyper_parameters(family, config, sizes)
    head = output_head(model, family, config)
    mapped, _ = map_tensors(model, family, config, sizes, rope.tensors, head)
    tensors = []
    left = dict(adapter.corrections)
    for tensor in mapped:
        of_it = [adapter.corrections.get(s.name) for s in tensor.sources]
        correction = next((c for c in of_it if c), None)
        if correction is None:
            continue
        left.pop(correction.name, None)
        if (why := _unlike(tensor, correction, head.tied)) is not None:
            raise UnsupportedError(
                f"llama.cpp has no form for the adapter's correction: {why}",
                path=adapter.path,
                tensor=correction.name,
                hint="merge the adapter into the model: leave --adapter-only out",
                code="ADAPTER-FORM",
            )
        tensors += _parts(tensor, correction, adapter.alpha is None)
    if left:
        raise UnsupportedError(
            "no tensor of llama.cpp's is made of one that the adapter corrects",
            path=adapter.path,
            tensor=next(iter(left)),
            hint="merge the adapter into the model: leave --adapter-only out",
            code="ADAPTER-FORM",
        )
    made = MappedModel(adapter.weights, tensors)
    # What it is made for is the source that is recorded; the adapter has a digest of its own.
    made.path, made.sources = model.path, model.sources
    check_gguf([GgufTensor(t.name, t.shape, "F32") for t in made.tensors])
    metadata: dict[str, MetadataValue] = {
        ARCHITECTURE: family.arch,
        KIND: ADAPTER,
        "general.name": adapter.path.resolve().name,
        "adapter.type": "lora",
        "adapter.lora.alpha": GgufValue("FLOAT32", adapter.alpha or 0.0),
    }
    notes: tuple[str, ...] = ()
    if adapter.alpha is None:
        notes = ("its scales are multiplied into lora_b: llama.cpp has one alpha for all tensors",)
    return GgufSource(made, metadata, family.name, (), (), notes)


def _unlike(tensor: MappedTensor, correction: Correction, tied: bool) -> str | None:
    """Why a correction of a source is none of the tensor that llama.cpp makes of it."""
    if len(tensor.sources) > 1:
        return f"'{tensor.info.name}' is stacked from {len(tensor.sources)} tensors"
    if tensor.order or tensor.change or tensor.factors:
        return f"'{tensor.info.name}' has its values in another order"
    if correction.embedding and tied:
        return "the embeddings are the output matrix as well"
    return None


def _parts(tensor: MappedTensor, correction: Correction, scaled: bool) -> list[MappedTensor]:
    """Both parts under the tensor's name: A has its columns, B its rows in their order."""
    name, rank = tensor.info.name, correction.rank
    a, b = correction.a, correction.b
    if correction.embedding:
        rows = a.shape[1]
        order = strided((rows, rank), (1, rows))
        first = MappedTensor(described(f"{name}.lora_a", (rows, rank), a.dtype), (a,), order=order)
    else:
        first = MappedTensor(described(f"{name}.lora_a", a.shape, a.dtype), (a,))
    rows = b.shape[0] if correction.embedding else tensor.info.shape[0]
    factor = correction.scale
    second = MappedTensor(
        described(f"{name}.lora_b", (rows, rank), "F32" if scaled else b.dtype),
        (b,),
        locate=None if correction.embedding else tensor.locate,
        change=Change(lambda x: x * factor, lambda x: x / factor) if scaled else None,
    )
    return [first, second]
