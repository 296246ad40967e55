"""Statistics of tensors against exact arithmetic, and the order of every sum bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import reduce

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from qconvert import kernels
from qconvert.codecs.statistics import TensorStatistics, merge, observe
from qconvert.encoding import BITS, AffineEncoding
from qconvert.kernels.arithmetic import lane_sum
from qconvert.kernels.bins import bin_centres
from qconvert.kernels.reference import sums

NAMES = pytest.mark.parametrize("name", oracle.DISTRIBUTIONS)


def exact_moments(x: NDArray[np.floating]) -> tuple[float, float, float, float]:
    """Mean, population standard deviation, skewness and kurtosis; rounded once, at the end."""
    values = [Fraction(float(v)) for v in x.ravel()]
    mean = sum(values) / len(values)
    m2, m3, m4 = (sum((v - mean) ** k for v in values) / len(values) for k in (2, 3, 4))
    std = math.sqrt(m2)
    return float(mean), std, float(m3 / m2) / std, float(m4 / m2**2)


def check_moments(s: TensorStatistics, x: NDArray[np.floating], rel: float) -> None:
    mean, std, skewness, kurtosis = exact_moments(x)
    assert s.mean == pytest.approx(mean, rel=1e-14, abs=1e-14 * std)
    assert s.std == pytest.approx(std, rel=rel)
    assert s.skewness == pytest.approx(skewness, rel=rel, abs=rel)
    assert s.kurtosis == pytest.approx(kurtosis, rel=rel)


# --- moments --------------------------------------------------------------------------------------


@NAMES
def test_moments_equal_exact_arithmetic(name: str) -> None:
    x = oracle.draw(name, 1, 1, 3001)[0]
    s = observe(x)
    check_moments(s, x, 1e-12)
    assert (s.minimum, s.maximum, s.size) == (min(x.tolist()), max(x.tolist()), 3001)
    assert s.absmax == max(abs(v) for v in x.tolist())


@pytest.mark.parametrize("offset", [1e4, -1e6, 1e9])
def test_moments_survive_a_large_offset(offset: float) -> None:
    x = oracle.draw("exponential", 2, 1, 2000)[0].astype(np.float64) + offset
    # What the mean loses by rounding, seen from the spread, is what the others may lose.
    check_moments(observe(x), x, max(1e-11, abs(offset) * 2.0**-49))


@NAMES
@pytest.mark.parametrize("cut", [7, 1000])
def test_merged_tiles_have_the_statistics_of_the_whole(name: str, cut: int) -> None:
    x = oracle.draw(name, 3, 1, 2500)[0]
    x[::50] = 0
    x[1700:1710] = np.nan
    parts = [observe(x[i : i + cut], i) for i in range(0, len(x), cut)]
    merged, whole = reduce(merge, parts), observe(x)
    check_moments(merged, x[np.isfinite(x)], 1e-11)
    for key in ("size", "nonfinite", "first_nonfinite", "zeros", "minimum", "maximum"):
        assert getattr(merged, key) == getattr(whole, key), key
    assert (merged.histogram == whole.histogram).all()
    assert merged.outlier_share == pytest.approx(whole.outlier_share)


def test_merging_tiles_of_very_different_means_loses_nothing() -> None:
    x = np.concatenate([oracle.draw("gaussian", k, 1, 300)[0] + 1000 * k for k in range(5)])
    check_moments(reduce(merge, [observe(x[i : i + 300]) for i in range(0, 1500, 300)]), x, 1e-11)


def test_equal_values_have_neither_skewness_nor_kurtosis() -> None:
    s = observe(np.full(100, 2.5, np.float32))
    assert (s.mean, s.std, s.skewness, s.kurtosis, s.outlier_share) == (2.5, 0, None, None, None)


@pytest.mark.parametrize("magnitude", [1e-300, 1e-120, 1e-90, 1e70, 1e90, 1e200])
def test_statistics_of_binary64_values_of_any_magnitude_neither_warn_nor_fail(
    magnitude: float,
) -> None:
    s = observe(np.array([1.0, -2.0, 3.0, 5.0]) * magnitude)
    figures = (s.mean, s.std, s.skewness, s.kurtosis, s.outlier_share)
    assert s.absmax == 5 * magnitude
    assert all(v is None or math.isfinite(v) for v in figures)


def test_extreme_binary32_values_have_finite_statistics() -> None:
    for values in ([3.4e38, -3.4e38, 1e38], [1e-45, -3e-45, 2e-44]):
        x = np.array(values * 10, np.float32)
        check_moments(observe(x), x, 1e-12)


# --- counts ---------------------------------------------------------------------------------------


def test_nonfinite_values_are_counted_and_the_first_is_found() -> None:
    x = oracle.draw("gaussian", 5, 1, 1000)[0]
    x[[317, 400, 999]] = np.inf, np.nan, -np.inf
    s = observe(x, 5000)
    assert (s.size, s.nonfinite, s.first_nonfinite) == (1000, 3, 5317)
    check_moments(s, x[np.isfinite(x)], 1e-12)
    assert observe(x[:300], 5000).first_nonfinite is None


def test_a_tensor_without_a_finite_value_has_counts_alone() -> None:
    s = merge(observe(np.full(3, np.nan, np.float32), 0), observe(np.full(2, np.inf), 3))
    assert (s.size, s.nonfinite, s.first_nonfinite, s.zeros) == (5, 5, 0, 0)
    figures = (s.minimum, s.maximum, s.absmax, s.mean, s.std, s.skewness, s.kurtosis, s.moments)
    assert figures == (None,) * 8
    assert s.outlier_share is None
    assert merge(s, observe(np.ones(4, np.float32))).mean == 1


def test_both_zeros_count_as_zeros_and_denormals_do_not() -> None:
    assert observe(np.array([0.0, -0.0, 1e-45, 1.0], np.float32)).zeros == 2


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.0], 0.0),
        ([-3.0, 3.0], 0.0),
        ([-1.0, 3.0], 0.5),
        ([1.0, 3.0], 1.0),
        ([-1.0, -3.0], -1.0),
        ([0.0, -3.0], -1.0),
    ],
)
def test_asymmetry_is_the_place_of_zero_in_the_range(values: list[float], wanted: float) -> None:
    assert kernels.moments(np.array(values, np.float32)).asymmetry == wanted


@NAMES
def test_outlier_share_equals_a_direct_count_within_a_bin(name: str) -> None:
    x = oracle.draw(name, 6, 1, 50_000)[0]
    s = observe(x)
    mean, std = float(x.astype(np.float64).mean()), float(x.astype(np.float64).std())
    away = np.abs(x.astype(np.float64) - mean)
    bin_width = np.abs(x) / 128
    sure, perhaps = away - bin_width > 4 * std, away + bin_width > 4 * std
    assert s.outlier_share is not None
    assert sure.mean() <= s.outlier_share <= perhaps.mean()
    if name == "outlier":
        assert s.outlier_share == pytest.approx(1 / 64, abs=1e-3)


# --- histogram ------------------------------------------------------------------------------------


def test_histogram_counts_by_the_upper_half_of_the_bit_pattern() -> None:
    rng = np.random.default_rng(8)
    x = rng.integers(0, 1 << 32, 20_000, dtype=np.uint32).view(np.float32)
    wanted: dict[int, int] = {}
    for v in x.view(np.uint32).tolist():
        wanted[v >> 16] = wanted.get(v >> 16, 0) + 1
    found = kernels.histogram(x)
    assert len(found) == 65_536
    assert {int(k): int(found[k]) for k in np.flatnonzero(found)} == wanted


def test_bin_centres_lie_in_their_bins() -> None:
    centres = bin_centres()
    for key in (*range(0, 65_536, 61), 0x7F7F, 0x7F80, 0xFFFF, 0x8000, 0x8080):
        low, high = (oracle.from_bits32(key << 16 | end) for end in (0, 0xFFFF))
        if key & 0x7F80 == 0x7F80:
            assert math.isnan(centres[key])
        else:
            assert min(low, high) < centres[key] < max(low, high)
            normal = key & 0x7F80 != 0
            assert not normal or abs(high - low) <= abs(low) / 128


# --- order of additions ---------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 255, 256, 257, 1000, 40_003])
def test_lane_sum_adds_in_the_stated_order(length: int) -> None:
    values = oracle.draw("student", length, 1, length)[0].astype(np.float64) if length else []
    values = np.asarray(values, np.float64) ** 3
    assert lane_sum(values) == oracle.lane_sum(values.tolist())


def test_the_order_of_additions_can_be_told_from_others() -> None:
    values = oracle.draw("student", 1, 1, 1000)[0].astype(np.float64) ** 3
    ordered = oracle.lane_sum(values.tolist())
    assert ordered not in (sum(values.tolist()), math.fsum(values))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 200, 256])
def test_column_sums_add_in_the_stated_order(length: int) -> None:
    columns = np.ascontiguousarray(oracle.draw("student", length, 7, length).T)
    found = sums.column_sums(columns).tolist()
    assert found == [oracle.lane_sum(c, oracle.f32) for c in columns.T.tolist()]


def test_error_sums_are_binary64_sums_in_the_stated_order() -> None:
    x = oracle.draw("laplace", 1, 9, 100)
    decoded = (np.rint(x * 8) / 8).astype(np.float32)
    pairs = list(zip(x.ravel().tolist(), decoded.ravel().tolist(), strict=True))
    assert kernels.error_sums(x, decoded) == (
        oracle.lane_sum([v * v for v, _ in pairs]),
        oracle.lane_sum([(v - d) * (v - d) for v, d in pairs]),
        max(abs(v - d) for v, d in pairs),
    )


# --- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", BITS)
@NAMES
def test_group_steps_equal_a_loop(name: str, bits: int, search: bool) -> None:
    x = oracle.draw(name, bits, 6, 50)
    x[3, :32] = 0
    found = kernels.observe_groups(x, AffineEncoding(bits, "block", 32, True, "F16", 50), search)
    top, n = 2 ** (bits - 1) - 1, 2**bits - 1
    symmetric, asymmetric, magnitudes = [], [], []
    for row in x.tolist():
        for group in (row[:32], row[32:]):
            down, up = max(0.0, -min(group)), max(0.0, max(group))
            amax = max(down, up)
            if search and bits < 8:  # the step that covers both ends, with the better sign
                steps = [max(a / (top + 1), b / top) for a, b in ((down, up), (up, down))]
                symmetric.append(min(steps) ** 2)
            else:
                symmetric.append((amax / top) ** 2)
            asymmetric.append(((up + down) / n) ** 2)
            magnitudes += [amax] if amax else []
    assert found.symmetric_power == pytest.approx(math.fsum(symmetric), rel=1e-12)
    assert found.asymmetric_power == pytest.approx(math.fsum(asymmetric), rel=1e-12)
    assert (found.smallest, found.largest) == (min(magnitudes), max(magnitudes))
    gain = 10 * math.log10(math.fsum(symmetric) / math.fsum(asymmetric))
    assert found.step_ratio_db == pytest.approx(gain, abs=1e-10)


def test_groups_of_zeros_have_no_magnitude() -> None:
    encoding = AffineEncoding(4, "channel", 0, True, "F32", 8)
    found = kernels.observe_groups(np.zeros((3, 8), np.float32), encoding, True)
    assert (found.smallest, found.largest, found.step_ratio_db) == (math.inf, 0.0, 0.0)
