"""A tokenizer.json as GGUF's ``tokenizer.ggml.*`` keys.

Four of llama.cpp's tokenizers are served: byte-level BPE (``gpt2``), SentencePiece's BPE
(``llama``), unigram (``t5``) and WordPiece (``bert``). The file itself says which it is.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qconvert.architectures.pretokenizer_names import find_name, named_warnings
from qconvert.architectures.rebuilt_tokenizers import as_rebuilt
from qconvert.architectures.tokenizer_findings import findings
from qconvert.architectures.tokenizer_json import SPACE, TokenizerJson, token_pairs
from qconvert.errors import InputError, UnsupportedError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

# Types of tokens: llama.h's llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Some versions of transformers left out the first merge; many more are another kind of tokenizer.
MAX_UNLISTED = 0.01  # pairs for each token
_UNREACHABLE = -10000.0  # score of a token that fills up the vocabulary
# llama.cpp composes no characters; usual text is composed already.
_HARMLESS = frozenset({"NFC"})
MAX_TOKEN = 1024  # characters; the longest in use have some 500
MAX_TOKEN_CHARACTERS = 1 << 23  # of all tokens together; 260,000 of them have 2 million
MAX_CHARSMAP = 1 << 22  # bytes; SentencePiece's largest has a quarter of a million
MAX_STRANGE = 8  # kinds of normalizers that are named
MAX_SCORE = 1e30  # of a piece: what binary32 holds without a thought
# Tokens beyond the last row of the embedding that are left out: at most so many for each row.
MAX_BEYOND = 0.01


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens as llama.cpp has them.

    Attributes:
        keys: what the file says about them.
        ids: of all tokens, by the text that tokenizer.json gives them.
        size: number of tokens, those that fill it up included.
        beyond: texts of tokens that are left out: the embedding has no rows for them.
    """

    keys: Keys
    ids: dict[str, int]
    size: int
    beyond: tuple[str, ...] = ()


