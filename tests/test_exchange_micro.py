"""Small floating numbers of other tools: what is written, read by a few lines of NumPy of its own
and by gguf-py, and what is refused of what others wrote.

That others' checkpoints are read value for value, `test_foreign` says.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, container, gaussian, save
from numpy.typing import NDArray

import qconvert

FOREIGN = ROOT / "tests" / "data" / "foreign"
LAYER = "model.layers.0"
PARTS = {
    "self_attn.q_proj": (64, 192),
    "self_attn.k_proj": (32, 192),
    "self_attn.v_proj": (32, 192),
    "self_attn.o_proj": (192, 64),
    "mlp.gate_proj": (96, 192),
    "mlp.up_proj": (96, 192),
    "mlp.down_proj": (192, 96),  # no whole number of ggml's blocks of 64
}
TOGETHER = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"))  # fmt: skip

F32 = NDArray[np.float32]
Raw = dict[str, tuple[str, list[int], bytes]]

# OCP Microscaling Formats 1.0, tables 1 and 7.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


def e4m3(data: NDArray[np.uint8]) -> F32:
    """Table 2 of FP8 Formats for Deep Learning (Micikevicius et al., 2022)."""
    exponent, mantissa = (data >> 3 & 15).astype(int), (data & 7).astype(np.float64)
    small = np.ldexp(mantissa, -9)
    value = np.where(exponent == 0, small, np.ldexp(1 + mantissa / 8, exponent - 7))
    value = np.where(data & 127 == 127, np.nan, value)
    return np.where(data & 128, -value, value).astype(np.float32)


def powers(data: NDArray[np.uint8]) -> F32:
    return np.ldexp(np.float32(1), data.astype(int) - 127)


def raw(path: Path) -> Raw:
    """The tensors of a safetensors file: dtype, shape and bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (t["dtype"], t["shape"], body[t["data_offsets"][0] : t["data_offsets"][1]])
        for name, t in header.items()
    }


def write(path: Path, tensors: Raw) -> None:
    at, header, body = 0, {}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at, body = at + len(data), body + data
    container(path, header, body)


def array(tensors: Raw, name: str, dtype: Any = np.uint8) -> NDArray[Any]:
    _, shape, data = tensors[name]
    return np.frombuffer(data, dtype).reshape(shape)


def decoded(tensors: Raw, module: str) -> F32:
    """A weight, by the page of its format and the arithmetic of tests/data/foreign/README.md."""
    scale = array(tensors, f"{module}.weight_scale")
    if f"{module}.weight" in tensors:
        codes = e4m3(array(tensors, f"{module}.weight"))
        each = powers(scale)
    else:
        packed = array(tensors, f"{module}.weight_packed")
        codes = E2M1[np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)]
        each = powers(scale)
        if tensors[f"{module}.weight_scale"][0] == "F8_E4M3":
            each = e4m3(scale) / array(tensors, f"{module}.weight_global_scale", "<f4")
    group = codes.shape[1] // each.shape[1]
    return np.asarray(codes * np.repeat(each, group, axis=1), np.float32)


def sqnr(x: F32, y: F32) -> float:
    wide = x.astype(np.float64)
    return float(10 * np.log10(np.square(wide).sum() / np.square(wide - y).sum()))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, F32]]:
    """One layer of a Llama, and its weights."""
    place = tmp_path_factory.mktemp("micro") / "model"
    place.mkdir()
    weights: dict[str, Any] = {}
    for i, (name, shape) in enumerate(PARTS.items()):
        weights[f"{LAYER}.{name}"] = gaussian(i, *shape, dtype=ml_dtypes.bfloat16)
    weights[f"{LAYER}.self_attn.v_proj"][0, 0] = 1.5  # of the three the largest
    weights[f"{LAYER}.self_attn.o_proj"][3] = 0
    tensors = {f"{name}.weight": w for name, w in weights.items()}
    save(place / "model.safetensors", {**tensors, "model.norm.weight": np.ones(64, np.float32)})
    document = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(document))
    return place, {name: np.asarray(w, np.float32) for name, w in weights.items()}


Written = Callable[[str], tuple[Path, Raw]]


