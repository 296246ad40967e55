"""What a ggml block type is: a fixed number of values in a fixed number of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.quantizers.rows import StoredRows

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parts:
    """Blocks as integers: value = scale · code + offset, up to the rounding of these two steps.

    Attributes:
        codes: int16 (k, block).
        scale: float32 (k, groups), one for each group of a block's values.
        offset: float32 (k, groups), or None where the type has none.
    """

    codes: NDArray[np.int16]
    scale: F32
    offset: F32 | None


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

    def encode(self, blocks: F32, importance: F32 | None = None) -> U8:
        """Bytes, uint8 (k, nbytes), of finite float32 values, (k, block).

        A scale beyond its stored type becomes Inf: ask `finite_scales`.

        Args:
            importance: weights of the squared errors, float32 (p, block), not negative; block b
                takes row b mod p. Types that search nothing do not look at it.
        """
        if kernels.fused is not None:
            native: U8 = kernels.fused.ggml_encode(self.name, blocks, importance)
            return native
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return self.encoder(blocks, importance)

    def quantize(
        self, stored: StoredRows, importance: F32 | None = None
    ) -> tuple[U8, tuple[float, float, float]]:
        """`encode` of rows of whole blocks, and Σx², Σ(x - x')² and max |x - x'| of what the bytes
        decode to.

        Raises:
            FloatingPointError: NaN or Inf, or a float64 beyond float32.
        """
        if kernels.fused is not None:
            native: tuple[U8, tuple[float, float, float]] = kernels.fused.ggml_quantize(
                self.name, *stored.readable(), importance
            )
            return native
        blocks = stored.values().reshape(-1, self.block)
        data = self.encode(blocks, importance)
        return data, kernels.error_sums(blocks, self.decode(data))

    def decode(self, data: U8) -> F32:
        """Values, float32 (k, block), of blocks, uint8 (k, nbytes); a file may hold Inf and NaN."""
        if kernels.fused is not None:
            native: F32 = kernels.fused.ggml_decode(self.name, data)
            return native
        with np.errstate(over="ignore", invalid="ignore"):
            return self.decoder(data)

    def parts(self, data: U8) -> Parts:
        """The integers of blocks, uint8 (k, nbytes)."""
        return self.splitter(data)

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
