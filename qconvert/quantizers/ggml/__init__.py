"""ggml's block types, by their names in GGUF; a new one is a row of its module's ``TYPES``."""

from qconvert.quantizers.ggml.block import GgmlBlock, Parts
from qconvert.quantizers.ggml.codebooks import TYPES as CODEBOOK_TYPES
from qconvert.quantizers.ggml.kquants import TYPES as K_TYPES
from qconvert.quantizers.ggml.small import TYPES as SMALL_TYPES
from qconvert.quantizers.ggml.ternary import TYPES as TERNARY_TYPES

_ALL = (*SMALL_TYPES, *K_TYPES, *CODEBOOK_TYPES, *TERNARY_TYPES)
GGML_BLOCKS: dict[str, GgmlBlock] = {kind.name: kind for kind in _ALL}

__all__ = ["GGML_BLOCKS", "GgmlBlock", "Parts"]