@pytest.fixture(scope="module")
def written(source: tuple[Path, dict[str, F32]]) -> Written:
    """The model as a directory of a scheme, made once."""
    done: dict[str, tuple[Path, Raw]] = {}

    def make(scheme: str) -> tuple[Path, Raw]:
        if scheme not in done:
            place = source[0].parent / scheme
            qconvert.quantize(source[0], scheme, output=place)
            done[scheme] = place, raw(place / "model.safetensors")
        return done[scheme]

    return make


# --- written ---


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "mxfp8a16"])
def test_what_is_written_means_what_the_page_says_and_what_is_read(
    scheme: str, written: Written, source: tuple[Path, dict[str, F32]]
) -> None:
    place, tensors = written(scheme)
    least = {"nvfp4a16": 20, "mxfp4a16": 18, "mxfp8a16": 30}[scheme]
    with qconvert.load(place) as found:
        for module, weight in source[1].items():
            values = decoded(tensors, module)
            own = found[f"{module}.weight"].dequantize()
            np.testing.assert_array_equal(values.view(np.uint32), own.view(np.uint32))
            assert sqnr(weight, values) > least


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16", "mxfp8a16"])
def test_the_configuration_says_what_the_library_says_of_such_weights(
    scheme: str, written: Written
) -> None:
    peer = f"ct_{scheme}"
    blocks = [
        json.loads((place / "config.json").read_text())["quantization_config"]
        for place in (written(scheme)[0], FOREIGN / peer)
    ]
    groups = [block["config_groups"]["group_0"] for block in blocks]
    assert groups[0] == groups[1]
    assert blocks[0]["format"] == blocks[1]["format"]
    dtypes = [
        {(n.rpartition(".")[2], t[0]) for n, t in tensors.items() if "proj" in n}
        for tensors in (written(scheme)[1], raw(FOREIGN / peer / "model.safetensors"))
    ]
    assert dtypes[0] == dtypes[1]


def test_parts_of_a_layer_that_is_fused_have_one_global_scale_of_the_largest_of_them(
    written: Written, source: tuple[Path, dict[str, F32]]
) -> None:
    _, tensors = written("nvfp4a16")
    alone = [(name,) for name in PARTS if not any(name in parts for parts in TOGETHER)]
    for parts in (*TOGETHER, *alone):
        modules = [f"{LAYER}.{name}" for name in parts]
        largest = max(np.abs(source[1][m]).max() for m in modules)
        for m in modules:
            (found,) = array(tensors, f"{m}.weight_global_scale", "<f4")
            assert found == np.float32(448 * 6) / largest


def test_mxfp4_has_the_values_of_ggml_and_nvfp4_is_no_poorer(
    written: Written, source: tuple[Path, dict[str, F32]]
) -> None:
    """ggml's blocks as gguf-py decodes them; a scale of the tensor leaves more scales to choose."""
    for scheme, ggml in (("mxfp4a16", "mxfp4"), ("nvfp4a16", "nvfp4")):
        path = source[0].parent / f"{ggml}.gguf"
        qconvert.quantize(source[0], ggml, output=path, raw=True)
        peers = {t.name: t for t in gguf.GGUFReader(path).tensors}
        tensors = written(scheme)[1]
        for module, weight in source[1].items():
            peer = peers[f"{module}.weight"]
            if peer.tensor_type.name != ggml.upper():
                assert (ggml, module) == ("nvfp4", f"{LAYER}.mlp.down_proj")
                continue
            theirs = gguf.quants.dequantize(peer.data, peer.tensor_type)
            if ggml == "mxfp4":
                np.testing.assert_array_equal(theirs, decoded(tensors, module))
            else:
                assert sqnr(weight, decoded(tensors, module)) > sqnr(weight, theirs) - 0.02


def test_searched_scales_leave_less_error_than_those_of_the_extremes(
    written: Written, source: tuple[Path, dict[str, F32]]
) -> None:
    """compressed-tensors' own rule: the largest of a group at the end of the range."""
    _, tensors = written("nvfp4a16")
    module = f"{LAYER}.mlp.gate_proj"
    x = source[1][module]
    overall = array(tensors, f"{module}.weight_global_scale", "<f4")
    groups = x.reshape(-1, 16)
    scale = (overall * np.abs(groups).max(axis=1) / 6).astype(ml_dtypes.float8_e4m3fn)
    each = (scale.astype(np.float32) / overall)[:, None]
    near = np.abs(groups / each)[:, :, None] - E2M1[:8]
    plain = np.sign(groups) * E2M1[np.abs(near).argmin(axis=2)] * each
    assert sqnr(x, decoded(tensors, module)) > sqnr(x, plain.reshape(x.shape)) + 0.8


