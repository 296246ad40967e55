"""GGUF files that become directories of other tools: configuration, tokenizer, names and codes."""

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
from safetensors.numpy import load_file
from test_restored import exact_in_a_sum, halves
from tiny_models import CONFIGS, TOKENIZERS, weights, write_directory

import qconvert
from qconvert.architectures import made_tokenizer, token_check
from qconvert.architectures.llama_pretokenizers import plain_name
from qconvert.architectures.pretokenizer_names import LOADED
from qconvert.cli.main import main
from qconvert.files import open_model

SAMPLE = ROOT / "samples" / "tiny-llama"
DECODERS = [name for name in CONFIGS if name != "bert"]
TEXTS = (
    "the quick brown fox and the end",
    " leading,  two   spaces\n\nand lines\t.",
    "It's 12345, DON'T they'll éa数字😀",
    "to <tool> go<|end|>start",
    "<s>is at the</s>",
)


def as_gguf(directory: Path, out: Path, call: Call, scheme: str = "f32", *more: Any) -> Path:
    done = call("quantize", directory, "--scheme", scheme, "-o", out, *more)
    assert done.code == 0, done.err
    return out


# --- the configuration and the tokenizer, made of the file ---


def logits(directory: Path) -> NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        found = model.eval()(torch.arange(3, 43)[None], use_cache=False).logits
    return np.asarray(found.numpy(), np.float32)


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_made_of_the_file_computes_what_the_model_did(
    name: str, tmp_path: Path, call: Call
) -> None:
    source = exact_in_a_sum(weights(CONFIGS[name]))
    directory = write_directory(tmp_path / "tiny", name, tensors=source)
    made = as_gguf(directory, tmp_path / "m.gguf", call)
    done = call("quantize", made, "--scheme", "f32", "--format", "hf", "-o", tmp_path / "back")
    assert done.code == 0, done.err
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == source.keys()
    for tensor, values in source.items():
        assert back[tensor].tobytes() == values.tobytes(), tensor
    assert logits(tmp_path / "back").tobytes() == logits(directory).tobytes()


@pytest.mark.parametrize("kind", [k for k in TOKENIZERS if k not in ("wordpiece", "unigram")])
def test_the_tokenizer_that_is_made_gives_the_tokens_of_the_model(
    kind: str, tmp_path: Path, call: Call
) -> None:
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    name = next(n for n in DECODERS if CONFIGS[n]["qconvert_tokenizer"] == kind) if kind in {
        c["qconvert_tokenizer"] for c in CONFIGS.values()
    } else "llama"  # fmt: skip
    rows = CONFIGS[name]["vocab_size"] if kind == CONFIGS[name]["qconvert_tokenizer"] else 600
    config = {"vocab_size": rows}
    directory = write_directory(
        tmp_path / "tiny", name, config=config, tokenizer=TOKENIZERS[kind],
        tensors=weights(CONFIGS[name] | config),
    )  # fmt: skip
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    made = as_gguf(directory, tmp_path / "m.gguf", call)
    done = call("quantize", made, "--scheme", "f16", "--format", "hf", "-o", tmp_path / "back")
    assert done.code == 0, done.err
    assert "other tokens" not in done.err
    one, other = (
        transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        for place in (directory, tmp_path / "back")
    )
    for text in TEXTS:
        ids = one(text)["input_ids"]
        assert other(text)["input_ids"] == ids, text
        assert (
            other.decode(ids, skip_special_tokens=True) == one.decode(ids, skip_special_tokens=True)
            or one.backend_tokenizer.decoder is None
        )
    assert (other.bos_token, other.eos_token) == (one.bos_token, one.eos_token)
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_sample_comes_back_with_its_tokenizer(tmp_path: Path, call: Call) -> None:
    transformers = pytest.importorskip("transformers")
    made = as_gguf(SAMPLE, tmp_path / "m.gguf", call, "bf16")
    done = call("quantize", made, "--scheme", "bf16", "--format", "hf", "-o", tmp_path / "back")
    assert done.code == 0, done.err
    original = load_file(SAMPLE / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: t.dtype for n, t in back.items()} == {n: t.dtype for n, t in original.items()}
    assert all(back[n].tobytes() == t.tobytes() for n, t in original.items())
    one, other = (
        transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        for place in (SAMPLE, tmp_path / "back")
    )
    text = (ROOT / "samples" / "eval.txt").read_text()[:20_000]
    assert other(text)["input_ids"] == one(text)["input_ids"]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["dtype"], config["rope_parameters"]["rope_theta"]) == ("bfloat16", 500000.0)


