"""Plain arguments, or words of a command line, as the options of a stage.

Errors name an option as the command line does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from qconvert.calibration.observers import DEFAULT_OBSERVER, EMA_MOMENTUM, ObserverSettings
from qconvert.containers import WRITTEN
from qconvert.errors import UsageError
from qconvert.ranges import DEFAULT_PERCENTILE, RANGE_METHODS, RangeMethod
from qconvert.running.text import DEFAULT_SEQLEN
from qconvert.schemes import KeepScheme, MixScheme, TensorScheme, parse_scheme
from qconvert.stages.quantize_options import PRESETS, Budget, FinetuneOptions, RepairText
from qconvert.stages.rounding import METHODS

EQUALISE = ("auto", "off")


def as_path(given: Path | str | None) -> Path | None:
    """A path where there is one."""
    return None if given is None else Path(given)


def as_paths(given: Path | str | Iterable[Path | str] | None) -> tuple[Path, ...]:
    """One path or several."""
    if given is None:
        return ()
    return (Path(given),) if isinstance(given, Path | str) else tuple(map(Path, given))


def as_float(given: float | None) -> float | None:
    """As words are read, so that a whole number is the same number in a report."""
    return None if given is None else float(given)


def as_texts(given: str | Iterable[str] | None) -> tuple[str, ...]:
    """One text or several."""
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def as_assignments(given: Mapping[str, str] | str | Iterable[str] | None) -> tuple[str, ...]:
    """``A=B`` of each pair."""
    if isinstance(given, Mapping):
        return tuple(f"{key}={value}" for key, value in given.items())
    return as_texts(given)


def check_bounds(option: str, value: int | None, least: int, most: int | None = None) -> None:
    """Refuse a number that is too small or too large.

    Raises:
        UsageError: it is.
    """
    if value is None or (value >= least and (most is None or value <= most)):
        return
    wanted = f"at least {least}" if most is None else f"{least} to {most}"
    raise UsageError(option, found=value, wanted=wanted)


def check_goes_with(given: str, wanted: str, options: Mapping[str, object]) -> None:
    """Refuse options that mean nothing with what was given."""
    for name, value in options.items():
        if value is not None and given != wanted:
            raise UsageError(f"{name} goes with {wanted}")


def container_name(text: str | None) -> str | None:
    """``--format``."""
    names = [c.name for c in WRITTEN]
    if text is None or text.lower() in names:
        return text and text.lower()
    raise UsageError("--format", found=text, wanted=" or ".join(names))


def rounding_method(text: str | None) -> str | None:
    """``--rounding``."""
    if text is None or text in METHODS:
        return text
    raise UsageError("--rounding", found=text, wanted=" or ".join(METHODS))


def equalise_asked(text: str | None) -> bool:
    """``--equalise``: whether it is done where it gains."""
    if text is None or text in EQUALISE:
        return text != EQUALISE[1]
    raise UsageError("--equalise", found=text, wanted=" or ".join(EQUALISE))


def range_method(name: str | None, percentile: float | None) -> RangeMethod | None:
    """The range method asked for, None for the default of each width."""
    if name is not None and name not in RANGE_METHODS:
        raise UsageError("--range", found=name, wanted=", ".join(RANGE_METHODS))
    if percentile is not None and name != "percentile":
        raise UsageError("--percentile goes with --range percentile")
    if percentile is not None and not 50 < percentile <= 100:
        raise UsageError("--percentile", found=percentile, wanted="above 50, at most 100")
    return RangeMethod(name, float(percentile or DEFAULT_PERCENTILE)) if name else None


def observer_settings(
    name: str | None, percentile: float | None, momentum: float | None, symmetric: bool
) -> ObserverSettings:
    """The observer asked for; a parameter of another one is refused."""
    if percentile is not None and name != "percentile":
        raise UsageError("--percentile goes with --observer percentile")
    if momentum is not None and name != "ema":
        raise UsageError("--momentum goes with --observer ema")
    return ObserverSettings(
        name or DEFAULT_OBSERVER,
        percentile=DEFAULT_PERCENTILE if percentile is None else float(percentile),
        momentum=EMA_MOMENTUM if momentum is None else float(momentum),
        symmetric=symmetric,
    )


def share(option: str, given: str | float | None) -> float | None:
    """``1%`` or ``0.01``."""
    if given is None:
        return None
    text = str(given)
    percent = text.endswith("%")
    try:
        found = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise UsageError(option, found=text, wanted="a share such as 1% or 0.01")
    return found


def parse_tensor_scheme(text: str) -> tuple[str, TensorScheme]:
    """``GLOB=NAME``."""
    glob, equals, name = text.rpartition("=")
    if not equals or not glob:
        raise UsageError("--tensor-scheme", found=text, wanted="GLOB=NAME")
    scheme = parse_scheme(name)
    if isinstance(scheme, MixScheme | KeepScheme):
        raise UsageError("--tensor-scheme", found=text, wanted="a single type, no mix and not keep")
    return glob, scheme


def parse_override(text: str) -> tuple[str, str | int | float | bool]:
    """``KEY=TYPE:VALUE``, with the types of llama.cpp's option of this name."""
    key, equals, stated = text.partition("=")
    kind, colon, value = stated.partition(":")
    if key and equals and colon:
        try:
            if kind == "int":
                return key, int(value)
            if kind == "float" and math.isfinite(float(value)):
                return key, float(value)
        except ValueError:
            pass
        if kind == "bool" and value in ("true", "false"):
            return key, value == "true"
        if kind == "str":
            return key, value
    wanted = "KEY=int:N, KEY=float:X, KEY=bool:true or KEY=str:TEXT"
    raise UsageError("--override-kv", found=text, wanted=wanted)


