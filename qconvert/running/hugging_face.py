"""Hugging Face checkpoints in torch: whole directories on this disk, never code that comes with
them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from qconvert.errors import InputError, MachineError, QconvertError, UnsupportedError
from qconvert.files.prequantized import refuse_prequantized
from qconvert.files.safetensors import open_safetensors
from qconvert.files.shards import MAX_COMPANION_BYTES
from qconvert.files.strict_json import read_object
from qconvert.progress import Progress, Silent
from qconvert.running.device import CPU
from qconvert.running.streaming import stream_weights, widen_if_needed

INSTALL = "pip install torch transformers, or '.[hf]' in a checkout of qconvert"
CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# The tables of transformers whose classes take token ids alone and answer in one pass.
SEEING = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"  # most of which take text alone, too
LANGUAGE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
CAUSAL = (LANGUAGE, SEEING)
ENCODER = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to run, and its tokenizer.

    Attributes:
        path: the directory.
        model: a transformers model (torch.nn.Module), float32, in eval mode, without gradients.
        tokenizer: the model's own.
        config: the fields of config.json.
        kind: ``causal`` predicts the next token; ``encoder`` takes sentences.
    """

    path: Path
    model: Any
    tokenizer: Any
    config: dict[str, Any]
    kind: Literal["causal", "encoder"]

    @property
    def text(self) -> dict[str, Any]:
        """See `language_fields`."""
        return language_fields(self.config)


