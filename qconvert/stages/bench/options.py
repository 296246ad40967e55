"""What a measurement was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qconvert.ranges import RangeMethod
from qconvert.schemes import SCHEMES, Scheme

DEFAULT_SCHEMES = ("q4_block64", "q8_block64")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Options of ``qconvert bench``; the command line's help describes each."""

    schemes: tuple[Scheme, ...] = tuple(SCHEMES[name] for name in DEFAULT_SCHEMES)
    file: Path | None = None
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)
    rows: int = 512
    runs: int = 5
    threads: int = 1
    range: RangeMethod | None = None
    end_to_end: bool = False
    work_dir: Path | None = None
    compare: Path | None = None
    threshold: float = 0.10
    memory: int | None = None