@pytest.fixture(scope="module")
def calibrated(source: tuple[Path, dict[str, F32]]) -> tuple[Path, dict[str, F32]]:
    """A calibration of all layers, and what it was made of: every fourth column thirty times as
    large.
    """
    rng, inputs = np.random.default_rng(7), {}
    for module, weight in source[1].items():
        inputs[module] = rng.normal(0.5, 1, (64, weight.shape[1])).astype(np.float32)
        inputs[module][:, ::4] *= 30
    place = source[0].parent
    save(place / "inputs.safetensors", inputs)
    path = place / "c.safetensors"
    qconvert.calibrate(
        source[0], activations=place / "inputs.safetensors", output=path, observer="minmax"
    )
    return path, inputs


def test_a_calibration_weighs_the_error(
    source: tuple[Path, dict[str, F32]],
    calibrated: tuple[Path, dict[str, F32]],
    tmp_path: Path,
    call: Call,
) -> None:
    """Columns whose inputs are thirty times as large come out closer, the others further off."""
    cal = calibrated[0]
    made = {}
    for name, options in (("plain", ()), ("weighted", ("--calibration", cal))):
        place = tmp_path / name
        done = call(
            *("quantize", source[0], "--scheme", "nvfp4a16", "--equalise", "off"),
            *("-o", place, *options),
        )
        assert done.code == 0, done.err
        made[name] = decoded(raw(place / "model.safetensors"), f"{LAYER}.mlp.down_proj")
    x = source[1][f"{LAYER}.mlp.down_proj"]
    loud, quiet = np.arange(96) % 4 == 0, np.arange(96) % 4 != 0
    of = {
        name: [sqnr(x[:, c], values[:, c]) for c in (loud, quiet)] for name, values in made.items()
    }
    assert of["weighted"][0] > of["plain"][0] + 1
    assert of["weighted"][1] < of["plain"][1]


def test_static_inputs_have_the_range_that_was_observed(
    source: tuple[Path, dict[str, F32]], calibrated: tuple[Path, dict[str, F32]], tmp_path: Path
) -> None:
    cal, inputs = calibrated
    qconvert.quantize(
        source[0], "w8a8_static", output=tmp_path / "m", calibration=cal, equalise="off"
    )
    tensors = raw(tmp_path / "m" / "model.safetensors")
    for module, x in inputs.items():
        scale = (max(x.max(), 0) - min(x.min(), 0)) / 255
        (stored,) = array(tensors, f"{module}.input_scale", ml_dtypes.bfloat16)
        assert stored == np.float32(scale).astype(ml_dtypes.bfloat16)
        (zero,) = array(tensors, f"{module}.input_zero_point", np.int8)
        assert zero == np.rint(-128 - min(x.min(), 0) / scale)
        codes = array(tensors, f"{module}.weight", np.int8).astype(np.float32)
        scales = array(tensors, f"{module}.weight_scale", ml_dtypes.bfloat16).astype(np.float32)
        assert sqnr(source[1][module], codes * scales) > 36
    block = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    peer = json.loads((FOREIGN / "ct_int8_static_asym" / "config.json").read_text())
    theirs = peer["quantization_config"]["config_groups"]["group_0"]
    ours = block["config_groups"]["group_0"]
    assert ours["input_activations"] == theirs["input_activations"]
    assert ours["format"] == theirs["format"] == block["format"]


def test_static_inputs_of_fp8_end_where_the_range_does(
    source: tuple[Path, dict[str, F32]], calibrated: tuple[Path, dict[str, F32]], tmp_path: Path
) -> None:
    cal, inputs = calibrated
    qconvert.quantize(
        source[0], "fp8_static", output=tmp_path / "m", calibration=cal, equalise="off"
    )
    tensors = raw(tmp_path / "m" / "model.safetensors")
    for module, x in inputs.items():
        (stored,) = array(tensors, f"{module}.input_scale", ml_dtypes.bfloat16).astype(np.float32)
        furthest = np.abs(x).max()
        # Ranges are known to a step of 255, and bfloat16 has eight significant bits.
        assert abs(448 * stored - furthest) < furthest * 2.0**-8 + (x.max() - x.min()) / 255
    block = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    peer = json.loads((FOREIGN / "ct_fp8_static" / "config.json").read_text())
    theirs = peer["quantization_config"]["config_groups"]["group_0"]
    ours = block["config_groups"]["group_0"]
    assert ours["input_activations"] == theirs["input_activations"]
    assert ours["format"] == theirs["format"] == block["format"]


