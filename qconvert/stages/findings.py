"""What stands out in a model's weights, as sentences with what to do.

The thresholds were held against two models that quantize well, tiny-llama and all-MiniLM-L6-v2, of
which the second has real outliers, and against tiny-llama with channels rescaled by 16, which does
not. What each says is in one place: a healthy model has no findings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qconvert.errors import printable
from qconvert.floors import USABLE_DB, expected_db
from qconvert.quantities import counted
from qconvert.remedies import keeping, taking
from qconvert.report import ChannelSummary, Finding, TensorSummary
from qconvert.schemes import AffineScheme, Scheme
from qconvert.tensor_classes import MLP, class_of

# A channel this much louder than the median one takes two bits from what shares its scale. Healthy
# matrices come to 3.7, one of MiniLM to 5.0; those with channels that were rescaled by 16 to 15.
LOUD_CHANNEL = 4.0
# The same of single weights, by the largest of a channel: three bits. Healthy matrices come to 7.5,
# the outliers of MiniLM to 11.5 and more.
WIDE_CHANNEL = 8.0
# A Gaussian has 3, a Laplacian 6; healthy matrices come to 8.3, the outliers of MiniLM to 16.
HEAVY_KURTOSIS = 10.0
# Half of the weights 0 with 8 bits and one scale: what has no outliers comes to 9 %.
NEAR_ZERO_SHARE = 0.5
# One channel in a thousand: a row of an embedding that no token uses is no finding.
DEAD_SHARE = 1e-3
# Blocks outside of dead rows: weights that were trained have none.
CONSTANT_SHARE = 1e-3
NAMED = 3  # tensors of a sentence


@dataclass(frozen=True, slots=True)
class _Rule:
    """One kind of finding.

    Attributes:
        figure: what is measured of a tensor; None where it is not concerned.
        what: after the number of tensors, singular and plural.
        unit: a figure in words.
        advice: what to do; ``{keep}`` and ``{q8}`` are options for the worst tensor.
        rising: whether larger figures are worse.
    """

    kind: str
    figure: Callable[[TensorSummary], float | None]
    what: tuple[str, str]
    unit: Callable[[float], str]
    advice: str
    rising: bool = True


def findings_of(rows: Sequence[TensorSummary], scheme: Scheme) -> list[Finding]:
    """What stands out among tensors whose statistics were taken."""
    found = []
    for rule in (*_RULES, *_of_scheme(scheme)):
        figures = ((rule.figure(t), t) for t in rows)
        hits = [(f, t) for f, t in figures if f is not None]
        if hits:
            hits.sort(key=lambda hit: (-hit[0] if rule.rising else hit[0], hit[1].name))
            found.append(_finding(rule, hits))
    return found


def _finding(rule: _Rule, hits: Sequence[tuple[float, TensorSummary]]) -> Finding:
    worst = hits[0][1]
    which = counted(len(hits), "tensor")
    named = ", ".join(f"{printable(t.name)} ({rule.unit(f)})" for f, t in hits[:NAMED])
    more = f" and {len(hits) - NAMED:,} more" if len(hits) > NAMED else ""
    what = rule.what[len(hits) > 1]
    return Finding(
        rule.kind,
        [t.name for _, t in hits],
        [f for f, _ in hits],
        f"{which} {what}: {named}{more}",
        rule.advice.format(
            keep=printable(keeping(worst.name)), q8=printable(taking(worst.name, "q8_block32"))
        ),
    )


def _times(figure: float) -> str:
    return f"{figure:.3g} times the median's"


def _largest(
    of: Callable[[ChannelSummary], float | None], least: float
) -> Callable[[TensorSummary], float | None]:
    """The larger ratio of rows and columns, where it reaches ``least``."""

    def figure(t: TensorSummary) -> float | None:
        found = max((of(c) or 0.0 for c in (t.rows, t.columns) if c), default=0.0)
        return found if found >= least else None

    return figure


_loud = _largest(lambda c: c.rms_ratio, LOUD_CHANNEL)
_wide = _largest(lambda c: c.absmax_ratio, WIDE_CHANNEL)


def _single_weights(t: TensorSummary) -> float | None:
    return None if _loud(t) else _wide(t)


def _kurtosis(t: TensorSummary) -> float | None:
    if t.rows is None or t.kurtosis is None:
        return None
    return t.kurtosis if t.kurtosis >= HEAVY_KURTOSIS else None


def _near_zero(t: TensorSummary) -> float | None:
    if t.rows is None or t.near_zero_share is None:
        return None
    return t.near_zero_share if t.near_zero_share >= NEAR_ZERO_SHARE else None


def _dead(t: TensorSummary) -> float | None:
    found = [c.dead for c in (t.rows, t.columns) if c and c.dead >= DEAD_SHARE * c.count]
    return max(found, default=0) or None


def _constant(t: TensorSummary) -> float | None:
    if not t.blocks or t.constant_blocks is None or t.rows is None:
        return None
    alive = t.constant_blocks - t.rows.dead * t.blocks // t.rows.count
    return alive / t.blocks if alive >= CONSTANT_SHARE * t.blocks else None


def _nonfinite(t: TensorSummary) -> float | None:
    return t.nonfinite or None


def _of_scheme(scheme: Scheme) -> list[_Rule]:
    """What speaks of the scheme that was asked for."""
    if not isinstance(scheme, AffineScheme):
        return []
    expected = expected_db(scheme.bits)

    def poor(t: TensorSummary) -> float | None:
        floor = max(expected, USABLE_DB[class_of(t.name)])
        return t.sqnr_db if t.sqnr_db is not None and t.sqnr_db < floor else None

    return [
        _Rule(
            "poor-scheme",
            poor,
            (f"would be poor as {scheme.name}, below {max(expected, USABLE_DB[MLP]):g} dB",) * 2,
            lambda db: f"{db:.1f} dB",
            "give what is poor more bits or smaller blocks, such as {q8}, or take smaller blocks "
            "for all",
            rising=False,
        )
    ]


_RULES = (
    _Rule(
        "nonfinite",
        _nonfinite,
        ("has NaN or Inf", "have NaN or Inf"),
        lambda n: f"{n:,.0f} values",
        "quantize refuses such weights: mend the source, or keep the tensor with {keep}",
    ),
    _Rule(
        "outlier-channels",
        _loud,
        ("has an outlier channel", "have outlier channels"),
        _times,
        "quantize rescales such channels where another tensor can take the factor (--equalise "
        "auto); where none can, give rows or blocks scales of their own, q8_channel or c4_block16, "
        "rather than the whole tensor one, and weigh errors with --calibration",
    ),
    _Rule(
        "outlier-weights",
        _single_weights,
        ("has single weights far out", "have single weights far out"),
        _times,
        "what shares a scale with them loses bits: take small blocks (c4_block16, q4_block32), not "
        "a scale for a row or tensor, or {q8}",
    ),
    _Rule(
        "heavy-tails",
        _kurtosis,
        (
            "has heavy tails, a Gaussian's kurtosis is 3",
            "have heavy tails, a Gaussian's kurtosis is 3",
        ),
        lambda k: f"kurtosis {k:,.0f}",
        "ranges of least squared error clip such tails: the default up to 6 bits; for 8 bits say "
        "--range mse",
    ),
    _Rule(
        "near-zero",
        _near_zero,
        ("is mostly near 0", "are mostly near 0"),
        lambda s: f"{100 * s:.0f} % below 1/254 of the largest",
        "no scale for a whole tensor can hold both: take scales of blocks or channels",
    ),
    _Rule(
        "dead-channels",
        _dead,
        ("has dead rows or columns", "have dead rows or columns"),
        lambda n: f"{n:,.0f} of them",
        "zeros cost as many bits as weights: prune them where the model is made, or make sure that "
        "nothing went missing",
    ),
    _Rule(
        "constant-blocks",
        _constant,
        ("has blocks of equal values", "have blocks of equal values"),
        lambda s: f"{100 * s:.2g} % of blocks",
        "trained weights have none: look whether the tensor was filled, cut or damaged",
    ),
)
