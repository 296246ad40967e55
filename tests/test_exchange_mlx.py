"""MLX's floating modes: what is written, read by a few lines of NumPy, and what moves into them and
out of them. That mlx decodes the same bits, test_prove_packed says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
from conftest import ROOT, Call
from safetensors.numpy import load_file, save_file
from test_exchange_micro import E2M1, array, decoded, e4m3, powers, raw, sqnr, write
from test_exchange_packed import values

import qconvert

FOREIGN = ROOT / "tests" / "data" / "foreign"
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
MODES = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers. Read only."""
    return tiny_models.write_directory(tmp_path_factory.mktemp("m") / "llama", "llama")


def block(directory: Path) -> dict[str, Any]:
    fields = json.loads((directory / "config.json").read_text())
    assert fields["quantization"] == fields["quantization_config"]
    return dict(fields["quantization"])


def read(directory: Path, module: str, mode: str) -> Any:
    """A weight by the table of formats/exchange/mlx.md."""
    tensors = raw(directory / "model.safetensors")
    assert tensors[f"{module}.weight"][0] == "U32"
    assert f"{module}.biases" not in tensors
    scale = array(tensors, f"{module}.scales")
    rows = np.frombuffer(tensors[f"{module}.weight"][2], np.uint8).reshape(len(scale), -1)
    if mode == "mxfp8":
        codes = e4m3(rows)
    else:
        codes = E2M1[np.stack([rows & 15, rows >> 4], axis=2).reshape(len(rows), -1)]
    each = e4m3(scale) if mode == "nvfp4" else powers(scale)
    return codes * np.repeat(each, MODES[mode]["group_size"], axis=1)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_means_what_the_page_says(
    mode: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    keep = ("--keep", "*1*k_proj.weight")
    out = tmp_path / "o"
    done = call("quantize", llama, "--scheme", f"mlx_{mode}", "-o", out, *keep)
    assert done.code == 0, done.err
    kept = "model.layers.1.self_attn.k_proj"
    assert block(out) == {**MODES[mode], kept: False}
    plain, found = values(llama), values(out)
    for module in (UP, DOWN, "model.embed_tokens", "lm_head"):
        own = found[f"{module}.weight"]
        np.testing.assert_array_equal(read(out, module, mode).view("u4"), own.view("u4"))
        assert sqnr(plain[f"{module}.weight"], own) > (30 if mode == "mxfp8" else 17)
    assert call("verify", out, "--against", llama).code == 0


def test_a_module_may_have_another_mode(llama: Path, tmp_path: Path, call: Call) -> None:
    own = ("--tensor-scheme", "*down_proj*=mlx_mxfp8", "--tensor-scheme", "lm_head*=mlx_6bit_g64")
    done = call("quantize", llama, "--scheme", "mlx_nvfp4", "-o", tmp_path / "o", *own)
    assert done.code == 0, done.err
    found = block(tmp_path / "o")
    assert {k: found.pop(k) for k in ("group_size", "bits", "mode")} == MODES["nvfp4"]
    # A module without a mode is affine to mlx, whatever the others are.
    assert found == {
        "model.layers.0.mlp.down_proj": MODES["mxfp8"],
        "model.layers.1.mlp.down_proj": MODES["mxfp8"],
        "lm_head": {"group_size": 64, "bits": 6},
    }
    np.testing.assert_array_equal(
        read(tmp_path / "o", DOWN, "mxfp8"), values(tmp_path / "o")[f"{DOWN}.weight"]
    )


def moved(call: Call, source: Path, output: Path, *options: str) -> str:
    """What is said of a move."""
    done = call("quantize", source, "--scheme", "keep", "-o", output, *options)
    assert done.code == 0, done.err
    return " ".join((done.out + done.err).split())


def test_mxfp4_moves_among_mlx_compressed_tensors_and_ggml(
    llama: Path, tmp_path: Path, call: Call
) -> None:
    qconvert.quantize(llama, "mlx_mxfp4", output=tmp_path / "mlx", keep=("*embed*", "lm_head*"))
    wanted = {n: read(tmp_path / "mlx", n, "mxfp4") for n in (UP, DOWN)}
    said = moved(call, tmp_path / "mlx", tmp_path / "a.gguf", "--exact", "--raw")
    assert "14 quantized tensors moved exactly, 0 decoded" in said
    peers = {t.name: t for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    to = ("--exact", "--format", "compressed-tensors")
    moved(call, tmp_path / "mlx", tmp_path / "ct", *to)
    tensors = raw(tmp_path / "ct" / "model.safetensors")
    for module, values_ in wanted.items():
        peer = peers[f"{module}.weight"]
        assert peer.tensor_type.name == "MXFP4"
        np.testing.assert_array_equal(gguf.quants.dequantize(peer.data, peer.tensor_type), values_)
        np.testing.assert_array_equal(decoded(tensors, module), values_)
    moved(call, tmp_path / "ct", tmp_path / "back", "--exact", "--format", "mlx")
    # Bytes between directories are copied, those of -0 among them.
    files = [raw(tmp_path / p / "model.safetensors") for p in ("mlx", "back")]
    assert files[0] == files[1]
    back = {k: v for k, v in block(tmp_path / "back").items() if v is not False}
    assert back == MODES["mxfp4"]


def test_mxfp8_moves_to_compressed_tensors_and_back(
    llama: Path, tmp_path: Path, call: Call
) -> None:
    qconvert.quantize(llama, "mlx_mxfp8", output=tmp_path / "mlx", keep=("*embed*", "lm_head*"))
    moved(call, tmp_path / "mlx", tmp_path / "ct", "--exact", "--format", "compressed-tensors")
    tensors = raw(tmp_path / "ct" / "model.safetensors")
    for module in (UP, DOWN):
        found = read(tmp_path / "mlx", module, "mxfp8")
        np.testing.assert_array_equal(decoded(tensors, module), found)
    moved(call, tmp_path / "ct", tmp_path / "back", "--exact", "--format", "mlx")
    files = [raw(tmp_path / p / "model.safetensors") for p in ("mlx", "back")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("divisor", "counts"),
    [
        (1.0, "2 quantized tensors moved exactly, 0 decoded"),
        (4.0, "2 quantized tensors moved exactly, 0 decoded"),  # scales a quarter, E4M3 as well
        (3.0, ""),
    ],
)
def test_nvfp4_moves_to_mlx_where_its_scales_can_hold_the_one_of_the_tensor(
    divisor: float, counts: str, tmp_path: Path, call: Call
) -> None:
    """MLX has no scale of the tensor: a power of two goes into those of groups, another cannot."""
    source = FOREIGN / "ct_nvfp4a16"
    tensors = raw(source / "model.safetensors")
    place = tmp_path / "m"
    place.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "llama"
    (place / "config.json").write_text(json.dumps(config))
    for name, (dtype, shape, data) in tensors.items():
        if name.endswith("weight_global_scale"):
            tensors[name] = dtype, shape, np.float32(divisor).tobytes()
        if name.endswith("weight_scale"):  # of at least 2^-4, which a quarter of is normal
            at_least = np.maximum(np.frombuffer(data, np.uint8), 0x18)
            tensors[name] = dtype, shape, at_least.tobytes()
    write(place / "model.safetensors", tensors)
    line = ("quantize", place, "--scheme", "keep", "--format", "mlx", "-o", tmp_path / "o")
    done = call(*line)
    if divisor == 3:
        assert done.code == 3
        assert "a directory for mlx has no place for the scale of the tensor" in done.err
        return
    assert done.code == 0, done.err
    assert counts in " ".join((done.out + done.err).split())
    for name in (n for n in tensors if n.endswith(".weight_packed")):
        module = name.removesuffix(".weight_packed")
        np.testing.assert_array_equal(
            read(tmp_path / "o", module, "nvfp4"), decoded(tensors, module)
        )


# --- experts ---

NAMES = {
    "mixtral": ("block_sparse_moe", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}),
    "qwen3-moe": ("mlp", {n: n for n in ("gate_proj", "down_proj", "up_proj")}),
}


def stacks(source: Path, kind: str) -> dict[str, Any]:
    """Experts of a model as mlx-lm's ``sanitize`` stacks them: mixtral.py and qwen3_moe.py."""
    plain = load_file(source / "model.safetensors")
    place, names = NAMES[kind]
    return {
        f"model.layers.{i}.{place}.switch_mlp.{theirs}.weight": np.stack(
            [plain[f"model.layers.{i}.{place}.experts.{e}.{ours}.weight"] for e in range(4)]
        ).astype(np.float32)
        for i in range(2)
        for ours, theirs in names.items()
    }


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("moe")

    def made(kind: str) -> Path:
        place = home / kind
        return place if place.exists() else tiny_models.write_directory(place, kind)

    return made


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("mixtral", "mlx_4bit_g32"), ("mixtral", "mlx_mxfp4"), ("qwen3-moe", "mlx_nvfp4")],
)
def test_experts_are_stacked_under_the_names_of_mlx(
    kind: str, scheme: str, moe: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    source, out = moe(kind), tmp_path / "o"
    done = call("quantize", source, "--scheme", scheme, "-o", out, "--equalise", "off")
    assert done.code == 0, done.err
    wanted, found = stacks(source, kind), values(out)
    assert {n for n in found if "switch_mlp" in n} == set(wanted)
    assert not [n for n in found if ".experts." in n]
    for name, x in wanted.items():
        assert found[name].shape == x.shape
        for e in range(4):  # each in its place: another one would have none of this
            assert sqnr(x[e], found[name][e]) > 15, (name, e)
    tensors = raw(out / "model.safetensors")
    name = next(n for n in wanted if n.endswith("up_proj.weight"))
    assert tensors[name][:2] == ("U32", [*wanted[name].shape[:2], wanted[name].shape[2] // 8])
    assert call("verify", out, "--against", source).code == 0


def test_experts_quantized_one_by_one_move_into_a_stack(
    moe: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    source = moe("mixtral")
    ct, out = tmp_path / "ct", tmp_path / "o"
    qconvert.quantize(source, "mxfp4a16", output=ct)
    said = moved(call, ct, out, "--exact", "--format", "mlx")
    assert "14 quantized tensors moved exactly, 0 decoded" in said
    tensors = raw(ct / "model.safetensors")
    for name, found in values(out).items():
        if name.endswith("switch_mlp.down_proj.weight"):
            place = name.replace("switch_mlp.down_proj.weight", "experts")
            for e in range(4):
                np.testing.assert_array_equal(found[e], decoded(tensors, f"{place}.{e}.w2"))
    assert call("verify", out, "--against", ct, "--exact").code == 0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("missing", "found 3 experts, wanted 4 experts, counted from 0 [ARCH-EXPERTS]"),
        ("twice", "same expert, found 'model.layers.1.block_sparse_moe.experts.02.w3.weight' too"),
        ("many", "found 4 experts, wanted 1000000000000000 experts"),
        ("other", "ARCH-EXPERT-DTYPES"),
    ],
)
def test_experts_that_do_not_stack_are_refused(
    change: str, code: str, moe: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    place = tmp_path / "m"
    shutil.copytree(moe("mixtral"), place)
    tensors = load_file(place / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    if change == "missing":
        del tensors[name]
    elif change == "twice":
        tensors[name.replace(".2.", ".02.")] = tensors[name] + 1
    elif change == "many":  # a list of so many does not fit into any machine
        config = json.loads((place / "config.json").read_text())
        config["num_local_experts"] = 10**15
        (place / "config.json").write_text(json.dumps(config))
    else:
        tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, place / "model.safetensors")
    done = call("quantize", place, "--scheme", "mlx_4bit_g32", "-o", tmp_path / "o")
    assert (done.code, code in done.err) == (3, True), done.err
    assert not (tmp_path / "o").exists()
