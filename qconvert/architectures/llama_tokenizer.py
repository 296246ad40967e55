"""What llama.cpp makes of a text, from the ``tokenizer.ggml.*`` keys that a file has.

A model of it, written from what its four tokenizers do (src/llama-vocab.cpp at 0c1e57098) and held
against the program itself in tests/test_llama_cpp.py: so a difference from the tokenizer that a
file was made from is found before there is a file.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from qconvert.architectures.llama_pretokenizers import PRE_TOKENIZERS
from qconvert.architectures.llama_text import bert_words, split_words
from qconvert.architectures.tokenizer_json import SPACE
from qconvert.architectures.tokenizers import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from qconvert.files.gguf_writer import GgufValue, MetadataValue

UNKNOWN_PENALTY = 10.0  # of a character that no piece has, below the least likely piece

# Texts that it takes for special tokens whatever their type says: ends of a turn or of a text, and
# parts of a text to be filled in.
_TAKEN_FOR_SPECIAL = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>
    <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>
    <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
    <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|>
    <|prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|>
    <|suffix|> <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|>
    <|middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo>
    <REPO> <reponame> <|file_sep|>
"""
_LOOKS_SPECIAL = frozenset(_TAKEN_FOR_SPECIAL.split())
# Of models with these in their name it drops white space after special tokens.
_STRIPPING_NAMES = ("phi-3", "phi3")
_NOT_STRIPPING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class CannotTokenizeError(Exception):
    """llama.cpp would end the process at this text."""


