"""Tokenizers of SentencePiece and of mistral-common, held against those libraries.

data/tokenizers has a model of each kind, trained on the sample's text and on awkward ones, and in
ids.json the tokens that sentencepiece 0.2 (bpe.model, unigram.model) and mistral-common 1.13
(tekken.json) give texts.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from awkward_texts import marked
from config_cases import Directories, unfolded
from conftest import ROOT, Call
from family_models import NARROW
from gguf import GGUFReader
from tiny_models import CONFIGS, weights, write_directory

from qconvert.architectures import open_gguf_source
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.files import open_model

DATA = ROOT / "tests" / "data" / "tokenizers"
IDS: list[list[Any]] = json.loads((DATA / "ids.json").read_text())
TABLE: dict[str, Any] = json.loads((ROOT / "tests" / "config_table.json").read_text())
FILES = {"bpe.model": 1, "unigram.model": 2, "tekken.json": 3}
# Where llama.cpp, whatever a file says, gives others: at marks; and after a user-defined piece,
# where it puts a space, as the tokenizers library does.
OTHERWISE: dict[str, Callable[[str], bool]] = {
    "bpe.model": lambda text: "    " in text,
    "unigram.model": lambda text: False,
    "tekken.json": marked,
}
TEKKEN = json.loads((DATA / "tekken.json").read_text())


def directory(place: Path, name: str, data: bytes | None = None) -> Path:
    """A tiny Llama with one of the tokenizers, or with other bytes in its place."""
    config = {"vocab_size": 760}
    made = write_directory(
        place, "llama", config=config, tensors=weights(CONFIGS["llama"] | config)
    )
    (made / "tokenizer.json").unlink()
    (made / "tokenizer_config.json").unlink()
    stored = name if name == "tekken.json" else "tokenizer.model"
    (made / stored).write_bytes((DATA / name).read_bytes() if data is None else data)
    return made


@pytest.mark.parametrize("name", FILES)
def test_llama_cpp_would_give_the_tokens_of_the_file_s_own_library(
    name: str, tmp_path: Path
) -> None:
    source = open_gguf_source(open_model(directory(tmp_path / "m", name)))
    assert source.warnings == () or name == "tekken.json"
    ours = LlamaTokenizer(source.metadata)
    texts = [row for row in IDS if not OTHERWISE[name](row[0])]
    assert len(texts) >= 100
    for row in texts:
        assert ours.encode(row[0]) == row[FILES[name]], row[0]


@pytest.mark.parametrize(
    ("name", "model", "begins", "ends"),
    [
        ("bpe.model", "llama", 1, None),
        ("unigram.model", "t5", None, 2),
        ("tekken.json", "gpt2", 1, None),
    ],
)
def test_the_file_says_what_surrounds_a_text(
    name: str, model: str, begins: int | None, ends: int | None, tmp_path: Path, call: Call
) -> None:
    place, path = directory(tmp_path / "m", name), tmp_path / "m.gguf"
    assert call("quantize", place, "--scheme", "f32", "-o", path).code == 0
    fields = GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.ggml.{key}"].contents()

    assert value("model") == model
    assert value("add_bos_token") is (begins is not None)
    assert value("add_eos_token") is (ends is not None)
    assert value("bos_token_id") == 1
    assert value("eos_token_id") == 2
    tokens = value("tokens")
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    if name == "bpe.model":
        types = dict(zip(tokens, value("token_type"), strict=True))
        # unknown, control, user-defined, byte, normal: llama.cpp's numbers
        assert [types[t] for t in ("<unk>", "<s>", "<code>", "<0x41>", "e")] == [2, 3, 4, 6, 1]
    if name == "tekken.json":
        assert tokens[5] == "[IMG]"
        assert tokens[29] == "<SPECIAL_29>"  # nobody has named it
    assert call("verify", path, "--against", place).code == 0


@pytest.mark.parametrize("name", FILES)
def test_the_tokens_are_compared_with_the_library_s(name: str, tmp_path: Path) -> None:
    """Which does not take what lacks a field, and then there are none."""
    pytest.importorskip("tokenizers")
    source = open_gguf_source(open_model(directory(tmp_path / "m", name)))
    assert not [note for note in source.notes if "not compared" in note]


def test_tokenizer_config_adds_tokens_and_says_what_surrounds_a_text(
    tmp_path: Path, call: Call
) -> None:
    place, path = directory(tmp_path / "m", "bpe.model"), tmp_path / "m.gguf"
    token = {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False}
    settings = {
        "add_bos_token": False, "add_eos_token": True, "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"421": token, "0": {"content": "<unk>", "special": True}},
    }  # fmt: skip
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "added_tokens.json").write_text(json.dumps({"<more>": 420}))
    assert call("quantize", place, "--scheme", "f32", "-o", path).code == 0
    fields = GGUFReader(path).fields
    assert fields["tokenizer.ggml.tokens"].contents()[420:422] == ["<more>", "<|im_end|>"]
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_tiktoken_s_file_is_one_of_kimi_k2(tmp_path: Path, call: Call) -> None:
    """Whose type transformers has under another name; the expression of its code is known."""
    shapes = unfolded(TABLE["tensors"][TABLE["bases"]["deepseek_v3"]["tensors"]])
    rows = len(TEKKEN["vocab"]) + 4
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (rows, 64))
    config = NARROW["deepseek_v3"] | {"model_type": "kimi_k2", "vocab_size": rows}
    place, path = Directories(tmp_path).made("deepseek_v3", config, shapes), tmp_path / "m.gguf"
    (place / "tokenizer.json").unlink()
    lines = [f"{t['token_bytes']} {t['rank']}" for t in TEKKEN["vocab"]]
    (place / "tiktoken.model").write_text("\n".join(lines) + "\n")
    token = {"content": "[BOS]", "special": True}
    settings = {"bos_token": "[BOS]", "added_tokens_decoder": {str(rows - 4): token}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    ran = call("quantize", place, "--scheme", "f32", "-o", path)
    assert ran.code == 0
    assert "pre-tokenizer 'kimi-k2': by the rules in tiktoken.model" in ran.out + ran.err
    if importlib.util.find_spec("tokenizers"):
        assert "not compared" not in ran.out + ran.err
    fields = GGUFReader(path).fields
    assert fields["general.architecture"].contents() == "deepseek2"
    assert fields["tokenizer.ggml.pre"].contents() == "kimi-k2"
    assert fields["tokenizer.ggml.bos_token_id"].contents() == rows - 4
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[97:100] == ["a", "b", "c"]
    assert tokens[32] == "Ġ"  # GPT-2's letter for a space
    assert fields["tokenizer.ggml.merges"].contents()
    lines[300] = "!" + lines[300]
    (place / "tiktoken.model").write_text("\n".join(lines))
    assert call("quantize", place, "--scheme", "f32", "-o", tmp_path / "n.gguf").code == 3
    other = NARROW["deepseek_v3"] | {"vocab_size": rows}
    (place / "config.json").write_text(json.dumps(other))
    lines[300] = lines[300][1:]
    (place / "tiktoken.model").write_text("\n".join(lines))
    ran = call("quantize", place, "--scheme", "f32", "-o", tmp_path / "n.gguf")
    told = "tiktoken.model does not say how text is cut"
    said = " ".join(ran.err.split())
    assert ran.code == 3
    assert f"found {told}" in said
    assert "--pre-tokenizer NAME" in said
    assert "ignore_merges" not in said  # what stands for its rules is none of the tokenizer
    assert "hash" not in said
    for name in ("gpt-2", "qwen2", "bloom"):
        line = ("quantize", place, "--scheme", "f32", "--pre-tokenizer", name, "--force")
        ran = call(*line, "-o", tmp_path / "n.gguf")
        said = " ".join((ran.out + ran.err).split())
        assert ran.code == 0, said
        assert f"tokens were not compared: {told}" in said
        assert "other tokens" not in said
        assert "would write" not in said


def varint(number: int) -> bytes:
    low = number & 0x7F
    return bytes([low]) if number < 0x80 else bytes([low | 0x80]) + varint(number >> 7)


def part(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def changed(**fields: Any) -> bytes:
    return json.dumps(TEKKEN | fields).encode()


def without_a_byte() -> list[dict[str, Any]]:
    one = {"rank": 3, "token_bytes": base64.b64encode(b"zzz").decode(), "token_str": "zzz"}
    return [*TEKKEN["vocab"][:3], one, *TEKKEN["vocab"][4:]]


BPE = (DATA / "bpe.model").read_bytes()
BROKEN = {
    "cut off": ("tokenizer.model", BPE[:-5]),
    "no end": ("tokenizer.model", b"\xff" * 20),
    "another kind of field": ("tokenizer.model", b"\x0b" + BPE),
    "empty": ("tokenizer.model", b""),
    "a piece twice": ("tokenizer.model", part(1, part(1, b"a")) * 2 + BPE),
    "no text": ("tokenizer.model", part(1, part(1, b"\xff")) + BPE),
    "of words": ("tokenizer.model", BPE + part(2, b"\x18\x03")),
    "no config": ("tekken.json", json.dumps({"vocab": []}).encode()),
    "a list": ("tekken.json", b"[]"),
    "fewer tokens": ("tekken.json", changed(vocab=TEKKEN["vocab"][:300])),
    "no pattern": ("tekken.json", changed(config=TEKKEN["config"] | {"pattern": None})),
    "no byte": ("tekken.json", changed(vocab=without_a_byte())),
    "no base64": ("tekken.json", changed(vocab=[{"rank": 0, "token_bytes": "?"}] * 700)),
    "special twice": (
        "tekken.json",
        changed(special_tokens=[{"rank": i, "token_str": "<s>"} for i in (0, 1)]),
    ),
    "a rank beyond": ("tekken.json", changed(special_tokens=[{"rank": 30, "token_str": "<s>"}])),
    "another pattern": ("tekken.json", changed(config=TEKKEN["config"] | {"pattern": "x+"})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line(name: str, tmp_path: Path, call: Call) -> None:
    stored, data = BROKEN[name]
    place = directory(
        tmp_path / "m", "tekken.json" if stored == "tekken.json" else "bpe.model", data
    )
    ran = call("quantize", place, "--scheme", "f32", "-o", tmp_path / "m.gguf")
    assert ran.code == 3
    assert stored in ran.err
    assert not (tmp_path / "m.gguf").exists()
