"""Every check of ``verify`` can fail: files are tampered with and then given sound digests."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Call, Qblk, gaussian, read_independently, save

from qconvert import kernels
from qconvert.errors import UnsupportedError, WeightError
from qconvert.files.gguf import open_gguf
from qconvert.kernels.records import Product
from qconvert.ranges import RangeMethod
from qconvert.report import VerifyReport
from qconvert.schemes import parse_scheme
from qconvert.stages.calibrate import CalibrateOptions, calibrate
from qconvert.stages.quantize import GgufOptions, QuantizeOptions, quantize
from qconvert.stages.verify import VerifyOptions, verify

TENSORS = {
    "a.weight": gaussian(1, 40, 64),
    "b.weight": gaussian(2, 33, 96, dtype=ml_dtypes.bfloat16),
    "c.weight": gaussian(3, 32, 64, dtype=np.float16),
    "b.bias": gaussian(4, 33),
    "ids": np.arange(40, dtype=np.int32),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", TENSORS)


def convert(source: Path, scheme: str, name: str = "m.qblk", **options: Any) -> Path:
    target = source.parent / name
    options.setdefault("range", RangeMethod("minmax"))
    if target.suffix == ".gguf":
        options.setdefault("gguf", GgufOptions(raw=True))
    quantize(source, QuantizeOptions(parse_scheme(scheme), target, **options))
    return target


def checked(path: Path, source: Path | None = None, **options: Any) -> VerifyReport:
    return verify(path, VerifyOptions(against=source, **options))


def failed(report: VerifyReport) -> set[str]:
    """The ids of the checks that fail; the status agrees with them."""
    ids = {c.id for c in report.checks if c.status == "fail"}
    assert report.status == ("fail" if ids else "pass")
    return ids


def statuses(report: VerifyReport) -> dict[str, str]:
    return {c.id: c.status for c in report.checks}


INTEGER = {"error-bound", "integer-exact", "float-product"}  # checks of integer codes


@pytest.mark.parametrize(
    "scheme", ["q2_block16_asym", "q4_block64", "q6_channel_sym", "q8_tensor", "bf16", "q5_block32"]
)
def test_an_honest_file_passes_every_check(source: Path, scheme: str) -> None:
    report = checked(convert(source, scheme), source, min_sqnr=1.0, max_nmse=0.5)
    assert not failed(report)
    wanted = {"integrity", "same-tensors", "kept-exact", "error-bound", "recorded-error"}
    wanted |= {"integer-exact", "min-sqnr", "max-nmse"}
    assert wanted <= set(statuses(report))
    skipped = {i for i, s in statuses(report).items() if s == "skip"}
    assert skipped == (INTEGER if scheme == "bf16" else set())


def test_the_helper_changes_nothing_by_itself(source: Path) -> None:
    path = convert(source, "q4_block32")
    before = checked(path, source).to_json()
    Qblk(path).write(path)
    assert checked(path, source).to_json() == before


def extreme() -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Finite weights where binary32 or a float16 scale comes to an end."""
    g = np.random.default_rng(5).standard_normal((34, 66)).astype(np.float32)
    rows = g.copy()
    rows[0, 0] = 1e30
    for row, factor in ((1, 1e-30), (2, 0.0), (3, 1e20)):
        rows[row] *= np.float32(factor)
    one = np.zeros_like(g)
    one[3, 3] = 3.4e38
    return {
        "constant": np.full_like(g, -0.3),
        "negative zeros": np.full_like(g, -0.0),
        "far from zero": np.abs(g) + 100,
        "rows of all sizes": rows,
        "large": g * np.float32(3e37),
        "largest": np.where(g > 0, np.float32(3.4e38), np.float32(-3.4e38)),
        "one": one,
        "smallest": (g.astype(np.float64) * 1e-44).astype(np.float32),
        "below binary32": g.astype(np.float64) * 1e-60,
        "large float16": (g * np.float32(1e4)).astype(np.float16),
        "small float16": (g * np.float32(1e-7)).astype(np.float16),
    }


