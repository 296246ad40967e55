"""llama.cpp itself loads what is written, and computes what transformers recorded.

Golden values: golden/regenerate.py. A tokenizer's differences that are llama.cpp's own are listed.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward_texts import (
    LETTERS_ALONE,
    OTHERWISE_CUT,
    awkward,
    directory_with,
    marked,
    trained,
)
from conftest import ROOT
from numpy.typing import NDArray
from pretokenizer_data import TABLE, digest, uncut
from tiny_models import CONFIGS, TOKENIZERS, added, charsmap, weights, write_directory

from qconvert.architectures import open_gguf_source
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.architectures.pretokenizers import NAMES
from qconvert.architectures.token_check import AWKWARD, COMPOSED, HANGUL, ORDINARY
from qconvert.files import open_model
from qconvert.files.gguf_split import SplitGgufWriter, plan_shards, shard_path
from qconvert.files.gguf_writer import GgufTensor, GgufWriter

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp: pip install qconvert[llama]")

GOLDEN: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "architectures.json").read_text())
RECORDED: dict[str, Any] = json.loads(TABLE.read_text())
CUTS = RECORDED["cuts"]
SAMPLE = ROOT / "samples" / "tiny-llama"
CONTEXT = 256
EVERY = 9

# ggml computes GELU from a table of binary16.
TOLERANCE = {"gemma2": 1e-3, "gemma3": 1e-3, "bert": 2e-3}
# What llama.cpp does otherwise, whatever the file says.
OTHERWISE = {
    # a run of spaces is one piece of text to SentencePiece, several to transformers' Metaspace
    "unigram": {"  two  spaces,   three\n\n\nlines\ttab  ", "x = 12\r\n\r\n    y", " "},
}


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: object) -> None:
    """llama.cpp writes to stderr otherwise."""


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))


def write_gguf(
    directory: Path,
    path: Path,
    matrices: str = "F32",
    limit: int | None = None,
    pre_tokenizer: str | None = None,
) -> Path:
    """A directory as GGUF, matrices in one type and what llama.cpp wants so in F32.

    With a limit in several files; the first is returned.
    """
    source = open_gguf_source(open_model(directory), pre_tokenizer=pre_tokenizer, compare=False)
    kept = ("norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight")
    tensors = [
        GgufTensor(
            t.name,
            t.shape,
            "F32" if len(t.shape) < 2 or t.name.endswith(kept) else matrices,
        )
        for t in source.model.tensors
    ]
    writer: GgufWriter | SplitGgufWriter
    if limit is None:
        writer = GgufWriter(path, source.metadata, tensors)
    else:
        counts = plan_shards(tensors, limit)
        paths = [shard_path(path, n + 1, len(counts)) for n in range(len(counts))]
        writer, path = SplitGgufWriter(paths, source.metadata, tensors, counts), paths[0]
    for i, (tensor, written) in enumerate(zip(source.model.tensors, tensors, strict=True)):
        writer.begin(i)
        stored = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}[written.ggml_type]
        for start in range(0, tensor.size, 1000):
            part = source.model.values(tensor, start, min(start + 1000, tensor.size))
            writer.append(part.astype(stored).tobytes())
    writer.finish()
    source.model.close()
    return path


@contextmanager
def loaded(path: Path) -> Iterator[Any]:
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path.name}"
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def outputs(model: Any, ids: list[int], *, encoder: bool = False) -> NDArray[np.float32]:
    """Logits, or hidden states of an encoder, for every token: (tokens, width)."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = 0  # a cache in F32, as transformers has it
    parameters.flash_attn_type = 0
    if encoder:
        parameters.embeddings, parameters.pooling_type = True, 0
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    batch.n_tokens = len(ids)
    if llama_cpp.llama_model_has_encoder(model) and llama_cpp.llama_model_has_decoder(model):
        assert llama_cpp.llama_encode(context, batch) == 0  # the same text for both
    run = llama_cpp.llama_encode if encoder else llama_cpp.llama_decode
    assert run(context, batch) == 0
    if encoder:
        width, row = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_get_embeddings_ith
    else:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        width, row = llama_cpp.llama_vocab_n_tokens(vocabulary), llama_cpp.llama_get_logits_ith
    found = [np.ctypeslib.as_array(row(context, i), (width,)).copy() for i in range(len(ids))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(found)


def tokenized(model: Any, text: str, around: bool = True) -> list[int]:
    """Tokens with those that surround a text; special ones in the text are taken as such."""
    data, space = text.encode(), (llama_cpp.llama_token * 500)()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), space, 500, around, True)
    assert count >= 0
    return list(space[:count])


