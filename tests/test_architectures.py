"""Model directories as GGUF: names, shapes, rows and keys against lists and formulas written out.

That llama.cpp computes the same with them is test_llama_cpp.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT, Call
from family_models import MORE, NARROW
from numpy.typing import NDArray
from tiny_models import (
    BYTE_LEVEL_END,
    CONFIGS,
    TOKENIZERS,
    Tensors,
    added,
    byte_level,
    weights,
    write_directory,
)

import qconvert
from qconvert.architectures import (
    GgufSource,
    Place,
    layer_places,
    open_gguf_source,
    supported,
)
from qconvert.architectures.families import FAMILIES, hyper_parameters
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.architectures.mapping import map_tensors
from qconvert.architectures.model_card import card_keys
from qconvert.architectures.pretokenizer_names import name_by_rules
from qconvert.architectures.pretokenizers import NAMES
from qconvert.architectures.source import read_config
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.tying import output_head
from qconvert.errors import FormatError, InputError, QconvertError, UnsupportedError
from qconvert.files import open_model
from qconvert.files.gguf_writer import GgufTensor, GgufValue, GgufWriter
from qconvert.model import TensorInfo

SAMPLE = ROOT / "samples" / "tiny-llama"


def opened(directory: Path, **options: Any) -> GgufSource:
    return open_gguf_source(open_model(directory), **options)


def whole(source: GgufSource, name: str) -> NDArray[np.floating]:
    tensor = info(source, name)
    return source.model.values(tensor, 0, tensor.size).reshape(tensor.shape)


def info(source: GgufSource, name: str) -> TensorInfo:
    return next(t for t in source.model.tensors if t.name == name)


def plain(source: GgufSource) -> dict[str, Any]:
    """Metadata without stated types."""
    return {k: v.value if isinstance(v, GgufValue) else v for k, v in source.metadata.items()}


# --- names and shapes -----------------------------------------------------------------------------

BLOCK = {
    "attn_norm.weight": (64,),
    "attn_q.weight": (64, 64),
    "attn_k.weight": (32, 64),
    "attn_v.weight": (32, 64),
    "attn_output.weight": (64, 64),
    "ffn_norm.weight": (64,),
}
WIDE = {"attn_q.weight": (128, 64), "attn_k.weight": (64, 64), "attn_v.weight": (64, 64),
        "attn_output.weight": (64, 128)}  # fmt: skip
GATED = {"ffn_gate.weight": (96, 64), "ffn_up.weight": (96, 64), "ffn_down.weight": (64, 96)}
QKV_BIAS = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
HEAD_NORMS = {"attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)}
POST_NORMS = {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
UNTIED = {"output.weight"}
BERT_BLOCK = {
    "attn_q.weight": (64, 64), "attn_q.bias": (64,), "attn_k.weight": (64, 64),
    "attn_k.bias": (64,), "attn_v.weight": (64, 64), "attn_v.bias": (64,),
    "attn_output.weight": (64, 64), "attn_output.bias": (64,),
    "attn_output_norm.weight": (64,), "attn_output_norm.bias": (64,),
    "ffn_up.weight": (96, 64), "ffn_up.bias": (96,),
    "ffn_down.weight": (64, 96), "ffn_down.bias": (64,),
    "layer_output_norm.weight": (64,), "layer_output_norm.bias": (64,),
}  # fmt: skip
EXPERTS = {
    "ffn_gate_inp.weight": (4, 64), "ffn_gate_exps.weight": (4, 96, 64),
    "ffn_up_exps.weight": (4, 96, 64), "ffn_down_exps.weight": (4, 64, 96),
}  # fmt: skip
SMALL_EXPERTS = {
    "ffn_gate_inp.weight": (4, 64), "ffn_gate_exps.weight": (4, 48, 64),
    "ffn_up_exps.weight": (4, 48, 64), "ffn_down_exps.weight": (4, 64, 48),
}  # fmt: skip
FUSED = {
    "attn_norm.weight": (64,), "attn_qkv.weight": (128, 64), "attn_output.weight": (64, 64),
    "ffn_norm.weight": (64,), "ffn_up.weight": (192, 64), "ffn_down.weight": (64, 96),
}  # fmt: skip

# architecture, tensors of a block, others besides token_embd and output_norm
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "llama": ("llama", BLOCK | GATED, {"output.weight": (277, 64)}),
    "llama-3-scaling": ("llama", BLOCK | WIDE | GATED, {"rope_freqs.weight": (16,)}),
    "llama-biases": (
        "llama",
        BLOCK | GATED | QKV_BIAS | {"attn_output.bias": (64,)},
        {"output.weight": (311, 64)},
    ),
    "smollm": ("llama", BLOCK | GATED, {}),
    "mistral": ("llama", BLOCK | GATED, {"output.weight": (311, 64)}),
    "qwen2": ("qwen2", BLOCK | GATED | QKV_BIAS, {}),
    "qwen3": ("qwen3", BLOCK | WIDE | GATED | HEAD_NORMS, {"output.weight": (277, 64)}),
    "gemma2": ("gemma2", BLOCK | WIDE | GATED | POST_NORMS, {}),
    "gemma3": ("gemma3", BLOCK | WIDE | GATED | POST_NORMS | HEAD_NORMS, {}),
    "phi3": ("phi3", FUSED, {"output.weight": (311, 64)}),
    "phi3-longrope": (
        "phi3",
        FUSED,
        {
            "output.weight": (311, 64),
            "rope_factors_long.weight": (8,),
            "rope_factors_short.weight": (8,),
        },
    ),
    "bert": (
        "bert",
        BERT_BLOCK,
        {
            "position_embd.weight": (256, 64),
            "token_types.weight": (2, 64),
            "token_embd_norm.weight": (64,),
            "token_embd_norm.bias": (64,),
        },
    ),
    "qwen3-moe": (
        "qwen3moe",
        BLOCK | WIDE | HEAD_NORMS | SMALL_EXPERTS,
        {"output.weight": (277, 64)},
    ),
    "mixtral": ("llama", BLOCK | EXPERTS, {"output.weight": (311, 64)}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_tensors_have_the_names_and_shapes_that_llama_cpp_asks_for(
    name: str, tmp_path: Path
) -> None:
    arch, block, others = EXPECTED[name]
    source = opened(write_directory(tmp_path / "m", name))
    config = CONFIGS[name]
    wanted = {"token_embd.weight": (config["vocab_size"], 64)} | others
    if name != "bert":
        wanted["output_norm.weight"] = (64,)
    for i in range(config["num_hidden_layers"]):
        wanted |= {f"blk.{i}.{n}": shape for n, shape in block.items()}
    assert {t.name: t.shape for t in source.model.tensors} == wanted
    assert source.metadata["general.architecture"] == arch
    assert all(
        t.dtype == "F32" and t.nbytes == 4 * math.prod(t.shape) for t in source.model.tensors
    )


def test_every_architecture_of_the_table_is_tried_here() -> None:
    # the later ones in test_families.py and test_encoders.py
    configs = (*CONFIGS.values(), *NARROW.values(), *MORE.values())
    classes = {c["architectures"][0] for c in configs}
    assert all(classes & set(family.classes) for family in FAMILIES)
    assert len(supported()) == len(FAMILIES)


# --- names alone, for importance matrices ---------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_has_the_place_that_the_conversion_gives_its_weight(
    name: str, tmp_path: Path
) -> None:
    directory = write_directory(tmp_path / "tiny", name)
    path = directory / "config.json"
    fields = json.loads(path.read_text())
    family, config = read_config(fields, path)
    sizes = family.sizes(config)
    _, rope = hyper_parameters(family, config, sizes)
    model = open_model(directory)
    head = output_head(model, family, config)
    mapped, _ = map_tensors(model, family, config, sizes, rope.tensors, head)
    wanted = {
        source.name: Place(t.info.name, i if len(t.sources) > 1 else None)
        for t in mapped
        for i, source in enumerate(t.sources)
    }
    place = layer_places(fields, path)
    matrices = [t.name for t in model.tensors if len(t.shape) == 2]
    assert len(matrices) >= 10
    for matrix in matrices:
        assert place(matrix.removesuffix(".weight")) == wanted.get(matrix), matrix
    model.close()


@pytest.mark.parametrize(
    ("fields", "layer", "place"),
    [
        (
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "text_config": {"num_hidden_layers": 2},
            },
            "language_model.model.layers.1.mlp.up_proj",
            Place("blk.1.ffn_up.weight", None),
        ),
        (
            {"architectures": ["MistralModel"], "model_type": "mistral", "num_hidden_layers": 2},
            "layers.1.self_attn.v_proj",
            Place("blk.1.attn_v.weight", None),
        ),
        (
            {"model_type": "qwen2_moe", "num_hidden_layers": 2},
            "model.layers.0.mlp.experts.3.down_proj",
            Place("blk.0.ffn_down_exps.weight", 3),
        ),
        (
            {"model_type": "stablelm", "num_hidden_layers": 2},
            "model.layers.0.mlp.nonesuch",
            None,
        ),
    ],
)
def test_layers_of_other_models_have_the_names_of_gguf_py(
    fields: dict[str, Any], layer: str, place: Place | None
) -> None:
    assert layer_places(fields, Path("config.json"))(layer) == place


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model_type": "none-such"}, UnsupportedError, "IMATRIX-ARCHITECTURE"),
        ({"model_type": "llama", "num_hidden_layers": None}, FormatError, "ARCH-CONFIG"),
        ({"model_type": "llama", "num_hidden_layers": 1 << 20}, FormatError, "ARCH-CONFIG"),
    ],
)
def test_models_without_names_are_refused(
    fields: dict[str, Any], error: type[QconvertError], code: str
) -> None:
    with pytest.raises(error) as caught:
        layer_places(fields, Path("config.json"))
    assert caught.value.code == code


# --- rows -----------------------------------------------------------------------------------------


def permuted(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """The published permutation of query and key rows, for whole tensors."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def test_rows_of_queries_and_keys_are_interleaved_for_llama_only(tmp_path: Path) -> None:
    source = opened(write_directory(tmp_path / "m", "llama-biases"))
    stored = weights(CONFIGS["llama-biases"])
    at = "model.layers.1.self_attn."
    for ending in ("weight", "bias"):
        q, k, v = (stored[f"{at}{n}_proj.{ending}"] for n in "qkv")
        np.testing.assert_array_equal(whole(source, f"blk.1.attn_q.{ending}"), permuted(q, 4))
        np.testing.assert_array_equal(whole(source, f"blk.1.attn_k.{ending}"), permuted(k, 2))
        np.testing.assert_array_equal(whole(source, f"blk.1.attn_v.{ending}"), v)
    # The first head has 16 rows: 0 and 8 become neighbours.
    q = stored[f"{at}q_proj.weight"]
    np.testing.assert_array_equal(whole(source, "blk.1.attn_q.weight")[:4], q[[0, 8, 1, 9]])
    qwen = opened(write_directory(tmp_path / "q", "qwen2"))
    stored = weights(CONFIGS["qwen2"])
    np.testing.assert_array_equal(
        whole(qwen, "blk.0.attn_q.weight"), stored["model.layers.0.self_attn.q_proj.weight"]
    )


