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
    drawn[..., 5:6] *= 8
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
    directory: Path, tensors: Weights, document: dict[str, Any], **documents: dict[str, Any]
) -> None:
    """The checkpoint; `document` is config.json, `documents` further JSON files by their stem."""
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    for stem, content in {"config": document, **documents}.items():
        (directory / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n")


def expect(directory: Path, decoded: Weights) -> None:
    """The plain model: what a reader has to give, as float32."""
    for name, tensor in decoded.items():
        if not torch.isfinite(tensor.float()).all():
            raise SystemExit(
                f"{directory.name}: {name}: the decoder gave a value that is not finite"
            )
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
    """Through the pipeline of the library: apply the config, observe minimum and maximum, compress."""
    from compressed_tensors.compressors import ModelCompressor

    model = nested(weights)
    apply_schemes(model, schemes, ignore)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    write(directory, model.state_dict(), config(weights))
    compressor.update_config(str(directory))
    expect(directory, weights | decompressed_weights(model))


def apply_schemes(model: torch.nn.Module, schemes: dict[str, Any], ignore: tuple[str, ...]) -> None:
    """`schemes` are the arguments of a QuantizationScheme by the name of its group."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    groups = {
        name: QuantizationScheme(**{"targets": ["Linear"], **scheme})
        for name, scheme in schemes.items()
    }
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            observe(module)


def decompressed_weights(model: torch.nn.Module) -> Weights:
    return {
        f"{name}.weight": decompressed(module)
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }


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
    yield (
        "ct_ignored_head",
        pack(
            weights(q_proj=(32, 64), lm_head=(32, 64)), integers(4, group=32), ignore=("lm_head",)
        ),
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


# --- bitsandbytes ---------------------------------------------------------------------------------


def bitsandbytes_cases() -> Iterator[tuple[str, Case]]:
    small = weights(q_proj=(32, 64), k_proj=(16, 64))
    # 16500 values: the last of 258 blocks of 64 is cut short, so is the second of 256 such blocks.
    ragged = weights(q_proj=(32, 64), down_proj=(66, 250))
    for kind in ("nf4", "fp4"):
        yield f"bnb_{kind}", four_bits(small, kind, double=False)
        yield f"bnb_{kind}_double", four_bits(small, kind, double=True)
    yield "bnb_nf4_double_ragged", four_bits(ragged, "nf4", double=True)
    yield "bnb_nf4_block128", four_bits(small, "nf4", double=False, blocksize=128)
    yield "bnb_int8", eight_bits(small)


def four_bits(weights: Weights, kind: str, *, double: bool, blocksize: int = 64) -> Case:
    def case(directory: Path) -> None:
        import bitsandbytes as bnb

        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            linear = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False)
            linear.weight = bnb.nn.Params4bit(
                weight.clone(),
                requires_grad=False,
                quant_type=kind,
                compress_statistics=double,
                blocksize=blocksize,
            )
            linear.to("cpu")
            module = name.removesuffix("weight")
            tensors |= {module + key: tensor for key, tensor in linear.state_dict().items()}
            decoded[name] = bnb_decoded(tensors, name)
        write(directory, tensors, config(weights, quantization_config=bnb_config(4, kind, double)))
        expect(directory, decoded)

    return case


def bnb_decoded(tensors: Weights, name: str) -> torch.Tensor:
    import bitsandbytes as bnb

    parts = {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in tensors.items()
        if key.startswith(f"{name}.")
    }
    state = bnb.functional.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    weight: torch.Tensor = bnb.functional.dequantize_4bit(tensors[name], state)
    return weight


def eight_bits(weights: Weights) -> Case:
    def case(directory: Path) -> None:
        import bitsandbytes as bnb

        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            linear = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
            linear.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
            linear.to("cpu")
            saved = linear.state_dict()
            tensors |= {name.removesuffix("weight") + key: saved[key] for key in saved}
            decoded[name] = bnb.functional.int8_vectorwise_dequant(saved["weight"], saved["SCB"])
        write(directory, tensors, config(weights, quantization_config=bnb_config(8, "fp4", False)))
        expect(directory, decoded)

    return case


def bnb_config(bits: int, kind: str, double: bool) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    ).to_dict()


def matrices(weights: Weights) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight) for name, weight in weights.items() if weight.ndim == 2]


# --- MLX ------------------------------------------------------------------------------------------


def mlx_cases() -> Iterator[tuple[str, Case]]:
    small = weights(q_proj=(32, 64), k_proj=(16, 64))
    long = weights(q_proj=(32, 128), down_proj=(48, 256), norm=128)
    for bits in (2, 3, 5, 6, 8):
        yield f"mlx_affine{bits}_g64", mlx(small, 64, bits)
    yield "mlx_affine4_g64", mlx(weights(q_proj=(32, 64), down_proj=(64, 128)), 64, 4)
    yield "mlx_affine4_g32", mlx(weights(q_proj=(32, 64), down_proj=(64, 96)), 32, 4)
    yield "mlx_affine4_g128", mlx(long, 128, 4)
    yield "mlx_affine3_g32", mlx(small, 32, 3)
    overrides: dict[str, Any] = {Q_PROJ: {"group_size": 32, "bits": 8}, K_PROJ: False}
    mixed = weights(q_proj=(32, 64), k_proj=(16, 64), down_proj=(64, 128))
    yield "mlx_affine4_overrides", mlx(mixed, 64, 4, overrides)
    halves = weights(q_proj=(32, 64), k_proj=(16, 64), dtype=torch.float16)
    yield "mlx_affine4_float16", mlx(halves, 64, 4)
    for mode, group, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        yield f"mlx_{mode}", mlx(small, group, bits, mode=mode)


def mlx(
    weights: Weights,
    group: int,
    bits: int,
    overrides: dict[str, Any] | None = None,
    mode: str = "affine",
) -> Case:
    """Through mlx-lm. `overrides` gives single modules other bits and groups, or leaves them out."""

    def case(directory: Path) -> None:
        from mlx_lm.utils import quantize_model, save_config, save_model

        model = mlx_modules(weights)
        model, saved = quantize_model(
            model,
            config(weights),
            group,
            bits,
            mode,
            quant_predicate=lambda path, _: (overrides or {}).get(path, True),
        )
        save_model(directory, model)
        save_config(saved, directory / "config.json")
        expect(directory, mlx_decoded(directory, weights))

    return case


def mlx_decoded(directory: Path, weights: Weights) -> Weights:
    """`weights` with the quantized ones as the written file has them."""
    import mlx.core as mx

    how = json.loads((directory / "config.json").read_text())["quantization"]
    stored = mx.load(str(directory / "model.safetensors"))
    decoded = dict(weights)
    for name in weights:
        module = name.removesuffix(".weight")
        if f"{module}.scales" not in stored:
            continue
        args = how | (how.get(module) or {})
        scales, biases = stored[f"{module}.scales"], stored.get(f"{module}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        values = mx.dequantize(
            stored[name],
            scales,
            biases,
            args["group_size"],
            args["bits"],
            args["mode"],
            dtype=mx.float32,
        )
        decoded[name] = torch.from_numpy(np.array(values))
    return decoded


def mlx_modules(weights: Weights) -> Any:
    """The nest of mlx modules with these weights."""
    import mlx.core as mx
    import mlx.nn

    root = mlx.nn.Module()
    for name, weight in weights.items():
        *path, leaf, _ = name.split(".")
        at = root
        for part, following in zip(path, [*path[1:], leaf], strict=True):
            if part.isdigit():
                at = at[int(part)]
                continue
            if part not in at:
                at[part] = [mlx.nn.Module()] if following.isdigit() else mlx.nn.Module()
            at = at[part]
        kind = mx.float16 if weight.dtype == torch.float16 else mx.bfloat16
        values = mx.array(weight.float().numpy()).astype(kind)
        if weight.ndim == 2:
            at[leaf] = mlx.nn.Linear(*weight.shape[::-1], bias=False)
        else:
            at[leaf] = mlx.nn.RMSNorm(weight.shape[0])
        at[leaf].weight = values
    return root


# --- GPTQ and AWQ ---------------------------------------------------------------------------------


def gptq_cases() -> Iterator[tuple[str, Case]]:
    kind = {"dtype": torch.float16}
    small = weights(q_proj=(32, 64), k_proj=(32, 64), **kind)
    wide = weights(q_proj=(32, 64), down_proj=(64, 128), **kind)
    long = weights(q_proj=(32, 128), down_proj=(32, 256), norm=128, **kind)
    yield "gptq_4_sym_g64", gptq(wide, 4, 64)
    yield "gptq_4_sym_g128", gptq(long, 4, 128)
    yield "gptq_8_sym_g32", gptq(small, 8, 32)
    yield "gptq_4_sym_channel", gptq(small, 4, -1)
    yield "gptq_4_act_order", gptq(wide, 4, 32, act_order=True)
    yield "gptq_4_asym_v1", gptq(small, 4, 32, symmetric=False)
    yield "gptq_4_asym_v2", gptq(small, 4, 32, symmetric=False, version="gptq_v2")
    yield "gptq_2_sym_g32", gptq(small, 2, 32)
    yield "gptq_3_sym_g32", gptq(small, 3, 32)
    yield "gptq_3_asym_v2", gptq(small, 3, 32, symmetric=False, version="gptq_v2")
    yield "awq_asym_g64", awq(wide, 64)
    yield "awq_asym_g128", awq(long, 128)
    yield "awq_sym_g32", awq(small, 32, symmetric=True)


def grid(
    weight: torch.Tensor, bits: int, group: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 scales and zero points [out, groups] over the columns of each group.

    `group` says of every column which group it belongs to.
    """
    levels = 2**bits - 1
    count = int(group.max()) + 1
    parts = [weight.float()[:, group == at] for at in range(count)]
    lowest = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
    highest = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
    if symmetric:
        highest = torch.maximum(highest, -lowest)
        lowest = -highest
    scale = ((highest - lowest) / levels).half().clamp(min=1e-6)
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-lowest / scale.float()).round().clamp(0, levels).half()


