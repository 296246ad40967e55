"""Directories for other tools, and codes that move between containers: formats/exchange.

What is written is read here by a few lines of NumPy of its own, by gguf-py and, where it is
installed, by compressed-tensors; never by the code that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call, Finished, Tensors, gaussian
from safetensors.numpy import load_file, save_file

import qconvert
from qconvert.architectures.mapped import NEGATED_EXP, MappedModel, MappedTensor, strided
from qconvert.codecs.exchange.floats import e4m3
from qconvert.containers import CONTAINERS
from qconvert.files import open_model
from qconvert.files.dequantized import dequantized
from qconvert.report import QuantizeReport
from qconvert.stages.moving import Moving

FOREIGN = ROOT / "tests" / "data" / "foreign"
SAMPLE = ROOT / "samples" / "tiny-llama"
BF16 = ml_dtypes.bfloat16
LAYER = "model.layers.0."


def tensors() -> Tensors:
    """One layer of a Llama, with an embedding and a head."""
    shapes = {
        "self_attn.q_proj": (64, 128),
        "self_attn.k_proj": (32, 128),
        "self_attn.v_proj": (32, 128),
        "self_attn.o_proj": (128, 64),
        "mlp.gate_proj": (96, 128),
        "mlp.up_proj": (96, 128),
        "mlp.down_proj": (128, 96),
    }
    found = {
        f"{LAYER}{name}.weight": gaussian(i, *shape, dtype=BF16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    found[f"{LAYER}input_layernorm.weight"] = np.ones(128, BF16)
    found["model.embed_tokens.weight"] = gaussian(20, 48, 128, dtype=BF16)
    found["lm_head.weight"] = gaussian(21, 48, 128, dtype=BF16)
    return found


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    save_file(tensors(), place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "tokenizer_config.json").write_text("{}")
    return place


def quantized(source: Path, scheme: str, name: str, **options: Any) -> Path:
    qconvert.quantize(source, scheme, output=source.parent / name, **options)
    return source.parent / name


def block(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return dict(found["quantization_config"])


# --- compressed-tensors, written ---


def bits_of(words: np.ndarray[Any, Any], bits: int, count: int) -> np.ndarray[Any, Any]:
    """The first ``count`` numbers of a row of words: bit i·b and those that follow it."""
    whole = int.from_bytes(words.astype("<u4").tobytes(), "little")
    return np.array([whole >> (i * bits) & ((1 << bits) - 1) for i in range(count)])


@pytest.mark.parametrize(
    ("scheme", "bits", "group"),
    [
        ("w4a16_g32", 4, 32),
        ("w4a16_asym_g32", 4, 32),
        ("w8a16_g64", 8, 64),
        ("w4a16_channel", 4, 0),
    ],
)
def test_packed_integers_mean_what_compressed_tensors_says(
    scheme: str, bits: int, group: int, model: Path
) -> None:
    out = quantized(model, scheme, "out")
    stored = load_file(out / "model.safetensors")
    module = f"{LAYER}self_attn.q_proj"
    shape = tuple(stored[f"{module}.weight_shape"])
    assert shape == (64, 128)
    codes = np.stack([bits_of(row, bits, 128) for row in stored[f"{module}.weight_packed"]])
    scale = stored[f"{module}.weight_scale"]
    assert scale.dtype == BF16
    zero = np.full(scale.shape, 1 << (bits - 1))
    if "asym" in scheme:
        packed = stored[f"{module}.weight_zero_point"]
        assert packed.shape == (64 * bits // 32, 128 // group)
        zero = np.stack([bits_of(column, bits, 64) for column in packed.T], axis=1)
    each = group or 128
    values = (codes - np.repeat(zero, each, 1)).astype(np.float32)
    values *= np.repeat(scale.astype(np.float32), each, 1)
    with qconvert.load(out) as found:
        np.testing.assert_array_equal(found[f"{module}.weight"].dequantize(), values)
    error = values - tensors()[f"{module}.weight"].astype(np.float32)
    # Gaussian weights in 16 levels, clipped where that is best, keep 20 dB, in rows of 128 a bit
    # less: Max, Quantizing for Minimum Distortion (1960), has 20.2 dB.
    assert np.square(error).sum() < 10**-1.8 * np.square(values).sum()


def test_bytes_and_fp8_mean_what_compressed_tensors_says(model: Path) -> None:
    module = f"{LAYER}self_attn.q_proj"
    w = tensors()[f"{module}.weight"].astype(np.float32)
    whole = load_file(quantized(model, "w8a8", "bytes") / "model.safetensors")
    scale = whole[f"{module}.weight_scale"].astype(np.float32)
    assert (whole[f"{module}.weight"].dtype, scale.shape) == (np.int8, (64, 1))
    assert np.abs(whole[f"{module}.weight"] * scale - w).max() <= 0.51 * scale.max()
    assert_near_fp8(quantized(model, "fp8_dynamic", "fp8"), module, w, ".weight_scale", 1)


def assert_near_fp8(out: Path, module: str, w: Any, suffix: str, block: int) -> None:
    """E4M3 has four significant bits, and steps of 2^-9 below those."""
    numbers = read_tensor(out, f"{module}.weight").astype(np.float32)
    scale = read_tensor(out, f"{module}{suffix}").astype(np.float32)
    if block > 1:
        scale = np.repeat(np.repeat(scale, block, 0), block, 1)
    bound = np.maximum(np.abs(w) / 16, np.abs(scale) * 2.0**-10) * 1.01
    assert (np.abs(numbers * scale - w) <= bound).all()


def read_tensor(directory: Path, name: str) -> Any:
    """A tensor of a safetensors file, whose NumPy interface knows no E4M3."""
    raw = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    begin, end = (start + n for n in entry["data_offsets"])
    kinds = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": BF16, "F32": np.float32}
    return np.frombuffer(raw[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])


def test_the_nearest_e4m3_is_that_of_ml_dtypes() -> None:
    numbers = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / 2  # ties, and what lies next to them
    x = np.concatenate(
        [numbers, middles, *(np.nextafter(middles, np.float32(s)) for s in (-500, 500)),
         gaussian(5, 4096), gaussian(6, 4096) * np.float32(0.01), np.float32([500, -3e38, -0.0])]
    )  # fmt: skip
    wanted = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(e4m3(x), wanted)


@pytest.mark.parametrize(
    ("scheme", "suffix"), [("fp8_block", ".weight_scale"), ("fp8_block128", ".weight_scale_inv")]
)
def test_fp8_in_blocks_is_near_in_every_block(scheme: str, suffix: str, tmp_path: Path) -> None:
    report = qconvert.quantize(SAMPLE, scheme, output=tmp_path / "out")
    assert sum(t.stored == "fp8_block128" for t in report.tensors) == 16
    module = "model.layers.1.self_attn.q_proj"
    w = load_file(SAMPLE / "model.safetensors")[f"{module}.weight"].astype(np.float32)
    assert_near_fp8(tmp_path / "out", module, w, suffix, 128)
    kept = [t.reason for t in report.tensors if "mlp" in t.name]
    assert set(kept) == {
        "[704, 256] does not divide into blocks of 128 x 128",
        "[256, 704] does not divide into blocks of 128 x 128",
    }


def test_the_configuration_says_what_is_quantized_and_what_is_not(model: Path) -> None:
    found = block(quantized(model, "w4a16_g32", "out"))
    assert found["quant_method"] == "compressed-tensors"
    assert found["format"] == "pack-quantized"
    assert found["ignore"] == ["lm_head", "model.embed_tokens"]
    (group,) = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["input_activations"] is None
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}
    assert wanted.items() <= group["weights"].items()
    mixed = block(
        quantized(model, "w4a16_g32", "mixed", tensor_scheme={"*mlp*": "w8a8"}, keep="*o_proj*")
    )
    assert mixed["format"] == "mixed-precision"
    first, second = mixed["config_groups"].values()
    assert f"{LAYER}self_attn.q_proj" in first["targets"] + second["targets"]
    assert f"{LAYER}self_attn.o_proj" in mixed["ignore"]
    bytes_group = first if first["format"] == "int-quantized" else second
    assert bytes_group["input_activations"]["strategy"] == "token"
    assert sorted(bytes_group["targets"]) == [
        f"{LAYER}mlp.{n}_proj" for n in ("down", "gate", "up")
    ]


def test_what_stays_stays_bit_for_bit_and_files_go_along(model: Path) -> None:
    out = quantized(model, "w4a16_g32", "out", shard_size="20K")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {k: v for p in sorted(set(index["weight_map"].values())) for k, v in
              load_file(out / p).items()}  # fmt: skip
    assert set(stored) == set(index["weight_map"])
    sizes = [(out / p).stat().st_size for p in set(index["weight_map"].values())]
    assert len(sizes) > 1
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{LAYER}input_layernorm.weight"):
        assert stored[name].tobytes() == tensors()[name].tobytes()
    assert (out / "tokenizer_config.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text()).items() >= CONFIG.items()
    plain = quantized(model, "w4a16_g32", "plain")
    whole = load_file(plain / "model.safetensors")
    assert all(whole[k].tobytes() == v.tobytes() for k, v in stored.items())


def test_plain_weights_are_verified_against_what_they_were_decoded_from(
    model: Path, call: Call
) -> None:
    codes = quantized(model, "w8a16_g32", "codes")
    plain = quantized(codes, "f32", "plain", format="hf")
    line = ("verify", plain, "--against", codes, "--exact")
    assert call(*line).code == 0
    whole = load_file(plain / "model.safetensors")
    changed = whole[f"{LAYER}mlp.up_proj.weight"].copy()
    changed[3, 3] = np.nextafter(changed[3, 3], np.float32(9))
    with (plain / "model.safetensors").open("r+b") as f:
        data = f.read()
        f.seek(data.index(whole[f"{LAYER}mlp.up_proj.weight"].tobytes()))
        f.write(changed.tobytes())
    done = call(*line)
    assert (done.code, f"[{LAYER}mlp.up_proj.weight]" in done.out) == (1, True)


def test_what_does_not_move_is_refused_with_the_reason_of_most(model: Path, call: Call) -> None:
    source = quantized(model, "q4_channel", "a.qblk")  # with scales of binary32
    for target, why in (
        ("compressed-tensors", "no such scales of BF16"),
        ("fp8", "no such codes"),
    ):
        done = call("quantize", source, "--scheme", "keep", "--format", target, "-o", "o")
        assert (done.code, why in done.err) == (3, True), done.err
    gguf = quantized(model, "q4_0", "a.gguf", raw=True)
    done = call("quantize", gguf, "--scheme", "keep", "--format", "gptq", "-o", "o")
    assert (done.code, "a raw GGUF file says nothing of a model" in done.err) == (3, True), done.err


def test_codes_with_scales_of_binary16_make_a_model_of_bfloat16_one_of_binary16(
    model: Path,
) -> None:
    source = quantized(model, "q4_block32_sym", "a.qblk")
    report = qconvert.quantize(
        source, "keep", output=model.parent / "out", format="compressed-tensors"
    )
    assert "says float16, not bfloat16" in report.warnings[0]
    fields = json.loads((model.parent / "out" / "config.json").read_text())
    assert fields["torch_dtype"] == "float16"
    name = f"{LAYER}mlp.up_proj.weight"
    with qconvert.load(source) as one, qconvert.load(model.parent / "out") as other:
        np.testing.assert_array_equal(other[name].dequantize(), one[name].dequantize())


def test_codes_of_rows_that_are_cut_up_on_the_way_do_not_move(model: Path) -> None:
    source = open_model(quantized(model, "w4a16_g32", "out"))
    named = f"{LAYER}self_attn.q_proj.weight"
    (info,) = (t for t in dequantized(source).tensors if t.name == named)
    rows, columns = info.shape
    swapped = strided((rows, 2, columns // 2), (columns, 1, 2))  # even columns first
    for made, how in (
        (MappedTensor(info, (info,)), "moved exactly"),
        (MappedTensor(info, (info,), order=swapped), "decoded"),
        (MappedTensor(info, (info,), change=NEGATED_EXP), "decoded"),
    ):
        view = MappedModel(dequantized(source), [made])
        found = Moving(source, view, CONTAINERS["mlx"], "BF16").of(info)
        assert found is not None
        assert found.reason.startswith(how), found.reason
    source.close()


def test_the_size_of_a_quantized_source_is_that_of_its_files(model: Path) -> None:
    out = quantized(model, "w4a16_g32", "out")
    made = qconvert.quantize(out, "keep", output=model.parent / "o.qblk")
    stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert made.source_bytes == stored


def test_a_name_that_tells_no_container_is_answered_with_those_of_the_scheme(
    model: Path, call: Call
) -> None:
    for scheme, formats in (
        ("q4_k_m", "gguf"),
        ("q6_block64", "qblk compressed-tensors mlx"),
        ("bf16", "qblk gguf hf"),
        ("nf4_block64", "qblk bnb"),
    ):
        done = call("quantize", model, "--scheme", scheme, "-o", model.parent / "o")
        told = " or ".join(f"--format {name}" for name in formats.split())
        assert (done.code, done.err.splitlines()[-1]) == (2, f"  hint: or say {told}")


def test_schemes_of_ours_go_by_their_grid(model: Path) -> None:
    one = load_file(quantized(model, "w4a16_g64", "a") / "model.safetensors")
    two = load_file(
        quantized(model, "q4_block64", "b", format="compressed-tensors") / "model.safetensors"
    )
    assert one.keys() == two.keys()
    assert all(one[k].tobytes() == two[k].tobytes() for k in one)


def test_the_result_is_that_of_the_same_grid_in_a_qblk(model: Path) -> None:
    def sqnr(report: QuantizeReport) -> float:
        assert report.sqnr_db is not None
        return report.sqnr_db

    keep = ("*embed*", "lm_head*")
    for scheme, ours, lost in (
        ("w4a16_g32", "q4_block32_sym", 0.1),  # scales of eight significant bits
        ("w4a16_asym_g32", "q4_block32_asym", 0.9),  # and zero points of whole codes: at best 0.7
        ("w8a16_channel", "q8_channel_sym", 0.1),
    ):
        out = model.parent / scheme
        made = qconvert.quantize(model, scheme, output=out)
        same = qconvert.quantize(model, ours, output=f"{out}.qblk", keep=keep, min_values=0)
        assert sqnr(made) > sqnr(same) - lost


def test_parts_of_a_fused_layer_take_one_scheme(model: Path, call: Call) -> None:
    done = call(
        *("quantize", model, "--scheme", "w4a16_g32", "-o", model.parent / "out"),
        *("--tensor-scheme", "*k_proj*=w8a16_g32"),
    )
    assert done.code == 2
    assert "q_proj k_proj v_proj" in done.err
    assert not (model.parent / "out").exists()


def test_a_model_without_configuration_is_refused(model: Path, call: Call) -> None:
    (model / "config.json").unlink()
    done = call("quantize", model, "--scheme", "w4a16", "-o", model.parent / "out")
    assert done.code == 3
    assert "config.json" in done.err


def test_verify_proves_a_directory(model: Path) -> None:
    out = quantized(model, "w4a16_asym_g32", "out")
    done = qconvert.verify(out, against=model)
    assert done.status == "pass"
    assert {c.id for c in done.checks if c.status == "pass"} >= {
        *("integrity", "same-tensors", "kept-exact", "quality", "error-bound", "integer-exact"),
    }
    other = {name: gaussian(99, *t.shape, dtype=BF16) for name, t in tensors().items()}
    save_file(other, model / "model.safetensors", {"format": "pt"})
    assert qconvert.verify(out, against=model).status == "fail"


# --- compressed-tensors, read ---


Change = Callable[[dict[str, Any], Tensors], None]


def changed(model: Path, change: Change) -> Path:
    """A directory with other contents than qconvert writes."""
    out = quantized(model, "w4a16_g32", "out")
    stored = load_file(out / "model.safetensors")
    fields = json.loads((out / "config.json").read_text())
    change(fields["quantization_config"], stored)
    (out / "config.json").write_text(json.dumps(fields))
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    return out


Q = f"{LAYER}self_attn.q_proj"


def _group(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(fields["config_groups"].values()))
    return found


WRONG: dict[str, tuple[Change, str]] = {
    "a scale is missing": (lambda f, t: t.pop(f"{Q}.weight_scale"), "[EXCHANGE-MISSING]"),
    "codes are missing": (lambda f, t: t.pop(f"{Q}.weight_packed"), "[EXCHANGE-ORPHAN]"),
    "a scale of another shape": (
        lambda f, t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :3]}),
        "[EXCHANGE-SHAPE]",
    ),
    "a shape that is none": (
        lambda f, t: t.update({f"{Q}.weight_shape": np.array([64, -1])}),
        "[EXCHANGE-SHAPE]",
    ),
    "another width than that of the codes": (
        lambda f, t: _group(f)["weights"].update(num_bits=5),
        "[EXCHANGE-SHAPE]",
    ),
    "a field that nobody knows": (
        lambda f, t: _group(f)["weights"].update(rotation=True),
        "[EXCHANGE-UNSUPPORTED]",
    ),
    "a field of the block that nobody knows": (
        lambda f, t: f.update(rotation=True),
        "[EXCHANGE-UNSUPPORTED]",
    ),
    "a field of a group that nobody knows": (
        lambda f, t: _group(f).update(rotation=True),
        "[EXCHANGE-UNSUPPORTED]",
    ),
    "weights in another basis": (
        lambda f, t: f.update(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "[EXCHANGE-UNSUPPORTED]",
    ),
    "weights without their zeros": (
        lambda f, t: f.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "[EXCHANGE-UNSUPPORTED]",
    ),
    "a width that is no number": (
        lambda f, t: _group(f)["weights"].update(num_bits="4"),
        "[EXCHANGE-CONFIG]",
    ),
    "a group of other modules": (
        lambda f, t: _group(f).update(targets=["re:.*mlp.*"]),
        "[EXCHANGE-GROUP]",
    ),
    "an expression that is none": (
        lambda f, t: _group(f).update(targets=["re:*("]),
        "[EXCHANGE-CONFIG]",
    ),
    "a weight that is plain as well": (
        lambda f, t: t.update({f"{Q}.weight": np.zeros((64, 128), BF16)}),
        "[EXCHANGE-TWICE]",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_together_is_refused_by_name(what: str, model: Path, call: Call) -> None:
    change, code = WRONG[what]
    out = changed(model, change)
    done: Finished = call("inspect", out)
    assert done.code == 3
    assert code in done.err
    assert len(done.err.splitlines()) <= 2


def test_a_scale_that_is_no_number_fails_the_integrity(model: Path) -> None:
    def spoil(fields: dict[str, Any], stored: Tensors) -> None:
        stored[f"{Q}.weight_scale"][0, 0] = np.nan

    done = qconvert.verify(changed(model, spoil))
    assert done.status == "fail"
    (check,) = [c for c in done.checks if c.status == "fail"]
    assert (check.id, check.tensor) == ("integrity", f"{Q}.weight")


def test_parts_of_a_layer_in_several_layouts_fail(model: Path) -> None:
    good = quantized(model, "w4a16_g32", "good")
    checks = {c.id: c.status for c in qconvert.verify(good).checks}
    assert checks["fused-layers"] == "pass"

    def widen(fields: dict[str, Any], stored: Tensors) -> None:
        eight = load_file(quantized(model, "w8a16_g32", "eight") / "model.safetensors")
        stored |= {k: v for k, v in eight.items() if k.startswith(Q)}
        other = json.loads(json.dumps(_group(fields)))
        other["targets"], other["weights"]["num_bits"] = [Q], 8
        fields["config_groups"] = {"first": other, **fields["config_groups"]}

    done = qconvert.verify(changed(model, widen))
    (check,) = [c for c in done.checks if c.id == "fused-layers"]
    assert (check.status, done.status) == ("fail", "fail")
    assert "w8a16_g32 and w4a16_g32 in one layer" in check.detail


@pytest.mark.parametrize(("scheme", "count"), [("w4a16_g32", 0), ("w4a16_asym_g32", 1)])
def test_packed_zero_points_are_warned_of(scheme: str, count: int, model: Path) -> None:
    done = qconvert.verify(quantized(model, scheme, "out"))
    assert done.status == "pass"
    assert sum("wants them unpacked" in w for w in done.warnings) == count


# --- codes that move ---


def same_values(one: Path, two: Path, names: dict[str, str] | None = None) -> int:
    """How many matrices have the same values in both; every one has to."""
    with qconvert.load(one) as a, qconvert.load(two) as b:
        shared = [n for n in a if n in b and len(a[n].shape) == 2]
        for name in shared:
            np.testing.assert_array_equal(a[name].dequantize(), b[name].dequantize(), name)
        return len(shared)


@pytest.mark.parametrize(
    "scheme", ["w4a16_g32", "w4a16_asym_g32", "w8a16_channel", "w8a16_asym_g32", "w8a8"]
)
def test_codes_move_to_qblk_and_back(scheme: str, model: Path) -> None:
    out = quantized(model, scheme, "out")
    moved = quantized(out, "keep", "moved.qblk", exact=True)
    assert same_values(out, moved) == 9
    assert qconvert.verify(moved, against=out, exact=True).status == "pass"
    with qconvert.load(moved) as found:
        assert found[f"{Q}.weight"].dtype.startswith("q")
    back = quantized(moved, "keep", "back", format="compressed-tensors", exact=True)
    assert same_values(out, back) == 9
    if scheme != "w8a8":  # which comes back packed
        one, two = load_file(out / "model.safetensors"), load_file(back / "model.safetensors")
        assert one.keys() == two.keys()
        assert all(one[k].tobytes() == two[k].tobytes() for k in one)


@pytest.mark.parametrize(
    ("scheme", "type_"), [("w4a16_g32", "Q4_0"), ("w4a16_g64", "Q4_0"), ("w8a16_g32", "Q8_0")]
)
def test_codes_move_to_gguf_as_gguf_py_reads_them(scheme: str, type_: str, model: Path) -> None:
    out = quantized(model, scheme, "out")
    moved = quantized(out, "keep", "moved.gguf", raw=True)
    with qconvert.load(out) as found:
        for t in gguf.GGUFReader(moved).tensors:
            if t.tensor_type.name == type_:
                values = gguf.quants.dequantize(t.data, t.tensor_type)
                np.testing.assert_array_equal(values, found[t.name].dequantize())
    kinds = [t.tensor_type.name for t in gguf.GGUFReader(moved).tensors]
    assert kinds.count(type_) == (6 if scheme == "w4a16_g64" else 7)  # 96 columns stay dense


# What holds the codes of what, of a model of float16: every directory has scales of that then.
SYMMETRIC = ("w4a16_g32", "gptq_4bit_g32", "awq_4bit_g32_sym")
TARGETS = ("compressed-tensors", "mlx", "gptq", "awq", "qblk")
PAIRS = [(scheme, target, True) for scheme in SYMMETRIC for target in TARGETS]
PAIRS += [("awq_4bit_g32", target, target in ("compressed-tensors", "awq", "qblk"))
          for target in TARGETS]  # fmt: skip
PAIRS += [("mlx_4bit_g32", target, target == "mlx") for target in TARGETS]  # any number added


@pytest.mark.parametrize(("scheme", "target", "moves"), PAIRS)
def test_codes_move_between_all_that_hold_them(
    scheme: str, target: str, moves: bool, half_sources: Callable[[str], Path], call: Call,
    tmp_path: Path,
) -> None:  # fmt: skip
    source = half_sources(scheme)
    out = tmp_path / ("out.qblk" if target == "qblk" else "out")
    done = call(
        *("quantize", source, "--scheme", "keep", "--exact", "--format", target, "-o", out),
    )
    assert done.code == (0 if moves else 3), done.err
    if moves:
        assert same_values(source, out) == 9
    else:
        assert "moves into" in done.err or "do not move exactly" in done.err
        assert not out.exists()


@pytest.fixture(scope="module")
def half_sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories by the schemes that they were quantized with, of a model of float16."""
    home = tmp_path_factory.mktemp("half")
    model = home / "model"
    model.mkdir()
    half = {k: v.astype(np.float16) for k, v in tensors().items()}
    save_file(half, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps({**CONFIG, "torch_dtype": "float16"}))

    def made(scheme: str) -> Path:
        place = home / scheme
        if not place.exists():
            qconvert.quantize(model, scheme, output=place)
        return place

    return made


