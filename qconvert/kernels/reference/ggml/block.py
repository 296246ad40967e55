"""What a ggml block type is: a fixed number of values in a fixed number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qconvert.kernels.records import F32, U8, Parts


@dataclass(frozen=True, slots=True)
class GgmlBlock:
    """One block type; its functions are the definition, in NumPy.

    Attributes:
        name: as in GGUF.
        block: values of a block.
        nbytes: bytes of a block.
        group: values that share a scale, a divisor of ``block``.
        codes: the smallest and the largest code of `Parts`.
        encoder: values (k, block) and importance (p, block) or None to bytes (k, nbytes).
        decoder: bytes to values.
        splitter: bytes to `Parts`.
        scales: bytes to the floating numbers that a block stores, (k, n): finite in a sound file.
        halves: whether these numbers are float16, rounded to it when the codes are made.
        gap: largest distance between neighbouring codes: no value is further than half of it,
            times its scale, from what is stored for it.
    """

    name: str
    block: int
    nbytes: int
    group: int
    codes: tuple[int, int]
    encoder: Callable[[F32, F32 | None], U8]
    decoder: Callable[[U8], F32]
    splitter: Callable[[U8], Parts]
    scales: Callable[[U8], F32]
    gap: int = 1
    halves: bool = True

    def rounding(self, data: U8) -> tuple[F32 | None, F32 | None]:
        """By how much the scale and the offset of blocks, uint8 (k, nbytes), may have been rounded
        after their codes were made, relative to them, float32 (k,): half a unit in the last place
        of float16. None where there is none.
        """
        if not self.halves:
            return None, None
        stored = np.abs(self.scales(data))
        with np.errstate(invalid="ignore"):  # a file may hold Inf and NaN
            unit = np.maximum(stored * np.float32(2.0**-11), np.float32(2.0**-25))
            relative = np.divide(unit, stored, out=np.zeros_like(stored), where=stored != 0)
        return relative[:, 0], relative[:, 1] if relative.shape[1] > 1 else None

    def finite_scales(self, data: U8) -> bool:
        """Whether no block has an Inf or NaN among the numbers that it stores."""
        return bool(np.isfinite(self.scales(data)).all())
