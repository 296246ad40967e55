"""Opens a model directory as what a GGUF file needs, checked before a value is read."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from qconvert.architectures.chat_templates import chat_template_keys, chat_templates
from qconvert.architectures.config import Config
from qconvert.architectures.config_warnings import config_warnings
from qconvert.architectures.dense_modules import dense_keys, dense_matrices
from qconvert.architectures.families import family_of, hyper_parameters, known_family
from qconvert.architectures.families.row import Family
from qconvert.architectures.general_name import harmless_name
from qconvert.architectures.mapped import MappedModel
from qconvert.architectures.mapping import Dropped, further_layers, map_tensors
from qconvert.architectures.model_card import card_keys
from qconvert.architectures.native_tokenizers import (
    SENTENCEPIECE,
    TEKKEN,
    native_tokenizer,
)
from qconvert.architectures.rebuilt_tokenizers import CLASSES
from qconvert.architectures.rerankers import read_scores, score_keys, with_scores
from qconvert.architectures.sentence_modules import sentence_modules
from qconvert.architectures.small_files import SmallFiles
from qconvert.architectures.special_tokens import pair_keys, special_token_keys
from qconvert.architectures.token_check import compare_tokens
from qconvert.architectures.tokenizer_json import TokenizerJson
from qconvert.architectures.tokenizers import Vocabulary, read_vocabulary
from qconvert.architectures.tying import output_head
from qconvert.errors import InputError, UnsupportedError
from qconvert.files.gguf import ARCHITECTURE
from qconvert.files.gguf_writer import GgufTensor, GgufValue, MetadataValue, check_gguf
from qconvert.files.prequantized import refusal, stated_method
from qconvert.model import Model

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
# Fields that send transformers to other files, and the values that do not.
_OTHER_FILES: dict[str, tuple[object, ...]] = {"configuration_files": ([CONFIG],)}


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A model as a GGUF file has it.

    Attributes:
        model: tensors under GGUF's names; closing it closes the model it was made from.
        metadata: keys in order, but for those that depend on what is done with the tensors
            (``general.file_type``, ``general.quantization_version``).
        family: name of the architecture, for people.
        dropped: tensors of the source that are left out.
        warnings: in which cases llama.cpp will not do what transformers does.
        notes: what else was decided.
    """

    model: MappedModel
    metadata: dict[str, MetadataValue]
    family: str
    dropped: tuple[Dropped, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


def architecture_of(model: Model) -> str | None:
    """What llama.cpp calls the architecture that a model's configuration names; None where there is
    none that we know.
    """
    fields = SmallFiles(model).json(CONFIG)
    family = known_family(fields) if fields else None
    return family.arch if family else None


def open_gguf_source(
    model: Model, *, pre_tokenizer: str | None = None, compare: bool = True, mtp: bool = True
) -> GgufSource:
    """Map a Hugging Face model directory to GGUF.

    Args:
        model: as ``open_model`` gives it; of its tensors, token embedding and output matrix are
            read if they may be the same.
        pre_tokenizer: llama.cpp's name for the pre-tokenizer, instead of the one found by its
            regular expressions.
        compare: whether to hold llama.cpp's tokens against those of the model's tokenizer.
        mtp: whether to keep a layer that predicts a further token.

    Raises:
        UnsupportedError: an architecture, tokenizer or option that llama.cpp does not have; a
            tensor without a place in the architecture or that GGUF cannot hold.
        InputError: no directory with config.json and tokenizer.json, or a tensor that is missing
            or contradicts the configuration.
        FormatError: one of those files breaks a rule.
    """
    directory = model.path
    files = SmallFiles(model)
    fields = files.json(CONFIG)
    if fields is None:
        raise InputError(
            "llama.cpp's GGUF needs the configuration of the model",
            path=directory,
            found=f"no {CONFIG}" if directory.is_dir() else f"a {model.kind} file by itself",
            wanted=f"a model directory with {CONFIG} and {TOKENIZER}",
            hint="give the directory, or write the tensors as they are with --raw",
            code="ARCH-NO-CONFIG",
        )
    family, config = read_config(fields, directory / CONFIG)
    sizes = family.sizes(config)
    if mtp and further_layers(model, family, config, sizes.blocks) == 1:
        sizes = sizes.with_further()
    keys, rope = hyper_parameters(family, config, sizes)
    head = output_head(model, family, config)
    modules = sentence_modules(files, dense=family.dense, scores=family.scores)
    dense = dense_matrices(files, modules.dense, sizes.named["width"]) if modules.dense else {}
    keys |= dense_keys(dense, family.arch)
    constants = {**rope.tensors, **dense}
    tensors, dropped = map_tensors(model, family, config, sizes, constants, head)
    scores = None
    if family.scores:
        scores = read_scores(files, modules.scores, sizes.named["vocabulary"])
    if scores:
        tensors, more = with_scores(tensors, scores)
        dropped += more
    mapped = MappedModel(model, tensors)
    check_gguf([GgufTensor(t.name, t.shape, "F32") for t in mapped.tensors])
    tokens = _tokenizer(files, config, sizes.named["vocabulary"], pre_tokenizer)
    metadata: dict[str, MetadataValue] = {
        ARCHITECTURE: family.arch,
        "general.type": "model",
        "general.name": model_name(directory),
        "general.size_label": size_label(mapped, sizes.named.get("experts", 0)),
    }
    card, card_warnings = card_keys(files.read("README.md"), directory / "README.md")
    metadata |= card
    renamed = _renamed(metadata, files)
    metadata |= _sampling(files)
    metadata |= keys
    pooled = f"{family.arch}.pooling_type"
    if modules.pooling is not None or ("types" in sizes.named and pooled not in keys):
        metadata[pooled] = GgufValue("UINT32", modules.pooling or 0)
    if "types" in sizes.named:
        metadata["tokenizer.ggml.token_type_count"] = GgufValue("UINT32", sizes.named["types"])
    metadata |= tokens.keys
    if scores:
        metadata |= score_keys(scores, family.arch, "tokenizer.chat_templates" in metadata)
    if "labels" in sizes.named:
        metadata |= pair_keys(tokens.file, tokens.keys)
    if compare:
        compare_tokens(tokens.file, metadata)
    return GgufSource(
        mapped,
        metadata,
        family.name,
        tuple(dropped),
        (
            *config_warnings(fields, family, config, sizes, rope),
            *head.warnings,
            *tokens.file.warnings,
            *modules.warnings,
            *card_warnings,
        ),
        (
            *head.notes,
            *tokens.file.notes,
            *modules.notes,
            *renamed,
            *([scores.note] if scores else []),
        ),
    )


def model_name(path: Path) -> str:
    """Of the model: its directory's, or that of a file with companions, without suffix."""
    path = path.resolve()
    return path.name if path.is_dir() else path.stem


def _renamed(metadata: dict[str, MetadataValue], files: SmallFiles) -> tuple[str, ...]:
    """Give the model another name where llama.cpp would go by it; a note about that."""
    name = str(metadata["general.name"])
    metadata["general.name"] = other = harmless_name(name, lambda: files.json(TOKENIZER))
    if other == name:
        return ()
    shown, instead = reprlib.repr(name), reprlib.repr(other)
    return (
        f"general.name is {instead}, not {shown}, which llama.cpp would take for a sign of tokens "
        "that the model does not have",
    )


def read_config(fields: dict[str, Any], path: Path) -> tuple[Family, Config]:
    """The row of the table, and the language model's fields with the defaults of their class.

    Raises:
        UnsupportedError: no such architecture, weights that are quantized already, or a field that
            sends transformers to other files.
        FormatError: a field is of another type than its class takes.
    """
    check_configuration(fields, path)
    family, known = family_of(fields, path)
    if known.inner is None:
        return family, Config(fields, path, known)
    # A model of text and images has the language model's fields in an object of their own.
    outer = Config(fields, path, known)
    if outer.given("per_layer_config") and outer.get("per_layer_config") is not None:
        raise outer.unlike("per_layer_config", "no such field outside the text model's")
    name, inner = known.inner
    outside = {n: fields.get(n) for n in inner.outside}
    section = outer.section(name)
    if section is None and known.flat:
        flat = {n: v for n, v in fields.items() if inner.stands_outside(n)}
        return family, Config(flat | outside, path, inner)
    ids = {n: v for n, v in fields.items() if n.endswith("_token_id")}
    inside = section.fields() if section else {}
    return family, Config(ids | inside | outside, path, inner, f"{name}.")


def check_configuration(fields: dict[str, Any], path: Path) -> None:
    """Refuse what holds for no architecture.

    Raises:
        UnsupportedError: weights that are quantized already, or a field that sends transformers to
            other files.
    """
    if quantized := stated_method(fields):
        raise refusal(quantized, path)
    for name, wanted in _OTHER_FILES.items():
        if fields.get(name) and fields[name] not in wanted:
            raise UnsupportedError(
                f"'{name}' says that other files are the model's",
                path=path,
                found=reprlib.repr(fields[name]),
                hint="give these files the usual names, and leave the field out of config.json",
                code="ARCH-CONFIG-VALUE",
            )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What a file says about tokens, and what is to be said of that."""

    keys: dict[str, MetadataValue]
    file: TokenizerJson
    vocabulary: Vocabulary


def _tokenizer(files: SmallFiles, config: Config, size: int, pre_tokenizer: str | None) -> _Tokens:
    settings = {
        **(files.json("special_tokens_map.json") or {}),
        **{
            k: v
            for k, v in (files.json("tokenizer_config.json") or {}).items()
            if v not in (None, "")
        },
    }
    if config.known and (named := CLASSES.get(config.known.model_type)):
        settings.setdefault("tokenizer_class", named)
    fields, name, cut_unknown = files.json(TOKENIZER), TOKENIZER, None
    if fields is None:
        native = native_tokenizer(files, settings)
        if native is None:
            raise _no_tokenizer(files)
        fields, name, cut_unknown = native.fields, native.name, native.cut_unknown
        settings = native.settings | settings
    file = TokenizerJson(fields, files.home / name, cut_unknown)
    vocabulary = read_vocabulary(file, size, pre_tokenizer, settings)
    keys = vocabulary.keys | special_token_keys(file, vocabulary, settings, config)
    templates = chat_templates(files, settings)
    used = [t for t in vocabulary.beyond if any(t in text for text in templates.values())]
    if used:
        file.warnings.append(f"the chat template uses {used[0]!r}, a token that is left out")
    return _Tokens(keys | chat_template_keys(templates), file, vocabulary)


def _no_tokenizer(files: SmallFiles) -> InputError:
    return InputError(
        "tokenizer is missing",
        path=files.home / TOKENIZER,
        wanted=f"{TOKENIZER}, {TEKKEN} or {SENTENCEPIECE[0]}",
        hint="download one of them as well, or write the tensors as they are with --raw",
        code="ARCH-NO-TOKENIZER",
    )


def size_label(model: MappedModel, experts: int) -> str:
    """Number of parameters as names of models give it, such as 135M or 8x7B."""
    total = sum(t.size for t in model.tensors)
    stacked = sum(t.size for t in model.tensors if t.name.endswith("_exps.weight"))
    each = stacked // max(experts, 1)
    return str(gguf.size_label(total, total - stacked, each, experts))


def _sampling(files: SmallFiles) -> dict[str, MetadataValue]:
    """What the model's makers recommend for sampling, which llama.cpp takes as its defaults."""
    fields = files.json("generation_config.json") or {}
    keys: dict[str, MetadataValue] = {}
    if type(fields.get("top_k")) is int and 0 <= fields["top_k"] < 1 << 31:
        keys["general.sampling.top_k"] = GgufValue("INT32", fields["top_k"])
    for name, key in (("top_p", "top_p"), ("min_p", "min_p"), ("temperature", "temp")):
        if type(fields.get(name)) in (int, float) and 0 <= fields[name] < 1e30:
            keys[f"general.sampling.{key}"] = GgufValue("FLOAT32", float(fields[name]))
    return keys
