"""Tokens that the ``tokenizers`` library gives texts, in a process of its own.

The library is made for honest files. Others make it panic, which prints and is no exception, end
the process, or take for ever over an expression: from another process none of this reaches us. This
file starts that process, and is its program, which is why it imports nothing of qconvert.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

MAX_SECONDS = 15  # the largest honest file takes 2
_SHOWN = 80
_MODEL = (
    *("type", "vocab", "merges", "unk_token", "unk_id", "continuing_subword_prefix"),
    *("end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges"),
    "max_input_chars_per_word",
)


def library_tokens(
    fields: dict[str, Any], texts: Sequence[tuple[str, bool]]
) -> list[list[int]] | str:
    """Token ids of each text.

    Args:
        fields: of tokenizer.json; parts that have no bearing on ids are not looked at.
        texts: each with whether to add what the tokenizer adds around a text.

    Returns:
        A text, why there are none, where the library is missing or fails.
    """
    if importlib.util.find_spec("tokenizers") is None:
        return "the package tokenizers is not installed (it comes with transformers)"
    names = ("added_tokens", "pre_tokenizer", "post_processor")
    asked = {name: fields.get(name) for name in names} | {
        "version": "1.0",
        "normalizer": _without_empty(fields.get("normalizer")),
        "model": {name: part for name, part in fields["model"].items() if name in _MODEL},
    }
    try:
        done = subprocess.run(  # -P: nothing is imported from where we were started
            [sys.executable, "-P", __file__],
            input=json.dumps([asked, list(texts)]).encode(),
            capture_output=True,
            timeout=MAX_SECONDS,
            check=True,
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return f"the library takes more than {MAX_SECONDS} seconds"
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "the library does not take the file"
    if isinstance(answer, str):
        return f"the library does not take the file: {answer}"
    return [[int(i) for i in ids] for ids in answer]


def _without_empty(normalizer: Any) -> Any:
    """A normalizer without tables that are empty: nothing for us, the end for the library."""
    if not isinstance(normalizer, dict):
        return normalizer
    if normalizer.get("type") == "Precompiled" and not normalizer.get("precompiled_charsmap"):
        return None
    if not isinstance(inner := normalizer.get("normalizers"), list):
        return normalizer
    kept = [step for one in inner if (step := _without_empty(one)) is not None]
    return {**normalizer, "normalizers": kept}


def _answer(asked: bytes) -> Any:
    fields, texts = json.loads(asked)
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(json.dumps(fields))
        return [tokenizer.encode(text, add_special_tokens=added).ids for text, added in texts]
    except BaseException as error:  # a panic is no Exception
        return " ".join(str(error).split())[:_SHOWN]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(sys.stdin.buffer.read())))