def test_what_was_decoded_on_the_way_is_dense_to_readers(
    half_sources: Callable[[str], Path], tmp_path: Path
) -> None:
    """One matrix has 8 bits, which AWQ does not hold."""
    source, wide = half_sources("w4a16_g32").parent / "model", {"*o_proj*": "q8_block32_sym"}
    qconvert.quantize(
        *(source, "q4_block32_sym"),
        output=tmp_path / "m.qblk",
        tensor_scheme=wide,
        keep=("*embed*", "lm_head*"),
    )
    report = qconvert.quantize(tmp_path / "m.qblk", "keep", output=tmp_path / "out", format="awq")
    assert "6 quantized tensors moved exactly, 1 decoded, 3 plain" in report.notes
    dense = block(tmp_path / "out")["modules_to_not_convert"]
    assert dense == ["lm_head", "model.embed_tokens", f"{LAYER}self_attn.o_proj"]


def test_rows_in_another_order_move_too(tmp_path: Path) -> None:
    """GGUF has the rows of q and k in another order: of a whole Llama, which has a tokenizer."""
    out = tmp_path / "ct"
    qconvert.quantize(SAMPLE, "w4a16_g32", output=out)
    report = qconvert.quantize(out, "keep", output=tmp_path / "moved.gguf", exact=True)
    assert "28 quantized tensors moved exactly, 0 decoded, 11 plain" in report.notes
    assert sum(t.stored == "q4_0" for t in report.tensors) == 28
    assert qconvert.verify(tmp_path / "moved.gguf", against=out, exact=True).status == "pass"


