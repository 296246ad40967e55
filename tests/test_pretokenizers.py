"""How llama.cpp cuts texts, and by what its names for that are found.

data/pretokenizers.json holds what llama.cpp itself did (make_pretokenizers.py), and
data/trial_ids.json the tokens that the libraries of six published tokenizers give llama.cpp's trial
text, from the files beside its vocabularies (models/ggml-vocab-*.gguf.out at 0c1e57098).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from awkward_texts import awkward, directory_with, trained
from conftest import ROOT, Call
from family_document import PAGE, with_pre_tokenizers
from pretokenizer_data import TABLE, digest, keys

from qconvert.architectures import open_gguf_source, pretokenizer_names, token_check, trial_text
from qconvert.architectures.llama_pretokenizers import BEGINNING, PRE_TOKENIZERS, plain_name
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.architectures.pretokenizer_names import LOADED, name_by_rules
from qconvert.architectures.pretokenizers import DEEPSEEK, NAMES, NUMBERS, pre_tokenizer_steps
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.trial_text import trial_name
from qconvert.errors import UnsupportedError
from qconvert.files import open_model

FOUND: dict[str, Any] = json.loads(TABLE.read_text())
TRIALS: dict[str, list[int]] = json.loads((ROOT / "tests" / "data" / "trial_ids.json").read_text())
# As its src/llama-vocab.cpp at 0c1e57098 compares them.
NAMED_THERE = """
    a.x-4.0 afmoe bailingmoe bailingmoe2 bloom chameleon chatglm-bpe codeshell cohere2moe
    command-r dbrx deepseek-coder deepseek-llm deepseek-r1-qwen deepseek-v3 default exaone
    exaone-moe exaone4 f2llmv2 falcon falcon-h1 falcon3 gemma4 gigachat glm4 glm5 gpt-2 gpt-4o
    gpt3-finnish granite-docling granite-embed-multi-311m granite-embed-multi-97m grok-2 hunyuan
    hunyuan-dense hy_v4 jais jais-2 jina-de jina-es jina-v1-en jina-v2-code jina-v2-de
    jina-v2-es jina-v5-nano joyai-llm kanana2 kimi-k2 kormo laguna lfm2 llada-moe llama-bpe
    llama-v3 llama3 llama4 megrez mellum mellum2 midm-2.0 minerva-7b minicpm5 minimax-m2
    modern-bert mpt olmo phi-2 pixtral poro-chat qwen2 qwen35 refact roberta-bpe sarvam-moe
    seed-coder smaug-bpe smollm solar-open spark2_5 stablelm2 starcoder superbpe talkie tekken
    tiny_aya trillion ufakzeka viking whitespace youtu