class LlamaTokenizer:
    """The tokenizer of a file.

    Attributes:
        kind: llama.cpp's name of the tokenizer.
        pre_tokenizer: of byte-level BPE, its name for how text is cut.

    Args:
        metadata: the file's keys.

    Raises:
        KeyError: a pre-tokenizer whose expressions are not known here.
    """

    def __init__(self, metadata: Mapping[str, MetadataValue]) -> None:
        def key(name: str, default: Any = None) -> Any:
            value = metadata.get(f"tokenizer.ggml.{name}", default)
            return value.value if isinstance(value, GgufValue) else value

        self.kind: str = key("model")
        self.tokens: list[str] = key("tokens")
        self.types: list[int] = key("token_type")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self._before = key("bos_token_id") if key("add_bos_token") else None
        self._after = key("eos_token_id") if key("add_eos_token") else None
        self._unknown: int = key("unknown_token_id", 0)
        self._adds_space: bool = key("add_space_prefix", False)
        name = metadata.get("general.name")
        self._stripping = isinstance(name, str) and any(
            part in name.lower() for part in _STRIPPING_NAMES
        )
        self._special = sorted(
            (t for t, kind in zip(self.tokens, self.types, strict=True) if _is_special(t, kind)),
            key=lambda t: -len(t.encode()),
        )
        self.pre_tokenizer: str | None = key("pre") if self.kind == "gpt2" else None
        if self.pre_tokenizer is not None:
            self._whole_words = PRE_TOKENIZERS[self.pre_tokenizer][1]
            self._ranks: dict[tuple[str, str], int] = {}
            for i, merge in enumerate(key("merges")):
                left, _, right = merge[1:].partition(" ")
                self._ranks.setdefault((merge[0] + left, right), i)
        elif self.kind == "llama":
            self._scores: list[float] = key("scores")
        elif self.kind == "bert":
            self._lowercase = key("normalizer.lowercase")
            self._strips_accents = key("normalizer.strip_accents")
            self._before, self._after = key("bos_token_id"), key("seperator_token_id")
            self._bytes = {token.encode(): i for token, i in self.ids.items()}
            self._longest = max(map(len, self._bytes))
        else:
            self._pieces = _Pieces(self, key)

    @property
    def special_count(self) -> int:
        """How many tokens are looked for in every text."""
        return len(self._special)

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What it puts before a text, and after it."""
        before, after = ([] if i is None else [i] for i in (self._before, self._after))
        return before, after

    def encode(self, text: str) -> list[int]:
        """Token ids of a text by itself; special tokens in it are taken as such.

        Raises:
            CannotTokenizeError: llama.cpp would end the process.
        """
        found: list[int] = []
        after_special = True
        for part in self._fragments(text):
            if isinstance(part, int):
                found.append(part)
                after_special = True
                continue
            if self.pre_tokenizer is not None:
                found += self._byte_level(part, self.pre_tokenizer)
            elif self.kind == "bert":
                found += self._wordpiece(part)
            elif self.kind == "llama":
                start = " " if self._adds_space and after_special else ""
                found += self._sentencepiece((start + part).replace(" ", SPACE))
            else:
                found += self._pieces.encode(part.encode())
            after_special = False
        return found

    def _fragments(self, text: str) -> list[str | int]:
        """A text taken apart at its special tokens, the longest first."""
        parts: list[str | int] = [text] if text else []
        for special in self._special:
            if not special or special not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                strips = self._stripping and special not in _NOT_STRIPPING
                for i, piece in enumerate(part.split(special)):
                    if i:
                        cut.append(self.ids[special])
                        piece = piece.lstrip(" \t\n\x0b\f\r") if strips else piece
                    if piece:
                        cut.append(piece)
            parts = cut
        return parts

    # --- byte-level BPE ---

    def _byte_level(self, text: str, pre_tokenizer: str) -> Iterator[int]:
        for word in split_words(text, pre_tokenizer):
            encoded = "".join(BYTE_CHARACTERS[b] for b in word.encode())
            if self._whole_words and encoded in self.ids:
                yield self.ids[encoded]
                continue
            for symbol in _merged(list(encoded), self._ranks):
                if symbol in self.ids:
                    yield self.ids[symbol]
                # Bytes of what it did not find, one by one: none of them is a token but in ASCII.
                else:
                    yield from (self.ids[c] for c in symbol if c in self.ids and c.isascii())

    # --- SentencePiece ---

    def _sentencepiece(self, text: str) -> Iterator[int]:
        for symbol in self._joined(list(text)):
            if symbol in self.ids:
                yield self.ids[symbol]
                continue
            for byte in symbol.encode():
                name = f"<0x{byte:02X}>"
                if name not in self.ids:
                    name = chr(byte)
                if name not in self.ids or (byte > 0x7F and not name.startswith("<0x")):
                    raise CannotTokenizeError(f"no token for byte 0x{byte:02X}")
                yield self.ids[name]

    def _joined(self, symbols: list[str]) -> list[str]:
        """Neighbours joined while that gives a token, the highest score and then the left first."""
        following = [*range(1, len(symbols)), -1]
        before = [*range(-1, len(symbols) - 1)]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                i = self.ids.get(symbols[left] + symbols[right])
                if i is not None:
                    size = len(symbols[left]) + len(symbols[right])
                    heapq.heappush(queue, (-float(np.float32(self._scores[i])), left, right, size))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not symbols[left] or not symbols[right]:
                continue
            if len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            following[left] = following[right]
            if following[right] >= 0:
                before[following[right]] = left
            offer(before[left], left)
            offer(left, following[left])
        return [s for s in symbols if s]

    # --- WordPiece ---

    def _wordpiece(self, text: str) -> Iterator[int]:
        words = bert_words(text, lowercase=self._lowercase, strip_accents=self._strips_accents)
        for word in words:
            data = (SPACE + word).encode()
            found: list[int] = []
            start = 0
            while start < len(data):
                for stop in range(min(len(data), start + self._longest + 1), start, -1):
                    i = self._bytes.get(data[start:stop])
                    if i is not None:
                        found.append(i)
                        start = stop
                        break
                else:
                    found = []
                    break
            yield from found or [self._unknown]


class _Pieces:
    """Unigram: the likeliest pieces of a normalized text."""

    def __init__(self, tokenizer: LlamaTokenizer, key: Any) -> None:
        typed = list(zip(tokenizer.tokens, tokenizer.types, strict=True))
        self._unknown: int = key("unknown_token_id", 2)
        self._adds_space: bool = key("add_space_prefix", False)
        self._merges_spaces: bool = key("remove_extra_whitespaces", False)
        scores = np.asarray(key("scores"), np.float32)
        normal = [float(scores[i]) for i, (_, kind) in enumerate(typed) if kind == NORMAL]
        self._unknown_score = float(
            np.float32(np.float32(min(normal, default=0.0)) - np.float32(UNKNOWN_PENALTY))
        )
        self._pieces = {
            token.encode(): (i, 0.0 if kind == USER_DEFINED else float(scores[i]))
            for i, (token, kind) in enumerate(typed)
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        self._longest = max(map(len, self._pieces), default=0)
        user = [token.encode() for token, kind in typed if kind == USER_DEFINED]
        self._user_starts = {token[:n] for token in user for n in range(1, len(token) + 1)}
        charsmap = key("precompiled_charsmap")
        self._charsmap = bytes(charsmap) if charsmap else b""
        size = int.from_bytes(self._charsmap[:4], "little")
        self._array = np.frombuffer(self._charsmap[4 : 4 + size // 4 * 4], "<u4")
        self._replacements = self._charsmap[4 + size :]

    def encode(self, text: bytes) -> list[int]:
        data = self._normalized(text)
        if not data:
            return []
        best: list[tuple[float, int, int]] = [(0.0, self._unknown, 0)]
        best += [(-np.inf, self._unknown, 0)] * len(data)
        at = 0
        while at < len(data):
            width = min(_utf8_length(data[at]), len(data) - at)
            score, alone = best[at][0], False
            for stop in range(at + 1, min(at + self._longest, len(data)) + 1):
                piece = self._pieces.get(data[at:stop])
                if piece is None:
                    continue
                alone |= stop - at == width
                if score + piece[1] > best[stop][0]:
                    best[stop] = score + piece[1], piece[0], at
            if not alone and score + self._unknown_score > best[at + width][0]:
                best[at + width] = score + self._unknown_score, self._unknown, at
            at += width
        found: list[int] = []
        at = len(data)
        while True:
            _, token, start = best[at]
            if not (found and found[-1] == token == self._unknown):
                found.append(token)
            if start == 0:
                return found[::-1]
            at = start

    def _normalized(self, text: bytes) -> bytes:
        space = SPACE.encode()
        out = bytearray()
        prepended = in_word = False
        at = 0
        while at < len(text):
            part, used = self._step(text, at)
            for byte in part:
                if byte != 0x20:
                    if not in_word:
                        in_word = True
                        if (self._adds_space and not prepended) or self._merges_spaces:
                            out += space
                            prepended = True
                    out.append(byte)
                else:
                    in_word = False
                    if not self._merges_spaces:
                        out += space
            at += used
        return bytes(out)

    def _step(self, text: bytes, at: int) -> tuple[bytes, int]:
        """What the text becomes at a place, and how many bytes of it that was."""
        n = 0
        while at + n < len(text) and text[at : at + n + 1] in self._user_starts:
            n += 1
        if n:  # the beginning of a token that is never normalized
            return text[at : at + n], n
        if len(self._array):
            found = self._replacement(text, at)
            if found is not None:
                return found
        width = min(_utf8_length(text[at]), len(text) - at)
        return text[at : at + width], width

    def _replacement(self, text: bytes, at: int) -> tuple[bytes, int] | None:
        """The longest beginning that SentencePiece's double array replaces."""

        def unit(i: int) -> int:
            if i >= len(self._array):
                raise CannotTokenizeError("the normalization map leads out of itself")
            return int(self._array[i])

        def base(i: int) -> int:
            u = unit(i)
            return (u >> 10) << ((u & (1 << 9)) >> 6)

        node, length, place = base(0), 0, 0
        for i in range(at, len(text)):
            byte = text[i]
            if not byte:
                break
            node ^= byte
            if unit(node) & (1 << 31 | 0xFF) != byte:
                break
            leaf = unit(node) >> 8 & 1
            node ^= base(node)
            if leaf:
                length, place = i - at + 1, unit(node) & ((1 << 31) - 1)
        if not length:
            return None
        end = self._replacements.find(b"\0", place)
        if place >= len(self._replacements) or end < 0:
            raise CannotTokenizeError("a replacement lies outside the normalization map")
        return self._replacements[place:end], length


def _is_special(token: str, kind: int) -> bool:
    return kind in (CONTROL, USER_DEFINED, UNKNOWN) or token in _LOOKS_SPECIAL


def _merged(symbols: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Neighbours merged by rank, the left one first among equals."""
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def _utf8_length(first: int) -> int:
    """Bytes of a character, by its first byte."""
    return (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4)[first >> 4]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


BYTE_CHARACTERS = _byte_characters()
