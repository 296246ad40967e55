"""Texts that nobody writes, and tokenizers that were trained on some of them.

Shared by test_tokens.py, which asks the tokenizers library, and test_llama_cpp.py, which asks
llama.cpp too.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import CONFIGS, added, weights, write_directory

from qconvert.architectures.pretokenizers import pre_tokenizer_steps
from qconvert.architectures.token_check import AWKWARD, ORDINARY

# Where llama.cpp itself, whatever the file says, cuts otherwise: between letters and their marks;
# numbers of more than three digits that go on without a boundary of words, and white space before
# others; white space beyond ASCII, which is none of the characters of East Asia to it; numbers of
# ASCII digits and others together.
LETTERS_ALONE = ("gpt-4o", "tekken", "kimi-k2")
OTHERWISE_CUT = {"tiny_aya": 0.1, "deepseek-coder": 0.01, "deepseek-llm": 0.01, "superbpe": 0.01}


def trained(
    expressions: tuple[str, ...], ignore_merges: bool, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """A byte-level BPE tokenizer with these expressions, trained on further texts and these."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    fields = json.loads(made.to_str()) | {"pre_tokenizer": pre_tokenizer_steps(expressions)}
    made = tokenizers.Tokenizer.from_str(json.dumps(fields))
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([*ORDINARY * 20, *AWKWARD * 5, *awkward(2)[:200], *texts], trainer)
    fields = json.loads(made.to_str())
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


# What only some pre-tokenizers have an eye for: other scripts, marks, numbers and controls.
MORE_PIECES = (
    *("<sentinel:12>", "IMGIMGABZ", "IMGIMGABCDEZ", "!=x", "——", "12345678901", "한국어 ", "a b c"),
    *(
        "'Tis",
        "we'LL",
        "'RE",
        "\n\n\n   ",
        "    \t",
        " " * 9,
        "ABCdef",
        "abcDEF",
        "漢字'S",
        "x１２３４y",
    ),
    *(
        "٣٤٥٦7890",
        "//\n///",
        "!!\r\n/",
        "ㄱㄴ",
        "ㄅㄆ",
        "แม่",
        "កាន់",
        "မြန်",
        "𠀀𠀁〇",
        "《a》",
        "“b”…",
    ),
)
MORE_POOL = (
    "\x1c\x1f\x85\u2009\u1680〇ㄱㄅㆎก្က￥＄｡ﾊ龦鿿㐀豈𠮷⼀ꩠꧠᄀ。，、।۔،（）"
    "｜|\ue000\ue006\U000f0000İſKßǅªʰ①²¾৩๓㈠"
)


def awkward(seed: int, count: int = 2000, *, more: bool = False) -> list[str]:
    """Texts of words, marks and white space in any order.

    Args:
        seed: of their choice.
        count: how many.
        more: with what only some pre-tokenizers have an eye for.
    """
    draw = random.Random(seed)
    pieces, pool = (PIECES + MORE_PIECES, POOL + MORE_POOL) if more else (PIECES, POOL)
    return [
        "".join(
            draw.choice(pieces) if draw.random() < 0.3 else draw.choice(pool)
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
