"""How the range of a group of values is chosen: methods and search lists, as data.

formats/schemes/SPEC.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

RANGE_METHODS = ("minmax", "percentile", "mse")
DEFAULT_PERCENTILE = 99.99
MSE_BITS = 6  # widths up to this search by default: above, clipping gains less than 0.3 dB


@dataclass(frozen=True, slots=True)
class RangeMethod:
    """A method by name, with its percentile (in percent, 50 < p <= 100) where it has one."""

    name: str
    percentile: float = DEFAULT_PERCENTILE

    def describe(self) -> str:
        return f"percentile {self.percentile!r}" if self.name == "percentile" else self.name


def default_method(bits: int) -> RangeMethod:
    return RangeMethod("mse" if bits <= MSE_BITS else "minmax")


@dataclass(frozen=True, slots=True)
class SearchGrid:
    """Where the ``mse`` search of one width looks.

    Attributes:
        factors: of the minmax step (symmetric: of the largest magnitude's step, each with both
            signs below 8 bits): where the search begins. The first is the minmax range itself, so
            that weights which already lie on such a grid are restored.
        moves: relative changes of the winner's scale, up and down, one after the other; before
            each an asymmetric grid tries `ZERO_MOVE` either way.
    """

    factors: tuple[float, ...]
    moves: tuple[float, ...]

    @property
    def first(self) -> SearchGrid:
        """The minmax step alone."""
        return SearchGrid(self.factors[:1], ())


ZERO_MOVE = 0.25  # codes

# Fewer levels pay for more clipping, so the factors reach further down as the bits fall. Eleven or
# twelve candidates are tried at most widths: moving on from the best so far does as well as a fixed
# list of twice as many. tests/test_fitting.py holds the search to a brute-force optimum.
SYMMETRIC_GRIDS: dict[int, SearchGrid] = {
    2: SearchGrid((2 / 1, 1.0, 0.7), (0.25, 0.05)),
    3: SearchGrid((4 / 3, 1.0, 0.8), (0.1, 0.03)),
    4: SearchGrid((8 / 7, 1.0, 0.9), (0.06, 0.02)),
    5: SearchGrid((16 / 15, 1.0, 0.95, 0.9), (0.025, 0.01)),
    6: SearchGrid((32 / 31, 1.0, 0.95), (0.02, 0.008)),
    8: SearchGrid((1.0, 0.97), (0.012, 0.006)),
}
ASYMMETRIC_GRIDS: dict[int, SearchGrid] = {
    2: SearchGrid((1.0, 0.7), (0.08, 0.05)),
    3: SearchGrid((1.0, 0.86, 0.72), (0.07, 0.03)),
    4: SearchGrid((1.0, 0.78), (0.04, 0.02)),
    5: SearchGrid((1.0, 0.84), (0.025, 0.01)),
    6: SearchGrid((1.0, 0.9), (0.02, 0.008)),
    8: SearchGrid((1.0, 1.005, 0.99), (0.006, 0.003, 0.001)),
}


def search_grid(bits: int, symmetric: bool) -> SearchGrid:
    """Where the search of a width looks."""
    return (SYMMETRIC_GRIDS if symmetric else ASYMMETRIC_GRIDS)[bits]