def largest_error(found: NDArray[np.float32], golden: dict[str, Any]) -> float:
    """Relative to the largest output of all."""
    return max(
        float(np.abs(found[int(position), ::EVERY] - np.array(wanted)).max()) / golden["largest"]
        for position, wanted in golden["outputs"].items()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / name, name)
    with loaded(write_gguf(directory, tmp_path / "m.gguf")) as model:
        found = outputs(model, GOLDEN[name]["ids"], encoder=name == "bert")
    assert largest_error(found, GOLDEN[name]) < TOLERANCE.get(name, 5e-5)


@pytest.mark.parametrize("name", ["my-phi3-merge", "Phi-3.5", "modern-bert"])
def test_llama_cpp_loads_a_model_whose_name_it_goes_by(name: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / name, "llama")
    with loaded(write_gguf(directory, tmp_path / "m.gguf")) as model:
        for text, wanted in GOLDEN["tokenizer llama-bpe"].items():
            assert tokenized(model, text) == wanted, text


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-moe", "bert"])
def test_half_precision_stays_within_a_hundredth(name: str, tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "tiny", name)
    with loaded(write_gguf(directory, tmp_path / "m.gguf", "F16")) as model:
        found = outputs(model, GOLDEN[name]["ids"], encoder=name == "bert")
    assert largest_error(found, GOLDEN[name]) < 1e-2


def test_llama_cpp_finds_all_files_of_a_split_model(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "tiny", "qwen3")
    first = write_gguf(directory, tmp_path / "m.gguf", limit=100_000)
    assert first.name == "m-00001-of-00006.gguf"
    with loaded(first) as model:
        assert largest_error(outputs(model, GOLDEN["qwen3"]["ids"]), GOLDEN["qwen3"]) < 5e-5


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_tokenizes_as_the_tokenizers_library_does(kind: str, tmp_path: Path) -> None:
    using = "bert" if kind == "wordpiece" else "llama"
    size = {"vocab_size": 700}
    fields = {**CONFIGS[using], **size}
    directory = write_directory(
        tmp_path / "tiny", using, config=size, tensors=weights(fields), tokenizer=TOKENIZERS[kind]
    )
    with loaded(write_gguf(directory, tmp_path / "m.gguf")) as model:
        for text, wanted in GOLDEN[f"tokenizer {kind}"].items():
            if text not in OTHERWISE.get(kind, ()):
                assert tokenized(model, text) == wanted, text


# Tokenizers besides `TOKENIZERS`: what differs in each, the pre-tokenizer and general.name.
VARIANTS: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "tekken": ("llama-bpe", {}, "tekken", "tiny"),
    "gpt-4o": ("qwen2", {}, "gpt-4o", "tiny"),
    "smaug-bpe": ("qwen2", {}, "smaug-bpe", "tiny"),
    "a name with phi-3": (
        "sp-llama",
        {
            "added_tokens": [
                *TOKENIZERS["sp-llama"]["added_tokens"],
                *(added(600 + i, text) for i, text in enumerate(["<|endoftext|>", "<|user|>"])),
            ]
        },
        None,
        "Phi-3 tiny",
    ),
    "cased": (
        "wordpiece",
        {"normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": False}},
        None,
        "tiny",
    ),
    "normalized": (
        "unigram",
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": charsmap(
                    {"ﬁ": "fi", "\t": " ", "\u00a0": " ", "É": "e", "é": "e", "ab": "b", "abc": "c"}
                ),
            }
        },
        None,
        "tiny",
    ),
    "spaces merged": (
        "unigram",
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}},
        None,
        "tiny",
    ),
}
TEXTS = (
    *(*ORDINARY, *AWKWARD, COMPOSED, HANGUL, "", "x" * 120, "quickly testing the foxes", "▁▁ a"),
    *("a<tool>b<|end|>c</s> d[SEP] e", "<s>  a", "[MASK] x<unk> y", "\x0b\x0c\x85 a\u2028b\u3000c"),
    *(
        "<|user|> \n a</s> b<|endoftext|> c",
        "don'T 'S 'l 'll're",
        "abc abd",
        "İstanbul ß ŞşÉé éa Éa ΩΣ",
        "it is at  the\n\nand  ",
        "12345 ½ Ⅷ",
    ),
)


