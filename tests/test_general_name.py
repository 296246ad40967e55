"""Names by which llama.cpp goes are not given to models that are not what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import added, write_directory

from qconvert.architectures import GgufSource, open_gguf_source
from qconvert.architectures.general_name import harmless_name
from qconvert.files import open_model

Fields = dict[str, Any]


def opened(directory: Path) -> GgufSource:
    return open_gguf_source(open_model(directory))


def phi_tokens(*, rstrip: bool) -> Fields:
    texts = {"</s>": True, "<unk>": False, "<s>": False, "<|endoftext|>": False, "<|user|>": True}
    return {"added_tokens": [
        added(i, text) | {"rstrip": rstrip and stripped}
        for i, (text, stripped) in enumerate(texts.items())
    ]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tokenizer", "wanted"),
    [
        ("my-model", {}, "my-model"),
        ("my-phi3-merge", {}, "my-phi 3-merge"),
        ("Distilled from Phi-3.5 and PHI-3", {}, "Distilled from Phi 3.5 and PHI 3"),
        ("phi-2", {}, "phi-2"),
        ("Phi-3-mini-4k-instruct", phi_tokens(rstrip=True), "Phi-3-mini-4k-instruct"),
        ("Phi-3-mini-4k-instruct", phi_tokens(rstrip=False), "Phi 3-mini-4k-instruct"),
        ("modern-bert", {"added_tokens": [added(0, "[MASK]")]}, "modern bert"),
        ("modern-bert", {"added_tokens": [added(0, "[MASK]") | {"lstrip": True}]}, "modern-bert"),
        ("modern-bert", {"added_tokens": [7, {"content": 7}]}, "modern-bert"),
        ("phi3", {"added_tokens": {}}, "phi 3"),
    ],
)
def test_a_name_by_which_llama_cpp_goes_is_changed_unless_it_holds(
    name: str, tokenizer: Fields, wanted: str
) -> None:
    assert harmless_name(name, lambda: tokenizer) == wanted


def test_another_name_is_written_and_said(tmp_path: Path) -> None:
    source = opened(write_directory(tmp_path / "my-phi3-merge", "llama"))
    assert source.metadata["general.name"] == "my-phi 3-merge"
    assert any("my-phi3-merge" in note for note in source.notes)
    directory = write_directory(tmp_path / "plain", "llama")
    (directory / "README.md").write_text("---\nmodel_name: Distilled from Phi-3\n---\n")
    source = opened(directory)
    assert source.metadata["general.name"] == "Distilled from Phi 3"
    (note,) = opened(write_directory(tmp_path / "other", "llama")).notes
    assert note.startswith("pre-tokenizer 'llama-bpe'")


def test_the_tokenizer_is_looked_at_for_such_names_only() -> None:
    def unread() -> Fields:
        raise AssertionError("nobody should ask")

    assert harmless_name("Llama", unread) == "Llama"
