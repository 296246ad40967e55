"""Writes small checkpoints of other tools into tests/data/foreign, with their own decoded values.

    python tests/make_foreign.py [--only NAME ...]    writes the directories
    python tests/make_foreign.py --check              builds them again and compares every byte

Each directory holds `config.json` and `model.safetensors` as the tool named below writes them, and
`expected.safetensors`: every tensor of the plain model as float32, under its plain name, as the
decoder named below gives it. Nothing here is computed by qconvert, so that a test which reads a
directory compares with the outside. Tests need none of the libraries; to build, they are
compressed-tensors 0.20.1, bitsandbytes 0.50.2, mlx 0.32.4, mlx-lm 0.32.2, GPTQModel 7.7.0,
transformers 5.24.0 and torch 2.13.0 (see tests/data/foreign/README.md for how to install them).

Float32 values: where a decoder works in the dtype of the scales, the scales are widened to float32
first, which is exact, so that the values are those of the stored numbers, rounded once by float32.

Weights are Student t with 5 degrees of freedom, times 0.02, with one column eight times as large,
in bfloat16 (float16 for GPTQ and AWQ). In modules of more than 32 rows, row 3 begins with zeros.

Who wrote what, and whose decoder gives the expected values:

| directories          | codes and layout by                | config.json by     | decoded by           |
|----------------------|------------------------------------|--------------------|----------------------|
| ct_*                 | compressed-tensors                 | compressed-tensors | compressed-tensors   |
| bnb_*                | bitsandbytes                       | this script        | bitsandbytes         |
| mlx_*                | mlx                                | mlx-lm             | mlx                  |
| gptq_*               | GPTQModel (scales by this script)  | this script        | GPTQModel            |
| awq_*                | GPTQModel (scales by this script)  | this script        | GPTQModel, and CT's  |
| fp8_block*, deepseek*| this script                        | this script        | transformers         |
| fp8_mistral, modelopt| this script                        | this script        | torch, CT's tables   |
| gpt_oss              | this script                        | this script        | transformers         |
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch

HERE = Path(__file__).parent / "data" / "foreign"
Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"
NORM = "model.norm"
Weights = dict[str, torch.Tensor]
Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def weights(
    *, dtype: torch.dtype = torch.bfloat16, norm: int = 64, **shapes: tuple[int, int]
) -> Weights:
    """Weights of the modules q_proj, k_proj, ... of one layer, a norm of width `norm` beside them."""
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "o_proj": "self_attn"}
    made = {}
    for leaf, shape in shapes.items():
        name = leaf if leaf == "lm_head" else f"model.layers.0.{parts.get(leaf, 'mlp')}.{leaf}"
        made[f"{name}.weight"] = trained_like(name, shape).to(dtype)
    made[f"{NORM}.weight"] = (1 + 10 * trained_like(NORM, (1, norm))[0]).to(dtype)
    return made


def trained_like(seed: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values with heavy tails and an outlier column, the same for the same name."""
    drawn = np.random.default_rng(zlib.crc32(seed.encode())).standard_t(5, size=shape) * 0.02
    drawn[..., 5] *= 8
    if shape[-2] > 32:
        drawn[..., 3, :32] = 0
    return torch.from_numpy(drawn.astype(np.float32))


def config(weights: Weights, **more: Any) -> dict[str, Any]:
    """config.json of a one-layer Llama around these weights."""
    widths = {name.split(".")[-2]: tuple(weight.shape) for name, weight in weights.items()}
    hidden = widths["norm"][0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "dtype": {torch.float16: "float16"}.get(weights[f"{NORM}.weight"].dtype, "bfloat16"),
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": widths.get("down_proj", (0, 2 * hidden))[1],
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": widths["q_proj"][0] // 16,
        "num_hidden_layers": 1,
        "num_key_value_heads": widths.get("k_proj", widths["q_proj"])[0] // 16,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 32,
        **more,
    }


def write(
    directory: Path, tensors: Weights, config: dict[str, Any], **documents: dict[str, Any]
) -> None:
    """The checkpoint. `documents` are further JSON files, by their stem."""
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    for stem, document in {"config": config, **documents}.items():
        (directory / f"{stem}.json").write_text(json.dumps(document, indent=2) + "\n")


