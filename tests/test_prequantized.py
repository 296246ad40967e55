"""Checkpoints that are quantized already: names and dtypes as each method's own library writes
them, and ordinary models that only look like it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import Call

from qconvert.files import open_model
from qconvert.files.prequantized import recognised

SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "BOOL": 1, "BF16": 2, "F16": 2, "I16": 2,
         "F32": 4, "I32": 4, "U32": 4, "I64": 8}  # fmt: skip
Described = dict[str, tuple[str, list[int]]]
LAYER = "model.layers.0.mlp.up_proj"


def write(path: Path, tensors: Described, **metadata: str) -> Path:
    """safetensors with the given dtypes and shapes, all bytes 1: NumPy has not every dtype."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01" * at)
    return path


# What each method's files hold for one linear layer of 64 x 128, without a configuration.
METHODS: dict[str, tuple[str, Described]] = {
    "DeepSeek FP8": ("FP8", {".weight": ("F8_E4M3", [64, 128]),
                             ".weight_scale_inv": ("F32", [1, 1])}),
    "FP8, compressed-tensors": ("FP8", {".weight": ("F8_E4M3", [64, 128]),
                                        ".weight_scale": ("BF16", [64, 1]),
                                        ".input_scale": ("BF16", [1])}),
    "ModelOpt FP8": ("FP8", {".weight": ("F8_E4M3", [64, 128]), ".weight_scale": ("F32", []),
                             ".input_scale": ("F32", [])}),
    "ModelOpt NVFP4": ("NVFP4", {".weight": ("U8", [64, 64]),
                                 ".weight_scale": ("F8_E4M3", [64, 8]),
                                 ".weight_scale_2": ("F32", []), ".input_scale": ("F32", [])}),
    "GPTQ": ("GPTQ", {".qweight": ("I32", [16, 64]), ".qzeros": ("I32", [4, 8]),
                      ".scales": ("F16", [4, 64]), ".g_idx": ("I32", [128])}),
    "AWQ": ("AWQ", {".qweight": ("I32", [128, 8]), ".qzeros": ("I32", [4, 8]),
                    ".scales": ("F16", [4, 64])}),
    "bitsandbytes NF4": ("bitsandbytes", {
        ".weight": ("U8", [4096, 1]), ".weight.absmax": ("F32", [128]),
        ".weight.quant_map": ("F32", [16]),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", [80])}),
    "bitsandbytes NF4, nested": ("bitsandbytes", {
        ".weight": ("U8", [4096, 1]), ".weight.absmax": ("U8", [128]),
        ".weight.nested_absmax": ("F32", [1]), ".weight.nested_quant_map": ("F32", [256]),
        ".weight.quant_map": ("F32", [16]),
        ".weight.quant_state.bitsandbytes__nf4": ("U8", [80])}),
    "LLM.int8": ("LLM.int8", {".weight": ("I8", [64, 128]), ".SCB": ("F32", [64]),
                              ".weight_format": ("U8", [])}),
    "compressed-tensors, packed": ("compressed-tensors", {
        ".weight_packed": ("I32", [64, 16]), ".weight_scale": ("BF16", [64, 4]),
        ".weight_shape": ("I64", [2])}),
    "compressed-tensors, int8": ("codes", {".weight": ("I8", [64, 128]),
                                           ".weight_scale": ("BF16", [64, 1])}),
    "MLX": ("MLX", {".weight": ("U32", [64, 16]), ".scales": ("BF16", [64, 2]),
                    ".biases": ("BF16", [64, 2])}),
    "HQQ": ("HQQ", {".W_q": ("U8", [32, 128]), ".scale": ("F16", [128, 1]),
                    ".zero": ("F16", [128, 1])}),
    "quanto": ("quanto", {".weight._data": ("I8", [64, 128]), ".weight._scale": ("F32", [64, 1]),
                          ".input_scale": ("F32", [])}),
    "torchao": ("torchao", {"._weight_qdata": ("I8", [64, 128]),
                            "._weight_scale": ("F32", [64, 1])}),
    "EETQ": ("codes", {".weight": ("I8", [128, 64]), ".weight_scales": ("F16", [64])}),
    "ComfyUI without its mark": ("scaled FP8", {".weight": ("F8_E4M3", [64, 128]),
                                                ".scale_weight": ("F32", [1])}),
    "EXL2": ("codes", {".q_weight": ("I32", [16, 64]), ".q_scale": ("I32", [4, 8]),
                       ".q_groups": ("I16", [8]), ".q_invperm": ("I32", [128])}),
    "AQLM": ("codes", {".codes": ("I16", [64, 16, 1]), ".codebooks": ("F16", [1, 256, 1, 8]),
                       ".scales": ("F16", [64, 1, 1, 1])}),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_known_by_its_tensors_and_refused_for_every_output(
    name: str, tmp_path: Path, call: Call
) -> None:
    method, tensors = METHODS[name]
    path = write(tmp_path / "m.safetensors", {LAYER + n: d for n, d in tensors.items()})
    with open_model(path) as model:  # type: ignore[attr-defined]
        found = recognised(model)
    assert found is not None
    assert method in found.method
    for options in (("--scheme", "q4_block32"), ("--scheme", "q4_0", "--raw"), ("--scheme", "f16")):
        out = tmp_path / ("o.gguf" if "--raw" in options else "o.qblk")
        done = call("quantize", path, *options, "-o", out)
        assert done.code == 3
        assert "[ARCH-QUANTIZED]" in done.err
        assert f"tensor '{LAYER}" in done.err
        assert found.method in done.err
        assert "hint: convert the checkpoint that it was made from" in done.err
        assert len(done.err.splitlines()) == 2
        assert not out.exists()
    shown = call("inspect", path, "--json")
    assert shown.code == 0
    assert any("quantized already" in w for w in shown.json["warnings"])
    assert {t["suggestion"] for t in shown.json["tensors"]} <= {"none"}


def test_gpt_oss_blocks_and_scales_are_mxfp4(tmp_path: Path) -> None:
    place = "model.layers.0.mlp.experts.gate_up_proj"
    path = write(
        tmp_path / "m.safetensors",
        {
            f"{place}_blocks": ("U8", [2, 64, 4, 16]),
            f"{place}_scales": ("U8", [2, 64, 4]),
            f"{place}_bias": ("BF16", [2, 64]),
        },
    )
    with open_model(path) as model:  # type: ignore[attr-defined]
        found = recognised(model)
    assert found
    assert (found.method, found.tensor) == ("MXFP4", f"{place}_blocks")


def test_experts_stored_together_with_a_scale_are_codes(tmp_path: Path) -> None:
    place = "model.layers.0.mlp.experts.gate_up_proj"
    for added in ("_scale_inv", "_scale", "_weight_scale", ".scale"):
        tensors: Described = {place: ("F8_E4M3", [2, 64, 32]), place + added: ("F32", [2, 1, 1])}
        with open_model(write(tmp_path / "m.safetensors", tensors)) as model:  # type: ignore[attr-defined]
            assert recognised(model), added


def test_the_mark_of_image_models_is_enough(tmp_path: Path) -> None:
    weight: Described = {"model.diffusion_model.x.weight": ("F8_E4M3", [64, 64])}
    for name in ("scaled_fp8", "model.diffusion_model.scaled_fp8"):
        marked = write(tmp_path / "m.safetensors", weight | {name: ("F8_E4M3", [0])})
        with open_model(marked) as model:  # type: ignore[attr-defined]
            assert (found := recognised(model))
            assert found.method == "scaled FP8"
    noted = write(tmp_path / "n.safetensors", weight, _quantization_metadata="{}")
    with open_model(noted) as model:  # type: ignore[attr-defined]
        assert recognised(model)


PLAIN: Described = {f"{LAYER}.weight": ("BF16", [64, 128])}


@pytest.mark.parametrize(
    ("name", "fields", "method"),
    [
        ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ("config.json", {"quantization_config": {"quant_algo": "FP8"}}, "unnamed"),
        ("config.json", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ("config.json", {"compression_config": {"quant_method": "sparseml"}}, "sparseml"),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "ModelOpt"),
    ],
)
def test_a_configuration_alone_is_enough(
    name: str, fields: dict[str, Any], method: str, tmp_path: Path, call: Call
) -> None:
    write(tmp_path / "model.safetensors", PLAIN)
    (tmp_path / name).write_text(json.dumps(fields))
    done = call("quantize", tmp_path, "--scheme", "q4_block32", "-o", tmp_path / "o.qblk")
    assert done.code == 3
    assert "[ARCH-QUANTIZED]" in done.err
    assert method in done.err
    assert "if its weights are plain" in done.err


# Ordinary models.
ORDINARY: dict[str, Described] = {
    "a norm with a parameter called scale": {
        "norm.scale": ("F32", [64]),
        "ffn.weight": ("BF16", [64, 64]),
    },
    "a layer scale beside a matrix": {
        "layer.weight": ("F16", [64, 64]),
        "layer.scale": ("F16", [64]),
        "layer.scales": ("F16", [64]),
    },
    "a mask of bytes beside a scale": {
        "attn.mask": ("I8", [64, 64]),
        "attn.scale": ("F32", []),
        "attn.q.weight": ("F32", [64, 64]),
    },
    "GPT-2's causal mask": {
        "h.0.attn.bias": ("U8", [1, 1, 64, 64]),
        "h.0.attn.scale": ("F32", [1]),
        "h.0.attn.c_attn.weight": ("F32", [64, 192]),
    },
    "tables of indices": {
        "swin.relative_position_index": ("I32", [49, 49]),
        "swin.relative_position_bias_table": ("F32", [169, 4]),
        "swin.logit_scale": ("F32", [4, 1, 1]),
    },
    "another tensor's scale under a longer name": {
        "a.w": ("I32", [64, 64]),
        "a.weight_scale": ("F32", [64]),
        "a.weight": ("BF16", [64, 64]),
    },
    "counters of batch norm": {
        "bn.num_batches_tracked": ("I64", []),
        "bn.weight": ("F32", [64]),
        "conv.weight": ("F32", [64, 64, 3, 3]),
    },
    "scales left behind by a checkpoint that was decoded": {
        f"{LAYER}.weight": ("BF16", [64, 128]),
        f"{LAYER}.weight_scale_inv": ("F32", [1, 1]),
    },
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_converted(name: str, tmp_path: Path, call: Call) -> None:
    path = write(tmp_path / "m.safetensors", ORDINARY[name])
    done = call("quantize", path, "--scheme", "q4_block32", "-o", tmp_path / "o.qblk", "--json")
    assert done.code == 0, done.err
    assert done.json["warnings"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None},
        {"quantization": "none"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
)
def test_plain_weights_whose_configuration_asks_for_nothing_yet_are_converted(
    fields: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    """transformers quantizes with bitsandbytes at load: the entry goes with plain weights too."""
    write(tmp_path / "model.safetensors", PLAIN)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    done = call("quantize", tmp_path, "--scheme", "q4_block32", "-o", tmp_path / "o.qblk")
    assert done.code == 0, done.err


def test_eight_bit_floats_without_scales_are_weights_and_it_is_said(
    tmp_path: Path, call: Call
) -> None:
    path = write(
        tmp_path / "m.safetensors",
        {"x.weight": ("F8_E4M3", [64, 64]), "x.bias": ("F8_E4M3", [64])},
    )
    out = tmp_path / "o.qblk"
    done = call("quantize", path, "--scheme", "q4_block32", "--keep", "*", "-o", out, "--json")
    assert done.code == 0
    (warning,) = done.json["warnings"]
    assert "1 matrices are stored in 8-bit floating numbers without scales" in warning
    assert call("verify", out, "--against", path).code == 0


def test_other_commands_refuse_too(tmp_path: Path, call: Call) -> None:
    _, tensors = METHODS["GPTQ"]
    path = write(tmp_path / "m.safetensors", {LAYER + n: d for n, d in tensors.items()})
    plain = write(tmp_path / "p.safetensors", PLAIN)
    assert call("quantize", plain, "--scheme", "q8_channel", "-o", tmp_path / "p.qblk").code == 0
    rows = write(tmp_path / "a.safetensors", {LAYER: ("F32", [4, 128])})
    for command in (
        ("verify", tmp_path / "p.qblk", "--against", path),
        ("calibrate", path, "--activations", rows, "-o", tmp_path / "c.safetensors"),
    ):
        done = call(*command)
        assert done.code == 3
        assert "[ARCH-QUANTIZED]" in done.err