FURTHEST = {"self_attn.k_proj": 3.0, "mlp.up_proj": 0.25}  # times what other parts have seen


@pytest.fixture(scope="module")
def uneven(
    source: tuple[Path, dict[str, F32]], calibrated: tuple[Path, dict[str, F32]]
) -> tuple[Path, dict[str, float]]:
    """A calibration in which parts of a layer have seen other inputs, and the largest magnitudes of
    these.
    """
    place = source[0].parent
    inputs = {m: x * FURTHEST.get(m.removeprefix(f"{LAYER}."), 1.0) for m, x in
              calibrated[1].items()}  # fmt: skip
    inputs = {m: x.astype(np.float32) for m, x in inputs.items()}
    save(place / "uneven.safetensors", inputs)
    path = place / "u.safetensors"
    qconvert.calibrate(
        source[0], activations=place / "uneven.safetensors", output=path, observer="minmax"
    )
    return path, {m: float(np.abs(x).max()) for m, x in inputs.items()}


def together(module: str) -> list[str]:
    """The parts of a layer that is fused, by the name of one of them."""
    name = module.removeprefix(f"{LAYER}.")
    parts = next((parts for parts in TOGETHER if name in parts), (name,))
    return [f"{LAYER}.{p}" for p in parts]


def test_nvfp4_with_inputs_has_one_scale_of_these_for_all_parts_of_a_layer(
    source: tuple[Path, dict[str, F32]], uneven: tuple[Path, dict[str, float]], tmp_path: Path,
    written: Written,
) -> None:  # fmt: skip
    """448 · 6 / the largest magnitude, a divisor, as vLLM wants it."""
    cal, largest = uneven
    options: dict[str, Any] = {"calibration": cal, "equalise": "off", "no_weighting": True}
    qconvert.quantize(source[0], "nvfp4a4", output=tmp_path / "m", **options)
    tensors = raw(tmp_path / "m" / "model.safetensors")
    for module in largest:
        assert tensors[f"{module}.input_global_scale"][:2] == ("F32", [1])
        (stored,) = array(tensors, f"{module}.input_global_scale", "<f4")
        whole = max(largest[m] for m in together(module))
        # Ranges are known to a step of 255, of -0.05 to 1 times the largest magnitude and wider.
        assert stored == pytest.approx(448 * 6 / whole, rel=0.01), module
    for module in largest:
        (stored,) = array(tensors, f"{module}.input_global_scale", "<f4")
        assert {array(tensors, f"{m}.input_global_scale", "<f4")[0] for m in together(module)} == {
            stored
        }
    # Weights are those of nvfp4a16, and the configuration is the library's own.
    plain = written("nvfp4a16")[1]
    assert all(tensors[name] == t for name, t in plain.items())
    block = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    peer = json.loads((FOREIGN / "ct_nvfp4" / "config.json").read_text())["quantization_config"]
    assert block["config_groups"]["group_0"] == peer["config_groups"]["group_0"]
    assert block["format"] == peer["format"]


def test_nvfp4_and_fp8_are_the_presets_of_these_names_in_such_a_directory(
    source: tuple[Path, dict[str, F32]], calibrated: tuple[Path, dict[str, F32]], call: Call
) -> None:
    line = ("quantize", source[0], "--format", "compressed-tensors", "--dry-run")
    line = (*line, "-o", source[0].parent / "none")
    for name, scheme in (("NVFP4", "nvfp4a4"), ("FP8", "fp8")):
        refused = call(*line, "--scheme", name)
        assert (refused.code, "--calibration" in refused.err) == (2, True), refused.err
        told = call(*line, "--scheme", name, "--calibration", calibrated[0], "--json").json
        assert {t["stored"] for t in told["tensors"] if t["quantized"]} == {scheme}


