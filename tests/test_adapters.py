"""LoRA adapters of peft: merged into a model, and by themselves for llama.cpp."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import Call, gaussian, save
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.numpy import load_file

from qconvert.files import open_model
from qconvert.files.adapters import AdaptedModel, adapter_sha256, open_adapter

LLAMA = Path(__file__).parent.parent / "samples/tiny-llama"
Q, DOWN, EMBEDDING = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.embed_tokens",
)
SHAPES = {Q: (256, 256), DOWN: (256, 688), EMBEDDING: (2048, 256)}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "lora_dropout": 0.1,
    "use_dora": False,
}
Parts = dict[str, NDArray[Any]]


def parts_of(seed: int, name: str, rank: int = 4) -> Parts:
    """A and B of a layer, under the names that peft gives them."""
    rows, columns = shapes()[name]
    return {
        f"base_model.model.{name}.lora_A.weight": gaussian(seed, rank, columns),
        f"base_model.model.{name}.lora_B.weight": gaussian(seed + 1, rows, rank),
    }


def shapes() -> dict[str, tuple[int, int]]:
    weights = load_file(LLAMA / "model.safetensors")
    return {name: weights[f"{name}.weight"].shape for name in SHAPES}


def written(place: Path, parts: Parts, **fields: Any) -> Path:
    place.mkdir()
    save(place / "adapter_model.safetensors", parts)
    (place / "adapter_config.json").write_text(json.dumps(CONFIG | fields))
    return place


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return written(tmp_path / "lora", parts_of(1, Q) | parts_of(3, DOWN))


def merged_by(done: Call, adapter: Path) -> dict[str, NDArray[Any]]:
    out = adapter.with_name(f"{adapter.name}-merged")
    done("quantize", LLAMA, "--adapter", adapter, "--scheme", "f32", "--format", "hf", "-o", out)
    return load_file(out / "model.safetensors")


def wide(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64)


def test_merging_adds_the_scaled_product(adapter: Path, done: Call) -> None:
    found, before = merged_by(done, adapter), load_file(LLAMA / "model.safetensors")
    for seed, name in ((1, Q), (3, DOWN)):
        a, b = parts_of(seed, name).values()
        wanted = wide(before[f"{name}.weight"]) + 8 / 4 * (wide(b) @ wide(a))
        np.testing.assert_allclose(wide(found[f"{name}.weight"]), wanted, rtol=2e-7, atol=1e-9)
    for name in before.keys() - {f"{Q}.weight", f"{DOWN}.weight"}:
        assert np.array_equal(wide(found[name]), wide(before[name])), name


@pytest.mark.parametrize(
    ("fields", "scales"),
    [
        ({"use_rslora": True}, {Q: 8 / math.sqrt(4), DOWN: 8 / math.sqrt(2)}),
        ({"alpha_pattern": {"q_proj": 2}}, {Q: 2 / 4, DOWN: 8 / 2}),
        ({"alpha_pattern": {"layers.1.mlp.down_proj": 3, "proj": 1}}, {Q: 8 / 4, DOWN: 3 / 2}),
        ({"lora_alpha": 5.5}, {Q: 5.5 / 4, DOWN: 5.5 / 2}),
    ],
)
def test_scales(
    fields: dict[str, Any], scales: dict[str, float], tmp_path: Path, done: Call
) -> None:
    parts = parts_of(1, Q) | parts_of(3, DOWN, rank=2)
    place = written(tmp_path / "lora", parts, rank_pattern={"down_proj": 2}, **fields)
    found, before = merged_by(done, place), load_file(LLAMA / "model.safetensors")
    for name, scale in scales.items():
        a, b = (v for k, v in parts.items() if name in k)
        added = wide(found[f"{name}.weight"]) - wide(before[f"{name}.weight"])
        product = wide(b) @ wide(a)
        assert np.vdot(added, product) / np.vdot(product, product) == pytest.approx(scale, 1e-5)


def test_corrections_of_embeddings_are_turned_round(tmp_path: Path, done: Call) -> None:
    rows, columns = shapes()[EMBEDDING]
    a, b = gaussian(5, 4, rows), gaussian(6, columns, 4)
    prefix = f"base_model.model.{EMBEDDING}"
    before = load_file(LLAMA / "model.safetensors")
    parts = {
        f"{prefix}.lora_embedding_A": a,
        f"{prefix}.lora_embedding_B": b,
        # peft saves the embeddings along where they are among its targets.
        f"{prefix}.base_layer.weight": before[f"{EMBEDDING}.weight"],
    }
    found = merged_by(done, written(tmp_path / "lora", parts))
    wanted = wide(before[f"{EMBEDDING}.weight"]) + 2 * (wide(b) @ wide(a)).T
    np.testing.assert_allclose(wide(found[f"{EMBEDDING}.weight"]), wanted, rtol=2e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_peft_merges_to_the_same(tmp_path: Path, done: Call) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "up_proj", "embed_tokens"],
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 32},
    )
    trained = peft.get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.05)
    trained.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    found = merged_by(done, tmp_path / "lora")
    for name, values in trained.merge_and_unload().state_dict().items():
        if name in found:  # buffers are not in the file
            np.testing.assert_allclose(wide(found[name]), wide(values.numpy()), rtol=0, atol=1e-6)
    assert (
        np.abs(
            found[f"{Q}.weight"] - wide(load_file(LLAMA / "model.safetensors")[f"{Q}.weight"])
        ).max()
        > 0.1
    )


def test_values_are_the_same_in_any_piece(adapter: Path) -> None:
    opened = AdaptedModel(open_model(LLAMA), open_adapter(adapter))
    tensor = next(t for t in opened.tensors if t.name == f"{DOWN}.weight")
    whole = opened.values(tensor, 0, tensor.size)
    cuts = [0, 1, 687, 688, 689, 5000, 99_999, tensor.size]
    pieces = [opened.values(tensor, a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces).view(np.uint32), whole.view(np.uint32))
    assert opened.raw(tensor, 13, 4000) == whole.tobytes()[13:4013]
    opened.close()


def test_the_same_bytes_for_any_number_of_threads(adapter: Path, done: Call) -> None:
    made = []
    for threads in (1, 3):
        out = adapter.with_name(f"{threads}.qblk")
        done(
            *("quantize", LLAMA, "--adapter", adapter, "--scheme", "q4_block64", "-o", out),
            *("--threads", threads),
        )
        made.append(out.read_bytes())
    assert made[0] == made[1]


def test_verify_and_rebuild_want_the_adapter(adapter: Path, call: Call, done: Call) -> None:
    out = adapter.with_name("m.gguf")
    done("quantize", LLAMA, "--adapter", adapter, "--scheme", "q8_0", "-o", out)
    good = call("verify", out, "--against", LLAMA, "--adapter", adapter, "--rebuild")
    assert good.code == 0, good
    assert "rebuilt byte for byte" in good.out
    without = call("verify", out, "--against", LLAMA)
    assert without.code == 1
    assert "made with the adapter 'lora'" in without.out + without.err
    refused = call("verify", out, "--against", LLAMA, "--rebuild")
    assert refused.code == 2
    assert adapter_sha256(adapter) in refused.err
    other = written(adapter.with_name("other"), parts_of(1, Q) | parts_of(7, DOWN))
    unlike = call("verify", out, "--against", LLAMA, "--adapter", other)
    assert unlike.code == 1
    assert "another adapter than 'other'" in unlike.out + unlike.err


def permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of a rotary matrix as llama.cpp's own converter orders them."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_by_itself(stabilised: bool, tmp_path: Path, done: Call) -> None:
    parts = parts_of(1, Q) | parts_of(3, DOWN)
    place = written(tmp_path / "lora", parts, use_rslora=stabilised)
    out = tmp_path / "lora.gguf"
    done("quantize", LLAMA, "--adapter", place, "--adapter-only", "--scheme", "f32", "-o", out)
    reader = GGUFReader(out)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    # llama.cpp divides alpha by the rank; without alpha it takes the product as it is.
    assert fields["adapter.lora.alpha"] == (0.0 if stabilised else 8.0)
    factor = 8 / math.sqrt(4) if stabilised else 1
    heads = json.loads((LLAMA / "config.json").read_text())["num_attention_heads"]
    a, b, down_a, down_b = parts.values()
    wanted = {
        "blk.0.attn_q.weight.lora_a": a,
        "blk.0.attn_q.weight.lora_b": permuted(b, heads) * np.float32(factor),
        "blk.1.ffn_down.weight.lora_a": down_a,
        "blk.1.ffn_down.weight.lora_b": down_b * np.float32(factor),
    }
    assert {t.name for t in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, wanted[tensor.name]), tensor.name
    good = done("verify", out, "--against", LLAMA, "--adapter", place, "--exact", "--rebuild")
    assert "rebuilt byte for byte" in good.out


def test_an_adapter_of_embeddings_by_itself(tmp_path: Path, done: Call) -> None:
    rows, columns = shapes()[EMBEDDING]
    a, b = gaussian(5, 4, rows), gaussian(6, columns, 4, dtype=ml_dtypes.bfloat16)
    prefix = f"base_model.model.{EMBEDDING}"
    parts = {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b}
    place, out = written(tmp_path / "lora", parts), tmp_path / "lora.gguf"
    done("quantize", LLAMA, "--adapter", place, "--adapter-only", "--scheme", "f32", "-o", out)
    found = {t.name: t.data for t in GGUFReader(out).tensors}
    assert np.array_equal(found["token_embd.weight.lora_a"], a.T)
    assert np.array_equal(found["token_embd.weight.lora_b"], b.astype(np.float32))


def refused(call: Call, place: Path, *options: Any, code: int = 3) -> str:
    result = call(
        *("quantize", LLAMA, "--adapter", place, "--scheme", "q8_0"),
        *("-o", place.with_name("no.gguf"), *options),
    )
    assert result.code == code, result
    assert not place.with_name("no.gguf").exists()
    assert len(result.err.splitlines()) <= 2
    return result.err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"peft_type": "IA3"}, "found peft_type 'IA3'"),
        ({"use_dora": True}, "'use_dora'"),
        ({"bias": "all"}, "'bias'"),
        ({"bias": None}, "'bias'"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out'"),
        ({"init_lora_weights": "pissa"}, "'init_lora_weights'"),
        ({"init_lora_weights": 1}, "'init_lora_weights'"),
        ({"a_field_of_tomorrow": 1}, "'a_field_of_tomorrow'"),
        ({"r": 8}, "found 4, wanted 8"),
        ({"r": 0}, "'r' of the adapter, found 0"),
        ({"lora_alpha": math.inf}, "Infinity"),
        ({"lora_alpha": "8"}, "'lora_alpha' of the adapter, found '8'"),
        ({"use_rslora": 1}, "'use_rslora'"),
        ({"rank_pattern": {"q_proj|k_proj": 4}}, "regular expression"),
        ({"alpha_pattern": []}, "'alpha_pattern'"),
    ],
)
def test_refused_fields(fields: dict[str, Any], told: str, tmp_path: Path, call: Call) -> None:
    place = written(tmp_path / "lora", parts_of(1, Q), **fields)
    assert told in refused(call, place)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({}, "corrects nothing"),
        ({f"base_model.model.{Q}.lora_A.weight": gaussian(1, 4, 256)}, "a part of a correction"),
        ({f"base_model.model.{Q}.bias": gaussian(1, 256)}, "no part of a low-rank correction"),
        (
            {
                f"base_model.model.{Q}.lora_A.weight": gaussian(1, 4, 256),
                f"base_model.model.{Q}.lora_B.weight": gaussian(1, 256, 5),
            },
            "found [4, 256] and [256, 5]",
        ),
        (
            {
                f"base_model.model.{Q}.lora_A.weight": gaussian(1, 4, 128),
                f"base_model.model.{Q}.lora_B.weight": gaussian(1, 256, 4),
            },
            "found a correction of [256, 128], wanted one of BF16 [256, 256]",
        ),
        (
            {
                "base_model.model.model.layers.99.mlp.up_proj.lora_A.weight": gaussian(1, 4, 256),
                "base_model.model.model.layers.99.mlp.up_proj.lora_B.weight": gaussian(1, 8, 4),
            },
            "1 of 1 tensors that the model does not have",
        ),
        (
            parts_of(1, Q)
            | {f"base_model.model.{EMBEDDING}.base_layer.weight": gaussian(9, 2048, 256)},
            "other values of a whole tensor",
        ),
    ],
)
def test_refused_tensors(parts: Parts, told: str, tmp_path: Path, call: Call) -> None:
    assert told in refused(call, written(tmp_path / "lora", parts))


def test_refused_files(adapter: Path, tmp_path: Path, call: Call) -> None:
    assert "an adapter is a directory" in refused(call, adapter / "adapter_config.json")
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "pickled" in refused(call, pickled)
    (pickled / "adapter_config.json").unlink()
    assert "adapter_config.json: no such file" in refused(call, pickled)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--text", "x.txt"), "--text does not go with --adapter"),
        (("--adapter-only",), "--adapter-only writes numbers into a GGUF file"),
    ],
)
def test_refused_options(options: tuple[str, ...], told: str, adapter: Path, call: Call) -> None:
    assert told in refused(call, adapter, *options, code=2)


def test_adapter_only_wants_an_adapter(tmp_path: Path, call: Call) -> None:
    out = tmp_path / "a.gguf"
    result = call("quantize", LLAMA, "--adapter-only", "--scheme", "f16", "-o", out)
    assert result.code == 2
    assert "--adapter-only without an adapter" in result.err
