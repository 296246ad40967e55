"""Prints how long compensated rounding of one layer takes, step by step, with what it computes.

    python tests/make_rounding.py [--size 4096] [--threads 2]

The layer is made up: weights, inputs with correlated channels and gradients with correlated rows,
of SIZE outputs and inputs. Codes are those of 4 bits in blocks of 16, whose scales change too.
Counted are the multiplications and additions that the definition asks for at least: those of
columns, slopes and rows together, and not those of codes that change, whose number is not known.
Seconds are those of a clock and, in brackets, of the processors for all threads: on a busy
machine only the second mean anything.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from qconvert import kernels
from qconvert.codecs.compensation import Rounder, prepared, shares_of
from qconvert.kernels.records import F32, CodeGrid
from qconvert.stages.parallel import Workers

BLOCK = 16


def correlated(seed: int, rows: int, columns: int) -> F32:
    """Rows whose numbers have something to do with each other, and other sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, 256), np.float32) @ (
        rng.standard_normal((256, columns), np.float32) / np.float32(16)
    )
    mixed += rng.standard_normal((rows, columns), np.float32)
    found: F32 = mixed * np.exp(rng.standard_normal(columns) / 2).astype(np.float32)
    return found


def moments(seed: int, size: int) -> NDArray[np.float64]:
    rows = correlated(seed, 2 * size, size)
    return (rows.T @ rows).astype(np.float64)


@contextmanager
def timed(what: str, operations: float) -> Iterator[None]:
    """Print what the block took."""
    wall, used = time.perf_counter(), time.process_time()
    yield
    wall, used = time.perf_counter() - wall, time.process_time() - used
    told = f"{what:32} {wall:7.2f} s ({used:6.2f} s)"
    print(f"{told}  {operations / wall / 1e9:6.1f} GFLOP/s ({operations / used / 1e9:.1f})")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    n = given.size
    gram, output = moments(1, n), moments(2, n)
    x = np.random.default_rng(3).standard_normal((n, n), np.float32) / np.float32(50)
    levels = np.arange(-8, 8, dtype=np.float32)
    scale = (np.abs(x).reshape(n, -1, BLOCK).max(axis=2) / 7.5).astype(np.float16)
    grid = CodeGrid(
        levels, scale.astype(np.float32), *np.zeros((2, *scale.shape), np.float32), BLOCK
    )
    steps = np.clip(x / np.repeat(grid.scale, BLOCK, 1) + 8, 0, 15)
    codes = np.rint(steps).astype(np.uint8)
    print(f"{n} x {n}, {given.threads} threads, kernels: {kernels.describe()}")
    cube = float(n) ** 3
    with threadpool_limits(1, "blas"), Workers(given.threads) as workers:
        with timed("factors, one thread", cube / 3):
            factors = prepared(gram)
        shares = shares_of(output)
        alone = Rounder(lambda: factors)
        step = max(n // (4 * given.threads), 128)
        runs = [slice(first, first + step) for first in range(0, n, step)]

        def some(rows: slice) -> None:
            numbers = grid.scale[rows], grid.zero[rows], grid.offset[rows]
            alone.codes(x[rows], codes[rows], CodeGrid(levels, *numbers, BLOCK), "F16")

        with timed("each row by itself", 3 * cube):
            list(workers.map(some, runs))
        together = Rounder(lambda: factors, shares=lambda: shares, mapper=workers.map)
        with timed("that, and then rows together", 7 * cube):
            together.codes(x, codes, grid, "F16")


if __name__ == "__main__":
    main()
