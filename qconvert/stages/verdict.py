"""What checks and figures of ``verify`` come to: whether a file is intact, and whether it is
good.
"""

from __future__ import annotations

import math

from qconvert.floors import (
    ALIKE_DISTANCE,
    BROKEN_EMBEDDINGS,
    BROKEN_TOKENS,
    Judged,
    expected_distance,
    expected_nats,
)
from qconvert.quantities import counted
from qconvert.report import Check, EmbeddingQuality, TokenQuality, Verdict, VerifyReport
from qconvert.report.verify import BROKEN, of_quality

FEW = 100  # tokens, or sentences, from which a blind guess can be told


def verdict_of(
    report: VerifyReport, judged: Judged | None, bits: float | None, *, text: bool
) -> Verdict:
    """The verdict on what a report has found.

    Args:
        judged: of the weights; None where there was nothing to hold them against.
        bits: per weight of the file.
        text: whether the models were to be run.
    """
    damaged = any(not of_quality(c) for c in report.failed)
    verdict = Verdict(intact=not damaged, bits_per_weight=bits)
    if report.against is None:
        verdict.unchecked.append("quality (no --against)")
        return verdict
    if not text:
        verdict.unchecked.append("perplexity (no --text)")
    if judged is None:
        return verdict
    if judged.figures:
        verdict.worst_db, verdict.worst_tensor = judged.figures[0]
    verdict.class_db = {of: db if math.isfinite(db) else None for of, db in judged.classes.items()}
    broken = [c for c in report.failed if c.id in BROKEN]
    poorer = [w for w in report.warnings if w.startswith(POORER)]
    if judged.poor:
        poorer.insert(0, f"{counted(len(judged.poor), 'tensor')}, first of all '{judged.poor[0]}'")
    verdict.reasons = [*_broken(judged, broken), *poorer]
    if broken:
        verdict.quality = "broken"
    elif poorer:
        verdict.quality = "poor"
    else:
        verdict.quality = "expected" if judged.figures else "lossless"
    return verdict


def _broken(judged: Judged, failed: list[Check]) -> list[str]:
    """Why a model is broken: weights before predictions, for they cause them."""
    found = []
    if judged.lost:
        found.append(f"the weights of {counted(len(judged.lost), 'tensor')} are lost")
    found += [str(b) for b in judged.broken]
    found += [c.detail for c in failed if c.id not in ("quality", "usable")]
    return found


POORER = "the text is predicted worse than expected"


def judge_tokens(q: TokenQuality, bits: float) -> tuple[Check, str | None]:
    """A language model by its divergence: the check of what is broken, and a warning about what is
    poorer than expected of so many bits per weight.
    """
    detail = "divergence of next tokens, as a share of a blind guess's"
    expected = expected_nats(bits)
    warning = None
    if not q.kl_mean <= expected:
        warning = (
            f"{POORER} of {bits:.1f} bits: the divergence of next tokens is {q.kl_mean:.2g} nats, "
            f"where at most {expected:g} are expected"
        )
    if q.tokens < FEW:
        return Check("predictions", "skip", f"{detail}: {q.tokens} tokens are too few"), warning
    share = q.kl_mean / q.kl_blind if q.kl_blind > 0 else 0.0
    good = share < BROKEN_TOKENS or q.kl_mean <= expected
    return _check(good, detail, share, BROKEN_TOKENS), warning


def judge_embeddings(q: EmbeddingQuality, bits: float) -> tuple[Check, str | None]:
    """The same of an encoder, by the distance of its embeddings."""
    detail = "squared distance of embeddings, as a share of a blind guess's"
    distance = 2 * (1 - q.cosine_mean)
    share = distance / q.spread if q.spread > 0 else 0.0
    alike, expected = distance <= ALIKE_DISTANCE, expected_distance(bits)
    warning = None
    if not (share <= expected or alike):
        warning = (
            f"{POORER} of {bits:.1f} bits: the mean cosine of embeddings is {q.cosine_mean:.4f}, "
            f"where {1 - expected * q.spread / 2:.3f} is expected"
        )
    if q.sentences < FEW:
        few = f"{detail}: {q.sentences} sentences are too few"
        return Check("predictions", "skip", few), warning
    return _check(share < BROKEN_EMBEDDINGS or alike, detail, share, BROKEN_EMBEDDINGS), warning


def _check(good: bool, detail: str, share: float, limit: float) -> Check:
    return Check("predictions", "pass" if good else "fail", detail, share, limit)