# --- codes that move ---


def unpermuted(path: Path) -> dict[str, NDArray[np.float32]]:
    """What gguf-py decodes, rows of queries and keys in transformers' order, by GGUF's names."""
    found = {}
    tensors = gguf.GGUFReader(path).tensors
    scales = {t.name.removesuffix(".scale"): t.data for t in tensors if t.name.endswith(".scale")}
    for tensor in tensors:
        if tensor.name.endswith(".scale"):
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values * scales.get(tensor.name.removesuffix(".weight"), np.float32(1))
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2], 0)
        found[tensor.name] = halves(values, heads) if heads else values
    return found


GGUF_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj":
              "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
              "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
PAIRS = [
    ("q4_0", "compressed-tensors"),
    ("q4_0", "mlx"),
    ("q4_0", "gptq"),
    ("q4_0", "awq"),
    ("q5_0", "compressed-tensors"),
    ("q5_0", "mlx"),
    ("q8_0", "compressed-tensors"),
    ("q8_0", "mlx"),
    ("q8_0", "gptq"),
    ("q4_1", "mlx"),
    ("q5_1", "mlx"),
    ("mxfp4", "compressed-tensors"),
    ("mxfp4", "mlx"),
    ("nvfp4", "compressed-tensors"),
    ("nvfp4", "mlx"),
]