def gptq(
    weights: Weights,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    version: str = "gptq",
) -> Case:
    def case(directory: Path) -> None:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            out, wide = weight.shape
            group = torch.arange(wide, dtype=torch.int32) // (
                group_size if group_size > 0 else wide
            )
            if act_order:
                shuffled = np.random.default_rng(7).permutation(wide)
                group = group[torch.from_numpy(shuffled)]
            scale, zero = grid(weight, bits, group, symmetric=symmetric)
            linear = torch.nn.Linear(wide, out, bias=False)
            linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            packed = TorchLinear(bits, group_size, symmetric, act_order, wide, out)
            packed.pack_original(linear, scale.float(), zero.float().to(torch.int32), group)
            packed.scales = packed.scales.float()
            decoded[name] = packed.dequantize_weight().T
            packed.scales = packed.scales.half()
            if version == "gptq":
                convert_gptq_v2_to_v1_format_module(packed, mock.Mock(bits=bits))
            del tensors[name]
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                tensors[name.removesuffix("weight") + part] = getattr(packed, part)
        described = {
            "bits": bits,
            "group_size": group_size,
            "desc_act": act_order,
            "sym": symmetric,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": version,
            "pack_dtype": "int32",
            "meta": {
                "quantizer": ["gptqmodel:7.7.0"],
                "damp_percent": 0.05,
                "true_sequential": True,
            },
        }
        write(
            directory,
            tensors,
            config(weights, quantization_config=described),
            quantize_config=described,
        )
        expect(directory, decoded)

    return case