@pytest.mark.parametrize("scheme", ["fp8", "fp8_tensor"])
def test_e4m3_of_a_tensor_has_one_scale_for_all_parts_of_a_layer(
    scheme: str, source: tuple[Path, dict[str, F32]], uneven: tuple[Path, dict[str, float]],
    tmp_path: Path,
) -> None:  # fmt: skip
    cal, largest = uneven
    options: dict[str, Any] = {"equalise": "off"}
    if scheme == "fp8":
        options |= {"calibration": cal, "no_weighting": True}
    qconvert.quantize(source[0], scheme, output=tmp_path / "m", **options)
    tensors = raw(tmp_path / "m" / "model.safetensors")
    with qconvert.load(tmp_path / "m") as found:
        for module, weight in source[1].items():
            assert tensors[f"{module}.weight_scale"][:2] == ("BF16", [1])
            (scale,) = array(tensors, f"{module}.weight_scale", ml_dtypes.bfloat16).astype("f4")
            most = max(np.abs(source[1][m]).max() for m in together(module))
            assert scale == pytest.approx(most / 448, rel=2.0**-8)
            values = e4m3(array(tensors, f"{module}.weight")) * scale
            np.testing.assert_array_equal(values, found[f"{module}.weight"].dequantize())
            assert sqnr(weight, values) > 30
            name = f"{module}.input_scale"
            assert (name in tensors) == (scheme == "fp8")
            if scheme == "fp8":
                (stored,) = array(tensors, name, ml_dtypes.bfloat16).astype("f4")
                whole = max(largest[m] for m in together(module))
                assert stored == pytest.approx(whole / 448, rel=0.02)
    block = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    (group,) = block["config_groups"].values()
    assert group["weights"]["strategy"] == "tensor"
    how = group["input_activations"]
    static = ("tensor", False) if scheme == "fp8" else ("token", True)
    assert (how["strategy"], how["dynamic"], how["type"]) == (*static, "float")
    assert qconvert.verify(tmp_path / "m", against=source[0]).status == "pass"


def test_static_inputs_need_a_calibration_of_every_layer(
    source: tuple[Path, dict[str, F32]],
    calibrated: tuple[Path, dict[str, F32]],
    tmp_path: Path,
    call: Call,
) -> None:
    command = ("quantize", source[0], "--scheme", "w8a8_static", "-o", tmp_path / "m")
    done = call(*command)
    assert (done.code, "--calibration" in done.err) == (2, True)
    few = dict(list(calibrated[1].items())[:3])
    save(tmp_path / "few.safetensors", few)
    qconvert.calibrate(
        source[0], activations=tmp_path / "few.safetensors", output=tmp_path / "c.safetensors"
    )
    done = call(*command, "--calibration", tmp_path / "c.safetensors")
    assert done.code == 3
    assert "lacks 4 of 7 layers" in " ".join(done.err.split())
    assert not (tmp_path / "m").exists()


# --- moved ---


def notes(source: Path, output: Path, call: Call, *options: str) -> str:
    """What is said of a move."""
    done = call("quantize", source, "--scheme", "keep", "-o", output, *options)
    assert done.code == 0, done.err
    return " ".join((done.out + done.err).split())


def test_mxfp4_moves_to_ggml_and_the_values_stay_for_gguf_py(
    written: Written, tmp_path: Path, call: Call
) -> None:
    place, tensors = written("mxfp4a16")
    path = tmp_path / "m.gguf"
    assert "7 quantized tensors moved exactly, 0 decoded" in notes(
        place, path, call, "--exact", "--raw"
    )
    for peer in gguf.GGUFReader(path).tensors:
        if peer.name.endswith("proj.weight"):
            assert peer.tensor_type.name == "MXFP4"
            theirs = gguf.quants.dequantize(peer.data, peer.tensor_type)
            np.testing.assert_array_equal(
                theirs, decoded(tensors, peer.name.removesuffix(".weight"))
            )


@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_what_moves_to_its_own_format_keeps_every_byte(
    scheme: str, written: Written, tmp_path: Path, call: Call
) -> None:
    place, tensors = written(scheme)
    options = ("--exact", "--format", "compressed-tensors")
    assert "7 quantized tensors moved exactly" in notes(place, tmp_path / "m", call, *options)
    assert raw(tmp_path / "m" / "model.safetensors") == tensors
    blocks = [
        json.loads((p / "config.json").read_text())["quantization_config"]
        for p in (place, tmp_path / "m")
    ]
    assert blocks[0] == blocks[1]


