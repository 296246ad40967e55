"""How the values of a tensor lie before and after quantization, for a picture."""

from __future__ import annotations

import numpy as np

from qconvert.codecs.codec import Stored
from qconvert.geometry import tiles
from qconvert.model import Model, TensorInfo
from qconvert.report import PairedHistogram

BINS = 64
MOST_DRAWN = 32  # values of a grid; of more the lines would be all that is seen


def paired_histogram(
    stored: Stored, source: Model, original: TensorInfo, columns: int
) -> PairedHistogram | None:
    """Counts of a tensor's first tile of values in the source and as stored, in the same bins.

    Args:
        columns: values of a row of the tensor as it is stored.

    Returns:
        None where no value is finite.
    """
    tile = next(tiles(original.size // columns, columns))
    after = stored.encoding.coded(stored, tile).values.ravel().astype(np.float64)
    before = np.asarray(source.values(original, tile.start, tile.stop), np.float64)
    good = np.isfinite(before) & np.isfinite(after)
    before, after = before[good], after[good]
    if not before.size:
        return None
    low = float(min(before.min(), after.min()))
    high = float(max(before.max(), after.max()))
    if high - low <= BINS * float(np.spacing(max(abs(low), abs(high)))):  # no room for bins
        low, high = low - 1, high + 1
    first, second = (
        np.histogram(values, BINS, (low, high))[0].tolist() for values in (before, after)
    )
    grid = np.unique(after)
    if len(grid) > MOST_DRAWN:
        grid = grid[[0, -1]]
    return PairedHistogram(low, high, first, second, grid.tolist())
