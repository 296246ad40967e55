"""Rotary position embeddings: config.json's fields as GGUF keys and tensors.

What the fields mean is transformers' ``modeling_rope_utils``: which of several names counts, and
the formulas (llama3, yarn, longrope). What a key does is llama.cpp's: every loader reads the base,
a linear factor, YaRN's factor and original context, and a factor of attention; none of ours reads
the rest of YaRN. Factors by pair of dimensions are a tensor that some loaders ask for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qconvert.architectures.config import Config
from qconvert.errors import UnsupportedError
from qconvert.files.gguf_writer import MetadataValue

# Fields beside those that every kind has, as transformers' validation lists them.
_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
        "beta_slow", "mscale", "mscale_all_dim", "truncate",
    ),
    "llama3": (
        "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
    ),
    "dynamic": ("factor", "alpha"),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor",
        "long_factor",
    ),
}  # fmt: skip
_EVERY = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_HARMLESS = ("finetuned",)  # in published YaRN models; nothing reads it
# What transformers nests rotary fields by, in models with more than one kind of layer.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
_LOCAL_THETA = 10_000.0  # of Gemma 3's sliding layers
# YaRN's betas when none are stated, in transformers and in llama.cpp.
_BETAS = (32.0, 1.0)
_LEAST_YARN = 1e-3  # llama.cpp divides by 1 + 0.1 ln(factor), which is zero at exp(-10)


@dataclass(frozen=True, slots=True)
class Scalings:
    """What llama.cpp does for an architecture.

    Attributes:
        kinds: of scaling.
        by_pair: whether its loader asks for a tensor of factors, one for each pair of dimensions.
        partial: whether it may rotate a part of each head.
        whole: the part that is rotated when no field says it.
        rounded: whether YaRN with bounds that are not whole is taken, with a warning, though
            llama.cpp rounds them.
        beside: names among the rotary fields that others than this module read.
        older: what kinds were called before.
    """

    kinds: tuple[str, ...]
    by_pair: bool = False
    partial: bool = False
    whole: float = 1.0
    rounded: bool = False
    beside: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


PLAIN = Scalings(("default", "linear", "yarn"))
BY_PAIR = Scalings(("default", "linear", "yarn", "llama3", "longrope"), by_pair=True)
DYNAMIC = replace(BY_PAIR, kinds=(*BY_PAIR.kinds, "dynamic"))
PARTIAL = Scalings(("default", "linear", "yarn"), partial=True)
LONG = Scalings(
    ("default", "longrope"),
    partial=True,
    older=MappingProxyType({"su": "longrope", "yarn": "longrope"}),
)
_FULL_LAYERS, _SLIDING_LAYERS = Scalings(("default", "linear")), Scalings(("default",))


@dataclass(slots=True)
class Rope:
    """What a GGUF file says about rotary positions.

    Attributes:
        keys: below ``<architecture>.rope.``.
        tensors: name and factors, one for each pair of rotated dimensions.
        unread: fields of the configuration that transformers reads for no scaling of this kind.
        longer: the number of tokens from which llama.cpp goes by the length of its context and
            transformers by that of the text; None when they agree.
        dynamic: the number of tokens above which transformers changes the base by the length of the
            text, which llama.cpp never does; None when it does not either.
        rounded: by which part at most frequencies differ from transformers', as llama.cpp rounds
            the bounds of YaRN.
    """

    keys: dict[str, MetadataValue] = field(default_factory=dict)
    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    longer: int | None = None
    dynamic: int | None = None
    rounded: float = 0.0


@dataclass(frozen=True, slots=True)
class Parameters:
    """Rotary fields, settled as transformers settles them.

    Attributes:
        fields: of the object that counts.
        kind: of scaling.
        theta: base of the frequencies.
        part: of each head that is rotated.
        original: context before it was stretched.
        context: and after.
        outdone: fields that say something else, and do not count.
        beside: fields that others read.
    """

    fields: Config
    kind: str
    theta: float
    part: float
    original: int
    context: int
    outdone: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def optional(self, name: str) -> float | None:
        """A positive number; None when it is null or absent."""
        return None if self.fields.stated(name) is None else self.fields.number(name)

    def unread(self) -> list[str]:
        """Fields that are none of this kind of scaling, or that do not count beside others."""
        known = (*_EVERY, *_HARMLESS, *_FIELDS[self.kind], *self.beside)
        named = [self.fields.described(n) for n in self.fields.names() if n not in known]
        return [*named, *self.outdone]


def settled(config: Config, scalings: Scalings) -> Parameters:
    """``rope_scaling`` if it says anything, else ``rope_parameters``, and what stands beside.

    Raises:
        UnsupportedError: a kind of scaling, or a part of heads, that llama.cpp does not do here.
        FormatError: a field is unusable.
    """
    old, new = config.section("rope_scaling"), config.section("rope_parameters")
    given = old if old and old.names() else new or config.inner({}, "rope_parameters")
    if nested := [n for n in (_FULL, _SLIDING) if isinstance(given.get(n), dict)]:
        raise UnsupportedError(
            "rotary fields are those of a model with several kinds of layers",
            path=config.path,
            found=", ".join(f"'{given.described(n)}'" for n in nested),
            wanted="one object for all layers",
            code="ARCH-ROPE",
        )
    fields = given.fields()
    outdone = [
        n for n in ("rope_theta", _PARTIAL) if n in fields and config.get(n, fields[n]) != fields[n]
    ]
    if given is old and new and new.names() and new.fields() != fields:
        outdone.append("rope_parameters")
    if "rope_theta" not in fields:
        fields["rope_theta"] = config.number("rope_theta", _theta(config))
    part = config.stated(_PARTIAL)
    if part is not None or (scalings.partial and config.given(_PARTIAL)):
        fields.setdefault(_PARTIAL, part)
    return _parameters(config, given.replaced(fields), scalings, tuple(outdone))


def read_rope(p: Parameters, dimensions: int, scalings: Scalings) -> Rope:
    """What a GGUF file says about rotary positions, for layers that are all alike.

    Args:
        p: fields of the configuration.
        dimensions: of a head that are rotated.
        scalings: what llama.cpp does for the architecture.

    Raises:
        UnsupportedError: fields that no key says.
        FormatError: a field is missing or unusable.
    """
    rope = Rope(unread=p.unread())
    rope.keys |= {"dimension_count": dimensions, "freq_base": p.theta}
    if p.kind == "linear":
        rope.keys |= {"scaling.type": "linear", "scaling.factor": p.fields.number("factor")}
    elif p.kind == "dynamic":
        p.fields.number("factor")
        rope.dynamic = p.context
    elif p.kind == "yarn":
        _yarn(rope, p, dimensions // 2, scalings)
    elif p.kind == "llama3":
        _llama3(rope, p, dimensions)
    elif p.kind == "longrope":
        _longrope(rope, p, dimensions // 2)
    return rope


def read_rope_by_layer(
    config: Config,
    dimensions: int,
    scalings: Scalings | None = None,
    local: str | None = "rope_local_base_freq",
    whole: str = "rope_theta",
) -> Rope:
    """The same for models with one base for full layers and another for sliding ones.

    Args:
        config, dimensions: as above.
        scalings: what llama.cpp does for full layers: a linear factor, if nothing else is said.
        local: field that has the base of sliding layers where it is not inside; None: it is then
            that of the class.
        whole: the same for full layers.

    Raises:
        UnsupportedError: a kind of scaling that llama.cpp does not do.
        FormatError: a field is missing or unusable.
    """
    outer, old = config.section("rope_parameters"), config.section("rope_scaling")
    full = _of_layer(config, outer, _FULL, whole, _theta(config))
    if old:
        if outer and not isinstance(outer.get(_FULL), dict):
            # transformers would have nothing to put the older fields into
            raise outer.wrong(_FULL, "an object, as 'rope_scaling' is there too")
        full = old.replaced(full.fields() | old.fields())
    other = _LOCAL_THETA if local else _theta(config)
    sliding = _of_layer(config, outer, _SLIDING, local, other)
    p = _parameters(config, full, scalings or _FULL_LAYERS)
    windowed = _parameters(config, sliding, _SLIDING_LAYERS)
    rope = read_rope(p, dimensions, scalings or _FULL_LAYERS)
    rope.keys["freq_base_swa"] = windowed.theta
    rope.unread += windowed.unread()
    if outer:  # beside the objects of the layers nothing is read
        rope.unread += [outer.described(n) for n in outer.names() if n not in (_FULL, _SLIDING)]
    return rope


def _of_layer(
    config: Config, outer: Config | None, layer: str, base: str | None, theta: float
) -> Config:
    """Fields for one kind of layer, with the base that stands outside if it must."""
    inner = outer.section(layer) if outer else None
    fields: dict[str, Any] = inner.fields() if inner else {"rope_type": "default"}
    if "rope_theta" not in fields:
        fields["rope_theta"] = config.number(base, theta) if base else theta
    if config.stated(_PARTIAL) is not None:
        fields.setdefault(_PARTIAL, config.get(_PARTIAL))
    return config.inner(fields, f"rope_parameters.{layer}")


def _theta(config: Config) -> float:
    return config.known.theta if config.known else _LOCAL_THETA


def _parameters(
    config: Config, fields: Config, scalings: Scalings, outdone: tuple[str, ...] = ()
) -> Parameters:
    # Null is stated, and is no kind.
    kind = fields.get("rope_type", fields.get("type", "default"))
    kind = scalings.older.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in scalings.kinds:
        name = "rope_type" if fields.given("rope_type") else "type"
        raise UnsupportedError(
            f"'{fields.described(name)}' is a kind of rope scaling that llama.cpp does not have "
            "for this architecture",
            path=config.path,
            found=fields.quoted(name),
            wanted=", ".join(scalings.kinds),
            code="ARCH-ROPE",
        )
    context = original = config.count("max_position_embeddings")
    if _ORIGINAL in _FIELDS[kind]:
        # One that stands outside, or that the class has there, counts before one inside.
        outside = config.given(_ORIGINAL) or config.get(_ORIGINAL) is not None
        owner = config if outside else fields
        original = owner.count(_ORIGINAL, context)
        if kind == "longrope" and original == 1:  # its logarithm is divided by
            raise owner.wrong(_ORIGINAL, "more than 1")
        if fields.get(_ORIGINAL, original) != original:
            outdone += (fields.described(_ORIGINAL),)
    part = scalings.whole
    if fields.get(_PARTIAL, 1.0) is not None or scalings.partial or kind != "default":
        part = fields.number(_PARTIAL, part)
    if part != 1 and not scalings.partial:
        raise fields.unlike(_PARTIAL, "1.0")
    theta = fields.number("rope_theta")
    return Parameters(fields, kind, theta, part, original, context, outdone, scalings.beside)


# --- YaRN ---


_BETA_NAMES = ("beta_fast", "beta_slow")


def _yarn(rope: Rope, p: Parameters, pairs: int, scalings: Scalings) -> None:
    """By llama.cpp's own formula where it gives the same, else by factors where it takes them."""
    if not p.fields.given("factor"):
        raise p.fields.wrong("factor", "a positive number")
    factor = p.optional("factor") or p.context / p.original
    if factor < _LEAST_YARN:
        raise p.fields.wrong("factor", f"at least {_LEAST_YARN}")
    if np.float32(p.theta) == 1:  # its logarithm is divided by
        raise p.fields.wrong("rope_theta", "another number than 1")
    betas = tuple(_or_default(p, *named) for named in zip(_BETA_NAMES, _BETAS, strict=True))
    truncate = p.fields.flag("truncate", True)
    wanted = yarn_shares(p.theta, pairs, p.original, betas, truncate=truncate)
    attention = _yarn_attention(p, factor)
    whole = yarn_shares(p.theta, pairs, p.original, betas, truncate=True)
    exact, ggml = wanted, _ggml_shares(p.theta, pairs, p.original)
    if scalings.rounded and not truncate:
        wanted = whole
    if np.allclose(wanted, ggml, rtol=0, atol=1e-6):
        if wanted is not exact:
            off = np.abs((1 - exact * (1 - 1 / factor)) / (1 - whole * (1 - 1 / factor)) - 1)
            rope.rounded = float(off.max())
        rope.keys |= {
            "scaling.type": "yarn",
            "scaling.factor": factor,
            "scaling.original_context_length": p.original,
        }
        attention /= _magnitude(factor)  # which llama.cpp multiplies by
    elif scalings.by_pair:
        rope.tensors["rope_freqs.weight"] = (1 / (wanted / factor + 1 - wanted)).astype(np.float32)
    else:
        names = [n for n in (*_BETA_NAMES, "truncate") if p.fields.stated(n) is not None]
        raise UnsupportedError(
            "llama.cpp has YaRN for this architecture with its usual bounds only",
            path=p.fields.path,
            found=", ".join(f"{p.fields.described(n)} {p.fields.quoted(n)}" for n in names)
            or f"{p.fields.described('truncate')} null",
            wanted=f"beta_fast {_BETAS[0]}, beta_slow {_BETAS[1]}, truncate true",
            hint="leave these fields out of config.json, if the model may do without",
            code="ARCH-ROPE",
        )
    if not math.isclose(attention, 1.0, rel_tol=1e-9):
        rope.keys["scaling.attn_factor"] = attention


