"""Checkpoints whose tensors are codes and scales of some quantization, not weights.

This is the one place that knows them all. Those that `qconvert.files.exchange` reads, told by their
`settings_of`, are weights by then and no longer recognised; others are refused by name.

Evidence comes from the tensors and from the small files, and either alone is enough: a single file
has no configuration, and a configuration may be that of weights stored in a way unknown here.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qconvert.errors import UnsupportedError
from qconvert.files.shards import CONFIG
from qconvert.files.strict_json import strict_json
from qconvert.model import Model, TensorInfo

MODELOPT = "hf_quant_config.json"
COMFY_METADATA = "_quantization_metadata"

# One of these is in a small file that states a quantization.
_STATING = (b"quantization", b"compression_config")
# Dtypes that codes are stored in. Those of 8 bits and floating are numbers of their own, too: only
# with scales beside them are they codes.
_CODES = frozenset({"F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "I32", "U32"})
# What a tensor of scales, zero points or other parameters adds to the name of its codes ...
_ADDED = re.compile(
    r"[._:]\w*(scale|absmax|quant_map|quant_state|zero_?point|qzeros|codebook)", re.IGNORECASE
)
# ... and what it is called where it has the last part of the name to itself.
_BESIDE = re.compile(
    r"\w*scales?(_\w+)?|scb|absmax|qzeros|zeros?(_?points?)?|g_idx|codebooks?|q_invperm|su[hv]|sv[hv]",
    re.IGNORECASE,
)
# Last parts of names that codes have. A matrix of integers under another name, such as a mask or a
# table of indices, is what it says, even beside a scale.
_CODE_NAMES = re.compile(r"\w*weight\w*|w_q|_data|trellis|codes|qidxs|indices", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Prequantized:
    """What was recognised.

    Attributes:
        method: for people, such as ``GPTQ``.
        evidence: what it was recognised by.
        tensor: that holds codes; None where the configuration alone says so.
    """

    method: str
    evidence: str
    tensor: str | None = None


def recognised(model: Model) -> Prequantized | None:
    """The quantization that a model was stored with; None where its tensors are weights.

    Raises:
        FormatError: a small file that would tell is no JSON.
    """
    stated = None
    for name, fields in _small_files(model):
        stated = stated or stated_method(fields, name)
    found = _by_tensors(model.tensors)
    if found is None and COMFY_METADATA in model.metadata:
        found = Prequantized("ComfyUI", f"the file's metadata has '{COMFY_METADATA}'")
    if found is None:
        return stated
    if stated is None:
        return found
    return Prequantized(stated.method, f"{found.evidence}; {stated.evidence}", found.tensor)


@dataclass(frozen=True, slots=True)
class Settings:
    """The quantization block of a configuration.

    Attributes:
        method: as it calls itself; ``mlx`` and ``modelopt`` where the block is the sign.
        settings: the block.
    """

    method: str
    settings: Mapping[str, Any]


def settings_of(model: Model) -> Settings | None:
    """What the configuration of a model says of its quantization; None where it says nothing.

    Raises:
        FormatError: a small file that would tell is no JSON.
    """
    for name, fields in _small_files(model):
        if name == MODELOPT:
            inner = fields.get("quantization")
            if isinstance(inner, dict):
                return Settings("modelopt", fields)
            continue
        for _, section in _sections(fields):
            entry = section.get("quantization_config", section.get("compression_config"))
            method = entry.get("quant_method") if isinstance(entry, dict) else None
            if isinstance(entry, dict) and isinstance(method, str):
                return Settings(method, entry)
            mlx = section.get("quantization")
            if isinstance(mlx, dict) and {"bits", "group_size"} & mlx.keys():
                return Settings("mlx", mlx)
    return None


def _small_files(model: Model) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Small files that may state a quantization: their names and fields."""
    for file in model.companions:
        if file.name in (CONFIG, MODELOPT):
            data = file.read()
            if any(word in data for word in _STATING):  # most have none, and need not be parsed
                fields = strict_json(data, model.path / file.name, infinity=True)
                if isinstance(fields, dict):
                    yield file.name, fields


def refuse_prequantized(model: Model) -> None:
    """Refuse a model whose tensors are not weights.

    Raises:
        UnsupportedError: they are codes and scales; method and evidence are named.
        FormatError: a small file that would tell is no JSON.
    """
    found = recognised(model)
    if found is not None:
        raise refusal(found, model.path)


def refusal(found: Prequantized, path: Path) -> UnsupportedError:
    """What to say of a checkpoint that is quantized already."""
    hint = "convert the checkpoint that it was made from"
    if found.tensor is None:
        hint += f"; if its weights are plain, take that entry out of {CONFIG}"
    return UnsupportedError(
        "checkpoint is quantized already, its tensors are not weights",
        path=path,
        tensor=found.tensor,
        found=f"{found.method}: {found.evidence}",
        wanted="plain weights",
        hint=hint,
        code="ARCH-QUANTIZED",
    )