def language_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json as they are of the language model, which models that see have in
    a part of their own.
    """
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def open_checkpoint(
    path: Path, *, threads: int | None = None, streamed: bool = False, device: str = CPU
) -> Checkpoint:
    """Load a directory as Hugging Face lays it out; code in it or named by it is never run.

    Args:
        path: a directory with config.json, safetensors and a tokenizer.
        threads: of torch, for the whole process; None leaves its own choice.
        streamed: leave matrices in their files; see `qconvert.running.streaming`. The model then
            computes in float32 as otherwise, but its parameters are not all float32.
        device: of torch, where the weights go; those that are streamed in the dtype of their files.

    Raises:
        InputError: a file is missing or damaged.
        UnsupportedError: the model needs code of its own, is of a kind that transformers does not
            know or that text alone does not run, is quantized already, or weights are missing.
        MachineError: torch or transformers is not installed.
    """
    config = checked_config(path)
    with open_safetensors(path) as model:  # headers are held against the files before all else
        refuse_prequantized(model)
    torch, transformers = require("torch", "transformers")
    if threads is not None:
        torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, kind = model_class(config, path)
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        cls = getattr(transformers, name)
        described = cls.config_class.from_pretrained(path, local_files_only=True)
        model, loaded = cls.from_pretrained(
            path,
            config=described if without_quantizer(described) else None,
            dtype="auto" if streamed else torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as e:  # whatever transformers makes of files that it does not like
        refuse_loading(e, path)
    other_shapes = sorted(str(k[0]) for k in loaded["mismatched_keys"])
    lacking = other_shapes + sorted(set(loaded["missing_keys"]) - set(other_shapes))
    if lacking:
        raise UnsupportedError(
            "the weights do not make up the model, torch would invent them",
            path=path,
            tensor=lacking[0],
            found=f"{len(lacking)} missing or of another shape",
            code="HF-WEIGHTS",
        )
    model.eval().requires_grad_(False)
    plain_experts(model)
    check_text_alone(model, path)
    if streamed:
        stream_weights(model)
        widen_if_needed(model)
    if device != CPU:
        model.to(device)
    return Checkpoint(path, model, tokenizer, config, kind)


def check_text_alone(model: Any, path: Path) -> None:
    """Have a model run on a token, if it is known as one that sees and not as a language model.

    Raises:
        UnsupportedError: it cannot without pictures.
    """
    import torch

    name = type(model).__name__
    if _among(name, LANGUAGE) or not _among(name, SEEING):
        return
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
    except Exception as e:  # whatever a model makes of a picture that is not there
        raise UnsupportedError(
            "transformers does not run the model on text alone",
            path=path,
            found=f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}",
            wanted="a language model, or one that sees and takes text without pictures",
            code="HF-ARCHITECTURE",
        ) from e


def without_quantizer(described: Any) -> bool:
    """Take out of a configuration what would have transformers quantize plain weights as it loads
    them, such as bitsandbytes: here they are wanted as they are.

    Returns:
        whether there was such an entry.
    """
    parts = (described, described.get_text_config())
    found = [vars(part).pop("quantization_config", None) for part in parts]
    return any(entry is not None for entry in found)


def plain_experts(model: Any) -> None:
    """Let experts that are stored together be multiplied one by one, as they are written down."""
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")


def require(*packages: str, progress: Progress | None = None) -> list[Any]:
    """Import optional packages, which takes seconds the first time: ``progress`` is told.

    Raises:
        MachineError: one is not installed; says how to install it.
    """
    import importlib

    # A directory on this disk is all that is ever opened; some versions ask the hub even so.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads that spin while they wait made a run on a busy machine up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    progress = progress or Silent()
    progress.begin(f"load {' and '.join(packages)}", len(packages), "packages")
    found = []
    try:
        for package in packages:
            found.append(importlib.import_module(package))
            progress.advance(1, package)
    except ImportError as e:
        raise MachineError(
            f"running a model needs {' and '.join(packages)}",
            found=f"no package '{e.name}'",
            hint=f"install with: {INSTALL}",
            code="HF-INSTALL",
        ) from e
    finally:
        progress.end()
    return found


def checked_config(path: Path) -> dict[str, Any]:
    """config.json of a directory that holds a tokenizer too and asks for no code of its own.

    Raises:
        InputError: a file is missing or damaged, or the model needs its own code.
    """
    if not path.is_dir():
        if path.exists():
            raise InputError(
                "running a model takes its directory",
                path=path,
                found="a file",
                hint="give the directory with config.json and the tokenizer",
                code="HF-DIRECTORY",
            )
        raise InputError("no such file or directory", path=path, code="FILE-MISSING")
    config = read_object(path / CONFIG, MAX_COMPANION_BYTES)
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise InputError(
            "no tokenizer in the directory",
            path=path,
            wanted=f"one of {', '.join(TOKENIZERS)}",
            hint="put the model's own tokenizer files beside its weights",
            code="HF-TOKENIZER",
        )
    companion = path / TOKENIZER_CONFIG
    for file, fields in (
        (path / CONFIG, config),
        (companion, read_object(companion, MAX_COMPANION_BYTES) if companion.exists() else {}),
    ):
        if fields.get("auto_map"):
            raise UnsupportedError(
                "the model needs code of its own, which is never run",
                path=file,
                found="auto_map",
                wanted="an architecture that transformers itself has",
                hint="record activations elsewhere and give them with --activations",
                code="HF-CODE",
            )
    return config


def model_class(config: dict[str, Any], path: Path) -> tuple[str, Literal["causal", "encoder"]]:
    """The transformers class that the config names: the tensors then have its modules' names.

    Raises:
        UnsupportedError: none, several, or one that text alone does not run.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    tables: tuple[tuple[Literal["causal", "encoder"], tuple[str, ...]], ...] = (
        ("causal", CAUSAL),
        ("encoder", ENCODER),
    )
    if isinstance(name, str) and not config.get("is_encoder_decoder"):
        for kind, names in tables:
            if any(_among(name, table) for table in names):
                return name, kind
    raise UnsupportedError(
        "not an architecture that text alone can be run through",
        path=path / CONFIG,
        found=f"architectures {named!r}",
        wanted="one causal language model or encoder of transformers",
        code="HF-ARCHITECTURE",
    )


def _among(name: str, table: str) -> bool:
    """Whether a table of transformers has a class of this name."""
    from transformers.models.auto import modeling_auto

    classes = getattr(modeling_auto, table).values()
    return any(name == known or (isinstance(known, tuple) and name in known) for known in classes)


def refuse_loading(e: Exception, path: Path) -> NoReturn:
    """An exception of transformers as ours."""
    if isinstance(e, (QconvertError, MemoryError)):
        raise e
    text = str(e).strip()
    raise UnsupportedError(
        "transformers cannot load the model",
        path=path,
        found=f"{type(e).__name__}: {text.splitlines()[0] if text else 'no reason given'}",
        code="HF-LOAD",
    ) from e
