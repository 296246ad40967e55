"""Rerankers that are language models: how well a text fits is how likely one word is to follow.

llama.cpp has for Qwen3 a head of a few rows and softmax over what they give. So a model that is
asked for 'yes' or 'no' has the rows of these two tokens there, and a score by itself has a row of
zeros beside it: softmax of (s, 0) is the logistic function of s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qconvert.architectures.families.heads import RANK
from qconvert.architectures.families.keys import Keys
from qconvert.architectures.families.slots import OUTPUT
from qconvert.architectures.mapped import Locate, MappedTensor, Rows, described
from qconvert.architectures.mapping import TOKEN_EMBEDDING, Dropped
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.errors import FormatError
from qconvert.files.gguf_writer import GgufValue
from qconvert.files.shards import CARD, CONFIG

SCORES = "cls.output.weight"
RERANK = "tokenizer.chat_template.rerank"  # what llama-server's /rerank takes
_TOKENIZER = "tokenizer.json"
_TITLE = "# qwen3-reranker"
# What Qwen's card tells to ask, in the words that llama-server fills in.
_PROMPT = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Given a web search query, retrieve relevant passages that "
    "answer the query\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@dataclass(frozen=True, slots=True)
class Scores:
    """Which tokens a text is scored by.

    Attributes:
        tokens: ids of the token that means a good text, and of the other; None: zero instead.
        labels: their names.
        qwen: whether the model is asked as Qwen's card tells.
        note: how that is known.
    """

    tokens: tuple[int, int | None]
    labels: tuple[str, str]
    qwen: bool
    note: str


def read_scores(files: SmallFiles, place: str | None, rows: int) -> Scores | None:
    """The tokens that modules of sentence-transformers name, or the model's card stands for.

    Args:
        files: of the model.
        place: where the settings of such a module are; None: there is none.
        rows: tokens that the model has.

    Raises:
        FormatError: the settings name no such tokens.
    """
    card = (files.read(CARD) or b"").decode(errors="replace").lower()
    qwen = any(line.startswith(_TITLE) for line in card.splitlines())
    if place is None and not qwen:
        return None
    fields = files.json(_TOKENIZER)
    ids = {} if fields is None else TokenizerJson(fields, files.home / _TOKENIZER).vocabulary()
    if place is None:
        if "yes" not in ids or "no" not in ids:
            return None
        return Scores(
            (ids["yes"], ids["no"]),
            ("yes", "no"),
            True,
            f"a reranker by the title of {CARD}: the file scores texts by the tokens 'yes' and "
            "'no' and gives no next tokens; without that title it is a language model",
        )
    settings = files.json(f"{place}/{CONFIG}") or {}

    def token(name: str) -> int:
        value = settings.get(name)
        if type(value) is not int or not 0 <= value < rows:
            raise FormatError(
                f"'{name}' of a reranker is no token",
                path=files.home / place / CONFIG,
                found=str(value)[:80],
                wanted=f"an id below {rows}",
                code="ARCH-MODULE",
            )
        return value

    good = token("true_token_id")
    bad = None if settings.get("false_token_id") is None else token("false_token_id")
    texts = {i: text for text, i in ids.items()}
    first = texts.get(good, str(good))
    second = f"not {first}" if bad is None else texts.get(bad, str(bad))
    return Scores(
        (good, bad),
        (first, second),
        qwen,
        f"a reranker, as {place} says: the file scores texts by the tokens {first!r} and "
        f"{second!r} and gives no next tokens",
    )


def score_keys(scores: Scores, arch: str, templates: bool) -> Keys:
    """Keys of the head; the prompt, where no template of the model is one for it."""
    keys: Keys = {
        f"{arch}.pooling_type": GgufValue("UINT32", RANK),
        f"{arch}.classifier.output_labels": GgufValue("STRING", list(scores.labels)),
    }
    if scores.qwen and not templates:
        keys[RERANK] = _PROMPT
        keys["tokenizer.chat_templates"] = GgufValue("STRING", ["rerank"])
    return keys


def with_scores(
    tensors: Sequence[MappedTensor], scores: Scores
) -> tuple[list[MappedTensor], list[Dropped]]:
    """The tensors of a language model with a head of two rows instead of its own."""
    by_name = {t.info.name: t for t in tensors}
    head = by_name.get(OUTPUT, by_name[TOKEN_EMBEDDING])
    shape = (2, head.info.shape[1])
    taken = MappedTensor(described(SCORES, shape, head.info.dtype), head.sources, rows_of(scores))
    found = [t for t in tensors if t.info.name != OUTPUT]
    found.insert(2, taken)
    left = head.sources if OUTPUT in by_name else ()
    return found, [Dropped(s.name, "is needed for two tokens only") for s in left]


def rows_of(scores: Scores) -> Locate:
    """The rows of both tokens; -1 is one of zeros."""
    wanted = np.array([-1 if token is None else token for token in scores.tokens], np.int64)

    def locate(rows: Rows) -> Rows:
        return wanted[rows]

    return locate
