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
    """Candidates of the ``mse`` search.

    Attributes:
        symmetric: factors of the largest magnitude's step, each tried with both signs below 8 bits.
        asymmetric: factors of the step that spans the range.
        shifts: displacements of the grid's middle, in steps of the whole range.
    """

    symmetric: tuple[float, ...]
    asymmetric: tuple[float, ...]
    shifts: tuple[float, ...]

    @property
    def first(self) -> SearchGrid:
        """The minmax step alone."""
        return SearchGrid(self.symmetric[:1], self.asymmetric[:1], (0.0,))


def _factors(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


def _minmax_factor(bits: int) -> float:
    """The minmax step of a symmetric grid, in units of amax / 2^(b-1) (amax / 127 at 8 bits)."""
    half = 1 << (bits - 1)
    return 1.0 if bits == 8 else half / (half - 1)


# Fewer levels pay for more clipping, so the range of factors widens as the bits fall. Lists of
# twice this length gain less than 0.1 dB on the weights of all-MiniLM-L6-v2 (tests/test_fitting.py
# holds the search to a brute-force optimum).
# The first factor is that of the minmax range, so that weights which already lie on such a grid are
# restored.
SEARCH_GRIDS: dict[int, SearchGrid] = {
    bits: SearchGrid(
        (_minmax_factor(bits), *_factors(*sym)), (1.0, *_factors(*asym)), (-0.25, 0.0, 0.25)
    )
    for bits, sym, asym in (
        (2, (1.0, 0.40, 8), (1.10, 0.40, 5)),
        (3, (1.0, 0.50, 8), (1.08, 0.50, 5)),
        (4, (1.02, 0.60, 8), (1.05, 0.62, 5)),
        (5, (1.02, 0.70, 8), (1.04, 0.72, 5)),
        (6, (1.02, 0.80, 8), (1.03, 0.85, 5)),
        (8, (1.01, 0.93, 8), (1.01, 0.95, 7)),
    )
}
