"""How data/pretokenizers.json and the table of pre-tokenizers in formats/gguf.md are made.

    python tests/make_pretokenizers.py     with tokenizers and llama_cpp

Run by hand, never by the suite. Of every name that llama.cpp has for byte-level BPE it is asked how
it cuts 2,000 texts, with one vocabulary that was trained on uncut texts: a piece too long or too
short then shows in the tokens. Every ninth merge is left out, which shows whether words that are
tokens skip the merges. The tokens are recorded by a hash, which the suite holds our model of
llama.cpp against. Of every name that is known by rules, tokenizers that were trained by the rules
say of how many of 2,000 texts llama.cpp makes other tokens than the tokenizers library.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import test_llama_cpp
import tokenizers
from awkward_texts import awkward, directory_with, marked, trained
from family_document import PAGE, with_pre_tokenizers
from pretokenizer_data import TABLE, digest, uncut
from test_llama_cpp import loaded, tokenized, write_gguf

from qconvert.architectures import open_gguf_source
from qconvert.architectures.llama_pretokenizers import PRE_TOKENIZERS
from qconvert.architectures.pretokenizers import NAMES


def begins_with_one(directory: Path, name: str, home: Path) -> bool:
    """Whether llama.cpp puts a token before a text of a file that does not say."""

    def silent_about_it(*args: Any, **named: Any) -> Any:
        found = open_gguf_source(*args, **named)
        kept = {k: v for k, v in found.metadata.items() if k != "tokenizer.ggml.add_bos_token"}
        return dataclasses.replace(found, metadata=kept)

    test_llama_cpp.open_gguf_source = silent_about_it
    try:
        path = write_gguf(directory, home / "s.gguf", pre_tokenizer=name)
    finally:
        test_llama_cpp.open_gguf_source = open_gguf_source
    with loaded(path) as model:
        return bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(model)))


def cuts(home: Path, vocabulary: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp does under each name."""
    directory = directory_with(uncut(vocabulary), home / "uncut")
    found = {}
    for name in sorted(PRE_TOKENIZERS):
        with loaded(write_gguf(directory, home / "m.gguf", pre_tokenizer=name)) as model:
            ids = [tokenized(model, text, around=False) for text in awkward(5, more=True)]
        begins = begins_with_one(directory, name, home)
        found[name] = {"tokens": digest(ids), "begins": begins}
        print(name, found[name], flush=True)
    return found


def differences(home: Path) -> dict[str, list[int]]:
    """Texts that get other tokens of llama.cpp than of the library, by names known by rules: of the
    usual ones, and of those with more scripts.
    """
    found: dict[str, list[int]] = {}
    for i, ((expressions, ignore_merges), name) in enumerate(NAMES.items()):
        found[name] = []
        for more in (False, True):
            fields = trained(expressions, ignore_merges, awkward(6, 1200, more=True) * more)
            library = tokenizers.Tokenizer.from_str(json.dumps(fields))
            path = write_gguf(directory_with(fields, home / f"d{i}{more}"), home / "m.gguf")
            with loaded(path) as model:
                different = [
                    text
                    for text in awkward(1, more=more)
                    if tokenized(model, text, around=False) != library.encode(text).ids
                ]
            found[name].append(len(different))
        print(name, found[name], [t for t in different if not marked(t)][:3], flush=True)
    return found


def main() -> None:
    made = trained((), False, awkward(6, 1200, more=True))
    merges = [merge for i, merge in enumerate(made["model"]["merges"]) if i % 9 != 4]
    vocabulary = {"vocab": made["model"]["vocab"], "merges": merges}
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        table = {
            "vocabulary": vocabulary,
            "cuts": cuts(home, vocabulary),
            "differences": differences(home),
        }
    TABLE.write_text(json.dumps(table, ensure_ascii=False, indent=0) + "\n")
    PAGE.write_text(with_pre_tokenizers(PAGE.read_text(), table))


if __name__ == "__main__":
    main()
