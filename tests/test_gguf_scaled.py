"""NVFP4 of GGUF with a scale of the tensor beside it: what is written is read by gguf-py and held
against the arithmetic of the formats it comes from, written out here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call
from numpy.typing import NDArray
from test_exchange_micro import array, raw, write

import qconvert
from qconvert.files import open_model
from qconvert.product_scales import takes_scale

F32 = NDArray[np.float32]
SAMPLE = ROOT / "samples" / "tiny-llama"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NVFP4 = gguf.GGMLQuantizationType.NVFP4
# Modules whose rows llama.cpp has in the same order, and their names there.
SAME_ORDER = {
    "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
    "model.layers.1.self_attn.o_proj": "blk.1.attn_output",
    "model.layers.2.mlp.gate_proj": "blk.2.ffn_gate",
    "model.layers.3.mlp.down_proj": "blk.3.ffn_down",
}


def changed(
    source: Path, place: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]
) -> Path:
    """A copy of a model with other tensors and another configuration."""
    shutil.copytree(source, place)
    tensors = raw(place / "model.safetensors")
    config = json.loads((place / "config.json").read_text())
    change(tensors, config)
    write(place / "model.safetensors", tensors)
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample in NVFP4 of compressed-tensors, whose scales of tensors are divisors."""
    place = tmp_path_factory.mktemp("packed") / "m"
    qconvert.quantize(SAMPLE, "nvfp4a16", output=place)
    return place