def plain_f8(tensors: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Matrices of 8-bit floating numbers, of a model that is not `recognised`.

    Nothing scales them, so they are taken as the numbers they are: weights that were cast.
    """
    return tuple(t for t in tensors if t.dtype.startswith("F8_") and len(t.shape) > 1)


# --- what the small files say ---


def stated_method(fields: Mapping[str, Any], name: str = CONFIG) -> Prequantized | None:
    """The quantization that config.json, or ModelOpt's own file, states; None where none.

    bitsandbytes is not among them unless codes are there: transformers quantizes with it while it
    loads, so that plain weights have the entry as well.
    """
    if name == MODELOPT:
        inner = fields.get("quantization")
        algorithm = inner.get("quant_algo") if isinstance(inner, dict) else None
        if not isinstance(algorithm, str):
            return None
        return Prequantized("ModelOpt", f"{name} says quant_algo '{algorithm[:40]}'")
    for place, section in _sections(fields):
        entry = section.get("quantization_config", section.get("compression_config"))
        if entry is not None:
            given = entry.get("quant_method") if isinstance(entry, dict) else None
            method = given if isinstance(given, str) else "an unnamed method"
            if method == "bitsandbytes":
                return None
            return Prequantized(method[:40], f"{name} has {place}quantization_config")
        mlx = section.get("quantization")
        if isinstance(mlx, dict) and {"bits", "group_size"} & mlx.keys():
            return Prequantized("MLX", f"{name} has {place}quantization")
    return None


def _sections(fields: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and those of its parts, such as ``text_config``."""
    yield "", fields
    for key, value in fields.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            yield f"{key[:40]}.", value


# --- what the tensors say ---


def _by_tensors(tensors: Sequence[TensorInfo]) -> Prequantized | None:
    marker = next((t for t in tensors if t.name.rpartition(".")[2] == "scaled_fp8"), None)
    if marker is not None:
        return Prequantized("scaled FP8", "a tensor that marks it", marker.name)
    names = sorted(t.name for t in tensors)
    for tensor in tensors:
        if tensor.dtype in _CODES and tensor.shape and tensor.size > 1:
            other = _parameters_of(tensor.name, names)
            if other is not None:
                method = _method(tensor, other, names)
                evidence = f"{tensor.dtype} beside '{_last(other)}'"
                return Prequantized(method, evidence, tensor.name)
    return None


def _parameters_of(codes: str, names: list[str]) -> str | None:
    """The tensor that says how to read ``codes``, among sorted names; None where there is none."""
    for name in _starting(codes, names):
        if _ADDED.match(name, len(codes)):
            return name
    if codes.endswith("_blocks"):  # MXFP4 of gpt-oss
        for name in _starting(codes.removesuffix("_blocks"), names):
            if name == codes.removesuffix("_blocks") + "_scales":
                return name
    place, dot, last = codes.rpartition(".")
    if not _CODE_NAMES.fullmatch(last):
        return None
    for name in _starting(place + dot, names):
        rest = name[len(place + dot) :]
        if name != codes and _BESIDE.fullmatch(rest):
            return name
    return None


def _starting(start: str, names: list[str]) -> Iterator[str]:
    """Names that begin so, but for itself."""
    for i in range(bisect_left(names, start), len(names)):
        if not names[i].startswith(start):
            return
        if names[i] != start:
            yield names[i]


def _method(codes: TensorInfo, other: str, names: list[str]) -> str:
    """Whose way of storing that is, as far as names and dtypes tell."""
    last, beside = _last(codes.name), _last(other)
    there = {n[len(codes.name) - len(last) :] for n in _starting(codes.name[: -len(last)], names)}
    if last == "qweight" and codes.dtype == "I32":
        return "GPTQ" if "g_idx" in there else "AWQ or GPTQ"
    if last == "_data":
        return "quanto"
    if ".weight." in other or "absmax" in other:
        return "bitsandbytes"
    if beside == "SCB":
        return "bitsandbytes (LLM.int8)"
    if last.endswith("_blocks"):
        return "MXFP4"
    if codes.dtype == "U32" and beside in ("scales", "biases"):
        return "MLX"
    if last == "weight_packed":
        return "compressed-tensors"
    if last == "W_q":
        return "HQQ"
    if "qdata" in last:
        return "torchao"
    if beside in ("scale_weight", "scale_input"):
        return "scaled FP8"
    if "weight_scale_2" in there:
        return "NVFP4"
    if codes.dtype.startswith("F8_"):
        return "FP8 with scales"
    return "codes with scales"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


__all__ = [
    "Prequantized",
    "Settings",
    "plain_f8",
    "recognised",
    "refusal",
    "refuse_prequantized",
    "settings_of",
    "stated_method",
]
