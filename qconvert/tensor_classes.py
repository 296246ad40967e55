"""What a tensor does in its model, by its name: classes that bear noise differently."""

from __future__ import annotations

import re

EMBEDDING = "embeddings"
HEAD = "output head"
ATTENTION = "attention"
MLP = "MLP"
OTHER = "other tensors"

# The first that is found decides. An output head is an embedding in some names, and the output of
# an encoder's attention is called ``attention.output.dense``.
_PATTERNS = (
    (HEAD, re.compile(r"lm_head|embed_out|^output\.weight$|classifier|^score\.")),
    (EMBEDDING, re.compile(r"embed|embd|(^|\.)wte\.|(^|\.)wpe\.")),
    (ATTENTION, re.compile(r"attn|attention|\b[qkvo]_proj\b|qkv|query_key_value")),
    (MLP, re.compile(r"mlp|ffn|feed_forward|experts|\.intermediate\.|output\.dense|\bfc[12]\b")),
)


def class_of(name: str) -> str:
    """The class of a tensor, by the names that Hugging Face's models and GGUF files have."""
    return next((found for found, pattern in _PATTERNS if pattern.search(name)), OTHER)
