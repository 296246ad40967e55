"""Names that llama.cpp takes for more than a label.

It looks for these in ``general.name`` while it loads a vocabulary (llama-vocab.cpp, at the end of
``llama_vocab::impl::load``): some of the text around special tokens is then part of them, and a
token that it expects and does not find ends the loading. It keys nothing else to free text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Lower-cased in ASCII alone. In a name with the first, all special tokens but three take the spaces
# after them, and these four must be there; with the second "[MASK]" takes those before it.
_PHI = re.compile(r"(phi)-?(3)", re.IGNORECASE | re.ASCII)
_PHI_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})
_PHI_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_MODERN = re.compile(r"(modern)-(bert)", re.IGNORECASE | re.ASCII)
_MASK = "[MASK]"


def harmless_name(name: str, tokenizer: Callable[[], dict[str, Any] | None]) -> str:
    """The name, or one like it where llama.cpp would make something of it that the model is not.

    Args:
        name: what the model is to be called.
        tokenizer: gives tokenizer.json, which is looked at for such a name only.
    """
    if not _PHI.search(name) and not _MODERN.search(name):
        return name
    added = _added(tokenizer() or {})
    if not _is_phi(added):
        name = _PHI.sub(r"\1 \2", name)
    if _MASK in added and added[_MASK].get("lstrip") is not True:
        name = _MODERN.sub(r"\1 \2", name)
    return name


def _is_phi(added: dict[str, dict[str, Any]]) -> bool:
    """Whether special tokens are those that llama.cpp would make them."""
    return added.keys() >= _PHI_TOKENS and all(
        (token.get("rstrip") is True) == (text not in _PHI_PLAIN) for text, token in added.items()
    )


def _added(tokenizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tokens = tokenizer.get("added_tokens")
    return {
        t["content"]: t
        for t in (tokens if isinstance(tokens, list) else ())
        if isinstance(t, dict) and isinstance(t.get("content"), str)
    }
