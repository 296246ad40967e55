"""Rotary position embeddings: config.json's fields as GGUF keys and tensors.

Formulas: transformers' ``modeling_rope_utils`` (llama3, yarn, longrope).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.config import Config
from qconvert.errors import FormatError, UnsupportedError
from qconvert.files.gguf_writer import MetadataValue

DEFAULT_THETA = 10000.0
PLAIN = ("default", "linear", "llama3", "yarn")
LONG = ("default", "longrope", "su")  # "su" is what longrope was first called


@dataclass(slots=True)
class Rope:
    """What a GGUF file says about rotary positions.

    Attributes:
        keys: below ``<architecture>.rope.``.
        tensors: name and factors, one for each pair of rotated dimensions.
    """

    keys: dict[str, MetadataValue] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def read_rope(
    config: Config,
    dimensions: int,
    supported: tuple[str, ...] = PLAIN,
    theta: float = DEFAULT_THETA,
) -> Rope:
    """Read ``rope_parameters``, or the older ``rope_theta`` and ``rope_scaling``.

    Args:
        config: of the language model.
        dimensions: of a head that are rotated.
        supported: kinds of scaling that the architecture has in llama.cpp.
        theta: base when none is stated.

    Raises:
        UnsupportedError: another kind of scaling.
        FormatError: a field is missing or unusable.
    """
    scaling = config.section("rope_parameters")
    local = scaling.section("sliding_attention") if scaling else None
    if scaling and local:  # one set for each kind of layer
        scaling = scaling.section("full_attention")
    scaling = scaling or config.section("rope_scaling") or Config({}, config.path)
    rope = Rope()
    rope.keys["dimension_count"] = dimensions
    base = scaling.number("rope_theta", config.number("rope_theta", theta))
    rope.keys["freq_base"] = base
    if local:
        rope.keys["freq_base_swa"] = local.number("rope_theta")
        _kind(local, ("default",))
    elif config.get("rope_local_base_freq") is not None:
        rope.keys["freq_base_swa"] = config.number("rope_local_base_freq")
    kind = _kind(scaling, supported)
    if kind == "linear":
        rope.keys |= {"scaling.type": "linear", "scaling.factor": scaling.number("factor")}
    elif kind == "yarn":
        _yarn(rope, scaling, config)
    elif kind == "llama3":
        _llama3(rope, scaling, base, dimensions)
    elif kind in ("longrope", "su"):
        _longrope(rope, scaling, config, dimensions)
    return rope


def _kind(scaling: Config, supported: tuple[str, ...]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in supported:
        raise UnsupportedError(
            "rope scaling is of a kind that llama.cpp does not have for this architecture",
            path=scaling.path,
            found=repr(kind),
            wanted=", ".join(supported),
            code="ARCH-ROPE",
        )
    return str(kind)


def _yarn(rope: Rope, scaling: Config, config: Config) -> None:
    original = scaling.optional_count("original_max_position_embeddings")
    rope.keys |= {
        "scaling.type": "yarn",
        "scaling.factor": scaling.number("factor"),
        "scaling.original_context_length": original or config.count("max_position_embeddings"),
    }
    for name, key in (
        ("attention_factor", "scaling.yarn_attn_factor"),
        ("beta_fast", "scaling.yarn_beta_fast"),
        ("beta_slow", "scaling.yarn_beta_slow"),
    ):
        if scaling.get(name) is not None:
            rope.keys[key] = scaling.number(name)


def _llama3(rope: Rope, scaling: Config, base: float, dimensions: int) -> None:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise FormatError(
            "field 'high_freq_factor' is not usable",
            path=scaling.path,
            found=high,
            wanted=f"more than low_freq_factor, {low}",
            code="ARCH-CONFIG",
        )
    factor, original = scaling.number("factor"), scaling.count("original_max_position_embeddings")
    rope.tensors["rope_freqs.weight"] = llama3_factors(
        base, dimensions, factor, low, high, original
    )


def llama3_factors(
    base: float, dimensions: int, factor: float, low: float, high: float, original: int
) -> NDArray[np.float32]:
    """By how much Llama 3's scaling divides each frequency, binary32, shape (dimensions / 2,).

    Wavelengths below ``original / high`` tokens stay, those above ``original / low`` are stretched
    by ``factor``, and frequencies between are interpolated.
    """
    frequency = base ** (-np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    turns = original * frequency / (2 * math.pi)  # of each pair over the original context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _longrope(rope: Rope, scaling: Config, config: Config, dimensions: int) -> None:
    context = config.count("max_position_embeddings")
    original = config.optional_count("original_max_position_embeddings") or scaling.count(
        "original_max_position_embeddings"
    )
    stretch = context / original
    if scaling.get("attention_factor") is not None:
        attention = scaling.number("attention_factor")
    else:
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    rope.keys["scaling.original_context_length"] = original
    rope.keys["scaling.attn_factor"] = attention
    for name, field_name in (("long", "long_factor"), ("short", "short_factor")):
        factors = scaling.numbers(field_name, dimensions // 2)
        rope.tensors[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
