"""What is left of a tensor, judged by its SQNR: below `LOST_DB` the weights are gone, below
`expected_db` a width has done worse than it should.

At 6 dB the noise has half the amplitude of the weights; other weights of the same size come to
-3 dB, zeros to 0. What is expected lies 3 to 6 dB below the best scalar quantizer of a Gaussian
(9.3, 14.6, 20.2, 26.0 and 31.9 dB at 2 to 6 bits: Max, Quantizing for Minimum Distortion, 1960),
and 2 dB or more below the poorest matrix of two models that do well at that width (a language model
of 4 M weights, an encoder of 23 M; every granularity of blocks and the ggml types), 8 bits lower
because scales of whole channels do well there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LOST_DB = 6.0
# By how much both floors are lower for codes that make up for each other's errors: these give up
# weights for the output of the layer, 2 to 3 dB of them in what was measured.
COMPENSATED_DB = 4.0
# The same for weights that give others' errors back as well: how far they are from their own is no
# loss; but they are to be nearer than zeros, which come to 0 dB.
REPAIRED_DB = LOST_DB

# By the bits of a code.
_EXPECTED = ((16, 45.0), (8, 30.0), (6, 26.0), (5, 20.0), (4, 15.0), (3, 10.0))


def expected_db(bits: float) -> float:
    """The SQNR in dB that a tensor should at least have whose codes have so many bits."""
    return next((floor for least, floor in _EXPECTED if bits >= least), LOST_DB)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a tensor has lost.

    Attributes:
        stored: what it is stored as, for people.
        bits: of a code; of a block type with all that the block stores.
        sqnr_db: in dB; None for no loss.
        compensated: whether its codes make up for each other's errors.
        repaired: whether they stand for other weights, which make up for what was lost elsewhere.
    """

    name: str
    stored: str
    bits: float
    sqnr_db: float | None
    compensated: bool = False
    repaired: bool = False

    @property
    def allowance_db(self) -> float:
        """How much lower its floors are."""
        if self.repaired:
            return REPAIRED_DB
        return COMPENSATED_DB if self.compensated else 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """Tensors held against both floors.

    Attributes:
        figures: SQNR in dB and name of every tensor that lost anything, the poorest first.
        lost: names of those whose weights are gone, the poorest first.
        warning: about those that are not lost and still do worse than their width should.
    """

    figures: list[tuple[float, str]]
    lost: list[str]
    warning: str | None


def judge(tensors: Iterable[Measured]) -> Judged:
    """Hold tensors against the floors."""
    lossy = [(t.sqnr_db, t) for t in tensors if t.sqnr_db is not None]
    found = sorted(lossy, key=lambda f: (f[0], f[1].name))
    judged = [(db, t) for db, t in found if not t.repaired]
    poor = [(db, t) for db, t in judged if LOST_DB <= db + t.allowance_db < expected_db(t.bits)]
    warning = None
    if poor:
        db, worst = poor[0]
        which = "1 tensor is" if len(poor) == 1 else f"{len(poor)} tensors are"
        warning = (
            f"{which} poorer than so many bits should be: '{worst.name}' has {db:.1f} dB as "
            f"{worst.stored}, where {expected_db(worst.bits) - worst.allowance_db:.0f} dB are "
            f"expected; try smaller "
            f"blocks or more bits, --tensor-scheme '{worst.name}=NAME'"
        )
    lost = [t.name for db, t in found if db + t.allowance_db < LOST_DB]
    return Judged([(db, t.name) for db, t in found], lost, warning)
