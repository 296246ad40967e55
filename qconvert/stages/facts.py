"""What a file says of itself: model, tokenizer, types, and the recipe it was made by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qconvert.errors import InputError
from qconvert.files import OpenModel
from qconvert.files.provenance import provenance_of
from qconvert.files.shards import MAX_COMPANION_BYTES
from qconvert.files.strict_json import strict_json
from qconvert.mixes import MIXES
from qconvert.report import TypeTally
from qconvert.stages.quantize_options import PRESETS

FILE_TYPES = {mix.file_type: name for name, mix in reversed(MIXES.items())}
TEMPLATE = "tokenizer.chat_template"


def facts_of(model: OpenModel) -> dict[str, str]:
    """By what each is called; only what the file says."""
    found = dict(_of_gguf(model.metadata) if model.kind == "gguf" else _of_companions(model))
    return found | dict(_recipe(model))


def tally(model: OpenModel) -> dict[str, TypeTally]:
    """Tensors and bytes of each type, the most bytes first."""
    found: dict[str, TypeTally] = {}
    for t in model.tensors:
        counted = found.setdefault(t.dtype, TypeTally(0, 0))
        counted.tensors += 1
        counted.nbytes += t.nbytes
    return dict(sorted(found.items(), key=lambda item: (-item[1].nbytes, item[0])))


def _of_gguf(keys: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    architecture = keys.get("general.architecture")
    named = {
        "architecture": architecture,
        "name": keys.get("general.name"),
        "context": _tokens(keys.get(f"{architecture}.context_length")),
    }
    yield from ((label, text) for label, text in named.items() if text)
    if kind := keys.get("tokenizer.ggml.model"):
        pre = keys.get("tokenizer.ggml.pre")
        size = _tokens(keys.get("tokenizer.ggml.tokens", "").strip("[]").removesuffix(" values"))
        told = f"{kind} ({pre})" if pre else kind
        yield "tokenizer", f"{told}, {size}" if size else told
        yield "chat template", "yes" if TEMPLATE in keys else "no"
    if file_type := keys.get("general.file_type"):
        short = file_type.isdecimal() and len(file_type) < DIGITS
        name = FILE_TYPES.get(int(file_type)) if short else None
        yield "file type", f"{name} ({file_type})" if name else file_type


def config_of(model: OpenModel) -> dict[str, Any]:
    """The configuration beside or in the file; empty where there is none that can be read."""
    return _json(model, "config.json")


def _of_companions(model: OpenModel) -> Iterator[tuple[str, str]]:
    """From the configuration and the tokenizer's, where they lie beside or in the file."""
    config, words = config_of(model), _json(model, "tokenizer_config.json")
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        yield "architecture", str(architectures[0])
    if kind := config.get("model_type"):
        yield "model type", str(kind)
    if isinstance(length := config.get("max_position_embeddings"), int):
        yield "context", f"{length:,} tokens"
    if words:
        kind, size = words.get("tokenizer_class"), config.get("vocab_size")
        told = [str(kind)] if kind else []
        told += [f"{size:,} tokens"] if isinstance(size, int) else []
        yield "tokenizer", ", ".join(told) or "yes"
        files = {c.name for c in model.companions}
        template = "chat_template" in words or "chat_template.jinja" in files
        yield "chat template", "yes" if template else "no"
    quantized = config.get("quantization_config") or config.get("quantization")
    if isinstance(quantized, dict):
        method = quantized.get("quant_method") or quantized.get("mode") or "yes"
        yield "quantized", str(method)


DIGITS = 20  # of a number that means anything; longer ones are shown as they are


def _tokens(number: str | None) -> str | None:
    short = number and number.isdecimal() and len(number) < DIGITS
    return f"{int(number):,} tokens" if number and short else number


def _json(model: OpenModel, name: str) -> dict[str, Any]:
    """A companion that is a JSON object, an empty one where it is not: nothing depends on it."""
    companion = next((c for c in model.companions if c.name == name), None)
    if companion is None or companion.size > MAX_COMPANION_BYTES:
        return {}
    try:
        found = strict_json(companion.read(), model.path, infinity=True)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(model: OpenModel) -> Iterator[tuple[str, str]]:
    noted = provenance_of(model)
    tool, options = noted.get("tool"), noted.get("options")
    if isinstance(tool, str):
        names = [s.get("name") for s in _objects(noted.get("sources"))]
        told = ", ".join(n for n in names if isinstance(n, str))
        yield "made by", f"{tool} from {told}" if told else tool
    if isinstance(options, dict) and options:
        yield "recipe", " ".join(_words(options))
    calibration = noted.get("calibration")
    if isinstance(calibration, dict):
        digest = str(calibration.get("sha256", ""))[:12]
        yield "calibration", f"observer {calibration.get('observer')}, SHA-256 {digest}..."
    imatrix = noted.get("imatrix")
    if isinstance(imatrix, dict):
        yield "imatrix", f"SHA-256 {str(imatrix.get('sha256', ''))[:12]}..."
    rounding = noted.get("rounding")
    if isinstance(rounding, dict) and isinstance(rounding.get("compensated"), list):
        yield "rounding", f"compensated in {len(rounding['compensated']):,} tensors"


def _objects(found: object) -> list[dict[str, Any]]:
    return [o for o in found if isinstance(o, dict)] if isinstance(found, list) else []


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Recorded options as words of a command line."""
    scheme_first = sorted(options.items(), key=lambda o: o[0] not in ("scheme", "budget"))
    for key, value in scheme_first:
        option = f"--{key.replace('_', '-')}"
        if key == "budget":  # recorded in one field, whichever of its options it was
            option = "--preset" if value in PRESETS else "budget"
        for one in value if isinstance(value, list) else [value]:
            yield option if one is True else f"{option} {one}"
