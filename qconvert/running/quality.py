"""How far a quantized model is from its source in the model's own terms: perplexity, divergence of
next-token distributions, and cosine of embeddings.

Logits are compared window by window and never kept; what stays is a few numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import UnsupportedError, UsageError
from qconvert.running.device import device_of
from qconvert.running.hugging_face import Checkpoint
from qconvert.running.text import consecutive_windows, first_token, token_chunks

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
SCORINGS = ("all", "second-half")
BATCH_TOKENS = 2048
BATCH_LOGITS = 1 << 24  # of one model; a window that has more comes alone
TILE_LOGITS = 1 << 20  # compared at once, in float64


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids to run and what is scored of them.

    Attributes:
        inputs: (n, length).
        targets: (n, scored): the tokens that come after positions ``first`` to
            ``first + scored - 1`` of the inputs.
        first: position of the first prediction that is scored.
    """

    inputs: I64
    targets: I64
    first: int


def windows(
    tokenizer: Any,
    text: Path,
    seqlen: int,
    scoring: str = "all",
    nsamples: int | None = None,
    seed: int = 0,
) -> Windows:
    """Windows of a text that follow each other without overlap; the last, shorter one is dropped.

    ``all``: each token of a window of ``seqlen`` is scored given those before it in the window and
    the tokenizer's first token (BOS); where it puts none, all but a window's first.
    ``second-half``: what ``llama-perplexity -c seqlen`` does: windows of `token_chunks`, whose
    first token BOS replaces, and predictions at positions seqlen/2 to seqlen - 2 are scored.

    Raises:
        UsageError: an argument out of range.
        InputError: the text is unreadable or too short.
    """
    if scoring not in SCORINGS:
        raise UsageError("--scoring", found=scoring, wanted=", ".join(SCORINGS))
    if seqlen < 4:
        raise UsageError("--seqlen", found=seqlen, wanted="at least 4")
    if scoring == "second-half":
        chunks = token_chunks(tokenizer, text, seqlen, nsamples, seed)
        half = seqlen // 2
        return Windows(chunks, chunks[:, half + 1 :], half)
    chunks = consecutive_windows(tokenizer, text, seqlen, nsamples, seed, special_tokens=False)
    first = first_token(tokenizer)
    if first is None:
        return Windows(chunks[:, :-1], chunks[:, 1:], 0)
    begin = np.full((len(chunks), 1), first, np.int64)
    return Windows(np.hstack([begin, chunks[:, :-1]]), chunks, 0)


@dataclass(frozen=True, slots=True)
class Scores:
    """What is kept of each scored token, all (T,).

    Attributes:
        source_nll, nll: negative log-likelihood of the token in the text, in nats, by the source
            and by the quantized model.
        divergence: KL(source || quantized) of the distributions, in nats.
        same_top: whether both find the same token the likeliest.
    """

    source_nll: F64
    nll: F64
    divergence: F64
    same_top: NDArray[np.bool_]


class BlindGuess:
    """The best guess at a source's answers that does not look at the text: their mean.

    A quantized model that is farther from its source than this tells nothing of it any more: it is
    another model, or none. Only sums are kept.

    Attributes:
        answers: how many were added.
    """

    def __init__(self) -> None:
        self.answers = 0
        self._sum: F64 | float = 0.0
        self._entropy = 0.0

    def add_distributions(self, p: F64, log_p: F64) -> None:
        """Next-token distributions of the source and their logarithms, (T, vocabulary)."""
        self.answers += len(p)
        self._sum = self._sum + p.sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 · -inf
            self._entropy -= float(np.where(p > 0, p * log_p, 0.0).sum())

    def add_direction(self, embedding: F64) -> None:
        """An embedding of length 1, (width,)."""
        self.answers += 1
        self._sum = self._sum + embedding

    @property
    def divergence(self) -> float:
        """Mean of KL(source || mean of the source's distributions), in nats: the entropy of the
        mean less the mean of the entropies.
        """
        middle = np.asarray(self._sum) / self.answers
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(middle > 0, middle * np.log(middle), 0.0).sum()
        return max(0.0, float(entropy) - self._entropy / self.answers)

    @property
    def spread(self) -> float:
        """Mean squared distance of the directions from their mean: 1 - |mean|²."""
        middle = np.asarray(self._sum) / self.answers
        return max(0.0, 1.0 - float(middle @ middle))


