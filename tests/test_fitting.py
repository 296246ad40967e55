"""How scales and zero points are chosen: formats/schemes/SPEC.md section 5.

minmax and percentile are held to a plain-Python reading, the search to minmax and to brute force.
Codes and values of given parameters are tested in test_affine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.affine.streams import fit_stream
from qconvert.encoding import BITS, AffineEncoding
from qconvert.kernels import reference
from qconvert.kernels.arithmetic import to_groups
from qconvert.kernels.records import Parameters
from qconvert.kernels.reference import sums
from qconvert.ranges import RANGE_METHODS, RangeMethod, default_method
from qconvert.stages.parallel import Workers

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
MINMAX, MSE = RangeMethod("minmax"), RangeMethod("mse")
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
WIDTHS = pytest.mark.parametrize("bits", BITS)
WEIGHTS = pytest.mark.parametrize("name", oracle.DISTRIBUTIONS)


def block_encoding(bits: int, symmetric: bool, block: int, dtype: str = "F32") -> AffineEncoding:
    return AffineEncoding(bits, "block", block, symmetric, dtype, block)


def channel_encoding(bits: int, symmetric: bool, columns: int) -> AffineEncoding:
    return AffineEncoding(bits, "channel", 0, symmetric, "F32", columns)


def noise(x: F32, encoding: AffineEncoding, p: Parameters) -> F64:
    """Σ(x - x')² of each group; the codes are tested against the oracle elsewhere."""
    codes, _ = reference.encode(x, p.scale, p.zero, encoding.bits, encoding.symmetric)
    decoded = reference.decode(codes, p.scale, p.zero, encoding.bits, encoding.symmetric)
    error: F64 = x.astype(np.float64) - decoded
    return (error * error).sum(axis=1)


def stored(p: Parameters, encoding: AffineEncoding) -> list[tuple[float, int]]:
    """Scale and zero point as the specification counts them: signed at 8 bits."""
    signed = 128 if encoding.bits == 8 and not encoding.symmetric else 0
    return [(float(s), int(z) - signed) for s, z in zip(p.scale, p.zero, strict=True)]


def decibels(a: F64 | float, b: F64 | float) -> F64:
    return 10 * np.log10(np.asarray(a) / np.asarray(b))


# --- minmax and percentile ------------------------------------------------------------------------


@WIDTHS
@SYMMETRIES
@WEIGHTS
def test_minmax_equals_the_oracle(name: str, bits: int, symmetric: bool) -> None:
    x = oracle.draw(name, bits, 40, 33)
    x[::2, 5] = 0
    for dtype in ("F16", "BF16", "F32"):
        encoding = block_encoding(bits, symmetric, 32, dtype)
        rows, counts = to_groups(x, encoding.block)
        wanted = [
            oracle.minmax(part, bits, symmetric, dtype)
            for row in x.tolist()
            for part in (row[:32], row[32:])
        ]
        assert stored(kernels.fit(rows, encoding, MINMAX, counts), encoding) == wanted


@SYMMETRIES
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("percent", ["60", "75", "95", "99", "99.99", "100"])
def test_percentiles_are_nearest_ranks(percent: str, bits: int, symmetric: bool) -> None:
    method = RangeMethod("percentile", float(percent))
    for columns in (1, 7, 100, 130):
        x = oracle.draw("gaussian", columns, 30, columns)
        x[:10] = np.abs(x[:10])
        x[10:20] *= np.random.default_rng(columns).random((10, columns)) < 0.1  # mostly zeros
        encoding = block_encoding(bits, symmetric, 64)
        groups, counts = to_groups(x, encoding.block)
        wanted = [
            oracle.percentile(row[i : i + 64], percent, bits, symmetric, "F32")
            for row in x.tolist()
            for i in range(0, columns, 64)
        ]
        assert stored(kernels.fit(groups, encoding, method, counts), encoding) == wanted


@pytest.mark.parametrize("percent", [60.0, 99.0, 99.9, 99.99])
def test_percentiles_are_those_of_numpy(percent: float) -> None:
    x = oracle.draw("student", 4, 20, 1000)
    low, high = (
        np.percentile(a, percent, axis=1, method="inverted_cdf").astype(np.float32) for a in (-x, x)
    )
    encoding = channel_encoding(8, True, 1000)
    found = kernels.fit(x, encoding, RangeMethod("percentile", percent)).scale
    assert found.tolist() == (np.maximum(low, high) / np.float32(127)).tolist()


def test_percentile_of_mostly_zeros_falls_back_to_minmax() -> None:
    x = np.zeros((1, 100), np.float32)
    x[0, 7], x[0, 9] = 3.0, -1.0
    for symmetric in (True, False):
        encoding = channel_encoding(4, symmetric, 100)
        found = stored(kernels.fit(x, encoding, RangeMethod("percentile", 90)), encoding)
        assert found == [oracle.minmax(x[0].tolist(), 4, symmetric, "F32")]
        assert found[0][0] > 0


# --- least squared error --------------------------------------------------------------------------


def test_narrow_widths_search_and_wide_ones_do_not() -> None:
    assert {b: default_method(b).name for b in BITS} == {
        **dict.fromkeys((2, 3, 4, 5, 6), "mse"),
        8: "minmax",
    }


@WIDTHS
@SYMMETRIES
@WEIGHTS
def test_search_is_never_worse_than_minmax(name: str, bits: int, symmetric: bool) -> None:
    """Over a tensor; a single group may lose up to 4 dB, where minmax happens to fit it."""
    for block, dtype in ((32, "F16"), (64, "F32"), (256, "BF16" if bits <= 6 else "F32")):
        x = oracle.draw(name, 1, 300, block)
        encoding = block_encoding(bits, symmetric, block, dtype)
        searched, plain = (noise(x, encoding, kernels.fit(x, encoding, m)) for m in (MSE, MINMAX))
        assert searched.sum() <= plain.sum() * (1 + 1e-9)
        assert decibels(searched, plain).max() < 4.0


@pytest.mark.parametrize("bits", [2, 3, 4])
@SYMMETRIES
def test_search_comes_close_to_brute_force(bits: int, symmetric: bool) -> None:
    """The best of a dense grid of scales and all zero points, mean of 40 groups.

    Measured: 0.01 to 0.08 dB over all distributions, 0.27 dB for the worst (uniform, exponential).
    """
    means = []
    for name in oracle.DISTRIBUTIONS:
        for block in (32, 64):
            x = oracle.draw(name, 2, 40, block)
            encoding = block_encoding(bits, symmetric, block)
            found = noise(x, encoding, kernels.fit(x, encoding, MSE))
            best = brute_force(x, bits, symmetric)
            means.append(float(decibels(found, best).mean()))
    assert np.mean(means) < 0.15
    assert max(means) < 0.45


def brute_force(x: F32, bits: int, symmetric: bool) -> F64:
    half, n = 2 ** (bits - 1), 2**bits - 1
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    if symmetric:
        unit, factors = np.maximum(-low, high) / half, np.linspace(0.3, 1.2, 181)
        grids = [(s * t, half) for t in factors for s in (1, -1)]
    else:
        unit, factors = (high - low) / n, np.linspace(0.4, 1.15, 61)
        grids = [(t, z / 4) for t in factors for z in range(4 * n + 1)]
    best = np.full(len(x), np.inf)
    for t, zero in grids:
        step = (unit * t).astype(np.float32)[:, None]
        k = np.clip(np.rint(x / step + np.float32(zero)), 0, n) - np.float32(zero)
        error = x - k * step
        np.minimum(best, np.einsum("ij,ij->i", error, error, dtype=np.float64), out=best)
    return best


@WIDTHS
def test_weights_on_a_symmetric_grid_are_restored_by_the_search_too(bits: int) -> None:
    """Ternary weights at 2 bits; weights that were quantized before. minmax restores them."""
    top = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(-top, top + 1, (100, 32))
    codes[:, :2] = -top, top
    x = (codes * np.float32(0.37)).astype(np.float32)
    encoding = block_encoding(bits, True, 32)
    power = (x.astype(np.float64) ** 2).sum()
    for method in (MINMAX, MSE):
        left = noise(x, encoding, kernels.fit(x, encoding, method)).sum()
        assert left <= 1e-12 * power, f"{method.name}: {decibels(power, left):.1f} dB"


@WIDTHS
@SYMMETRIES
def test_search_takes_every_magnitude_of_weights(bits: int, symmetric: bool) -> None:
    """A factor of a power of two changes the scale by that factor and nothing else."""
    x = oracle.draw("gaussian", 9, 50, 32)
    encoding = channel_encoding(bits, symmetric, 32)
    plain = kernels.fit(x, encoding, MSE)
    for power in (-90, -40, 40, 100):
        scaled = kernels.fit(x * np.float32(2.0**power), encoding, MSE)
        assert scaled.zero.tolist() == plain.zero.tolist()
        assert scaled.scale.tolist() == (plain.scale.astype(np.float64) * 2.0**power).tolist()


@WIDTHS
@SYMMETRIES
def test_search_survives_weights_near_the_end_of_binary32(bits: int, symmetric: bool) -> None:
    x = np.clip(oracle.draw("gaussian", 3, 20, 32) * 1e38, -1.5e38, 1.5e38).astype(np.float32)
    encoding = channel_encoding(bits, symmetric, 32)
    found = kernels.fit(x, encoding, MSE)
    # Above 2^110 there is no search: its sums would overflow.
    assert stored(found, encoding) == [oracle.minmax(r, bits, symmetric, "F32") for r in x.tolist()]


@WIDTHS
@SYMMETRIES
def test_search_survives_denormal_weights(bits: int, symmetric: bool) -> None:
    x = np.zeros((4, 32), np.float32)
    x[0], x[1], x[2, :2], x[3, 0] = 2.0**-149, -(2.0**-140), (2.0**-148, -(2.0**-149)), 1e-38
    encoding = channel_encoding(bits, symmetric, 32)
    found = stored(kernels.fit(x, encoding, MSE), encoding)
    # Below 2^-100 there is no search.
    assert found == [oracle.minmax(row, bits, symmetric, "F32") for row in x.tolist()]


@WIDTHS
@SYMMETRIES
def test_search_of_a_padded_block_ignores_the_padding(bits: int, symmetric: bool) -> None:
    x = oracle.draw("far", 5, 20, 40)
    encoding = block_encoding(bits, symmetric, 64)
    groups, counts = to_groups(x, encoding.block)
    assert groups.shape == (20, 64)
    padded, whole = kernels.fit(groups, encoding, MSE, counts), kernels.fit(x, encoding, MSE)
    assert stored(padded, encoding) == stored(whole, encoding)


# --- groups that span tiles -----------------------------------------------------------------------


def cuts(x: F32, ends: list[int]) -> list[F32]:
    return [x[start:stop] for start, stop in pairwise([0, *ends, len(x)])]


def loads(pieces: list[F32]) -> list[Callable[[], F32]]:
    return [lambda piece=piece: piece for piece in pieces]


@pytest.mark.parametrize("bits", [2, 4, 8])
@SYMMETRIES
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_stream_has_the_parameters_of_the_whole_however_it_is_cut(
    method: str, bits: int, symmetric: bool
) -> None:
    rng = np.random.default_rng(12)
    how = RangeMethod(method, 99)
    sizes = [(n, s) for s in (257, 1000) for n in ("student", "shifted", "exponential")]
    for name, length in (*sizes, ("student", 70_000)):
        x = oracle.draw(name, length, 1, length)
        x[0, ::7] *= 1e3
        encoding = channel_encoding(bits, symmetric, length)
        wanted = stored(kernels.fit(x, encoding, how), encoding)
        some = sorted(rng.choice(np.arange(1, length // 256 + 1), length // 512 + 1, False))
        for ends in ([], [256], [256 * int(k) for k in some]):
            pieces = loads(cuts(x[0], ends))
            with Workers(3) as workers:
                for mapper in (map, workers.map):
                    found = fit_stream(pieces, encoding, how, None, mapper)
                    assert stored(found, encoding) == wanted, (length, name, ends)


@pytest.mark.parametrize("bits", [2, 8])
@SYMMETRIES
def test_a_stream_of_huge_values_has_the_minmax_range_on_any_thread(
    bits: int, symmetric: bool
) -> None:
    """What overflows on the way says nothing, neither here nor there."""
    x = np.float32(3e38) * np.sign(oracle.draw("gaussian", 1, 1, 1000))
    encoding = channel_encoding(bits, symmetric, 1000)
    wanted = stored(kernels.fit(x, encoding, MINMAX), encoding)
    with Workers(2) as workers:
        for mapper in (map, workers.map):
            found = fit_stream(loads(cuts(x[0], [256, 512])), encoding, MSE, None, mapper)
            assert stored(found, encoding) == wanted


@pytest.mark.parametrize("percent", [51.0, 90.0, 99.0, 99.99, 100.0])
@WEIGHTS
def test_percentiles_of_a_stream_are_those_of_numpy(name: str, percent: float) -> None:
    x = oracle.draw(name, 3, 1, 20_011)[0]
    high = np.percentile(x, percent, method="inverted_cdf")
    low = -np.percentile(-x, percent, method="inverted_cdf")
    for symmetric in (True, False):
        encoding = channel_encoding(8, symmetric, len(x))
        method = RangeMethod("percentile", percent)
        found = fit_stream(loads(cuts(x, [512, 4096])), encoding, method)
        ends = float(min(low, 0)), float(max(high, 0))
        assert stored(found, encoding) == [oracle.parameters(*ends, False, 8, symmetric, "F32")]


def test_percentiles_of_a_stream_order_signs_zeros_and_denormals() -> None:
    tiny = 2.0**-149
    x = np.array([-2.0, -1.0, -3 * tiny, -0.0, 0.0, tiny, 5 * tiny, 1.0, 1.0, 3.0], np.float32)
    for percent in (55.0, 60.0, 75.0, 85.0, 95.0, 100.0):
        for values in (x, -x, x[::-1].copy()):
            encoding = channel_encoding(4, True, 10)
            method = RangeMethod("percentile", percent)
            found = fit_stream(loads([values]), encoding, method)
            assert stored(found, encoding) == [
                oracle.percentile(values.tolist(), str(percent), 4, True, "F32")
            ]


def test_a_denormal_in_a_stream_is_not_a_zero() -> None:
    x = oracle.draw("gaussian", 1, 1, 1000)
    x[0, 5] = 1e-42
    encoding = channel_encoding(4, False, 1000)
    for method in (MINMAX, MSE, RangeMethod("percentile", 99)):
        whole = kernels.fit(x, encoding, method)
        assert whole.zero % 4 != 0, "the case must show the difference"
        found = fit_stream(loads([x[0]]), encoding, method)
        assert stored(found, encoding) == stored(whole, encoding), method


def test_parameters_do_not_depend_on_how_many_groups_are_fitted_at_once() -> None:
    x = oracle.draw("gaussian", 8, 5000, 32)  # more than one batch
    for bits, symmetric in ((4, True), (4, False)):
        encoding = block_encoding(bits, symmetric, 32, "F16")
        whole = stored(kernels.fit(x, encoding, MSE), encoding)
        parts = [
            p
            for i in range(0, 5000, 77)
            for p in stored(kernels.fit(x[i : i + 77], encoding, MSE), encoding)
        ]
        assert whole == parts


def test_sums_of_the_search_run_in_the_stated_order() -> None:
    """Σx·u of a group of 256 in binary32, lane by lane: section 6."""
    x = oracle.draw("gaussian", 6, 3, 200)
    inverse, offset = np.float32([3.0, 2.0, 1.5]), np.float32([7.5, 8.0, 6.25])
    su, suu, sxu = sums.code_sums(np.ascontiguousarray(x.T), inverse, offset, 0, 15, None)
    for g in range(3):
        codes, products = [], []
        for v in x[g].tolist():
            place = oracle.f32(oracle.f32(v * float(inverse[g])) + float(offset[g]))
            codes.append(oracle.clamp_rint(place, 0, 15))
            products.append(oracle.f32(v * codes[-1]))
        assert (su[g], suu[g]) == (sum(codes), sum(c * c for c in codes))
        assert sxu[g] == oracle.lane_sum(products, oracle.f32)