@pytest.mark.parametrize("kind", extreme())
@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize(
    "scheme", ["q2_block16_asym", "q3_block64", "q4_channel_asym", "q6_tensor", "q8_block32_sym"]
)
def test_extreme_weights_are_refused_or_kept_within_every_promise(
    kind: str, method: str, scheme: str, tmp_path: Path
) -> None:
    source = save(tmp_path / "m.safetensors", {"w": extreme()[kind]})
    try:
        path = convert(source, scheme, range=RangeMethod(method))
    except WeightError:
        assert kind in ("large", "largest", "one", "rows of all sizes")
        return
    # Two bits may be too few for such weights, which is no promise of a format.
    assert failed(checked(path, source)) <= ({"usable"} if scheme.startswith("q2") else set())
    assert read_independently(path).code == 0


# --- integrity ------------------------------------------------------------------------------------


def test_a_damaged_byte_fails_integrity_and_nothing_else_is_judged(source: Path) -> None:
    path = convert(source, "q4_block32")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = checked(path, source)
    assert failed(report) == {"integrity"}
    assert len(report.checks) == 1


@pytest.mark.parametrize("kind", ["qblk", "gguf"])
def test_a_truncated_file_fails_integrity(source: Path, kind: str) -> None:
    path = convert(source, "q8_0" if kind == "gguf" else "q4_block32", f"m.{kind}")
    path.write_bytes(path.read_bytes()[:-100])
    assert failed(checked(path, source)) == {"integrity"}


# --- against the source ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.bias", "ids"])
def test_a_kept_tensor_that_differs_from_the_source_fails(source: Path, name: str) -> None:
    file = Qblk(convert(source, "q4_block32"))
    file.data[name, "data"][5] ^= 1
    report = checked(file.write(source.parent / "t.qblk"), source)
    assert failed(report) == {"kept-exact"}
    assert next(c.tensor for c in report.checks if c.id == "kept-exact") == name


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "missing": lambda t: t.pop("b.weight"),
    "kept missing": lambda t: t.pop("ids"),
    "extra": lambda t: t.update(extra=gaussian(9, 4)),
    "shape": lambda t: t.update({"a.weight": t["a.weight"].reshape(64, 40)}),
    "renamed": lambda t: t.update(renamed=t.pop("a.weight")),
    "dtype": lambda t: t.update({"a.weight": t["a.weight"].astype(np.float64)}),
    "kept dtype": lambda t: t.update(ids=t["ids"].astype(np.int64)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["qblk", "gguf"])
def test_another_source_fails(source: Path, change: str, kind: str) -> None:
    if kind == "gguf" and "dtype" in change:
        return  # GGUF does not record the dtypes of the source
    path = convert(source, "q8_0" if kind == "gguf" else "q4_block32", f"m.{kind}")
    other = dict(TENSORS)
    CHANGES[change](other)
    report = checked(path, save(source.parent / "other.safetensors", other))
    assert "same-tensors" in failed(report)


def test_other_weights_of_the_same_shape_fail(source: Path) -> None:
    other = save(source.parent / "o.safetensors", TENSORS | {"a.weight": gaussian(99, 40, 64)})
    assert {"error-bound", "recorded-error"} <= failed(
        checked(convert(source, "q4_block32"), other)
    )
    assert "error-bound" in failed(checked(convert(source, "q8_0", "m.gguf"), other))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["a.weight", "b.weight", "c.weight"])
@pytest.mark.parametrize("scheme", ["q4_block32", "q4_0", "bf16"])
def test_a_source_with_a_bad_weight_never_passes(
    source: Path, name: str, bad: float, scheme: str
) -> None:
    """No number compares with NaN: a maximum or a limit must not hide one."""
    path = convert(source, scheme, "m.gguf" if scheme == "q4_0" else "m.qblk")
    changed = TENSORS[name].copy()
    changed[3, 3] = bad
    other = save(source.parent / "o.safetensors", TENSORS | {name: changed})
    if (name, scheme) == ("b.weight", "bf16"):  # kept as it is: not even equal
        assert "kept-exact" in failed(checked(path, other))
    else:
        with pytest.raises(WeightError, match=name):
            checked(path, other)


