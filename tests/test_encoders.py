"""Encoders: tokens of trained tokenizers, pooling, heads that classify, and what is refused.

Tokens and outputs are held against transformers, and against llama.cpp where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_cases import BASES, Directories, text, unfolded
from conftest import ROOT, Call
from family_models import MORE, NARROW
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file
from tiny_models import charsmap

from qconvert.architectures import open_gguf_source, restored
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.architectures.token_check import AWKWARD, ORDINARY
from qconvert.errors import QconvertError
from qconvert.files import open_model
from qconvert.files.gguf_writer import GgufValue

TABLE: dict[str, Any] = json.loads((ROOT / "tests" / "config_table.json").read_text())
LLAMA = importlib.util.find_spec("llama_cpp") is not None
TEXTS = (
    *ORDINARY,
    *AWKWARD,
    "",
    "  ",
    "a<s>b</s> c",
    "x<mask> y",
    "12345 ½",
    "don'T 'll",
    "\u3000x",
)
SETTINGS = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
    "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
T5_SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]  # transformers has 2 for what is unknown
UNIGRAM = ("xlm-roberta", "jina_embeddings_v3", "t5-encoder")
CORPUS = [
    *ORDINARY,
    "the theatre is there",
    "test tests testing",
    "def g(y): return y",
    "日本 語",
] * 3


@pytest.fixture(scope="module")
def llama() -> Any:
    """llama.cpp in a process of its own; None where it is not installed."""
    if not LLAMA:
        return None
    from make_config_table import LlamaCpp

    return LlamaCpp()


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return unfolded(TABLE["tensors"][TABLE["bases"][name]["tensors"]])


def trained(kind: str) -> Any:
    """A tokenizer of the library, as files of XLM-RoBERTa and RoBERTa have it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install qconvert[hf]")
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    special = T5_SPECIAL if kind == "t5-encoder" else SPECIAL
    if kind in UNIGRAM:
        found = tokenizers.Tokenizer(models.Unigram())
        spaces = dict.fromkeys(("\t", "\n", "\r", "\u00a0", "\u3000"), " ")
        blob = charsmap(spaces | {"ﬁ": "fi", "①": "1", "Ⅷ": "VIII", "\u200b": " "})
        # as bge-m3 has it: not what transformers makes of it
        import base64

        found.normalizer = normalizers.Sequence(
            [
                normalizers.Precompiled(base64.b64decode(blob)),
                normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            ]
        )
        found.pre_tokenizer = pre_tokenizers.Metaspace()
        if kind == "t5-encoder":
            found.normalizer = normalizers.Precompiled(base64.b64decode(blob))
            found.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
            )
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        found = tokenizers.Tokenizer(models.BPE())
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
    found.train_from_iterator(CORPUS, trainer)
    if kind == "modernbert":  # whose tokenizer transformers takes as the file has it
        found.normalizer = normalizers.NFC()
        found.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    if kind == "t5-encoder":
        found.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
        return found
    found.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    return found


@pytest.mark.parametrize("kind", [*UNIGRAM, "roberta", "modernbert"])
def test_tokens_are_those_of_transformers(kind: str, tmp_path: Path, call: Call) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    directory = Directories(tmp_path).made(kind, NARROW[kind], shapes_of(kind))
    fields = json.loads(trained(kind).to_str())
    if kind in UNIGRAM:  # pieces of so small a corpus have equal scores, and cuts then tie
        pieces = fields["model"]["vocab"]
        fields["model"]["vocab"] = [[p, s - 1e-3 * i] for i, (p, s) in enumerate(pieces)]
    (directory / "tokenizer.json").write_text(json.dumps(fields))
    settings = SETTINGS
    if kind == "t5-encoder":
        settings = {n: SETTINGS[n] for n in ("eos_token", "unk_token", "pad_token")}
        settings |= {"extra_ids": 0}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert type(theirs).__name__ == {
        "xlm-roberta": "XLMRobertaTokenizer", "roberta": "RobertaTokenizer",
        "modernbert": "TokenizersBackend", "jina_embeddings_v3": "XLMRobertaTokenizer",
        "t5-encoder": "T5Tokenizer",
    }[kind]  # fmt: skip
    source = open_gguf_source(open_model(directory))
    ours = LlamaTokenizer(source.metadata)
    before, after = ours.around
    for each in TEXTS:
        assert [*before, *ours.encode(each), *after] == theirs(each).input_ids, each
    if LLAMA:
        from test_llama_cpp import loaded, tokenized

        path = tmp_path / "m.gguf"
        assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
        with loaded(path) as model:
            for each in TEXTS:
                assert tokenized(model, each) == theirs(each).input_ids, each


