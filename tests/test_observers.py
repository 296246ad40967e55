"""Observers of activations against brute force on everything they have seen."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import oracle
import pytest
from numpy.typing import NDArray

from qconvert.calibration import fixed_point
from qconvert.calibration.exact import ExactSum
from qconvert.calibration.gram import GramMatrix
from qconvert.calibration.grid import static_range
from qconvert.calibration.observers import OBSERVERS, ChannelStatistics, Observer, ObserverSettings
from qconvert.errors import UsageError

F32 = NDArray[np.float32]
NAMES = pytest.mark.parametrize("name", oracle.DISTRIBUTIONS)
MERGING = pytest.mark.parametrize("kind", ["minmax", "percentile", "mse", "entropy", "nmse"])


def batches(name: str) -> list[F32]:
    """Batches of several sizes whose ranges differ."""
    sizes = [(5, 32), (1, 32), (40, 32), (8, 32), (3, 32)]
    return [oracle.draw(name, k, *s) * np.float32(k + 1) for k, s in enumerate(sizes)]


def run(kind: str, data: list[F32], percentile: float = 99.0) -> Observer:
    observer = ObserverSettings(kind, percentile).make()
    for batch in data:
        observer.update(batch)
    return observer


def everything(data: list[F32]) -> F32:
    return np.concatenate([b.ravel() for b in data])


# --- ranges ---------------------------------------------------------------------------------------


@NAMES
def test_minmax_is_exact(name: str) -> None:
    data = batches(name)
    x = everything(data).tolist()
    assert run("minmax", data).range() == (min(x), max(x))


@NAMES
def test_moving_average_follows_the_recurrence(name: str) -> None:
    data = batches(name)
    low, high = float(data[0].min()), float(data[0].max())
    for batch in data[1:]:
        low = 0.9 * low + 0.1 * float(batch.min())
        high = 0.9 * high + 0.1 * float(batch.max())
    assert run("ema", data).range() == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_moving_average_takes_a_momentum(momentum: float) -> None:
    data = batches("gaussian")
    observer = ObserverSettings("ema", momentum=momentum).make()
    low, high = float(data[0].min()), float(data[0].max())
    for k, batch in enumerate(data):
        observer.update(batch)
        if k:
            low = momentum * low + (1 - momentum) * float(batch.min())
            high = momentum * high + (1 - momentum) * float(batch.max())
    assert observer.range() == pytest.approx((low, high), rel=1e-12)


@NAMES
@pytest.mark.parametrize("percent", [51.0, 90.0, 99.0, 99.99, 100.0])
def test_percentiles_are_exact_to_a_bin(name: str, percent: float) -> None:
    data = batches(name)
    x = everything(data)
    low, high = run("percentile", data, percent).range()
    wanted_high = np.percentile(x, percent, method="inverted_cdf")
    wanted_low = -np.percentile(-x, percent, method="inverted_cdf")
    assert abs(high - wanted_high) <= abs(wanted_high) / 128
    assert abs(low - wanted_low) <= abs(wanted_low) / 128
    assert low >= x.min()
    assert high <= x.max()


def snr(x: F32, low: float, high: float) -> float:
    """dB of 8-bit codes over a range, value by value."""
    r = static_range(low, high)
    codes = np.clip(np.rint(x.astype(np.float64) / r.scale + r.zero_point), -128, 127)
    error = (codes - r.zero_point) * r.scale - x
    return float(10 * np.log10((x.astype(np.float64) ** 2).sum() / (error**2).sum()))


@NAMES
def test_mse_range_has_nearly_the_best_snr_of_all_candidates(name: str) -> None:
    """Direct evaluation on the data. Near the ends a bin of the histogram is wider than a step of
    the grid, which costs at most 0.3 dB here.
    """
    data = batches(name)
    x = everything(data)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shrinks = [1 - k / 50 for k in range(40)]
    ends = itertools.product(
        [low * a for a in shrinks] if low else [0.0],
        [high * b for b in shrinks] if high else [0.0],
    )
    best = max(snr(x, a, b) for a, b in ends)
    found = run("mse", data).range()
    assert snr(x, *found) >= best - 0.3
    assert low <= found[0] <= 0 <= found[1] <= high


def test_mse_gives_up_a_lone_outlier() -> None:
    x = np.random.default_rng(1).standard_normal((4000, 32)).astype(np.float32)
    outlier = np.array([[30.0]], np.float32)
    low, high = run("mse", [x] * 40 + [outlier]).range()
    assert high < 15
    seen = np.concatenate([*[x.ravel()] * 40, outlier.ravel()])
    assert snr(seen, low, high) > snr(seen, float(x.min()), 30.0) + 3


def lost_information(x: F32, low: float, high: float) -> float:
    """KL(P || Q) in nats of 8-bit codes over a range, from the values themselves: P the values
    clipped to the range in 2,048 equal bins of all of them, Q those inside, evened out over the
    used bins of each code.
    """
    ends = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    wide = x.astype(np.float64)
    counts, edges = np.histogram(wide, 2048, ends)
    middle = (edges[:-1] + edges[1:]) / 2
    r = static_range(low, high)
    inside = [k for k in range(2048) if low <= middle[k] <= high]
    p = dict.fromkeys(inside, 0.0)
    codes: dict[int, list[int]] = {}
    for k in range(2048):
        p[min(max(k, inside[0]), inside[-1])] += counts[k]
        if k in p and counts[k]:
            code = int(np.clip(np.rint(middle[k] / r.scale + r.zero_point), -128, 127))
            codes.setdefault(code, []).append(k)
    q = {k: sum(counts[i] for i in ks) / len(ks) for ks in codes.values() for k in ks}
    total_p, total_q = sum(p.values()), sum(q.values())
    if not total_q:
        return math.inf
    floor = 1e-6 / len(inside)
    return float(
        sum(
            v / total_p * np.log(v / total_p / ((1 - 1e-6) * q.get(k, 0) / total_q + floor))
            for k, v in p.items()
            if v
        )
    )


@NAMES
def test_entropy_range_loses_nearly_the_least_information_of_all_candidates(name: str) -> None:
    """The oracle counts value by value where the observer spreads bins: a tenth apart."""
    x = np.concatenate([oracle.draw(name, k, 2000, 32) for k in range(3)])
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if low == high:
        assert run("entropy", [x]).range() == (low, high)
        return
    shrinks = [1 - k / 10 for k in range(8)]
    ends = itertools.product(
        [low * a for a in shrinks] if low else [0.0],
        [high * b for b in shrinks] if high else [0.0],
    )
    losses = {e: lost_information(x, *e) for e in ends}
    found = run("entropy", [x]).range()
    assert low <= found[0] <= 0 <= found[1] <= high
    assert lost_information(x, *found) <= min(losses.values()) * 1.1
    assert max(losses.values()) > min(losses.values()) * 2  # or the claim above is empty


def test_entropy_gives_up_a_lone_outlier() -> None:
    x = np.random.default_rng(1).standard_normal((4000, 32)).astype(np.float32)
    low, high = run("entropy", [x] * 10 + [np.array([[60.0]], np.float32)]).range()
    assert high < 30
    assert low <= x.min() * 0.6


# --- relative error of the output -----------------------------------------------------------------


def columns_and_rows() -> tuple[NDArray[np.float64], F32]:
    """Norms of columns from 2^-70 to 2^10 and none at all; rows from 1e-9 to 1e4, and of zeros."""
    rng = np.random.default_rng(11)
    columns = np.ldexp(rng.uniform(1, 2, 24), rng.integers(-70, 10, 24))
    columns[:8] = rng.uniform(0.5, 4, 8)
    columns[[3, 17]] = 0
    sizes = 10.0 ** rng.integers(-9, 5, (300, 1))
    x = (rng.standard_normal((300, 24)) * sizes).astype(np.float32)
    x[40] = 0
    x[41, 1:] = 0
    return columns, x


def power_of_two(x: float) -> Fraction:
    """The least power of two above x."""
    return Fraction(2) ** math.frexp(x)[1]


def test_each_value_counts_by_its_column_and_by_its_row_exactly() -> None:
    columns, x = columns_and_rows()
    observer = ObserverSettings("nmse").make(columns)
    observer.update(x)
    top = power_of_two(columns.max())
    norms = [max(power_of_two(n) / top, Fraction(2) ** -24) if n else 0 for n in columns.tolist()]
    wanted: dict[int, Fraction] = {}
    for row in x:
        energy = sum(n * Fraction(v) ** 2 for n, v in zip(norms, row.tolist(), strict=True))
        if not energy:
            continue
        whole = Fraction(2) ** math.frexp(float(energy))[1]
        for n, v in zip(norms, row, strict=True):
            if n:
                weight = n * min(max(1 / whole, Fraction(2) ** -72), Fraction(2) ** 31)
                key = int(v.view(np.uint32)) >> 16
                wanted[key] = wanted.get(key, Fraction()) + weight
    state = observer.state()
    found = {
        int(key): sum(Fraction(int(v)) * Fraction(2) ** (32 * k - 96) for k, v in enumerate(limbs))
        for key, limbs in zip(state["keys"], state["weights"].T, strict=True)
    }
    assert found == wanted


def test_weighted_counts_are_the_same_bits_for_any_split_and_order() -> None:
    columns, x = columns_and_rows()
    single = ObserverSettings("nmse").make(columns)
    single.update(x)
    for cuts in ([1], [7, 8, 150], list(range(1, 300))):
        parts = [ObserverSettings("nmse").make(columns) for _ in range(2)]
        for k, rows in enumerate(np.split(x, cuts)[::-1]):
            parts[k % 2].update(rows)
        merged = ObserverSettings("nmse").make()
        merged.restore(parts[1].state())
        merged.merge(parts[0])
        for key, array in single.state().items():
            assert merged.state()[key].tobytes() == array.tobytes()


def relative_error(weight: F32, x: F32, low: float, high: float, symmetric: bool = False) -> float:
    """Mean over the rows of |W x' - W x|² / |W x|², by the products themselves."""
    r = static_range(low, high, symmetric=symmetric)
    codes = np.clip(np.rint(x.astype(np.float64) / r.scale + r.zero_point), -128, 127)
    error = ((codes - r.zero_point) * r.scale - x) @ weight.T.astype(np.float64)
    return float(((error**2).sum(axis=1) / ((x @ weight.T) ** 2).sum(axis=1)).mean())