def compared(tmp_path: Path, kind: str, fields: dict[str, Any], pre: str | None, name: str) -> None:
    """Our model of llama.cpp against llama.cpp, on every text."""
    using = "bert" if kind == "wordpiece" else "llama"
    size = {"vocab_size": 700}
    directory = write_directory(
        tmp_path / name,
        using,
        config=size,
        tensors=weights({**CONFIGS[using], **size}),
        tokenizer=TOKENIZERS[kind] | fields,
    )
    settings = directory / "tokenizer_config.json"
    as_it_is = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | as_it_is))
    source = open_gguf_source(open_model(directory), pre_tokenizer=pre, compare=False)
    ours = LlamaTokenizer(source.metadata)
    before, after = ours.around
    with loaded(write_gguf(directory, tmp_path / "m.gguf", pre_tokenizer=pre)) as model:
        for text in TEXTS:
            assert [*before, *ours.encode(text), *after] == tokenized(model, text), text


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_our_model_of_llama_cpp_gives_its_tokens(kind: str, tmp_path: Path) -> None:
    compared(tmp_path, kind, {}, None, "tiny")


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_model_of_llama_cpp_knows_its_variants(variant: str, tmp_path: Path) -> None:
    compared(tmp_path, *VARIANTS[variant])


@pytest.mark.parametrize(("expressions", "ignore_merges"), NAMES)
def test_awkward_texts_of_every_pre_tokenizer(
    expressions: tuple[str, ...], ignore_merges: bool, tmp_path: Path
) -> None:
    """llama.cpp, our model of it, and the tokenizers library on 2,000 texts."""
    import tokenizers

    fields = trained(expressions, ignore_merges)
    directory = directory_with(fields, tmp_path / "tiny")
    source = open_gguf_source(open_model(directory), compare=False)
    name = NAMES[expressions, ignore_merges]
    assert source.metadata["tokenizer.ggml.pre"] == name
    ours, library = (
        LlamaTokenizer(source.metadata),
        tokenizers.Tokenizer.from_str(json.dumps(fields)),
    )
    before, after = ours.around
    texts, different = awkward(1), 0
    with loaded(write_gguf(directory, tmp_path / "m.gguf")) as model:
        for text in texts:
            found = tokenized(model, text)
            assert [*before, *ours.encode(text), *after] == found, text
            if not (marked(text) and name in LETTERS_ALONE):
                different += found != [*before, *library.encode(text).ids, *after]
    assert different <= OTHERWISE_CUT.get(name, 0) * len(texts)


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_texts_as_recorded(name: str, tmp_path: Path) -> None:
    """test_pretokenizers.py holds our model of it against the record."""
    directory = directory_with(uncut(RECORDED["vocabulary"]), tmp_path / "uncut")
    with loaded(write_gguf(directory, tmp_path / "m.gguf", pre_tokenizer=name)) as model:
        ids = [tokenized(model, text, around=False) for text in awkward(5, more=True)]
    assert digest(ids) == CUTS[name]["tokens"]


def test_the_trained_sample_goes_on_as_in_transformers(tmp_path: Path) -> None:
    golden = GOLDEN["sample tiny-llama"]
    with loaded(write_gguf(SAMPLE, tmp_path / "m.gguf")) as model:
        assert largest_error(outputs(model, golden["ids"]), golden) < 5e-5
        for text, wanted in golden["tokens"].items():
            assert tokenized(model, text) == wanted, text
        ids = list(golden["prompt"])
        for _ in golden["greedy"]:
            ids.append(int(outputs(model, ids)[-1].argmax()))
    assert ids[len(golden["prompt"]) :] == golden["greedy"]
