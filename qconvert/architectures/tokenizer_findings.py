"""What of a tokenizer.json llama.cpp does not follow, known from the file alone.

Each finding gives a text that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.architectures.tokenizer_json import TokenizerJson

LONG_WORD = 100  # characters: the usual limit of WordPiece, which llama.cpp does not have
_SHOWN = 40


def findings(tokenizer: TokenizerJson, kind: str) -> list[str]:
    """Warnings.

    Args:
        tokenizer: the file.
        kind: llama.cpp's name of the tokenizer.
    """
    found = [*_spaces(tokenizer, kind), *_added(tokenizer), *_model(tokenizer, kind)]
    return found + list(_normalizer(tokenizer, kind))


def _spaces(tokenizer: TokenizerJson, kind: str) -> Iterator[str]:
    for step in tokenizer.steps("pre_tokenizer"):
        if step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first":
            special = next((t.text for t in tokenizer.added if t.special), "<s>")
            yield (
                "the tokenizer puts a space before the first word of a text only "
                "(prepend_scheme 'first'), llama.cpp after every special token too: other tokens "
                f"for {special + 'a'!r}"
            )


def _added(tokenizer: TokenizerJson) -> Iterator[str]:
    """Added tokens that are found in another way than letter by letter."""
    shown: set[str] = set()
    stripping = {"lstrip": "' {}'", "rstrip": "'{} '"}
    for token in tokenizer.added:
        for flag in token.flags:
            if flag in shown or flag == "normalized":
                continue
            shown.add(flag)
            if flag == "single_word":
                yield (
                    f"llama.cpp finds added tokens within words, the tokenizer not those with "
                    f"single_word: other tokens for {'a' + token.text[:_SHOWN] + 'a'!r}"
                )
            elif flag in stripping and not token.text.lower().strip("<>[]|").startswith("mask"):
                text = stripping[flag].format(token.text[:_SHOWN])
                yield (
                    f"llama.cpp keeps white space beside added tokens with {flag}, the tokenizer "
                    f"drops it: other tokens for {text}"
                )


def _model(tokenizer: TokenizerJson, kind: str) -> Iterator[str]:
    model = tokenizer.model
    if model.get("dropout"):
        yield (
            f"the tokenizer leaves out merges at random (dropout {model['dropout']}), llama.cpp "
            "makes them all: tokens of every longer word may differ"
        )
    most = model.get("max_input_chars_per_word")
    if kind == "bert" and type(most) is int and most < LONG_WORD:
        yield (
            f"the tokenizer takes words of more than {most} characters for unknown "
            f"(max_input_chars_per_word), llama.cpp cuts them up: other tokens for "
            f"{'a' * min(most + 1, _SHOWN)!r}"
        )


def _normalizer(tokenizer: TokenizerJson, kind: str) -> Iterator[str]:
    if kind != "bert":
        return
    steps = tokenizer.steps("normalizer")
    bert = next((s for s in steps if s.get("type") == "BertNormalizer"), None)
    if bert is None:
        yield (
            "llama.cpp takes control characters out of a text and cuts at Chinese ones, the "
            "tokenizer, without a BertNormalizer, does not: other tokens for '漢字'"
        )
        return
    if bert.get("clean_text") is False:
        yield (
            "llama.cpp takes control characters out of a text, the tokenizer does not (clean_text "
            "false): other tokens for 'a\\u0001b'"
        )
    if bert.get("handle_chinese_chars") is False:
        yield (
            "llama.cpp cuts at Chinese characters, the tokenizer does not (handle_chinese_chars "
            "false): other tokens for '漢字'"
        )


__all__ = ["LONG_WORD", "findings"]