@pytest.mark.parametrize("by", [-1.0, 0.01, 1e9])
def test_a_recorded_error_that_is_wrong_fails(source: Path, by: float) -> None:
    file = Qblk(convert(source, "q4_block32"))
    file.tensor("b.weight")["error"]["sqnr_db"] += by
    report = checked(file.write(source.parent / "t.qblk"), source)
    assert failed(report) == {"recorded-error"}
    assert next(c.tensor for c in report.checks if c.id == "recorded-error") == "b.weight"


@pytest.mark.parametrize("key", ["max", "nmse"])
def test_the_other_recorded_errors_are_promises_too(source: Path, key: str) -> None:
    file = Qblk(convert(source, "q4_block32"))
    file.tensor("b.weight")["error"][key] *= 0.5
    assert failed(checked(file.write(source.parent / "t.qblk"), source)) == {"recorded-error"}


@pytest.mark.parametrize("note", [{"max": 0.0, "nmse": 0.0}, None])
def test_a_cast_with_wrong_values_fails_though_no_sqnr_is_recorded(
    source: Path, note: dict[str, float] | None
) -> None:
    """A lossless cast records no SQNR, and has no codes for a bound."""
    file = Qblk(convert(source, "f32"))
    entry = file.tensor("b.weight")
    assert "sqnr_db" not in entry["error"]
    if note is None:
        del entry["error"]
    file.data["b.weight", "data"][:4] = struct.pack("<f", 7.0)
    assert failed(checked(file.write(source.parent / "t.qblk"), source))


# --- codes ----------------------------------------------------------------------------------------


def off_by_two(file: Qblk, name: str) -> None:
    """Move one code of a 4-bit tensor by two steps, away from the nearer end."""
    codes = file.data[name, "codes"]
    low = codes[0] & 15
    codes[0] = (codes[0] & 0xF0) | (low + 2 if low < 8 else low - 2)


@pytest.mark.parametrize("scheme", ["q4_block32_sym", "q4_block64_asym", "q4_channel", "q4_tensor"])
def test_a_code_off_by_two_breaks_the_error_bound(source: Path, scheme: str) -> None:
    """Even where the recorded errors have been made to agree."""
    file = Qblk(convert(source, scheme))
    off_by_two(file, "a.weight")
    path = file.write(source.parent / "t.qblk")
    report = checked(path, source)
    assert {"error-bound"} <= failed(report) <= {"error-bound", "recorded-error"}
    row = next(t for t in report.tensors if t.name == "a.weight")
    assert row.worst_step is not None
    assert 1.4 < row.worst_step < 2.6
    file.tensor("a.weight")["error"]["sqnr_db"] = row.sqnr_db
    assert failed(checked(file.write(path), source)) >= {"error-bound"}


def test_the_error_bound_holds_codes_that_were_rounded_to_the_nearest_alone(source: Path) -> None:
    """SPEC.md section 3: other roundings move codes on purpose, and say so."""
    file = Qblk(convert(source, "q4_block32_sym"))
    off_by_two(file, "a.weight")
    file.tensor("a.weight")["decision"]["rounding"] = "compensated"
    report = checked(file.write(source.parent / "t.qblk"), source)
    (bound,) = [c for c in report.checks if c.id == "error-bound"]
    assert bound.status == "pass"
    assert "without 1 tensor whose" in bound.detail
    for name in ("b.weight", "c.weight"):
        file.tensor(name)["decision"]["rounding"] = "compensated"
    report = checked(file.write(source.parent / "t.qblk"), source)
    assert statuses(report)["error-bound"] == "skip"
    file.tensor("a.weight")["decision"]["rounding"] = "nearest"
    assert "error-bound" in failed(checked(file.write(source.parent / "t.qblk"), source))


@pytest.mark.parametrize("factor", [0.5, 1.1])
def test_a_wrong_scale_breaks_a_promise(source: Path, factor: float) -> None:
    file = Qblk(convert(source, "q8_channel_sym"))
    scales = np.frombuffer(file.data["a.weight", "scales"], "<f4").copy()
    scales[7] *= factor
    file.data["a.weight", "scales"][:] = scales.tobytes()
    assert failed(checked(file.write(source.parent / "t.qblk"), source))