def test_weights_of_norms_are_one_larger_for_gemma(tmp_path: Path) -> None:
    stored = {n: v.astype(ml_dtypes.bfloat16) for n, v in weights(CONFIGS["gemma3"]).items()}
    source = opened(write_directory(tmp_path / "m", "gemma3", tensors=stored))
    for ours, theirs in (
        ("output_norm", "model.norm"),
        ("blk.6.attn_q_norm", "model.layers.6.self_attn.q_norm"),
        ("blk.6.ffn_norm", "model.layers.6.pre_feedforward_layernorm"),
        ("blk.6.post_attention_norm", "model.layers.6.post_attention_layernorm"),
        ("blk.6.post_ffw_norm", "model.layers.6.post_feedforward_layernorm"),
    ):
        tensor = info(source, f"{ours}.weight")
        wanted = stored[f"{theirs}.weight"].astype(np.float32) + np.float32(1)
        assert tensor.dtype == "F32"
        np.testing.assert_array_equal(whole(source, tensor.name), wanted)
        assert source.model.raw(tensor, 5, 22) == wanted.tobytes()[5:27]
    assert info(source, "blk.6.attn_q.weight").dtype == "BF16"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_are_stacked_in_their_order(name: str, tmp_path: Path) -> None:
    source = opened(write_directory(tmp_path / "m", name))
    stored = weights(CONFIGS[name])
    parts, place = {
        "mixtral": (("w1", "w3", "w2"), "model.layers.1.block_sparse_moe.experts"),
        "qwen3-moe": (("gate_proj", "up_proj", "down_proj"), "model.layers.1.mlp.experts"),
    }[name]
    for ours, theirs in zip(("gate", "up", "down"), parts, strict=True):
        wanted = np.stack([stored[f"{place}.{e}.{theirs}.weight"] for e in range(4)])
        np.testing.assert_array_equal(whole(source, f"blk.1.ffn_{ours}_exps.weight"), wanted)