@pytest.mark.parametrize(
    ("mode", "number"), [("mean", 1), ("cls", 2), ("lasttoken", 3), ("none", 0)]
)
def test_pooling_is_that_of_sentence_transformers(
    mode: str, number: int, tmp_path: Path, call: Call, llama: Any
) -> None:
    directory = Directories(tmp_path).made(
        "xlm-roberta", NARROW["xlm-roberta"], shapes_of("xlm-roberta")
    )
    if mode != "none":
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "x.models.Pooling"},
        ]
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / "1_Pooling").mkdir()
        (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": mode}))
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
    fields = GGUFReader(path).fields
    assert fields["bert.pooling_type"].contents() == number
    # 258 positions, less those up to the padding's
    assert fields["bert.context_length"].contents() == 256
    if llama and number:
        each = llama.outputs(path, encoder=True)
        found = llama.outputs(path, encoder=True, pooled=True)
        assert not isinstance(each, str)
        wanted = {"mean": each.mean(axis=0), "cls": each[0], "lasttoken": each[-1]}[mode]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", ["model.", ""])
def test_an_embedding_model_of_qwen3_takes_the_last_token(
    inside: str, tmp_path: Path, call: Call, llama: Any
) -> None:
    """Published ones have names of tensors without the model's."""
    shapes = {n.replace("model.", inside, 1): s for n, s in shapes_of("qwen3").items()}
    shapes.pop("lm_head.weight", None)
    config = {**BASES["qwen3"], "tie_word_embeddings": True}
    directory = Directories(tmp_path).made("qwen3", config, shapes)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "x.models.Pooling"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    pooling = json.dumps({"pooling_mode_lasttoken": True})
    (directory / "1_Pooling" / "config.json").write_text(pooling)
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
    assert call("verify", path, "--against", directory).code == 0
    assert GGUFReader(path).fields["qwen3.pooling_type"].contents() == 3
    if not llama:
        return
    torch = pytest.importorskip("torch", reason="pip install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    model = transformers.AutoModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = model.eval()(torch.tensor([text()])).last_hidden_state[0, -1].numpy()
    found = llama.outputs(path, encoder=False, pooled=True)
    assert not isinstance(found, str), found
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def head_shapes(name: str, count: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model with a head, as transformers saves it."""
    base, inside, width = name.partition(",")[0], "roberta", 64
    if base == "modernbert":
        shapes = {f"model.{n}": s for n, s in shapes_of(base).items()}
        shapes |= {"head.dense.weight": (width, width), "head.norm.weight": (width,)}
        return shapes | {"classifier.weight": (count, width), "classifier.bias": (count,)}
    if base == "bert":
        shapes = shapes_of("bert")
        shapes |= {"classifier.weight": (count, width), "classifier.bias": (count,)}
        inside = "bert"
    else:
        shapes = {n: s for n, s in shapes_of(base).items() if "pooler" not in n}
        shapes |= {"classifier.dense.weight": (width, width), "classifier.dense.bias": (width,)}
        shapes |= {
            "classifier.out_proj.weight": (count, width), "classifier.out_proj.bias": (count,)
        }  # fmt: skip
    return {n if n.startswith("classifier.") else f"{inside}.{n}": s for n, s in shapes.items()}


LABELS: list[tuple[str, Mapping[str, Any], list[str]]] = [
    ("bert, classifier", {}, ["score"]),
    ("bert, classifier", {"id2label": None, "num_labels": 4}, [f"LABEL_{i}" for i in range(4)]),
    ("xlm-roberta, classifier", {}, ["bad", "good", "neither"]),
    ("xlm-roberta, classifier", {"id2label": None}, ["LABEL_0", "LABEL_1"]),
    ("modernbert, classifier", {}, ["score"]),
    ("modernbert, classifier", {"classifier_pooling": "cls"}, ["score"]),
    ("xlm-roberta, classifier", {"num_labels": 3}, ["bad", "good", "neither"]),
    (
        "xlm-roberta, classifier",
        {"id2label": {str(i): f"l{i}" for i in (10, *range(10))}},
        [f"l{i}" for i in range(11)],
    ),
]


@pytest.mark.parametrize(("name", "changes", "labels"), LABELS)
def test_a_head_gives_the_values_of_transformers(
    name: str, changes: Mapping[str, Any], labels: list[str], tmp_path: Path, call: Call, llama: Any
) -> None:
    config = {**MORE[name], **changes}
    shapes = head_shapes(name, len(labels))
    if name.startswith("bert"):
        config |= {"vocab_size": BASES["bert"]["vocab_size"], "max_position_embeddings": 256}
        config |= {"type_vocab_size": 2, "pad_token_id": 0}
    directory = Directories(tmp_path).made(config["model_type"], config, shapes)
    path = tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "-o", path)
    assert ran.code == 0
    assert ("scores of pairs" in ran.err) == name.startswith("bert")
    assert call("verify", path, "--against", directory).code == 0
    fields = GGUFReader(path).fields
    arch = "modern-bert" if name.startswith("modern") else "bert"
    assert fields[f"{arch}.pooling_type"].contents() == 4  # LLAMA_POOLING_TYPE_RANK
    assert fields[f"{arch}.classifier.output_labels"].contents() == labels
    # <s> A </s></s> B </s>, but [CLS] A [SEP] B [SEP]
    two = fields["tokenizer.ggml.add_sep_token"].contents()
    assert two == name.startswith("xlm-roberta")
    if not llama:
        return
    torch = pytest.importorskip("torch", reason="pip install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = model.eval()(torch.tensor([text()])).logits[0].numpy()
    found = llama.outputs(path, encoder=True, pooled=True)
    assert wanted.shape == (len(labels),)
    np.testing.assert_allclose(found, wanted, atol=3e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "changes", "code"),
    [
        ("xlm-roberta", {"pad_token_id": None}, "ARCH-CONFIG-VALUE"),
        ("xlm-roberta", {"pad_token_id": 257}, "ARCH-CONFIG-VALUE"),
        ("xlm-roberta", {"is_decoder": True}, "ARCH-CONFIG-VALUE"),
        ("xlm-roberta, classifier", {"id2label": {"1": "a", "2": "b", "3": "c"}}, "ARCH-CONFIG"),
        ("xlm-roberta, classifier", {"id2label": {"0": 1, "1": 2, "2": 3}}, "ARCH-CONFIG"),
        ("xlm-roberta, classifier", {"id2label": {}}, "ARCH-CONFIG"),
        ("xlm-roberta, classifier", {"num_labels": 7}, "ARCH-CONFIG"),
        ("xlm-roberta, classifier", {"id2label": {"0": "a"}}, "ARCH-SHAPE"),
        ("modernbert", {"rope_scaling": {"rope_type": "linear"}}, "ARCH-CONFIG-VALUE"),
        ("modernbert, classifier", {"classifier_bias": True}, "ARCH-CONFIG-VALUE"),
        ("modernbert, classifier", {"classifier_activation": "relu"}, "ARCH-CONFIG-VALUE"),
        ("modernbert, classifier", {"classifier_pooling": "max"}, "ARCH-CONFIG-VALUE"),
        ("xlm-roberta, classifier", {"architectures": ["XLMRobertaModel"]}, "ARCH-TENSOR-LEFT"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused_by_name(
    name: str, changes: Mapping[str, Any], code: str, tmp_path: Path
) -> None:
    config = {**(NARROW | MORE)[name], **changes}
    shapes = head_shapes(name, 3) if "," in name else shapes_of(name)
    directory = Directories(tmp_path).made(config["model_type"], config, shapes)
    with pytest.raises(QconvertError) as caught:
        open_gguf_source(open_model(directory))
    assert caught.value.code == code
    if code.startswith("ARCH-CONFIG"):
        assert next(iter(changes)) in str(caught.value)


def test_a_model_type_with_another_head_is_the_class_that_is_named(tmp_path: Path) -> None:
    shapes = head_shapes("xlm-roberta, classifier", 3)
    config = {
        **MORE["xlm-roberta, classifier"],
        "architectures": [BASES["bert"]["architectures"][0]],
    }
    directory = Directories(tmp_path).made("xlm-roberta", config, shapes)
    with pytest.raises(QconvertError):  # taken for XLMRobertaModel, by the model type
        open_gguf_source(open_model(directory))
    config["architectures"] = ["XLMRobertaForSequenceClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    labels = open_gguf_source(open_model(directory)).metadata["bert.classifier.output_labels"]
    assert isinstance(labels, GgufValue)
    assert labels.value == ["bad", "good", "neither"]


WIDE, WORDS = (64, 64), 0  # stands for the length of the vocabulary
# What a head for masked words has, as transformers saves it, and where the encoder is beside it.
MASKED: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "eurobert": ("EuroBertForMaskedLM", "model.", {"lm_head.weight": (WORDS, 64)}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "distilbert.",
        {
            "vocab_transform.weight": WIDE, "vocab_transform.bias": (64,),
            "vocab_layer_norm.weight": (64,), "vocab_layer_norm.bias": (64,),
            "vocab_projector.weight": (WORDS, 64), "vocab_projector.bias": (WORDS,),
        },
    ),
    "camembert": (
        "CamembertForMaskedLM",
        "roberta.",
        {
            "lm_head.dense.weight": WIDE, "lm_head.dense.bias": (64,),
            "lm_head.layer_norm.weight": (64,), "lm_head.layer_norm.bias": (64,),
            "lm_head.decoder.weight": (WORDS, 64), "lm_head.bias": (WORDS,),
        },
    ),
    "t5-encoder": ("T5EncoderModel", "", {"lm_head.weight": (WORDS, 64)}),
}  # fmt: skip


@pytest.mark.parametrize("tied", [None, False, True])
@pytest.mark.parametrize("name", MASKED)
def test_an_encoder_with_a_head_is_the_encoder_without_it(
    name: str, tied: bool | None, tmp_path: Path, call: Call
) -> None:
    """The head is another matrix than the token embedding, whatever the configuration says."""
    kind, inside, head = MASKED[name]
    config = {n: v for n, v in NARROW[name].items() if n != "tie_word_embeddings"}
    shapes = {n: s for n, s in shapes_of(name).items() if "pooler" not in n}
    plain = Directories(tmp_path / "plain").made(name, config, shapes)
    named = {f"{inside}{n}": v for n, v in load_file(plain / "model.safetensors").items()}
    drawn = np.random.default_rng(1)
    named |= {
        n: drawn.normal(size=[d or config["vocab_size"] for d in s]).astype(np.float32)
        for n, s in head.items()
    }
    directory = Directories(tmp_path / "headed").made(name, config, shapes)
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    config |= {"architectures": [kind]} | ({} if tied is None else {"tie_word_embeddings": tied})
    (directory / "config.json").write_text(json.dumps(config))
    files = [tmp_path / "plain.gguf", tmp_path / "headed.gguf"]
    for source, path in zip((plain, directory), files, strict=True):
        ran = call("quantize", source, "--scheme", "f32", "-o", path, "--json")
        assert ran.code == 0, ran.err
    said = " ".join(json.loads(ran.out)["notes"])
    assert all(f"'{n}' is left out" in said for n in head)
    assert "equals the token embedding" not in said
    assert call("verify", files[1], "--against", directory).code == 0
    both = [{t.name: t.data.tobytes() for t in GGUFReader(path).tensors} for path in files]
    assert both[0] == both[1]


def _dense_directory(
    home: Path, *, widths: tuple[int, ...] = (64, 160, 64), **settings: Any
) -> Path:
    """EmbeddingGemma as it is published: a transformer, the mean, matrices, length 1."""
    name = "gemma3_text-encoder"
    directory = Directories(home).made(name, NARROW[name], shapes_of(name))
    kinds = ["Transformer", "Pooling", *["Dense"] * (len(widths) - 1), "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"x.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    for i, (before, after) in enumerate(pairwise(widths), 2):
        place = directory / f"{i}_Dense"
        place.mkdir()
        fields = {
            "in_features": before, "out_features": after, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }  # fmt: skip
        (place / "config.json").write_text(json.dumps(fields | settings))
        values = np.random.RandomState(i).standard_normal((after, before)).astype(np.float32)
        save_file({"linear.weight": values}, place / "model.safetensors")
    return directory


def test_dense_modules_are_matrices_after_the_pooling(
    tmp_path: Path, call: Call, llama: Any
) -> None:
    directory = _dense_directory(tmp_path)
    path = tmp_path / "m.gguf"
    assert call("quantize", directory, "--scheme", "f32", "-o", path).code == 0
    assert call("verify", path, "--against", directory).code == 0
    reader = GGUFReader(path)
    keys = {n: f.contents() for n, f in reader.fields.items() if "dense_" in n}
    assert keys == {
        "gemma-embedding.dense_2_feat_in": 64, "gemma-embedding.dense_2_feat_out": 160,
        "gemma-embedding.dense_3_feat_in": 160, "gemma-embedding.dense_3_feat_out": 64,
    }  # fmt: skip
    tensors = {t.name: t.data for t in reader.tensors}
    matrices = [
        np.random.RandomState(i).standard_normal(shape).astype(np.float32)
        for i, shape in ((2, (160, 64)), (3, (64, 160)))
    ]
    for name, values in zip(("dense_2.weight", "dense_3.weight"), matrices, strict=True):
        np.testing.assert_array_equal(tensors[name], values)
    if not llama:
        return
    torch = pytest.importorskip("torch", reason="pip install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    model = transformers.AutoModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        hidden = model.eval()(torch.tensor([text()])).last_hidden_state[0].numpy()
    wanted = matrices[1] @ (matrices[0] @ hidden.mean(axis=0))
    found = llama.outputs(path, encoder=True, pooled=True)
    np.testing.assert_allclose(found, wanted, atol=3e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": True}, "bias"),
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, "activation_function"),
        ({"widths": (64, 160)}, "another width"),
        ({"widths": (64, 32, 64, 64)}, "more dense modules"),
        ({"in_features": 63}, "settings"),
    ],
)
def test_dense_modules_that_llama_cpp_cannot_compute_are_refused(
    changes: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    directory = _dense_directory(tmp_path, **changes)
    with pytest.raises(QconvertError, match=words) as caught:
        open_gguf_source(open_model(directory))
    assert caught.value.code == "ARCH-MODULE"


def _reranker(home: Path, settings: Mapping[str, Any] | None, tied: bool) -> Path:
    """A language model that is a reranker, by modules or by the title of its card."""
    shapes = shapes_of("qwen3")
    if tied:
        del shapes["lm_head.weight"]
    config = {**BASES["qwen3"], "tie_word_embeddings": tied}
    directory = Directories(home).made("qwen3", config, shapes)
    if settings is None:
        (directory / "README.md").write_text("---\nlicense: mit\n---\n\n# Qwen3-Reranker-0.6B\n")
        fields = json.loads((directory / "tokenizer.json").read_text())
        vocabulary = fields["model"]["vocab"]
        for token in ("yes", "no"):  # instead of two that no merge makes
            merged = {"".join(m) if isinstance(m, list) else m for m in fields["model"]["merges"]}
            old = next(t for t in reversed(vocabulary) if len(t) == 1 and t not in merged)
            vocabulary[token] = vocabulary.pop(old)
        (directory / "tokenizer.json").write_text(json.dumps(fields))
        return directory
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"x.{kind}"}
        for i, kind in enumerate(("Transformer", "LogitScore"))
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_LogitScore").mkdir()
    (directory / "1_LogitScore" / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("false", [9, None])
def test_a_reranker_has_the_rows_of_two_tokens(
    false: int | None, tied: bool, tmp_path: Path, call: Call, llama: Any
) -> None:
    directory = _reranker(tmp_path, {"true_token_id": 7, "false_token_id": false}, tied)
    path = tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "-o", path, "--json")
    assert ran.code == 0
    assert "scores texts by the tokens" in ran.out
    assert call("verify", path, "--against", directory).code == 0
    reader = GGUFReader(path)
    tensors = {t.name: t.data for t in reader.tensors}
    source = open_model(directory)
    ending = "embed_tokens.weight" if tied else "lm_head.weight"
    head = next(t for t in source.tensors if t.name.endswith(ending))
    matrix = source.values(head, 0, head.size).reshape(head.shape)
    wanted = np.stack([matrix[7], matrix[9] if false else np.zeros(64)]).astype(np.float32)
    np.testing.assert_array_equal(tensors["cls.output.weight"], wanted)
    assert "output.weight" not in tensors
    assert reader.fields["qwen3.pooling_type"].contents() == 4  # LLAMA_POOLING_TYPE_RANK
    source.close()
    # a tied model comes back whole, another one is without its output matrix
    place = directory / "config.json"
    shapes = {t.name: t.shape for t in source.tensors}
    asked = (open_model(path), json.loads(place.read_text()), place, shapes)
    if tied:
        back = restored(*asked)
        assert {t.name for t in back.model.tensors} == shapes.keys()
        back.model.close()
    else:
        with pytest.raises(QconvertError, match="not of the model"):
            restored(*asked)
    if not llama:
        return
    torch = pytest.importorskip("torch", reason="pip install qconvert[hf]")
    transformers = pytest.importorskip("transformers", reason="pip install qconvert[hf]")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(torch.tensor([text()])).logits[0, -1].numpy()
    good, bad = np.exp(logits[7]), np.exp(logits[9]) if false else 1.0
    found = llama.outputs(path, encoder=False, pooled=True)
    np.testing.assert_allclose(found, np.array([good, bad]) / (good + bad), atol=1e-4)


def test_a_reranker_of_qwen_is_known_by_the_title_of_its_card(tmp_path: Path, call: Call) -> None:
    directory = _reranker(tmp_path, None, True)
    path = tmp_path / "m.gguf"
    ran = call("quantize", directory, "--scheme", "f32", "-o", path, "--json")
    assert ran.code == 0
    assert "title of README.md" in ran.out
    fields = GGUFReader(path).fields
    assert fields["qwen3.classifier.output_labels"].contents() == ["yes", "no"]
    # with the two words that llama-server replaces
    prompt = fields["tokenizer.chat_template.rerank"].contents()
    assert "<Query>: {query}\n<Document>: {document}<|im_end|>" in prompt
    (directory / "README.md").write_text("# Another model\n")
    assert call("quantize", directory, "--scheme", "f32", "-o", path, "--force").code == 0
    reader = GGUFReader(path)
    assert "qwen3.pooling_type" not in reader.fields
    assert "cls.output.weight" not in {t.name for t in reader.tensors}


@pytest.mark.parametrize("settings", [{}, {"true_token_id": 1 << 20}, {"true_token_id": "yes"}])
def test_a_reranker_without_its_tokens_is_refused(
    settings: Mapping[str, Any], tmp_path: Path
) -> None:
    directory = _reranker(tmp_path, settings, True)
    with pytest.raises(QconvertError, match="true_token_id") as caught:
        open_gguf_source(open_model(directory))
    assert caught.value.code == "ARCH-MODULE"