"""
# Of SentencePiece's BPE, and of one without bytes: not of byte-level BPE.
OTHERS = {"gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace"}


# --- how text is cut ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(map(plain_name, PRE_TOKENIZERS))))
def test_texts_are_cut_as_llama_cpp_cut_them(name: str) -> None:
    ours = LlamaTokenizer(keys(FOUND["vocabulary"], name))
    ids = digest([ours.encode(text) for text in awkward(5, more=True)])
    others = [n for n in PRE_TOKENIZERS if plain_name(n) == name]
    assert {other: FOUND["cuts"][other]["tokens"] for other in others} == dict.fromkeys(others, ids)


def test_every_name_of_byte_level_bpe_is_known() -> None:
    assert set(NAMED_THERE.split()) == LOADED
    assert set(FOUND["cuts"]) == set(PRE_TOKENIZERS) == LOADED - OTHERS
    assert {n for n, found in FOUND["cuts"].items() if found["begins"]} == BEGINNING
    assert set(NAMES.values()) == set(FOUND["differences"])
    # The record tells all apart but these two, whose expressions match the same.
    cuts = {plain_name(name): found["tokens"] for name, found in FOUND["cuts"].items()}
    assert len(set(cuts.values())) == len(cuts) - 1
    assert cuts["qwen2"] == cuts["bailingmoe"]
    page = PAGE.read_text()
    assert with_pre_tokenizers(page, FOUND) == page


# --- by rules -------------------------------------------------------------------------------------


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


BLOOM = split(" ?[^(\\s|[.,!?…。，、।۔،])]+")
DIGITS = {"type": "Digits", "individual_digits": True}
# As people have quoted the published files: issues 3502 and 7309 of llama.cpp, transformers.js,
# mllm; of Chameleon, comments in llama.cpp.
PUBLISHED = {
    "falcon": [
        {"type": "Punctuation", "behavior": "Contiguous"},
        level(True),
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ],
    "bloom": [BLOOM, level(False)],
    "viking": [BLOOM, DIGITS, level(False)],
    "spark2_5": [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
            "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+|[\r\n]|\\s+(?!\\S)|\\s+"
        ),
        DIGITS,
        level(False),
    ],
    "chameleon": [
        split("<sentinel:[0-9]+>"),
        split("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
        split("([\t\n]|    |  )"),
        DIGITS,
        {"type": "Punctuation", "behavior": "Isolated"},
        level(True),
    ],
}


def named(steps: list[dict[str, Any]]) -> str | None:
    fields = {"model": {}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return name_by_rules(TokenizerJson(fields, Path("tokenizer.json")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rules_are_known(name: str) -> None:
    assert named(PUBLISHED[name]) == name


def test_the_place_of_bytes_among_the_steps_matters() -> None:
    """What follows them sees letters for bytes, some of which are digits and marks themselves."""
    first, bytes_, *others = PUBLISHED["falcon"]
    assert named([first, *others, bytes_]) is None
    assert named([level(False), BLOOM]) is None
    assert named([BLOOM]) == "bloom"  # bytes are the kind's own: see `_kind`


def test_rules_are_written_as_they_are_read() -> None:
    for (expressions, ignore_merges), name in NAMES.items():
        fields = {
            "model": {"ignore_merges": ignore_merges},
            "pre_tokenizer": pre_tokenizer_steps(expressions),
        }
        assert name_by_rules(TokenizerJson(fields, Path("tokenizer.json"))) == name


# --- by the hash of the trial text ----------------------------------------------------------------


@pytest.mark.parametrize("name", TRIALS)
def test_the_hash_of_published_tokens_is_known(name: str) -> None:
    """Two of them are not told apart; the tokens of the name are theirs all the same."""
    assert trial_name(TRIALS[name]) == ("olmo" if name == "mpt" else name)


def test_every_hash_has_a_name_that_we_know() -> None:
    table = trial_text._NAMES
    assert len(table) == 90
    assert set(table.values()) <= set(PRE_TOKENIZERS)
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in table)
    # of CHK_TXT in its convert_hf_to_gguf_update.py
    hashed = "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    assert hashlib.sha256(trial_text.TEXT.encode()).hexdigest() == hashed
    assert trial_name([1, 2, 3]) is None


def strange(place: Path) -> Path:
    """A model whose tokenizer has rules that are nobody's; it cuts much as AFMoE's does."""
    pytest.importorskip("tokenizers")
    return directory_with(trained((NUMBERS, DEEPSEEK), False), place)


def hashed_as(monkeypatch: pytest.MonkeyPatch, directory: Path, name: str) -> None:
    """Let llama.cpp know the tokenizer of a directory by its hash."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = library.encode(trial_text.TEXT).ids
    hashed = hashlib.sha256(str(ids).encode()).hexdigest()
    monkeypatch.setattr(trial_text, "_NAMES", {hashed: name})


