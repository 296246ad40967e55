"""A recorded recipe as the arguments of `qconvert.quantize`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qconvert.commands.quantize import quantize
from qconvert.containers import CONTAINERS
from qconvert.errors import FormatError, UsageError
from qconvert.report import QuantizeReport
from qconvert.stages.quantize_options import PRESETS
from qconvert.stages.rebuild import Recipe

_KINDS = {bool: "bool", int: "int", float: "float", str: "str"}  # of --override-kv
_BUDGETS = (("bpw", "target_bpw", float), ("bytes", "target_size", int), ("nats", "max_kl", float))


def _text(value: object) -> bool:
    return isinstance(value, str)


def _true(value: object) -> bool:
    return value is True


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _pairs(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, list) and len(v) == 2 and _text(v[0]) and type(v[1]) in _KINDS for v in value
    )


_Check = tuple[Callable[[object], bool], str]
_TEXT: _Check = _text, "a text"
_TRUE: _Check = _true, "true"
_COUNT: _Check = _count, "a whole number of at least 0"
_TEXTS: _Check = _texts, "a list of texts"
# Options that a recipe has under the names and with the values of the arguments: what each must be.
_SAME: Mapping[str, _Check] = {
    **dict.fromkeys(("scheme", "rounding", "equalise", "pre_tokenizer", "format"), _TEXT),
    **dict.fromkeys(("output_tensor_type", "token_embedding_type"), _TEXT),
    **dict.fromkeys(
        ("no_weighting", "allow_requantize", "exact", "raw", "mmproj", "pure", "adapter_only"),
        _TRUE,
    ),
    **dict.fromkeys(("keep", "tensor_scheme"), _TEXTS),
    **dict.fromkeys(("min_values", "shard_size"), _COUNT),
}
_OPTIONS: Mapping[str, _Check] = {
    **_SAME,
    **dict.fromkeys(("range", "budget"), _TEXT),
    "tensor_type": _TEXTS,
    "override_kv": (_pairs, "a list of pairs of a key and its value"),
}


def run_recipe(
    recipe: Recipe,
    output: Path,
    *,
    source: Path,
    calibration: Path | None,
    imatrix: Path | None,
    adapter: Path | None,
    threads: int | None,
) -> QuantizeReport:
    """Quantize as a provenance says.

    Raises:
        FormatError: it says what no option is; it comes from a file.
    """
    arguments = arguments_of(recipe)
    try:
        return quantize(
            source,
            output=output,
            calibration=calibration,
            imatrix=imatrix,
            adapter=adapter,
            hash_source=any("sha256" in s for s in recipe.noted["sources"]),
            threads=threads,
            **arguments,
        )
    except UsageError as e:  # nobody has typed these options
        raise FormatError(
            f"the recorded recipe cannot be run: {e.message}",
            path=recipe.path,
            tensor=e.tensor,
            found=e.found,
            wanted=e.wanted,
            hint="the recipe was changed, or is one of another version",
        ) from e


def arguments_of(recipe: Recipe) -> dict[str, Any]:
    """Recorded options as arguments.

    Raises:
        FormatError: an option that is not known, or of a value that it cannot have.
    """
    found: dict[str, Any] = {}
    container = CONTAINERS[recipe.container]
    if container.suffix in (".qblk", ".gguf"):
        found["format"] = container.name
    for key, value in recipe.noted["options"].items():
        if key not in _OPTIONS:
            raise FormatError(
                "--rebuild does not know an option of the recipe", path=recipe.path, found=key
            )
        fits, wanted = _OPTIONS[key]
        if not fits(value):
            raise _refused(recipe, key, value, wanted)
        if key == "format" and found.get(key, value) != value:
            raise _refused(recipe, key, value, container.name)
        try:
            found |= _argument(key, value)
        except ValueError:
            raise _refused(recipe, key, value, "what quantize records") from None
    return found


def _refused(recipe: Recipe, key: str, value: object, wanted: str) -> FormatError:
    return FormatError(
        f"impossible option '{key}' of the recorded recipe",
        path=recipe.path,
        found=json.dumps(value),
        wanted=wanted,
    )


def _argument(key: str, value: Any) -> dict[str, Any]:
    """An option, whose value is of its type, as arguments.

    Raises:
        ValueError: the value says nothing.
    """
    if key == "range":
        name, _, percentile = value.partition(" ")
        return {"range": name} | ({"percentile": float(percentile)} if percentile else {})
    if key == "budget":
        return _budget(value)
    if key == "override_kv":
        return {key: [_override(name, stated) for name, stated in value]}
    if key == "tensor_type":
        return {key: [rule.removeprefix("--tensor-type '").removesuffix("'") for rule in value]}
    return {key: value}


def _override(key: str, value: bool | int | float | str) -> str:
    stated = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={_KINDS[type(value)]}:{stated}"


def _budget(name: str) -> dict[str, Any]:
    if name in PRESETS:
        return {"preset": name}
    for unit, argument, number in _BUDGETS:
        if name.endswith(unit):
            return {argument: number(name.removesuffix(unit))}
    raise ValueError(name)
