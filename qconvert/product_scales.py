"""By which scales of tensors llama.cpp multiplies.

Its loader takes a tensor ``NAME.scale`` beside the matrices of layers of every architecture, but
only some graphs multiply the products of all of them by it (`build_lora_mm`, `build_qkv` and
`build_ffn` in llama-graph.cpp, and what src/models/*.cpp hands to them, at 0c1e57098). The others
pass NULL for the feed-forward, and compute without it in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from qconvert.model import WEIGHT

_FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
_ALL = ("attn_q", "attn_k", "attn_v", "attn_output", *_FEED_FORWARD)
# Matrices of the layers, by architecture; that of the head, where it is one, is scaled in them too.
SCALED_PRODUCTS: dict[str, tuple[str, ...]] = {"llama": _ALL, "mistral3": _ALL, "qwen3": _ALL}
_LAYER = re.compile(r"blk\.\d+\.(\w+)\.weight")
_HEAD = "output.weight"


def takes_scale(architecture: str, name: str, names: Collection[str]) -> bool:
    """Whether llama.cpp multiplies by the scale beside a tensor of a file.

    Args:
        name: of the tensor, in GGUF.
        names: of all tensors: a feed-forward matrix with a bias and a scale ends the process.
    """
    known = SCALED_PRODUCTS.get(architecture, ())
    if name == _HEAD:
        return bool(known)
    match = _LAYER.fullmatch(name)
    if match is None or match[1] not in known:
        return False
    return match[1] not in _FEED_FORWARD or name.removesuffix(WEIGHT) + ".bias" not in names