def test_a_byte_of_minus_128_moves(model: Path) -> None:
    out = quantized(model, "w8a16_g32", "out")
    stored = load_file(out / "model.safetensors")
    stored[f"{Q}.weight_packed"][0, 0] &= ~0xFF  # the first code: -128
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    for name in ("moved.gguf", "moved.qblk"):
        moved = quantized(out, "keep", name, exact=True, raw=name.endswith("gguf"))
        assert same_values(out, moved) == 9


def test_what_does_not_move_is_decoded_and_said(model: Path, call: Call) -> None:
    out = quantized(model, "w4a16_asym_g32", "out")
    done = call(
        "quantize", out, "--scheme", "keep", "--raw", "-o", model.parent / "o.gguf", "--json"
    )
    assert done.code == 0
    decoded = [t for t in done.json["tensors"] if t["reason"].startswith("decoded from w4a16_asym")]
    assert len(decoded) >= 6  # ggml has no zero points: a minimum may be their number by chance
    assert {t["stored"] for t in decoded} == {"bf16"}
    moved = f"{7 - len(decoded)} quantized tensors moved exactly, {len(decoded)} decoded, 3 plain"
    assert moved in done.json["notes"]
    refused = call(
        *("quantize", out, "--scheme", "keep", "--exact", "--raw", "-o", model.parent / "p.gguf")
    )
    assert refused.code == 3
    assert f"{len(decoded)} of 7 quantized tensors do not move exactly" in refused.err
    assert not (model.parent / "p.gguf").exists()


