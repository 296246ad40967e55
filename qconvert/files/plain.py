"""Values of plain dtypes, from the stored bytes of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from qconvert.kernels import widen
from qconvert.model import DTYPES

UNIT = 4  # values of less than 8 bits that begin and end on a byte


def plain_values(
    read: Callable[[int, int], bytes], dtype: str, size: int, start: int, stop: int
) -> NDArray[Any]:
    """Values ``start..stop`` of a tensor of ``size`` values in ``dtype``; see `Model.values`.

    Args:
        read: gives the tensor's bytes from an offset on, so many.
    """
    kind = DTYPES[dtype]
    if kind.bits >= 8:
        return widen(read(start * kind.size, (stop - start) * kind.size), dtype)
    first, last = start // UNIT * UNIT, min(-(-stop // UNIT) * UNIT, size)
    offset = kind.nbytes(first)
    return widen(read(offset, kind.nbytes(last) - offset), dtype)[start - first : stop - first]
