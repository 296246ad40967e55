"""Which tokens are special, which of them surround a text, and the chat template."""

from __future__ import annotations

from typing import Any

from qconvert.architectures.config import Config
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.tokenizers import Vocabulary
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
        UnsupportedError: WordPiece without the two tokens that llama.cpp puts around every text.
    """
    known = vocabulary.ids
    ids = {name: _id(settings.get(f"{name}_token"), known) for name in KEYS}
    for name in KEYS:
        if ids[name] is None:
            ids[name] = _stated(config.get(f"{name}_token_id"), vocabulary.size)
    unknown = tokenizer.model.get("unk_token")
    if unknown is None:
        unknown = _stated(tokenizer.model.get("unk_id"), vocabulary.size)
    ids["unk"] = known.get(unknown, ids["unk"]) if isinstance(unknown, str) else unknown
    template = _template(tokenizer)
    if vocabulary.keys["tokenizer.ggml.model"] == "bert":
        pieces = template or [None, None]
        for piece, role, name in ((pieces[0], "bos", "cls"), (pieces[-1], "sep", "sep")):
            around = _special(piece, known)
            ids[role] = ids[name] if around is None else around
            if ids[role] is None:  # llama.cpp would end the process at the first text
                raise tokenizer.unlike("WordPiece without tokens around a text", template)
        ids["eos"] = ids["sep"]
        add_bos = add_eos = True
    elif template is None:
        add_bos = settings.get("add_bos_token") is True
        add_eos = settings.get("add_eos_token") is True
    else:
        first, last = _special(template[0], known), _special(template[-1], known)
        add_bos, add_eos = first is not None, last is not None
        # What surrounds a text is what llama.cpp has to put there, whatever it is called.
        ids["bos"] = first if add_bos else ids["bos"]
        ids["eos"] = last if add_eos else ids["eos"]
    keys: Keys = {
        f"tokenizer.ggml.{KEYS[name]}": GgufValue("UINT32", i)
        for name, i in ids.items()
        if i is not None
    }
    return keys | {"tokenizer.ggml.add_bos_token": add_bos, "tokenizer.ggml.add_eos_token": add_eos}


def chat_template_keys(settings: dict[str, Any], separate: str | None) -> Keys:
    """Templates: the text of chat_template.jinja, or what tokenizer_config.json has."""
    template = settings.get("chat_template") if separate is None else separate
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    keys: Keys = {}
    names = []
    for entry in template if isinstance(template, list) else ():
        name, text = (
            entry.get(k) if isinstance(entry, dict) else None for k in ("name", "template")
        )
        if not isinstance(name, str) or not isinstance(text, str):
            continue
        if name == "default":
            keys["tokenizer.chat_template"] = text
        else:
            names.append(name)
            keys[f"tokenizer.chat_template.{name}"] = text
    if names:
        keys["tokenizer.chat_templates"] = GgufValue("STRING", names)
    return keys


def _id(token: Any, known: dict[str, int]) -> int | None:
    """The id of a token that is named by its text, or by an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return known.get(text) if isinstance(text, str) else None


def _stated(value: Any, size: int) -> int | None:
    """An id, or the first of several."""
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and 0 <= value < size else None


def _template(tokenizer: TokenizerJson) -> list[Any] | None:
    """What a post-processor makes of one text: special tokens and the text, in order."""
    for step in tokenizer.steps("post_processor"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return single
        if step.get("type") == "BertProcessing":
            cls, sep = step.get("cls"), step.get("sep")
            if isinstance(cls, list) and isinstance(sep, list) and cls and sep:
                return [{"SpecialToken": {"id": cls[0]}}, {}, {"SpecialToken": {"id": sep[0]}}]
    return None


def _special(piece: Any, known: dict[str, int]) -> int | None:
    token = piece.get("SpecialToken") if isinstance(piece, dict) else None
    return _id(token.get("id"), known) if isinstance(token, dict) else None