@pytest.mark.parametrize(("scheme", "target"), PAIRS)
def test_every_code_moves_and_means_what_gguf_says(
    scheme: str, target: str, tmp_path: Path, call: Call
) -> None:
    plain = ("--output-tensor-type", "f16", "--token-embedding-type", "f16", "--pure")
    origin = SAMPLE
    if (scheme, target) == ("nvfp4", "mlx"):  # which has no scale of the tensor
        ends = ("--keep", "*embed_tokens*", "--keep", "lm_head*")
        origin = as_gguf(SAMPLE, tmp_path / "mlx", call, "nvfp4", "--format", "mlx", *ends)
        scheme, plain = "keep", ()
    source = as_gguf(origin, tmp_path / "m.gguf", call, scheme, *plain)
    out = tmp_path / "out"
    done = call(
        *(
            "quantize",
            source,
            "--scheme",
            "keep",
            "--exact",
            "--format",
            target,
            "-o",
            out,
            "--json",
        )
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    held = {"keep": "NVFP4", "nvfp4": "NVFP4_SCALED"}.get(scheme, scheme.upper())
    moved = [t for t in report["tensors"] if t["reason"] == f"moved exactly from {held}"]
    assert len(moved) == 28
    assert not any(t["reason"].startswith("decoded") for t in report["tensors"])
    wanted = unpermuted(source)
    with qconvert.load(out) as found:
        for layer in range(4):
            for name, short in GGUF_NAMES.items():
                values = found[f"model.layers.{layer}.{name}.weight"].dequantize()
                np.testing.assert_array_equal(values, wanted[f"blk.{layer}.{short}.weight"])
    proved = call("verify", out, "--against", source, "--exact")
    assert proved.code == 0, proved.out
    assert "decoded values of 28 tensors are those of --against" in proved.out


def test_blocks_that_no_directory_has_are_decoded_and_said(tmp_path: Path, call: Call) -> None:
    source = as_gguf(SAMPLE, tmp_path / "m.gguf", call, "iq4_nl", "--pure")
    line = ("quantize", source, "--scheme", "keep", "--format", "compressed-tensors")
    done = call(*line, "-o", tmp_path / "out")
    assert (done.code, "no quantized tensor moves" in done.err) == (3, True), done.err
    again = (*line[:3], "w4a16_g32", *line[4:], "-o", tmp_path / "out")
    refused = call(*again)
    assert (refused.code, "--allow-requantize" in refused.err) == (2, True), refused.err
    done = call(*again, "--allow-requantize")
    assert done.code == 0, done.err


def test_experts_are_taken_apart_and_stacked_with_their_blocks(tmp_path: Path, call: Call) -> None:
    fields = {"hidden_size": 64, "moe_intermediate_size": 64}
    config = CONFIGS["qwen3-moe"] | fields
    directory = write_directory(
        tmp_path / "tiny", "qwen3-moe", config=fields, tensors=weights(config)
    )
    plain = ("--output-tensor-type", "f16", "--token-embedding-type", "f16", "--pure")
    source = as_gguf(directory, tmp_path / "m.gguf", call, "q8_0", *plain)
    stacks = {t.name: gguf.quants.dequantize(t.data, t.tensor_type)
              for t in gguf.GGUFReader(source).tensors}  # fmt: skip
    for target, name in (
        ("compressed-tensors", "model.layers.1.mlp.experts.{}.up_proj.weight"),
        ("mlx", "model.layers.1.mlp.switch_mlp.up_proj.weight"),
    ):
        out = tmp_path / target
        done = call("quantize", source, "--scheme", "keep", "--format", target, "-o", out)
        assert done.code == 0, done.err
        with qconvert.load(out) as found:
            for expert in range(4):
                values = found[name.format(expert)].dequantize()
                mine = values if target != "mlx" else values[expert]
                np.testing.assert_array_equal(mine, stacks["blk.1.ffn_up_exps.weight"][expert])


# --- the original model's directory ---


@pytest.mark.parametrize("whole", [True, False])
def test_small_files_come_from_the_model_that_is_named(
    whole: bool, tmp_path: Path, call: Call
) -> None:
    directory = write_directory(tmp_path / "tiny", "qwen3", config={"transformers_version": "5"})
    source = as_gguf(directory, tmp_path / "m.gguf", call, "q8_0")
    if not whole:
        (directory / "model.safetensors").unlink()
    line = ("quantize", source, "--scheme", "keep", "--format", "mlx", "-o", tmp_path / "out")
    done = call(*line, "--config", directory)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers_version"] == "5"
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()


def test_names_of_other_architectures_come_with_their_weights(tmp_path: Path, call: Call) -> None:
    directory = write_directory(tmp_path / "tiny", "bert")
    source = as_gguf(directory, tmp_path / "m.gguf", call, "q8_0")
    line = ("quantize", source, "--scheme", "f32", "--format", "hf", "-o", tmp_path / "out")
    without = call(*line)
    assert (without.code, "--config" in without.err) == (3, True), without.err
    done = call(*line, "--config", directory)
    assert done.code == 0, done.err
    name = "encoder.layer.1.output.dense.weight"
    back = load_file(tmp_path / "out" / "model.safetensors")[name]
    blocks = {t.name: t for t in gguf.GGUFReader(source).tensors}["blk.1.ffn_down.weight"]
    np.testing.assert_array_equal(back, gguf.quants.dequantize(blocks.data, blocks.tensor_type))


def test_scales_of_binary16_make_the_directory_one_of_binary16(tmp_path: Path, call: Call) -> None:
    source = as_gguf(SAMPLE, tmp_path / "m.gguf", call, "q8_0")
    line = ("quantize", source, "--scheme", "keep", "--format", "compressed-tensors")
    done = call(*line, "--config", SAMPLE, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "config.json says float16, not bfloat16" in done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == np.float16


# --- refusals ---


def with_key(path: Path, key: str, value: str, call: Call, tmp_path: Path) -> Path:
    out = tmp_path / "changed.gguf"
    done = call("quantize", path, "--scheme", "f32", "--override-kv", f"{key}={value}", "-o", out)
    assert done.code == 0, done.err
    return out


def test_a_key_that_no_configuration_says_is_refused_by_name(tmp_path: Path, call: Call) -> None:
    directory = write_directory(tmp_path / "tiny", "llama")
    made = as_gguf(directory, tmp_path / "m.gguf", call)
    for key, value in (
        ("llama.attention.value_length", "int:8"),
        ("llama.rope.scaling.yarn_log_multiplier", "float:0.1"),
        ("llama.attention.causal", "bool:false"),
        ("llama.rope.scaling.type", "str:dynamic"),
    ):
        source = with_key(made, key, value, call, tmp_path)
        done = call("quantize", source, "--scheme", "f32", "--format", "hf", "-o", tmp_path / "o")
        assert (done.code, "--config" in done.err) == (3, True), done.err
        assert done.err.count("\nerror: ") + done.err.startswith("error: ") == 1, done.err
        assert not (tmp_path / "o").exists()
        source.unlink()


def test_a_directory_of_another_model_is_refused(tmp_path: Path, call: Call) -> None:
    source = as_gguf(write_directory(tmp_path / "a", "qwen3"), tmp_path / "m.gguf", call, "q8_0")
    other = write_directory(tmp_path / "b", "llama")
    wide = write_directory(
        tmp_path / "c", "qwen3", config={"intermediate_size": 128},
        tensors=weights(CONFIGS["qwen3"] | {"intermediate_size": 128}),
    )  # fmt: skip
    empty = tmp_path / "d"
    empty.mkdir()
    line = ("quantize", source, "--scheme", "keep", "--format", "mlx", "-o", tmp_path / "out")
    for place, why in (
        (other, "not of the model that the config describes"),
        (wide, "shape"),
        (empty, "no config.json"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        done = call(*line, "--config", place)
        assert (done.code, why in done.err) == (3, True), done.err


def test_the_option_is_for_gguf_files_into_directories(tmp_path: Path, call: Call) -> None:
    line = ("quantize", SAMPLE, "--scheme", "w4a16_g32", "-o", tmp_path / "o", "--config", SAMPLE)
    done = call(*line)
    assert (done.code, "--config goes with a GGUF file" in done.err) == (2, True), done.err
    source = as_gguf(SAMPLE, tmp_path / "m.gguf", call, "q8_0")
    done = call(
        *("quantize", source, "--scheme", "f16", "-o", tmp_path / "n.gguf", "--config", SAMPLE)
    )
    assert (done.code, "--config goes with a GGUF file" in done.err) == (2, True), done.err
    raw = as_gguf(SAMPLE, tmp_path / "raw.gguf", call, "q8_0", "--raw")
    done = call("quantize", raw, "--scheme", "keep", "--format", "mlx", "-o", tmp_path / "o")
    assert (done.code, "raw GGUF" in done.err) == (3, True), done.err


# Names that llama.cpp loads whose rules no tokenizer.json of ours says: two of byte-level BPE that
# are known by name alone, four of other kinds of tokenizers.
LEFT_OUT = {
    *("default", "afmoe"),
    *("gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"),
}


# Names whose tokenizers compose characters, and the family that they are named for: transformers
# builds that into its tokenizers (Qwen2's and Command-R's differ from llama.cpp's tokens at such
# texts alone: "Real tokenizers" in formats/gguf.md).
COMPOSING = {
    "qwen2": "qwen2",
    "qwen35": "qwen3_5",
    "command-r": "cohere",
    "olmo": "olmo",
    "mpt": "mpt",
}


@pytest.mark.parametrize("name", COMPOSING)
def test_transformers_composes_in_these_families(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    auto = pytest.importorskip("transformers.models.auto.tokenization_auto")
    kind = getattr(transformers, auto.TOKENIZER_MAPPING_NAMES[COMPOSING[name]])
    normalizer = kind(vocab={"a": 0}, merges=[]).backend_tokenizer.normalizer
    assert normalizer.normalize_str("cafe\u0301") == "caf\u00e9"


@pytest.fixture(scope="module")
def byte_level_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("named")
    source, made = write_directory(place / "tiny", "qwen3"), place / "m.gguf"
    assert main(["quantize", str(source), "--scheme", "f32", "-o", str(made)]) == 0
    return made


class Renamed:
    """A GGUF file with another name of its pre-tokenizer."""

    def __init__(self, gguf: Any, name: str) -> None:
        self.path, self.metadata, self._gguf, self._name = gguf.path, gguf.metadata, gguf, name

    def value(self, key: str) -> Any:
        return ("STRING", self._name) if key == "tokenizer.ggml.pre" else self._gguf.value(key)


@pytest.mark.parametrize("name", sorted(LOADED))
def test_a_tokenizer_of_any_pre_tokenizer_is_made_or_left_out_and_said(
    name: str, byte_level_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain_name(name) != name:  # the library is asked once about all names of the same
        monkeypatch.setattr(token_check, "library_tokens", lambda fields, texts: "not asked")
    with closing(open_model(byte_level_gguf)) as opened:
        gguf: Any = Renamed(opened, name)
        found = made_tokenizer(gguf)
    assert set(found.files) == (
        set() if name in LEFT_OUT else {"tokenizer.json", "tokenizer_config.json"}
    )
    if found.files:
        normalizer = json.loads(found.files["tokenizer.json"])["normalizer"]
        assert normalizer == ({"type": "NFC"} if name in COMPOSING else None)
    why = f"the directory has no tokenizer, for its kind is 'gpt2', pre-tokenizer '{name}'"
    assert [why in warning for warning in found.warnings if "no tokenizer" in warning] == (
        [True] if name in LEFT_OUT else []
    )


@pytest.mark.parametrize("name", ["default", "sarvam-moe"])
def test_a_tokenizer_of_an_unknown_kind_is_left_out_and_said(
    name: str, byte_level_gguf: Path, tmp_path: Path, call: Call
) -> None:
    source = with_key(byte_level_gguf, "tokenizer.ggml.pre", f"str:{name}", call, tmp_path)
    done = call("quantize", source, "--scheme", "f32", "--format", "hf", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "the directory has no tokenizer" in done.err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
