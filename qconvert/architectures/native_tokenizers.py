"""Tokenizers in the files of the programs that they were made with, as tokenizer.json has them.

Mistral's ``tekken.json`` lists the tokens of a byte-level BPE in the order of their merges, and so
does tiktoken's ``tiktoken.model``, which leaves it to the model's code how text is cut;
``tokenizer.model`` is a SentencePiece model (google/sentencepiece, sentencepiece_model.proto). What
reads tokenizer.json then reads these, and what it refuses or warns of there, it does here.
"""

from __future__ import annotations

import base64
import binascii
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qconvert.architectures.llama_tokenizer import BYTE_CHARACTERS
from qconvert.architectures.pretokenizers import KIMI, pre_tokenizer_steps
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.tokenizer_json import SPACE, added_token, surrounding, token_pairs
from qconvert.errors import FormatError, UnsupportedError

TEKKEN = "tekken.json"
TIKTOKEN = "tiktoken.model"
SENTENCEPIECE = ("tokenizer.model", "spiece.model")
MAX_TOKENS = 1 << 20
_SHOWN = 60
# Of files that list no special tokens, as mistral-common 1.13 has them.
_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class NativeTokenizer:
    """A tokenizer that is no tokenizer.json.

    Attributes:
        name: of the file.
        fields: what tokenizer.json would have.
        settings: what tokenizer_config.json would have, and need not.
        cut_unknown: a sentence where neither the file nor the type of the model says how text is
            cut; the pre-tokenizer in the fields is then none.
    """

    name: str
    fields: Fields
    settings: Fields
    cut_unknown: str | None = None


def native_tokenizer(files: SmallFiles, settings: Mapping[str, Any]) -> NativeTokenizer | None:
    """The tokenizer of a directory without tokenizer.json; None where there is none.

    Args:
        files: of the directory.
        settings: its tokenizer_config.json, which may name further tokens.

    Raises:
        FormatError: the file breaks a rule of its format.
        UnsupportedError: it is of a kind that llama.cpp has not.
    """
    if TEKKEN in files.names():
        return _tekken(files.json(TEKKEN) or {}, files.home / TEKKEN)
    if (ranks := files.read(TIKTOKEN)) is not None:
        return _tiktoken(ranks, files.home / TIKTOKEN, settings, files)
    for name in SENTENCEPIECE:
        data = files.read(name)
        if data is not None:
            return _sentencepiece(data, files.home / name, settings, files)
    return None


# --- tekken ---------------------------------------------------------------------------------------