@pytest.fixture(scope="module")
def modelopt(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same codes as ModelOpt has them, with factors for tensors that are any numbers."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        rng = np.random.default_rng(7)
        modules = [n.removesuffix("_packed") for n in tensors if n.endswith("weight_packed")]
        for name in modules:
            tensors[name] = tensors.pop(f"{name}_packed")
            del tensors[f"{name}_global_scale"]
            factor = np.float32(rng.uniform(1e-4, 3e-4))
            tensors[f"{name}_scale_2"] = "F32", (), factor.tobytes()
        group = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
        config["quantization_config"] = {
            "config_groups": {"group_0": {"weights": group, "targets": ["Linear"]}},
            "ignore": ["lm_head"],
            "quant_algo": "W4A16_NVFP4",
            "quant_method": "modelopt",
            "producer": {"name": "modelopt", "version": "0.47.0"},
        }

    return changed(packed, tmp_path_factory.mktemp("modelopt") / "m", change)


def parts(tensors: Any, module: str, codes: str) -> tuple[F32, NDArray[np.uint8]]:
    """Numbers of E2M1 and bytes of E4M3 of a packed matrix."""
    data = array(tensors, f"{module}.{codes}")
    numbers = E2M1[np.stack([data & 15, data >> 4], axis=2)].reshape(len(data), -1)
    return numbers, array(tensors, f"{module}.weight_scale")


def grouped(numbers: F32, scale: F32) -> F32:
    rows = len(numbers)
    found: F32 = (numbers.reshape(rows, -1, 16) * scale[:, :, None]).reshape(rows, -1)
    return found


def of_gguf(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def values(path: Path, name: str) -> F32:
    """As qconvert reads them."""
    with closing(open_model(path)) as model:
        tensor = next(t for t in model.tensors if t.name == name)
        return np.asarray(model.values(tensor, 0, tensor.size), np.float32).reshape(tensor.shape)


def keep(source: Path, output: Path, call: Call, *options: str) -> str:
    done = call("quantize", source, "--scheme", "keep", "-o", output, *options)
    assert done.code == 0, done.err
    return " ".join((done.out + done.err).split())


def test_codes_scales_and_factors_of_modelopt_move_bit_for_bit(
    modelopt: Path, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.gguf"
    assert "28 quantized tensors moved exactly, 0 decoded" in keep(modelopt, path, call, "--exact")
    theirs, ours = raw(modelopt / "model.safetensors"), of_gguf(path)
    for module, name in SAME_ORDER.items():
        numbers, scales = parts(theirs, module, "weight")
        blocks, factor = ours[f"{name}.weight"], ours[f"{name}.scale"].data
        assert (blocks.tensor_type, factor.shape) == (NVFP4, (1,))
        assert factor.tobytes() == theirs[f"{module}.weight_scale_2"][2]
        data = blocks.data.reshape(len(numbers), -1, 36)
        np.testing.assert_array_equal(data[:, :, :4].reshape(scales.shape), scales)
        each = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        peer = gguf.quants.dequantize(blocks.data, NVFP4)
        np.testing.assert_array_equal(peer, grouped(numbers, each))
        expected = grouped(numbers, each * factor[0])
        np.testing.assert_array_equal(values(path, f"{name}.weight"), expected)
    done = call("verify", path, "--against", modelopt, "--json")
    assert done.code == 0
    assert all(t["sqnr_db"] is None or t["max_error"] == 0 for t in done.json["tensors"])


def test_divisors_become_the_factors_of_llama_cpps_converter(
    packed: Path, tmp_path: Path, call: Call
) -> None:
    """Which takes the reciprocal in binary32 (`inverse_scale` in conversion/base.py)."""
    path = tmp_path / "m.gguf"
    said = keep(packed, path, call)
    assert "but for the scale of the tensor, which was rounded" in said
    assert ", 0 decoded, 11 plain" in said
    theirs, ours, equal = raw(packed / "model.safetensors"), of_gguf(path), 0
    for module, name in SAME_ORDER.items():
        numbers, scales = parts(theirs, module, "weight_packed")
        divisor = array(theirs, f"{module}.weight_global_scale", "<f4")
        np.testing.assert_array_equal(ours[f"{name}.scale"].data, np.float32(1) / divisor)
        data = ours[f"{name}.weight"].data.reshape(len(numbers), -1, 36)
        np.testing.assert_array_equal(data[:, :, :4].reshape(scales.shape), scales)
        each = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        expected, found = grouped(numbers, each / divisor[0]), values(path, f"{name}.weight")
        np.testing.assert_allclose(found, expected, rtol=2.0**-22, atol=0)
        equal += bool((found == expected).all())
    done = call("quantize", packed, "--scheme", "keep", "--exact", "-o", tmp_path / "e.gguf")
    assert (done.code, "rounded to a factor" in done.err) == (3, True)


def test_a_scale_of_the_tensor_lowers_the_error_of_small_weights(
    tmp_path: Path, call: Call
) -> None:
    """Groups of which would have scales at the lower end of E4M3, where few digits are left."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        for name, (dtype, shape, data) in tensors.items():
            if len(shape) > 1:
                small = np.frombuffer(data, ml_dtypes.bfloat16) / ml_dtypes.bfloat16(16)
                tensors[name] = dtype, shape, small.tobytes()

    source = changed(SAMPLE, tmp_path / "m", change)
    weights = raw(source / "model.safetensors")
    for name, more in (("scaled", ()), ("raw", ("--raw",))):
        done = call("quantize", source, "--scheme", "nvfp4", "-o", tmp_path / f"{name}.gguf", *more)
        assert done.code == 0, done.err
    scaled, plain = of_gguf(tmp_path / "scaled.gguf"), of_gguf(tmp_path / "raw.gguf")
    assert not [n for n in plain if n.endswith(".scale")]
    assert "token_embd.scale" not in scaled  # rows that are looked up are not multiplied
    for module, name in SAME_ORDER.items():
        x = array(weights, f"{module}.weight", ml_dtypes.bfloat16).astype(np.float32)
        blocks = scaled[f"{name}.weight"].data
        found = gguf.quants.dequantize(blocks, NVFP4) * scaled[f"{name}.scale"].data[0]
        before = gguf.quants.dequantize(plain[f"{module}.weight"].data, NVFP4)
        noise = [float(np.square(y - x, dtype=np.float64).sum()) for y in (found, before)]
        assert noise[0] < 0.75 * noise[1], (name, noise)
        np.testing.assert_allclose(found, values(tmp_path / "scaled.gguf", f"{name}.weight"), 1e-6)
    assert call("verify", tmp_path / "scaled.gguf", "--against", source).code == 0


def qwen2(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    for name, (_, shape, _) in list(tensors.items()):
        for part in ("q_proj", "k_proj", "v_proj"):
            if name.endswith(f"{part}.weight_scale"):
                bias = np.zeros(shape[0], ml_dtypes.bfloat16)
                tensors[name.replace("weight_scale", "bias")] = "BF16", bias.shape, bias.tobytes()


def test_where_llama_cpp_does_not_multiply_nothing_is_to_be_multiplied(
    packed: Path, tmp_path: Path, call: Call
) -> None:
    source = changed(packed, tmp_path / "m", qwen2)
    said = keep(source, tmp_path / "m.gguf", call)
    assert "0 quantized tensors moved exactly, 28 decoded" in said
    assert "has no place for the scale of the tensor" in said
    assert not [name for name in of_gguf(tmp_path / "m.gguf") if name.endswith(".scale")]


def test_a_feed_forward_with_biases_takes_none() -> None:
    """`GGML_ASSERT` in `build_ffn` ends the process there."""
    name = "blk.3.ffn_up.weight"
    assert takes_scale("llama", name, {name})
    assert not takes_scale("llama", name, {name, "blk.3.ffn_up.bias"})
    assert takes_scale("qwen3", "blk.0.attn_q.weight", {"blk.0.attn_q.bias"})
    for other in ("token_embd.weight", "blk.0.ffn_up_exps.weight", "blk.0.attn_norm.weight"):
        assert not takes_scale("llama", other, {other})
    assert not takes_scale("gemma3", name, {name})


def test_files_of_a_set_part_a_tensor_from_its_scale(
    modelopt: Path, tmp_path: Path, call: Call
) -> None:
    keep(modelopt, tmp_path / "one.gguf", call)
    keep(modelopt, tmp_path / "m.gguf", call, "--shard-size", "1k")  # a file for each tensor
    first = next(tmp_path.glob("m-00001-*.gguf"))
    with closing(open_model(tmp_path / "one.gguf")) as one, closing(open_model(first)) as several:
        assert one.tensors == several.tensors
        for tensor in one.tensors:
            whole = one.raw(tensor, 0, tensor.nbytes)
            assert several.raw(tensor, 0, tensor.nbytes) == whole
            assert several.raw(tensor, 5, tensor.nbytes - 6) == whole[5:-1]
        assert sum(t.dtype == "NVFP4_SCALED" for t in one.tensors) == 28


def test_it_stays_in_a_file_of_the_same_type_and_moves_to_directories(
    modelopt: Path, tmp_path: Path, call: Call
) -> None:
    path, theirs = tmp_path / "m.gguf", raw(modelopt / "model.safetensors")
    keep(modelopt, path, call)
    done = call(
        *("quantize", path, "--scheme", "nvfp4", "--allow-requantize"),
        *("-o", tmp_path / "again.gguf"),
    )
    assert done.code == 0, done.err
    before, after = of_gguf(path), of_gguf(tmp_path / "again.gguf")
    for name in before:
        if name.startswith("blk."):
            assert before[name].data.tobytes() == after[name].data.tobytes(), name
    said = keep(path, tmp_path / "d", call, "--format", "compressed-tensors")
    assert ", 0 decoded, 11 plain" in said
    ours = raw(tmp_path / "d" / "model.safetensors")
    for module in SAME_ORDER:
        assert ours[f"{module}.weight_scale"][2] == theirs[f"{module}.weight_scale"][2]


@pytest.mark.parametrize(
    ("scale", "code"),
    [
        (np.ones(2, np.float32), 3),
        (np.ones(1, np.float16), 3),
        (np.zeros(1, np.float32), 3),
        (np.full(1, np.nan, np.float32), 3),
        (np.full(1, -1, np.float32), 3),
        (np.full(1, 0.5, np.float32), 0),
    ],
)
def test_a_scale_that_is_no_positive_number_is_refused(
    scale: NDArray[Any], code: int, tmp_path: Path, call: Call
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    blocks = np.zeros((64, 36), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_shape=blocks.shape, raw_dtype=NVFP4)
    writer.add_tensor("blk.0.attn_q.scale", scale)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    done = call("quantize", tmp_path / "m.gguf", "--scheme", "bf16", "-o", tmp_path / "m.qblk")
    assert done.code == code, done.err
    assert ("GGUF-SCALED" in done.err) == bool(code)


def qwen3(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    width = config["hidden_size"] // config["num_attention_heads"]
    config.setdefault("head_dim", width)
    ones = np.ones(config["head_dim"], ml_dtypes.bfloat16)
    for layer in range(config["num_hidden_layers"]):
        for part in ("q_norm", "k_norm"):
            name = f"model.layers.{layer}.self_attn.{part}.weight"
            tensors[name] = "BF16", ones.shape, ones.tobytes()


def plain(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    pass


@pytest.mark.slow
@pytest.mark.parametrize("change", [plain, qwen3])
@pytest.mark.parametrize("scheme", ["keep", "nvfp4"])
def test_llama_cpp_multiplies_by_the_scale(
    change: Callable[[dict[str, Any], dict[str, Any]], None],
    scheme: str,
    modelopt: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    """Its logits are those of transformers with the weights that we read from the file."""
    for package in ("torch", "transformers", "llama_cpp"):
        pytest.importorskip(package)
    bare = changed(SAMPLE, tmp_path / "plain", change)
    source = changed(modelopt, tmp_path / "m", change) if scheme == "keep" else bare
    path = tmp_path / "m.gguf"
    done = call("quantize", source, "--scheme", scheme, "-o", path)
    assert done.code == 0, done.err
    names = [name for name in of_gguf(path) if name.endswith(".scale")]
    assert len(names) == (28 if scheme == "keep" else 29)  # the head is plain in ModelOpt's
    done = call("verify", path, "--against", bare, "--run", "--json")
    ran = done.json["llama_cpp"]
    assert ran["kl_mean"] < 2e-3, ran