def size_in_bytes(option: str, given: str | int | None) -> int | None:
    """Bytes, with K, M or G for powers of 1,000."""
    if given is None:
        return None
    text = str(given)
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    powers = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    whole, point, decimals = number.partition(".")
    plain = unit in powers and whole.isdecimal() and len(number) < 19
    plain = plain and (decimals.isdecimal() and unit != "" if point else True)
    if not plain or not 0 < (found := int(Fraction(number) * powers[unit])) < 1 << 63:
        raise UsageError(option, found=text, wanted="a number of bytes, or 500M, 2.5G ...")
    return found


def budget_of(
    bits: float | None,
    size: str | int | None,
    divergence: float | None,
    sensitivities: Path | str | None,
    preset: str | None,
    container: str,
) -> Budget | None:
    """The budget asked for, None without one.

    Raises:
        UsageError: more than one, one out of range, or sensitivities without one.
    """
    given = {
        "--target-bpw": bits, "--target-size": size, "--max-kl": divergence, "--preset": preset
    }  # fmt: skip
    asked = [name for name, value in given.items() if value is not None]
    if len(asked) > 1:
        raise UsageError("several budgets", found=" and ".join(asked), wanted="one")
    if not asked:
        if sensitivities is not None:
            raise UsageError("--sensitivities goes with a budget", hint="such as --target-bpw 4.5")
        return None
    for name, number in (("--target-bpw", bits), ("--max-kl", divergence)):
        if number is not None and not 0 < number < float("inf"):
            raise UsageError(name, found=number, wanted="a number above 0")
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError("--preset", found=preset, wanted=" or ".join(PRESETS))
        bits = PRESETS[preset][container]
    return Budget(
        as_float(bits),
        size_in_bytes("--target-size", size),
        as_float(divergence),
        as_path(sensitivities),
        preset,
    )


def repair_of(
    text: Path | str | None, seqlen: int | None, nsamples: int | None
) -> RepairText | None:
    """The text that tensors are aimed on, None without one.

    Raises:
        UsageError: what goes with a text, without one.
    """
    if text is not None:
        return RepairText(Path(text), DEFAULT_SEQLEN if seqlen is None else seqlen, nsamples)
    for name, given in (("--nsamples", nsamples), ("--seqlen", seqlen)):
        if given is not None:
            raise UsageError(f"{name} goes with --text")
    return None


def finetune_of(
    steps: int,
    text: Path | str | None,
    seqlen: int | None,
    nsamples: int | None,
    seed: int,
) -> FinetuneOptions | None:
    """How scales are to be tuned, None if not at all.

    Raises:
        UsageError: a number out of range, no text, or no steps for what goes with them.
    """
    check_bounds("--finetune", steps, 0)
    if not steps:
        if seed:
            raise UsageError("--seed goes with --finetune", hint="such as --finetune 20")
        return None
    if text is None:
        raise UsageError("--finetune needs a text", hint="give it with --text FILE")
    check_bounds("--seqlen", seqlen, 4)
    check_bounds("--nsamples", nsamples, 2)
    check_bounds("--seed", seed, 0)
    return FinetuneOptions(
        steps, Path(text), DEFAULT_SEQLEN if seqlen is None else seqlen, nsamples, seed
    )


Shape = tuple[int, int]


def matrix_shapes(given: str | Shape | Iterable[str | Shape] | None) -> tuple[Shape, ...]:
    """``ROWSxCOLS``, a pair, or several of them."""
    if given is None:
        return ()
    return tuple(dict.fromkeys(map(_shape, _shape_texts(given))))


def _shape_texts(given: str | Shape | Iterable[str | Shape]) -> list[str]:
    if isinstance(given, str):
        return [given]
    parts = tuple(given)
    if parts and all(isinstance(n, int) for n in parts):
        return ["x".join(map(str, parts))]
    return ["x".join(map(str, p)) if isinstance(p, tuple | list) else str(p) for p in parts]


def _shape(text: str) -> Shape:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and 0 < int(p) <= 1 << 20 for p in parts):
        raise UsageError("--shape", found=text, wanted="ROWSxCOLS, each up to 1,048,576")
    return int(parts[0]), int(parts[1])
