"""Codes whose very bytes another container has: what is copied is what lay there, under the names
of the other format, and what no container has so is decoded.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, gaussian, save
from test_exchange import same_values
from test_exchange_micro import Raw, array, e4m3, raw

import qconvert

FOREIGN = ROOT / "tests" / "data" / "foreign"
LAYER = "model.layers.0"
SHAPES = {
    "self_attn.q_proj": (128, 256),
    "self_attn.k_proj": (128, 256),
    "self_attn.v_proj": (128, 256),
    "mlp.down_proj": (256, 128),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some layers in bfloat16 whose sizes divide into blocks of 128. Read only."""
    place = tmp_path_factory.mktemp("copied") / "model"
    place.mkdir()
    weights = {
        f"{LAYER}.{name}.weight": gaussian(i, *shape, dtype=ml_dtypes.bfloat16)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    save(place / "model.safetensors", {**weights, "model.norm.weight": np.ones(128, np.float32)})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (place / "config.json").write_text(json.dumps(config))
    return place


def kept(call: Call, source: Path, output: Path, *options: str) -> dict[str, Any]:
    done = call("quantize", source, "--scheme", "keep", "-o", output, *options, "--json")
    assert done.code == 0, done.err
    return done.json


def whole(report: dict[str, Any], count: int) -> None:
    assert f"{count} quantized tensors moved exactly, 0 decoded" in report["notes"][0]


# --- qblk ---


def tensors(path: Path) -> dict[str, Any]:
    """What the header of a qblk file says of its quantized tensors, and the bytes of their
    segments: formats/qblk/SPEC.md sections 1 and 2.
    """
    data = path.read_bytes()
    length, begin = struct.unpack_from("<IQ", data, 12)
    found = json.loads(data[64 : 64 + length])["tensors"]
    for t in found:
        places = ((s["kind"], begin + s["offset"], s["size"]) for s in t["segments"])
        t["bytes"] = {kind: data[at : at + size] for kind, at, size in places}
    return {t["name"]: t for t in found if t["encoding"]["kind"] != "raw"}


@pytest.mark.parametrize(
    "scheme",
    [
        *("q4_block32_asym", "q3_block64_asym", "q8_block32_asym", "q5_channel_asym", "q6_tensor"),
        *("nf4_block64_dq", "fp4_block32", "c3_block32", "q4_block32_sym"),
    ],
)
def test_a_qblk_file_is_copied_byte_for_byte_whatever_is_in_it(
    scheme: str, model: Path, tmp_path: Path, call: Call
) -> None:
    source, out = tmp_path / "a.qblk", tmp_path / "b.qblk"
    qconvert.quantize(model, scheme, output=source, min_values=0)
    whole(kept(call, source, out, "--exact"), 4)
    before, after = tensors(source), tensors(out)
    assert len(before) == 4
    for name, tensor in before.items():
        assert tensor["encoding"] == after[name]["encoding"]
        assert tensor["bytes"] == after[name]["bytes"], name
    assert call("verify", out, "--against", source, "--exact").code == 0


def test_codes_that_were_compensated_are_still_said_to_be(
    model: Path, tmp_path: Path, call: Call
) -> None:
    """Or verify would hold them against half a step."""
    rng = np.random.default_rng(3)
    inputs = {f"{LAYER}.{n}": rng.normal(0, 1, (300, 8)) @ rng.normal(0, 1, (8, s[1]))
              for n, s in SHAPES.items()}  # fmt: skip
    samples = save(tmp_path / "s", {n: x.astype(np.float32) for n, x in inputs.items()})
    cal, source, out = (tmp_path / n for n in ("c.safetensors", "a.qblk", "b.qblk"))
    assert call("calibrate", model, "--activations", samples, "--gram", "-o", cal).code == 0
    line = ("quantize", model, "--scheme", "q4_block32_asym", "--equalise", "off", "-o", source)
    assert call(*line, "--calibration", cal, "--min-values", 1).code == 0
    kept(call, source, out, "--exact")
    roundings = {t["decision"].get("rounding") for t in tensors(out).values()}
    assert roundings == {t["decision"].get("rounding") for t in tensors(source).values()}
    assert roundings == {"compensated"}
    checks = {
        c["id"]: c["status"]
        for c in call("verify", out, "--against", model, "--json").json["checks"]
    }
    assert checks["error-bound"] != "fail"


# --- tables of codes ---


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("double", ["", "_dq"])
def test_tables_of_codes_move_between_qblk_and_bitsandbytes(
    book: str, double: str, model: Path, tmp_path: Path, call: Call
) -> None:
    scheme = f"bnb_{book}{double}"
    qconvert.quantize(model, scheme, output=tmp_path / "a")
    whole(kept(call, tmp_path / "a", tmp_path / "b.qblk", "--exact"), 4)
    found = tensors(tmp_path / "b.qblk")[f"{LAYER}.mlp.down_proj.weight"]
    assert found["encoding"]["table"] == book
    whole(kept(call, tmp_path / "b.qblk", tmp_path / "c", "--exact", "--format", "bnb"), 4)
    files = [raw(tmp_path / p / "model.safetensors") for p in ("a", "c")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / p / "config.json").read_text()) for p in ("a", "c")]
    assert configs[0] == configs[1]
    same_values(tmp_path / "a", tmp_path / "b.qblk")