def test_codes_and_scales_of_packed_experts_move(tmp_path: Path, call: Call) -> None:
    """DeepSeek's packed experts, of compressed-tensors' own codes."""
    peer = FOREIGN / "deepseek_v4_fp4"
    said = notes(peer, tmp_path / "m", call, "--format", "compressed-tensors")
    assert "6 quantized tensors moved exactly, 1 decoded" in said
    theirs, ours = raw(peer / "model.safetensors"), raw(tmp_path / "m" / "model.safetensors")
    expected = raw(peer / "expected.safetensors")
    for part in ("w1", "w2", "w3"):
        module = f"layers.0.ffn.experts.1.{part}"
        assert ours[f"{module}.weight_scale"][2] == theirs[f"{module}.scale"][2]
        values = array(expected, f"{module}.weight", "<f4")
        np.testing.assert_array_equal(decoded(ours, module), values)


def test_a_factor_becomes_a_divisor_and_where_that_is_rounded_it_is_said(
    tmp_path: Path, call: Call
) -> None:
    peer = FOREIGN / "modelopt_nvfp4"
    theirs, expected = raw(peer / "model.safetensors"), raw(peer / "expected.safetensors")
    said = notes(peer, tmp_path / "m", call, "--format", "compressed-tensors")
    assert "moved exactly" in said
    assert "but for the scale of the tensor" in said
    ours, equal, near = raw(tmp_path / "m" / "model.safetensors"), 0, 0
    for name in (n for n in expected if n.endswith("proj.weight")):
        module = name.removesuffix(".weight")
        assert ours[f"{module}.weight_scale"][2] == theirs[f"{module}.weight_scale"][2]
        codes = array(ours, f"{module}.weight_packed"), array(theirs, f"{module}.weight")
        pairs = [E2M1[np.stack([c & 15, c >> 4])] for c in codes]
        np.testing.assert_array_equal(*pairs)
        values = array(expected, name, "<f4")
        np.testing.assert_allclose(decoded(ours, module), values, rtol=2.0**-22, atol=0)
        same = bool((decoded(ours, module) == values).all())
        equal, near = equal + same, near + (not same)
    assert f"{equal} quantized tensors moved exactly, {near} but for" in said
    done = call(
        *("quantize", peer, "--scheme", "keep", "--exact", "-o", tmp_path / "e"),
        *("--format", "compressed-tensors"),
    )
    assert done.code == 3
    assert f"{near} of {equal + near} quantized tensors" in done.err


def test_nvfp4_with_a_scale_of_the_tensor_does_not_move_to_ggml(
    written: Written, tmp_path: Path, call: Call
) -> None:
    place, _ = written("nvfp4a16")
    done = call(
        "quantize", place, "--scheme", "keep", "--exact", "--raw", "-o", tmp_path / "m.gguf"
    )
    assert done.code == 3
    assert "7 of 7 quantized tensors do not move exactly" in done.err


def test_nvfp4_of_ggml_moves_with_a_scale_of_one(
    source: tuple[Path, dict[str, F32]], tmp_path: Path, call: Call
) -> None:
    """Through a directory whose scale of the tensor is set to one, and back."""
    qconvert.quantize(source[0], "nvfp4a16", output=tmp_path / "m")
    tensors = raw(tmp_path / "m" / "model.safetensors")
    for name, (dtype, shape, _) in tensors.items():
        if name.endswith("weight_global_scale"):
            tensors[name] = dtype, shape, np.float32(1).tobytes()
    write(tmp_path / "m" / "model.safetensors", tensors)
    said = notes(tmp_path / "m", tmp_path / "m.gguf", call, "--raw")
    assert "6 quantized tensors moved exactly, 1 decoded" in said  # rows of 96 values
    for peer in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        if peer.tensor_type.name == "NVFP4":
            theirs = gguf.quants.dequantize(peer.data, peer.tensor_type)
            np.testing.assert_array_equal(
                theirs, decoded(tensors, peer.name.removesuffix(".weight"))
            )


