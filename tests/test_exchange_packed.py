"""MLX, GPTQ, AWQ and bitsandbytes directories: what is written means what we say, by little readers
of this file's own, and what is wrong is refused.

What their own libraries wrote is in test_foreign, what these make of ours in test_prove_packed.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from conftest import ROOT, Call, container, save
from numpy.typing import NDArray

import qconvert
from qconvert.codecs.exchange import columns
from qconvert.files import open_model

FOREIGN = ROOT / "tests" / "data" / "foreign"
Q = "model.layers.0.self_attn.q_proj"
Array = NDArray[Any]
DTYPES = {
    **{
        "F32": "<f4",
        "F16": "<f2",
        "I32": "<i4",
        "U32": "<u4",
        "U8": "u1",
        "I8": "i1",
        "I64": "<i8",
    },
    "BF16": ml_dtypes.bfloat16,
}


def stored(directory: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors of model.safetensors as they lie there, and config.json."""
    data = (directory / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, found = json.loads(data[8 : 8 + size]), {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + n for n in info["data_offsets"])
            found[name] = np.frombuffer(data[begin:end], DTYPES[info["dtype"]])
            found[name] = found[name].reshape(info["shape"])
    return found, json.loads((directory / "config.json").read_text())


# --- readers of this file's own -------------------------------------------------------------------


def stream(words: Array, bits: int, count: int) -> Array:
    """The first codes of each row of words, as a dense stream of bits."""
    rows = np.ascontiguousarray(words).view(np.uint8)
    single = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    return single.reshape(len(rows), count, bits) @ (1 << np.arange(bits))


def wide(codes: Array, zero: Array, scale: Array, group: Array) -> Array:
    """(codes - zero) · scale, of codes (out, in) and a group for each column."""
    steps = (codes - zero[:, group]).astype(np.float32)
    return steps * scale.astype(np.float32)[:, group]


def mlx(t: Mapping[str, Array], module: str, config: Mapping[str, Any]) -> Array:
    block = config["quantization"]
    how = block | block.get(module, {})
    count = t[f"{module}.weight"].shape[1] * 32 // how["bits"]
    codes = stream(t[f"{module}.weight"], how["bits"], count).astype(np.float32)
    scale, bias = (t[f"{module}.{k}"].astype(np.float32) for k in ("scales", "biases"))
    group = np.arange(count) // how["group_size"]
    return codes * scale[:, group] + bias[:, group]


def gptq(t: Mapping[str, Array], module: str, config: Mapping[str, Any]) -> Array:
    block = config["quantization_config"]
    assert (block["checkpoint_format"], block["sym"]) == ("gptq", True)
    bits, words = block["bits"], t[f"{module}.qweight"]
    codes = stream(words.T, bits, len(words) * 32 // bits)
    zero = stream(t[f"{module}.qzeros"], bits, words.shape[1]) + 1
    return wide(codes, zero.T, t[f"{module}.scales"].T, t[f"{module}.g_idx"])


def awq(t: Mapping[str, Array], module: str, config: Mapping[str, Any]) -> Array:
    block = config["quantization_config"]
    assert (block["bits"], block["version"], block["zero_point"]) == (4, "gemm", True)
    places = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where a word has each of eight rows

    def rows(words: Array) -> Array:
        row = np.arange(words.shape[1] * 8)
        unsigned = words.view("<u4")[:, row // 8].astype(np.int64)
        return (unsigned >> 4 * places[row % 8] & 15).T

    codes = rows(t[f"{module}.qweight"])
    group = np.arange(codes.shape[1]) // block["group_size"]
    return wide(codes, rows(t[f"{module}.qzeros"]), t[f"{module}.scales"].T, group)


def bnb(t: Mapping[str, Array], module: str, config: Mapping[str, Any]) -> Array:
    block, weight = config["quantization_config"], f"{module}.weight"
    if block["load_in_8bit"]:
        assert t[f"{module}.weight_format"].tobytes() == b"\0"
        values = t[weight].astype(np.float32) * t[f"{module}.SCB"][:, None]
        return values * np.float32(1 / 127)
    state = t[f"{weight}.quant_state.bitsandbytes__{block['bnb_4bit_quant_type']}"].tobytes()
    fields = json.loads(state)
    codes = np.stack([t[weight] >> 4, t[weight] & 15], axis=1).ravel()
    scales = t[f"{weight}.absmax"]
    if block["bnb_4bit_use_double_quant"]:
        each = np.arange(len(scales)) // fields["nested_blocksize"]
        values = t[f"{weight}.nested_quant_map"][scales] * t[f"{weight}.nested_absmax"][each]
        scales = values + np.float32(fields["nested_offset"])
    values = t[f"{weight}.quant_map"][codes] * scales[np.arange(len(codes)) // fields["blocksize"]]
    return values.reshape(fields["shape"])


READERS: dict[str, tuple[Callable[..., Array], str]] = {
    "mlx": (mlx, ".scales"),
    "gptq": (gptq, ".qweight"),
    "awq": (awq, ".qweight"),
    "bnb": (bnb, ".weight.absmax"),
}

# Schemes, ours with the same grid, and by how many dB it may be better.
SCHEMES = [
    *((f"mlx_{b}bit_g32", f"q{b}_block32_asym", 0.1) for b in (2, 3, 4, 5, 6, 8)),
    ("mlx_4bit_g64", "q4_block64_asym", 0.1),
    ("gptq_4bit_g32", "q4_block32_sym", 0.05),
    ("gptq_8bit_g64", "q8_block64_sym", 0.05),
    ("gptq_4bit_channel", "q4_channel_sym", 0.05),
    ("awq_4bit_g32", "q4_block32_asym", 0.8),  # zero points are whole codes
    ("awq_4bit_g32_sym", "q4_block32_sym", 0.05),
    *((f"bnb_{b}{d}", f"{b}_block64{d}", 0.0) for b in ("nf4", "fp4") for d in ("", "_dq")),
    ("bnb_int8", "q8_channel_sym", 0.01),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers. Read only."""
    return tiny_models.write_directory(tmp_path_factory.mktemp("m") / "llama", "llama")


def quantized(call: Call, source: Path, scheme: str, output: Path, *more: Any) -> Path:
    done = call("quantize", source, "--scheme", scheme, "-o", output, "--equalise", "off", *more)
    assert done.code == 0, done.err
    return output


def values(path: Path) -> dict[str, Array]:
    with qconvert.load(path) as tensors:
        return {name: tensors[name].dequantize().astype(np.float32) for name in tensors}


def sqnr(x: Array, y: Array) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


@pytest.mark.parametrize(("scheme", "ours", "less"), SCHEMES)
def test_what_is_written_means_what_we_say(
    scheme: str, ours: str, less: float, llama: Path, tmp_path: Path, call: Call
) -> None:
    out = quantized(call, llama, scheme, tmp_path / "o")
    reader, part = READERS[scheme.split("_")[0]]
    tensors, config = stored(out)
    found, plain = values(out), values(llama)
    marks = (part, ".SCB")
    modules = [n.removesuffix(m) for n in tensors for m in marks if n.endswith(m)]
    assert len(modules) >= 12
    for module in modules:
        read = reader(tensors, module, config)
        np.testing.assert_array_equal(read.view(np.uint32), found[f"{module}.weight"].view("u4"))
    assert set(found) == set(plain)
    verified = call("verify", out, "--against", llama)
    assert verified.code == 0, verified.err
    theirs = values(quantized(call, llama, ours, tmp_path / "o.qblk"))
    # All together, for single matrices this small go up and down by tenths.
    names = [f"{m}.weight" for m in modules if "embed" not in m and m != "lm_head"]
    whole = [np.concatenate([v[n].ravel() for n in names]) for v in (plain, found, theirs)]
    assert sqnr(whole[0], whole[1]) >= sqnr(whole[0], whole[2]) - less


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_codes_of_awq_are_the_nearest(method: str, llama: Path, tmp_path: Path, call: Call) -> None:
    """With zero points that are whole codes, by every way of choosing ranges."""
    out = quantized(call, llama, "awq_4bit_g32", tmp_path / "o", "--range", method)
    tensors, _ = stored(out)
    module = "model.layers.0.mlp.up_proj"
    x, y = (values(p)[f"{module}.weight"].astype(np.float64) for p in (llama, out))
    step = np.repeat(tensors[f"{module}.scales"].T.astype(np.float64), 32, axis=1)
    inside = np.abs(x - y) <= step * 0.5001
    assert inside.mean() > 0.9
    group = y.reshape(len(y), -1, 32)
    ends = (y == np.repeat(group.min(2), 32, 1)) | (y == np.repeat(group.max(2), 32, 1))
    assert (inside | ends).all(), "but for what is clipped"
    assert sqnr(x, y) > {"minmax": 20, "percentile": 20, "mse": 21}[method]
    assert call("verify", out, "--against", llama).code == 0


@pytest.mark.parametrize("scheme", ["mlx_3bit_g32", "gptq_4bit_g32", "awq_4bit_g32", "bnb_nf4_dq"])
def test_threads_change_no_byte(scheme: str, llama: Path, tmp_path: Path, call: Call) -> None:
    files = [
        quantized(call, llama, scheme, tmp_path / n, "--threads", n) / "model.safetensors"
        for n in ("1", "3")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("format", "ours", "scheme"),
    [
        ("mlx", "q4_block64", "mlx_4bit_g64"),
        ("mlx", "q6_block32_asym", "mlx_6bit_g32"),
        ("mlx", "NVFP4", "mlx_nvfp4"),
        ("mlx", "mxfp4", "mlx_mxfp4"),
        ("gptq", "q8_channel", "gptq_8bit_channel"),
        ("awq", "q4_block32", "awq_4bit_g32"),
        ("awq", "q4_block32_sym", "awq_4bit_g32_sym"),
        ("bnb", "nf4_block64_dq", "bnb_nf4_dq"),
        ("bnb", "fp4_block64", "bnb_fp4"),
        ("bnb", "q8_channel", "bnb_int8"),
    ],
)
def test_our_names_for_the_same_grids_are_taken(
    format: str, ours: str, scheme: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    line = ("quantize", llama, "--format", format, "--scheme", ours, "-o", tmp_path / "o")
    told = call(*line, "--dry-run", "--json").json
    assert {t["stored"] for t in told["tensors"] if t["quantized"]} == {scheme}


@pytest.mark.parametrize("scheme", ["nf4_block128", "q4_block64_sym", "q4_tensor"])
def test_other_grids_are_refused(scheme: str, llama: Path, tmp_path: Path, call: Call) -> None:
    for format in ("mlx", "bnb"):
        done = call("quantize", llama, "--format", format, "--scheme", scheme, "-o", tmp_path / "o")
        assert done.code == 2
        assert f"does not go into a directory for {format}" in done.err


# --- calibration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["mlx_4bit_g32", "gptq_4bit_g32", "awq_4bit_g32", "bnb_nf4"])
def test_codes_make_up_for_each_other(scheme: str, llama: Path, tmp_path: Path, call: Call) -> None:
    module = "model.layers.0.self_attn.q_proj"
    rng = np.random.default_rng(4)
    inputs = (rng.standard_normal((300, 8)) @ rng.standard_normal((8, 64))).astype(np.float32)
    samples = save(tmp_path / "s.safetensors", {module: inputs})
    calibration = tmp_path / "c.safetensors"
    done = call("calibrate", llama, "--activations", samples, "--gram", "-o", calibration)
    assert done.code == 0, done.err
    name, x = f"{module}.weight", values(llama)[f"{module}.weight"]
    errors = []
    for rounding in ("nearest", "compensated"):
        more = ("--calibration", calibration, "--rounding", rounding)
        out = quantized(call, llama, scheme, tmp_path / rounding, *more)
        assert call("verify", out, "--against", llama).code == 0
        errors.append(float(np.square((values(out)[name] - x) @ inputs.T).sum()))
    assert errors[1] < 0.5 * errors[0]


# --- configurations and rules ---------------------------------------------------------------------


def test_mlx_says_twice_what_modules_have(llama: Path, tmp_path: Path, call: Call) -> None:
    own = ("--tensor-scheme", "*down_proj.weight=mlx_8bit_g32", "--keep", "*0*k_proj.weight")
    out = quantized(call, llama, "mlx_2bit_g64", tmp_path / "o", *own)
    tensors, config = stored(out)
    block = config["quantization"]
    assert block == config["quantization_config"]
    assert {k: block.pop(k) for k in ("group_size", "bits", "mode")} == {
        **{"group_size": 64, "bits": 2, "mode": "affine"}
    }
    eight, four = {"group_size": 32, "bits": 8}, {"group_size": 64, "bits": 4}
    assert block == {
        "model.layers.0.mlp.down_proj": eight,
        "model.layers.1.mlp.down_proj": eight,
        "model.layers.0.self_attn.k_proj": False,
        "model.embed_tokens": four,
        "lm_head": four,
    }
    data = (out / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
    assert header["__metadata__"]["format"] == "mlx"
    assert tensors["lm_head.weight"].shape[1] == 64 * 4 // 32


def test_gptq_names_modules_that_differ(llama: Path, tmp_path: Path, call: Call) -> None:
    own = ("--tensor-scheme", "*down_proj.weight=gptq_8bit_g32", "--keep", "*0*o_proj.weight")
    out = quantized(call, llama, "gptq_4bit_g32", tmp_path / "o", *own)
    block = stored(out)[1]["quantization_config"]
    assert block["dynamic"] == {
        r"+:model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
        r"+:model\.layers\.1\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
        r"-:model\.layers\.0\.self_attn\.o_proj$": {},
    }
    assert "self_attn.o_proj" in block["modules_in_block_to_quantize"][0], "in the other block"
    line = ("quantize", llama, "--scheme", "gptq_4bit_g64", "-o", tmp_path / "p", "--json")
    told = call(*line)  # rows of 96 values, of down_proj, do not divide
    assert not any("dynamic" in w for w in told.json["warnings"])
    attention = {f"self_attn.{k}_proj" for k in "qkvo"}
    named = stored(tmp_path / "p")[1]["quantization_config"]["modules_in_block_to_quantize"]
    assert set(named[0]) == attention | {"mlp.gate_proj", "mlp.up_proj"}
    assert any("dynamic" in w for w in call(*line, "--force", *own).json["warnings"])
    assert call("verify", out, "--against", llama).code == 0
    with open_model(out) as model:  # type: ignore[attr-defined]
        kinds = {t.name.split(".")[-2]: t.dtype for t in model.tensors}
    assert (kinds["down_proj"], kinds["up_proj"]) == ("gptq_8bit_g32", "gptq_4bit_g32")


@pytest.mark.parametrize("scheme", ["awq_4bit_g32", "bnb_nf4"])
def test_awq_and_bitsandbytes_name_dense_modules(
    scheme: str, llama: Path, tmp_path: Path, call: Call
) -> None:
    out = quantized(call, llama, scheme, tmp_path / "o", "--keep", "*0*o_proj.weight")
    block = stored(out)[1]["quantization_config"]
    named = block.get("modules_to_not_convert", block.get("llm_int8_skip_modules"))
    assert named == ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.o_proj"]
    other = {"awq_4bit_g32": "awq_4bit_g64", "bnb_nf4": "bnb_fp4"}[scheme]
    line = ("quantize", llama, "--scheme", scheme, "-o", tmp_path / "p")
    done = call(*line, "--tensor-scheme", f"*o_proj.weight={other}")
    assert (done.code, "have one scheme" in done.err) == (2, True)


def odd(path: Path, kind: str, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """A model of such matrices that calls itself so."""
    path.mkdir()
    rng = np.random.default_rng(1)
    tensors = {n: rng.standard_normal(s).astype(np.float16) for n, s in shapes.items()}
    save(path / "model.safetensors", tensors)
    fields = {"architectures": ["X"], "model_type": kind, "dtype": "float16"}
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_rules_of_the_readers(tmp_path: Path, call: Call) -> None:
    experts = odd(tmp_path / "e", "llama", {"a.mlp.experts.0.up_proj.weight": (64, 64)})
    other = odd(tmp_path / "q", "qwen3_5", {"a.up_proj.weight": (64, 64)})
    shapes = {"a.gate.weight": (8, 128), "a.gate_proj.weight": (64, 128)}
    names = odd(tmp_path / "n", "x", shapes)
    for source, scheme, code, words in (
        (experts, "mlx_4bit_g64", 3, "experts, which MLX stacks"),
        (other, "mlx_4bit_g64", 3, "model_type 'qwen3_5'"),
        (names, "awq_4bit_g32", 2, "readers take the names of dense modules"),
        (names, "bnb_nf4", 2, "readers take the names of dense modules"),
    ):
        done = call("quantize", source, "--scheme", scheme, "-o", tmp_path / "o")
        assert (done.code, words in done.err) == (code, True), done.err
        assert not (tmp_path / "o").exists()
    sizes = {f"a.b{r}x{c}.weight": (r, c) for r, c in ((64, 64), (72, 64), (64, 80), (60, 64))}
    source = odd(tmp_path / "s", "llama", sizes)
    for scheme, taken in (
        ("gptq_4bit_g32", {"64x64"}),
        ("awq_4bit_g32", {"64x64", "72x64"}),
        ("mlx_4bit_g32", {"64x64", "72x64", "60x64"}),
        ("bnb_nf4", {"64x64", "72x64", "64x80", "60x64"}),
    ):
        line = ("quantize", source, "--scheme", scheme, "-o", tmp_path / "o", "--min-values", 1)
        told = call(*line, "--dry-run", "--json").json["tensors"]
        assert {t["name"].split(".")[1][1:] for t in told if t["quantized"]} == taken, scheme


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq_3_asym_v2", "gptq_4_act_order", "awq_asym_g64"])
def test_bands_of_rows_are_read_like_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 32 rows, more than are kept, in ranges that begin and end anywhere."""
    whole = values(FOREIGN / name)
    monkeypatch.setattr(columns, "BAND_VALUES", 1)
    monkeypatch.setattr(columns, "KEPT", 1)
    rng = np.random.default_rng(3)
    with open_model(FOREIGN / name) as model:  # type: ignore[attr-defined]
        for tensor in model.tensors:
            if not tensor.name.endswith("proj.weight"):
                continue
            flat = whole[tensor.name].ravel()
            for start, stop in np.sort(rng.integers(0, tensor.size, (20, 2)), axis=1):
                found = model.values(tensor, int(start), int(stop))
                np.testing.assert_array_equal(found, flat[start:stop])


def test_stacked_experts_of_mlx_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    words = rng.integers(0, 1 << 32, (3, 4, 8), np.uint32)
    scales = rng.standard_normal((3, 4, 2)).astype(np.float32)
    biases = rng.standard_normal((3, 4, 2)).astype(np.float32)
    module = "model.layers.0.mlp.switch_mlp.up_proj"
    parts = {".weight": words, ".scales": scales, ".biases": biases}
    save(tmp_path / "model.safetensors", {module + k: v for k, v in parts.items()})
    block = {"group_size": 32, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps({"quantization": block}))
    codes = stream(words.reshape(12, 8), 4, 64).reshape(3, 4, 2, 32).astype(np.float32)
    wanted = (codes * scales[..., None] + biases[..., None]).reshape(3, 4, 64)
    np.testing.assert_array_equal(values(tmp_path)[module + ".weight"], wanted)


@pytest.mark.parametrize("name", ["gptq_4_sym_g64", "awq_asym_g64"])
def test_scales_may_be_cast(name: str, tmp_path: Path) -> None:
    tensors, config = stored(FOREIGN / name)
    cast = {k: t.astype(np.float32) if k.endswith(".scales") else t for k, t in tensors.items()}
    save(tmp_path / "model.safetensors", cast)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, wanted = values(tmp_path), values(FOREIGN / name)
    np.testing.assert_array_equal(found[f"{Q}.weight"], wanted[f"{Q}.weight"])


def test_codes_of_bitsandbytes_may_be_wrapped_in_another_dtype(tmp_path: Path) -> None:
    source = FOREIGN / "bnb_nf4"
    tensors, config = stored(source)
    name = "model.layers.0.self_attn.q_proj.weight"
    wrapped = tensors[name].ravel().view(ml_dtypes.bfloat16)[:, None]
    save(tmp_path / "model.safetensors", {**tensors, name: wrapped})
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(values(tmp_path)[name], values(source)[name])


def test_plain_weights_that_are_to_be_quantized_while_they_load(
    llama: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(llama, tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (directory / "config.json").write_text(json.dumps(config))
    with open_model(directory) as model:  # type: ignore[attr-defined]
        assert model.kind == "safetensors"


# --- refusals -------------------------------------------------------------------------------------


class Checkpoint:
    """A foreign checkpoint to be damaged."""

    def __init__(self, name: str) -> None:
        self.tensors, self.config = stored(FOREIGN / name)

    @property
    def block(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config.get("quantization", self.config["quantization_config"])
        return found

    def drop(self, name: str) -> None:
        del self.tensors[name]

    def put(self, name: str, at: int, value: Any) -> None:
        changed = self.tensors[name].copy()
        changed.ravel()[at] = value
        self.tensors[name] = changed

    def cut(self, name: str) -> None:
        self.tensors[name] = self.tensors[name][:-1].copy()


def state(c: Checkpoint, **fields: Any) -> None:
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    changed = json.dumps(json.loads(c.tensors[name].tobytes()) | fields).encode()
    c.tensors[name] = np.frombuffer(changed, np.uint8)


def renamed(c: Checkpoint, start: str, other: str) -> None:
    """As of tensors that are no weights of modules."""
    for name in [n for n in c.tensors if n.startswith(start)]:
        end = name.removeprefix(start).replace("weight", "experts", 1)
        c.tensors[other + end] = c.tensors.pop(name)


NAN = np.float32("nan")
REFUSED: list[tuple[str, str, Callable[[Checkpoint], Any], str]] = [
    ("mlx_affine4_g64", "no scales", lambda c: c.drop(f"{Q}.scales"), "EXCHANGE-MISSING"),
    ("mlx_affine4_g64", "no biases", lambda c: c.drop(f"{Q}.biases"), "EXCHANGE-MISSING"),
    ("mlx_affine4_g64", "no codes", lambda c: c.drop(f"{Q}.weight"), "EXCHANGE-ORPHAN"),
    ("mlx_affine4_g64", "short scales", lambda c: c.cut(f"{Q}.scales"), "EXCHANGE-SHAPE"),
    ("mlx_affine4_g64", "scale NaN", lambda c: c.put(f"{Q}.scales", 3, NAN), "EXCHANGE-VALUES"),
    ("mlx_affine4_g64", "bias Inf", lambda c: c.put(f"{Q}.biases", 3, np.inf), "EXCHANGE-VALUES"),
    ("mlx_affine4_g64", "field", lambda c: c.block.update(rank=3), "EXCHANGE-UNSUPPORTED"),
    ("mlx_affine4_g64", "mode", lambda c: c.block.update(mode="nf4"), "EXCHANGE-UNSUPPORTED"),
    ("mlx_affine4_g64", "bits", lambda c: c.block.update(bits=7), "EXCHANGE-CONFIG"),
    ("mlx_affine4_g64", "8 bits", lambda c: c.block.update(bits=8), "EXCHANGE-SHAPE"),
    ("mlx_affine4_g64", "dense", lambda c: c.block.update({Q: False}), "EXCHANGE-CONFIG"),
    ("mlx_mxfp8", "code NaN", lambda c: c.put(f"{Q}.weight", 3, 0x7F), "EXCHANGE-VALUES"),
    ("mlx_mxfp4", "scale NaN", lambda c: c.put(f"{Q}.scales", 3, 255), "EXCHANGE-VALUES"),
    ("gptq_4_sym_g64", "no zeros", lambda c: c.drop(f"{Q}.qzeros"), "EXCHANGE-MISSING"),
    ("gptq_4_sym_g64", "no codes", lambda c: c.drop(f"{Q}.qweight"), "EXCHANGE-ORPHAN"),
    ("gptq_4_sym_g64", "short g_idx", lambda c: c.cut(f"{Q}.g_idx"), "EXCHANGE-SHAPE"),
    ("gptq_4_sym_g64", "group", lambda c: c.put(f"{Q}.g_idx", 3, 7), "EXCHANGE-VALUES"),
    ("gptq_4_sym_g64", "zero", lambda c: c.put(f"{Q}.qzeros", 0, 0x77777776), "EXCHANGE-VALUES"),
    ("gptq_4_sym_g64", "scale", lambda c: c.put(f"{Q}.scales", 0, NAN), "EXCHANGE-VALUES"),
    ("gptq_4_sym_g64", "bits", lambda c: c.block.update(bits=8), "EXCHANGE-SHAPE"),
    ("gptq_4_sym_g64", "width", lambda c: c.block.update(bits=5), "EXCHANGE-UNSUPPORTED"),
    ("gptq_4_sym_g64", "field", lambda c: c.block.update(rotation="x"), "EXCHANGE-UNSUPPORTED"),
    (
        *("gptq_4_sym_g64", "version"),
        lambda c: c.block.update(checkpoint_format="gptq_p"),
        "EXCHANGE-UNSUPPORTED",
    ),
    (
        *("gptq_4_sym_g64", "rule"),
        lambda c: c.block.update(dynamic={"-:.*q_proj": {}}),
        "EXCHANGE-CONFIG",
    ),
    (
        *("gptq_4_sym_g64", "expression"),
        lambda c: c.block.update(dynamic={"+:(": {}}),
        "EXCHANGE-CONFIG",
    ),
    ("whole_gptq", "floats", lambda c: c.block.update(data_type="nv_fp"), "EXCHANGE-UNSUPPORTED"),
    ("whole_awq", "floats", lambda c: c.block.update(data_type="mx_fp"), "EXCHANGE-UNSUPPORTED"),
    (
        *("whole_autoround_sym", "words"),
        lambda c: c.block.update(packing_format="auto_round:llm_compressor"),
        "EXCHANGE-UNSUPPORTED",
    ),
    (
        *("whole_autoround_sym", "no words"),
        lambda c: c.block.pop("packing_format"),
        "EXCHANGE-CONFIG",
    ),
    (
        *("whole_autoround_asym", "layers"),
        lambda c: c.block.update(extra_config={"lm_head": {"bits": 8}}),
        "EXCHANGE-UNSUPPORTED",
    ),
    ("awq_asym_g64", "no scales", lambda c: c.drop(f"{Q}.scales"), "EXCHANGE-MISSING"),
    ("awq_asym_g64", "no codes", lambda c: c.drop(f"{Q}.qweight"), "EXCHANGE-ORPHAN"),
    ("awq_asym_g64", "group", lambda c: c.block.update(group_size=32), "EXCHANGE-SHAPE"),
    ("awq_asym_g64", "scale", lambda c: c.put(f"{Q}.scales", 0, NAN), "EXCHANGE-VALUES"),
    ("awq_asym_g64", "version", lambda c: c.block.update(version="gemv"), "EXCHANGE-UNSUPPORTED"),
    ("awq_asym_g64", "field", lambda c: c.block.update(rotation="x"), "EXCHANGE-UNSUPPORTED"),
    ("bnb_nf4", "no absmax", lambda c: c.drop(f"{Q}.weight.absmax"), "EXCHANGE-MISSING"),
    (
        *("bnb_nf4", "no state"),
        lambda c: c.drop(f"{Q}.weight.quant_state.bitsandbytes__nf4"),
        "EXCHANGE-MISSING",
    ),
    ("bnb_nf4", "another name", lambda c: renamed(c, f"{Q}.", "up_proj_"), "EXCHANGE-ORPHAN"),
    ("bnb_nf4", "absmax", lambda c: c.put(f"{Q}.weight.absmax", 0, NAN), "EXCHANGE-VALUES"),
    ("bnb_nf4", "table", lambda c: c.put(f"{Q}.weight.quant_map", 0, 0), "EXCHANGE-UNSUPPORTED"),
    ("bnb_nf4", "blocks", lambda c: state(c, blocksize=48), "EXCHANGE-CONFIG"),
    ("bnb_nf4", "shape", lambda c: state(c, shape=[16, 16]), "EXCHANGE-SHAPE"),
    ("bnb_nf4", "no shape", lambda c: state(c, shape=[]), "EXCHANGE-CONFIG"),
    ("bnb_nf4", "type", lambda c: state(c, quant_type="fp4"), "EXCHANGE-CONFIG"),
    ("bnb_nf4", "state", lambda c: state(c, rotation=1), "EXCHANGE-UNSUPPORTED"),
    ("bnb_nf4", "field", lambda c: c.block.update(rotation="x"), "EXCHANGE-UNSUPPORTED"),
    ("bnb_nf4_double", "nested", lambda c: state(c, nested_blocksize=64), "EXCHANGE-UNSUPPORTED"),
    ("bnb_nf4_double", "offset", lambda c: state(c, nested_offset="1"), "EXCHANGE-CONFIG"),
    ("bnb_int8", "no SCB", lambda c: c.drop(f"{Q}.SCB"), "EXCHANGE-MISSING"),
    ("bnb_int8", "no codes", lambda c: c.drop(f"{Q}.weight"), "EXCHANGE-ORPHAN"),
    ("bnb_int8", "format", lambda c: c.put(f"{Q}.weight_format", 0, 2), "EXCHANGE-UNSUPPORTED"),
    ("bnb_int8", "SCB", lambda c: c.put(f"{Q}.SCB", 0, np.inf), "EXCHANGE-VALUES"),
]


@pytest.mark.parametrize(("name", "damage", "code"), [(n, d, c) for n, _, d, c in REFUSED],
                         ids=[f"{n}-{what}" for n, what, _, _ in REFUSED])  # fmt: skip
def test_damaged_checkpoints_are_refused(
    name: str, damage: Callable[[Checkpoint], Any], code: str, tmp_path: Path, call: Call
) -> None:
    checkpoint = Checkpoint(name)
    damage(checkpoint)
    save(tmp_path / "model.safetensors", checkpoint.tensors)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    done = call("quantize", tmp_path, "--scheme", "f32", "-o", tmp_path / "o.qblk")
    assert done.code == 3
    assert code in done.err
    assert not (tmp_path / "o.qblk").exists()


@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "[]", "\xff"])
def test_a_state_that_is_no_object_is_refused(text: str, tmp_path: Path, call: Call) -> None:
    checkpoint = Checkpoint("bnb_nf4")
    data = np.frombuffer(text.encode("latin-1"), np.uint8)
    checkpoint.tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"] = data
    save(tmp_path / "model.safetensors", checkpoint.tensors)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    assert call("inspect", tmp_path).code == 3


def test_a_mistaken_dtype_of_codes_is_refused(tmp_path: Path, call: Call) -> None:
    """Of the right size, so that nothing but its name tells."""
    info = {"dtype": "I32", "shape": [4, 8], "data_offsets": [0, 128]}
    scales = {"dtype": "F32", "shape": [4, 1], "data_offsets": [128, 144]}
    header = {"a.qweight": info, "a.scales": scales}
    container(tmp_path / "model.safetensors", header, bytes(144))
    block = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": block}))
    done = call("inspect", tmp_path)
    assert (done.code, "EXCHANGE-MISSING" in done.err) == (3, True)


def test_groups_of_columns_apart_are_decoded_and_said_to_be(tmp_path: Path, call: Call) -> None:
    source = FOREIGN / "gptq_4_act_order"
    keep = ("quantize", source, "--scheme", "keep", "-o", tmp_path / "o.qblk")
    refused = call(*keep, "--exact")
    assert (refused.code, "g_idx" in refused.err) == (3, True)
    done = call(*keep, "--json")
    assert done.code == 0, done.err
    counts, why, *_ = done.json["notes"]
    assert counts == "0 quantized tensors moved exactly, 2 decoded, 2 plain"
    assert why == (
        "'model.layers.0.mlp.down_proj.weight' and 1 more: decoded from gptq_4bit_g32_act_order: "
        "its g_idx has groups of columns that are no neighbours"
    )