@pytest.mark.parametrize("symmetric", [False, True])
def test_nmse_has_nearly_the_least_relative_error_of_the_output(symmetric: bool) -> None:
    """Rows of sizes apart, and large channels that meet small weights: to 1 dB of the best of a
    grid of ranges, where the squared error of the input is 3 dB worse.
    """
    rng = np.random.default_rng(2)
    x = rng.standard_normal((400, 48)).astype(np.float32)
    x[:, :3] *= 30
    x[:8] *= 50
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    weight[:, :3] /= 30
    reach = np.geomspace(np.abs(x).max() / 1000, np.abs(x).max(), 200)
    best = min(relative_error(weight, x, -v, v, symmetric) for v in reach)
    found = {}
    for kind in ("mse", "nmse"):
        settings = ObserverSettings(kind, symmetric=symmetric)
        observer = settings.make((weight.astype(np.float64) ** 2).sum(axis=0))
        observer.update(x)
        low, high = observer.range()
        assert (low == -high) or not symmetric
        found[kind] = relative_error(weight, x, low, high, symmetric)
    assert found["nmse"] <= best * 10**0.1
    assert found["mse"] >= best * 10**0.3


@pytest.mark.parametrize("columns", [None, np.zeros(32)])
def test_without_anything_that_counts_nmse_covers_everything(columns: Any) -> None:
    observer = ObserverSettings("nmse").make(columns)
    observer.update(np.zeros((3, 32), np.float32))
    assert observer.range() == (0, 0)