def test_moved_parts_of_one_layer_with_different_scales_are_warned_of(
    written: Written, tmp_path: Path, call: Call
) -> None:
    place, tensors = written("nvfp4a16")
    shutil.copytree(place, tmp_path / "m")
    name = f"{LAYER}.self_attn.k_proj.weight_global_scale"
    write(
        tmp_path / "m" / "model.safetensors",
        {**tensors, name: ("F32", [1], np.float32(77).tobytes())},
    )
    options = ("--format", "compressed-tensors")
    assert "vLLM takes the largest" in notes(tmp_path / "m", tmp_path / "a", call, *options)
    assert "vLLM takes the largest" not in notes(place, tmp_path / "b", call, *options)
    for checked, warned in ((tmp_path / "m", True), (place, False)):
        done = call("verify", checked, "--json")
        assert done.code == 0, done.err
        said = [w for w in done.json["warnings"] if "different scales of the tensor" in w]
        assert len(said) == warned
        assert not said or f"such as that of '{LAYER}.self_attn.q_proj'" in said[0]


# --- refused ---


def changed(
    peer: str,
    place: Path,
    tensors: Callable[[Raw], None] = lambda tensors: None,
    block: Callable[[dict[str, Any]], None] = lambda block: None,
) -> Path:
    """A peer's checkpoint with other tensors, or another block of quantization."""
    shutil.copytree(FOREIGN / peer, place)
    (place / "expected.safetensors").unlink()
    (place / "hf_quant_config.json").unlink(missing_ok=True)
    stored = raw(place / "model.safetensors")
    tensors(stored)
    write(place / "model.safetensors", stored)
    document = json.loads((place / "config.json").read_text())
    block(document["quantization_config"])
    (place / "config.json").write_text(json.dumps(document))
    return place


