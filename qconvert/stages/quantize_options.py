"""Options of quantize, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.mixes import TensorTypeRule
from qconvert.ranges import RangeMethod
from qconvert.running.text import DEFAULT_SEQLEN
from qconvert.schemes import Scheme, TensorScheme
from qconvert.stages.plan import MIN_VALUES


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Options that only a GGUF file has; the command line's help describes each."""

    raw: bool = False
    mmproj: bool = False
    pre_tokenizer: str | None = None
    mtp: bool = True
    pure: bool = False
    fallback: bool = True
    output_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: tuple[TensorTypeRule, ...] = ()
    imatrix: Path | None = None
    shard_size: int | None = None
    overrides: tuple[tuple[str, str | int | float | bool], ...] = ()


# What says which tensors are quantized at all where a budget chooses what they take.
UNDER_BUDGET: Mapping[str, str] = {"qblk": "q4_block32", "gguf": "q4_k_m"}

# Bits per weight over the whole file, by container. A GGUF file needs more for the same loss, and
# its types for rows that do not divide into blocks of 256 begin at 4.5.
PRESETS: Mapping[str, Mapping[str, float]] = {
    "small": {"qblk": 3.4, "gguf": 3.9},
    "balanced": {"qblk": 4.3, "gguf": 4.6},
    "near-lossless": {"qblk": 6.4, "gguf": 6.6},
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What the whole file has to keep to; one of the first three.

    Attributes:
        bits: per weight, over all tensors of the file.
        size: of the file in bytes.
        divergence: predicted, in nats.
        sensitivities: a file of what was measured, read if it is there and written if not.
        preset: the name that the bits were asked for by; of `PRESETS`. Where shapes do not allow
            so few, the fewest are taken.
    """

    bits: float | None = None
    size: int | None = None
    divergence: float | None = None
    sensitivities: Path | None = None
    preset: str | None = None

    @property
    def name(self) -> str:
        """As reports and names of files have it."""
        if self.preset is not None:
            return self.preset
        if self.bits is not None:
            return f"{self.bits:g}bpw"
        return f"{self.size}bytes" if self.size is not None else f"{self.divergence:g}nats"


@dataclass(frozen=True, slots=True)
class RepairText:
    """A text on which tensors are aimed at the outputs of the float model.

    Attributes:
        seqlen: tokens of a window.
        nsamples: windows; None for the usual number, or as many as there are.
        windows: of tokens, (n, seqlen): what the model runs in the place of the text's own, such as
            a part of them.
    """

    text: Path
    seqlen: int = DEFAULT_SEQLEN
    nsamples: int | None = None
    windows: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class FinetuneOptions:
    """How scales of rows are tuned once the model is quantized.

    Attributes:
        steps: at least 1.
        text: a UTF-8 file; a part of its windows of ``seqlen`` tokens judges.
        nsamples: windows that are drawn, None for all.
        seed: of that draw, and of what is trained on when.
    """

    steps: int
    text: Path
    seqlen: int
    nsamples: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Options of ``qconvert quantize``; the command line's help describes each.

    Attributes:
        scheme: under a budget, what says which tensors are quantized at all.
        home: where the output is, under the name that it has by default; beside the source if None.
        equalise: whether to rescale channels where that gains.
        config: the directory of the model that a GGUF file was made from.
        exact: whether all codes have to stay what they are, where they are to be kept.
        adapter: a directory of peft's, whose corrections are merged into the model first.
        adapter_only: write these corrections by themselves, and not the model.
        assigned: what a budget has chosen for tensors by their names; None keeps one as it is.
    """

    scheme: Scheme
    output: Path | None = None
    home: Path | None = None
    container: str | None = None
    range: RangeMethod | None = None
    calibration: Path | None = None
    weighting: bool = True
    rounding: str | None = None
    equalise: bool = True
    repair: RepairText | None = None
    keep: tuple[str, ...] = ()
    tensor_schemes: tuple[tuple[str, TensorScheme], ...] = ()
    min_values: int = MIN_VALUES
    threads: int | None = None
    dry_run: bool = False
    force: bool = False
    strict: bool = False
    hash_source: bool = False
    allow_requantize: bool = False
    exact: bool = False
    adapter: Path | None = None
    adapter_only: bool = False
    config: Path | None = None
    gguf: GgufOptions = GgufOptions()
    budget: Budget | None = None
    finetune: FinetuneOptions | None = None
    assigned: Mapping[str, TensorScheme | None] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of what is made of the tensors."""
        return self.budget.name if self.budget else self.scheme.name