# --- Gram matrix ----------------------------------------------------------------------------------


def decoded(gram: GramMatrix) -> list[list[Fraction]]:
    """Rows of the upper triangle, exactly."""
    high, low = gram.packed()
    values = [
        Fraction(int(h), 4) + Fraction(int(v), 1 << 64) for h, v in zip(high, low, strict=True)
    ]
    starts = itertools.accumulate(range(gram.features, 0, -1), initial=0)
    return [values[a:b] for a, b in itertools.pairwise(starts)]


def uneven(rows: int, features: int) -> F32:
    """Channels of sizes from 1e-12 to 1e7, zeros among them."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, features)) * 10.0 ** rng.integers(-12, 8, features)
    x[:, 4] = 0
    return x.astype(np.float32)


def test_a_gram_matrix_is_that_of_all_rows() -> None:
    """Against rational arithmetic: to the rounding of each batch's products in float64."""
    x = uneven(40, 70)  # more than one stripe
    gram = GramMatrix(70)
    for rows in np.split(x, [1, 7, 30]):
        gram.update(rows)
    wide = [[Fraction(v) for v in row] for row in x.tolist()]
    norms = [sum(row[i] ** 2 for row in wide) for i in range(70)]
    for i, found in enumerate(decoded(gram)):
        for j, value in enumerate(found, i):
            wanted = sum(row[i] * row[j] for row in wide)
            reach = math.sqrt(norms[i] * norms[j])
            assert abs(value - wanted) <= reach * 1e-14 + 4 * 2.0**-64


