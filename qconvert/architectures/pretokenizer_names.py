"""llama.cpp's name for the way in which a tokenizer cuts text.

It is found by the tokenizer's rules; where these are none that we know, by the hash of llama.cpp's
trial text, as its own converter does. What neither tells is refused, for a wrong name gives other
tokens without a word.
"""

from __future__ import annotations

import difflib
import reprlib

from qconvert.architectures.library_tokens import library_tokens
from qconvert.architectures.llama_pretokenizers import PRE_TOKENIZERS, plain_name
from qconvert.architectures.pretokenizers import NAMES, cut_by
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.trial_text import TEXT, trial_hash, trial_name
from qconvert.errors import UnsupportedError

_SHOWN = 200  # characters of an expression in a message
_SHOWN_STEPS = 4

# Every name that llama.cpp at 0c1e57098 loads (src/llama-vocab.cpp); it refuses any other. Beside
# those of byte-level BPE: of SentencePiece's BPE, and of one without bytes.
LOADED = frozenset(PRE_TOKENIZERS) | {
    *("gemma4", "granite-embed-multi-311m", "sarvam-moe"),
    "whitespace",
}


def named_warnings(tokenizer: TokenizerJson, name: str) -> list[str]:
    """What to say about a name that the user gives: llama.cpp does not load it, or the tokenizer's
    rules are those of another.
    """
    found = []
    if name not in LOADED:
        near = difflib.get_close_matches(name, sorted(LOADED), n=1)
        meant = f"; did you mean '{near[0]}'?" if near else ""
        found.append(f"no llama.cpp that we know loads a pre-tokenizer '{name}'{meant}")
    rules = name_by_rules(tokenizer)
    if rules is not None and rules != plain_name(name):
        found.append(
            f"pre-tokenizer '{name}' was named; the rules in {tokenizer.path.name} are those of "
            f"'{rules}'"
        )
    return found


def name_by_rules(tokenizer: TokenizerJson) -> str | None:
    """The name for a byte-level BPE tokenizer by its rules; None: not known by them."""
    expressions = cut_by(tokenizer)
    if expressions is None or tokenizer.cut_unknown:
        return None
    return NAMES.get((expressions, tokenizer.model.get("ignore_merges") is True))


def find_name(tokenizer: TokenizerJson) -> str:
    """The name for a byte-level BPE tokenizer; how it was found is added to the tokenizer's notes.

    Raises:
        UnsupportedError: llama.cpp is not known to split text in this way.
    """
    if tokenizer.cut_unknown:
        raise UnsupportedError(
            "pre-tokenizer is not known",
            path=tokenizer.path,
            found=tokenizer.cut_unknown,
            wanted="llama.cpp's name for how the model's own code cuts text",
            hint="if you know which it is, say --pre-tokenizer NAME",
            code="ARCH-PRE-TOKENIZER",
        )
    if (name := name_by_rules(tokenizer)) is not None:
        tokenizer.notes.append(f"pre-tokenizer '{name}': by the rules in {tokenizer.path.name}")
        return name
    found = library_tokens(tokenizer.fields, [(TEXT, True)])
    if isinstance(found, str):
        raise _unknown(tokenizer, f"its hash could not be looked up, for {found}")
    if (name := trial_name(found[0])) is None:
        hashed = trial_hash(found[0])
        raise _unknown(tokenizer, f"the hash of llama.cpp's trial text, {hashed}, is unknown too")
    tokenizer.notes.append(
        f"pre-tokenizer '{name}': by the hash of llama.cpp's trial text, for the rules in "
        f"{tokenizer.path.name} are none that we know"
    )
    return name


def tell_other_name(tokenizer: TokenizerJson, name: str, trial: list[int]) -> None:
    """Say where the hash of the trial text is that of a pre-tokenizer that cuts otherwise.

    The name stays: rules say how every text is cut, the hash how one is, and tokenizers that differ
    elsewhere share it (Llama 3 without the token before a text has Smaug's, which makes all merges
    of words that are tokens). One that the user gives may be a slip.

    Args:
        tokenizer: the file.
        name: what is written.
        trial: tokens that the library gives the trial text.
    """
    hashed = trial_name(trial)
    if hashed is None or plain_name(hashed) == plain_name(name):
        return
    by = f"llama.cpp's converter would write '{hashed}', by the hash of its trial text"
    if plain_name(name) == name_by_rules(tokenizer):
        tokenizer.notes.append(f"{by}: '{name}' stays, for the rules say how every text is cut")
    else:
        tokenizer.warnings.append(f"pre-tokenizer '{name}' was named; {by}")


def _unknown(tokenizer: TokenizerJson, hashed: str) -> UnsupportedError:
    expressions = cut_by(tokenizer)
    if expressions is None:
        shown = [reprlib.repr(step) for step in tokenizer.steps("pre_tokenizer")]
    else:
        shown = [e if len(e) <= _SHOWN else e[:_SHOWN] + "..." for e in expressions]
    found = " then ".join(shown[:_SHOWN_STEPS]) or "no expression at all"
    if tokenizer.model.get("ignore_merges") is True:
        found += "; ignore_merges is true"
    return UnsupportedError(
        "pre-tokenizer is none that we know in llama.cpp",
        path=tokenizer.path,
        found=found,
        wanted=f"the rules of one of {len(NAMES)} that we know, or a hash that llama.cpp knows",
        hint=f"{hashed}; if you know which of llama.cpp's it is, say --pre-tokenizer NAME",
        code="ARCH-PRE-TOKENIZER",
    )
