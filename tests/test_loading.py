"""`qconvert.load`: names to tensors, values and codes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import Call, every_kind, save

import qconvert
from qconvert.errors import InputError, UnsupportedError

# formats/schemes/SPEC.md section 9.
EXAMPLE = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example eight times in each of four rows: its ranges, and worth quantizing."""
    return save(tmp_path / "e.safetensors", {"w": np.tile(np.asarray(EXAMPLE, "<f4"), (4, 8))})


def test_codes_of_8_bits_are_those_of_the_worked_example(example: Path, done: Call) -> None:
    path = example.with_suffix(".qblk")
    done("quantize", example, "--scheme", "q8_channel_sym", "--min-values", 1, "-o", path)
    with qconvert.load(path) as tensors:
        found = tensors["w"].quantized()
    assert found.codes.dtype == np.uint8
    assert found.codes.shape == (4, 64)
    assert (found.codes[3, :8].astype(int) - 128).tolist() == [33, -14, -70, 35, -59, 10, 47, 127]
    assert found.zero_points.tolist() == [[128.0]] * 4
    assert found.zero_point.tolist() == [[128.0] * 64] * 4
    assert found.scale[:, 0] == pytest.approx([0.04881890] * 4, rel=1e-7)
    assert (found.block, found.bits) == (64, 8)


def test_codes_of_4_bits_are_those_of_the_worked_example(example: Path, done: Call) -> None:
    path = example.with_suffix(".qblk")
    options = ("--min-values", 1, "--range", "minmax")
    done("quantize", example, "--scheme", "q4_channel_asym", *options, "-o", path)
    with qconvert.load(str(path)) as tensors:
        found, values = tensors["w"].quantized(), np.asarray(tensors["w"])
    assert found.codes[2, 8:16].tolist() == [8, 4, 0, 8, 1, 6, 9, 15]
    assert found.zero_points.tolist() == [[5.25]] * 4
    assert found.scales.tolist() == [[float(np.float32(0.64))]] * 4
    wanted = [1.76, -0.8, -3.36, 1.76, -2.72, 0.48, 2.4, 6.24]
    assert values[0, :8] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("unit", ["tensor", "channel", "block16", "block64"])
@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_the_formula_of_codes_gives_the_values(
    small: Path, bits: int, unit: str, symmetry: str, tmp_path: Path
) -> None:
    """(codes - zero_point) · scale, by hand for one weight and to the last bit for all."""
    from qconvert.schemes import parse_scheme
    from qconvert.stages.quantize import QuantizeOptions, quantize

    path = tmp_path / "s.qblk"
    scheme = parse_scheme(f"q{bits}_{unit}_{symmetry}")
    quantize(small, QuantizeOptions(scheme=scheme, output=path))
    with qconvert.load(path) as tensors:
        for name in ("a.weight", "b.weight"):
            found, values = tensors[name].quantized(), tensors[name].dequantize()
            assert values.shape == tensors[name].shape == found.codes.shape
            assert int(found.codes.max()) < 2**bits
            row, column = 5, values.shape[1] - 1
            scale = found.scales[row, column // found.block]
            zero = found.zero_points[row, column // found.block]
            assert (found.scale[row, column], found.zero_point[row, column]) == (scale, zero)
            assert values[row, column] == (np.float32(found.codes[row, column]) - zero) * scale
            assert found.dequantize().tobytes() == values.tobytes()


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory, done: Call) -> Path:
    """A tensor of every kind, none quantized."""
    path = tmp_path_factory.mktemp("kept") / "m.qblk"
    done("quantize", model, "--scheme", "q8_channel", "--keep", "*", "-o", path)
    return path


@pytest.mark.parametrize("name", every_kind())
def test_kept_tensors_have_their_values(kept: Path, model: Path, name: str) -> None:
    original = every_kind()[name]
    floating = original.dtype.kind in "fV" or "f8" in name
    for path in (kept, model):
        with qconvert.load(path) as tensors:
            values = tensors[name].dequantize()
        assert values.shape == original.shape
        if floating or original.dtype == ml_dtypes.bfloat16:
            wide = np.float64 if original.dtype == np.float64 else np.float32
            assert values.dtype == wide
            assert (values == original.astype(wide)).all()
        else:
            assert values.dtype == original.dtype
            assert (values == original).all()


def test_the_mapping_has_the_names_of_the_file(small_qblk: Path, small_gguf: Path) -> None:
    with qconvert.load(small_qblk) as tensors:
        assert sorted(tensors) == ["a.weight", "b.bias", "b.weight"]
        assert tensors.kind == "qblk"
        assert tensors["a.weight"].dtype == "q4_block64_asym"
        assert tensors["a.weight"].activation is None
        assert tensors.files == ()
        with pytest.raises(KeyError):
            tensors["c.weight"]
        with pytest.raises(KeyError):
            tensors.file("config.json")
    with qconvert.load(small_gguf) as tensors:
        assert tensors["a.weight"].dtype == "Q8_0"
        assert tensors["a.weight"].dequantize().shape == (40, 64)


def test_companions_and_calibrations_come_with_the_file(tmp_path: Path, done: Call) -> None:
    samples = Path(__file__).parents[1] / "samples"
    calibration, path = tmp_path / "c.safetensors", tmp_path / "m.qblk"
    recorded = samples / "activations.safetensors"
    done("calibrate", samples / "tiny-llama", "--activations", recorded, "-o", calibration)
    options = ("--scheme", "q8_channel", "--calibration", calibration)
    done("quantize", samples / "tiny-llama", *options, "-o", path)
    with qconvert.load(path) as tensors:
        assert "config.json" in tensors.files
        wanted = (samples / "tiny-llama" / "config.json").read_bytes()
        assert tensors.file("config.json") == wanted
        note = tensors["model.layers.0.mlp.up_proj.weight"].activation
        assert note is not None
        assert note["samples"] == 48


@pytest.mark.parametrize("name", ["b.bias", "b.weight"])
def test_tensors_without_our_codes_are_refused(
    small_qblk: Path, small_gguf: Path, name: str
) -> None:
    path = small_qblk if name == "b.bias" else small_gguf
    with (
        qconvert.load(path) as tensors,
        pytest.raises(UnsupportedError, match=r"no codes with scales and zero points"),
    ):
        tensors[name].quantized()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        qconvert.load(tmp_path / "none.qblk")
