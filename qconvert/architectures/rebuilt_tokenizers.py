"""Tokenizers that transformers 5 builds from tokenizer_config.json, whatever tokenizer.json has.

Of that file it takes the vocabulary, the merges and little else, and puts in its own steps with its
own defaults. So do we, for a file is to do what the model was used with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qconvert.architectures.tokenizer_json import SPACE, TokenizerJson

_BERT = re.compile(
    r"(Bert|DistilBert|MPNet|Electra|MobileBert|LayoutLM|Lxmert|Funnel|SqueezeBert|ConvBert)"
    r"Tokenizer(Fast)?"
)
_XLM_ROBERTA = re.compile(r"XLMRobertaTokenizer(Fast)?")
_ROBERTA = re.compile(r"RobertaTokenizer(Fast)?")
# What it takes where tokenizer_config.json names no class.
CLASSES = {
    "xlm-roberta": "XLMRobertaTokenizer",
    "roberta": "RobertaTokenizer",
    "jina_embeddings_v3": "XLMRobertaTokenizer",
}


def as_rebuilt(tokenizer: TokenizerJson, kind: str, settings: Mapping[str, Any]) -> None:
    """Change the steps of a tokenizer to those that transformers gives it.

    Args:
        tokenizer: the file; what is changed is said in its warnings or notes.
        kind: llama.cpp's name of the tokenizer.
        settings: tokenizer_config.json; one of BERT's kind may do without the name of its class.
    """
    named = settings.get("tokenizer_class")
    if kind == "bert" and (named is None or _is(_BERT, named)):
        _as_bert(tokenizer, settings)
    elif kind == "t5" and _is(_XLM_ROBERTA, named):
        _as_xlm_roberta(tokenizer, settings)
    elif kind == "gpt2" and _is(_ROBERTA, named):
        _as_roberta(tokenizer, settings)


def _is(pattern: re.Pattern[str], name: Any) -> bool:
    return isinstance(name, str) and pattern.fullmatch(name) is not None


def _as_bert(tokenizer: TokenizerJson, settings: Mapping[str, Any]) -> None:
    """BERT's kind: a normalizer, and tokens around a text where the file has none."""
    rebuilt = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True) is True,
        "strip_accents": settings.get("strip_accents"),
        "lowercase": settings.get("do_lower_case", True) is True,
    }
    cls, sep = (settings.get(f"{name}_token", f"[{name.upper()}]") for name in ("cls", "sep"))
    if not tokenizer.steps("post_processor") and isinstance(cls, str) and isinstance(sep, str):
        ids = {**tokenizer.vocabulary(), **{t.text: t.id for t in tokenizer.added}}
        if cls in ids and sep in ids:
            tokenizer.fields["post_processor"] = {
                "type": "BertProcessing",
                "cls": [cls, ids[cls]],
                "sep": [sep, ids[sep]],
            }
    found = tokenizer.steps("normalizer")
    if len(found) == 1 and {k: found[0].get(k) for k in rebuilt} == rebuilt:
        return
    tokenizer.warnings.append(
        f"the normalizer in {tokenizer.path.name} is not used: transformers builds it from "
        f"tokenizer_config.json (do_lower_case {str(rebuilt['lowercase']).lower()}), and so does "
        "this file"
    )
    tokenizer.fields["normalizer"] = rebuilt


def _as_xlm_roberta(tokenizer: TokenizerJson, settings: Mapping[str, Any]) -> None:
    """Words cut at white space, each with a mark before it; of normalizers the map alone."""
    scheme = "always" if settings.get("add_prefix_space", True) else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": True}
    steps = [{"type": "WhitespaceSplit"}, metaspace]
    maps = [s for s in tokenizer.steps("normalizer") if s.get("type") == "Precompiled"]
    others = set(tokenizer.step_types("normalizer")) - {"Precompiled"}
    if others or tokenizer.step_types("pre_tokenizer") != ["WhitespaceSplit", "Metaspace"]:
        _tell(tokenizer, "it cuts texts at white space")
    tokenizer.fields["normalizer"] = maps[0] if maps else None
    tokenizer.fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    tokenizer.model["unk_id"] = 3
    first, last = (_token(settings, f"{n}_token", t) for n, t in (("bos", "<s>"), ("eos", "</s>")))
    ids = _ids(tokenizer)
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    before, after = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (first, last))
    tokenizer.fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [before, text, after],
        "pair": [before, text, after, after, other, after],
        "special_tokens": {
            t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in {first: 0, last: 0} if t in ids
        },
    }


def _as_roberta(tokenizer: TokenizerJson, settings: Mapping[str, Any]) -> None:
    """Byte-level BPE with GPT-2's expression, and no normalizer."""
    spaced = settings.get("add_prefix_space", False) is True
    step = {
        "type": "ByteLevel",
        "add_prefix_space": spaced,
        "trim_offsets": True,
        "use_regex": True,
    }
    if tokenizer.steps("normalizer") or tokenizer.step_types("pre_tokenizer") != ["ByteLevel"]:
        _tell(tokenizer, "it cuts texts as GPT-2 does")
    tokenizer.fields["normalizer"] = None
    tokenizer.fields["pre_tokenizer"] = step
    ids = _ids(tokenizer)
    sep, cls = (_token(settings, f"{n}_token", t) for n, t in (("sep", "</s>"), ("cls", "<s>")))
    if sep in ids and cls in ids:
        tokenizer.fields["post_processor"] = {
            "type": "RobertaProcessing",
            "sep": [sep, ids[sep]],
            "cls": [cls, ids[cls]],
            "trim_offsets": True,
            "add_prefix_space": spaced,
        }


def _tell(tokenizer: TokenizerJson, does: str) -> None:
    tokenizer.notes.append(
        f"normalizer and pre-tokenizer in {tokenizer.path.name} are not used: transformers builds "
        f"this class of tokenizer with its own ({does}), and so does this file"
    )


def _token(settings: Mapping[str, Any], name: str, default: str) -> str:
    """The text of a special token, which may stand in an object."""
    token = settings.get(name, default)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else default


def _ids(tokenizer: TokenizerJson) -> dict[str, int]:
    """Ids by text, of what can have one."""
    vocab = tokenizer.model.get("vocab")
    if isinstance(vocab, list):
        pieces = [p[0] if isinstance(p, list) and p else None for p in vocab]
        known = {p: i for i, p in enumerate(pieces) if isinstance(p, str)}
    else:
        known = tokenizer.vocabulary()
    return {**known, **{t.text: t.id for t in tokenizer.added}}