def test_a_tokenizer_of_unknown_rules_is_known_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    directory = strange(tmp_path / "m")
    line = ("quantize", directory, "--scheme", "f32", "-o", tmp_path / "m.gguf")
    ran = call(*line)
    assert ran.code == 3
    assert "the hash of llama.cpp's trial text, " in ran.err
    assert "--pre-tokenizer NAME" in ran.err
    hashed_as(monkeypatch, directory, "afmoe")
    ran = call(*line)
    assert ran.code == 0, ran.err
    assert "pre-tokenizer 'afmoe': by the hash of llama.cpp's trial text" in " ".join(
        (ran.out + ran.err).split()
    )
    with open_model(directory) as model:
        assert open_gguf_source(model).metadata["tokenizer.ggml.pre"] == "afmoe"


@pytest.mark.parametrize(
    ("expressions", "ignore_merges", "found"),
    [
        ((), False, "no expression at all"),
        ((), True, "no expression at all; ignore_merges is true"),
        (("x", "y"), True, "x then y; ignore_merges is true"),
        (tuple("vwxyz"), True, "v then w then x then y; ignore_merges is true"),
    ],
)
def test_a_refusal_lists_the_expressions_and_apart_from_them_whether_merges_are_skipped(
    expressions: tuple[str, ...], ignore_merges: bool, found: str, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    directory = directory_with(trained(expressions, ignore_merges), tmp_path / "m")
    with pytest.raises(UnsupportedError) as refusal:
        open_gguf_source(open_model(directory))
    assert refusal.value.found == found


def test_without_the_library_an_unknown_tokenizer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = strange(tmp_path / "m")
    missing = "the package tokenizers is not installed (it comes with transformers)"
    monkeypatch.setattr(pretokenizer_names, "library_tokens", lambda fields, texts: missing)
    with pytest.raises(UnsupportedError) as refusal:
        open_gguf_source(open_model(directory))
    assert missing in str(refusal.value.hint)
    assert "--pre-tokenizer NAME" in str(refusal.value.hint)
    assert refusal.value.code == "ARCH-PRE-TOKENIZER"


def test_the_rules_stay_where_the_hash_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    rules = next(key for key, name in NAMES.items() if name == "llama-bpe")
    directory = directory_with(trained(*rules), tmp_path / "m")

    def said(hashed: str, given: str | None = None) -> tuple[Any, str, str]:
        hashed_as(monkeypatch, directory, hashed)
        with open_model(directory) as model:
            source = open_gguf_source(model, pre_tokenizer=given)
        pre = source.metadata["tokenizer.ggml.pre"]
        return pre, " ".join(source.notes), " ".join(source.warnings)

    pre, notes, warnings = said("smaug-bpe")
    assert pre == "llama-bpe"
    assert "would write 'smaug-bpe'" in notes
    assert "'llama-bpe' stays" in notes
    assert "smaug-bpe" not in warnings
    pre, notes, warnings = said("glm4")  # which cuts in the same way
    assert pre == "llama-bpe"
    assert "by the rules in tokenizer.json" in notes
    assert "glm4" not in notes + warnings
    pre, notes, warnings = said("llama-bpe", given="qwen2")
    assert pre == "qwen2"
    assert "'qwen2' was named" in warnings
    assert "would write 'llama-bpe'" in warnings


@pytest.mark.parametrize("installed", [True, False])
def test_a_name_that_contradicts_the_rules_is_warned_of_without_a_hash(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    rules = next(key for key, name in NAMES.items() if name == "llama-bpe")
    directory = directory_with(trained(*rules), tmp_path / "m")
    monkeypatch.setattr(trial_text, "_NAMES", {})
    if not installed:
        monkeypatch.setattr(token_check, "library_tokens", lambda fields, texts: "missing")

    def warned(given: str) -> list[str]:
        with open_model(directory) as model:
            source = open_gguf_source(model, pre_tokenizer=given)
        return [text for text in source.warnings if "was named" in text]

    for given in ("qwen2", "whitespace"):
        assert warned(given) == [
            f"pre-tokenizer '{given}' was named; the rules in tokenizer.json are those of "
            "'llama-bpe'"
        ]
    assert warned("llama-bpe") == warned("glm4") == []  # which cut in the same way