def test_experts_stored_together_are_taken_apart(tmp_path: Path) -> None:
    stored = weights(CONFIGS["qwen3-moe"])
    together: Tensors = {n: v for n, v in stored.items() if ".experts." not in n}
    for i in range(2):
        place = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([stored[f"{place}.{e}.{n}_proj.weight"] for e in range(4)])
            for n in ("gate", "up", "down")
        )
        together[f"{place}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        together[f"{place}.down_proj"] = down
    one = opened(write_directory(tmp_path / "one", "qwen3-moe"))
    other = opened(write_directory(tmp_path / "other", "qwen3-moe", tensors=together))
    assert one.model.tensors == other.model.tensors
    for tensor in one.model.tensors:
        np.testing.assert_array_equal(whole(one, tensor.name), whole(other, tensor.name))


class Counting:
    """A model that notes how much is asked of it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def values(self, tensor: TensorInfo, start: int, stop: int) -> Any:
        self.asked += stop - start
        return self._model.values(tensor, start, stop)

    def raw(self, tensor: TensorInfo, offset: int, size: int) -> bytes:
        self.asked += size // 4
        data: bytes = self._model.raw(tensor, offset, size)
        return data


@pytest.mark.parametrize("name", ["llama-biases", "mixtral", "gemma2", "llama-3-scaling"])
def test_any_range_is_that_part_of_the_whole_and_reads_no_more(name: str, tmp_path: Path) -> None:
    counting = Counting(open_model(write_directory(tmp_path / "m", name)))
    source = open_gguf_source(counting)  # type: ignore[arg-type]
    assert counting.asked == 0
    stream = np.random.RandomState(1)
    for tensor in source.model.tensors:
        everything = source.model.values(tensor, 0, tensor.size)
        data = source.model.raw(tensor, 0, tensor.nbytes)
        assert data == everything.tobytes()
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        for _ in range(4):
            start, stop = sorted(stream.randint(0, tensor.size + 1, 2).tolist())
            counting.asked = 0
            part = source.model.values(tensor, start, stop)
            np.testing.assert_array_equal(part, everything[start:stop])
            assert counting.asked <= stop - start + 2 * columns
            assert source.model.raw(tensor, start, stop - start) == data[start:stop]
    with pytest.raises(ValueError, match="values"):
        source.model.values(tensor, 0, tensor.size + 1)
    with pytest.raises(ValueError, match="bytes"):
        source.model.raw(tensor, 1, tensor.nbytes)


def test_frequencies_are_divided_as_llama_3_does(tmp_path: Path) -> None:
    source = opened(write_directory(tmp_path / "m", "llama-3-scaling"))
    wanted = []
    for pair in range(16):  # the conditions as they are published
        frequency = 10000.0 ** (-2 * pair / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength < 32 / 4.0:
            scaled = frequency
        elif wavelength > 32 / 1.0:
            scaled = frequency / 8.0
        else:
            smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
            scaled = (1 - smooth) * frequency / 8.0 + smooth * frequency
        wanted.append(frequency / scaled)
    assert wanted[0] == 1
    assert wanted[-1] == 8
    found = whole(source, "rope_freqs.weight")
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-6)
    assert source.model.raw(info(source, "rope_freqs.weight"), 0, 64) == found.tobytes()


def test_what_llama_cpp_does_not_want_is_left_out_and_said(tmp_path: Path) -> None:
    stored = weights(CONFIGS["bert"]) | {
        "embeddings.position_ids": np.arange(256, dtype=np.int64),
        "cls.predictions.bias": np.zeros(5, np.float32),
    }
    source = opened(write_directory(tmp_path / "b", "bert", tensors=stored))
    assert {d.name for d in source.dropped} == {
        "embeddings.position_ids",
        "cls.predictions.bias",
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    tied = weights(CONFIGS["smollm"])
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].copy()
    tied["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    source = opened(write_directory(tmp_path / "t", "smollm", tensors=tied))
    assert [d.name for d in source.dropped] == [
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    assert "output.weight" not in {t.name for t in source.model.tensors}


def test_names_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    older = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): values
        for name, values in weights(CONFIGS["bert"]).items()
    }
    one = opened(write_directory(tmp_path / "n", "bert"))
    other = opened(write_directory(tmp_path / "o", "bert", tensors=older))
    assert one.model.tensors == other.model.tensors


def test_the_language_model_inside_gemma_3_is_taken_out(tmp_path: Path) -> None:
    fields = CONFIGS["gemma3"]
    inside = {
        name.replace("model.", "language_model.model.", 1): values
        for name, values in weights(fields).items()
    } | {"vision_tower.patch.weight": np.zeros((4, 4), np.float32)}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {k: v for k, v in fields.items() if k not in ("architectures",)},
        "num_hidden_layers": 99,
    }
    one = opened(write_directory(tmp_path / "n", "gemma3"))
    other = opened(write_directory(tmp_path / "o", "gemma3", config=config, tensors=inside))
    assert one.model.tensors == other.model.tensors
    assert [d.name for d in other.dropped] == ["vision_tower.patch.weight"]


def test_a_mapped_model_passes_on_what_the_source_is(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    model = open_model(directory)
    source = open_gguf_source(model)
    assert source.model.path == directory
    assert source.model.kind == "safetensors"
    assert source.model.sources == model.sources
    assert source.model.companions == model.companions
    source.model.check_unchanged()
    with (directory / "model.safetensors").open("ab") as f:
        f.write(b"x")
    with pytest.raises(InputError, match="changed"):
        source.model.check_unchanged()
    source.model.close()
    with pytest.raises(ValueError, match="closed"):
        model.values(model.tensors[0], 0, 1)


# --- keys -----------------------------------------------------------------------------------------

KEYS: dict[str, dict[str, Any]] = {
    "llama": {
        "llama.context_length": 256, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "llama.vocab_size": 277, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500000.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 271, "tokenizer.ggml.eos_token_id": 272,
    },
    "qwen2-yarn": {
        "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
        "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": False,
    },
    "gemma2": {
        "gemma2.attention.sliding_window": 16, "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0, "gemma2.attention.key_length": 32,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": 16, "gemma3.rope.freq_base": 1000000.0,
        "gemma3.rope.freq_base_swa": 10000.0,
    },
    "phi3-longrope": {
        "phi3.rope.scaling.original_context_length": 256,
        "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(256)),
        "phi3.attention.sliding_window": 0, "tokenizer.ggml.add_space_prefix": True,
    },
    "qwen3-moe": {
        "qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 48, "qwen3moe.attention.key_length": 32,
    },
    "mixtral": {"llama.expert_count": 4, "llama.expert_used_count": 2},
    "bert": {
        "bert.attention.causal": False, "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.pooling_type": 0, "bert.context_length": 256,
        "tokenizer.ggml.token_type_count": 2, "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.cls_token_id": 2, "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.mask_token_id": 4,
        "tokenizer.ggml.normalizer.lowercase": True,
        "tokenizer.ggml.normalizer.strip_accents": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_hyper_parameters_become_keys(name: str, tmp_path: Path) -> None:
    found = plain(opened(write_directory(tmp_path / "m", name)))
    assert {k: found.get(k) for k in KEYS[name]} == pytest.approx(KEYS[name])


# Fields of published models, as far as they are read, and keys that follow from them.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1 8B": (
        {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "hidden_act": "silu",
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 128256,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        {"llama.attention.key_length": 128, "llama.rope.freq_base": 500000.0},
    ),
    "SmolLM2 135M": (
        {
            "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "hidden_act": "silu",
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "max_position_embeddings": 8192, "vocab_size": 49152,
            "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": None,
            "rope_interleaved": False, "tie_word_embeddings": True,
        },
        {"llama.attention.key_length": 64, "llama.attention.head_count_kv": 3},
    ),
    "Qwen3 30B A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "hidden_act": "silu",
            "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 40960,
            "vocab_size": 151936, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "sliding_window": None, "use_sliding_window": False, "attention_bias": False,
        },
        {"qwen3moe.expert_count": 128, "qwen3moe.expert_feed_forward_length": 768},
    ),
    "Gemma 2 27B": (
        {
            "architectures": ["Gemma2ForCausalLM"], "hidden_size": 4608, "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
            "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
            "num_key_value_heads": 16, "max_position_embeddings": 8192, "vocab_size": 256000,
            "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "query_pre_attn_scalar": 144,
            "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        {"gemma2.attention.key_length": 128, "gemma2.attention.sliding_window": 4096},
    ),
    "Gemma 3 27B": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {
                "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504,
                "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        },
        {
            "gemma3.rope.scaling.factor": 8.0, "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.freq_base_swa": 1e4, "gemma3.vocab_size": 262208,
            "gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.context_length": 131072,
        },
    ),
    "Phi 4 mini": (
        {
            "architectures": ["Phi3ForCausalLM"], "hidden_size": 3072, "hidden_act": "silu",
            "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "vocab_size": 200064,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096, "sliding_window": 262144,
            "tie_word_embeddings": True, "attention_bias": False,
            "rope_scaling": {
                "type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48,
            },
        },
        {
            "phi3.rope.dimension_count": 96, "phi3.rope.scaling.original_context_length": 4096,
            "phi3.rope.scaling.attn_factor": 1.1902380714238083,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_of_published_models_are_understood(name: str) -> None:
    fields, wanted = PUBLISHED[name]
    family, config = read_config(fields, Path("config.json"))
    sizes = family.sizes(config)
    keys, _ = hyper_parameters(family, config, sizes)
    found = {k: v.value if isinstance(v, GgufValue) else v for k, v in keys.items()}
    assert {k: found.get(k) for k in wanted} == pytest.approx(wanted)


def test_values_have_the_types_that_llama_cpp_reads(tmp_path: Path) -> None:
    source = opened(write_directory(tmp_path / "m", "gemma2"))
    path = tmp_path / "m.gguf"
    tensor = GgufTensor("t", (1,), "F32")
    writer = GgufWriter(path, source.metadata, [tensor])
    writer.begin(0)
    writer.append(bytes(4))
    writer.finish()
    fields = gguf.GGUFReader(path).fields
    kinds = gguf.GGUFValueType
    for key, wanted in {
        "gemma2.block_count": [kinds.UINT32],
        "gemma2.attention.layer_norm_rms_epsilon": [kinds.FLOAT32],
        "gemma2.attention.sliding_window": [kinds.UINT32],
        "tokenizer.ggml.tokens": [kinds.ARRAY, kinds.STRING],
        "tokenizer.ggml.scores": [kinds.ARRAY, kinds.FLOAT32],
        "tokenizer.ggml.token_type": [kinds.ARRAY, kinds.INT32],
        "tokenizer.ggml.bos_token_id": [kinds.UINT32],
        "tokenizer.ggml.add_bos_token": [kinds.BOOL],
        "general.name": [kinds.STRING],
    }.items():
        assert fields[key].types == wanted, key
    assert len(fields["tokenizer.ggml.tokens"].data) == CONFIGS["gemma2"]["vocab_size"]


def test_older_and_newer_spellings_of_rotary_fields_agree(tmp_path: Path) -> None:
    older = opened(write_directory(tmp_path / "o", "gemma3"))
    newer = opened(
        write_directory(
            tmp_path / "n",
            "gemma3",
            config={
                "rope_theta": None,
                "rope_local_base_freq": None,
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                },
            },
        )
    )
    assert plain(older) | {"general.name": ""} == plain(newer) | {"general.name": ""}


def test_a_window_that_llama_cpp_does_not_apply_is_a_warning(tmp_path: Path) -> None:
    config = {"sliding_window": 32}
    source = opened(write_directory(tmp_path / "m", "mistral", config=config))
    assert "window of 32" in source.warnings[0]
    off = {"sliding_window": 32, "use_sliding_window": False}
    assert not opened(write_directory(tmp_path / "q", "qwen2", config=off)).warnings


CARD = """---
license: apache-2.0
language:
- en
- no
tags: [text-generation, small]
base_model:
- HuggingFaceTB/SmolLM2-135M
datasets: [c4, HuggingFaceTB/smollm-corpus]
model_name: Tiny
---
# text
"""


def test_the_model_card_gives_licence_languages_tags_and_base(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    (directory / "README.md").write_text(CARD)
    (directory / "generation_config.json").write_text('{"top_k": 20, "temperature": 0.6}')
    found = plain(opened(directory))
    assert {k: v for k, v in found.items() if k.startswith("general.")} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "Tiny",
        "general.size_label": "97K",
        "general.license": "apache-2.0",
        "general.languages": ["en", "no"],  # which YAML 1.1 reads as false
        "general.tags": ["text-generation", "small"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2-135M",
        "general.base_model.0.organization": "HuggingFaceTB",
        "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "general.dataset.count": 2,
        "general.dataset.0.name": "c4",
        "general.dataset.1.name": "smollm-corpus",
        "general.dataset.1.organization": "HuggingFaceTB",
        "general.dataset.1.repo_url": (
            "https://huggingface.co/datasets/HuggingFaceTB/smollm-corpus"
        ),
        "general.sampling.top_k": 20,
        "general.sampling.temp": 0.6,
    }


@pytest.mark.parametrize("text", ["", "# no front matter", "---\nlicense: mit", "---\n---\n"])
def test_a_card_without_front_matter_gives_nothing(text: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    (directory / "README.md").write_text(text)
    assert "general.license" not in opened(directory).metadata


def test_pooling_comes_from_sentence_transformers(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    (directory / "1_Pooling").mkdir()
    pooling = directory / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true}')
    assert plain(opened(directory))["bert.pooling_type"] == 1
    pooling.write_text('{"pooling_mode_cls_token": true}')
    assert plain(opened(directory))["bert.pooling_type"] == 2
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedError) as refusal:
        opened(directory)
    assert refusal.value.code == "ARCH-POOLING"


def sentence(directory: Path, *modules: tuple[str, str], **files: dict[str, Any]) -> GgufSource:
    """The directory with modules as (place, kind), and settings by their place."""
    listed = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (place, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    for place, fields in files.items():
        (directory / place).mkdir(exist_ok=True)
        (directory / place / "config.json").write_text(json.dumps(fields))
    return opened(directory)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"pooling_mode_mean_tokens": True}, 1),
        ({"pooling_mode": "mean", "embedding_dimension": 64}, 1),
        ({"pooling_mode": "cls"}, 2),
        ({"pooling_mode": ["lasttoken"]}, 3),
        ({"pooling_mode": "mean", "pooling_mode_cls_token": True}, 1),  # the new field counts
        ({"word_embedding_dimension": 64}, 1),  # sentence-transformers takes the mean then
    ],
)
def test_pooling_is_read_in_old_and_new_fields_wherever_its_module_is(
    settings: dict[str, Any], wanted: int, tmp_path: Path
) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    source = sentence(directory, ("", "Transformer"), ("pool", "Pooling"), pool=settings)
    assert plain(source)["bert.pooling_type"] == wanted


def test_a_decoder_that_makes_embeddings_pools_too(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "qwen3")
    assert "qwen3.pooling_type" not in opened(directory).metadata
    last = {"pooling_mode_lasttoken": True}
    source = sentence(directory, ("", "Transformer"), ("p", "Pooling"), ("n", "Normalize"), p=last)
    assert plain(source)["qwen3.pooling_type"] == 3
    assert any("scaled to length 1" in n for n in source.notes)


def test_a_qblk_file_carries_settings_of_modules_and_tells_what_it_does_not_hold(
    tmp_path: Path, call: Call
) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    modules = (("", "Transformer"), ("pool", "Pooling"), ("2_Dense", "Dense"))
    sentence(directory, *modules[:2], pool={"pooling_mode": "cls"})
    output = tmp_path / "m.qblk"
    assert call("quantize", directory, "--scheme", "f16", "-o", output).err.count("\n") == 1
    with qconvert.load(output) as tensors:
        assert json.loads(tensors.file("pool/config.json")) == {"pooling_mode": "cls"}
    assert plain(opened(output))["bert.pooling_type"] == 2
    entries = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"}
               for i, (p, t) in enumerate(modules)]  # fmt: skip
    (directory / "modules.json").write_text(json.dumps(entries))
    found = call("quantize", directory, "--scheme", "f16", "-o", output, "--force")
    assert found.code == 0
    assert "not the module 'Dense' of sentence-transformers" in found.err


@pytest.mark.parametrize(
    ("modules", "code"),
    [
        ((("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")), "ARCH-MODULE"),
        ((("", "Transformer"), ("1_Pooling", "Pooling"), ("2", "LayerNorm")), "ARCH-MODULE"),
        ((("", "WordEmbeddings"), ("1_Pooling", "Pooling")), "ARCH-MODULE"),
        ((("", "Transformer"), ("1_Pooling", "Pooling"), ("1_Pooling", "Pooling")), "ARCH-MODULE"),
        ((("", "Transformer"), ("absent", "Pooling")), "ARCH-POOLING"),
    ],
)
def test_a_module_that_a_file_cannot_hold_is_refused_by_name(
    modules: tuple[tuple[str, str], ...], code: str, tmp_path: Path
) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    with pytest.raises((UnsupportedError, FormatError)) as refusal:
        sentence(directory, *modules, **{"1_Pooling": {"pooling_mode": "mean"}})
    assert refusal.value.code == code
    assert (
        modules[-1][1] in str(refusal.value)
        or code == "ARCH-POOLING"
        or modules[0][1] in str(refusal.value)
    )


@pytest.mark.parametrize("mode", ["max", "weightedmean", ["mean", "max"], 7])
def test_other_poolings_are_refused(mode: Any, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    with pytest.raises(UnsupportedError) as refusal:
        sentence(directory, ("", "Transformer"), ("p", "Pooling"), p={"pooling_mode": mode})
    assert refusal.value.code == "ARCH-POOLING"


def test_what_sentence_transformers_does_to_the_text_is_said(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    settings = directory / "config_sentence_transformers.json"
    settings.write_text("{}")
    assert "without modules.json" in opened(directory).warnings[0]
    parts = (("", "Transformer"), ("p", "Pooling"))
    pooled = {"pooling_mode": "mean"}
    settings.write_text('{"prompts": {"query": "find: ", "none": ""}}')
    source = sentence(directory, *parts, p=pooled)
    assert source.warnings == ()
    assert any("(query)" in n for n in source.notes)
    settings.write_text('{"prompts": {"query": "find: "}, "default_prompt_name": "query"}')
    (directory / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    source = sentence(directory, *parts, p=pooled | {"include_prompt": False})
    said = " ".join(source.warnings)
    for text in ("lowers the case", "prompt out of the pooling", "'find: ' before every text"):
        assert text in said


# --- tokenizers -----------------------------------------------------------------------------------


def tokenizer_keys(tmp_path: Path, fields: dict[str, Any], **options: Any) -> dict[str, Any]:
    config = {"vocab_size": 700}
    name = "bert" if fields["model"]["type"] == "WordPiece" else "llama"
    directory = write_directory(
        tmp_path / "t",
        name,
        config=config,
        tensors=weights({**CONFIGS[name], **config}),
        tokenizer=fields,
    )
    return plain(opened(directory, **options))


def test_byte_level_tokens_types_and_merges(tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, TOKENIZERS["llama-bpe"])
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 700
    assert tokens[256:260] == ["Ġt", "he", "in", "Ġa"]
    assert tokens[271:276] == ["<|begin|>", "<|end|>", "<tool>", "[PAD274]", "[PAD275]"]
    # normal, control, control, user-defined, unused
    assert types[270:275] == [1, 3, 3, 4, 5]
    assert found["tokenizer.ggml.merges"][:3] == ["Ġ t", "h e", "i n"]
    older = tokenizer_keys(tmp_path / "o", TOKENIZERS["gpt-2"])
    assert older["tokenizer.ggml.merges"] == found["tokenizer.ggml.merges"]


def test_sentencepiece_scores_follow_the_merges(tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, TOKENIZERS["sp-gemma"])
    by_token = dict(
        zip(
            found["tokenizer.ggml.tokens"],
            zip(found["tokenizer.ggml.scores"], found["tokenizer.ggml.token_type"], strict=True),
            strict=True,
        )
    )
    merged = ["▁t", "he", "▁a", "in", "▁the", "er", "nd", "▁and", "▁is", "is", "at", "▁at"]
    scores = [by_token[t][0] for t in merged]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == len(scores)
    assert by_token["<unk>"] == (0.0, 2)
    assert by_token["<s>"] == (0.0, 3)
    assert by_token["  "] == (0.0, 4)  # as the text has it, not escaped
    assert by_token["<0x41>"] == (0.0, 6)
    assert by_token["[PAD699]"] == (-10000.0, 5)


def test_a_tab_may_be_a_token_in_the_place_of_its_byte(tmp_path: Path) -> None:
    """As in the tokenizers of Gemma 1 and 2."""
    text = json.dumps(TOKENIZERS["sp-gemma"]).replace('"<0x09>"', '"\\t"')
    found = tokenizer_keys(tmp_path, json.loads(text))
    tokens = found["tokenizer.ggml.tokens"]
    assert "<0x09>" not in tokens
    ours = LlamaTokenizer(found)
    assert ours.encode("\t") == [tokens.index("\t")]
    other = json.dumps(TOKENIZERS["sp-gemma"]).replace('"<0xFF>"', '"none"')
    with pytest.raises(UnsupportedError):
        tokenizer_keys(tmp_path / "o", json.loads(other))


def test_deepseek_s_expressions_are_known_however_they_are_written() -> None:
    """The published file has line ends as such, and no escape before a quote."""
    expressions = next(e for (e, _), name in NAMES.items() if name == "deepseek-v3")
    published = [e.replace(r"\r", "\r").replace(r"\n", "\n") for e in expressions]
    assert '[!"#' in published[2]
    for written in (published, [e.replace('"', r"\"") for e in published], expressions):
        steps = [
            {"type": "Split", "pattern": {"Regex": e}, "behavior": "Isolated", "invert": False}
            for e in written
        ]
        level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        fields = {
            "model": {},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
        }
        assert name_by_rules(TokenizerJson(fields, Path("tokenizer.json"))) == "deepseek-v3"


def test_a_merge_left_out_is_a_warning_and_keeps_the_place_of_its_token(tmp_path: Path) -> None:
    fields = json.loads(json.dumps(TOKENIZERS["sp-llama"]))
    fields["model"]["merges"].remove(["▁", "t"])
    config = {"vocab_size": 700}
    tensors = weights({**CONFIGS["llama"], **config})
    source = opened(
        write_directory(tmp_path / "t", "llama", config=config, tensors=tensors, tokenizer=fields)
    )
    assert any("('▁', 't')" in w for w in source.warnings)
    found = plain(source)
    score = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert score["▁t"] > score["he"] > score["▁a"]


def test_wordpiece_marks_beginnings_instead_of_insides(tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, TOKENIZERS["wordpiece"])
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:6] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁a"]
    assert tokens[45:50] == ["▁the", "▁quick", "▁fox", "s", "er"]
    assert found["tokenizer.ggml.token_type"][:6] == [3, 2, 3, 3, 3, 1]


def test_wordpiece_has_tokens_around_a_text_or_is_refused(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "bert")
    (directory / "tokenizer_config.json").write_text("{}")
    found = plain(opened(directory))  # the post-processor names them
    assert found["tokenizer.ggml.bos_token_id"] == 2
    assert found["tokenizer.ggml.seperator_token_id"] == 3
    bare = {**TOKENIZERS["wordpiece"], "post_processor": None}
    (directory / "tokenizer.json").write_text(json.dumps(bare))
    # transformers 5 puts a BertTokenizer's own around a text, whatever tokenizer.json says
    assert plain(opened(directory))["tokenizer.ggml.seperator_token_id"] == 3
    settings = directory / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert refused(directory).code == "ARCH-TOKENIZER"
    settings.write_text('{"cls_token": "[CLS]", "sep_token": "[SEP]"}')
    assert plain(opened(directory))["tokenizer.ggml.seperator_token_id"] == 3


def test_unigram_keeps_its_scores(tmp_path: Path) -> None:
    found = tokenizer_keys(tmp_path, TOKENIZERS["unigram"])
    assert found["tokenizer.ggml.model"] == "t5"
    assert found["tokenizer.ggml.tokens"][3:6] == ["▁the", "▁a", "er"]
    assert found["tokenizer.ggml.scores"][3:6] == [-1.5, -1.75, -2.0]
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 1]
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_pre_tokenizer_is_known_by_its_expressions(name: str, tmp_path: Path) -> None:
    assert tokenizer_keys(tmp_path, byte_level(name))["tokenizer.ggml.pre"] == name


def test_whole_words_first_tells_two_pre_tokenizers_apart(tmp_path: Path) -> None:
    fields = byte_level("llama-bpe")
    fields["model"]["ignore_merges"] = False
    assert tokenizer_keys(tmp_path, fields)["tokenizer.ggml.pre"] == "smaug-bpe"


def test_an_unknown_pre_tokenizer_can_be_named(tmp_path: Path) -> None:
    fields = byte_level("qwen2")
    fields["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\d+|\D+"
    with pytest.raises(UnsupportedError) as refusal:
        tokenizer_keys(tmp_path, fields)
    assert refusal.value.code == "ARCH-PRE-TOKENIZER"
    assert r"\d+|\D+" in str(refusal.value)
    assert "--pre-tokenizer" in str(refusal.value.hint)
    found = tokenizer_keys(tmp_path, fields, pre_tokenizer="falcon")
    assert found["tokenizer.ggml.pre"] == "falcon"


# --- the output matrix ----------------------------------------------------------------------------


def with_head(kind: str, head: NDArray[Any]) -> Tensors:
    return weights(CONFIGS[kind]) | {"lm_head.weight": head}


def test_a_trained_head_is_kept_though_the_configuration_ties_it(tmp_path: Path) -> None:
    """transformers 5 compares and does not tie what differs, be it in one value."""
    embedding = weights(CONFIGS["smollm"])["model.embed_tokens.weight"]
    head = embedding.copy()
    head[-1, -1] += 1e-3
    source = opened(write_directory(tmp_path / "m", "smollm", tensors=with_head("smollm", head)))
    np.testing.assert_array_equal(whole(source, "output.weight"), head)
    np.testing.assert_array_equal(whole(source, "token_embd.weight"), embedding)
    assert "both are kept, as transformers does" in source.warnings[0]
    assert "'lm_head.weight' is not left out" in source.notes[0]
    assert source.dropped == ()


def test_an_equal_head_is_left_out_and_said_to_be_equal(tmp_path: Path) -> None:
    embedding = weights(CONFIGS["smollm"])["model.embed_tokens.weight"]
    for head in (embedding.copy(), embedding.astype(np.float64)):
        source = opened(
            write_directory(tmp_path / "m", "smollm", tensors=with_head("smollm", head))
        )
        assert [(d.name, d.reason) for d in source.dropped] == [
            ("lm_head.weight", "equals the token embedding, which it is tied to")
        ]
        assert "output.weight" not in {t.name for t in source.model.tensors}
        assert not source.warnings


def test_an_equal_head_that_is_not_tied_is_a_matrix_of_its_own(tmp_path: Path) -> None:
    embedding = weights(CONFIGS["smollm"])["model.embed_tokens.weight"]
    source = opened(
        write_directory(
            tmp_path / "m",
            "smollm",
            config={"tie_word_embeddings": False},
            tensors=with_head("smollm", embedding.copy()),
        )
    )
    assert "output.weight" in {t.name for t in source.model.tensors}
    assert not source.warnings


def test_a_head_alone_stands_in_for_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    """transformers ties both ways: whichever of the two is there."""
    tensors = weights(CONFIGS["smollm"])
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    source = opened(write_directory(tmp_path / "m", "smollm", tensors=tensors))
    np.testing.assert_array_equal(whole(source, "token_embd.weight"), tensors["lm_head.weight"])
    assert "output.weight" not in {t.name for t in source.model.tensors}


def test_gemma_3_may_have_a_head_and_gemma_2_may_not(tmp_path: Path) -> None:
    """llama.cpp's loader reads output.weight for one of them only."""
    for kind in ("gemma3", "gemma2"):
        embedding = weights(CONFIGS[kind])["model.embed_tokens.weight"]
        directory = write_directory(
            tmp_path / kind, kind, tensors=with_head(kind, embedding + np.float32(1))
        )
        if kind == "gemma3":
            assert "output.weight" in {t.name for t in opened(directory).model.tensors}
        else:
            with pytest.raises(UnsupportedError) as refusal:
                opened(directory)
            assert (refusal.value.code, refusal.value.tensor) == ("ARCH-HEAD", "lm_head.weight")


# --- tokens and rows ------------------------------------------------------------------------------


def rows_and_tokens(tmp_path: Path, size: int, tokenizer: dict[str, Any]) -> Path:
    config = {"vocab_size": size}
    tensors = weights({**CONFIGS["llama"], **config})
    return write_directory(
        tmp_path / "m", "llama", config=config, tensors=tensors, tokenizer=tokenizer
    )


def test_an_added_token_without_a_row_is_left_out_with_a_note(tmp_path: Path) -> None:
    """As of Gemma 3: 262,145 tokens, 262,144 rows."""
    fields = json.loads(json.dumps(TOKENIZERS["llama-bpe"]))
    size = BYTE_LEVEL_END + 2
    fields["added_tokens"].append(added(size, "<image_soft_token>"))
    source = opened(rows_and_tokens(tmp_path, size, fields))
    tokens = plain(source)["tokenizer.ggml.tokens"]
    assert len(tokens) == size
    assert "<image_soft_token>" not in tokens
    assert any("'<image_soft_token>'" in n and f"{size:,} rows" in n for n in source.notes)
    assert not source.warnings
    template = "{{ '<image_soft_token>' }}"
    (tmp_path / "m" / "chat_template.jinja").write_text(template)
    (warning,) = opened(tmp_path / "m").warnings
    assert "chat template uses '<image_soft_token>'" in warning


@pytest.mark.parametrize("change", ["vocabulary", "many", "far", "end token"])
def test_a_tokenizer_of_another_model_is_still_refused(change: str, tmp_path: Path) -> None:
    fields = json.loads(json.dumps(TOKENIZERS["llama-bpe"]))
    size = BYTE_LEVEL_END + 2
    if change == "vocabulary":  # ordinary tokens are beyond the rows
        fields["model"]["vocab"] |= {f"word{i}": size + i for i in range(2)}
    elif change == "many":
        fields["added_tokens"] += [added(size + i, f"<extra{i}>") for i in range(9)]
    elif change == "far":
        fields["added_tokens"].append(added(size + 100, "<far>"))
    else:
        fields["added_tokens"].append(added(size, "<new>"))
    directory = rows_and_tokens(tmp_path, size, fields)
    if change == "end token":
        (directory / "tokenizer_config.json").write_text('{"eos_token": {"content": "<new>"}}')
    error = refused(directory)
    assert error.code == "ARCH-VOCABULARY"


# --- tokenizers that llama.cpp does not follow ----------------------------------------------------


def altered(kind: str, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(TOKENIZERS[kind]))
    change(fields)
    return fields


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the last of ``path`` at the place that those before it name."""

    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for key in path[:-2]:
            place = place[key]
        place[path[-2]] = path[-1]

    return change


WORDPIECE = {"tokenizer_class": "PreTrainedTokenizerFast"}  # takes tokenizer.json as it is
FIRST = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
FOLLOWED_OTHERWISE: dict[str, tuple[dict[str, Any], str, str]] = {
    # tokenizer, what is said of it, and a text that shows it
    "prepend_scheme first": (
        altered("sp-llama", lambda f: f.update(normalizer=None, pre_tokenizer=FIRST)),
        "prepend_scheme 'first'",
        "'<unk>a'",
    ),
    "handle_chinese_chars": (
        altered("wordpiece", put("normalizer", "handle_chinese_chars", False)),
        "handle_chinese_chars false",
        "'漢字'",
    ),
    "clean_text": (
        altered("wordpiece", put("normalizer", "clean_text", False)),
        "clean_text false",
        "a",
    ),
    "lowercase alone": (
        altered("wordpiece", put("normalizer", {"type": "Lowercase"})),
        "without a BertNormalizer",
        "'漢字'",
    ),
    "short words": (
        altered("wordpiece", put("model", "max_input_chars_per_word", 5)),
        "max_input_chars_per_word",
        "'aaaaaa'",
    ),
    "single_word": (
        altered("llama-bpe", put("added_tokens", 2, "single_word", True)),
        "single_word",
        "'a<tool>a'",
    ),
    "lstrip": (altered("llama-bpe", put("added_tokens", 2, "lstrip", True)), "lstrip", "' <tool>'"),
    "rstrip": (altered("llama-bpe", put("added_tokens", 2, "rstrip", True)), "rstrip", "'<tool> '"),
    "dropout": (altered("llama-bpe", put("model", "dropout", 0.1)), "dropout 0.1", ""),
    "NFKC": (altered("llama-bpe", put("normalizer", {"type": "NFKC"})), "'NFKC'", ""),
    "two tokens before a text": (
        altered(
            "llama-bpe",
            lambda f: f["post_processor"]["single"].insert(
                0, {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}
            ),
        ),
        "puts 2 tokens before a text",
        "",
    ),
}  # fmt: skip


def source_of(tmp_path: Path, fields: dict[str, Any], settings: dict[str, Any]) -> GgufSource:
    name = "bert" if fields["model"]["type"] == "WordPiece" else "llama"
    config = {"vocab_size": 700}
    tensors = weights({**CONFIGS[name], **config})
    directory = write_directory(
        tmp_path / "t", name, config=config, tensors=tensors, tokenizer=fields
    )
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return opened(directory)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", FOLLOWED_OTHERWISE)
def test_what_llama_cpp_does_otherwise_is_a_warning_with_a_text(
    name: str, library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizers library and without it."""
    if not library:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    fields, said, text = FOLLOWED_OTHERWISE[name]
    source = source_of(tmp_path, fields, WORDPIECE)
    assert any(said in w and text in w for w in source.warnings), source.warnings
    told = [n for n in source.notes if "tokens were not compared" in n]
    if library and importlib.util.find_spec("tokenizers"):
        assert not told
    else:
        assert "tokenizers is not installed" in told[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_usual_tokenizers_are_followed_and_nothing_is_said(kind: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, TOKENIZERS[kind], {})
    if kind == "unigram" and importlib.util.find_spec("tokenizers"):  # of spaces in a run
        assert "for ' leading'" in source.warnings[0]
        return
    assert source.warnings == ()


def test_words_cut_at_white_space_come_without_it(tmp_path: Path) -> None:
    """paraphrase-multilingual-MiniLM: WhitespaceSplit, then Metaspace (llama.cpp#27277)."""
    split = [{"type": "WhitespaceSplit"}, TOKENIZERS["unigram"]["pre_tokenizer"]]
    fields = altered("unigram", put("pre_tokenizer", {"type": "Sequence", "pretokenizers": split}))
    assert plain(source_of(tmp_path, fields, {}))["tokenizer.ggml.remove_extra_whitespaces"] is True


def test_bert_s_normalizer_is_that_of_tokenizer_config_json(tmp_path: Path) -> None:
    """transformers 5.24: BertTokenizer builds it anew; 'The' is [UNK] with do_lower_case false."""
    source = source_of(tmp_path, TOKENIZERS["wordpiece"], {"do_lower_case": False})
    assert plain(source)["tokenizer.ggml.normalizer.lowercase"] is False
    assert plain(source)["tokenizer.ggml.normalizer.strip_accents"] is False
    (warning,) = source.warnings
    assert "do_lower_case false" in warning
    source = source_of(tmp_path, TOKENIZERS["wordpiece"], {"do_lower_case": False} | WORDPIECE)
    assert plain(source)["tokenizer.ggml.normalizer.lowercase"] is True
    cased = altered("wordpiece", put("normalizer", "lowercase", False))
    source = source_of(tmp_path, cased, {})  # whose default is true
    assert plain(source)["tokenizer.ggml.normalizer.lowercase"] is True


def test_nonsense_is_refused_with_both_lists_of_tokens(tmp_path: Path) -> None:
    """The library's own words: a normalizer that turns every text round into other letters."""
    pytest.importorskip("tokenizers", reason="comes with transformers")
    swapped = {"type": "Replace", "pattern": {"String": "e"}, "content": "q"}
    fields = altered("llama-bpe", put("normalizer", swapped))
    with pytest.raises(UnsupportedError) as refusal:
        source_of(tmp_path, fields, {})
    assert refusal.value.code == "ARCH-TOKENS"
    assert "the quick brown fox" in str(refusal.value)
    assert "] instead of [" in str(refusal.value)


def normalized(*steps: dict[str, Any]) -> dict[str, Any]:
    return altered("llama-bpe", put("normalizer", {"type": "Sequence", "normalizers": [*steps]}))


def looked_up(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": "b"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (normalized({"type": "Nonsense" * 1000}), "does not take the file: "),
        (
            altered(
                "llama-bpe",
                put("post_processor", "single", [{"SpecialToken": {"id": "?", "type_id": 0}}]),
            ),
            "does not take the file",  # of which the library says that no entry was found for a key
        ),
        (normalized(looked_up({"Regex": "(t+)+h*(e*)*(.*)*$(a)"})), ""),
    ],
    ids=["an unknown step", "a panic", "an expression"],
)
def test_whatever_the_library_does_a_file_is_written_and_nothing_printed(
    fields: dict[str, Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It takes no file for granted: another process ends instead of this one."""
    pytest.importorskip("tokenizers", reason="comes with transformers")
    monkeypatch.setattr("qconvert.architectures.library_tokens.MAX_SECONDS", 5)
    source = source_of(tmp_path, fields, {})
    assert any(said in note for note in (*source.notes, ""))
    assert max(map(len, source.warnings)) < 300
    assert capfd.readouterr() == ("", "")


def test_an_end_token_that_nobody_states_is_llama_cpp_s_own(tmp_path: Path) -> None:
    """Token 11 of byte-level BPE, whatever that is."""
    directory = write_directory(tmp_path / "m", "llama", config={"eos_token_id": None})
    (directory / "tokenizer_config.json").write_text("{}")
    (warning,) = opened(directory).warnings
    assert "no end token is stated" in warning
    eleventh = {i: t for t, i in TOKENIZERS["llama-bpe"]["model"]["vocab"].items()}[11]
    assert f"token 11, {eleventh!r}" in warning


def test_roberta_s_post_processor_puts_tokens_around_a_text(tmp_path: Path) -> None:
    end = BYTE_LEVEL_END
    around = {"type": "RobertaProcessing", "cls": ["<|begin|>", end - 1], "sep": ["<|end|>", end]}
    found = plain(source_of(tmp_path, altered("gpt-2", put("post_processor", around)), {}))
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.ggml.bos_token_id"] == end - 1
    assert found["tokenizer.ggml.eos_token_id"] == end


# --- chat templates -------------------------------------------------------------------------------


def templates(directory: Path) -> dict[str, Any]:
    found = plain(opened(directory))
    return {k.removeprefix("tokenizer."): v for k, v in found.items() if "chat_template" in k}


def test_every_place_of_a_chat_template_is_read_in_transformers_order(tmp_path: Path) -> None:
    """tokenization_utils_base and processing_utils of transformers 5."""
    directory = write_directory(tmp_path / "m", "llama")
    assert templates(directory) == {}
    (directory / "processor_config.json").write_text('{"chat_template": "P"}')
    assert templates(directory) == {"chat_template": "P"}
    (directory / "chat_template.json").write_text('{"chat_template": "J"}')
    assert templates(directory) == {"chat_template": "J"}
    settings = directory / "tokenizer_config.json"
    before = json.loads(settings.read_text())
    settings.write_text(json.dumps(before | {"chat_template": {"default": "D", "rag": "R"}}))
    both = {"chat_template": "D", "chat_template.rag": "R", "chat_templates": ["rag"]}
    assert templates(directory) == both
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    alone = {"chat_template.tool_use": "T", "chat_templates": ["tool_use"]}
    assert templates(directory) == alone
    (directory / "chat_template.jinja").write_text("A")
    assert templates(directory) == {"chat_template": "A"} | alone


def test_chat_templates_are_carried(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    several = [
        {"name": "default", "template": "A"},
        {"name": "tool_use", "template": "B"},
    ]
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(settings | {"chat_template": several}))
    found = plain(opened(directory))
    assert found["tokenizer.chat_template"] == "A"
    assert found["tokenizer.chat_template.tool_use"] == "B"
    assert found["tokenizer.chat_templates"] == ["tool_use"]
    (directory / "chat_template.jinja").write_text("C {{ é }}")
    assert plain(opened(directory))["tokenizer.chat_template"] == "C {{ é }}"


def test_a_normalizer_that_llama_cpp_lacks_is_a_warning(tmp_path: Path) -> None:
    fields = byte_level("qwen2") | {"normalizer": {"type": "Lowercase"}}
    config = {"vocab_size": 700}
    tensors = weights({**CONFIGS["llama"], **config})
    source = opened(
        write_directory(tmp_path / "t", "llama", config=config, tensors=tensors, tokenizer=fields)
    )
    assert "'Lowercase'" in source.warnings[0]
    assert not opened(write_directory(tmp_path / "q", "qwen2")).warnings  # NFC


# --- refusals -------------------------------------------------------------------------------------


def refused(directory: Path, **options: Any) -> QconvertError:
    """The refusal, which reads no value of any tensor."""
    counting = Counting(open_model(directory))
    with pytest.raises((InputError, UnsupportedError, FormatError)) as refusal:
        open_gguf_source(counting, **options)  # type: ignore[arg-type]
    assert counting.asked == 0
    return refusal.value


@pytest.mark.parametrize(
    ("name", "code", "fields"),
    [
        ("llama", "ARCH-UNKNOWN", {"architectures": ["GPTJForCausalLM"]}),
        ("llama", "ARCH-UNKNOWN", {"architectures": [7]}),
        ("llama", "ARCH-QUANTIZED", {"quantization_config": {"quant_method": "gptq"}}),
        ("llama", "ARCH-CONFIG", {"hidden_size": None}),
        ("llama", "ARCH-CONFIG", {"hidden_size": "64"}),
        ("llama", "ARCH-CONFIG", {"hidden_size": True}),
        ("llama", "ARCH-CONFIG", {"num_hidden_layers": 1 << 30}),
        ("llama", "ARCH-CONFIG", {"head_dim": 1 << 30}),
        ("llama", "ARCH-HEADS", {"hidden_size": 1 << 30}),
        ("gemma3", "ARCH-CONFIG", {"num_hidden_layers": 1 << 30}),
        ("mixtral", "ARCH-CONFIG", {"num_local_experts": 1 << 30}),
        ("llama", "ARCH-SHAPE", {"vocab_size": 1 << 30}),
        ("llama-3-scaling", "ARCH-CONFIG", {"rope_scaling": {"type": "llama3", "factor": 8.0}}),
        ("llama", "ARCH-CONFIG", {"rms_norm_eps": -1}),
        ("llama", "ARCH-CONFIG", {"tie_word_embeddings": "no"}),
        ("llama", "ARCH-CONFIG", {"rope_scaling": []}),
        ("llama", "ARCH-CONFIG", {"rope_scaling": {"type": "linear"}}),
        ("llama", "ARCH-CONFIG-VALUE", {"hidden_act": "relu"}),
        ("llama", "ARCH-CONFIG-VALUE", {"partial_rotary_factor": 0.5}),
        ("llama", "ARCH-ROPE", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("llama", "ARCH-HEADS", {"num_key_value_heads": 3}),
        ("llama", "ARCH-HEADS", {"num_attention_heads": 7}),
        ("llama", "ARCH-SHAPE", {"num_key_value_heads": 4}),
        ("llama", "ARCH-SHAPE", {"intermediate_size": 95}),
        ("llama", "ARCH-SHAPE", {"vocab_size": 300}),
        ("llama", "ARCH-TENSOR-MISSING", {"num_hidden_layers": 3}),
        ("llama", "ARCH-TENSOR-LEFT", {"num_hidden_layers": 1}),
        ("smollm", "ARCH-TENSOR-MISSING", {"tie_word_embeddings": False}),
        ("mixtral", "ARCH-SHAPE", {"num_local_experts": 5}),
        ("mixtral", "ARCH-EXPERTS", {"num_experts_per_tok": 5}),
        ("qwen3-moe", "ARCH-CONFIG-VALUE", {"norm_topk_prob": False}),
        ("qwen3-moe", "ARCH-CONFIG-VALUE", {"mlp_only_layers": [0]}),
        ("gemma2", "ARCH-CONFIG-VALUE", {"query_pre_attn_scalar": 144}),
        ("gemma2", "ARCH-CONFIG-VALUE", {"layer_types": ["full_attention"] * 2}),
        ("gemma3", "ARCH-CONFIG", {"layer_types": ["full_attention"] * 6}),
        ("phi3-longrope", "ARCH-CONFIG", {"rope_scaling": {"type": "longrope"}}),
        ("bert", "ARCH-CONFIG-VALUE", {"position_embedding_type": "relative_key"}),
    ],
)
def test_a_configuration_that_llama_cpp_would_not_run_is_refused(
    name: str, code: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    error = refused(write_directory(tmp_path / "m", name, config=fields))
    assert error.code == code
    assert "config.json" in str(error) or error.tensor


def test_an_unknown_architecture_is_told_which_there_are(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma2xForCausalLM"]}
    error = refused(write_directory(tmp_path / "m", "llama", config=config))
    assert isinstance(error, UnsupportedError)
    assert "near by name: Gemma2ForCausalLM" in str(error)
    assert "formats/gguf.md" in (error.hint or "")
    assert len(error.wanted or "") < 150
    assert "Gemma2xForCausalLM" in str(error)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    (directory / missing).unlink()
    error = refused(directory)
    assert missing in str(error)
    assert "--raw" in str(error.hint)


def test_a_file_by_itself_is_sent_to_its_directory(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    error = refused(directory / "model.safetensors")
    assert error.code == "ARCH-NO-CONFIG"
    assert "directory" in str(error.hint)


def test_what_is_no_sentencepiece_model_is_told_how_to_become_json(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    error = refused(directory)
    assert error.code == "ARCH-TOKENIZER-FILE"
    assert "save_pretrained" in str(error.hint)


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "llama")
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (directory / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError) as caught:
        open_model(directory)
    assert caught.value.code == "ST-OUTSIDE"


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = weights(CONFIGS["bert"])
    twice = "bert.embeddings.word_embeddings.weight"
    tensors[twice] = tensors["embeddings.word_embeddings.weight"].copy()
    error = refused(write_directory(tmp_path / "m", "bert", tensors=tensors))
    assert error.code == "ARCH-TENSOR-TWICE"


def test_a_tensor_of_a_quantized_dtype_is_refused(tmp_path: Path) -> None:
    tensors = weights(CONFIGS["llama"])
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    error = refused(write_directory(tmp_path / "m", "llama", tensors=tensors))
    assert (error.code, error.tensor) == ("ARCH-DTYPE", name)


@pytest.mark.parametrize("change", ["missing", "too many", "other dtype"])
def test_experts_that_are_not_whole_are_refused(change: str, tmp_path: Path) -> None:
    tensors = weights(CONFIGS["mixtral"])
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    if change == "missing":
        del tensors[name.format(2)]
    elif change == "too many":
        tensors[name.format(4)] = tensors[name.format(3)].copy()
    else:
        tensors[name.format(2)] = tensors[name.format(2)].astype(np.float16)
    error = refused(write_directory(tmp_path / "m", "mixtral", tensors=tensors))
    wanted = "ARCH-EXPERT-DTYPES" if change == "other dtype" else "ARCH-EXPERTS"
    assert (error.code, error.tensor) == (wanted, "blk.1.ffn_gate_exps.weight")


def changed(kind: str, **model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(json.dumps(TOKENIZERS[kind]))
    fields["model"] |= model
    return fields


@pytest.mark.parametrize(
    ("code", "fields"),
    [
        ("ARCH-TOKENIZER-FILE", {}),
        ("ARCH-TOKENIZER-FILE", {"model": []}),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", merges=[])),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", merges=["a b c"])),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", vocab=["a"])),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", vocab={"a": 0, "b": 0})),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", vocab={"a": -1})),
        ("ARCH-TOKENIZER-FILE", TOKENIZERS["llama-bpe"] | {"added_tokens": [{"id": 3}]}),
        # one text twice: llama.cpp would end the process
        (
            "ARCH-TOKENIZER-FILE",
            TOKENIZERS["llama-bpe"] | {"added_tokens": [{"id": 272, "content": "he"}]},
        ),
        (
            "ARCH-VOCABULARY",
            TOKENIZERS["llama-bpe"] | {"added_tokens": [{"id": 999, "content": "x"}]},
        ),
        ("ARCH-TOKENIZER", changed("llama-bpe", type="WordLevel")),
        ("ARCH-TOKENIZER", changed("llama-bpe", end_of_word_suffix="</w>")),
        ("ARCH-TOKENIZER", changed("sp-llama", merges=[["h", "e"]])),
        ("ARCH-TOKENIZER", changed("unigram", byte_fallback=True)),
        ("ARCH-TOKENIZER", changed("unigram", unk_id=None)),
        ("ARCH-TOKENIZER", changed("unigram", unk_id=99)),
        ("ARCH-TOKENIZER", changed("wordpiece", unk_token="[NONE]")),
        ("ARCH-TOKENIZER", changed("sp-llama", byte_fallback=False)),
        # an escaped space shows SentencePiece, one byte has no token
        (
            "ARCH-TOKENIZER",
            changed(
                "sp-llama",
                vocab={
                    t.replace("<0x0A>", "<none>"): i
                    for t, i in TOKENIZERS["sp-llama"]["model"]["vocab"].items()
                },
            ),
        ),
        ("ARCH-TOKENIZER-FILE", changed("llama-bpe", vocab={})),
        ("ARCH-TOKENIZER-FILE", changed("unigram", vocab=[])),
        ("ST-JSON", changed("unigram", vocab=[["<unk>", 10**400]])),
        ("ARCH-TOKENIZER-FILE", changed("unigram", vocab=[["<unk>", 1e300]])),
        ("ARCH-TOKENIZER-FILE", changed("sp-llama", vocab={"▁" * 200_000: 0})),
        (
            "ARCH-TOKENIZER",
            changed(
                "sp-llama",
                vocab=TOKENIZERS["sp-llama"]["model"]["vocab"],
                merges=[["h", "e"]],
            ),
        ),
        *(
            (
                "ARCH-TOKENIZER-FILE",
                TOKENIZERS["unigram"]
                | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}},
            )
            for text in ("é", "AAAA", "/////w==", "AAAAAAAAAAA", "A" * 8_000_000)
        ),
        ("ARCH-TOKENIZER-FILE", changed("unigram", vocab=[["a", "b"]])),
        ("ARCH-TOKENIZER", changed("wordpiece", continuing_subword_prefix="@@")),
        (
            "ARCH-PRE-TOKENIZER",
            TOKENIZERS["llama-bpe"]
            | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    code: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    tensors = weights(CONFIGS["llama"] | {"vocab_size": 400})
    directory = write_directory(
        tmp_path / "m", "llama", config={"vocab_size": 400}, tensors=tensors, tokenizer=fields
    )
    error = refused(directory)
    assert error.code == code
    assert "tokenizer.json" in str(error)


def test_a_pre_tokenizer_is_named_for_byte_level_bpe_only(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "m", "mistral")
    assert refused(directory, pre_tokenizer="gpt-2").code == "ARCH-PRE-TOKENIZER"


CARDS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    # front matter, what is taken of it, the warning
    "a tab after a value": (
        "license: mit\t\ntags:\t[a]\n", {"license": "mit", "tags": ["a"]}, None
    ),
    "two colons": (
        "license: other\nlicense_name: ours: v2\nmodel_name: M\n",
        {"license": "other", "name": "M"},
        "field 'license_name' of README.md is left out: it is not YAML",
    ),
    "no fields": (": : :\n", {}, "begins with a rule"),
    "a list": ("- a\n", {}, "begins with a rule"),
    "text between rules": ("\n# A model\n\nTrained by us.\n", {}, "begins with a rule"),
    "fields that are not asked for": (
        "license: mit\nmodel-index:\n\t- x: [\n", {"license": "mit"}, None
    ),
    "Norwegian": ("language: no\n", {"languages": ["no"]}, None),
    "values that look like others": (
        "license: 1.0\ntags:\n- yes\n- 2024-01-01\n- 12:30:45\n- ~\n- 0x1F\n",
        {"license": "1.0", "tags": ["yes", "2024-01-01", "12:30:45", "0x1F"]},
        None,
    ),
    "nothing": ("license: null\nmodel_name:\ntags: []\n", {}, None),
    "a list for a text": (
        "license: [mit, gpl]\n", {}, "'license' of README.md is left out: it is no text"
    ),
    "an unknown tag": ("license: !!python/object:os.system x\n", {"license": "x"}, None),
    "an alias": ("tags: &a [x]\nlanguage: *a\n", {"tags": ["x"]}, "'language' of README.md"),
    "brackets": ("tags: " + "[" * 9000 + "\n", {}, "nested too deep"),
    "a very long text": ("license: " + "x" * 2000 + "\n", {}, "more than 1,000 characters"),
    "half a character": (
        'license: "\\ud800"\ntags: [a]\n', {"tags": ["a"]}, "'license' of README.md is left out"
    ),
    "the same field twice": ("license: mit\nlicense: other\n", {"license": "other"}, None),
    "a folded text": ("license: >\n  a\n  b\n", {"license": "a b"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_a_card_never_stops_a_conversion(name: str, tmp_path: Path) -> None:
    matter, wanted, said = CARDS[name]
    directory = write_directory(tmp_path / "m", "llama")
    (directory / "README.md").write_text(f"---\n{matter}---\n# Card\n")
    source = opened(directory)
    found = plain(source)
    for key in ("license", "license.name", "name", "tags", "languages"):
        assert found.get(f"general.{key}") == wanted.get(key, "m" if key == "name" else None), key
    if said is None:
        assert source.warnings == ()
    else:
        (warning,) = source.warnings
        assert said in warning


@pytest.mark.parametrize(
    "matter",
    [
        b"language: " + b"1:" * 500_000 + b"1\n",  # a number to base 60 in YAML 1.1
        b"tags: [" + b"a," * 500_000 + b"]\n",
        b"tags:\n" + b"- a\n" * 250_000,
        b"x: y\n" * 200_000,
        b"\xff\xfe" * 500_000,
    ],
    ids=["sexagesimal", "flow", "block", "fields", "bytes"],
)
def test_a_card_of_a_megabyte_takes_no_time(matter: bytes, tmp_path: Path) -> None:
    started = time.process_time()
    card_keys(b"---\n" + matter + b"---\n", Path("README.md"))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("matter", [b"x: y\n" * 300_000, b"license: mit\n# A model\n"])
def test_a_card_whose_fields_have_no_end_gives_nothing(matter: bytes) -> None:
    keys, (warning,) = card_keys(b"---\n" + matter, Path("README.md"))
    assert keys == {}
    assert "no end in its first 1,048,576 bytes" in warning


def test_the_trained_sample_is_mapped() -> None:
    source = opened(SAMPLE)
    assert source.family.startswith("Llama")
    assert not source.warnings
    assert not source.dropped
    assert plain(source)["tokenizer.ggml.pre"] == "llama-bpe"
