"""Whether a model is still one, by the SQNR of its tensors and, where a text was run, by what it
predicts.

*Lost.* Below `LOST_DB` the weights of a tensor are gone: at 6 dB the noise has half the amplitude
of the weights; other weights of the same size come to -3 dB, zeros to 0.

*Broken.* Below `USABLE_DB` are tensors of a class together (attention, MLP ...), those that are not
lost; models are known to stop working there. The best four levels for Gaussian numbers come to 9.3
dB (Max, Quantizing for Minimum Distortion, 1960): who has less has not even two bits of a scalar
quantizer. What was measured on both sides is in samples/measuring-quality.md: at 9.0 dB an encoder
of 23 M weights says of sentences no more than a blind guess, and a language model of 4 M, which
bears more than large ones do, has a perplexity of 14 to 22 % more; Q2_K, which is in use, has 11.5
dB. Embeddings bear 5 dB more than matrices: at 9.4 dB they alone cost a third to a fifth of what
others do.

*Expected.* Of codes of so many bits `expected_db` is 3 to 6 dB below the best scalar quantizer of a
Gaussian (9.3, 14.6, 20.2, 26.0 and 31.9 dB at 2 to 6 bits, Max again), and 2 dB or more below the
poorest matrix of the two models that do well at that width (every granularity of blocks and the
ggml types), 8 bits lower because scales of whole channels do well there. It is the same for all
classes: their medians under one scheme of blocks are within 1 dB.

*Outlying.* `OUTLIER_DB` below the median of its kind, the tensors of one role and one scheme, is
told: there is something about such a tensor.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qconvert.quantities import counted
from qconvert.remedies import taking
from qconvert.roles import place_of
from qconvert.tensor_classes import ATTENTION, EMBEDDING, HEAD, MLP, OTHER, class_of

LOST_DB = 6.0
USABLE_DB = {EMBEDDING: LOST_DB, HEAD: 9.5, ATTENTION: 9.5, MLP: 9.5, OTHER: 9.5}
OUTLIER_DB = 6.0
KIND = 4  # tensors that have a median worth the name
# By how much floors are lower for codes that make up for each other's errors: these give up weights
# for the output of the layer, 3 dB of them in the median of what was measured, 4 dB at most. Inputs
# that are strongly correlated cost up to 5.8 dB, for which no class is called broken.
COMPENSATED_DB = 4.0
COMPENSATED_CLASS_DB = 6.0
# The same for ggml's types that llama-quantize makes with an importance matrix alone: they come to
# 9.2 to 10.4 dB where their model has the divergence of one of 10.4 to 11.7 dB.
IMPORTANT = ("IQ1_", "IQ2_")
IMPORTANT_DB = 1.0
# The same for weights that give others' errors back as well: how far they are from their own is no
# loss; but they are to be nearer than zeros, which come to 0 dB.
REPAIRED_DB = LOST_DB

# By the bits of a code.
_EXPECTED = ((16, 45.0), (8, 30.0), (6, 26.0), (5, 20.0), (4, 15.0), (3, 10.0))

# What a text tells: above these shares a model is broken, where it is also worse than expected of
# its bits. They are shares of what a blind guess has, that knows how often each token is predicted,
# or the mean direction of all sentences. llama.cpp's table for LLaMA 3 8B
# (tools/perplexity/README.md) has 0.81 nats for IQ2_XXS, which people still use, and 1.39 for IQ1_M
# with a perplexity of four times the source's; a fifth of a blind guess's divergence is about a nat
# there. The sample model has 0.17 nats of 2.78 at q2_tensor and 0.82 at tq2_0.
BROKEN_TOKENS = 0.2
# all-MiniLM-L6-v2 has 0.39 at q3_channel (a cosine of 0.83), 0.62 at q4_tensor, 0.86 at q2_block64.
BROKEN_EMBEDDINGS = 0.5
# Nats at most that are expected of so many bits per weight of a file: one and a half times what the
# poorest file of LLaMA 3 8B has there (Q8_0 0.0014, Q6_K 0.0055, Q5_0 0.022, Q3_K_M 0.102 at
# 4.0 bits, Q2_K 0.445 at 3.2, IQ2_XXS 0.81) or more. Models that were trained on less lose less.
_EXPECTED_NATS = ((8, 0.005), (6, 0.01), (5, 0.035), (4, 0.15), (3, 0.67), (0, 1.2))
# Squared distance at most of embeddings from the source's, as a share of a blind guess's: twice
# what all-MiniLM-L6-v2 has at q8_channel (0.001) and q4_block64 (0.081), a quarter of that a bit.
# Below `ALIKE_DISTANCE` (a cosine of 0.99) embeddings are as good as any.
ALIKE_DISTANCE = 0.02
_EXPECTED_DISTANCE = ((8, 0.01), (6, 0.02), (5, 0.05), (4, 0.17), (0, BROKEN_EMBEDDINGS))


def expected_db(bits: float) -> float:
    """The SQNR in dB that a tensor should at least have whose codes have so many bits."""
    return next((floor for least, floor in _EXPECTED if bits >= least), LOST_DB)


def expected_nats(bits: float) -> float:
    """The divergence of next tokens at most that a file of so many bits per weight should have."""
    return next(most for least, most in _EXPECTED_NATS if bits >= least)


def expected_distance(bits: float) -> float:
    """The same of the squared distance of embeddings, as a share of a blind guess's."""
    return next(most for least, most in _EXPECTED_DISTANCE if bits >= least)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a tensor has lost.

    Attributes:
        stored: what it is stored as, for people.
        bits: of a code; of a block type with all that the block stores.
        sqnr_db: in dB; None for no loss.
        weights: how many there are.
        compensated: whether its codes make up for each other's errors.
        repaired: whether they stand for other weights, which make up for what was lost elsewhere.
    """

    name: str
    stored: str
    bits: float
    sqnr_db: float | None
    weights: int = 1
    compensated: bool = False
    repaired: bool = False

    @property
    def allowance_db(self) -> float:
        """How much lower its floors are."""
        if self.repaired:
            return REPAIRED_DB
        return COMPENSATED_DB if self.compensated else 0.0

    @property
    def class_db(self) -> float:
        """What it counts for among the tensors of its class; infinite without a loss."""
        if self.sqnr_db is None:
            return math.inf
        if self.compensated:
            return self.sqnr_db + COMPENSATED_CLASS_DB
        return self.sqnr_db + IMPORTANT_DB * self.stored.startswith(IMPORTANT)


@dataclass(frozen=True, slots=True)
class BrokenClass:
    """A class of tensors that together have lost too much.

    Attributes:
        name: see `class_of`.
        sqnr_db: of all of them, weighed by their sizes, with what is allowed to single ones added.
        tensors: names of those below the floor, the poorest first.
        count: of all that were measured.
    """

    name: str
    sqnr_db: float
    tensors: list[str]
    count: int

    @property
    def floor_db(self) -> float:
        return USABLE_DB[self.name]

    def __str__(self) -> str:
        return (
            f"{self.name} {'keep' if self.name.endswith('s') else 'keeps'} {self.sqnr_db:.1f} dB, "
            f"and models are known to stop working below {self.floor_db:.1f} dB"
        )


@dataclass(frozen=True, slots=True)
class Outlier:
    """A tensor that has lost more than those like it.

    Attributes:
        role: what they all do, and ``stored`` what they are all stored as.
        median_db: of the ``count`` of them.
    """

    name: str
    sqnr_db: float
    role: str
    stored: str
    median_db: float
    count: int

    def __str__(self) -> str:
        return (
            f"'{self.name}' has {self.sqnr_db:.1f} dB, {self.median_db - self.sqnr_db:.1f} dB less "
            f"than the median of the {self.count} tensors '{self.role}' as {self.stored}"
        )


@dataclass(frozen=True, slots=True)
class Judged:
    """Tensors held against all floors.

    Attributes:
        figures: SQNR in dB and name of every tensor that lost anything, the poorest first.
        lost: names of those whose weights are gone, the poorest first.
        classes: SQNR of each class of tensors together, in dB; `rest` without those that are lost.
        broken: classes that are below their floor, the poorest first.
        poor: names of tensors that are not lost and still do worse than their width should.
        warning: about those that are not told of as broken.
        outliers: the farthest from their kind first.
    """

    figures: list[tuple[float, str]]
    lost: list[str]
    classes: dict[str, float]
    rest: dict[str, float]
    broken: list[BrokenClass]
    poor: list[str]
    warning: str | None
    outliers: list[Outlier]


def judge(tensors: Iterable[Measured], remedy: Callable[[str, float], str] | None = None) -> Judged:
    """Hold tensors against the floors.

    Args:
        tensors: all that may be judged together, those without a loss too.
        remedy: the option of `quantize` that gives a tensor, by its name, so many dB.
    """
    found = list(tensors)
    lossy = sorted(
        ((t.sqnr_db, t) for t in found if t.sqnr_db is not None), key=lambda f: (f[0], f[1].name)
    )
    lost = [t.name for db, t in lossy if db + t.allowance_db < LOST_DB]
    judged = [(db, t) for db, t in lossy if not t.repaired]
    gone = set(lost)  # each is told of by itself
    rest = _classes([t for t in found if not t.repaired and t.name not in gone])
    broken = _broken([t for _, t in judged if t.name not in gone], rest)
    told = {name for b in broken for name in b.tensors} | gone
    poor = [
        (db, t)
        for db, t in judged
        if t.name not in told and db + t.allowance_db < expected_db(t.bits)
    ]
    return Judged(
        [(db, t.name) for db, t in lossy],
        lost,
        _classes([t for t in found if not t.repaired]),
        rest,
        broken,
        [t.name for _, t in poor],
        _poorer(poor, remedy) if poor else None,
        _outliers(judged),
    )


def _classes(tensors: Sequence[Measured]) -> dict[str, float]:
    """SQNR of each class in dB: of the mean relative error, weighed by the sizes of tensors."""
    errors: dict[str, float] = {}
    weights: dict[str, int] = {}
    for t in tensors:
        of = class_of(t.name)
        noise = 10 ** (-max(t.class_db, -1000.0) / 10)  # which has to be a number
        errors[of] = errors.get(of, 0.0) + t.weights * noise
        weights[of] = weights.get(of, 0) + t.weights
    return {
        of: 10 * math.log10(weights[of] / error) if error else math.inf
        for of, error in errors.items()
    }


def _broken(lossy: Sequence[Measured], classes: dict[str, float]) -> list[BrokenClass]:
    """Classes below their floor, the poorest first."""
    found = []
    for of, db in sorted(classes.items(), key=lambda item: item[1]):
        if db < USABLE_DB[of]:
            own = [t for t in lossy if class_of(t.name) == of]
            below = [t.name for t in own if t.class_db < USABLE_DB[of]]
            found.append(BrokenClass(of, db, below, len(own)))
    return found


def _poorer(
    poor: Sequence[tuple[float, Measured]], remedy: Callable[[str, float], str] | None
) -> str:
    """A warning about tensors that do worse than their width should."""
    db, worst = poor[0]
    which = f"{counted(len(poor), 'tensor')} {'is' if len(poor) == 1 else 'are'}"
    expected = expected_db(worst.bits)
    option = remedy(worst.name, expected) if remedy else taking(worst.name, "NAME")
    return (
        f"{which} poorer than so many bits should be: '{worst.name}' has {db:.1f} dB as "
        f"{worst.stored}, where {expected - worst.allowance_db:.0f} dB are expected; quantize "
        f"again with {option}"
    )


def _outliers(lossy: Sequence[tuple[float, Measured]]) -> list[Outlier]:
    """Tensors that are `OUTLIER_DB` or more below the median of their kind."""
    kinds: dict[tuple[str, str], list[tuple[float, Measured]]] = {}
    for db, t in lossy:
        kinds.setdefault((place_of(t.name).role, t.stored), []).append((db, t))
    found = []
    for (role, stored), of in kinds.items():
        median = statistics.median(db for db, _ in of)
        if len(of) >= KIND and math.isfinite(median):
            found += [
                Outlier(t.name, db, role, stored, median, len(of))
                for db, t in of
                if median - db >= OUTLIER_DB
            ]
    return sorted(found, key=lambda o: (o.sqnr_db - o.median_db, o.name))