def test_a_gram_matrix_is_the_same_bits_in_any_order_of_the_batches() -> None:
    parts = np.split(uneven(60, 130), [5, 6, 38])
    wanted = GramMatrix(130)
    for rows in parts:
        wanted.update(rows)
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        halves = [GramMatrix(130), GramMatrix(130)]
        for k, part in enumerate(order):
            halves[k % 2].update(parts[part])
        whole = GramMatrix.unpacked(*halves[0].packed(), 130)
        whole.merge(halves[1])
        for a, b in zip(whole.packed(), wanted.packed(), strict=True):
            assert a.tobytes() == b.tobytes()
    with pytest.raises(ValueError, match="different layers"):
        wanted.merge(GramMatrix(131))


def test_a_gram_matrix_refuses_what_it_cannot_hold() -> None:
    large = np.full((1, 3), 2.0**29, np.float32)
    gram = GramMatrix(3)
    gram.update(large)
    assert decoded(gram)[0] == [Fraction(2) ** 58] * 3
    with pytest.raises(OverflowError):
        gram.update(large)
    with pytest.raises(OverflowError):
        GramMatrix(3).update(2 * large)
    half, other = GramMatrix(3), GramMatrix(3)
    half.update(large)
    other.update(large)
    with pytest.raises(OverflowError):
        half.merge(other)


def test_fixed_point_numbers_in_float64_are_within_a_unit_in_the_last_place() -> None:
    """Small negative numbers too, of which the parts cancel."""
    rng = np.random.default_rng(4)
    small = -np.arange(1.0, 500) * 2.0**-64
    sizes = 2.0 ** rng.integers(-64, 59, 2000)
    values = np.concatenate([small, rng.uniform(-1, 1, 2000) * sizes, [0.0, -0.25, 2.0**58]])
    high, low = np.zeros(len(values), np.int64), np.zeros(len(values), np.int64)
    for _ in range(2):
        fixed_point.add(high, low, *fixed_point.split(values / 2))
    for h, v, found in zip(high, low, fixed_point.wide(high, low).tolist(), strict=True):
        exact = Fraction(int(h), 4) + Fraction(int(v), 1 << 64)
        assert abs(Fraction(found) - exact) <= Fraction(math.ulp(found))


@pytest.mark.parametrize(
    ("high", "low"),
    [
        (np.zeros(5, np.int64), np.zeros(5, np.int64)),
        (np.zeros(6, np.int32), np.zeros(6, np.int64)),
        (np.zeros(6, np.int64), np.full(6, -1)),
        (np.zeros(6, np.int64), np.full(6, 1 << 62)),
        (np.full(6, 1 << 61), np.zeros(6, np.int64)),
        (np.full(6, -1 << 61), np.zeros(6, np.int64)),
        (np.array([1, 0, 0, -1, 0, 1]), np.zeros(6, np.int64)),
    ],
)
def test_a_damaged_gram_matrix_is_refused(high: NDArray[Any], low: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match=r"Gram matrix|fixed-point|negative"):
        GramMatrix.unpacked(high, low, 3)


# --- merging --------------------------------------------------------------------------------------


@NAMES
@MERGING
def test_merged_observers_equal_a_single_run_in_any_order(kind: str, name: str) -> None:
    data = batches(name)
    single = run(kind, data).range()
    assert run(kind, data[::-1]).range() == single
    for order in ((0, 1, 2), (2, 0, 1), (2, 1, 0)):
        parts = [run(kind, data[:1]), run(kind, data[1:3]), run(kind, data[3:])]
        first = parts[order[0]]
        for k in order[1:]:
            first.merge(parts[k])
        assert first.range() == single


def test_moving_averages_depend_on_order_and_refuse_to_merge() -> None:
    data = batches("gaussian")
    a, b = run("ema", data), run("ema", data[::-1])
    assert a.range() != b.range()
    with pytest.raises(UsageError, match="cannot be merged"):
        a.merge(b)


@pytest.mark.parametrize(("kind", "other"), list(itertools.permutations(OBSERVERS, 2)))
def test_observers_of_different_kinds_do_not_merge(kind: str, other: str) -> None:
    data = batches("gaussian")
    with pytest.raises((TypeError, UsageError)):
        run(kind, data).merge(run(other, data))


