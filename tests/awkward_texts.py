"""Texts that nobody writes, and tokenizers that were trained on some of them.

Shared by test_tokens.py, which asks the tokenizers library, and test_llama_cpp.py, which asks
llama.cpp too.
"""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

from tiny_models import CONFIGS, added, weights, write_directory

from qconvert.architectures.pretokenizers import DIGIT, GPT2
from qconvert.architectures.token_check import AWKWARD, ORDINARY

# Where llama.cpp itself, whatever the file says, cuts otherwise: at marks; at every text with upper
# case after lower, for its classes of both are all letters; at white space beyond ASCII, which is
# none of the characters of East Asia to it.
LETTERS_ALONE = ("gpt-4o", "tekken")
OTHERWISE_CUT = {"tiny_aya": 0.1, "deepseek-coder": 0.01, "deepseek-llm": 0.01}


def trained(expressions: tuple[str, ...], ignore_merges: bool) -> dict[str, Any]:
    """A byte-level BPE tokenizer with these expressions, trained on the texts below."""
    import tokenizers

    steps = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True)
        if e == DIGIT
        else tokenizers.pre_tokenizers.Split(tokenizers.Regex(e), "isolated")
        for e in expressions
        if e != GPT2
    ]
    level = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=GPT2 in expressions
    )
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*steps, level])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, show_progress=False, initial_alphabet=level.alphabet()
    )
    made.train_from_iterator([*ORDINARY * 20, *AWKWARD * 5, *awkward(2)[:200]], trainer)
    fields: dict[str, Any] = json.loads(made.to_str())
    first = len(fields["model"]["vocab"])
    fields["added_tokens"] = [added(first, "<|begin|>"), added(first + 1, "<|end|>")]
    return fields


PIECES = (
    *("don't", "I'LL", "HTTPServer", "x=1", "3.14159", "1234567890", "  ", "\n\n", "\r\n"),
    *("été", "ΑΒΓ", "ﬁ", "'s", "#!/bin", "日本語", "가나다", "a\u0301b", "...", "--", "€100"),
)
POOL = (
    "abcXYZ ÀßéÉΩжЖ漢字テ한हि\u094d01239٣Ⅷ½ \n\r\t\x0b\u00a0\u2028\u3000'’\"!?.,;:/\\$+<=>^`|~"
    "№😀👍\u200b\u0301\ue123-_()[]{}"
)


def awkward(seed: int, count: int = 2000) -> list[str]:
    """Texts of words, marks and white space in any order."""
    draw = random.Random(seed)
    return [
        "".join(
            draw.choice(PIECES) if draw.random() < 0.3 else draw.choice(POOL)
            for _ in range(draw.randint(1, 14))
        )
        for _ in range(count)
    ]


def marked(text: str) -> bool:
    """Whether a text has combining marks."""
    return any(unicodedata.category(c).startswith("M") for c in text)


def directory_with(tokenizer: dict[str, Any], place: Path) -> Path:
    """A tiny Llama with a tokenizer of its own, and rows for all of its tokens."""
    size = {"vocab_size": len(tokenizer["model"]["vocab"]) + 8}
    tensors = weights({**CONFIGS["llama"], **size})
    return write_directory(place, "llama", config=size, tensors=tensors, tokenizer=tokenizer)
