"""Sizes, hyper-parameters and windows that architectures share, from the configuration.

Facts are llama.cpp's: what its loaders read, and what they derive where no key says it. What cannot
be said is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qconvert.architectures.config import Config
from qconvert.architectures.rope import Rope, Scalings, read_rope, settled
from qconvert.errors import FormatError
from qconvert.files.gguf_writer import MetadataValue

Keys = dict[str, MetadataValue]

# llama.cpp ends the process at more (LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS); of a head ten times
# what is in use. What is built from these numbers is built before the tensors are seen.
MAX_BLOCKS = 512
MAX_EXPERTS = 1024
MAX_HEAD = 10_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Dimensions of the tensors of one model, by the names that a slot's shape uses."""

    blocks: int
    head_dim: int
    named: dict[str, int]

    def shape(self, names: str) -> tuple[int, ...]:
        """The dimensions of these names."""
        return tuple(self.named[name] for name in names.split())


SILU = ("silu", "swish")
# ggml has one GELU, the approximation by tanh, from a table of binary16 that is further from either
# than they are from each other.
GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")


def plain_sizes(config: Config, *, grouped: bool = True, **more: int) -> Sizes:
    """Dimensions that every architecture has; ``grouped`` if queries may share keys.

    Raises:
        FormatError: they contradict each other.
    """
    width, heads = config.count("hidden_size"), config.count("num_attention_heads")
    groups = (config.optional_count("num_key_value_heads") or heads) if grouped else heads
    stated = _head_dim(config)
    head = stated or width // heads
    divides = config.known is None or config.known.divides
    uneven = heads % groups or (divides and width % heads)
    if uneven or head % 2 or not 0 < head <= MAX_HEAD:
        raise FormatError(
            "heads do not divide as they should",
            path=config.path,
            found=f"{heads} heads, {groups} of keys, width {width}, head width {head}",
            wanted="a multiple of the heads of keys, an even head width"
            + (", and a width that is a multiple of the heads" if divides else ""),
            code="ARCH-HEADS",
        )
    inner = config.count("intermediate_size")
    return Sizes(
        blocks=config.count("num_hidden_layers", most=MAX_BLOCKS),
        head_dim=head,
        named={
            "vocabulary": config.count("vocab_size"),
            "width": width,
            "inner": inner,
            "gate_up": 2 * inner,
            "head": head,
            "query": heads * head,
            "key": groups * head,
            "fused": (heads + 2 * groups) * head,
            "context": config.count("max_position_embeddings"),
            **more,
        },
    )


def _head_dim(config: Config) -> int | None:
    """The width of a head, where one is stated.

    A class without the field takes it from a file that has it, but not as null.
    """
    of_class = config.known is not None and "head_dim" in config.known.fields
    if config.given("head_dim") and not of_class:
        return config.count("head_dim", most=MAX_HEAD)
    return config.optional_count("head_dim", MAX_HEAD)


def filled_sizes(config: Config) -> Sizes:
    """Sizes where llama.cpp's loader takes no other width of heads."""
    sizes = plain_sizes(config)
    if sizes.named["query"] != sizes.named["width"]:
        raise config.unlike("head_dim", "hidden_size / num_attention_heads")
    return sizes


def common_keys(config: Config, sizes: Sizes) -> Keys:
    heads = config.count("num_attention_heads")
    return {
        "context_length": config.count("max_position_embeddings"),
        "embedding_length": sizes.named["width"],
        "block_count": sizes.blocks,
        "feed_forward_length": sizes.named["inner"],
        "attention.head_count": heads,
        "attention.head_count_kv": sizes.named["key"] // sizes.head_dim,
    }


def decoder_keys(config: Config, sizes: Sizes) -> Keys:
    # transformers makes masks of the first field whatever the class (null counts as false there),
    # and its cache goes by the others.
    config.require("is_causal", (True,), True)
    config.require("attention_chunk_size", (None,))
    declared = config.known and "layer_types" in config.known.fields
    if not declared and any(layer_types(config, sizes, [])):
        raise config.unlike("layer_types", f"'{FULL}'")
    return common_keys(config, sizes) | {
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", zero=True),
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        "vocab_size": sizes.named["vocabulary"],
    }


def rotary(scalings: Scalings) -> Callable[[Config, Sizes], Rope]:
    """Rotary positions of an architecture that rotates whole heads."""

    def rope(config: Config, sizes: Sizes) -> Rope:
        return read_rope(settled(config, scalings), sizes.head_dim, scalings)

    return rope


def expert_keys(config: Config, sizes: Sizes) -> Keys:
    used = config.count("num_experts_per_tok")
    if used > sizes.named["experts"]:
        raise FormatError(
            "more experts are used than there are",
            path=config.path,
            found=f"{used} of {sizes.named['experts']}",
            code="ARCH-EXPERTS",
        )
    return {"expert_count": sizes.named["experts"], "expert_used_count": used}


# --- windows ---

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: Config, sizes: Sizes, usual: list[bool]) -> list[bool]:
    """Which layers look at a window only: as ``layer_types`` says, else as usual.

    Raises:
        FormatError: it is not one of both for each layer.
    """
    types = config.get("layer_types")
    if types is None:
        return usual
    # transformers still takes the older name of full ones
    names = {FULL: False, "attention": False, SLIDING: True}
    if (
        not isinstance(types, list)
        or len(types) != sizes.blocks
        or not all(isinstance(t, str) and t in names for t in types)
    ):
        raise config.wrong(
            "layer_types", f"'{FULL}' or '{SLIDING}' for each of {sizes.blocks} layers"
        )
    return [names[t] for t in types]


def plain_window(config: Config, sizes: Sizes) -> int | None:
    """A window that all layers have; None if the context is no longer."""
    window = config.optional_count("sliding_window")
    return window if window is not None and window < sizes.named["context"] else None