def test_keeping_needs_something_quantized_and_somewhere_to_go(model: Path, call: Call) -> None:
    nothing = call("quantize", model, "--scheme", "keep", "-o", model.parent / "o.qblk")
    assert nothing.code == 3
    assert "nothing in the source is quantized" in nothing.err
    nowhere = call("quantize", model, "--scheme", "keep")
    assert nowhere.code == 2
    assert "--format compressed-tensors" in nowhere.err
    without = call("quantize", model, "--scheme", "q4_block32", "--exact")
    assert without.code == 2
    assert "--exact goes with --scheme keep" in without.err


def test_a_quantized_source_is_decoded_without_being_asked_twice(model: Path, call: Call) -> None:
    out = quantized(model, "w4a16_g32", "out")
    lossy = call("quantize", out, "--scheme", "q4_block32", "-o", model.parent / "o.qblk")
    assert lossy.code == 2
    assert "--allow-requantize" in lossy.err
    plain = quantized(out, "f32", "plain", format="hf")
    assert "quantization_config" not in (plain / "config.json").read_text()
    assert json.loads((plain / "config.json").read_text())["torch_dtype"] == "float32"
    decoded = load_file(plain / "model.safetensors")
    with qconvert.load(out) as found:
        for name, values in decoded.items():
            np.testing.assert_array_equal(values, found[name].dequantize().astype(np.float32))


def test_verify_exact_tells_other_values(model: Path) -> None:
    out = quantized(model, "w4a16_g32", "out")
    done = qconvert.verify(out, against=model, exact=True)
    (check,) = [c for c in done.checks if c.id == "exact"]
    assert check.status == "fail"
    assert done.status == "fail"


# --- the readers themselves ---


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_asym_g32", "w8a16_channel", "w8a8"])
def test_compressed_tensors_decodes_the_same_bits(scheme: str, model: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = quantized(model, scheme, "out")
    fields = block(out)
    config = QuantizationConfig.model_validate(
        {k: v for k, v in fields.items() if k not in ("quant_method", "version", "ignore")}
    )
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(group.format)
    stored = load_file(out / "model.safetensors")
    with qconvert.load(out) as found:
        for name in tensors():
            module = name.removesuffix(".weight")
            parts = {
                k.removeprefix(module + "."): torch.from_numpy(
                    v.astype(np.float32) if v.dtype == BF16 else v
                )
                for k, v in stored.items()
                if k.startswith(module + ".")
            }
            if "weight_scale" in parts:
                made = compressor.decompress(parts, group)["weight"]
                np.testing.assert_array_equal(made.numpy(), found[name].dequantize())