def awq(weights: Weights, group_size: int, *, symmetric: bool = False) -> Case:
    """AutoAWQ packs and its own dequantize_gemm decodes; GPTQModel and CT have to agree."""

    def case(directory: Path) -> None:
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            out, wide = weight.shape
            group = torch.arange(wide) // group_size
            scale, zero = grid(weight, 4, group, symmetric=symmetric)
            linear = torch.nn.Linear(wide, out, bias=False)
            linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            # AutoAWQ does not clamp: the codes have to come out in 0..15 by themselves.
            linear.weight.data = on_grid(weight.float(), scale, zero, group)
            packed = WQLinear_GEMM.from_linear(
                linear, 4, group_size, scales=scale.T.float(), zeros=zero.T.float()
            )
            decoded[name] = dequantize_gemm(
                packed.qweight, packed.qzeros, packed.scales.float(), 4, group_size
            ).T
            agree_on_awq(packed, group_size, decoded[name])
            del tensors[name]
            for part in ("qweight", "qzeros", "scales"):
                tensors[name.removesuffix("weight") + part] = getattr(packed, part)
        described = {
            "bits": 4,
            "group_size": group_size,
            "modules_to_not_convert": ["lm_head"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": not symmetric,
        }
        write(directory, tensors, config(weights, quantization_config=described))
        expect(directory, decoded)

    return case


def on_grid(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: torch.Tensor
) -> torch.Tensor:
    """Weights clipped to what the codes 0..15 can say."""
    scale, zero = scale.float()[:, group], zero.float()[:, group]
    return torch.clamp(weight, -zero * scale, (15 - zero) * scale)


def agree_on_awq(packed: Any, group_size: int, decoded: torch.Tensor) -> None:
    """Stops if GPTQModel's or compressed-tensors' reading of the same words differs."""
    from compressed_tensors.entrypoints.convert import AutoAWQConverter
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    scales = packed.scales.float()
    theirs = dequantize_gemm(packed.qweight, packed.qzeros, scales, 4, group_size).T
    codes, zeros = AutoAWQConverter.reverse_awq_order(
        *AutoAWQConverter.unpack_awq(packed.qweight, packed.qzeros, 4), 4
    )
    group = torch.arange(codes.shape[0]) // group_size
    again = (((codes & 15) - (zeros & 15)[group]) * scales[group]).T
    if not torch.equal(theirs, decoded) or not torch.equal(again, decoded):
        raise SystemExit("the readers of AWQ do not agree")


# --- FP8 and FP4 without a library's config ---------------------------------------------------------


def fp8_cases() -> Iterator[tuple[str, Case]]:
    blocks = weights(q_proj=(32, 256), down_proj=(64, 128), norm=256)
    yield "fp8_block", fp8_block(blocks, 128)
    yield "fp8_block_e8m0", fp8_block(blocks, 128, power_of_two=True)
    yield "fp8_block_ragged", fp8_block(weights(q_proj=(48, 64), down_proj=(80, 96)), 64)
    small = weights(q_proj=(32, 64), k_proj=(16, 64))
    yield "fp8_mistral", fp8_mistral(small, "weight_scale_inv", "activation_scale")
    yield "fp8_mistral_qscale", fp8_mistral(small, "qscale_weight", "qscale_act")
    yield "gpt_oss_mxfp4", gpt_oss
    yield "deepseek_v4_fp4", deepseek_v4


def fp8_block(weights: Weights, side: int, *, power_of_two: bool = False) -> Case:
    """DeepSeek V3's names; transformers quantizes whole blocks, so edges are padded and cut."""

    def case(directory: Path) -> None:
        from compressed_tensors.entrypoints.convert import FP8BlockDequantizer

        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            quantized, scale = fp8_blocks(weight, side, power_of_two)
            tensors |= {name: quantized, f"{name}_scale_inv": scale}
            reader = FP8BlockDequantizer(weight_block_size=(side, side), dtype=torch.float32)
            decoded[name] = reader.process({name: quantized, f"{name}_scale_inv": scale})[name]
            rows, columns = weight.shape
            if rows <= side and columns % side == 0 or (rows % side, columns % side) == (0, 0):
                theirs = fp8_dequantized(quantized, scale)
                if not torch.equal(theirs, decoded[name]):
                    raise SystemExit("transformers and compressed-tensors do not agree")
        described = fp8_config(weight_block_size=[side, side])
        if power_of_two:
            described["scale_fmt"] = "ue8m0"
        write(directory, tensors, config(weights, quantization_config=described))
        expect(directory, decoded)

    return case


def fp8_blocks(
    weight: torch.Tensor, side: int, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes [out, in] and the multiplier of each block, by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % side, 0, -rows % side))
    asked = mock.Mock(weight_block_size=[side, side], scale_fmt="ue8m0" if power_of_two else None)
    made = Fp8Quantize(mock.Mock(quantization_config=asked)).convert({"weight": padded})
    return made["weight"][:rows, :columns].contiguous(), made["weight_scale_inv"]


