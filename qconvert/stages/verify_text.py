"""verify --text: a quantized file and its source, run over a text and compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import ge, le
from pathlib import Path

import numpy as np

from qconvert.errors import UnsupportedError, UsageError
from qconvert.progress import Progress
from qconvert.report import Check, EmbeddingQuality, Execution, TokenQuality
from qconvert.running.device import CPU, chosen_device
from qconvert.running.hugging_face import Checkpoint, require
from qconvert.running.quality import (
    SCORINGS,
    BlindGuess,
    compare_models,
    mean,
    perplexity,
    perplexity_increase,
    sentence_cosines,
    windows,
)
from qconvert.running.quantized_model import (
    ACTIVATIONS,
    QuantizedCheckpoint,
    open_quantized,
    open_source,
)
from qconvert.running.text import DEFAULT_SEQLEN, read_text, sentences

ALIKE = 1e-3  # nats, or squared distance of directions
TOKENIZED = 1 << 16  # characters of the text that both tokenizers have to agree on


@dataclass(frozen=True, slots=True)
class QualityOptions:
    """What ``verify --text`` measures; the command line's help describes each."""

    text: Path
    seqlen: int | None = None
    nsamples: int | None = None
    seed: int = 0
    scoring: str = SCORINGS[0]
    activations: str = ACTIVATIONS[0]
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_cosine: float | None = None
    threads: int | None = None
    device: str = CPU


@dataclass(frozen=True, slots=True)
class Quality:
    """What was found: figures of tokens or of embeddings, and the verdict on each limit."""

    tokens: TokenQuality | None
    embeddings: EmbeddingQuality | None
    checks: list[Check]


def measure_quality(
    path: Path, against: Path, options: QualityOptions, progress: Progress
) -> Quality:
    """Run both models over the text: next tokens of causal models, embeddings of encoders.

    The file's digests are taken as checked.

    Raises:
        InputError: the text is too short, or one of the models cannot be run.
        UsageError: options contradict the model or each other.
        MachineError: torch or transformers is not installed.
    """
    require("torch", "transformers", progress=progress)
    options = replace(options, device=chosen_device(options.device))
    source = open_source(against, threads=options.threads, device=options.device)
    elsewhere = options.device != CPU  # where our own layers do not run
    quantized = open_quantized(
        *(path, options.activations),
        directory=against,
        threads=options.threads,
        check=False,
        decoded=elsewhere,
    )
    if elsewhere:
        quantized.checkpoint.model.to(options.device)
    _same_kind(source, quantized.checkpoint, options.text)
    seqlen = _seqlen(source, options)
    if source.kind == "encoder":
        return _embeddings(source, quantized, seqlen, options, progress)
    return _tokens(source, quantized, seqlen, options, progress)


def _tokens(
    source: Checkpoint,
    quantized: QuantizedCheckpoint,
    seqlen: int,
    options: QualityOptions,
    progress: Progress,
) -> Quality:
    if options.min_cosine is not None:
        raise UsageError("--min-cosine is for encoders", found="a causal language model")
    chunks = windows(
        source.tokenizer, options.text, seqlen, options.scoring, options.nsamples, options.seed
    )
    progress.begin("compare next tokens", chunks.inputs.size, "tokens")
    blind = BlindGuess()
    scores = compare_models(source, quantized.checkpoint, chunks, blind, progress.advance)
    progress.end()
    before, after = perplexity(scores.source_nll), perplexity(scores.nll)
    increase, divergence = perplexity_increase(scores), mean(scores.divergence)
    found = TokenQuality(
        text=str(options.text),
        windows=len(chunks.inputs),
        seqlen=seqlen,
        scoring=options.scoring,
        tokens=chunks.targets.size,
        execution=_execution(quantized, options),
        source_perplexity=before.value,
        source_perplexity_error=before.error,
        perplexity=after.value,
        perplexity_error=after.error,
        perplexity_increase=increase.value,
        perplexity_increase_error=increase.error,
        kl_mean=divergence.value,
        kl_mean_error=divergence.error,
        kl_p99=float(np.percentile(scores.divergence, 99)),
        kl_max=float(scores.divergence.max()),
        same_top=float(scores.same_top.mean()),
        kl_blind=blind.divergence,
    )
    checks = [
        _check(
            "finite-quality",
            np.isfinite(scores.nll).all() and np.isfinite(scores.divergence).all(),
            f"next-token distributions of {found.tokens:,} tokens",
        ),
        _same_model(
            "mean KL divergence from the source, in nats, below that of the best guess that does "
            "not look at the text",
            found.kl_mean,
            found.kl_blind,
            found.tokens,
        ),
    ]
    detail = "mean KL divergence of next tokens, in nats"
    checks += _limited("max-kl", detail, found.kl_mean, options.max_kl, le)
    share = found.perplexity_increase
    detail = "increase of the perplexity, as a share"
    checks += _limited("max-ppl-increase", detail, share, options.max_ppl_increase, le)
    return Quality(found, None, checks)


