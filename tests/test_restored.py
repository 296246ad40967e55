"""GGUF files of llama.cpp's back under the names of the model that they were made from."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import ROOT, Call
from numpy.typing import NDArray
from tiny_models import CONFIGS, Tensors, weights, write_directory

from qconvert.architectures import RestoredModel, restored
from qconvert.errors import UnsupportedError
from qconvert.files import open_model

SAMPLE = ROOT / "samples" / "tiny-llama"


def back(path: Path, directory: Path, shapes: dict[str, tuple[int, ...]]) -> RestoredModel:
    config = directory / "config.json"
    return restored(open_model(path), json.loads(config.read_text()), config, shapes)


def whole(found: RestoredModel, name: str) -> NDArray[np.floating]:
    info = next(t for t in found.model.tensors if t.name == name)
    return found.model.values(info, 0, info.size).reshape(info.shape)


def shapes_of(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in tensors.items()}


def exact_in_a_sum(tensors: Tensors) -> Tensors:
    """The same with norms in steps of 2^-20, to which 1 is added without rounding."""
    return {
        name: np.round(v * 2**20) / np.float32(2**20) if "norm" in name.lower() else v
        for name, v in tensors.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_way_back_gives_the_bits_of_the_source(name: str, tmp_path: Path, call: Call) -> None:
    source = exact_in_a_sum(weights(CONFIGS[name]))
    directory = write_directory(tmp_path / "tiny", name, tensors=source)
    assert call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf").code == 0
    found = back(tmp_path / "m.gguf", directory, shapes_of(source))
    left_out = {"pooler.dense.weight", "pooler.dense.bias"} if name == "bert" else set()
    assert {d.name for d in found.dropped} == left_out
    assert {t.name for t in found.model.tensors} == source.keys() - left_out
    for tensor in found.model.tensors:
        assert tensor.shape == source[tensor.name].shape
        values = whole(found, tensor.name).astype(np.float32)
        assert values.tobytes() == source[tensor.name].tobytes(), tensor.name
    found.model.close()


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_norm_comes_back_as_the_sum_was_rounded(name: str, tmp_path: Path, call: Call) -> None:
    source = weights(CONFIGS[name])
    directory = write_directory(tmp_path / "tiny", name)
    assert call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf").code == 0
    found = back(tmp_path / "m.gguf", directory, shapes_of(source))
    norm = source["model.norm.weight"]
    wanted = (norm + np.float32(1)) - np.float32(1)
    assert (whole(found, "model.norm.weight") == wanted).all()
    assert (wanted != norm).any()
    found.model.close()


def halves(rows: NDArray[np.floating], heads: int) -> NDArray[np.floating]:
    """Undoes llama.cpp's ``permute`` (convert_hf_to_gguf.py): pairs of rows become halves."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("scheme", ["q8_0", "q4_k_m"])
def test_quantized_rows_are_those_that_gguf_py_decodes(
    scheme: str, tmp_path: Path, call: Call
) -> None:
    path = tmp_path / "m.gguf"
    assert call("quantize", SAMPLE, "--scheme", scheme, "-o", path).code == 0
    stored = gguf.GGUFReader(path).tensors
    decoded = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in stored}
    with closing(open_model(SAMPLE)) as source:
        found = back(path, SAMPLE, {t.name: t.shape for t in source.tensors})
    config = json.loads((SAMPLE / "config.json").read_text())
    at = "model.layers.1.self_attn"
    for name, wanted in {
        f"{at}.q_proj": halves(decoded["blk.1.attn_q.weight"], config["num_attention_heads"]),
        f"{at}.k_proj": halves(decoded["blk.1.attn_k.weight"], config["num_key_value_heads"]),
        f"{at}.v_proj": decoded["blk.1.attn_v.weight"],
        "model.layers.3.mlp.down_proj": decoded["blk.3.ffn_down.weight"],
        "model.embed_tokens": decoded["token_embd.weight"],
    }.items():
        assert (whole(found, f"{name}.weight") == wanted).all(), name
    q = next(t for t in found.model.tensors if t.name == f"{at}.q_proj.weight")
    values, random = whole(found, q.name).ravel(), np.random.default_rng(5)
    for start, stop in np.sort(random.integers(0, q.size, (20, 2)), axis=1).tolist():
        assert (found.model.values(q, start, stop) == values[start:stop]).all()
    found.model.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
            "architecture llama.*wanted qwen2",
        ),
        ({"rope_scaling": None}, r"rope_freqs.weight.*1 tensors too many"),
        ({"vocab_size": 278}, r"token_embd.weight.*\[277, 64\].*wanted shape \[278, 64\]"),
        ({"num_hidden_layers": 1}, r"blk\.1\..*9 tensors too many"),
        ({"num_hidden_layers": 3}, r"blk\.2\..*no such tensor"),
    ],
)
def test_a_file_of_another_model_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path, call: Call
) -> None:
    """Names and shapes are those that the configuration asks for, as the modules have them."""
    name = "llama-3-scaling"
    directory = write_directory(tmp_path / "tiny", name)
    assert call("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf").code == 0
    other = {**CONFIGS[name], **config}
    asked = weights(other)
    write_directory(tmp_path / "other", name, config=config, tensors=asked)
    with pytest.raises(UnsupportedError, match=message):
        back(tmp_path / "m.gguf", tmp_path / "other", shapes_of(asked))