def test_unknown_observers_and_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="minmax, ema, percentile, mse, entropy, nmse"):
        ObserverSettings("median").make()
    for percent in (50.0, 100.1, float("nan")):
        with pytest.raises(UsageError, match="--percentile"):
            ObserverSettings("percentile", percentile=percent).make()
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(UsageError, match="--momentum"):
            ObserverSettings("ema", momentum=momentum).make()


# --- state ----------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("kind", list(OBSERVERS))
def test_an_observer_goes_on_from_its_state_bit_for_bit(kind: str, name: str) -> None:
    data = batches(name)
    resumed = ObserverSettings(kind, 99.0).make()
    resumed.restore(run(kind, data[:2]).state())
    for batch in data[2:]:
        resumed.update(batch)
    single = run(kind, data)
    assert resumed.range() == single.range()
    assert resumed.state().keys() == single.state().keys()
    for key, array in single.state().items():
        assert resumed.state()[key].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"extremes": np.array([1.0, -1.0])},
        {"extremes": np.array([np.nan, 1.0])},
        {"extremes": np.zeros(3)},
        {"keys": np.array([3, 2], np.uint16)},
        {"keys": np.array([3, 0x7F80], np.uint16)},
        {"keys": np.array([3], np.uint16)},
        {"counts": np.array([1, 0])},
        {"counts": np.array([1, -5])},
        {"counts": np.array([1 << 62, 1 << 62])},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(change: dict[str, NDArray[Any]]) -> None:
    state = {
        "extremes": np.array([0.0, 1.0]),
        "keys": np.array([2, 3], np.uint16),
        "counts": np.array([1, 5]),
    }
    ObserverSettings("mse").make().restore(state)
    with pytest.raises((ValueError, KeyError)):
        ObserverSettings("mse").make().restore(state | change)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": np.array([3, 2], np.uint16)},
        {"keys": np.array([3, 0x7F80], np.uint16)},
        {"keys": np.array([3], np.uint16)},
        {"weights": np.ones((5, 2), np.int64)},
        {"weights": np.ones((6, 2), np.int64) << 32},
        {"weights": np.full((6, 2), -1)},
        {"weights": np.array([[0, 0]] * 5 + [[1 << 32, 1]])},
        {"weights": np.zeros((6, 2), np.int64)},
        {"weights": np.ones((6, 2))},
    ],
    ids=str,
)
def test_damaged_weights_are_refused(change: dict[str, NDArray[Any]]) -> None:
    state = {
        "extremes": np.array([0.0, 1.0]),
        "keys": np.array([2, 3], np.uint16),
        "weights": np.ones((6, 2), np.int64),
    }
    ObserverSettings("nmse").make().restore(state)
    with pytest.raises(ValueError, match="of a histogram"):
        ObserverSettings("nmse").make().restore(state | change)


# --- static parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.0, 3.0), (0.5, 3.0), (-3.0, -0.5), (0.0, 1e-3), (-1e-30, 2e-30), (-3e38, 3e38)]
    + [tuple(p) for p in np.random.default_rng(3).normal(0, 5, (50, 2)).tolist()],
)
def test_static_range_has_an_exact_zero_and_covers_the_ends(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    r = static_range(low, high)
    assert isinstance(r.zero_point, int)
    assert -128 <= r.zero_point <= 127
    assert (r.low, r.high) == (min(low, 0.0), max(high, 0.0))
    # The zero point is a code, so zero is a value of the grid; each end is at most a step away.
    assert (r.low - r.high) / 255 == pytest.approx(-r.scale, rel=1e-6)
    assert (-128 - r.zero_point) * r.scale <= r.low + 0.501 * r.scale
    assert (127 - r.zero_point) * r.scale >= r.high - 0.501 * r.scale


def test_static_scale_is_the_shortest_decimal_of_a_binary32_number() -> None:
    for high in np.random.default_rng(4).uniform(0.01, 100, 200).tolist():
        scale = static_range(-1.0, high).scale
        stored = oracle.f32((high + 1.0) / 255)
        assert oracle.f32(scale) == stored
        digits = len(f"{scale!r}".replace(".", "").lstrip("0").split("e")[0])
        # No decimal with fewer digits reads back as that number, and this one has at most nine.
        assert digits <= 9
        assert oracle.f32(float(f"{stored:.{digits - 1}g}")) != stored or digits == 1


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-7.0, 3.0), (0.0, 2.0), (-5e-3, 0.0)])
def test_symmetric_parameters_have_zero_point_0_and_the_larger_end_at_127(
    low: float, high: float
) -> None:
    r = static_range(low, high, symmetric=True)
    widest = max(-low, high)
    assert (r.low, r.high, r.zero_point) == (-widest, widest, 0)
    assert r.scale == pytest.approx(widest / 127, rel=1e-7)
    assert oracle.f32(r.scale) == np.float32(widest / 127)


