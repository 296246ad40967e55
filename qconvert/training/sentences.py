"""Encoders in training: sentences padded to one length, and how far embeddings are apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qconvert.running.device import on_device
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.quality import BATCH_TOKENS, F64, I64, Windows
from qconvert.running.text import sentences


def sentence_windows(
    tokenizer: Any, text: Path, seqlen: int, nsamples: int | None, seed: int
) -> Windows:
    """The lines of a text as windows of one length, that of the longest: in the place of targets
    stands which tokens are the sentence's, 1, and which fill up, 0.

    Args and errors as of `qconvert.running.text.sentences`.
    """
    found = sentences(tokenizer, text, seqlen, nsamples, seed)
    longest = max(map(len, found))
    filler = getattr(tokenizer, "pad_token_id", None)
    inputs = np.full((len(found), longest), filler or 0, np.int64)
    mask = np.zeros((len(found), longest), np.int64)
    for i, tokens in enumerate(found):
        inputs[i, : len(tokens)] = tokens
        mask[i, : len(tokens)] = 1
    return Windows(inputs, mask, 0)


def distances(reference: Checkpoint, student: Checkpoint, inputs: I64, mask: I64) -> Any:
    """1 - cosine of both models' embeddings of each sentence (n, length), (n,); the reference
    without gradients.

    An embedding is the mean of the last hidden states over the sentence's tokens, special ones
    included (mean pooling of sentence-transformers).
    """
    length = int(mask.sum(1).max())  # no more columns than the longest of these has
    ids, kept = (on_device(a[:, :length], student.model) for a in (inputs, mask))
    with torch.no_grad():
        wanted = _embeddings(reference.model, ids, kept)
    found = _embeddings(student.model, ids, kept)
    return 1 - torch.nn.functional.cosine_similarity(found, wanted, dim=1)


def _embeddings(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask[..., None].to(hidden.dtype)
    pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
    return pooled


def compare_embeddings(
    reference: Checkpoint, student: Checkpoint, chunks: Windows, advance: Callable[[int], None]
) -> F64:
    """`distances` of all sentences, (n,)."""
    together = max(1, BATCH_TOKENS // chunks.inputs.shape[1])
    found = []
    with torch.no_grad():
        for start in range(0, len(chunks.inputs), together):
            part = slice(start, start + together)
            inputs, mask = chunks.inputs[part], chunks.targets[part]
            found.append(distances(reference, student, inputs, mask).double().numpy(force=True))
            advance(inputs.size)
    return np.concatenate(found)