@pytest.mark.parametrize(
    "peer", ["bnb_nf4", "bnb_nf4_double", "bnb_fp4_double", "bnb_nf4_block128"]
)
def test_what_bitsandbytes_wrote_moves_to_qblk(peer: str, tmp_path: Path, call: Call) -> None:
    kept(call, FOREIGN / peer, tmp_path / "a.qblk", "--exact")
    expected = raw(FOREIGN / peer / "expected.safetensors")
    with qconvert.load(tmp_path / "a.qblk") as found:
        for name in tensors(tmp_path / "a.qblk"):
            values = array(expected, name, "<f4")
            np.testing.assert_array_equal(found[name].dequantize(), values)


def test_other_blocks_than_a_directory_has_are_decoded(
    model: Path, tmp_path: Path, call: Call
) -> None:
    qconvert.quantize(model, "nf4_block32", output=tmp_path / "a.qblk", min_values=0)
    line = ("quantize", tmp_path / "a.qblk", "--scheme", "keep", "-o", tmp_path / "o")
    done = call(*line, "--format", "bnb")
    assert (done.code, "has no such codes and scales" in done.err) == (3, True), done.err


def test_bytes_of_bitsandbytes_whose_values_are_rounded_twice_move_nowhere_else(
    model: Path, tmp_path: Path, call: Call
) -> None:
    """Codes times a scale are other values than bitsandbytes', in their last bit."""
    qconvert.quantize(model, "bnb_int8", output=tmp_path / "a")
    report = kept(call, tmp_path / "a", tmp_path / "a.qblk")
    assert "0 quantized tensors moved exactly, 4 decoded" in report["notes"][0]
    whole(kept(call, tmp_path / "a", tmp_path / "b", "--exact", "--format", "bnb"), 4)
    assert raw(tmp_path / "a" / "model.safetensors") == raw(tmp_path / "b" / "model.safetensors")


# --- E4M3 ---


def values_of(stored: Raw, module: str, suffix: str, dtype: Any) -> Any:
    """Of blocks of 128 x 128."""
    scale = array(stored, module + suffix, dtype).astype(np.float32)
    each = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)
    return e4m3(array(stored, f"{module}.weight")) * each


def test_blocks_of_e4m3_move_from_compressed_tensors_to_fp8_and_back(
    model: Path, tmp_path: Path, call: Call
) -> None:
    qconvert.quantize(model, "fp8_block", output=tmp_path / "a")
    whole(kept(call, tmp_path / "a", tmp_path / "b", "--exact", "--format", "fp8"), 4)
    ours, theirs = (raw(tmp_path / p / "model.safetensors") for p in ("a", "b"))
    for name in SHAPES:
        module = f"{LAYER}.{name}"
        assert ours[f"{module}.weight"] == theirs[f"{module}.weight"]
        assert theirs[f"{module}.weight_scale_inv"][0] == "F32"
        np.testing.assert_array_equal(
            values_of(ours, module, ".weight_scale", ml_dtypes.bfloat16),
            values_of(theirs, module, ".weight_scale_inv", "<f4"),
        )
    to = ("--exact", "--format", "compressed-tensors")
    whole(kept(call, tmp_path / "b", tmp_path / "c", *to), 4)
    assert raw(tmp_path / "c" / "model.safetensors") == ours
    blocks = [json.loads((tmp_path / p / "config.json").read_text()) for p in ("a", "c")]
    assert blocks[0] == blocks[1]


def test_scales_of_float32_do_not_move_into_those_of_bfloat16(
    model: Path, tmp_path: Path, call: Call
) -> None:
    qconvert.quantize(model, "fp8_block128", output=tmp_path / "a")
    line = ("quantize", tmp_path / "a", "--scheme", "keep", "-o", tmp_path / "o")
    done = call(*line, "--format", "compressed-tensors")
    assert done.code == 3
    assert "has no such codes and scales" in done.err
    whole(kept(call, tmp_path / "a", tmp_path / "b", "--exact", "--format", "fp8"), 4)
    files = [raw(tmp_path / p / "model.safetensors") for p in ("a", "b")]
    assert files[0] == files[1]


