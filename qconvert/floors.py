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

from qconvert.model import DTYPES
from qconvert.schemes import SCHEMES, AffineScheme, CastScheme, GgmlScheme

LOST_DB = 6.0

# By the bits of a code.
_EXPECTED = ((16, 45.0), (8, 30.0), (6, 26.0), (5, 20.0), (4, 15.0), (3, 10.0))


def expected_db(stored: str) -> float:
    """The SQNR in dB that a tensor stored as this scheme, ggml type or dtype should at least have;
    `LOST_DB` for what is none of them.
    """
    return next((floor for bits, floor in _EXPECTED if width >= bits), LOST_DB)


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


def judge(tensors: Iterable[tuple[str, str, float | None]]) -> Judged:
    """Hold tensors against the floors: name, what it is stored as, and SQNR in dB, None for no
    loss.
    """
    found = sorted((db, name, stored) for name, stored, db in tensors if db is not None)
    poor = [f for f in found if LOST_DB <= f[0] < expected_db(f[2])]
    warning = None
    if poor:
        db, name, stored = poor[0]
        which = "1 tensor is" if len(poor) == 1 else f"{len(poor)} tensors are"
        warning = (
            f"{which} poorer than so many bits should be: '{name}' has {db:.1f} dB as {stored}, "
            f"where {expected_db(stored):.0f} dB are expected; try smaller blocks or more bits, "
            f"--tensor-scheme '{name}=NAME'"
        )
    lost = [name for db, name, _ in found if db < LOST_DB]
    return Judged([(db, name) for db, name, _ in found], lost, warning)