def fp8_dequantized(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight: torch.Tensor = Fp8Dequantize(None)._dequantize_one(
        quantized, scale, output_dtype=torch.float32
    )
    return weight


def fp8_config(**more: Any) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head"],
        "quant_method": "fp8",
        **more,
    }


def fp8_mistral(weights: Weights, scale_name: str, activation_name: str) -> Case:
    """One bfloat16 scale a tensor, and a scale of the activations that no weight needs."""

    def case(directory: Path) -> None:
        tensors, decoded = dict(weights), dict(weights)
        for name, weight in matrices(weights):
            scale = (weight.float().abs().max() / 448).bfloat16()
            quantized = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            module = name.removesuffix("weight")
            activation = torch.tensor(0.0123, dtype=torch.bfloat16)
            tensors |= {
                name: quantized,
                module + scale_name: scale,
                module + activation_name: activation,
            }
            decoded[name] = fp8_dequantized(quantized, scale)
        described = fp8_config(weight_block_size=None) | {"activation_scheme": "static"}
        write(directory, tensors, config(weights, quantization_config=described))
        expect(directory, decoded)

    return case


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed E2M1 codes [out, in / 2] and E8M0 bytes [out, in / 32], by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    lowest, highest = weight.float().unflatten(-1, (-1, 32)).aminmax(dim=-1)
    scale, _ = calculate_qparams(lowest, highest, scheme.weights)
    made = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").compress(
        {"weight": weight.float(), "weight_scale": scale}, scheme
    )
    return made["weight_packed"], made["weight_scale"]