def _tekken(found: Fields, path: Path) -> NativeTokenizer:
    config, vocab = found.get("config"), found.get("vocab")
    if not isinstance(config, dict) or not isinstance(vocab, list):
        _broken(path, "no 'config' and 'vocab'", sorted(found))
    size, count = (config.get(f"default_{n}") for n in ("vocab_size", "num_special_tokens"))
    pattern = config.get("pattern")
    if (
        type(size) is not int
        or type(count) is not int
        or not 256 <= size - count <= min(len(vocab), MAX_TOKENS)
        or not len(_SPECIAL) <= count <= MAX_TOKENS
        or not isinstance(pattern, str)
    ):
        _broken(path, "config contradicts the list of tokens", config)
    tokens = [_bytes(entry, path) for entry in vocab[: size - count]]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or any(bytes([b]) not in ranks for b in range(256)):
        _broken(path, "a token twice, or a byte without one", len(ranks))
    special = _special(found.get("special_tokens"), count, path)
    named = {token: i for i, token in enumerate(special)}
    fields: Fields = {
        "added_tokens": [added_token(i, token, special=True) for token, i in named.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_steps([pattern]),
        "post_processor": surrounding([("<s>", named["<s>"])], []),
        "model": {
            "type": "BPE",
            "vocab": named | {_letters(t): count + rank for t, rank in ranks.items()},
            "merges": _merges(ranks),
            "ignore_merges": True,
        },
    }
    settings = {f"{n}_token": t for n, t in zip(("unk", "bos", "eos"), _SPECIAL, strict=False)}
    return NativeTokenizer(TEKKEN, fields, settings | {"pad_token": "<pad>"})


def _bytes(entry: object, path: Path) -> bytes:
    text = entry.get("token_bytes") if isinstance(entry, dict) else None
    try:
        found = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        found = b""
    return found or _broken(path, "a token without bytes", entry)


# Of types of models, what their own code cuts text by.
_CUT_BY = {"kimi_k2": KIMI}


def _tiktoken(
    data: bytes, path: Path, settings: Mapping[str, Any], files: SmallFiles
) -> NativeTokenizer:
    """Lines of a token in base64 and its rank."""
    tokens: list[bytes] = []
    for line in data.split(b"\n"):
        text, _, rank = line.rstrip(b"\r").partition(b" ")
        if line and rank != str(len(tokens)).encode():
            _broken(path, f"no rank {len(tokens)} where it comes", line)
        if line:
            tokens.append(_bytes({"token_bytes": text.decode("latin-1")}, path))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if not 256 <= len(ranks) == len(tokens) <= MAX_TOKENS:
        _broken(path, "a token twice, or none for some bytes", len(tokens))
    kind = str((files.json("config.json") or {}).get("model_type"))
    fields: Fields = {
        "added_tokens": _further(settings, files, len(tokens)),
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer_steps([_CUT_BY[kind]] if kind in _CUT_BY else []),
        "post_processor": None,
        "model": {
            "type": "BPE",
            "vocab": {_letters(t): rank for t, rank in ranks.items()},
            "merges": _merges(ranks),
            "ignore_merges": True,
        },
    }
    unknown = None
    if kind not in _CUT_BY:
        unknown = (
            f"{TIKTOKEN} does not say how text is cut, and the code of a model of type "
            f"{kind[:_SHOWN]!r}, which does, is not known"
        )
    return NativeTokenizer(TIKTOKEN, fields, {}, unknown)


def _special(listed: object, count: int, path: Path) -> list[str]:
    """Texts of special tokens by id; those that nobody has named are fillers."""
    names = {i: text for i, text in enumerate(_SPECIAL)}
    if listed is not None:
        if not isinstance(listed, list):
            _broken(path, "special_tokens is no list", listed)
        names = {}
        for entry in listed:
            rank = entry.get("rank") if isinstance(entry, dict) else None
            text = entry.get("token_str") if isinstance(entry, dict) else None
            if type(rank) is not int or not 0 <= rank < count or not isinstance(text, str):
                _broken(path, "a special token without rank and text", entry)
            names[rank] = text
    found = [names.get(i, f"<SPECIAL_{i}>") for i in range(count)]
    if len(set(found)) < count or "<s>" not in found:
        _broken(path, "a special token twice, or no <s>", count)
    return found


def _letters(token: bytes) -> str:
    """Bytes as byte-level BPE writes them."""
    return "".join(map(BYTE_CHARACTERS.__getitem__, token))


def _merges(ranks: Mapping[bytes, int]) -> list[list[str]]:
    """All pairs of tokens that give a token, the tokens in their order, by the pair's own ranks."""
    pairs = sorted(token_pairs(ranks), key=lambda p: (ranks[p[0] + p[1]], ranks[p[0]], ranks[p[1]]))
    return [[_letters(left), _letters(right)] for left, right in pairs]


# --- SentencePiece --------------------------------------------------------------------------------

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM, _BPE = 1, 2


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


def _sentencepiece(
    data: bytes, path: Path, settings: Mapping[str, Any], files: SmallFiles
) -> NativeTokenizer:
    model = _Message(data, path)
    pieces = [_piece(_Message(p, path)) for p in model.all(1)]
    trainer, normalizer = model.inner(2), model.inner(3)
    kind = trainer.number(3, _UNIGRAM)
    if not 0 < len(pieces) <= MAX_TOKENS or len({p.text for p in pieces}) < len(pieces):
        _broken(path, "no pieces, or one twice", len(pieces))
    if kind not in (_UNIGRAM, _BPE) or trainer.number(24, 0):
        raise UnsupportedError(
            "llama.cpp has no SentencePiece model of this kind",
            path=path,
            found=f"model type {kind}" + (", spaces after words" if trainer.number(24, 0) else ""),
            wanted="unigram or BPE",
            code="ARCH-TOKENIZER",
        )
    unknown = next((i for i, p in enumerate(pieces) if p.kind == _UNKNOWN), None)
    if unknown is None:
        _broken(path, "no piece for what is unknown", len(pieces))
    added = [
        added_token(i, p.text, special=p.kind == _CONTROL)
        for i, p in enumerate(pieces)
        if p.kind in (_CONTROL, _USER)
    ]
    steps: list[Fields] = []
    charsmap = normalizer.blob(2)
    if charsmap:
        text = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if normalizer.number(4, 1):
        for regex, instead in ((r"\A +| +\z", ""), (" {2,}", SPACE)):
            steps.append({"type": "Replace", "pattern": {"Regex": regex}, "content": instead})
    prefix = bool(normalizer.number(3, 1))
    fields: Fields = {"added_tokens": added + _further(settings, files, len(pieces))}
    if kind == _UNIGRAM:
        fields["normalizer"] = {"type": "Sequence", "normalizers": steps}
        scheme = "always" if prefix else "never"
        fields["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": scheme,
        }
        fields["model"] = {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [[p.text, p.score] for p in pieces],
        }
        if trainer.number(35, 0):
            fields["model"]["byte_fallback"] = True
    else:
        if prefix:
            steps.append({"type": "Prepend", "prepend": SPACE})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        fields["normalizer"] = {"type": "Sequence", "normalizers": steps}
        fields["pre_tokenizer"] = None
        fields["model"] = {
            "type": "BPE",
            "unk_token": pieces[unknown].text,
            "fuse_unk": True,
            "byte_fallback": bool(trainer.number(35, 0)),
            "vocab": {p.text: i for i, p in enumerate(pieces)},
            "merges": _piece_merges(pieces),
        }
    ids = {"unk": unknown, "bos": trainer.number(41, 1), "eos": trainer.number(42, 2)}
    named = {f"{n}_token": pieces[i].text for n, i in ids.items() if 0 <= i < len(pieces)}
    # T5 ends a text, Llama begins one, unless tokenizer_config.json says otherwise.
    begins = settings.get("add_bos_token", kind == _BPE) is True and "bos_token" in named
    ends = settings.get("add_eos_token", kind == _UNIGRAM) is True and "eos_token" in named
    before = [(pieces[ids["bos"]].text, ids["bos"])] if begins else []
    after = [(pieces[ids["eos"]].text, ids["eos"])] if ends else []
    fields["post_processor"] = surrounding(before, after)
    return NativeTokenizer(path.name, fields, named)


def _piece(message: _Message) -> _Piece:
    text, kind = message.text(1), message.number(3, _NORMAL)
    # What stands for spaces is one where the text itself is looked at.
    text = text.replace(SPACE, " ") if kind == _USER else text
    return _Piece(text, message.real(2), kind)


def _piece_merges(pieces: list[_Piece]) -> list[list[str]]:
    """All pairs of normal pieces that give one, the highest score first."""
    normal = {p.text: (-p.score, i) for i, p in enumerate(pieces) if p.kind == _NORMAL}
    pairs = sorted(token_pairs(normal), key=lambda p: (normal[p[0] + p[1]], len(p[0])))
    return [[left, right] for left, right in pairs]


def _further(settings: Mapping[str, Any], files: SmallFiles, size: int) -> list[Fields]:
    """Tokens beyond the model's own, which stand in two other files."""
    found: dict[int, Fields] = {}
    for content, i in (files.json("added_tokens.json") or {}).items():
        if type(i) is int and i >= size:
            found[i] = added_token(i, content, special=False)
    listed = settings.get("added_tokens_decoder")
    for key, token in (listed if isinstance(listed, dict) else {}).items():
        text = token.get("content") if isinstance(token, dict) else None
        if key.isdecimal() and int(key) >= size and isinstance(text, str):
            found[int(key)] = added_token(int(key), text, special=token.get("special") is True)
    return [found[i] for i in sorted(found)]


class _Message:
    """A protocol buffer: the values of fields by their numbers (protobuf.dev, encoding).

    Raises:
        FormatError: it ends within a field, or has a kind of field that there is none of.
    """

    def __init__(self, data: bytes, path: Path) -> None:
        self._path = path
        self._found: dict[int, list[Any]] = {}
        at = 0
        while at < len(data):
            tag, at = self._varint(data, at)
            field, wire = tag >> 3, tag & 7
            value: Any
            if wire == 0:
                value, at = self._varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
                value, at = self._part(data, at, size)
            elif wire == 2:
                size, at = self._varint(data, at)
                value, at = self._part(data, at, size)
            else:
                _broken(path, "no SentencePiece model", f"wire type {wire}")
            self._found.setdefault(field, []).append(value)

    def all(self, field: int) -> list[bytes]:
        return [v for v in self._found.get(field, []) if isinstance(v, bytes)]

    def blob(self, field: int) -> bytes:
        return next(reversed(self.all(field)), b"")

    def inner(self, field: int) -> _Message:
        return _Message(self.blob(field), self._path)

    def text(self, field: int) -> str:
        try:
            return self.blob(field).decode()
        except UnicodeDecodeError:
            _broken(self._path, "a piece that is no text", self.blob(field))

    def real(self, field: int) -> float:
        data = self.blob(field)
        return float(struct.unpack("<f", data)[0]) if len(data) == 4 else 0.0

    def number(self, field: int, default: int) -> int:
        """A signed number of 32 bits, or a flag."""
        found = [v for v in self._found.get(field, []) if isinstance(v, int)]
        if not found:
            return default
        value = found[-1] & 0xFFFFFFFF
        return value - (1 << 32) if value >> 31 else value

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        value = 0
        for i, byte in enumerate(data[at : at + 10]):
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, at + i + 1
        return _broken(self._path, "no SentencePiece model", "a number that does not end")

    def _part(self, data: bytes, at: int, size: int) -> tuple[bytes, int]:
        if size > len(data) - at:
            _broken(self._path, "no SentencePiece model", f"{size:,} bytes at {at:,}")
        return data[at : at + size], at + size


def _broken(path: Path, message: str, found: object) -> NoReturn:
    raise FormatError(
        f"not a usable tokenizer: {message}",
        path=path,
        found=reprlib.repr(found)[:_SHOWN],
        hint="if transformers reads it, let it write tokenizer.json: "
        "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        code="ARCH-TOKENIZER-FILE",
    )
