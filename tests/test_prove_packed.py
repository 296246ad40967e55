"""What the tools that load MLX, GPTQ, AWQ and bitsandbytes directories make of ours: the weights
that they decode are those that we say, bit for bit.

    pip install "mlx[cpu]" mlx-lm bitsandbytes accelerate
    pip install --no-deps gptqmodel   # and pillow tokenicer logbar defuser device-smi pypcre
                                      # threadpoolctl datasets, without another torch
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Call
from numpy.typing import NDArray

import qconvert

SAMPLE = ROOT / "samples" / "tiny-llama"
WORDS = "the quick brown fox"
pytestmark = [
    pytest.mark.slow,
    # Of the libraries themselves, which are as they are.
    pytest.mark.filterwarnings("ignore"),
]
MLX = importlib.util.find_spec("mlx") is not None and importlib.util.find_spec("mlx_lm") is not None
BNB = importlib.util.find_spec("bitsandbytes") is not None
GPTQMODEL = importlib.util.find_spec("gptqmodel") is not None


def needs(there: bool, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def written(call: Call, scheme: str, output: Path, *more: Any) -> Path:
    done = call("quantize", SAMPLE, "--scheme", scheme, "-o", output, *more)
    assert done.code == 0, done.err
    return output


def same(found: Any, ours: NDArray[Any], name: str) -> None:
    """Both as float32, bit for bit."""
    theirs = np.ascontiguousarray(found, np.float32)
    wanted = np.ascontiguousarray(ours, np.float32)
    np.testing.assert_array_equal(theirs.view(np.uint32), wanted.view(np.uint32), name)


def torch_tensors(directory: Path) -> dict[str, Any]:
    import safetensors.torch

    found: dict[str, Any] = safetensors.torch.load_file(directory / "model.safetensors")
    return found


# --- MLX ------------------------------------------------------------------------------------------


@needs(MLX, "mlx-lm")
@pytest.mark.parametrize(
    "scheme",
    [
        *(f"mlx_{b}bit_g64" for b in (2, 3, 4, 5, 6, 8)),
        *("mlx_4bit_g32", "mlx_3bit_g128", "mlx_mxfp4", "mlx_mxfp8", "mlx_nvfp4"),
    ],
)
def test_mlx_lm_loads_and_decodes(scheme: str, tmp_path: Path, call: Call) -> None:
    import mlx.core as mx
    from mlx_lm import generate, load

    own = ("--tensor-scheme", "*o_proj.weight=mlx_8bit_g32", "--keep", "*1.mlp.down_proj.weight")
    out = written(call, scheme, tmp_path / "o", *own)
    model, tokenizer = load(str(out))
    how = json.loads((out / "config.json").read_text())["quantization"]
    modules, count = dict(model.named_modules()), 0
    with qconvert.load(out) as tensors:
        for name in tensors:
            module = modules.get(name.removesuffix(".weight"))
            if module is None or "scales" not in module:
                continue
            args = how | {"mode": "affine", **(how.get(name.removesuffix(".weight")) or how)}
            affine = args["mode"] == "affine"
            assert module.mode == args["mode"]
            values = mx.dequantize(
                module.weight,
                module.scales.astype(mx.float32) if affine else module.scales,
                module.biases.astype(mx.float32) if affine else None,
                *(args["group_size"], args["bits"], args["mode"]),
                dtype=mx.float32,
            )
            same(values, tensors[name].dequantize(), name)
            count += 1
    assert count >= 20
    assert generate(model, tokenizer, prompt=WORDS, max_tokens=4)


@needs(MLX, "mlx-lm")
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("mixtral", "mlx_4bit_g32"), ("mixtral", "mlx_mxfp4"), ("qwen3-moe", "mlx_nvfp4")],
)
def test_mlx_lm_runs_stacked_experts(kind: str, scheme: str, tmp_path: Path, call: Call) -> None:
    """As it runs the weights that we decode, which it stacks itself."""
    import mlx.core as mx
    import tiny_models
    from mlx_lm import generate, load

    source = tiny_models.write_directory(tmp_path / kind, kind)
    config = json.loads((source / "config.json").read_text())
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}  # which it wants of Qwen3-MoE
    (source / "config.json").write_text(json.dumps(config))
    done = call("quantize", source, "--scheme", scheme, "-o", tmp_path / "o", "--equalise", "off")
    assert done.code == 0, done.err
    plain = ("--scheme", "f32", "--format", "hf")
    done = call("quantize", tmp_path / "o", *plain, "-o", tmp_path / "plain")
    assert done.code == 0, done.err
    (model, tokenizer), (dense, _) = load(str(tmp_path / "o")), load(str(tmp_path / "plain"))
    stacks = [n for n, m in model.named_modules() if "switch_mlp" in n and "scales" in m]
    assert len(stacks) == 6
    for m in model.modules():
        for part in ("scales", "biases"):
            if part in m and m[part].dtype != mx.uint8:
                m[part] = m[part].astype(mx.float32)
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    ours, theirs = (np.array(m(tokens).astype(mx.float32)) for m in (model, dense))
    np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())
    assert generate(model, tokenizer, prompt="a", max_tokens=4)


# --- bitsandbytes ---------------------------------------------------------------------------------


@needs(BNB, "bitsandbytes")
@pytest.mark.parametrize("scheme", ["bnb_nf4", "bnb_nf4_dq", "bnb_fp4", "bnb_fp4_dq", "bnb_int8"])
def test_transformers_loads_and_bitsandbytes_decodes(
    scheme: str, tmp_path: Path, call: Call
) -> None:
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM

    out = written(call, scheme, tmp_path / "o", "--keep", "*1.mlp.down_proj.weight")
    model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    modules, count = dict(model.named_modules()), 0
    with qconvert.load(out) as tensors:
        for name in tensors:
            module = modules.get(name.removesuffix(".weight"))
            if isinstance(module, bnb.nn.Linear4bit):
                state = module.weight.quant_state
                state.dtype = torch.float32
                values = bnb.functional.dequantize_4bit(module.weight.data, state)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                codes, scales = module.weight.data, module.weight.SCB
                values = bnb.functional.int8_vectorwise_dequant(codes, scales)
            else:
                continue
            same(values, tensors[name].dequantize(), name)
            count += 1
    assert count == 27


@needs(BNB, "bitsandbytes")
@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bytes_are_as_bitsandbytes_writes_them(
    book: str, double: bool, tmp_path: Path, call: Call
) -> None:
    """But for codes of values in the middle between two entries of FP4, for the sign of its zeros,
    and for codes beside doubled scales, which we choose with the scales that are read.
    """
    import bitsandbytes as bnb
    import torch

    scheme = f"bnb_{book}{'_dq' if double else ''}"
    out = torch_tensors(written(call, scheme, tmp_path / "o"))
    module = "model.layers.2.mlp.up_proj"
    plain = torch_tensors(SAMPLE)[f"{module}.weight"]
    how: dict[str, Any] = {"quant_type": book, "compress_statistics": double, "blocksize": 64}
    weight = bnb.nn.Params4bit(plain, requires_grad=False, **how).to("cpu")
    wanted = {"weight": weight.data}
    for key, value in weight.quant_state.as_dict(packed=True).items():
        wanted[f"weight.{key}"] = value
    found = {k.removeprefix(f"{module}."): t for k, t in out.items() if k.startswith(module)}
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert (found[key].dtype, found[key].ndim) == (value.dtype, value.ndim)
        if "quant_state" in key:
            states = [json.loads(bytes(t.tolist())) for t in (value, found[key])]
            offsets = [state.pop("nested_offset", 0.0) for state in states]
            assert states[0] == states[1]
            assert offsets[0] == pytest.approx(offsets[1], rel=1e-6)
        elif double and key == "weight.absmax":
            assert (found[key] != value).float().mean() < 0.01  # a last bit of the offset
        elif double and key == "weight.nested_absmax":
            torch.testing.assert_close(found[key], value)
        elif key != "weight":
            assert torch.equal(found[key], value), key
    if double:
        return
    state = weight.quant_state
    state.dtype = torch.float32
    decoded = [bnb.functional.dequantize_4bit(t, state) for t in (weight.data, found["weight"])]
    errors = [(plain.float() - values).abs() for values in decoded]
    assert torch.equal(weight.data, found["weight"]) or book == "fp4"
    torch.testing.assert_close(errors[0], errors[1], rtol=0, atol=2e-9)


# --- GPTQ and AWQ ---------------------------------------------------------------------------------


@needs(GPTQMODEL, "gptqmodel")
@pytest.mark.parametrize(
    "scheme", ["gptq_4bit_g32", "gptq_4bit_g64", "gptq_4bit_channel", "gptq_8bit_g64"]
)
def test_gptqmodel_decodes(scheme: str, tmp_path: Path, call: Call) -> None:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    out = written(call, scheme, tmp_path / "o")
    stored, count = torch_tensors(out), 0
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    bits, group = block["bits"], block["group_size"]
    with qconvert.load(out) as tensors:
        for name in tensors:
            module = name.removesuffix(".weight")
            if f"{module}.qweight" not in stored:
                continue
            rows, wide = tensors[name].shape
            packed = TorchLinear(bits, group, block["sym"], block["desc_act"], wide, rows)
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                buffer, found = getattr(packed, part), stored[f"{module}.{part}"]
                assert (buffer.dtype, buffer.shape) == (found.dtype, found.shape), part
                setattr(packed, part, found.float() if part == "scales" else found)
            convert_gptq_v1_to_v2_format_module(packed, bits, torch.int32)
            same(packed.dequantize_weight().T, tensors[name].dequantize(), name)
            count += 1
    assert count >= 24


@needs(GPTQMODEL, "gptqmodel")
@pytest.mark.parametrize("scheme", ["awq_4bit_g32", "awq_4bit_g64", "awq_4bit_g64_sym"])
def test_gptqmodel_decodes_awq(scheme: str, tmp_path: Path, call: Call) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    out = written(call, scheme, tmp_path / "o")
    stored, count = torch_tensors(out), 0
    group = json.loads((out / "config.json").read_text())["quantization_config"]["group_size"]
    with qconvert.load(out) as tensors:
        for name in tensors:
            module = name.removesuffix(".weight")
            if f"{module}.qweight" not in stored:
                continue
            words, zeros, scales = (
                stored[f"{module}.{k}"] for k in ("qweight", "qzeros", "scales")
            )
            values = dequantize_gemm(words, zeros, scales.float(), 4, group).T
            same(values, tensors[name].dequantize(), name)
            count += 1
    assert count >= 24
