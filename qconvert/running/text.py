"""Text files to tokens: windows of equal length for causal models, lines for encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.errors import FormatError, InputError, UsageError
from qconvert.files.regular import RegularFile

I64 = NDArray[np.int64]
DEFAULT_SEQLEN = 256  # of a window, or the most of a line, where nothing else is asked for
MAX_TEXT_BYTES = 1 << 28  # tokenizers hold the whole text, at some 30 bytes a token


def token_chunks(
    tokenizer: Any, text: Path, seqlen: int, nsamples: int | None = None, seed: int = 0
) -> I64:
    """Windows of a text, (chunks, seqlen), for a causal model.

    The text is tokenized once; windows follow each other without overlap and the last, shorter
    one is dropped. Where the tokenizer puts a token before a text (BOS), it takes the place of the
    first token of every window, as in llama.cpp's programs.

    Args:
        tokenizer: of `qconvert.running.hugging_face.open_checkpoint`.
        text: a UTF-8 file.
        seqlen: tokens of a window, at least 2.
        nsamples: how many windows to draw without replacement, None for all. The first ``k`` of
            ``n`` drawn with one seed are the ``k`` drawn with it; they come in order of the text.
        seed: of the draw.

    Raises:
        UsageError: ``seqlen`` or ``nsamples`` out of range.
        InputError: the text is unreadable, not UTF-8, or too short.
    """
    if seqlen < 2:
        raise UsageError("--seqlen", found=seqlen, wanted="at least 2")
    chunks = consecutive_windows(tokenizer, text, seqlen, nsamples, seed, special_tokens=True)
    first = first_token(tokenizer)
    if first is not None:
        chunks[:, 0] = first
    return chunks


def consecutive_windows(
    tokenizer: Any,
    text: Path,
    seqlen: int,
    nsamples: int | None,
    seed: int,
    *,
    special_tokens: bool,
) -> I64:
    """Drawn windows of a text's tokens, (n, seqlen), that follow each other without a gap.

    Args:
        special_tokens: whether the tokenizer puts its own around the whole text.

    Raises:
        InputError: the text is unreadable, not UTF-8, or too short.
    """
    found = tokenizer(read_text(text), add_special_tokens=special_tokens)["input_ids"]
    tokens = np.asarray(found, np.int64)
    chunks = tokens[: len(tokens) // seqlen * seqlen].reshape(-1, seqlen)
    if not len(chunks):
        raise InputError(
            "the text is too short",
            path=text,
            found=f"{len(tokens):,} tokens",
            wanted=f"at least {seqlen:,}, one window",
            hint="give more text, or a smaller --seqlen",
            code="TEXT-SHORT",
        )
    return chunks[drawn(len(chunks), nsamples, seed, text, f"windows of {seqlen:,} tokens")]


def sentences(
    tokenizer: Any, text: Path, seqlen: int, nsamples: int | None = None, seed: int = 0
) -> list[I64]:
    """The lines of a text with the tokenizer's special tokens, cut to ``seqlen``, for an encoder.

    Empty lines are left out. Arguments and errors as of `token_chunks`.
    """
    if seqlen < 2:
        raise UsageError("--seqlen", found=seqlen, wanted="at least 2")
    lines = [line for line in read_text(text).splitlines() if line.strip()]
    if not lines:
        raise InputError("the text has no line", path=text, code="TEXT-SHORT")
    chosen = [lines[k] for k in drawn(len(lines), nsamples, seed, text, "lines")]
    found = tokenizer(chosen, truncation=True, max_length=seqlen)["input_ids"]
    return [np.asarray(tokens, np.int64) for tokens in found]


def check_positions(config: Mapping[str, Any], seqlen: int) -> None:
    """Refuse windows of more tokens than a model has positions for.

    Raises:
        UsageError: they are.
    """
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and seqlen > most:
        raise UsageError(
            "--seqlen", found=seqlen, wanted=f"at most {most:,}, the model's positions"
        )


def first_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, or None."""
    begin = getattr(tokenizer, "bos_token_id", None)
    empty = tokenizer("")["input_ids"]
    return int(begin) if begin is not None and begin in empty[:1] else None


def read_text(path: Path) -> str:
    """A UTF-8 file, line ends as they are.

    Raises:
        InputError: unreadable, too large, or not UTF-8.
    """
    file = RegularFile(path)
    try:
        if file.size > MAX_TEXT_BYTES:
            raise InputError(
                "the text is too large",
                path=path,
                found=f"{file.size:,} bytes",
                wanted=f"at most {MAX_TEXT_BYTES:,}",
                hint="cut it; several runs over parts of it can be merged",
                code="TEXT-SIZE",
            )
        data = file.read(0, file.size)
    finally:
        file.close()
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise FormatError(
            "the text is not UTF-8", path=path, found=f"byte {e.start:,}", code="TEXT-UTF8"
        ) from e


def drawn(available: int, wanted: int | None, seed: int, text: Path, what: str) -> I64:
    """Which of ``available`` pieces to take, ascending."""
    if wanted is None:
        return np.arange(available)
    if wanted < 1:
        raise UsageError("--nsamples", found=wanted, wanted="at least 1")
    if seed < 0:
        raise UsageError("--seed", found=seed, wanted="at least 0")
    if wanted > available:
        raise InputError(
            "the text is too short",
            path=text,
            found=f"{available:,} {what}",
            wanted=f"{wanted:,}",
            hint="give more text, or a smaller --nsamples",
            code="TEXT-SHORT",
        )
    return np.sort(np.random.default_rng(seed).permutation(available)[:wanted])