def expect(directory: Path, decoded: Weights) -> None:
    """The plain model: what a reader has to give, as float32."""
    for name, tensor in decoded.items():
        if not torch.isfinite(tensor.float()).all():
            raise SystemExit(f"{directory.name}: {name}: the decoder gave a value that is not finite")
    safetensors.torch.save_file(
        {name: tensor.float().contiguous() for name, tensor in decoded.items()},
        directory / "expected.safetensors",
    )


def nested(weights: Weights) -> torch.nn.Module:
    """Modules under the names of the weights: Linear for matrices, a bare one for the norm."""
    root = torch.nn.Module()
    for name, weight in weights.items():
        *path, leaf, _ = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        if weight.ndim == 2:
            module: torch.nn.Module = torch.nn.Linear(*weight.shape[::-1], bias=False)
        else:
            module = torch.nn.Module()
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        at.add_module(leaf, module)
    return root


# --- compressed-tensors ---------------------------------------------------------------------------


def compressed_tensors(
    directory: Path, weights: Weights, schemes: dict[str, Any], ignore: tuple[str, ...] = ()
) -> None:
    """Through the pipeline of the library: apply the config, observe minimum and maximum, compress.

    `schemes` are the arguments of a QuantizationScheme by the name of its group.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = nested(weights)
    groups = {
        name: QuantizationScheme(**{"targets": ["Linear"], **scheme})
        for name, scheme in schemes.items()
    }
    apply_quantization_config(
        model, QuantizationConfig(config_groups=groups, ignore=list(ignore))
    )
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            observe(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    write(directory, model.state_dict(), config(weights))
    compressor.update_config(str(directory))
    decoded = {name: weight for name, weight in weights.items()}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            decoded[f"{name}.weight"] = decompressed(module)
    expect(directory, decoded)


def observe(module: Any) -> None:
    """Sets scales and zero points of a Linear from the extremes of its weights, by the library."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = module.quantization_scheme.weights
    weight = module.weight.float()
    rows, columns = weight.shape
    if args.strategy in ("group", "tensor_group"):
        lowest, highest = weight.unflatten(-1, (-1, args.group_size)).aminmax(dim=-1)
    elif args.strategy == "channel":
        lowest, highest = weight.aminmax(dim=-1, keepdim=True)
    elif args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        blocks = padded.unflatten(-1, (-1, wide)).unflatten(0, (-1, high))
        lowest, highest = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        lowest, highest = weight.aminmax()
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(overall)
    scale, zero_point = calculate_qparams(lowest, highest, args, global_scale=overall)
    module.weight_scale.data.copy_(scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point)
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.0123)
    if hasattr(module, "input_zero_point"):
        module.input_zero_point.data.fill_(-3)
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(321.0)