def group(block: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = block["config_groups"]["group_0"]["weights"]
    return found


Q = f"{LAYER}.self_attn.q_proj"
E0 = "layers.0.ffn.experts.0.w1"
CASES: dict[str, tuple[str, Any, Any, str]] = {
    "field": ("ct_nvfp4a16", None, lambda b: group(b).update(zap=1), "zap"),
    "group size": ("ct_nvfp4a16", None, lambda b: group(b).update(group_size=32), "32"),
    "bits": ("ct_mxfp4a16", None, lambda b: group(b).update(num_bits=8), "EXCHANGE"),
    "type": ("ct_mxfp8a16", None, lambda b: group(b).update(type="int"), "EXCHANGE"),
    "no scale": ("ct_mxfp4a16", lambda t: t.pop(f"{Q}.weight_scale"), None, "EXCHANGE-MISSING"),
    "no global": ("ct_nvfp4a16", lambda t: t.pop(f"{Q}.weight_global_scale"), None,
                  "EXCHANGE-MISSING"),
    "no codes": ("ct_nvfp4a16", lambda t: t.pop(f"{Q}.weight_packed"), None, "EXCHANGE-ORPHAN"),
    "shape": ("ct_mxfp4a16",
              lambda t: t.update({f"{Q}.weight_scale": ("U8", [16, 1], b"\x7f" * 16)}),
              None, "EXCHANGE-SHAPE"),
    "six bits": ("ct_mxfp6a16",
                 lambda t: t.update({f"{Q}.weight_packed": ("U8", [16, 47], bytes(16 * 47))}),
                 None, "EXCHANGE-SHAPE"),
    "twice": ("ct_nvfp4a16", lambda t: t.update({f"{Q}.weight": ("BF16", [1, 1], b"\0\0")}),
              None, "EXCHANGE-TWICE"),
    "algorithm": ("modelopt_nvfp4", None, lambda b: b.update(quant_algo="NVFP4_AWQ"), "NVFP4_AWQ"),
    "field of modelopt": ("modelopt_fp8", None, lambda b: b.update(zap=1), "zap"),
    "other algorithm": ("modelopt_nvfp4", None, lambda b: b.update(quant_algo="FP8"),
                        "EXCHANGE-SHAPE"),
    "layer": ("modelopt_mixed", None, lambda b: b["quantized_layers"].pop(Q), Q),
    "smoothed": ("modelopt_nvfp4",
                 lambda t: t.update({f"{Q}.pre_quant_scale": ("F32", [1], bytes(4))}), None,
                 "EXCHANGE-ORPHAN"),
    "second scale": ("modelopt_nvfp4", lambda t: t.pop(f"{Q}.weight_scale_2"), None,
                     "EXCHANGE-MISSING"),
    "experts' scales": ("gpt_oss_mxfp4",
                        lambda t: t.pop(f"{LAYER}.mlp.experts.down_proj_scales"), None,
                        "EXCHANGE-MISSING"),
    "experts' blocks": ("gpt_oss_mxfp4",
                        lambda t: t.pop(f"{LAYER}.mlp.experts.down_proj_blocks"), None,
                        "EXCHANGE-ORPHAN"),
    "field of gpt-oss": ("gpt_oss_mxfp4", None, lambda b: b.update(zap=1), "zap"),
    "deepseek": ("deepseek_v4_fp4", lambda t: t.pop(f"{E0}.scale"), None, "EXCHANGE-MISSING"),
    "deepseek's scale": ("deepseek_v4_fp4", lambda t: t.pop(f"{E0}.weight"), None,
                         "EXCHANGE-ORPHAN"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_by_name(case: str, tmp_path: Path, call: Call) -> None:
    peer, tensors, block, word = CASES[case]
    place = changed(
        peer, tmp_path / "m", tensors or (lambda t: None), block or (lambda b: None)
    )  # fmt: skip
    done = call("inspect", place)
    assert done.code == 3
    assert word in done.err
    assert "bug" not in done.err


def poisoned(peer: str, name: str, data: bytes, place: Path) -> Path:
    def change(tensors: Raw) -> None:
        dtype, shape, old = tensors[name]
        tensors[name] = dtype, shape, data + old[len(data) :]

    return changed(peer, place, change)


@pytest.mark.parametrize(
    ("peer", "name", "data"),
    [
        ("ct_mxfp4a16", f"{Q}.weight_scale", b"\xff"),
        ("ct_mxfp8a16", f"{Q}.weight_scale", b"\xff"),
        ("ct_nvfp4a16", f"{Q}.weight_scale", b"\x7f"),
        ("ct_nvfp4a16", f"{Q}.weight_global_scale", np.float32(0).tobytes()),
        ("ct_nvfp4a16", f"{Q}.weight_global_scale", np.float32(-1).tobytes()),
        ("modelopt_nvfp4", f"{Q}.weight_scale_2", np.float32(np.nan).tobytes()),
        ("gpt_oss_mxfp4", f"{LAYER}.mlp.experts.down_proj_scales", b"\xff"),
        ("deepseek_v4_fp4", f"{E0}.scale", b"\xff"),
    ],
)
def test_scales_that_are_none_are_found_by_verify(
    peer: str, name: str, data: bytes, tmp_path: Path, call: Call
) -> None:
    assert call("verify", FOREIGN / peer).code == 0
    done = call("verify", poisoned(peer, name, data, tmp_path / "m"))
    assert done.code == 1
    assert name.rpartition(".")[2].replace("down_proj", "") in done.out


def test_a_hint_names_no_option_that_keep_refuses(tmp_path: Path, call: Call) -> None:
    source = poisoned("ct_fp8_dynamic", f"{Q}.weight", b"\x7f", tmp_path / "m")
    done = call("quantize", source, "--scheme", "keep", "-o", tmp_path / "o.qblk")
    assert (done.code, "NaN" in done.err, "--keep" in done.err) == (3, True, False)
    assert not (tmp_path / "o.qblk").exists()
    done = call("quantize", source, "--scheme", "bf16", "-o", tmp_path / "o.qblk")
    assert (done.code, "--keep" in done.err) == (3, True)


# --- experts whose codes lie the other way round ---


def test_runs_of_rows_across_experts_are_those_of_the_whole(tmp_path: Path) -> None:
    expected = FOREIGN / "gpt_oss_mxfp4" / "expected.safetensors"
    name = f"{LAYER}.mlp.experts.gate_up_proj"
    whole = np.frombuffer(raw(expected)[name][2], "<f4")
    from qconvert.files import open_model

    with open_model(FOREIGN / "gpt_oss_mxfp4") as model:
        tensor = next(t for t in model.tensors if t.name == name)
        for start, stop in ((0, 1), (63, 65), (64 * 60, 64 * 70), (5, whole.size)):
            np.testing.assert_array_equal(model.values(tensor, start, stop), whole[start:stop])