def symmetric_snr(x: F32, top: float) -> float:
    """dB of codes -128..127 with the scale top / 127, value by value."""
    wide, scale = x.astype(np.float64), float(np.float32(top / 127))
    error = np.clip(np.rint(wide / scale), -128, 127) * scale - wide
    return float(10 * np.log10((wide**2).sum() / (error**2).sum()))


@NAMES
def test_symmetric_mse_has_nearly_the_best_snr_of_all_candidates(name: str) -> None:
    data = batches(name)
    x = everything(data)
    observer = ObserverSettings("mse", symmetric=True).make()
    for batch in data:
        observer.update(batch)
    low, high = observer.range()
    widest = float(np.abs(x).max())
    best = max(symmetric_snr(x, widest * k / 100) for k in range(20, 101))
    assert low == -high
    assert symmetric_snr(x, high) >= best - 0.3


@pytest.mark.parametrize("high", [0.0, -0.0, 1e-46, 1e-44])
def test_an_empty_range_has_a_scale_above_zero(high: float) -> None:
    r = static_range(0.0, high)
    assert (r.scale, r.zero_point) == (1.0, 0)


# --- channels -------------------------------------------------------------------------------------


@NAMES
def test_channel_statistics_equal_numpy(name: str) -> None:
    data = batches(name)
    x = np.concatenate(data)
    s = ChannelStatistics(32)
    for batch in data:
        s.update(batch)
    assert s.samples == len(x)
    assert s.low.tolist() == x.min(axis=0).tolist()
    assert s.high.tolist() == x.max(axis=0).tolist()
    wanted = np.mean(x.astype(np.float64) ** 2, axis=0)
    assert s.mean_square == pytest.approx(wanted, rel=1e-6)
    assert s.mean_square.dtype == np.float32


def test_channel_statistics_without_samples_have_no_nan() -> None:
    assert ChannelStatistics(3).mean_square.tolist() == [0.0, 0.0, 0.0]


def extreme_values() -> F32:
    """Squares from 2^-298 to almost 2^256 in one column, zeros and equal values in others."""
    rng = np.random.default_rng(7)
    x = np.ldexp(rng.uniform(-2, 2, (300, 9)), rng.integers(-149, 127, (300, 9)))
    x[:, 1] = 0
    x[:, 2] = 3.25
    x[0, 0], x[1, 0] = np.finfo(np.float32).max, 1e-45
    x[:, 3] = np.where(np.arange(300) == 17, 1e-30, 0)
    return x.astype(np.float32)


def exact_sums(x: F32) -> list[Fraction]:
    return [sum((Fraction(v) ** 2 for v in column), Fraction()) for column in x.T.tolist()]


def test_sums_of_squares_are_exact() -> None:
    x = extreme_values()
    s = ExactSum(x.shape[1])
    s.add_squares(x)
    s.carry()
    digits = [
        [Fraction(int(v)) * Fraction(2) ** (32 * k - 320) for v in limb]
        for k, limb in enumerate(s.limbs)
    ]
    assert [sum(column) for column in zip(*digits, strict=True)] == exact_sums(x)
    assert s.values().tolist() == pytest.approx([float(f) for f in exact_sums(x)], rel=1e-15)


@pytest.mark.parametrize("cuts", [[1], [1, 2, 3, 50, 299], list(range(1, 300)), [64, 128]], ids=len)
def test_sums_of_squares_are_the_same_bits_for_any_split_and_order(cuts: list[int]) -> None:
    x = extreme_values()
    single = ExactSum(x.shape[1])
    single.add_squares(x)
    wanted, first = single.packed()
    parts = []
    for rows in reversed(np.split(x, cuts)):
        parts.append(ExactSum(x.shape[1]))
        parts[-1].add_squares(rows)
    whole = parts[0]
    for part in parts[1:]:
        packed, at = part.packed()
        whole.merge(ExactSum.unpacked(packed, at))
    found, found_first = whole.packed()
    assert (found.tobytes(), found_first) == (wanted.tobytes(), first)


def test_sums_that_need_more_limbs_than_there_are_are_refused() -> None:
    for first in (-1, 19, 1 << 40):
        with pytest.raises(ValueError, match="limbs"):
            ExactSum.unpacked(np.zeros((2, 3), np.uint32), first)