def decompressed(module: Any) -> torch.Tensor:
    """A compressed module's weight in float32, by the library.

    Its FP4 and FP6 compressors unpack to bfloat16 unless told otherwise; here they are told.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.mxfp6 import base as mxfp6
    from compressed_tensors.compressors.nvfp4 import base as nvfp4

    state = {name: tensor.data for name, tensor in module.named_parameters(recurse=False)}
    state |= dict(module.named_buffers(recurse=False))
    if state["weight_scale"].dtype in (torch.bfloat16, torch.float16):
        state["weight_scale"] = state["weight_scale"].float()
    scheme = module.quantization_scheme
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    wide: dict[str, Any] = {"dtype": torch.float32}
    with (
        mock.patch.object(
            nvfp4, "unpack_fp4_from_uint8", partial(nvfp4.unpack_fp4_from_uint8, **wide)
        ),
        mock.patch.object(
            mxfp6, "unpack_fp6_from_uint8", partial(mxfp6.unpack_fp6_from_uint8, **wide)
        ),
    ):
        weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight


def integers(
    bits: int, *, group: int | None = None, symmetric: bool = True, strategy: str | None = None
) -> dict[str, Any]:
    strategy = strategy or ("group" if group else "channel")
    named = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return named | ({"group_size": group} if group else {})


def floats(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


def compressed_tensors_cases() -> Iterator[tuple[str, Case]]:
    narrow = weights(q_proj=(32, 64), down_proj=(64, 96))
    halves = weights(q_proj=(32, 64), down_proj=(64, 128))
    long = weights(q_proj=(32, 128), down_proj=(48, 256), norm=128)
    ragged = weights(q_proj=(48, 80), down_proj=(40, 100), norm=80)
    blocks = weights(q_proj=(64, 128), down_proj=(80, 160), norm=128)
    small = weights(q_proj=(32, 64), k_proj=(16, 64))
    for group, used in ((32, narrow), (64, halves), (128, long)):
        yield f"ct_pack4_sym_g{group}", pack(used, integers(4, group=group))
    yield "ct_pack4_sym_channel", pack(ragged, integers(4))
    yield "ct_pack4_sym_tensor", pack(small, integers(4, strategy="tensor"))
    yield "ct_pack4_asym_g32", pack(narrow, integers(4, group=32, symmetric=False))
    yield "ct_pack4_asym_channel", pack(ragged, integers(4, symmetric=False))
    yield "ct_pack8_sym_channel", pack(small, integers(8))
    yield "ct_pack8_sym_g32", pack(narrow, integers(8, group=32))
    for bits in (2, 3, 5, 6, 7):
        yield f"ct_pack{bits}_sym_g32", pack(small, integers(bits, group=32))
    yield "ct_pack3_sym_channel", pack(ragged, integers(3))
    yield "ct_pack3_asym_g32", pack(small, integers(3, group=32, symmetric=False))
    yield "ct_mixed_int4_int8", mixed(narrow)
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    fixed = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
    skewed = fixed | {"symmetric": False}
    yield "ct_int8_dynamic", activations(ragged, integers(8), token)
    yield "ct_int8_static", activations(small, integers(8), fixed)
    yield "ct_int8_static_asym", activations(small, integers(8, strategy="tensor"), skewed)
    yield "ct_fp8_dynamic", activations(ragged, floats("channel"), floats("token", dynamic=True))
    yield "ct_fp8_static", activations(small, floats("tensor"), floats("tensor"))
    by_group = floats("group", group_size=128, dynamic=True)
    block = floats("block", block_structure=[64, 64])
    yield "ct_fp8_block", activations(blocks, block, by_group)
    for preset in ("NVFP4A16", "NVFP4", "MXFP4A16", "MXFP6A16", "MXFP8A16"):
        yield f"ct_{preset.lower()}", preset_of(narrow, preset)
    yield "ct_ignored_head", pack(
        weights(q_proj=(32, 64), lm_head=(32, 64)), integers(4, group=32), ignore=("lm_head",)
    )


def pack(weights: Weights, args: dict[str, Any], ignore: tuple[str, ...] = ()) -> Case:
    return lambda directory: compressed_tensors(
        directory, weights, {"group_0": {"weights": args}}, ignore
    )


def activations(weights: Weights, args: dict[str, Any], inputs: dict[str, Any]) -> Case:
    scheme = {"weights": args, "input_activations": inputs}
    return lambda directory: compressed_tensors(directory, weights, {"group_0": scheme})


def mixed(weights: Weights) -> Case:
    schemes = {
        "group_0": {"targets": ["re:.*mlp.*"], "weights": integers(4, group=32)},
        "group_1": {"targets": ["re:.*self_attn.*"], "weights": integers(8)},
    }
    return lambda directory: compressed_tensors(directory, weights, schemes)


def preset_of(weights: Weights, name: str) -> Case:
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"]).model_dump()
    return lambda directory: compressed_tensors(directory, weights, {"group_0": scheme})


# --- run ------------------------------------------------------------------------------------------


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {}
    for family in (compressed_tensors_cases,):
        made |= dict(family())
    return made


def build(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    known = cases()
    for name in names or known:
        directory = root / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        known[name](directory)
        print(name, sum(file.stat().st_size for file in directory.iterdir()))


def differences(left: Path, right: Path) -> list[str]:
    """Files that are not the same in both trees, README.md apart."""
    files = {
        file.relative_to(root)
        for root in (left, right)
        for file in root.rglob("*")
        if file.is_file() and file.name != "README.md"
    }
    return [
        str(file)
        for file in sorted(files)
        if not (left / file).exists()
        or not (right / file).exists()
        or not filecmp.cmp(left / file, right / file, shallow=False)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--check", action="store_true", help="build elsewhere and compare bytes")
    asked = parser.parse_args()
    if not asked.check:
        build(HERE, asked.only)
        return
    with tempfile.TemporaryDirectory() as work:
        build(Path(work), [])
        different = differences(Path(work), HERE)
    print("\n".join(f"differs: {file}" for file in different) or "every byte the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