def gpt_oss(directory: Path) -> None:
    """Two experts of gpt-oss. Expected values have transformers' shape, [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors: Weights = {}
    decoded: Weights = {}
    experts = "model.layers.0.mlp.experts"
    for name, rows, columns in (("gate_up_proj", 64, 64), ("down_proj", 64, 32)):
        whole = trained_like(name, (2, rows, columns))
        codes, scales = mxfp4(whole.flatten(0, 1))
        blocks = codes.reshape(2, rows, columns // 32, 16)
        scales = scales.reshape(2, rows, columns // 32)
        tensors |= {f"{experts}.{name}_blocks": blocks, f"{experts}.{name}_scales": scales}
        decoded[f"{experts}.{name}"] = convert_moe_packed_tensors(
            blocks, scales, dtype=torch.float32
        )
        bias = trained_like(f"{name}_bias", (2, rows)).bfloat16()
        decoded[f"{experts}.{name}_bias"] = tensors[f"{experts}.{name}_bias"] = bias
    dense = {
        "model.layers.0.mlp.router.weight": (2, 64),
        "model.layers.0.mlp.router.bias": (1, 2),
        "model.layers.0.self_attn.sinks": (1, 2),
        f"{Q_PROJ}.weight": (32, 64),
        f"{NORM}.weight": (1, 64),
    }
    for name, shape in dense.items():
        value = trained_like(name, shape).bfloat16()
        decoded[name] = tensors[name] = value[0] if shape[0] == 1 else value
    described = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
    document = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "dtype": "bfloat16",
        "head_dim": 16,
        "hidden_size": 64,
        "intermediate_size": 32,
        "layer_types": ["sliding_attention"],
        "max_position_embeddings": 128,
        "model_type": "gpt_oss",
        "num_attention_heads": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "quantization_config": described,
        "rms_norm_eps": 1e-05,
        "sliding_window": 16,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 32,
    }
    write(directory, tensors, document)
    expect(directory, decoded)


def deepseek_v4(directory: Path) -> None:
    """DeepSeek V4's own names: FP4 experts with a scale for 32 columns, FP8 for the dense ones.

    `hc_attn_scale` is a tensor of the model and no scale of a weight.
    """
    tensors: Weights = {}
    decoded: Weights = {}
    for expert in range(2):
        for part, shape in (("w1", (32, 64)), ("w2", (64, 32)), ("w3", (32, 64))):
            module = f"layers.0.ffn.experts.{expert}.{part}"
            codes, scales = mxfp4(trained_like(module, shape))
            tensors[f"{module}.weight"] = codes.view(torch.int8)
            tensors[f"{module}.scale"] = scales.view(torch.float8_e8m0fnu)
    quantized, scale = fp8_blocks(trained_like("wq_a", (32, 256)), 128, power_of_two=True)
    tensors |= {"layers.0.attn.wq_a.weight": quantized, "layers.0.attn.wq_a.scale": scale}
    for name, tensor in tensors.items():
        if name.endswith(".weight"):
            decoded[name] = fp8_dequantized(tensor, tensors[name.removesuffix("weight") + "scale"])
    dense = {
        "layers.0.attn_norm.weight": trained_like("attn_norm", (1, 64))[0].bfloat16(),
        "layers.0.hc_attn_scale": torch.tensor([0.5, 0.25, 1.5]),
    }
    document = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "dtype": "bfloat16",
        "expert_dtype": "fp4",
        "hidden_size": 64,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 32,
        "n_routed_experts": 2,
        "num_hidden_layers": 1,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "vocab_size": 32,
    }
    write(directory, tensors | dense, document)
    expect(directory, decoded | dense)


# --- whole models ---------------------------------------------------------------------------------


def whole_cases() -> Iterator[tuple[str, Case]]:
    yield "modelopt_fp8", modelopt("FP8_DEFAULT_CFG", "FP8_KV_CFG")
    yield "modelopt_fp8_channel", modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG")
    yield "modelopt_nvfp4", modelopt("NVFP4_DEFAULT_CFG")
    yield "whole_ct_w4a16", whole_compressed_tensors
    yield "whole_bnb_nf4", whole_bitsandbytes
    yield "whole_mlx_4bit", whole_mlx


def tiny_llama() -> Any:
    """A Llama of one layer with trained-like weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=32,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            dtype=torch.bfloat16,
        )
    )
    for name, parameter in model.named_parameters():
        drawn = trained_like(name.removesuffix(".weight"), (1, *parameter.shape)[-2:])
        parameter.data = (drawn if parameter.ndim == 2 else 1 + 10 * drawn[0]).bfloat16()
    return model.eval()


