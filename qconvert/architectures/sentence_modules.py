"""What sentence-transformers does with the transformer's output: the modules of modules.json.

llama.cpp pools with one of three ways, for every architecture, and its programs scale embeddings to
length 1 unless told otherwise; some architectures have places for dense modules. That is all that a
file can hold: a module that computes anything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qconvert.architectures.small_files import SmallFiles
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.shards import CONFIG, MODULES

SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
_POOLING_TYPES = {"mean": 1, "cls": 2, "lasttoken": 3}  # llama.h's llama_pooling_type
_OLDER = {  # fields before version 5.4, one for each way
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_NAMED = 80  # characters
_MODULES = 8  # that are named
_PROMPT_SHOWN = 40
_HARMLESS = ("Transformer", "Pooling", "Normalize", "Dropout")


@dataclass(slots=True)
class SentenceModules:
    """What they come to.

    Attributes:
        pooling: llama.cpp's type; None where no module pools.
        dense: where the dense modules after it are, in their order.
        scores: where the settings are of one that scores by the logits of tokens; None: there is
            none.
        notes, warnings: what a file does not hold.
    """

    pooling: int | None = None
    dense: tuple[str, ...] = ()
    scores: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def sentence_modules(
    files: SmallFiles, *, dense: bool = False, scores: bool = False
) -> SentenceModules:
    """Read the modules, wherever modules.json says that they are.

    Args:
        files: of the model.
        dense: whether the architecture has places for dense modules after the pooling.
        scores: whether it has a head for scores by the logits of tokens.

    Raises:
        UnsupportedError: a module that no GGUF file can hold.
        FormatError: modules.json, or the settings of a module, are not what they should be.
    """
    found = SentenceModules()
    modules = files.list(MODULES)
    if modules is None:
        if (pooling := files.json(f"1_Pooling/{CONFIG}")) is not None:
            found.pooling = _pooling(files, f"1_Pooling/{CONFIG}", pooling, found)
        elif files.json(SETTINGS) is not None or files.json(TRANSFORMER) is not None:
            found.warnings.append(
                f"files of sentence-transformers without {MODULES}: how it pools is not known, and "
                "the file says that llama.cpp is not to pool"
            )
    for i, module in enumerate(modules or ()):
        _take(files, i, module, found, {"Dense": dense, "LogitScore": scores})
    _prompts(files, found)
    return found


def modules_beyond(files: SmallFiles) -> list[str]:
    """Modules with an arithmetic of their own, whose weights no file of a transformer has."""
    modules = files.list(MODULES) or []
    kinds = [m.get("type") for m in modules if isinstance(m, dict)]
    names = [k.rpartition(".")[2] for k in kinds if isinstance(k, str)]
    return [n[:_NAMED] for n in names if n not in _HARMLESS][:_MODULES]


def _take(
    files: SmallFiles, i: int, module: Any, found: SentenceModules, taken: dict[str, bool]
) -> None:
    kind, place = (module.get(k) if isinstance(module, dict) else None for k in ("type", "path"))
    if not isinstance(kind, str) or not isinstance(place, str):
        raise FormatError(
            "a module without type and path", path=files.home / MODULES, found=f"module {i}",
            code="ARCH-JSON",
        )  # fmt: skip
    name = kind.rpartition(".")[2]
    if name == "Transformer" and i == 0:
        if place:
            found.notes.append(f"the transformer is taken from here, not from {place}")
        settings = files.json(f"{place}/{TRANSFORMER}".lstrip("/")) or {}
        if settings.get("do_lower_case") is True:
            found.warnings.append(
                f"sentence-transformers lowers the case of every text first ({TRANSFORMER}: "
                "do_lower_case), llama.cpp does not: 'The' and 'the' may get other embeddings"
            )
    elif name == "Pooling" and found.pooling is None:
        config = f"{place}/{CONFIG}".lstrip("/")
        fields = files.json(config)
        if fields is None:
            raise FormatError(
                "settings of the pooling module are missing",
                path=files.home / config,
                hint="download the whole directory",
                code="ARCH-POOLING",
            )
        found.pooling = _pooling(files, config, fields, found)
    elif name == "Normalize":
        found.notes.append(
            "embeddings are to be scaled to length 1, which llama.cpp's programs do by default"
        )
    elif name == "Dense" and taken[name] and place and found.pooling is not None:
        found.dense += (place,)
    elif name == "LogitScore" and taken[name] and place and i == 1:
        found.scores = place
    elif name != "Dropout":  # which does nothing when a model is used
        more = [kind for kind, has in taken.items() if has]
        raise UnsupportedError(
            "a module of sentence-transformers that no GGUF file can hold",
            path=files.home / MODULES,
            found=f"{kind[:80]} in '{place[:80]}'",
            wanted=", ".join(("Transformer", "Pooling", "Normalize", *more)),
            hint="embeddings would be other ones; --raw writes the transformer's tensors alone",
            code="ARCH-MODULE",
        )


def _pooling(files: SmallFiles, config: str, fields: dict[str, Any], found: SentenceModules) -> int:
    """llama.cpp's type of pooling; ``mean`` where nothing is said, as in sentence-transformers."""
    chosen = fields.get("pooling_mode")
    if chosen is None:
        chosen = [way for name, way in _OLDER.items() if fields.get(name) is True] or ["mean"]
    ways = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(ways, list) or len(ways) != 1 or ways[0] not in _POOLING_TYPES:
        raise UnsupportedError(
            "llama.cpp does not have this pooling",
            path=files.home / config,
            found=", ".join(map(str, ways))[:80] if isinstance(ways, list) else str(ways)[:80],
            wanted=" or ".join(_POOLING_TYPES),
            code="ARCH-POOLING",
        )
    if fields.get("include_prompt") is False:
        found.warnings.append(
            "sentence-transformers leaves the tokens of a prompt out of the pooling, llama.cpp "
            "takes them in"
        )
    return _POOLING_TYPES[ways[0]]


def _prompts(files: SmallFiles, found: SentenceModules) -> None:
    """Texts that sentence-transformers puts before every text."""
    settings = files.json(SETTINGS) or {}
    prompts = settings.get("prompts")
    named = {k: v for k, v in prompts.items() if v} if isinstance(prompts, dict) else {}
    default = settings.get("default_prompt_name")
    if isinstance(default, str) and isinstance(named.get(default), str):
        found.warnings.append(
            f"sentence-transformers puts {named[default][:_PROMPT_SHOWN]!r} before every text "
            "unless told otherwise, llama.cpp does not: put it there yourself"
        )
    elif named:
        names = ", ".join(str(name)[:_PROMPT_SHOWN] for name in list(named)[:4])
        found.notes.append(
            f"prompts of sentence-transformers are not in the file ({names}): put them before the "
            "texts yourself"
        )