def _or_default(p: Parameters, name: str, default: float) -> float:
    """A number; transformers takes zero, like null, for the default."""
    value = p.fields.stated(name)
    return default if value is None or value == 0 else p.fields.number(name)


def yarn_shares(
    theta: float, pairs: int, original: int, betas: tuple[float, ...], *, truncate: bool
) -> NDArray[np.float64]:
    """How much of each pair's frequency is interpolated, shape (pairs,).

    A pair that turns more than ``betas[0]`` times in the original context is left alone, one that
    turns less than ``betas[1]`` times is interpolated whole.
    """
    low, high = (_turning(theta, pairs, original, beta) for beta in betas)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    return _ramp(pairs, low, high - low if high != low else 0.001)


def _ggml_shares(theta: float, pairs: int, original: int) -> NDArray[np.float64]:
    """The same as ggml computes it: bounds always whole, found in binary32."""
    single = np.float32
    low, high = (
        single(2 * pairs)
        * np.log(single(original) / (single(beta) * 2 * single(math.pi)))
        / (2 * np.log(single(theta)))
        for beta in _BETAS
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
    return _ramp(pairs, low, max(0.001, high - low))


def _ramp(pairs: int, low: float, width: float) -> NDArray[np.float64]:
    along: NDArray[np.float64] = np.arange(pairs, dtype=np.float64) - low
    return np.clip(along / width, 0.0, 1.0)


def _turning(theta: float, pairs: int, original: int, turns: float) -> float:
    """The pair, as a fraction, that turns so often in the original context."""
    return pairs * math.log(original / (turns * 2 * math.pi)) / math.log(theta)


def _yarn_attention(p: Parameters, factor: float) -> float:
    """What cosines and sines are multiplied by."""
    if (stated := p.optional("attention_factor")) is not None:
        return stated
    one, all_dimensions = (_or_default(p, n, 0.0) for n in ("mscale", "mscale_all_dim"))
    if one and all_dimensions:
        return _magnitude(factor, one) / _magnitude(factor, all_dimensions)
    return _magnitude(factor)


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


# --- Llama 3 and LongRoPE ---


def _llama3(rope: Rope, p: Parameters, dimensions: int) -> None:
    low, high = p.fields.number("low_freq_factor"), p.fields.number("high_freq_factor")
    if high <= low:
        raise p.fields.wrong("high_freq_factor", f"more than low_freq_factor, {low}")
    factor = p.fields.number("factor")
    rope.tensors["rope_freqs.weight"] = llama3_factors(
        p.theta, dimensions, factor, low, high, p.original
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


def _longrope(rope: Rope, p: Parameters, pairs: int) -> None:
    attention = p.optional("attention_factor")
    if attention is None:
        stretch = p.optional("factor") or p.context / p.original
        attention = math.sqrt(1 + math.log(stretch) / math.log(p.original)) if stretch > 1 else 1.0
    rope.keys |= {
        "scaling.type": "longrope",
        "scaling.original_context_length": p.original,
        "scaling.attn_factor": attention,
    }
    long, short = (p.fields.numbers(f"{name}_factor", pairs) for name in ("long", "short"))
    for name, factors in (("long", long), ("short", short)):
        rope.tensors[f"rope_factors_{name}.weight"] = np.array(factors, np.float32)
    if p.original < p.context and long != short:
        rope.longer = p.original
