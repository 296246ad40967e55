"""A recorded recipe as the arguments of `qconvert.quantize`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.commands.quantize import quantize
from qconvert.containers import CONTAINERS
from qconvert.errors import FormatError
from qconvert.report import QuantizeReport
from qconvert.stages.quantize_options import PRESETS

# Options that a recipe has under the names and with the values of the arguments.
_SAME = (
    *("scheme", "rounding", "equalise", "no_weighting", "keep", "tensor_scheme", "min_values"),
    *("allow_requantize", "exact", "raw", "pure", "pre_tokenizer", "output_tensor_type"),
    *("token_embedding_type", "shard_size", "format"),
)
_KINDS = {bool: "bool", int: "int", float: "float", str: "str"}  # of --override-kv
_BUDGETS = (("bpw", "target_bpw", float), ("bytes", "target_size", int), ("nats", "max_kl", float))


def run_recipe(
    recipe: Mapping[str, Any],
    container: str,
    output: Path,
    *,
    source: Path,
    calibration: Path | None,
    imatrix: Path | None,
    threads: int | None,
) -> QuantizeReport:
    """Quantize as a provenance says.

    Raises:
        FormatError: it says what no option is; it comes from a file.
    """
    return quantize(
        source,
        output=output,
        calibration=calibration,
        imatrix=imatrix,
        hash_source=any("sha256" in s for s in recipe["sources"]),
        threads=threads,
        **arguments_of(recipe["options"], container),
    )


def arguments_of(options: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Recorded options as arguments.

    Raises:
        FormatError: an option that is not known.
    """
    found: dict[str, Any] = {}
    if CONTAINERS[container].suffix in (".qblk", ".gguf"):
        found["format"] = container
    for key, value in options.items():
        if key in _SAME:
            found[key] = value
        elif key == "range":
            name, _, percentile = str(value).partition(" ")
            found |= {"range": name} | ({"percentile": float(percentile)} if percentile else {})
        elif key == "budget":
            found |= _budget(str(value))
        elif key == "override_kv":
            found[key] = [_override(name, stated) for name, stated in value]
        elif key == "tensor_type":
            found[key] = [rule.removeprefix("--tensor-type '").removesuffix("'") for rule in value]
        else:
            raise FormatError("--rebuild does not know an option of the recipe", found=str(key))
    return found


def _override(key: str, value: bool | int | float | str) -> str:
    stated = str(value).lower() if isinstance(value, bool) else str(value)
    return f"{key}={_KINDS[type(value)]}:{stated}"


def _budget(name: str) -> dict[str, Any]:
    if name in PRESETS:
        return {"preset": name}
    for unit, argument, number in _BUDGETS:
        if name.endswith(unit):
            return {argument: number(name.removesuffix(unit))}
    raise FormatError("--rebuild does not know the budget of the recipe", found=name)
