"""ggml's block types, by their names in GGUF; a new one is a row of its module's ``TYPES``."""

from __future__ import annotations

import numpy as np

from qconvert.kernels.records import F32, U8, Encoded, ErrorSums, SourceRows
from qconvert.kernels.reference.casts import values
from qconvert.kernels.reference.ggml.block import GgmlBlock
from qconvert.kernels.reference.ggml.codebooks import TYPES as CODEBOOK_TYPES
from qconvert.kernels.reference.ggml.kquants import TYPES as K_TYPES
from qconvert.kernels.reference.ggml.small import TYPES as SMALL_TYPES
from qconvert.kernels.reference.ggml.ternary import TYPES as TERNARY_TYPES
from qconvert.kernels.reference.statistics import error_sums

_ALL = (*SMALL_TYPES, *K_TYPES, *CODEBOOK_TYPES, *TERNARY_TYPES)
GGML_BLOCKS: dict[str, GgmlBlock] = {kind.name: kind for kind in _ALL}


@np.errstate(over="ignore", divide="ignore", invalid="ignore")
def ggml_encode(ggml_type: str, blocks: F32, importance: F32 | None = None) -> U8:
    """Bytes, uint8 (k, nbytes), of finite float32 values, (k, block).

    A scale beyond its stored type becomes Inf: ask `GgmlBlock.finite_scales`.

    Args:
        importance: weights of the squared errors, float32 (p, block), not negative; block b takes
            row b mod p. Types that search nothing do not look at it.
    """
    return GGML_BLOCKS[ggml_type].encoder(blocks, importance)


@np.errstate(over="ignore", invalid="ignore")
def ggml_decode(ggml_type: str, data: U8) -> F32:
    """Values, float32 (k, block), of blocks, uint8 (k, nbytes); a file may hold Inf and NaN."""
    return GGML_BLOCKS[ggml_type].decoder(data)


def ggml_quantize(ggml_type: str, rows: SourceRows, importance: F32 | None = None) -> Encoded:
    """`ggml_encode` of rows of whole blocks, a segment ``data``, and the error of what the bytes
    decode to.

    Raises:
        FloatingPointError: NaN or Inf, or a float64 beyond float32.
    """
    blocks = values(rows).reshape(-1, GGML_BLOCKS[ggml_type].block)
    data = ggml_encode(ggml_type, blocks, importance)
    sums = error_sums(blocks, ggml_decode(ggml_type, data))
    return Encoded({"data": data.reshape(-1).data}, ErrorSums(blocks.size, *sums))
