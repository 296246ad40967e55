"""Which tokens are special, and which of them surround a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.tokenizers import Vocabulary
from qconvert.errors import InputError
from qconvert.files.gguf_writer import GgufValue, MetadataValue

Keys = dict[str, MetadataValue]

# GGUF's keys, one with its historic spelling, by the names of tokenizer_config.json.
KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}


def special_token_keys(
    tokenizer: TokenizerJson, vocabulary: Vocabulary, settings: dict[str, Any], config: Config
) -> Keys:
    """Ids of special tokens, and which are put around a text.

    Args:
        tokenizer: tokenizer.json; its post-processor says what surrounds a text.
        vocabulary: its tokens.
        settings: tokenizer_config.json, which names special tokens by their text.
        config: config.json, for ids that nothing else states.

    Raises:
        InputError: one of them has no row in the embedding.
        UnsupportedError: WordPiece without the two tokens that llama.cpp puts around every text.
    """
    known = vocabulary.ids
    for name in KEYS:
        text = _text(settings.get(f"{name}_token"))
        if text in vocabulary.beyond:
            raise InputError(
                "a special token of the tokenizer has no row in the model's embedding",
                path=tokenizer.path,
                found=f"{name}_token {text!r}",
                wanted=f"a token below {vocabulary.size:,}, config.json's vocab_size",
                hint="the embeddings were not resized, or the tokenizer is that of another model",
                code="ARCH-VOCABULARY",
            )
    ids = {name: _id(settings.get(f"{name}_token"), known) for name in KEYS}
    for name in KEYS:
        if ids[name] is None:
            ids[name] = _stated(config.get(f"{name}_token_id"), vocabulary.size)
    unknown = tokenizer.model.get("unk_token")
    if unknown is None:
        unknown = _stated(tokenizer.model.get("unk_id"), vocabulary.size)
    ids["unk"] = known.get(unknown, ids["unk"]) if isinstance(unknown, str) else unknown
    around = _around(tokenizer, known)
    if vocabulary.keys["tokenizer.ggml.model"] == "bert":
        for part, role, name in (("before", "bos", "cls"), ("after", "sep", "sep")):
            found = None if around is None else getattr(around, part)
            ids[role] = ids[name] if found is None else found
            if ids[role] is None:  # llama.cpp would end the process at the first text
                raise tokenizer.unlike("WordPiece without tokens around a text", around)
        ids["eos"] = ids["sep"]
        add_bos = add_eos = True
    elif around is None:
        add_bos = settings.get("add_bos_token") is True and ids["bos"] is not None
        add_eos = settings.get("add_eos_token") is True and ids["eos"] is not None
    else:
        add_bos, add_eos = around.before is not None, around.after is not None
        # What surrounds a text is what llama.cpp has to put there, whatever it is called.
        ids["bos"] = around.before if add_bos else ids["bos"]
        ids["eos"] = around.after if add_eos else ids["eos"]
    if ids["eos"] is None:
        _warn_of_default_end(tokenizer, vocabulary)
    keys: Keys = {
        f"tokenizer.ggml.{KEYS[name]}": GgufValue("UINT32", i)
        for name, i in ids.items()
        if i is not None
    }
    return keys | {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}


def _id(token: Any, known: dict[str, int]) -> int | None:
    """The id of a token that is named by its text, or by an object with it."""
    text = _text(token)
    return None if text is None else known.get(text)


def _text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _stated(value: Any, size: int) -> int | None:
    """An id, or the first of several."""
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < size else None


@dataclass(frozen=True, slots=True)
class _Around:
    """The token before and the token after a text; None where there is none."""

    before: int | None
    after: int | None


def _around(tokenizer: TokenizerJson, known: dict[str, int]) -> _Around | None:
    """What a post-processor puts around one text; None where none puts anything.

    llama.cpp puts one token before a text and one after it. Of more, the outermost are taken, with
    a warning.
    """
    for step in tokenizer.steps("post_processor"):
        kind, single = step.get("type"), step.get("single")
        if kind == "TemplateProcessing" and isinstance(single, list) and single:
            middle = next((i for i, p in enumerate(single) if _is_text(p)), len(single))
            tokens = step.get("special_tokens")
            before, after = (
                [_special(p, tokens, known) for p in part]
                for part in (single[:middle], single[middle + 1 :])
            )
            if middle == len(single) or len(before) > 1 or len(after) > 1:
                tokenizer.warnings.append(
                    f"the post-processor puts {len(before)} tokens before a text and {len(after)} "
                    "after it, llama.cpp at most one each"
                )
            return _Around(before[0] if before else None, after[-1] if after else None)
        if kind in ("BertProcessing", "RobertaProcessing"):
            cls, sep = step.get("cls"), step.get("sep")
            if isinstance(cls, list) and isinstance(sep, list) and cls and sep:
                return _Around(_id(cls[0], known), _id(sep[0], known))
    return None


def pair_keys(tokenizer: TokenizerJson, keys: Keys) -> Keys:
    """What llama.cpp's server puts between a question and a text that it is to score.

    It puts the end token there, and the separator too where a key says so.
    """
    steps = tokenizer.steps("post_processor")
    two = any(step.get("type") == "RobertaProcessing" for step in steps)
    for step in steps:
        pair = step.get("pair")
        if step.get("type") == "TemplateProcessing" and isinstance(pair, list):
            texts = [i for i, piece in enumerate(pair) if _is_text(piece)]
            two = len(texts) == 2 and texts[1] - texts[0] > 2
    found: Keys = {"tokenizer.ggml.add_sep_token": two}
    end, separator = f"tokenizer.ggml.{KEYS['eos']}", f"tokenizer.ggml.{KEYS['sep']}"
    if two and end in keys and separator not in keys:
        found[separator] = keys[end]
    return found


def _is_text(piece: Any) -> bool:
    return isinstance(piece, dict) and "Sequence" in piece


def _special(piece: Any, tokens: Any, known: dict[str, int]) -> int | None:
    """The id of a special token of a template, which the template may state itself."""
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    name = token.get("id") if isinstance(token, dict) else None
    if not isinstance(name, str):
        return None
    entry = tokens.get(name) if isinstance(tokens, dict) else None
    ids = entry.get("ids") if isinstance(entry, dict) else None
    if isinstance(ids, list) and len(ids) == 1 and ids[0] in known.values():
        return int(ids[0])
    return known.get(name)


# What llama.cpp takes for the end of a text where a file does not say.
_DEFAULT_ENDS = {"gpt2": 11, "llama": 2, "t5": 1}


def _warn_of_default_end(tokenizer: TokenizerJson, vocabulary: Vocabulary) -> None:
    end = _DEFAULT_ENDS[str(vocabulary.keys["tokenizer.ggml.model"])]
    text = next((t for t, i in vocabulary.ids.items() if i == end), None)
    if text is not None:
        tokenizer.warnings.append(
            f"no end token is stated, and llama.cpp takes token {end}, {text[:40]!r}, for it: "
            "state eos_token in tokenizer_config.json"
        )
