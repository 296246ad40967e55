"""Options of quantize, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qconvert.mixes import TensorTypeRule
from qconvert.ranges import RangeMethod
from qconvert.schemes import Scheme, TensorScheme
from qconvert.stages.plan import MIN_VALUES


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Options that only a GGUF file has; the command line's help describes each."""

    raw: bool = False
    pre_tokenizer: str | None = None
    pure: bool = False
    fallback: bool = True
    output_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[TensorTypeRule, ...] = ()
    imatrix: Path | None = None
    shard_size: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``qconvert quantize``; the command line's help describes each."""

    scheme: Scheme
    output: Path | None = None
    container: str | None = None
    range: RangeMethod | None = None
    calibration: Path | None = None
    weighting: bool = True
    rounding: str | None = None
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    min_values: int = MIN_VALUES
    threads: int | None = None
    dry_run: bool = False
    force: bool = False
    strict: bool = False
    hash_source: bool = False
    allow_requantize: bool = False
    gguf: GgufOptions = GgufOptions()