def read_vocabulary(
    tokenizer: TokenizerJson,
    size: int,
    pre_tokenizer: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Vocabulary:
    """The tokens of a model; what llama.cpp does otherwise is added to the file's warnings.

    Args:
        tokenizer: the file.
        size: rows of the token embedding; the tokens are filled up to it.
        pre_tokenizer: llama.cpp's name for a byte-level BPE tokenizer, instead of looking it up.
        settings: tokenizer_config.json.

    Raises:
        FormatError: the file breaks a rule.
        UnsupportedError: a tokenizer that llama.cpp does not have.
        InputError: more tokens than embeddings.
    """
    kind = _kind(tokenizer)
    _check_lengths(tokenizer)
    as_rebuilt(tokenizer, kind, settings or {})
    if pre_tokenizer is not None and kind != "gpt2":
        raise UnsupportedError(
            "only byte-level BPE has a pre-tokenizer to be named",
            path=tokenizer.path,
            found=kind,
            hint="leave --pre-tokenizer out",
            code="ARCH-PRE-TOKENIZER",
        )
    read, normalizers = _KINDS[kind]
    keys: Keys = {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": "default"}
    if kind == "gpt2":
        keys["tokenizer.ggml.pre"] = pre_tokenizer or find_name(tokenizer)
        if pre_tokenizer:
            tokenizer.warnings += named_warnings(tokenizer, pre_tokenizer)
    beyond = _leave_out_beyond(tokenizer, size)
    keys |= read(tokenizer, size)
    tokenizer.warnings += findings(tokenizer, kind)
    steps = dict.fromkeys(tokenizer.step_types("normalizer"))
    strange = [step for step in steps if step not in normalizers and step not in _HARMLESS]
    tokenizer.warnings += (
        f"llama.cpp does not apply the tokenizer's normalizer '{step}': "
        "text that it would change gets other tokens"
        for step in strange[:MAX_STRANGE]
    )
    return Vocabulary(keys, _ids(tokenizer), size, beyond)


def _check_lengths(tokenizer: TokenizerJson) -> None:
    """Refuse tokens whose pairs or pieces would take for ever."""
    vocab = tokenizer.model.get("vocab")
    if isinstance(vocab, list):
        vocab = [piece[0] for piece in vocab if isinstance(piece, list) and piece]
    texts = [t for t in vocab if isinstance(t, str)] if isinstance(vocab, list | dict) else []
    texts += [t.text for t in tokenizer.added]
    longest, total = max(map(len, texts), default=0), sum(map(len, texts))
    if longest > MAX_TOKEN or total > MAX_TOKEN_CHARACTERS:
        raise tokenizer.broken(
            f"tokens are too long: at most {MAX_TOKEN:,} characters each, and "
            f"{MAX_TOKEN_CHARACTERS:,} together",
            f"one of {longest:,}, together {total:,}",
        )


def _leave_out_beyond(tokenizer: TokenizerJson, size: int) -> tuple[str, ...]:
    """Take out added tokens that the embedding has no rows for, such as Gemma 3's for images.

    Nothing can be computed with them. They follow the last row at once and are few, and none is of
    the vocabulary itself: else the tokenizer is that of another model, or the embeddings were not
    resized, which `_Table` refuses.
    """
    beyond = [t for t in tokenizer.added if t.id >= size]
    vocab = tokenizer.model.get("vocab")
    own = vocab if isinstance(vocab, dict) else {}
    last = size + max(1, int(MAX_BEYOND * size)) - 1
    if not beyond or any(t.id > last or own.get(t.text, t.id) != t.id for t in beyond):
        return ()
    texts = tuple(t.text for t in beyond)
    if any(i >= size and text not in texts for text, i in own.items()):
        return ()
    for text in texts:
        own.pop(text, None)
    tokenizer.added = tuple(t for t in tokenizer.added if t.id < size)
    shown = ", ".join(repr(t[:40]) for t in texts[:3]) + (" ..." if len(texts) > 3 else "")
    tokenizer.notes.append(
        f"tokens beyond the {size:,} rows of the embedding are left out: {len(texts)} of them, "
        f"{shown}"
    )
    return texts


def _kind(tokenizer: TokenizerJson) -> str:
    """llama.cpp's name of the tokenizer."""
    model = tokenizer.model
    kind = model.get("type")
    if kind == "WordPiece":
        return "bert"
    if kind == "Unigram":
        return "t5"
    if kind == "BPE" or (kind is None and "merges" in model):  # older files do not say
        if "ByteLevel" in tokenizer.step_types("pre_tokenizer"):
            return "gpt2"
        if model.get("byte_fallback") is True or _escapes_spaces(tokenizer):
            return "llama"
    raise tokenizer.unlike(
        "its model", kind, "byte-level BPE, SentencePiece BPE, Unigram or WordPiece"
    )


# --- the four ---


def _byte_level(tokenizer: TokenizerJson, size: int) -> Keys:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if tokenizer.model.get(name):
            raise tokenizer.unlike(name, tokenizer.model[name])
    table = _Table(tokenizer, tokenizer.vocabulary(), size, lambda token: NORMAL)
    merges = [f"{left} {right}" for left, right in tokenizer.merges()]
    return table.keys() | {"tokenizer.ggml.merges": GgufValue("STRING", merges)}


def _sentencepiece(tokenizer: TokenizerJson, size: int) -> Keys:
    unknown = tokenizer.model.get("unk_token")
    fallback = tokenizer.model.get("byte_fallback") is True

    def kind(token: str) -> int:
        if token == unknown:
            return UNKNOWN
        return BYTE if fallback and _BYTE_TOKEN.fullmatch(token) else NORMAL

    missing = next((b for b in range(256) if not _has_byte(tokenizer.vocabulary(), b)), None)
    if missing is not None or not fallback:
        raise tokenizer.unlike(
            "SentencePiece BPE without a token for every byte, which llama.cpp falls back on",
            f"byte_fallback {fallback}" if missing is None else f"no token '<0x{missing:02X}>'",
            "byte_fallback true, and 256 tokens <0x00> to <0xFF>",
        )
    table = _Table(tokenizer, tokenizer.vocabulary(), size, kind)
    return table.keys(_merge_scores(tokenizer, table)) | {
        "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer)
    }


def _has_byte(vocabulary: Mapping[str, int], byte: int) -> bool:
    """Whether llama.cpp finds a token for a byte: the character itself will do, as the tab does in
    Gemma's first tokenizers.
    """
    return f"<0x{byte:02X}>" in vocabulary or (byte < 0x80 and chr(byte) in vocabulary)


def _merge_scores(tokenizer: TokenizerJson, table: _Table) -> list[float]:
    """Scores by which SentencePiece merges as the list of merges does.

    SentencePiece merges the pair whose result has the highest score, and takes every pair whose
    result is a token. So a score is the first rank that yields the token, negative; a token that
    no merge yields comes where its id stands, for ids are in the order of merges too.

    Raises:
        UnsupportedError: more than a slip: the merges are not those of a SentencePiece model.
    """
    merges = tokenizer.merges()
    rank: dict[str, int] = {}
    for i, (left, right) in enumerate(merges):
        rank.setdefault(left + right, i)
    unlisted = _unlisted(set(merges), table)
    if len(unlisted) > MAX_UNLISTED * len(table.tokens):
        raise tokenizer.unlike(
            "its merges, for SentencePiece merges whatever gives a token",
            f"{len(unlisted)} such pairs that it does not merge, the first {unlisted[0]}",
        )
    if unlisted:
        tokenizer.warnings.append(
            f"llama.cpp merges {len(unlisted)} pairs of tokens that the tokenizer does not, "
            f"such as {unlisted[0]}"
        )
    scores = []
    previous = -1.0
    for token, kind in zip(table.tokens, table.types, strict=True):
        if token is not None and kind == NORMAL:
            previous = float(rank.get(token, previous))
            scores.append(-previous)
        else:
            scores.append(_UNREACHABLE if kind == UNUSED else 0.0)
    return scores


def _unlisted(listed: set[tuple[str, str]], table: _Table) -> list[tuple[str, str]]:
    """Pairs of tokens that give a token without being merges, in the order of that token's id."""
    typed = zip(table.tokens, table.types, strict=True)
    normal = {token: None for token, kind in typed if token is not None and kind == NORMAL}
    return [pair for pair in token_pairs(normal) if pair not in listed]


def _unigram(tokenizer: TokenizerJson, size: int) -> Keys:
    pieces = tokenizer.model.get("vocab")
    if not isinstance(pieces, list) or not pieces or not all(map(_is_piece, pieces)):
        raise tokenizer.broken("vocab is no list of pieces and scores", pieces)
    if tokenizer.model.get("byte_fallback") is True:
        # llama.cpp would make the unknown token of every line feed.
        raise tokenizer.unlike("byte_fallback of a unigram model", True)
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise tokenizer.broken("the same piece twice", f"{len(pieces) - len(ids)} times")
    unknown = tokenizer.model.get("unk_id")
    if type(unknown) is not int or not 0 <= unknown < len(pieces):
        raise tokenizer.unlike(
            "Unigram without an unknown token", unknown, "unk_id, the id of a piece"
        )
    table = _Table(tokenizer, ids, size, lambda t: UNKNOWN if ids[t] == unknown else NORMAL)
    scores = [float(score) for _, score in pieces] + [_UNREACHABLE] * (size - len(pieces))
    steps = tokenizer.steps("normalizer")
    keys = table.keys(scores) | {
        "tokenizer.ggml.add_space_prefix": _adds_space(tokenizer),
        # Words that were cut at white space come without it.
        "tokenizer.ggml.remove_extra_whitespaces": any(map(_merges_spaces, steps))
        or "WhitespaceSplit" in tokenizer.step_types("pre_tokenizer"),
    }
    for step in steps:
        if step.get("type") == "Precompiled" and step.get("precompiled_charsmap"):
            charsmap = _charsmap(tokenizer, str(step["precompiled_charsmap"]))
            keys["tokenizer.ggml.precompiled_charsmap"] = GgufValue("UINT8", list(charsmap))
    return keys


def _is_piece(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and type(value[1]) in (int, float)
        and -MAX_SCORE < value[1] < MAX_SCORE  # an integer may be beyond any float
    )


def _charsmap(tokenizer: TokenizerJson, text: str) -> bytes:
    """SentencePiece's normalization: the size of a double array, that array, replacements."""
    if len(text) > MAX_CHARSMAP * 4 // 3 + 4:
        raise tokenizer.broken(
            "precompiled_charsmap is too large", f"{len(text):,} characters of base64"
        )
    try:
        charsmap = base64.b64decode(text, validate=True)
    except ValueError as error:  # not base64, or not even ASCII
        raise tokenizer.broken("precompiled_charsmap is not base64", text) from error
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 8 or not 4 <= size < len(charsmap) - 4:  # llama.cpp would not load it
        raise tokenizer.broken(
            "precompiled_charsmap does not hold the array that it announces",
            f"an array of {size:,} bytes in {len(charsmap):,}",
        )
    return charsmap


def _wordpiece(tokenizer: TokenizerJson, size: int) -> Keys:
    prefix = tokenizer.model.get("continuing_subword_prefix", "##")
    if prefix != "##":
        raise tokenizer.unlike("continuing_subword_prefix", prefix, "'##'")
    if tokenizer.step_types("pre_tokenizer") != ["BertPreTokenizer"]:
        raise tokenizer.unlike(
            "pre_tokenizer", tokenizer.fields.get("pre_tokenizer"), "BertPreTokenizer"
        )
    unknown = tokenizer.model.get("unk_token")
    if unknown not in tokenizer.vocabulary():
        raise tokenizer.unlike("WordPiece without an unknown token", unknown, "unk_token, a token")
    table = _Table(
        tokenizer, tokenizer.vocabulary(), size, lambda t: UNKNOWN if t == unknown else NORMAL
    )
    # llama.cpp marks the beginnings of words, WordPiece their other parts.
    for i, (token, kind) in enumerate(zip(table.tokens, table.types, strict=True)):
        if token is not None and kind == NORMAL:
            inner = token.startswith("##")
            table.tokens[i] = token.removeprefix("##") if inner else SPACE + token
    lower, strip = False, None
    for step in tokenizer.steps("normalizer"):
        if step.get("type") == "BertNormalizer":
            lower, strip = step.get("lowercase") is True, step.get("strip_accents")
        lower = lower or step.get("type") == "Lowercase"
        strip = True if step.get("type") == "StripAccents" else strip
    return table.keys() | {
        "tokenizer.ggml.normalizer.lowercase": lower,
        # null: when lowercase
        "tokenizer.ggml.normalizer.strip_accents": lower if strip is None else strip is True,
    }


# What each does, and the normalizers of which it has the like.
_KINDS: dict[str, tuple[Callable[[TokenizerJson, int], Keys], tuple[str, ...]]] = {
    "gpt2": (_byte_level, ()),
    "llama": (_sentencepiece, ("Prepend", "Replace")),
    "t5": (_unigram, ("Precompiled", "Prepend", "Replace", "Strip")),
    "bert": (_wordpiece, ("BertNormalizer", "Lowercase", "StripAccents")),
}


# --- parts ---


class _Table:
    """Tokens by id, None where there is none, and their types."""

    def __init__(
        self, tokenizer: TokenizerJson, ids: dict[str, int], size: int, kind: Callable[[str], int]
    ) -> None:
        largest = max([*ids.values(), *(t.id for t in tokenizer.added)], default=-1)
        if largest >= size:
            raise InputError(
                "tokenizer has more tokens than the model has embeddings",
                path=tokenizer.path,
                found=f"token {largest}",
                wanted=f"at most {size} tokens, config.json's vocab_size",
                hint="the tokenizer is that of another model, or the embeddings were not resized",
                code="ARCH-VOCABULARY",
            )
        self.tokenizer = tokenizer
        self.tokens: list[str | None] = [None] * size
        self.types = [UNUSED] * size
        for token, i in ids.items():
            self.tokens[i], self.types[i] = token, kind(token)
        for added in tokenizer.added:
            if self.types[added.id] != UNKNOWN:
                self.types[added.id] = CONTROL if added.special else USER_DEFINED
            self.tokens[added.id] = added.text

    def keys(self, scores: list[float] | None = None) -> Keys:
        """As GGUF has them."""
        # llama.cpp looks for user-defined tokens in the text before it escapes spaces.
        tokens = [
            t.replace(SPACE, " ") if t is not None and kind == USER_DEFINED else t
            for t, kind in zip(self.tokens, self.types, strict=True)
        ]
        taken = {t: i for i, t in enumerate(tokens) if t is not None}
        for i, token in enumerate(tokens):
            if token is None:
                name = f"[PAD{i}]"
                while name in taken:
                    name = f"[{name}]"
                tokens[i] = name
            elif taken[token] != i:  # llama.cpp would end the process
                raise self.tokenizer.broken(f"tokens {i} and {taken[token]} have one text", token)
        keys: Keys = {"tokenizer.ggml.tokens": GgufValue("STRING", [t or "" for t in tokens])}
        if scores is not None:
            keys["tokenizer.ggml.scores"] = GgufValue("FLOAT32", scores)
        return keys | {"tokenizer.ggml.token_type": GgufValue("INT32", self.types)}


def _ids(tokenizer: TokenizerJson) -> dict[str, int]:
    vocab = tokenizer.model["vocab"]
    ids = vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return ids | {t.text: t.id for t in tokenizer.added}


def _escapes_spaces(tokenizer: TokenizerJson) -> bool:
    return "Metaspace" in tokenizer.step_types("pre_tokenizer") or any(
        step.get("type") == "Replace" and step.get("content") == SPACE
        for step in tokenizer.steps("normalizer")
    )


def _adds_space(tokenizer: TokenizerJson) -> bool:
    """Whether a space comes before the text."""
    for step in tokenizer.steps("pre_tokenizer"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            return (
                step.get("add_prefix_space") is not False if scheme is None else scheme != "never"
            )
    return "Prepend" in tokenizer.step_types("normalizer")


def _merges_spaces(step: dict[str, Any]) -> bool:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return step.get("type") == "Replace" and regex == " {2,}"
