"""The files of a model: found in a directory, listed by a shard index.

What files say is not trusted: names, sizes and JSON are checked before they are used.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qconvert.errors import FormatError, InputError, UnsupportedError
from qconvert.files.regular import RegularFile, os_refusal
from qconvert.files.strict_json import strict_json
from qconvert.model import Companion

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
CARD = "README.md"
MODULES = "modules.json"  # of sentence-transformers: what follows the transformer, and where it is
TEMPLATES = "additional_chat_templates"
COMPANIONS = frozenset(
    {
        "1_Pooling/config.json",  # of sentence-transformers
        CARD,
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        CONFIG,
        "config_sentence_transformers.json",
        "generation_config.json",
        "hf_quant_config.json",
        "merges.txt",
        MODULES,
        "preprocessor_config.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
MAX_JSON_BYTES = 100_000_000  # the limit that safetensors sets for its header
MAX_COMPANION_BYTES = 64 << 20
MAX_SHARDS = 10_000
MAX_MODULES = 64  # of sentence-transformers, and additional chat templates: a model has a few
MAX_MODULES_BYTES = 1 << 16

_SHARD_OF_SEVERAL = re.compile(r"-\d+-of-0*+(?!1\.)\d+\.safetensors")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
_OTHER_WEIGHTS = re.compile(
    r"(pytorch_model|adapter_model)[\w.-]*\.bin|tf_model\.h5|flax_model\.msgpack"
)
_ADAPTER = re.compile(r"adapter_model\b.*\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The files that make up a model.

    Attributes:
        shards: files with tensors, in order of name.
        weight_map: which shard (by name) the index says each tensor is in; None without an index.
        companions: small files that belong to the model, in order of name.
        notes: which of several files with weights were taken, and which were left.
        warnings: the same where both may have been meant.
    """

    shards: tuple[Path, ...]
    weight_map: dict[str, str] | None
    companions: tuple[Companion, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def model_files(path: Path) -> ModelFiles:
    """The files of the model at ``path``: one file, or a directory as Hugging Face lays it out.

    Raises:
        InputError: the directory cannot be read or does not hold exactly one whole model.
        FormatError: the index breaks a rule.
    """
    if not os.path.isdir(path):
        return ModelFiles((path,), None, ())
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise os_refusal(path, error) from error
    weight_map = None
    warnings: list[str] = []
    inside = _Inside(path)
    named = _named_weights(inside, names)
    whole = named or (WEIGHTS if WEIGHTS in names else None)
    if whole is not None and not whole.endswith(".json"):
        shards = [whole]
        if whole == WEIGHTS and INDEX in names:
            weight_map, warnings = _beside_whole(inside)
    elif whole is not None or INDEX in names:
        index = whole or INDEX
        inside.check(index)
        weight_map = read_index(path / index)
        shards = sorted(set(weight_map.values()))
        _check_present(path, shards)
    else:
        shards = [_only_weights(path, names)]
    for name in shards:
        inside.check(name)
    companions, left = _companions(inside)
    return ModelFiles(
        tuple(path / name for name in shards),
        weight_map,
        companions,
        *_said(names, shards, warnings + left),
    )


def directory_companions(path: Path) -> tuple[Companion, ...]:
    """The small files of a model's directory, whatever weights are in it.

    Raises:
        InputError: it is no directory, or one of them is a link that leads elsewhere, or too large.
    """
    try:
        os.listdir(path)
    except OSError as error:
        raise os_refusal(path, error) from error
    return _companions(_Inside(path))[0]


def inside_directory(directory: Path, name: str) -> Path:
    """A file below a model's directory, by a name that something in it gives.

    Raises:
        InputError: it is a link, or a name, that leads elsewhere.
    """
    _Inside(directory).check(name)
    return directory / name


def holds_weights(path: Path) -> bool:
    """Whether a directory has safetensors files, or an index of them."""
    return any(name.endswith((".safetensors", INDEX)) for name in os.listdir(path))


def _named_weights(inside: _Inside, names: list[str]) -> str | None:
    """What config.json names as the file of the weights, or their index; None where it does not.

    transformers looks there first.

    Raises:
        InputError: it names something that is no file of this kind beside it.
    """
    if CONFIG not in names:
        return None
    directory = inside.directory
    config = _companion(inside, CONFIG).read()
    if b'"transformers_weights"' not in config:
        return None
    fields = strict_json(config, directory / CONFIG, infinity=True)
    named = fields.get("transformers_weights") if isinstance(fields, dict) else None
    if named is None:
        return None
    wanted = (".safetensors", ".safetensors.index.json")
    found = isinstance(named, str) and _is_plain(named) and named.endswith(wanted)
    if not found or named not in names:
        raise InputError(
            "the file with the weights that 'transformers_weights' names is not there",
            path=directory / CONFIG,
            found=reprlib.repr(named),
            wanted="a .safetensors file, or an index of them, in the same directory",
            code="ST-NAMED",
        )
    return str(named)


def _beside_whole(inside: _Inside) -> tuple[dict[str, str] | None, list[str]]:
    """The weight map of an index beside a whole file, if it is that file's, and warnings.

    transformers takes the whole file and does not look at the index.

    Raises:
        InputError: the index needs the whole file as one of several.
    """
    inside.check(INDEX)
    directory = inside.directory
    try:
        weight_map = read_index(directory / INDEX)
    except InputError as error:
        return None, [f"{INDEX} is left, {WEIGHTS} has the weights: {error.message}"]
    shards = sorted(set(weight_map.values()))
    if shards == [WEIGHTS]:
        return weight_map, []
    if WEIGHTS in shards:
        raise InputError(
            f"{WEIGHTS} is one of several shards by the index, and all of the model by its name",
            path=directory / INDEX,
            found=reprlib.repr(shards),
            wanted=f"{WEIGHTS} alone, which is what transformers loads, or shards of other names",
            hint=f"remove {INDEX} if {WEIGHTS} is whole, or rename the shard in both places",
            code="ST-INDEX-WHOLE",
        )
    there = sum(os.path.exists(directory / name) for name in shards)
    return None, [
        f"weights are those of {WEIGHTS}, which is what transformers loads; {INDEX} and its "
        f"{len(shards)} shards ({there} of them there) are left: remove whichever is not the model"
    ]


def _said(
    names: list[str], shards: list[str], warnings: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and warnings on other files with weights in the directory."""
    others = [
        n
        for n in names
        if n not in shards
        and not n.startswith(".")
        and (n.endswith(".safetensors") or _OTHER_WEIGHTS.fullmatch(n))
    ]
    adapters = [n for n in others if _ADAPTER.fullmatch(n)]
    if adapters:
        warnings.append(
            f"an adapter lies beside the weights and is not merged into them: {adapters[0]}"
        )
    left = [n for n in others if n not in adapters]
    if not left:
        return (), tuple(warnings)
    taken = shards[0] if len(shards) == 1 else f"{len(shards)} shards"
    shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
    return (f"weights were taken from {taken}; left: {shown}",), tuple(warnings)


def _companions(inside: _Inside) -> tuple[tuple[Companion, ...], list[str]]:
    """The small files that there are, and warnings of a card that is not taken."""
    directory = inside.directory
    names = _companion_names(inside)
    size = (directory / CARD).stat().st_size if CARD in names else 0
    if size > MAX_COMPANION_BYTES:  # it describes the model and is no part of it
        names.remove(CARD)
    warnings = [f"{CARD} of {size:,} bytes is left out"] if size > MAX_COMPANION_BYTES else []
    return tuple(_companion(inside, name) for name in names), warnings


def _companion_names(inside: _Inside) -> list[str]:
    """Names of the small files that there are, relative to the directory, in order."""
    directory = inside.directory
    found = {*COMPANIONS, *_module_configs(inside)}
    try:
        templates = sorted(os.listdir(directory / TEMPLATES))
    except OSError:  # none there
        templates = []
    jinja = [n for n in templates if n.endswith(".jinja") and _is_plain(n) and "%" not in n]
    found |= {f"{TEMPLATES}/{n}" for n in jinja[:MAX_MODULES]}
    return sorted(name for name in found if os.path.isfile(directory / name))


def _module_configs(inside: _Inside) -> Iterator[str]:
    """Where sentence-transformers' modules have their settings, as modules.json says.

    A modules.json that is none gives nothing here: whoever needs the modules will refuse it.
    """
    path = inside.directory / MODULES
    if not os.path.isfile(path) or path.stat().st_size > MAX_MODULES_BYTES:
        return
    try:
        modules = strict_json(_companion(inside, MODULES).read(), path)
    except FormatError:
        return
    for module in modules[:MAX_MODULES] if isinstance(modules, list) else ():
        place = module.get("path") if isinstance(module, dict) else None
        if isinstance(place, str) and place and all(map(_is_plain, place.split("/"))):
            yield f"{place}/{CONFIG}"


def _companion(inside: _Inside, name: str) -> Companion:
    """A small file in the directory of a model, or in one below it.

    Raises:
        InputError: it is a link that leads elsewhere, or too large.
    """
    path = inside.directory / name
    inside.check(name)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise os_refusal(path, error) from error
    _check_small(path, size)

    def read() -> bytes:
        file = RegularFile(path)
        try:
            if file.size != size:
                raise InputError(
                    "file changed since the model was opened",
                    path=path,
                    found=f"{file.size} bytes",
                    wanted=f"{size} bytes",
                    hint="wait until the directory is complete, then run again",
                    code="FILE-CHANGED",
                )
            return file.read(0, size)
        finally:
            file.close()

    return Companion(name, size, read)


def read_index(path: Path) -> dict[str, str]:
    """The weight map of a shard index: tensor name to shard name.

    Raises:
        InputError: the file cannot be opened, or is not an index at all.
        FormatError: it breaks a rule; a shard name that is not a plain file name is one.
    """
    file = RegularFile(path)
    try:
        if file.size > MAX_JSON_BYTES:
            raise FormatError(
                "index is too large",
                path=path,
                found=f"{file.size} bytes",
                wanted=f"at most {MAX_JSON_BYTES}",
                code="ST-INDEX",
            )
        data = file.read(0, file.size)
    finally:
        file.close()
    if not data.startswith(b"{"):
        refuse_foreign(path, data[:64])
    index = strict_json(data, path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            "index has no weight_map, an object of tensor names and file names",
            path=path,
            found=reprlib.repr(weight_map),
            code="ST-INDEX",
        )
    plain = {name: _is_plain(name) for name in weight_map.values() if isinstance(name, str)}
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and plain[name]):
            raise FormatError(
                "shard name is not a plain file name",
                path=path,
                tensor=tensor[:80],
                found=reprlib.repr(name),
                wanted="a name without directories, such as 'model-00001-of-00002.safetensors'",
                hint="the shards must lie beside the index",
                code="ST-SHARD-NAME",
            )
    if len(plain) > MAX_SHARDS:
        raise FormatError(
            "index names too many shards",
            path=path,
            found=f"{len(plain):,}",
            wanted=f"at most {MAX_SHARDS:,}",
            code="ST-INDEX",
        )
    return weight_map


def refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse a file by the name of what it is, as far as its first 64 bytes tell; else return.

    Raises:
        FormatError: it is recognisably something else.
    """
    text = start.lstrip().lower()
    found = hint = None
    if start.startswith(b"version https://git-lfs.github.com/spec"):
        found, hint = "a Git LFS pointer", "fetch the file itself: git lfs pull"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        found, hint = "a web page", "the download failed or needs a login: download it again"
    elif start.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", start):
        found = "a PyTorch checkpoint (zip or pickle)"
        hint = "save the model as safetensors first: save_pretrained(..., safe_serialization=True)"
    elif start.startswith(b"GGUF"):
        found, hint = "a GGUF file", "pass it by itself, not as safetensors"
    elif start.startswith(b"\x89QBLK"):
        found, hint = "a qblk file", "pass it by itself, not as safetensors"
    elif start.startswith(b"{"):
        found, hint = "a JSON file", "for a sharded model pass the directory that holds it"
    if found is not None:
        raise FormatError("not safetensors", path=path, found=found, hint=hint, code="ST-FOREIGN")


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not any(c in "/\\:" or ord(c) < 0x20 for c in name)


def _only_weights(directory: Path, names: list[str]) -> str:
    """The one safetensors file of a directory without an index."""
    # A name that starts with a dot is a leftover of a download or of macOS, not a model.
    weights = [n for n in names if n.endswith(".safetensors") and not n.startswith(".")]
    if WEIGHTS in weights:
        return WEIGHTS
    if not weights:
        raise _no_weights(directory, names)
    models = [n for n in weights if not _ADAPTER.fullmatch(n)]
    if not models:
        raise InputError(
            "an adapter, not a model",
            path=directory / weights[0],
            wanted=f"{WEIGHTS}, or {INDEX} and its shards",
            hint="merge it into its base model first, for example with peft's merge_and_unload",
            code="ST-ADAPTER",
        )
    if len(models) > 1 or _SHARD_OF_SEVERAL.search(models[0]):
        raise InputError(
            f"several safetensors files, or one shard of several, without {INDEX}",
            path=directory,
            found=reprlib.repr(models),
            wanted=f"{INDEX}, {WEIGHTS} or a single file",
            hint=f"download {INDEX}, or pass one of the files",
            code="ST-NO-INDEX",
        )
    pickled = [n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")]
    if pickled:
        raise InputError(
            "two files that may be the weights: transformers loads the one that we do not read",
            path=directory,
            found=f"{models[0]} and {pickled[0]}",
            wanted=WEIGHTS,
            hint=f"pass {models[0]} by itself, or save the model as safetensors first",
            code="ST-CANDIDATES",
        )
    return models[0]


def _no_weights(directory: Path, names: list[str]) -> InputError:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    other = [name for name in names if name.endswith((".gguf", ".qblk"))]
    hint = f"a model directory holds {WEIGHTS}, or {INDEX} and its shards"
    if other:
        hint = "pass the file by itself"
    elif pickled:
        hint = "save the model as safetensors first: save_pretrained(..., safe_serialization=True)"
    return InputError(
        "no safetensors file in the directory",
        path=directory,
        found=reprlib.repr(other or pickled or names),
        hint=hint,
        code="ST-NO-MODEL",
    )


def _check_present(directory: Path, shards: list[str]) -> None:
    missing = [name for name in shards if not os.path.exists(directory / name)]
    if missing:
        raise InputError(
            "shard is missing",
            path=directory / missing[0],
            found=f"{len(shards) - len(missing)} of {len(shards)} shards",
            wanted=f"every file that {INDEX} names",
            hint="finish the download",
            code="ST-SHARD-MISSING",
        )


class _Inside:
    """Where the files of a directory may lie, once all links are followed.

    A downloaded directory could otherwise carry any file of this machine into the output. Besides
    the directory itself that is, for a snapshot in the cache of Hugging Face, the folder `blobs` of
    the same repository, unless that folder is a link itself.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = Path(os.path.realpath(directory))
        self.allowed = [self.home]
        for revision in (self.home, *self.home.parents):
            snapshots = revision.parent
            if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
                blobs = snapshots.parent / "blobs"
                if os.path.realpath(blobs) == str(blobs):
                    self.allowed.append(blobs)
                break

    def check(self, name: str) -> None:
        """Refuse a file that lies elsewhere."""
        target = Path(os.path.realpath(self.directory / name))
        if not any(target.is_relative_to(place) for place in self.allowed):
            raise InputError(
                "file is a link that leads out of the model's directory",
                path=self.directory / name,
                found=target,
                wanted=f"a file in {self.home}",
                hint="copy the file into the directory",
                code="ST-OUTSIDE",
            )


def companion_too_large(path: Path, name: str, size: int) -> UnsupportedError:
    """The refusal of a companion file in a container that is to be carried along or read."""
    return UnsupportedError(
        f"companion file '{name}' is too large to be carried along",
        path=path,
        found=f"{size:,} bytes",
        wanted=f"at most {MAX_COMPANION_BYTES:,}",
        code="ST-COMPANION",
    )


def _check_small(path: Path, size: int) -> None:
    if size > MAX_COMPANION_BYTES:
        raise InputError(
            "companion file is too large to be carried along",
            path=path,
            found=f"{size} bytes",
            wanted=f"at most {MAX_COMPANION_BYTES}",
            hint="move it out of the directory",
            code="ST-COMPANION",
        )
