"""Tokens that llama.cpp will give a text, held against those that the model's tokenizer gives it.

The first come from a model of llama.cpp, the second from the ``tokenizers`` library, where it is
installed: it comes with transformers. Without it the findings of `tokenizer_findings` remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qconvert.architectures.library_tokens import library_tokens
from qconvert.architectures.llama_tokenizer import CannotTokenizeError, LlamaTokenizer
from qconvert.architectures.pretokenizer_names import tell_other_name
from qconvert.architectures.tokenizer_findings import LONG_WORD
from qconvert.architectures.tokenizer_json import SPACE, TokenizerJson
from qconvert.architectures.trial_text import TEXT
from qconvert.errors import UnsupportedError
from qconvert.files.gguf_writer import MetadataValue

# What people write.
ORDINARY = (
    "the quick brown fox jumps over the lazy dog",
    "Hello world",
    "It's DON'T, we'll and I'VE",
    "It cost $3.14, or 12345678 in 1984 (60%).",
    "UPPER lower MiXeD",
    "naïve café — déjà vu",
    "数字 and 漢字。日本語テキスト",
    "Привет мир",
    "مرحبا بالعالم",
    "हिन्दी",
    "“quotes” don’t … end",
    "def f(x):\n    return x  # comment",
    "http://example.com/a_b?c=d&e",
    "tab\tand\nnewline",
)
# What they write less often: white space at the ends and in runs, marks, signs, control characters.
AWKWARD = (
    " ",
    " leading",
    "trailing ",
    "two  spaces,   three",
    "\n\n\nlines\r\n\r\n    x",
    "😀👍🏽",
    "a\x01c\x7f",
    "no\u00a0break zero\u200bwidth",
    "ﬁ Ⅷ ① ß Éa éA",
)
COMPOSED = "cafe\u0301"  # with an accent of its own
HANGUL = "한국어"
MAX_SPECIAL = 50_000  # tokens that are looked for in each text
_NOTED = "llama.cpp, whatever a file says, gives other tokens than the tokenizer for"
_SHOWN_IDS = 12


def compare_tokens(tokenizer: TokenizerJson, metadata: Mapping[str, MetadataValue]) -> None:
    """Add to the tokenizer's warnings the first text that gets other tokens; or a note that none
    was compared.

    Raises:
        UnsupportedError: most texts get other tokens, or llama.cpp would end the process.
    """
    if tokenizer.cut_unknown:  # the library would cut by no rules at all
        tokenizer.notes.append(f"tokens were not compared: {tokenizer.cut_unknown}")
        return
    try:
        ours = LlamaTokenizer(metadata)
    except KeyError as error:  # named by the user: nothing is known of how it cuts
        tokenizer.notes.append(f"tokens were not compared: no model here of {error}")
        return
    if ours.special_count > MAX_SPECIAL:
        tokenizer.notes.append("tokens were not compared: too many special tokens")
        return
    texts = [*ORDINARY, *AWKWARD, *_around_added(tokenizer)]
    found = {text: _encoded(ours, text, tokenizer) for text in (*texts, COMPOSED, HANGUL)}
    wanted = _library(tokenizer, ours, list(found))
    if isinstance(wanted, str):
        tokenizer.notes.append(f"tokens were not compared with the tokenizer's: {wanted}")
        return
    different = [text for text in texts if found[text] != wanted[text]]
    for text, expected in ((COMPOSED, _keeps_marks(tokenizer)), (HANGUL, _keeps_hangul(ours))):
        if found[text] != wanted[text]:
            if expected:
                tokenizer.notes.append(f"{_NOTED} {text!r} and its like")
            else:
                different.append(text)
    if not different:
        return
    first = different[0]
    told = (
        f"llama.cpp gives other tokens than the tokenizer for {first!r}: "
        f"{_ids(found[first])} instead of {_ids(wanted[first])}"
    )
    strange = sum(text in different for text in ORDINARY)
    if 2 * strange > len(ORDINARY):
        raise UnsupportedError(
            "llama.cpp would not tokenize as the model does",
            path=tokenizer.path,
            found=f"{told}; the same of {strange} of {len(ORDINARY)} ordinary texts",
            hint="the model would be fed with nonsense; --raw writes the tensors alone",
            code="ARCH-TOKENS",
        )
    tokenizer.warnings.append(f"{told} ({len(different)} of {len(found)} texts tried differ)")


def _library(
    tokenizer: TokenizerJson, ours: LlamaTokenizer, texts: list[str]
) -> dict[str, list[int]] | str:
    """The tokens of the library that defines what the file means; a text: why there are none.

    Warns of other tokens before a text, or after it, and of another pre-tokenizer by its hash.
    """
    asked = [*((text, False) for text in texts), (TEXT, True), ("a", False), ("a", True)]
    found = library_tokens(tokenizer.fields, asked)
    if isinstance(found, str):
        return found
    *each, trial, inner, whole = found
    if ours.pre_tokenizer is not None:
        tell_other_name(tokenizer, ours.pre_tokenizer, trial)
    before, after = ours.around
    if whole != [*before, *inner, *after]:
        tokenizer.warnings.append(
            f"llama.cpp puts {_ids(before)} before a text and {_ids(after)} after it, the "
            f"tokenizer makes {_ids(whole)} of {_ids(inner)}"
        )
    return dict(zip(texts, each, strict=True))


def _encoded(ours: LlamaTokenizer, text: str, tokenizer: TokenizerJson) -> list[int]:
    try:
        return ours.encode(text)
    except CannotTokenizeError as error:
        raise UnsupportedError(
            "llama.cpp would end the process at a text",
            path=tokenizer.path,
            found=f"{text!r}: {error}",
            code="ARCH-TOKENS",
        ) from error


def _around_added(tokenizer: TokenizerJson) -> Iterator[str]:
    """Texts with an added token of each kind: within a word, by itself, at the beginning."""
    seen: set[tuple[bool, tuple[str, ...]]] = set()
    for token in tokenizer.added:
        kind = (token.special, token.flags)
        if kind in seen or not 0 < len(token.text) <= LONG_WORD or len(seen) >= 8:
            continue
        seen.add(kind)
        text = token.text.replace(SPACE, " ")  # which is what it is looked for in
        yield f"a{text}b"
        if "lstrip" not in token.flags and "rstrip" not in token.flags:  # told by a finding
            yield f"to {text} go"
        yield f"{text}start"


def _keeps_marks(tokenizer: TokenizerJson) -> bool:
    """Whether the tokenizer composes characters, which llama.cpp does not: said in general."""
    return bool({"NFC", "NFKC"} & set(tokenizer.step_types("normalizer")))


def _keeps_hangul(ours: LlamaTokenizer) -> bool:
    """Whether accents are stripped, which costs Hangul its parts: said in general."""
    return ours.kind == "bert"


def _ids(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN_IDS]))
    return f"[{shown}{', ...' if len(ids) > _SHOWN_IDS else ''}]"
