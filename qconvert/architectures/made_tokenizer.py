"""tokenizer.json from the keys of a GGUF file, for the two kinds that the keys say all of.

What is made gives the tokens that llama.cpp gives, which is held against a model of it
(`token_check`); a tokenizer of another kind, or with a pre-tokenizer whose expressions are not
known, is left out, with a sentence that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.architectures.llama_pretokenizers import BEGINNING, plain_name
from qconvert.architectures.pretokenizers import NAMES, pre_tokenizer_steps
from qconvert.architectures.special_tokens import KEYS
from qconvert.architectures.token_check import compare_tokens
from qconvert.architectures.tokenizer_json import (
    SPACE,
    TokenizerJson,
    added_token,
    surrounding,
    token_pairs,
)
from qconvert.architectures.tokenizers import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from qconvert.errors import UnsupportedError
from qconvert.files.gguf_split_reader import AnyGgufModel
from qconvert.files.gguf_writer import GgufValue, MetadataValue

_PREFIX = "tokenizer.ggml."
_TODO = "copy the tokenizer of the original model into the directory, or give it with --config"
# Whose tokenizers compose characters first; llama.cpp does not, and no key says it. Others that cut
# text in the same way do not, so that this goes by the very name.
_COMPOSING = frozenset({"qwen2", "qwen35", "command-r", "olmo", "mpt"})


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """Files of a tokenizer, and what is to be said of them.

    Attributes:
        files: by their names; none where the kind is not one of ours.
    """

    files: Mapping[str, bytes]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def made_tokenizer(gguf: AnyGgufModel) -> MadeTokenizer:
    """The tokenizer of a file, as transformers reads it."""
    named = [name for name in gguf.metadata if name.startswith("tokenizer.")]
    keys: dict[str, MetadataValue] = {name: _value(gguf, name) for name in named}
    if "general.name" in gguf.metadata:  # which llama.cpp goes by in part
        keys["general.name"] = gguf.metadata["general.name"]
    vocabulary = _Vocabulary(keys)
    kind = vocabulary.key("model")
    if kind == "gpt2" and plain_name(vocabulary.key("pre")) in NAMES.values():
        fields = _byte_level(vocabulary)
    elif kind == "llama" and vocabulary.key("scores"):
        fields = _sentencepiece(vocabulary)
    else:
        pre = f", pre-tokenizer {vocabulary.key('pre')!r}" if kind == "gpt2" else ""
        return _left_out(f"its kind is {kind!r}{pre}")
    made = TokenizerJson(fields, gguf.path)
    try:
        compare_tokens(made, vocabulary.known | keys)
    except UnsupportedError as error:
        return _left_out(f"what was made of its keys gives other tokens: {error.found}")
    files = {"tokenizer.json": _json(fields), "tokenizer_config.json": _json(_settings(vocabulary))}
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, GgufValue) and isinstance(template.value, str):
        files["chat_template.jinja"] = template.value.encode()
    return MadeTokenizer(files, tuple(made.warnings), tuple(made.notes))


def _left_out(why: str) -> MadeTokenizer:
    return MadeTokenizer({}, (f"the directory has no tokenizer, for {why}: {_TODO}",))


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _value(gguf: AnyGgufModel, key: str) -> GgufValue:
    return GgufValue(*gguf.value(key))


class _Vocabulary:
    """Tokens of a file, by kind.

    Attributes:
        known: keys that llama.cpp takes to be there where a file has them not.
    """

    def __init__(self, keys: Mapping[str, MetadataValue]) -> None:
        self._keys = keys
        self.known: dict[str, MetadataValue] = {}
        self.tokens: list[str] = list(self.key("tokens") or [])
        self.types: list[int] = self.key("token_type") or [NORMAL] * len(self.tokens)
        kind, pre = self.key("model"), self.key("pre")
        defaults = {
            "add_bos_token": kind == "llama" or (kind == "gpt2" and pre in BEGINNING),
            "add_eos_token": False,
            "add_space_prefix": kind == "llama",
            "token_type": GgufValue("INT32", self.types),
        }
        self.known = {f"{_PREFIX}{name}": value for name, value in defaults.items()}

    def key(self, name: str) -> Any:
        found = self._keys.get(f"{_PREFIX}{name}", self.known.get(f"{_PREFIX}{name}"))
        return found.value if isinstance(found, GgufValue) else found

    def typed(self, *types: int) -> dict[str, int]:
        """Ids of the tokens of some types."""
        typed = zip(self.tokens, self.types, strict=True)
        return {token: i for i, (token, kind) in enumerate(typed) if kind in types}

    def special(self, name: str) -> str | None:
        """The text of a special token, by its name in tokenizer_config.json."""
        i = self.key(KEYS[name])
        return self.tokens[i] if type(i) is int and 0 <= i < len(self.tokens) else None

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text before it is cut."""
        control = self.typed(CONTROL, UNKNOWN)
        every = sorted((control | self.typed(USER_DEFINED)).items(), key=lambda item: item[1])
        return [added_token(i, t, special=t in control) for t, i in every]

    def around(self) -> dict[str, Any] | None:
        """What puts tokens before and after a text."""
        first = self.special("bos") if self.key("add_bos_token") else None
        last = self.special("eos") if self.key("add_eos_token") else None
        before, after = (
            [(t, self.tokens.index(t))] if t is not None else [] for t in (first, last)
        )
        return surrounding(before, after)


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Byte-level BPE."""
    pre = vocabulary.key("pre")
    name = plain_name(pre)
    expressions, whole_words = next(k for k, found in NAMES.items() if found == name)
    merges = [_pair(merge) for merge in vocabulary.key("merges") or []]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "NFC"} if pre in _COMPOSING else None,
        "pre_tokenizer": pre_tokenizer_steps(expressions),
        "post_processor": vocabulary.around(),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_words,
            "vocab": vocabulary.typed(NORMAL),
            "merges": merges,
        },
    }


def _pair(merge: str) -> list[str]:
    """A merge, whose first part may be a space itself."""
    left, _, right = merge[1:].partition(" ")
    return [merge[:1] + left, right]


def _sentencepiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece's BPE as merges: whatever gives a token, the highest score first."""
    scores: list[float] = vocabulary.key("scores")
    # llama.cpp has spaces in these, as it looks for them in the text itself.
    for i, kind in enumerate(vocabulary.types):
        if kind == USER_DEFINED:
            vocabulary.tokens[i] = vocabulary.tokens[i].replace(" ", SPACE)
    ids = {t: i for i, t in enumerate(vocabulary.tokens) if vocabulary.types[i] != UNUSED}
    pieces = vocabulary.typed(NORMAL, USER_DEFINED)
    merges = sorted(
        token_pairs(pieces),
        key=lambda p: (-scores[pieces[p[0] + p[1]]], pieces[p[0]], pieces[p[1]]),
    )
    spaced = vocabulary.key("add_space_prefix")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added(),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([prepend] if spaced else []), replace],
        },
        "pre_tokenizer": None,
        "post_processor": vocabulary.around(),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(iter(vocabulary.typed(UNKNOWN)), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[left, right] for left, right in merges],
        },
    }


def _settings(vocabulary: _Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json: a class that takes tokenizer.json as it is.

    transformers looks for the tokens named here in the text itself, so that none of a usual word
    may be among them.
    """
    plain = vocabulary.typed(NORMAL)
    named = {f"{name}_token": vocabulary.special(name) for name in ("bos", "eos", "unk", "pad")}
    named = {name: None if text in plain else text for name, text in named.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in named.items() if text is not None},
    }