def plain(model: Any) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def modelopt(config_name: str, cache_config_name: str | None = None) -> Case:
    """Through ModelOpt's own export_hf_checkpoint."""

    def case(directory: Path) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model = tiny_llama()
        decoded = plain(model)
        asked = getattr(mtq, config_name)
        if cache_config_name:
            asked = mtq.utils.update_quant_cfg_with_kv_cache_quant(
                asked, getattr(mtq, cache_config_name)["quant_cfg"]
            )
        mtq.quantize(model, asked, lambda model: model(torch.arange(32)[None]))
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=directory)
        (directory / "generation_config.json").unlink()
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        for name in decoded:
            module = name.removesuffix("weight")
            if f"{module}weight_scale" in tensors:
                decoded[name] = modelopt_decoded(tensors, module)
        expect(directory, decoded)

    return case


def modelopt_decoded(tensors: Weights, module: str) -> torch.Tensor:
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    stored, scale = tensors[f"{module}weight"], tensors[f"{module}weight_scale"]
    weight: torch.Tensor
    if stored.dtype == torch.uint8:
        shape = (*stored.shape[:-1], 2 * stored.shape[-1])
        weight = NVFP4QTensor(shape, torch.float32, stored).dequantize(
            scale=scale, double_scale=tensors[f"{module}weight_scale_2"], block_sizes={-1: 16}
        )
    else:
        rows = scale.reshape(-1, 1) if scale.ndim else scale
        weight = FP8QTensor(stored.shape, torch.float32, stored).dequantize(scale=rows)
    return weight


def whole_compressed_tensors(directory: Path) -> None:
    """As llm-compressor saves: compressed by the library, written by transformers."""
    from compressed_tensors.compressors import ModelCompressor

    model = tiny_llama()
    decoded = plain(model)
    apply_schemes(model, {"group_0": {"weights": integers(4, group=32)}}, ("lm_head",))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    (directory / "generation_config.json").unlink()
    expect(directory, decoded | decompressed_weights(model))


def whole_bitsandbytes(directory: Path) -> None:
    """Quantized by transformers while it loads, and saved by it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny_llama()
    decoded = plain(model)
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(
            source,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype="bfloat16",
            ),
            device_map="cpu",
        )
    loaded.save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    for name in decoded:
        if f"{name}.absmax" in tensors:
            decoded[name] = bnb_decoded(tensors, name)
    expect(directory, decoded)


def whole_mlx(directory: Path) -> None:
    """Embedding and head too, as mlx_lm.convert does."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model = tiny_llama()
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        loaded, read = load_model(Path(source), lazy=False)
    quantized, saved = quantize_model(loaded, read, 32, 4)
    save_model(directory, quantized)
    save_config(saved, directory / "config.json")
    expect(directory, mlx_decoded(directory, plain(model)))


# --- run ------------------------------------------------------------------------------------------


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {}
    for family in (
        compressed_tensors_cases,
        bitsandbytes_cases,
        mlx_cases,
        gptq_cases,
        fp8_cases,
        whole_cases,
    ):
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
