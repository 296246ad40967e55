"""Windows that a model writes itself, to be learned from when a text is too short (as LLM-QAT does:
Liu et al., 2023, arXiv 2305.17888).

Each begins like a place of the text and goes on with tokens that are drawn from the model's own
predictions. They are as good as text to learn its predictions by, there are as many as are wanted,
and nothing that was fitted to the text has seen them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from qconvert.errors import UnsupportedError
from qconvert.running.device import on_device
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.quality import Windows

I64 = NDArray[np.int64]
BEGINNING = 8  # tokens of the text that a window begins with, the tokenizer's first one included
TOGETHER = 64  # windows that are written at once
NEVER = -1  # a token that ends nothing


def written(
    model: Checkpoint,
    text: Windows,
    count: int,
    seed: int,
    advance: Callable[[int, str], None],
) -> Windows:
    """Windows of the length of the text's.

    Args:
        model: that predicts next tokens.
        text: where the beginnings come from.
        count: how many.
        seed: of where they begin, and of what is drawn. The same seed gives the same tokens for the
            same number of threads.
        advance: is told of tokens.

    Raises:
        UnsupportedError: predictions are not finite.
    """
    length = text.inputs.shape[1]
    whole = np.concatenate([text.inputs, text.targets[:, -1:]], 1)
    places = np.random.default_rng(seed)
    parts: list[I64] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for start in range(0, count, TOGETHER):
            begun = _beginnings(whole, min(TOGETHER, count - start), places)
            parts.append(_continued(model, begun, length + 1))
            advance(parts[-1][:, :-1].size, "windows that the model writes")
    found = np.concatenate(parts)
    return Windows(found[:, :-1], found[:, 1:][:, text.first :], text.first)


def _beginnings(whole: I64, count: int, places: np.random.Generator) -> I64:
    """The first token of windows, behind which the text goes on anywhere: (count, tokens)."""
    tokens = min(BEGINNING, whole.shape[1] - 1)
    windows = places.integers(0, len(whole), count)
    starts = places.integers(1, whole.shape[1] - tokens + 2, count)
    columns = starts[:, None] + np.arange(tokens - 1)
    return np.concatenate([whole[windows, :1], whole[windows[:, None], columns]], 1)


def _continued(model: Checkpoint, begun: I64, length: int) -> I64:
    """Rows of so many tokens."""
    import transformers

    how = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length - begun.shape[1],
        eos_token_id=NEVER,
        pad_token_id=0,
    )
    ids = on_device(begun, model.model)
    try:
        found = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=how
        )
    except RuntimeError as e:  # of torch, where probabilities are none
        raise UnsupportedError(
            "the model that is learned from predicts no numbers",
            path=model.path,
            found=str(e),
            hint="--generate 0 leaves out the windows that it writes itself",
        ) from e
    rows: I64 = found.numpy(force=True)
    return rows
