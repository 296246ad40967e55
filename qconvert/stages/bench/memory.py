"""Which scheme suits a model on this machine: the one of least loss whose file fits into a memory
limit, with what the limit leaves for the context and how fast memory lets it be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from qconvert.errors import InputError, UnsupportedError
from qconvert.files import open_model
from qconvert.progress import Silent
from qconvert.remedies import LADDERS, MIXES
from qconvert.report import BenchReport, Measurement, MemoryChoice, MemoryFit
from qconvert.schemes import parse_scheme
from qconvert.stages.bench.file_cost import multiplied, reading_line, reading_rate
from qconvert.stages.bench.lines import Section
from qconvert.stages.facts import config_of
from qconvert.stages.parallel import Workers
from qconvert.stages.quantize import QuantizeOptions, quantize

OF_TYPES = ("iq4_nl", "q5_1")  # of single tensors in GGUF, no mixes of models
WRITERS = ("ForCausalLM", "ForConditionalGeneration")  # classes of models that write text
CONTEXT = 4096  # tokens that should have room, of models that take so many
CACHE_BYTES = 2  # of a value of keys or values: float16, the usual cache


def memory_section(source: Path, limit: int, workers: Workers) -> Section:
    """How fast memory is, and what that means for a model under a limit of so many bytes."""
    section = Section("memory", [reading_line(workers)])

    def conclude(found: list[Measurement], report: BenchReport) -> None:
        report.memory = _fit(source, limit, reading_rate(found[0]), section)

    section.conclude = conclude
    return section


def _fit(source: Path, limit: int, reading: float, section: Section) -> MemoryFit:
    """Every scheme that may be advised, planned for a model: nothing is converted.

    Args:
        limit: bytes.
        reading: bytes a second that memory gives.
        section: is told of containers that the model cannot go into.

    Raises:
        InputError: the model cannot be read.
    """
    with closing(open_model(source)) as model:
        config = config_of(model)
        architecture = str(model.metadata.get("general.architecture", config.get("model_type", "")))
    cache, context = _cache(config)
    choices = list(_choices(source, architecture, section))
    for choice in choices:
        left = limit - choice.nbytes
        choice.fits = left >= context * cache
        if choice.token_bytes:
            choice.bound_tokens_per_second = reading / choice.token_bytes
        if cache and choice.fits:
            choice.context = left // cache
    fitting = [c for c in choices if c.fits]
    best = max(fitting, key=lambda c: (_worth(c), -c.nbytes), default=None)
    return MemoryFit(
        path=str(source),
        limit=limit,
        read_gigabytes_per_second=reading / 1e9,
        context_bytes=cache,
        context=context,
        choices=choices,
        best=best.scheme if best else None,
    )


def _worth(choice: MemoryChoice) -> float:
    return float("inf") if choice.sqnr_db is None else choice.sqnr_db


def _choices(source: Path, architecture: str, section: Section) -> Iterator[MemoryChoice]:
    for container, ladder in LADDERS.items():
        for rung in ladder:
            scheme = MIXES.get(rung.scheme, rung.scheme)
            if rung.scheme in OF_TYPES or scheme == "f32":
                continue
            options = QuantizeOptions(
                scheme=parse_scheme(scheme),
                container=container,
                equalise=False,  # which reads the weights, and changes no size
                dry_run=True,
                allow_requantize=True,
            )
            try:
                report = quantize(source, options, Silent())
            except (InputError, UnsupportedError) as e:
                if container == "qblk":  # takes any model that can be read
                    raise
                section.skip(f"schemes of {container}", str(e))
                break
            token_bytes = sum(t.nbytes for t in multiplied(report.tensors, architecture))
            sqnr = rung.sqnr_db if math.isfinite(rung.sqnr_db) else None
            yield MemoryChoice(scheme, container, report.output_bytes, token_bytes, sqnr)


def _cache(config: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes of keys and values for a token of context, and the tokens that a model should have room
    for; zeros where the configuration, which may be wrong or of another kind of model, does not
    say.
    """
    named = config.get("architectures")
    if not isinstance(named, list) or not any(str(n).endswith(WRITERS) for n in named):
        return 0, 0
    inner = config.get("text_config")
    fields = inner if isinstance(inner, dict) else config

    def count(name: str) -> int | None:
        value = fields.get(name)
        return value if type(value) is int and 0 < value < 1 << 24 else None

    layers, heads, width = map(count, ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    if not layers or not heads or not width or "kv_lora_rank" in fields:
        return 0, 0
    head = count("head_dim") or width // heads
    size = 2 * CACHE_BYTES * layers * (count("num_key_value_heads") or heads) * head
    return size, min(count("max_position_embeddings") or CONTEXT, CONTEXT)