@pytest.mark.parametrize("inputs", [None, {"num_bits": 8, "type": "float", "dynamic": False}])
def test_inputs_that_readers_would_treat_otherwise_keep_codes_where_they_are(
    inputs: dict[str, Any] | None, model: Path, tmp_path: Path, call: Call
) -> None:
    """An fp8 directory makes inputs eight bits as they come."""
    qconvert.quantize(model, "fp8_block", output=tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = inputs
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    line = ("quantize", tmp_path / "a", "--scheme", "keep", "-o", tmp_path / "o")
    assert call(*line, "--format", "fp8").code == 3
    plain = call(*line, "--format", "compressed-tensors")
    assert plain.code == 3, plain.out


def test_a_row_of_e4m3_moves_to_its_own_format(model: Path, tmp_path: Path, call: Call) -> None:
    qconvert.quantize(model, "fp8_dynamic", output=tmp_path / "a")
    to = ("--exact", "--format", "compressed-tensors")
    whole(kept(call, tmp_path / "a", tmp_path / "b", *to), 4)
    files = [raw(tmp_path / p / "model.safetensors") for p in ("a", "b")]
    assert files[0] == files[1]
    done = call("quantize", tmp_path / "a", "--scheme", "keep", "--format", "fp8", "-o", "o")
    assert done.code == 3  # which has blocks alone


# --- what is said of it ---


def test_who_loads_a_directory_is_said_before_what_was_left(tmp_path: Path, call: Call) -> None:
    """Of a checkpoint with scales of inputs; people are shown three notes."""
    line = ("quantize", FOREIGN / "ct_nvfp4", "--scheme", "keep", "--format", "compressed-tensors")
    notes = call(*line, "-o", tmp_path / "o", "--json").json["notes"]
    first, second, *others = notes
    assert "moved exactly" in first
    assert second.startswith("the directory is for vLLM")
    assert len(others) == 2
    assert "scales of activations and caches are left" in others[1]


@pytest.mark.parametrize(
    "scheme", ["w4a16", "fp8_block128", "gptq_4bit_g32", "awq_4bit_g32", "bnb_nf4", "mlx_4bit_g32"]
)
def test_the_notes_of_readers_are_two_at_most(
    scheme: str, model: Path, tmp_path: Path, call: Call
) -> None:
    """With what moved they are all that people are shown."""
    line = ("quantize", model, "--scheme", scheme, "-o", tmp_path / "o", "--equalise", "off")
    notes = call(*line, "--json").json["notes"]
    assert 1 <= len(notes) <= 2
    assert "is for" in notes[0]


def test_small_files_go_along_from_directory_to_directory(
    model: Path, tmp_path: Path, call: Call
) -> None:
    source = shutil.copytree(model, tmp_path / "m")
    small = {
        "generation_config.json": '{"eos_token_id": 2, "temperature": 0.6}',
        "chat_template.jinja": "{{ messages }}\n",
        "tokenizer_config.json": "{}",
    }
    for name, text in small.items():
        (source / name).write_text(text)
    qconvert.quantize(source, "w4a16_g32", output=tmp_path / "a")
    kept(call, tmp_path / "a", tmp_path / "b", "--format", "mlx")
    for place in ("a", "b"):
        assert {n: (tmp_path / place / n).read_text() for n in small} == small
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"] == config.pop("quantization")
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())


def test_parts_of_a_layer_that_do_not_move_alike_have_ways_out(
    model: Path, tmp_path: Path, call: Call
) -> None:
    """Every way that the hint names, tried."""
    source = tmp_path / "m.qblk"
    parts = ("--tensor-scheme", "*v_proj*=nf4_block64", "--equalise", "off")
    assert call("quantize", model, "--scheme", "q4_block32_sym", *parts, "-o", source).code == 0
    refused = call(
        *("quantize", source, "--scheme", "keep"),
        *("--format", "compressed-tensors", "-o", tmp_path / "kept"),
    )
    assert (refused.code, (tmp_path / "kept").exists()) == (2, False)
    hint = " ".join(refused.err.partition("hint:")[2].split())
    assert "--tensor-scheme" not in hint
    ways = {
        "a scheme and --allow-requantize": ("--scheme", "w4a16_g32", "--allow-requantize"),
        "--format hf --scheme bf16": ("--format", "hf", "--scheme", "bf16"),
        "--format qblk": ("--scheme", "keep", "--format", "qblk"),
    }
    for i, (named, options) in enumerate(ways.items()):
        assert named in hint
        done = call("quantize", source, *options, "-o", tmp_path / f"way{i}")
        assert done.code == 0, done.err