def test_a_scale_of_zero_breaks_a_promise_even_with_honest_notes(source: Path) -> None:
    """Every weight of the group is then beyond its range; it must not count as clipped."""
    file = Qblk(convert(source, "q8_channel_sym"))
    file.data["a.weight", "scales"][:4] = bytes(4)
    path = file.write(source.parent / "t.qblk")
    assert "recorded-error" in failed(checked(path, source))
    row = next(t for t in checked(path, source).tensors if t.name == "a.weight")
    file.tensor("a.weight")["error"]["sqnr_db"] = row.sqnr_db
    assert failed(checked(file.write(path), source))


def test_the_integer_check_fails_when_int32_and_int64_differ(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed codes' product, which is right, differs from the wrong one as well."""
    path = convert(source, "q4_block32")
    real = kernels.integer_product

    def wrong(*arguments: Any, **options: Any) -> Any:
        product = real(*arguments, **options)
        return Product(product.y, False)

    monkeypatch.setattr(kernels, "integer_product", wrong, raising=False)
    assert failed(checked(path)) == {"integer-exact"}


def test_the_float_product_check_fails_when_the_integer_path_is_off(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = convert(source, "q4_block32")
    real = kernels.integer_product

    def wrong(*arguments: Any, **options: Any) -> Any:
        product = real(*arguments, **options)
        return Product(product.y * (1 + 2.0**-12), product.exact)

    monkeypatch.setattr(kernels, "integer_product", wrong, raising=False)
    assert failed(checked(path)) == {"float-product", "integer-exact"}


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qblk", "gguf"])
def test_limits_fail_just_beyond_the_worst_tensor(source: Path, kind: str) -> None:
    path = convert(source, "q8_0" if kind == "gguf" else "q4_block32", f"m.{kind}")
    rows = checked(path, source).tensors
    worst_db = min(t.sqnr_db for t in rows if t.sqnr_db is not None)
    worst_nmse = max(t.nmse for t in rows if t.nmse is not None)
    assert not failed(checked(path, source, min_sqnr=worst_db, max_nmse=worst_nmse))
    assert failed(checked(path, source, min_sqnr=worst_db + 1e-6)) == {"min-sqnr"}
    assert failed(checked(path, source, max_nmse=worst_nmse * 0.999)) == {"max-nmse"}
    assert failed(checked(path, source, min_sqnr=float("nan"))) == {"min-sqnr"}
    assert failed(checked(path, source, max_nmse=float("nan"))) == {"max-nmse"}


def test_a_tensor_of_zeros_that_is_not_stored_as_zeros_fails_limits(tmp_path: Path) -> None:
    """Its SQNR is minus infinity and its normalised error has no denominator."""
    source = save(tmp_path / "m.safetensors", {"z": np.zeros((40, 64), np.float32)})
    file = Qblk(convert(source, "q4_block32_sym"))
    scales = file.data["z", "scales"]
    scales[:] = np.full(len(scales) // 2, 1.0, "<f2").tobytes()
    off_by_two(file, "z")
    path = file.write(tmp_path / "t.qblk")
    assert "min-sqnr" in failed(checked(path, source, min_sqnr=-1e9))
    assert "max-nmse" in failed(checked(path, source, max_nmse=1e9))


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_a_gguf_code_that_is_off_breaks_the_error_bound(source: Path, scheme: str) -> None:
    path = convert(source, scheme, "m.gguf")
    assert not failed(checked(path, source))
    model = open_gguf(path)
    tensor = next(t for t in model.tensors if t.name == "a.weight")
    raw = model.raw(tensor, 0, tensor.nbytes)
    model.close()
    data = bytearray(path.read_bytes())
    place = data.index(raw)
    header = {"q4_0": 2, "q4_1": 4, "q5_0": 6, "q5_1": 8, "q8_0": 2}[scheme]
    # The last block, whose first code may be an end of the range: take one that is not.
    block = len(raw) // (40 * 64 // 32)
    for i in range(place + header, place + block):
        low = data[i] & 15
        if scheme == "q8_0" and 8 < data[i] < 100:
            data[i] += 3
            break
        if scheme != "q8_0" and 4 <= low <= 9:
            data[i] = (data[i] & 0xF0) | (low + 3)
            break
    path.write_bytes(data)
    assert failed(checked(path, source)) == {"error-bound"}


def test_a_gguf_tensor_that_was_kept_and_differs_fails(source: Path) -> None:
    path = convert(source, "q4_0", "m.gguf")
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["b.bias"].tobytes()) + 6] ^= 1
    path.write_bytes(data)
    assert failed(checked(path, source)) == {"kept-exact"}


@pytest.mark.parametrize("scheme", ["f16", "bf16", "f32"])
def test_a_gguf_cast_with_wrong_values_fails(source: Path, scheme: str) -> None:
    """GGUF has no digest and no recorded error: a cast is held against the source or not at all."""
    path = convert(source, scheme, "m.gguf")
    assert not failed(checked(path, source))
    model = open_gguf(path)
    name = "a.weight" if scheme != "f32" else "b.weight"
    tensor = next(t for t in model.tensors if t.name == name)
    raw = model.raw(tensor, 0, tensor.nbytes)
    model.close()
    data = path.read_bytes()
    assert data.count(raw) == 1
    path.write_bytes(data.replace(raw, bytes(len(raw))))
    assert failed(checked(path, source))


def test_a_gguf_integer_tensor_is_not_excused_by_the_width_of_the_source(source: Path) -> None:
    path = convert(source, "q8_0", "m.gguf")
    wide = TENSORS | {"ids": TENSORS["ids"].astype(np.int64) + 1}
    assert failed(checked(path, save(source.parent / "o.safetensors", wide)))


# --- what is not checked is said ------------------------------------------------------------------


def test_without_a_source_every_check_that_needs_one_is_listed_as_skipped(source: Path) -> None:
    path = convert(source, "q4_block32")
    complete = set(statuses(checked(path, source)))
    alone = statuses(checked(path))
    assert set(alone) == complete
    skipped = {i for i, s in alone.items() if s == "skip"}
    wanted = {"same-tensors", "kept-exact", "quality", "usable", "error-bound", "recorded-error"}
    assert skipped == wanted


def test_without_integer_codes_every_check_that_needs_them_is_listed_as_skipped(
    source: Path,
) -> None:
    found = statuses(checked(convert(source, "bf16"), source))
    assert found["integer-exact"] == found["float-product"] == found["error-bound"] == "skip"


def test_samples_that_belong_to_no_tensor_are_not_passed_over(source: Path) -> None:
    samples = save(source.parent / "s.safetensors", {"nothing": gaussian(1, 9, 64)})
    report = checked(convert(source, "q4_block32"), samples=(samples,))
    assert report.warnings
    assert any("nothing" in w or "s.safetensors" in w for w in report.warnings)


def test_samples_are_opened_as_often_for_many_tensors_as_for_one(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to see what they are, and once to read."""
    tensors = {f"w{i}": gaussian(i, 32, 64) for i in range(6)}
    path = convert(save(source.parent / "many.safetensors", tensors), "q4_block32")
    samples = save(source.parent / "s.safetensors", {f"w{i}": gaussian(9, 9, 64) for i in range(6)})
    opened: list[object] = []
    real = os.open

    def noted(name: Any, *arguments: Any, **more: Any) -> int:
        opened.append(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(os, "open", noted)
    report = checked(path, samples=(samples,))
    assert [t.inputs for t in report.tensors] == ["recorded"] * 6
    assert opened.count(samples) == 2


def test_the_command_gives_1_for_a_broken_promise_and_names_the_tensor(
    small: Path, small_qblk: Path, tmp_path: Path, call: Call
) -> None:
    file = Qblk(small_qblk)
    off_by_two(file, "a.weight")
    path = file.write(tmp_path / "t.qblk")
    told = call("verify", path, "--against", small, "--json")
    assert told.code == 1
    assert told.json["status"] == "fail"
    bound = next(c for c in told.json["checks"] if c["id"] == "error-bound")
    assert (bound["status"], bound["tensor"]) == ("fail", "a.weight")
    shutil.copy(small_qblk, path)
    assert call("verify", path, "--against", small).code == 0


# --- products, and what spoils them ---------------------------------------------------------------


def test_the_worst_product_is_held_against_its_limit(source: Path) -> None:
    path = convert(source, "q4_block32")
    worst = min(t.output_sqnr_db or 0.0 for t in checked(path, source).tensors)
    assert not failed(checked(path, source, min_output_sqnr=worst - 0.01))
    assert failed(checked(path, source, min_output_sqnr=worst + 0.01)) == {"min-output-sqnr"}


def test_a_limit_on_products_is_no_pass_without_products(source: Path) -> None:
    report = checked(convert(source, "bf16"), source, min_output_sqnr=10.0)
    assert statuses(report)["min-output-sqnr"] == "skip"


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("against", [True, False])
def test_a_gguf_scale_that_is_not_finite_fails(source: Path, bits: int, against: bool) -> None:
    path = convert(source, "q4_0", "m.gguf")
    model = open_gguf(path)
    tensor = next(t for t in model.tensors if t.dtype == "Q4_0")
    block = model.raw(tensor, 0, 18)
    model.close()
    data = path.read_bytes()
    assert data.count(block) == 1
    path.write_bytes(data.replace(block, struct.pack("<H", bits) + block[2:]))
    assert "finite" in failed(checked(path, source if against else None))


def test_a_static_scale_that_clips_is_warned_about(source: Path) -> None:
    """Inputs a hundred times as wide as the calibrated range: the weights are not to blame."""
    inputs = {"a": gaussian(1, 64, TENSORS["a.weight"].shape[1])}
    calibration = source.parent / "c.safetensors"
    narrow = save(source.parent / "narrow.safetensors", inputs)
    calibrate(CalibrateOptions(activations=(narrow,), output=calibration))
    path = convert(source, "q8_channel", calibration=calibration)
    wide = save(source.parent / "wide.safetensors", {"a": inputs["a"] * np.float32(100)})
    assert not checked(path, source, samples=(narrow,)).warnings
    report = checked(path, source, samples=(wide,))
    assert any("spoil" in w and "a.weight" in w for w in report.warnings)


def test_a_calibration_of_another_model_is_refused(source: Path) -> None:
    calibration = source.parent / "c.safetensors"
    recorded = save(source.parent / "r.safetensors", {"elsewhere": gaussian(1, 8, 64)})
    calibrate(CalibrateOptions(activations=(recorded,), output=calibration))
    with pytest.raises(UnsupportedError, match="no layer of the calibration"):
        convert(source, "q8_channel", calibration=calibration)
    with pytest.raises(UnsupportedError, match="no layer of the activations"):
        calibrate(
            CalibrateOptions(activations=(recorded,), output=calibration, model=source, force=True)
        )


def test_a_calibration_of_no_layer_is_refused_for_gguf_too(source: Path) -> None:
    calibration = source.parent / "c.safetensors"
    recorded = save(source.parent / "r.safetensors", {"z": gaussian(1, 8, 64)})
    calibrate(CalibrateOptions(activations=(recorded,), output=calibration))
    with pytest.raises(UnsupportedError, match="no layer of the calibration"):
        convert(source, "q8_0", "m.gguf", calibration=calibration)


@pytest.mark.parametrize(
    "scheme", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "tq2_0", "q4_k"]
)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 3e-6])
def test_scales_that_float16_rounds_are_within_the_bound(
    scheme: str, size: float, tmp_path: Path
) -> None:
    """Codes are made before the scale is rounded, by up to half of 2^-24 where it is subnormal."""
    x = gaussian(1, 64, 512) * np.float32(size)
    source = save(tmp_path / "m.safetensors", {"w": x})
    path = convert(source, scheme, "m.gguf")
    assert failed(checked(path, source)) <= {"quality", "usable"}
    spoiled = x.copy()
    spoiled[5, np.abs(x[5]).argmax()] = 0  # some steps away from what is stored, and not clipped
    other = save(tmp_path / "other.safetensors", {"w": spoiled})
    report = checked(path, other)
    (row,) = report.tensors
    if scheme != "tq2_0" and size == 1e-3:
        assert "error-bound" in row.fails