def _embeddings(
    source: Checkpoint,
    quantized: QuantizedCheckpoint,
    seqlen: int,
    options: QualityOptions,
    progress: Progress,
) -> Quality:
    if options.max_kl is not None or options.max_ppl_increase is not None:
        raise UsageError(
            "--max-kl and --max-ppl-increase are for causal language models",
            found="an encoder",
            hint="--min-cosine is for encoders",
        )
    found = sentences(source.tokenizer, options.text, seqlen, options.nsamples, options.seed)
    tokens = sum(map(len, found))
    progress.begin("compare embeddings", tokens, "tokens")
    blind = BlindGuess()
    cosines = sentence_cosines(source, quantized.checkpoint, found, blind, progress.advance)
    progress.end()
    quality = EmbeddingQuality(
        text=str(options.text),
        sentences=len(found),
        tokens=tokens,
        execution=_execution(quantized, options),
        cosine_mean=float(cosines.mean()),
        cosine_p1=float(np.percentile(cosines, 1)),
        cosine_min=float(cosines.min()),
        spread=blind.spread,
    )
    checks = [
        _check(
            "finite-quality",
            np.isfinite(cosines).all(),
            f"embeddings of {len(found):,} sentences",
        ),
        _same_model(
            "mean squared distance of the directions of embeddings from the source's, below that "
            "of the best guess that does not look at the text",
            2 * (1 - quality.cosine_mean),
            quality.spread,
            len(found),
        ),
    ]
    detail = "mean cosine of embeddings with the source's"
    checks += _limited("min-cosine", detail, quality.cosine_mean, options.min_cosine, ge)
    return Quality(None, quality, checks)


def _same_model(detail: str, found: float, blind: float, answers: int) -> Check:
    """Whether the file tells of its source what only the text can tell.

    Below `ALIKE` the two say the same on this text, however little the text matters to them.
    """
    if answers < 2:
        return Check("same-model", "skip", "one answer alone cannot be told from a blind guess")
    limit = max(blind, ALIKE)
    return _check("same-model", found < limit, detail, found, limit)


def _check(
    id: str, good: object, detail: str, worst: float | None = None, limit: float | None = None
) -> Check:
    return Check(id, "pass" if good else "fail", detail, worst, limit)


def _limited(
    id: str, detail: str, found: float, limit: float | None, holds: Callable[[float, float], bool]
) -> list[Check]:
    """The verdict on a limit, if there is one: whether it ``holds`` for what was found."""
    return [] if limit is None else [_check(id, holds(found, limit), detail, found, limit)]


def _execution(quantized: QuantizedCheckpoint, options: QualityOptions) -> Execution:
    return Execution(
        activations=options.activations,
        device=options.device,
        static_layers=len(quantized.static),
        dynamic_layers=len(quantized.dynamic),
        float_layers=len(quantized.quantized) - len(quantized.static) - len(quantized.dynamic),
        dequantized_tensors=len(quantized.dequantized),
    )


def _seqlen(source: Checkpoint, options: QualityOptions) -> int:
    """Tokens of a window, held against the positions that the model knows."""
    most = source.text.get("max_position_embeddings") or source.text.get("n_positions")
    limit = most if isinstance(most, int) and most > 0 else None
    if options.seqlen is None:
        return min(DEFAULT_SEQLEN, limit or DEFAULT_SEQLEN)
    if limit is not None and options.seqlen > limit:
        raise UsageError(
            "--seqlen", found=options.seqlen, wanted=f"at most {limit:,}, the model's positions"
        )
    return options.seqlen


def _same_kind(source: Checkpoint, quantized: Checkpoint, text: Path) -> None:
    """Refuse files of models whose outputs cannot be compared."""
    names = [c.config.get("architectures") for c in (quantized, source)]
    if names[0] != names[1]:
        raise UnsupportedError(
            "the file is of another model than the source",
            path=quantized.path,
            found=str(names[0]),
            wanted=str(names[1]),
        )
    sample = read_text(text)[:TOKENIZED]
    one, other = (c.tokenizer(sample)["input_ids"] for c in (source, quantized))
    if one != other:
        raise UnsupportedError(
            "the file carries another tokenizer than the source", path=quantized.path
        )
