"""tokenizer.json, parsed and checked as far as more than one kind of tokenizer needs it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qconvert.errors import FormatError, UnsupportedError

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
SPACE = "\u2581"  # what SentencePiece writes for a space
_SHOWN = 40  # characters of the name of a kind of step
_Token = TypeVar("_Token", str, bytes)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text itself, before it is split.

    Attributes:
        flags: which of ``single_word``, ``lstrip``, ``rstrip`` and ``normalized`` are set.
    """

    id: int
    text: str
    special: bool
    flags: tuple[str, ...] = ()


class TokenizerJson:
    """The file; see the ``tokenizers`` library for what its parts mean.

    Attributes:
        path: of the file, for messages.
        fields: the whole object.
        model: its vocabulary and merges.
        added: tokens beside the vocabulary, or in it and treated on their own.
        warnings: in which cases llama.cpp will give other tokens; whoever reads the file adds them.
        notes: what else is to be said of the tokens.
        cut_unknown: a sentence where the file does not say how text is cut, so that its
            pre-tokenizer is not the model's.

    Raises:
        FormatError: the object has not these parts.
    """

    def __init__(self, fields: dict[str, Any], path: Path, cut_unknown: str | None = None) -> None:
        self.path = path
        self.cut_unknown = cut_unknown
        self.fields = fields
        model = fields.get("model")
        if not isinstance(model, dict):
            raise self.broken("no 'model', an object", model)
        self.model: dict[str, Any] = model
        for part in PARTS:
            if not _typed(fields.get(part)):
                raise self.broken(f"{part} is no object with a type", fields[part])
        self.added = tuple(self._added())
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def steps(self, part: str) -> list[dict[str, Any]]:
        """The steps of a normalizer, pre-tokenizer or post-processor, sequences laid flat."""
        return list(_flat(self.fields.get(part)))

    def step_types(self, part: str) -> list[str]:
        """What kinds of steps those are."""
        return [str(step.get("type"))[:_SHOWN] for step in self.steps(part)]

    def vocabulary(self) -> dict[str, int]:
        """Ids by token, of a model that has an object of them.

        Raises:
            FormatError: it has none, or two tokens have one id.
        """
        vocab = self.model.get("vocab")
        if not isinstance(vocab, dict) or not vocab:
            raise self.broken("vocab is no object of tokens and ids", vocab)
        if not all(type(i) is int and i >= 0 for i in vocab.values()):
            raise self.broken("vocab has an id that is no count", vocab)
        if len(set(vocab.values())) < len(vocab):
            raise self.broken("two tokens have one id", vocab)
        return vocab

    def merges(self) -> list[tuple[str, str]]:
        """Merges in their order: pairs or, in older files, texts with a space between.

        Raises:
            FormatError: there are none, or something else.
        """
        merges = self.model.get("merges")
        if not isinstance(merges, list) or not merges:
            raise self.broken("no merges, a list", merges)
        found = []
        for merge in merges:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(isinstance(p, str) and p for p in pair)
            ):
                raise self.broken("merge is no pair of tokens", merge)
            found.append((pair[0], pair[1]))
        return found

    def broken(self, message: str, found: object) -> FormatError:
        """A rule of the file that it breaks."""
        return FormatError(
            f"not a usable tokenizer: {message}",
            path=self.path,
            found=reprlib.repr(found),
            code="ARCH-TOKENIZER-FILE",
        )

    def unlike(self, what: str, found: object, wanted: str | None = None) -> UnsupportedError:
        """Something that llama.cpp's tokenizers do not do."""
        return UnsupportedError(
            f"tokenizer is none that llama.cpp has: {what}",
            path=self.path,
            found=reprlib.repr(found),
            wanted=wanted,
            code="ARCH-TOKENIZER",
        )

    def _added(self) -> Iterator[AddedToken]:
        added = self.fields.get("added_tokens") or []
        if not isinstance(added, list):
            raise self.broken("added_tokens is no list", added)
        for token in added:
            if (
                not isinstance(token, dict)
                or type(token.get("id")) is not int
                or token["id"] < 0
                or not isinstance(token.get("content"), str)
            ):
                raise self.broken("added token without id and content", token)
            flags = tuple(name for name in FLAGS if token.get(name) is True)
            yield AddedToken(token["id"], token["content"], token.get("special") is True, flags)


def added_token(number: int, text: str, *, special: bool) -> dict[str, Any]:
    """What ``added_tokens`` has of a token without flags."""
    return {"id": number, "content": text, "special": special, **dict.fromkeys(FLAGS, False)}


def surrounding(before: list[tuple[str, int]], after: list[tuple[str, int]]) -> dict[str, Any]:
    """A post-processor that puts tokens, texts and ids, before and after every text."""
    first, last = (
        [{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in tokens]
        for tokens in (before, after)
    )
    text, other = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*first, text, *last],
        "pair": [*first, text, *last, *first, other, *last],
        "special_tokens": {
            text: {"id": text, "ids": [i], "tokens": [text]} for text, i in (*before, *after)
        },
    }


def token_pairs(tokens: Mapping[_Token, Any]) -> Iterator[tuple[_Token, _Token]]:
    """All pairs of tokens that give a token, in the order of that and of the first's length."""
    for token in tokens:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in tokens and right in tokens:
                yield left, right


def _typed(part: Any) -> bool:
    """Whether a part is one that a reader can tell the kind of, or absent."""
    return part is None or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _flat(step: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(step, dict):
        return
    for name in ("normalizers", "pretokenizers", "processors"):
        if isinstance(step.get(name), list):
            for inner in step[name]:
                yield from _flat(inner)
            return
    yield step
