"""Errors weighed by the mean squares of the input channels: the search, the decision, the file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from stored import named

from qconvert import kernels
from qconvert.calibration.document import CalibrationDocument, LayerCalibration
from qconvert.calibration.file import Calibration, calibration_parts
from qconvert.calibration.grid import StaticRange
from qconvert.codecs.affine import encoder
from qconvert.codecs.affine.streams import fit_stream
from qconvert.codecs.affine.weighting import weighting
from qconvert.encoding import BITS, AffineEncoding
from qconvert.errors import FormatError, InputError, UsageError
from qconvert.files import open_model
from qconvert.kernels import arithmetic, reference
from qconvert.kernels.records import Parameters, SourceRows
from qconvert.kernels.reference import sums
from qconvert.model import Model
from qconvert.ranges import RangeMethod
from qconvert.report import QuantizeReport
from qconvert.schemes import parse_scheme
from qconvert.stages.quantize import QuantizeOptions, quantize

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
MSE = RangeMethod("mse")
SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def encoding_of(bits: int, symmetric: bool, columns: int, block: int = 0) -> AffineEncoding:
    unit = "block" if block else "channel"
    return AffineEncoding(bits, unit, block, symmetric, "F32", columns)


def noise(x: F32, weights: F32, encoding: AffineEncoding, p: Parameters) -> F64:
    """Σ w (x - x')² of each group (G, L)."""
    codes, _ = reference.encode(x, p.scale, p.zero, encoding.bits, encoding.symmetric)
    decoded = reference.decode(codes, p.scale, p.zero, encoding.bits, encoding.symmetric)
    error = x.astype(np.float64) - decoded
    found: F64 = (weights * (error * error)).sum(axis=1)
    return found


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_shares_of_the_largest_of_their_group() -> None:
    squares = np.array([[8, 2, 0, 4, 0, 0, 0, 0, 1e-30, 3e-30, 2e-30]], np.float32)
    w = weighting(squares, blocks_of_4(11))
    least = 2.0**-16
    assert w.weight[:2].tolist() == [[1, 0.25, least, 0.5], [1, 1, 1, 1]]
    third = (squares[0, 8:] / squares[0, 9]).tolist()
    assert w.weight[2].tolist() == [*third, 0]
    # Medians, the lower of two: 0.25; 1; 2/3.
    assert w.reach[0].tolist() == [1, 1, float(np.sqrt(np.float32(least / 0.25))), 1]
    assert w.reach[1].tolist() == [1, 1, 1, 1]
    assert w.reach[2].tolist() == [float(np.sqrt(w.weight[2, 0] / w.weight[2, 2])), 1, 1, 0]


def blocks_of_4(columns: int) -> AffineEncoding:
    """No scheme has them; short enough to be worked out by hand."""
    return AffineEncoding(4, "block", 4, True, "F32", columns)


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@SYMMETRIES
@pytest.mark.parametrize(("block", "columns"), [(32, 96), (64, 100), (0, 200), (0, 700)])
def test_equal_weights_are_none(block: int, columns: int, symmetric: bool, bits: int) -> None:
    encoding = encoding_of(bits, symmetric, columns, block)
    for name in ("gaussian", "student", "one-sided"):
        x = oracle.draw(name, 5, 20, columns)
        x[3, :40] = 0
        for value in (1.0, 0.3, 1e-30):
            w = weighting(np.full((1, columns), value, np.float32), encoding)
            found = kernels.quantize_rows(SourceRows.of(x), encoding, MSE, (-1, 1), w)
            plain = kernels.quantize_rows(SourceRows.of(x), encoding, MSE, (-1, 1))
            assert found.segments == plain.segments
            assert found.error.weighted_sqnr_db == pytest.approx(plain.error.sqnr_db, abs=1e-6)


def brute_force(x: F32, weights: F32, bits: int, symmetric: bool) -> F64:
    """The least weighted error of each group over a dense grid of scales and zero points."""
    half, n = 2 ** (bits - 1), 2**bits - 1
    low, high = np.minimum(x.min(axis=1), 0), np.maximum(x.max(axis=1), 0)
    unit = np.maximum(-low, high) / half if symmetric else (high - low) / n
    factors = np.geomspace(0.03, 1.2, 150)
    places = [half] if symmetric else [z / 4 for z in range(4 * n + 1)]
    best = np.full(len(x), np.inf)
    for t in factors:
        for sign in (1, -1) if symmetric else (1,):
            step = (sign * unit * t).astype(np.float32)[:, None]
            for zero in places:
                k = np.clip(np.rint(x / step + np.float32(zero)), 0, n) - np.float32(zero)
                error = (x - k * step).astype(np.float64)
                np.minimum(best, (weights * (error * error)).sum(axis=1), out=best)
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
@SYMMETRIES
def test_the_search_comes_close_to_the_weighted_optimum(bits: int, symmetric: bool) -> None:
    """Also where outliers in the weights stand on channels that hardly matter, and the reverse.

    Without weights the search is as good where they are alike, and loses 3 dB and more elsewhere.
    """
    rng = np.random.default_rng(bits)
    encoding = encoding_of(bits, symmetric, 32)
    lost, gained = {}, {}
    for name in ("alike", "spread", "loud weights", "loud inputs"):
        x = oracle.draw("gaussian", bits, 60, 32)
        squares = rng.exponential(1, (60, 32)).astype(np.float32) + np.float32(0.2)
        if name == "spread":
            squares = np.exp2(rng.uniform(-10, 10, (60, 32))).astype(np.float32)
        if name.startswith("loud"):
            factor = np.float32(16 if name == "loud weights" else 1 / 16)
            x[:, 5] *= factor
            squares[:, 5] /= factor * factor
        w = weighting(squares, encoding)
        found = noise(x, squares, encoding, kernels.fit(x, encoding, MSE, None, w))
        plain = noise(x, squares, encoding, kernels.fit(x, encoding, MSE))
        best = brute_force(x, squares, bits, symmetric)
        lost[name] = float(10 * np.log10(found.sum() / best.sum()))
        gained[name] = float(10 * np.log10(plain.sum() / found.sum()))
    assert max(lost.values()) < 1.0, lost
    assert lost["alike"] < 0.4, lost
    assert gained["loud weights"] > 3, gained
    assert min(gained.values()) > 0, gained


@pytest.mark.parametrize("bits", BITS)
def test_weights_on_a_grid_are_restored_whatever_matters(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    codes = rng.integers(-top, top + 1, (100, 32))
    codes[:, :2] = -top, top
    x = (codes * np.float32(0.37)).astype(np.float32)
    squares = np.exp2(rng.uniform(-8, 8, (1, 32))).astype(np.float32)
    encoding = encoding_of(bits, True, 32)
    left = noise(
        x, squares, encoding, kernels.fit(x, encoding, MSE, None, weighting(squares, encoding))
    )
    assert left.sum() <= 1e-10 * (squares * x.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("bits", [2, 4, 8])
@SYMMETRIES
def test_a_stream_has_the_weighted_parameters_of_the_whole(bits: int, symmetric: bool) -> None:
    rng = np.random.default_rng(3)
    for length in (257, 1000, 70_000):
        x = oracle.draw("student", length, 1, length)
        encoding = encoding_of(bits, symmetric, length)
        w = weighting(rng.exponential(1, (1, length)).astype(np.float32), encoding)
        whole = kernels.fit(x, encoding, MSE, None, w)
        ends = [0, 256, length]

        pieces = [partial(x[0].__getitem__, slice(a, b)) for a, b in pairwise(ends)]
        weights = [partial(w.columns, a, b - a) for a, b in pairwise(ends)]
        found = fit_stream(pieces, encoding, MSE, weights)
        assert found.scale.tolist() == whole.scale.tolist()
        assert found.zero.tolist() == whole.zero.tolist()


def test_weighted_sums_run_in_the_stated_order() -> None:
    """Σwu, Σ(wu)u and Σ(wx)u in binary32, lane by lane: section 6."""
    x = oracle.draw("gaussian", 6, 1, 200)
    w = np.random.default_rng(1).random((1, 200)).astype(np.float32)
    inverse, offset = np.float32([3.0]), np.float32([7.5])
    found = sums.weighted_code_sums(
        *(np.ascontiguousarray(a.T) for a in (x, w)), inverse, offset, 0, 15
    )
    f32 = oracle.f32
    terms: tuple[list[float], ...] = ([], [], [])
    for v, share in zip(x[0].tolist(), w[0].tolist(), strict=True):
        u = oracle.clamp_rint(f32(f32(v * 3.0) + 7.5), 0, 15)
        terms[0].append(f32(share * u))
        terms[1].append(f32(f32(share * u) * u))
        terms[2].append(f32(f32(share * v) * u))
    assert [float(s[0]) for s in found] == [oracle.lane_sum(t, f32) for t in terms]


def test_weighted_errors_are_those_of_fractions() -> None:
    """Small integers: every order of additions is exact."""
    rng = np.random.default_rng(2)
    x, back = (rng.integers(-9, 10, (6, 37)).astype(np.float32) for _ in range(2))
    w = rng.integers(0, 5, (3, 37)).astype(np.float32)
    wanted = [0, 0]
    for r in range(6):
        for c in range(37):
            wanted[0] += int(w[r % 3, c]) * int(x[r, c]) ** 2
            wanted[1] += int(w[r % 3, c]) * int(x[r, c] - back[r, c]) ** 2
    assert arithmetic.weighted_error_sums(x, back, w) == tuple(wanted)


# --- the whole way --------------------------------------------------------------------------------


def calibrated(directory: Path, squares: dict[str, F32]) -> Path:
    layers = {
        n: LayerCalibration(9, len(s), StaticRange(-1.0, 1.0, 0.01, 0)) for n, s in squares.items()
    }
    arrays = {f"{n}/mean_square": s for n, s in squares.items()}
    arrays |= {f"{n}/{k}": np.sqrt(s) for n, s in squares.items() for k in ("minimum", "maximum")}
    path = directory / "c.safetensors"
    document = CalibrationDocument("minmax", {"symmetric": False}, [], layers)
    path.write_bytes(b"".join(calibration_parts(document, arrays)))
    return path


def written(
    directory: Path,
    tensors: dict[str, F32],
    squares: dict[str, F32],
    scheme: str = "q4_block32",
    **options: object,
) -> tuple[QuantizeReport, bytes]:
    model, output = directory / "m.safetensors", directory / "m.qblk"
    safetensors.numpy.save_file(tensors, model)
    calibration = calibrated(directory, squares) if squares else None
    chosen = QuantizeOptions(
        parse_scheme(scheme),  # type: ignore[arg-type]
        output=output,
        calibration=calibration,
        force=True,
        **options,  # type: ignore[arg-type]
    )
    return quantize(model, chosen), output.read_bytes()


def loud_weights() -> tuple[F32, F32]:
    """Every 32nd channel has large weights of one sign, which pull the plain error to asymmetric
    codes, and an input that is all but silent.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (64, 256)).astype(np.float32)
    x[:, 1::32] = np.float32(8)
    squares = np.ones(256, np.float32)
    squares[1::32] = 2.0**-12
    return x, squares


def test_the_weighted_error_decides_and_the_report_shows_both(tmp_path: Path) -> None:
    x, squares = loud_weights()
    plain, _ = written(tmp_path, {"a.weight": x}, {})
    report, _ = written(tmp_path, {"a.weight": x}, {"a": squares})
    before, after = plain.tensors[0].decision, report.tensors[0].decision
    assert before is not None
    assert after is not None
    assert not before["symmetric"], "one large value a block"
    assert after["symmetric"], "that hardly matters"
    assert after["rule"] == "weighted-sample"
    assert after["sample"].keys() == {
        *("symmetric_db", "asymmetric_db", "weighted_symmetric_db", "weighted_asymmetric_db")
    }
    row = report.tensors[0]
    assert row.weighted
    assert row.sqnr_db is not None
    assert row.weighted_sqnr_db is not None
    # The weighted figure, from the file, by hand.
    model = open_model(tmp_path / "m.qblk")
    back = model.values(model.tensors[0], 0, x.size).reshape(x.shape)
    error = named(model, "a.weight").error
    assert error is not None
    noted = error["weighted_sqnr_db"]
    model.close()
    wide = x.astype(np.float64)
    for weights, found in ((np.ones(256), row.sqnr_db), (squares, row.weighted_sqnr_db)):
        wanted = (weights * wide**2).sum() / (weights * (wide - back) ** 2).sum()
        assert found == pytest.approx(10 * np.log10(wanted), abs=1e-9)
    assert noted == pytest.approx(row.weighted_sqnr_db, rel=1e-5)


@pytest.mark.parametrize(
    "scheme", ["q4_block64", "q3_block32", "q4_channel", "q4_tensor", "q8_block32"]
)
def test_the_bytes_depend_neither_on_kernels_nor_on_threads(scheme: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    tensors = {n: rng.standard_normal((900, 333)).astype(np.float32) for n in ("a.weight", "b")}
    squares = {n: rng.exponential(1, 333).astype(np.float32) ** 3 for n in ("a", "b")}
    squares["a"][:70] = 0
    found = {written(tmp_path, tensors, squares, scheme, threads=n)[1] for n in (1, 3)}
    with kernels.running("reference"):
        found.add(written(tmp_path, tensors, squares, scheme, threads=2)[1])
    assert len(found) == 1
    plain = written(tmp_path, tensors, squares, scheme, weighting=False)[1]
    assert plain not in found


def test_a_row_longer_than_a_tile_has_its_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 300_000)).astype(np.float32)
    squares = rng.exponential(1, 300_000).astype(np.float32)
    report, _ = written(tmp_path, {"a.weight": x}, {"a": squares}, "q3_channel_sym")
    encoding = encoding_of(3, True, 300_000)
    w = weighting(squares[None, :], encoding)
    wanted = kernels.encode_rows(x, encoding, kernels.fit(x, encoding, MSE, None, w), w.mean_square)
    assert report.tensors[0].weighted_sqnr_db == pytest.approx(wanted.error.weighted_sqnr_db)


def test_blocks_of_a_row_that_is_cut_have_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(9)
    x = {"a.weight": rng.standard_normal((3, 1000)).astype(np.float32)}
    squares = {"a": rng.exponential(1, 1000).astype(np.float32) ** 3}
    whole = written(tmp_path, x, squares, "q4_block64")[1]
    monkeypatch.setattr(encoder, "RUN_VALUES", 256)
    assert written(tmp_path, x, squares, "q4_block64")[1] == whole


def test_layers_without_mean_squares_are_as_without_a_calibration(tmp_path: Path) -> None:
    x, squares = loud_weights()
    tensors = {"dead.weight": x, "other.weight": x + 1, "seen.weight": x}
    known = {"dead": np.zeros(256, np.float32), "seen": squares}
    report, _ = written(tmp_path, tensors, known)
    plain, _ = written(tmp_path, tensors, {})
    assert [t.weighted for t in report.tensors] == [t.name == "seen.weight" for t in report.tensors]
    for a, b in zip(report.tensors, plain.tensors, strict=True):
        if not a.weighted:
            assert a == replace(b, rounding_reason=a.rounding_reason)


def test_no_weighting_takes_the_static_parameters_alone(tmp_path: Path) -> None:
    x, squares = loud_weights()
    report, stored = written(tmp_path, {"a.weight": x}, {"a": squares}, weighting=False)
    plain, _ = written(tmp_path, {"a.weight": x}, {})
    (row,) = plain.tensors
    assert report.tensors == [replace(row, rounding_reason="--no-weighting")]
    assert b'"no_weighting":true' in stored
    assert b'"activation":{' in stored
    with pytest.raises(UsageError, match="without a calibration"):
        written(tmp_path, {"a.weight": x}, {}, weighting=False)


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_impossible_mean_squares_are_refused(bad: float, tmp_path: Path) -> None:
    x, squares = loud_weights()
    squares[77] = bad
    with pytest.raises(FormatError, match=r"impossible values"), np.errstate(invalid="ignore"):
        written(tmp_path, {"a.weight": x}, {"a": squares})


def test_a_calibration_that_changes_while_it_is_used_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of its header and the mean squares of the first tensor."""
    x, squares = loud_weights()
    check = Calibration.check_model

    def change(self: Calibration, model: Model) -> None:
        check(self, model)
        with self.path.open("r+b") as f:
            f.seek(-4, 2)
            f.write(np.float32(9).tobytes())

    monkeypatch.setattr(Calibration, "check_model", change)
    with pytest.raises(InputError, match="file changed while it was read"):
        written(tmp_path, {"a.weight": x}, {"a": squares})
    assert not (tmp_path / "m.qblk").exists()


@pytest.mark.parametrize("extreme", [2.0**-149, 2.0**-100, 1e30, 3e38])
def test_mean_squares_of_every_size_are_taken(extreme: float, tmp_path: Path) -> None:
    """What matters is their ratio."""
    x, squares = loud_weights()
    squares = np.where(squares == 1, np.float32(1), np.float32(0))
    report, _ = written(tmp_path, {"a.weight": x}, {"a": squares * np.float32(extreme)})
    usual, _ = written(tmp_path, {"a.weight": x}, {"a": squares})
    found, wanted = report.tensors[0], usual.tensors[0]
    assert (found.stored, found.sqnr_db) == (wanted.stored, wanted.sqnr_db)
    assert found.weighted_sqnr_db == pytest.approx(wanted.weighted_sqnr_db)