def compare_logits(
    source: NDArray[np.floating],
    quantized: NDArray[np.floating],
    targets: I64,
    blind: BlindGuess | None = None,
) -> Scores:
    """Scores of some positions.

    Args:
        source, quantized: logits, (T, vocabulary).
        targets: (T,).
        blind: takes the distributions of the source.
    """
    parts = []
    step = max(1, TILE_LOGITS // source.shape[1])
    for start in range(0, len(source), step):
        tile = slice(start, start + step)
        lp, lq = _log_softmax(source[tile]), _log_softmax(quantized[tile])
        place = np.arange(len(lp)), targets[tile]
        p = np.exp(lp)
        with np.errstate(invalid="ignore"):  # 0 · (-inf - -inf): an impossible token adds nothing
            divergence = np.where(p > 0, p * (lp - lq), 0.0).sum(axis=1)
        if blind is not None:
            blind.add_distributions(p, lp)
        same = source[tile].argmax(axis=1) == quantized[tile].argmax(axis=1)
        parts.append(Scores(-lp[place], -lq[place], divergence, same))
    return join(parts)


def _log_softmax(logits: NDArray[np.floating]) -> F64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def join(parts: list[Scores]) -> Scores:
    """Scores one after the other."""
    return Scores(
        *(
            np.concatenate([getattr(p, name) for p in parts])
            for name in ("source_nll", "nll", "divergence", "same_top")
        )
    )


def compare_models(
    source: Checkpoint,
    quantized: Checkpoint,
    chunks: Windows,
    blind: BlindGuess,
    advance: Callable[[int], None],
) -> Scores:
    """Run both models over all windows; ``blind`` takes the distributions of the source.

    Raises:
        UnsupportedError: they have vocabularies of different sizes.
    """
    import torch

    length = chunks.inputs.shape[1]
    vocabulary = int(getattr(source.model.config.get_text_config(), "vocab_size", None) or 1)
    batch = max(1, min(BATCH_TOKENS // length, BATCH_LOGITS // (length * vocabulary)))
    scored = slice(chunks.first, chunks.first + chunks.targets.shape[1])
    parts = []
    with torch.inference_mode():
        for start in range(0, len(chunks.inputs), batch):
            ids = torch.from_numpy(chunks.inputs[start : start + batch])
            one, other = (
                c.model(input_ids=ids.to(device_of(c.model)), use_cache=False)
                .logits[:, scored]
                .flatten(0, 1)
                .cpu()
                .numpy()
                for c in (source, quantized)
            )
            if one.shape != other.shape:
                raise UnsupportedError(
                    "the models have different vocabularies",
                    path=quantized.path,
                    found=f"{other.shape[1]:,} logits",
                    wanted=f"{one.shape[1]:,}",
                )
            targets = chunks.targets[start : start + batch].ravel()
            parts.append(compare_logits(one, other, targets, blind))
            advance(ids.numel())
    return join(parts)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float


def mean(values: F64) -> Mean:
    """Mean and standard error, sqrt(variance / (n - 1)) with the variance about the mean over n."""
    error = math.sqrt(float(values.var()) / max(len(values) - 1, 1))
    return Mean(float(values.mean()), error)


def perplexity(nll: F64) -> Mean:
    """exp(mean), and exp(mean) times the standard error of the mean: to first order, that of the
    perplexity; the formula of llama.cpp's ``llama-perplexity``.
    """
    found = mean(nll)
    with np.errstate(over="ignore"):
        value = float(np.exp(found.value))
    return Mean(value, value * found.error)


def perplexity_increase(scores: Scores) -> Mean:
    """Perplexity of the quantized model over the source's, less 1.

    The standard error is that of the paired differences: both models read the same tokens, so it
    is far smaller than those of the two perplexities.
    """
    ratio = perplexity(scores.nll - scores.source_nll)
    return Mean(ratio.value - 1, ratio.error)


def sentence_cosines(
    source: Checkpoint,
    quantized: Checkpoint,
    sentences: list[I64],
    blind: BlindGuess,
    advance: Callable[[int], None],
) -> F64:
    """Cosine of both models' embeddings of each sentence, (sentences,).

    An embedding is the mean of the last hidden states over all tokens, special ones included (mean
    pooling of sentence-transformers). Sentences run one by one, without padding. ``blind`` takes
    the directions of the source's.
    """
    import torch

    cosines = np.empty(len(sentences))
    with torch.inference_mode():
        for i, tokens in enumerate(sentences):
            ids = torch.from_numpy(tokens)[None].to(device_of(source.model))
            mask = torch.ones_like(ids)
            a, b = (
                c.model.base_model(input_ids=ids, attention_mask=mask)
                .last_hidden_state[0]
                .cpu()
                .numpy()
                .astype(np.float64)
                .mean(axis=0)
                for c in (source, quantized)
            )
            with np.errstate(invalid="ignore"):
                cosines[i] = a @ b / np.sqrt((a @ a) * (b @ b))
                blind.add_direction(a / np.sqrt(a @ a))
            advance(len(tokens))
    return cosines
